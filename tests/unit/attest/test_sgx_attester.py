"""The SGX attester on a folder that plays Gramine's pseudo-files."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.attest import Attester
from cloister.attest._attesters.sgx import SgxAttester
from cloister.errors import AttestationError

REPORT_DATA = bytes(range(64))
QUOTE = bytes(368) + REPORT_DATA + bytes(600)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "keys").mkdir()
    (tmp_path / "attestation_type").write_bytes(b"dcap")
    (tmp_path / "user_report_data").write_bytes(b"")
    (tmp_path / "quote").write_bytes(QUOTE)
    (tmp_path / "keys/_sgx_mrenclave").write_bytes(bytes(range(16)))
    return tmp_path


@pytest.fixture
def attester(folder: Path) -> SgxAttester:
    return SgxAttester(b"{}", folder=folder)


def test_evidence(attester: Attester, folder):
    evidence = attester.evidence(REPORT_DATA)
    assert (evidence.type, evidence.blob, evidence.aux) == ("sgx", QUOTE, b"{}")
    assert (folder / "user_report_data").read_bytes() == REPORT_DATA
    assert attester.binding == "REPORT.REPORTDATA"
    assert attester.claims()["tee"] == "sgx"
    assert str(folder) in repr(attester)


def test_collateral_is_read_anew(folder, tmp_path):
    path = tmp_path / "collateral.json"
    path.write_bytes(b"old")
    attester = SgxAttester(path, folder=folder)
    path.write_bytes(b"new")
    assert attester.evidence(REPORT_DATA).aux == b"new"


def test_missing_collateral(folder, tmp_path):
    with pytest.raises(AttestationError, match=r"SGX collateral .*none\.json cannot be read") as caught:
        SgxAttester(tmp_path / "none.json", folder=folder)
    assert "collateral fetch" in caught.value.hint


def test_report_data_of_the_wrong_size(attester):
    with pytest.raises(AttestationError, match="report_data is 32 bytes"):
        attester.evidence(bytes(32))


def test_quote_over_other_data(attester):
    with pytest.raises(AttestationError, match="does not carry the report data"):
        attester.evidence(bytes(64))


def test_not_under_gramine(tmp_path):
    with pytest.raises(AttestationError, match="attestation_type") as caught:
        SgxAttester(b"{}", folder=tmp_path / "none")
    assert "manifest" in caught.value.hint


@pytest.mark.parametrize("offered", [b"none", b"epid", b"\xff"])
def test_other_attestation_type(folder, offered):
    (folder / "attestation_type").write_bytes(offered)
    with pytest.raises(AttestationError, match='not "dcap"'):
        SgxAttester(b"{}", folder=folder)


def test_quote_over_the_limit(attester, folder):
    (folder / "quote").write_bytes(bytes(70_000))
    with pytest.raises(AttestationError, match="quote is over the limit"):
        attester.evidence(REPORT_DATA)


def test_report_data_that_cannot_be_written(attester, folder):
    (folder / "user_report_data").unlink()
    (folder / "user_report_data").mkdir()
    with pytest.raises(AttestationError, match=r"cannot write .*user_report_data"):
        attester.evidence(REPORT_DATA)


def test_sealing_key(attester, folder):
    key = attester.sealing_key("a")
    assert len(key) == 32
    assert attester.sealing_key("a") == key
    assert attester.sealing_key("b") != key
    (folder / "keys/_sgx_mrenclave").write_bytes(bytes(16))
    assert attester.sealing_key("a") != key


def test_sealing_key_of_the_wrong_size(attester, folder):
    (folder / "keys/_sgx_mrenclave").write_bytes(b"short")
    with pytest.raises(AttestationError, match="sealing key is 5 bytes"):
        attester.sealing_key("a")
