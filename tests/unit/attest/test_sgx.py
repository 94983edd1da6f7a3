"""The simulated SGX quotes: what they hold, and that TDX collateral stays apart from theirs."""

from __future__ import annotations

import json

import dcap_qvl
import pytest

from cloister.attest import SimulatedRoot
from cloister.attest._simulated.sgx_quote import SIMULATED_MR_SIGNER, SimulatedEnclave, sgx_evidence
from cloister.errors import AttestationError

NOW = 1_800_000_000


@pytest.fixture
def platform(tmp_path) -> SimulatedRoot:
    return SimulatedRoot.create(tmp_path / "root", now=NOW)


def test_quote_is_of_version_3_and_parses(platform):
    platform.refresh(NOW, tee="sgx")
    evidence = sgx_evidence(platform, SimulatedEnclave(prod_id=7, svn=9), report_data=bytes(range(64)))
    quote = dcap_qvl.parse_quote(evidence.blob)
    assert quote.header.version == 3
    assert quote.is_sgx()
    assert bytes(quote.report.report_data) == bytes(range(64))
    assert bytes(quote.report.mr_signer) == SIMULATED_MR_SIGNER
    assert evidence.blob[48 + 256 : 48 + 260] == b"\x07\0\x09\0"
    assert quote.quote_type() == "SGX"


def test_each_tee_has_collateral_of_its_own(platform):
    before = platform.collateral_json()
    platform.refresh(NOW, tee="sgx")
    assert platform.collateral_json() == before
    sgx = json.loads(platform.collateral_json(tee="sgx"))
    assert json.loads(sgx["tcb_info"])["id"] == "SGX"
    assert json.loads(sgx["qe_identity"])["id"] == "QE"
    assert "tdxtcbcomponents" not in sgx["tcb_info"]
    assert json.loads(json.loads(before)["tcb_info"])["id"] == "TDX"


def test_no_sgx_collateral_yet(platform):
    with pytest.raises(AttestationError, match=r"collateral-sgx\.json"):
        sgx_evidence(platform, SimulatedEnclave(), report_data=bytes(64))


def test_report_data_of_the_wrong_size(platform):
    platform.refresh(NOW, tee="sgx")
    with pytest.raises(AttestationError, match="report_data is 63 bytes"):
        sgx_evidence(platform, SimulatedEnclave(), report_data=bytes(63))
