from __future__ import annotations

import base64
import json
import stat

import dcap_qvl
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from cloister.attest import HARDENING_LAYERS, Attester, SimulatedAttester, SimulatedRoot
from cloister.attest._simulated import attester as simulated
from cloister.attest._simulated import intel_pki as pki
from cloister.attest._simulated import intel_root
from cloister.attest._simulated.intel_root import PROVISION_KIND
from cloister.errors import AttestationError, StoreError
from cloister.wire import pack, unpack

NOW = 1_800_000_000
RTMR3 = b"\x33" * 48


def attester(root: SimulatedRoot, **options) -> SimulatedAttester:
    return SimulatedAttester(root.provision(), rtmr3=RTMR3, **options)


def test_quote_is_byte_true(root):
    """An independent parser reads back every field that was put in."""
    report_data = bytes(range(64))
    evidence = attester(root, layers=["no_dump", "seccomp"]).evidence(report_data)
    quote = dcap_qvl.Quote.parse(evidence.blob)
    assert quote.is_tdx()
    assert (quote.header.version, quote.header.attestation_key_type, quote.header.tee_type) == (4, 2, 0x81)
    assert quote.report.report_data == report_data
    assert quote.report.rt_mr3 == RTMR3
    assert quote.report.mr_td == simulated.SIMULATED_REGISTERS["mr_td"]
    assert quote.report.mr_owner_config[0] == 0b10000001
    assert quote.report.td_attributes == simulated.TD_ATTRIBUTES
    extension = quote.pck_extension()
    assert extension is not None
    assert extension.cpu_svn == pki.CPU_SVN
    assert extension.fmspc == root._state.values["fmspc"]
    assert b"SIMULATED" in base64.b64decode(quote.cert_chain_pem_bytes().split(b"-----")[2])


def test_accepted_by_the_strict_policy_of_the_quote_library(root):
    evidence = attester(root).evidence(bytes(64))
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.aux.decode())
    policy = dcap_qvl.QuotePolicy.strict(NOW)
    claims = dcap_qvl.QuoteVerifier(root.root_der).verify_with_policy(evidence.blob, collateral, NOW, policy)
    assert json.loads(claims.to_json())["tcb"]["status"] == "UpToDate"


def test_refused_under_the_root_of_intel(root):
    evidence = attester(root).evidence(bytes(64))
    collateral = dcap_qvl.QuoteCollateralV3.from_json(evidence.aux.decode())
    with pytest.raises(ValueError, match="Verification failed"):
        dcap_qvl.QuoteVerifier().verify_with_policy(evidence.blob, collateral, NOW, dcap_qvl.QuotePolicy.strict(NOW))


def test_is_an_attester(root):
    made: Attester = attester(root)
    assert made.type == "simulated"
    claims = made.claims()
    assert claims["simulated"] is True
    assert claims["rtmr3"] == RTMR3.hex()
    assert json.loads(json.dumps(claims)) == claims


def test_sealing_key_is_bound_to_platform_code_and_label(root, tmp_path):
    key = attester(root).sealing_key("checkpoint")
    other_platform = SimulatedRoot.create(tmp_path / "other", now=NOW)
    keys = {
        key,
        attester(root).sealing_key("report"),
        SimulatedAttester(root.provision(), rtmr3=bytes(48)).sealing_key("checkpoint"),
        attester(other_platform).sealing_key("checkpoint"),
    }
    assert len(key) == 32
    assert len(keys) == 4
    assert attester(SimulatedRoot.open(root._folder)).sealing_key("checkpoint") == key


def test_each_provision_has_its_own_attestation_key(root):
    first, second = (unpack(root.provision(), PROVISION_KIND) for _ in range(2))
    assert first["attestation_key"] != second["attestation_key"]
    assert first["fuse_key"] == second["fuse_key"]


def test_nothing_secret_is_shown(root):
    made = attester(root)
    secrets = [root._state.values["fuse_key"], made._secrets["attestation_key"]]
    shown = repr(root) + repr(made) + repr(root._state) + json.dumps(made.claims())
    assert not any(secret.hex() in shown or repr(secret)[2:-1] in shown for secret in secrets)


def test_wrong_lengths(root):
    with pytest.raises(AttestationError, match="rtmr3"):
        SimulatedAttester(root.provision(), rtmr3=bytes(32))
    with pytest.raises(AttestationError, match="report_data"):
        attester(root).evidence(bytes(32))


def test_malformed_provision(root):
    fields = unpack(root.provision(), PROVISION_KIND)
    other_key = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for blob, words in (
        (b"", "does not parse"),
        (pack("other", fields), "does not parse"),
        (pack(PROVISION_KIND, {**fields, "extra": b""}), "does not parse"),
        (pack(PROVISION_KIND, {**fields, "fuse_key": "text"}), "does not parse"),
        (pack(PROVISION_KIND, {**fields, "attestation_key": b"x"}), "no usable key"),
        (pack(PROVISION_KIND, {**fields, "attestation_key": other_key}), "no usable key"),
    ):
        with pytest.raises(AttestationError, match=words) as caught:
            SimulatedAttester(blob, rtmr3=RTMR3)
        assert fields["fuse_key"].hex() not in str(caught.value)


def test_layers_round_trip_and_unknown_ones_drop():
    for n in range(len(HARDENING_LAYERS) + 1):
        layers = HARDENING_LAYERS[:n]
        assert simulated.layers_from_bytes(simulated.layers_to_bytes(layers)) == layers
    assert simulated.layers_to_bytes(["unheard of"]) == bytes(48)
    assert simulated.layers_from_bytes(b"\xff" * 48) == HARDENING_LAYERS


def test_folder_is_private_and_can_be_opened_again(tmp_path):
    made = SimulatedRoot.create(tmp_path / "root", now=NOW)
    assert stat.S_IMODE((tmp_path / "root").stat().st_mode) == 0o700
    for path in (tmp_path / "root").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    opened = SimulatedRoot.open(tmp_path / "root")
    assert opened.root_der == made.root_der
    assert opened.root_sha256 == made.root_sha256
    assert opened.collateral_json() == made.collateral_json()


def test_create_does_not_overwrite(root):
    with pytest.raises(AttestationError, match="already"):
        SimulatedRoot.create(root._folder, now=NOW)


def test_create_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AttestationError, match="cannot write"):
        SimulatedRoot.create(tmp_path / "file" / "root", now=NOW)


def test_a_full_disk_is_told(root, tmp_path, monkeypatch):
    def full(path, *_):
        raise StoreError(f"no space left to write {path}", hint="free some")

    monkeypatch.setattr(intel_root, "write_whole", full)
    with pytest.raises(AttestationError, match="no space left"):
        SimulatedRoot.create(tmp_path / "full", now=NOW)


def test_open_what_is_no_root(tmp_path):
    with pytest.raises(AttestationError, match="no simulated root"):
        SimulatedRoot.open(tmp_path)
    SimulatedRoot.create(tmp_path / "root", now=NOW)
    path = tmp_path / "root" / "root.json"
    fields = json.loads(path.read_text())
    other_key = ed25519.Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    other = {**fields, "keys": {**fields["keys"], "pck": base64.b64encode(other_key).decode()}}
    for damaged in ("", "[]", "{}", json.dumps({**fields, "version": 2}), json.dumps(other), path.read_text()[:-40]):
        path.write_text(damaged)
        with pytest.raises(AttestationError, match="damaged"):
            SimulatedRoot.open(tmp_path / "root")


def test_missing_collateral_is_told(tmp_path):
    made = SimulatedRoot.create(tmp_path / "root", now=NOW)
    (tmp_path / "root" / "collateral.json").unlink()
    with pytest.raises(AttestationError, match="cannot read"):
        made.provision()
    made.refresh(NOW + 1)
    assert made.provision()


def test_der_lengths_and_numbers():
    assert pki._der(4, bytes(127))[:2] == b"\x04\x7f"
    assert pki._der(4, bytes(128))[:3] == b"\x04\x81\x80"
    assert pki._der(4, bytes(256))[:4] == b"\x04\x82\x01\x00"
    assert pki._der_integer(0) == b"\x02\x01\x00"
    assert pki._der_integer(127) == b"\x02\x01\x7f"
    assert pki._der_integer(128) == b"\x02\x02\x00\x80"
    assert pki._der_oid((1, 2, 840, 113741)) == bytes.fromhex("06062a864886f84d")
