"""TPM quotes, PCR arithmetic, and the attesters above the port: a TPM of Python objects, no device."""

from __future__ import annotations

import hashlib
import importlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from cloister.attest import Policy, verify_evidence
from cloister.attest._attesters import tpm_port, vtpm
from cloister.attest._attesters.azure import HCL_NV_INDEX, AzureAttester
from cloister.attest._attesters.tpm_device import DeviceTpm
from cloister.attest._attesters.tpm_port import bring_up, expected_pcr, quote_fields
from cloister.attest._attesters.vtpm import SEALED_NAME, VtpmAttester
from cloister.attest._simulated.tpm import SimulatedTpm, quote_message
from cloister.attest._verifiers import tpm
from cloister.attest._verifiers.azure import AZURE_FIELDS, AZURE_KIND
from cloister.attest._verifiers.vtpm import PINNED_REQUIRED
from cloister.errors import AttestationError, StoreError
from cloister.wire import unpack

NOW = 1_800_000_000
REPORT_DATA = bytes(range(64))
EVENTS = [bytes([i]) * 48 for i in range(4)]


@pytest.fixture(scope="module", params=["rsa", "ecc"])
def key(request):
    if request.param == "rsa":
        return rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def port(key):
    return SimulatedTpm(key)


@pytest.fixture
def ecc_port():
    return SimulatedTpm(ec.generate_private_key(ec.SECP256R1()))


def hcl_report(*, kind: int = 2) -> bytes:
    runtime = json.dumps({"keys": []}).encode()
    size = 32 + 1184 + 20 + len(runtime)
    head = b"HCLA" + (1).to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(20)
    inner = [20 + len(runtime), 1, kind, 1, len(runtime)]
    return head + bytes(1184) + b"".join(n.to_bytes(4, "little") for n in inner) + runtime


@pytest.mark.parametrize(("nonce_bytes", "binding"), [(64, "extraData"), (50, "SHA-256 in extraData")])
def test_pinned_key_is_accepted(key, nonce_bytes, binding):
    attester = VtpmAttester(port=SimulatedTpm(key, nonce_bytes=nonce_bytes), events=EVENTS)
    zeros = "0" * 64
    policy = Policy.parse(
        f"""
version = 1
accept = ["vtpm"]
[vtpm]
ak_source = ["pinned"]
ak_sha256 = ["{attester.ak_sha256}"]
pcr0 = ["{zeros}"]
pcr4 = ["{zeros}"]
[roles.client.vtpm]
pcr15 = ["{expected_pcr(EVENTS).hex()}"]
""".encode()
    )
    evidence = attester.evidence(REPORT_DATA)
    assert evidence.type == attester.type == "vtpm"
    decision = verify_evidence(evidence, policy, role="client", report_data=REPORT_DATA, now=NOW)
    claims = decision.claims
    assert not claims.simulated
    assert claims.root_sha256 == attester.ak_sha256
    assert claims.details["binding"] == binding
    assert claims.details["root"] == "pinned attestation key"
    assert claims.details["clock_ms"] == "123456"
    assert claims.details["clock_safe"] == "yes"
    assert claims.details["reset_count"] == "7"
    assert claims.details["restart_count"] == "1"
    assert claims.details["firmware_version"] == "2024012500012000"
    assert set(PINNED_REQUIRED) <= set(claims.measurements)
    assert any("whoever pinned it" in limit for limit in decision.limits)


def test_bare_rsa_signature():
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    fields = quote_fields(SimulatedTpm(key), REPORT_DATA, runtime=bytes(32))
    bare = {**fields, "signature": fields["signature"][6:]}
    assert tpm.verify_quote(bare, key.public_key()) == tpm.verify_quote(fields, key.public_key())


def test_quote_of_some_pcrs():
    quote = tpm.parse_quote(quote_message(b"n", (23, 0, 9), bytes(32), safe=0))
    assert quote.pcrs == (0, 9, 23)
    assert quote.extra_data == b"n"
    assert not quote.safe


def test_expected_pcr_is_the_tpms_own_arithmetic(ecc_port):
    assert expected_pcr([]) == bytes(32)
    first = hashlib.sha256(bytes(32) + hashlib.sha256(EVENTS[0]).digest()).digest()
    assert expected_pcr(EVENTS[:1]) == first
    assert expected_pcr(EVENTS[1:], first) == expected_pcr(EVENTS)
    assert bring_up(ecc_port, EVENTS) == expected_pcr(EVENTS) == ecc_port.pcrs[15]
    with pytest.raises(AttestationError, match="32 bytes, not 48"):
        expected_pcr([bytes(32)])


@pytest.mark.parametrize("done", range(5))
def test_register_goes_on_where_a_predecessor_left_it(ecc_port, done):
    ecc_port.pcrs[15] = expected_pcr(EVENTS[:done])
    assert bring_up(ecc_port, EVENTS) == ecc_port.pcrs[15] == expected_pcr(EVENTS)


def test_register_of_another_job(ecc_port):
    ecc_port.pcrs[15] = expected_pcr([b"x" * 48])
    with pytest.raises(AttestationError, match="no state of this job") as caught:
        VtpmAttester(port=ecc_port, events=EVENTS)
    assert "start the machine anew" in caught.value.hint
    assert ecc_port.pcrs[15] == expected_pcr([b"x" * 48])


def test_pcrs_that_change_between_reading_and_quoting(ecc_port, monkeypatch):
    read, changes = ecc_port.read_pcrs, []

    def changing(pcrs):
        values = read(pcrs)
        if len(changes) < 2:
            changes.append(1)
            ecc_port.extend_pcr(10, bytes(32))
        return values

    monkeypatch.setattr(ecc_port, "read_pcrs", changing)
    fields = quote_fields(ecc_port, REPORT_DATA, runtime=bytes(32))
    assert tpm.verify_quote(fields, ecc_port.key.public_key()).measurements["pcr10"] == ecc_port.pcrs[10].hex()
    monkeypatch.setattr(tpm_port, "_QUOTE_ATTEMPTS", 1)
    changes.clear()
    with pytest.raises(AttestationError, match="change faster"):
        quote_fields(ecc_port, REPORT_DATA, runtime=bytes(32))


def test_register_that_somebody_extends_later(ecc_port):
    attester = VtpmAttester(port=ecc_port, events=EVENTS)
    ecc_port.extend_pcr(15, bytes(32))
    with pytest.raises(AttestationError, match="has changed since"):
        attester.evidence(REPORT_DATA)


def test_report_data_of_another_length(ecc_port):
    with pytest.raises(AttestationError, match="63 bytes, not 64"):
        VtpmAttester(port=ecc_port).evidence(bytes(63))


def test_without_an_index_nothing_is_counted(ecc_port, tmp_path):
    attester = VtpmAttester(port=ecc_port, events=EVENTS, folder=tmp_path, counter_index=None)
    assert len(attester.sealing_key("a")) == 32
    assert attester.counter() is None
    assert not ecc_port.counters


def test_sealing_and_counting(ecc_port, tmp_path):
    ecc_port.counters[1] = 40  # another program's counter: ours starts above, and still counts from 0
    attester = VtpmAttester(port=ecc_port, events=EVENTS, folder=tmp_path)
    key = attester.sealing_key("a")
    assert len(key) == 32
    assert key == VtpmAttester(port=ecc_port, events=EVENTS, folder=tmp_path).sealing_key("a")
    assert key != attester.sealing_key("b")
    counter = attester.counter()
    assert counter.value() == 0
    assert counter.increment() == 1
    counter.advance(1)
    counter.advance(4)
    assert attester.counter().value() == 4
    with pytest.raises(AttestationError, match="over the limit of 1000"):
        counter.advance(1005)
    attester.extend_runtime(bytes(48))
    with pytest.raises(AttestationError):
        attester.sealing_key("a")


@pytest.mark.parametrize("lost", [None, 3])
def test_counter_that_is_gone(ecc_port, tmp_path, lost):
    counter = VtpmAttester(port=ecc_port, folder=tmp_path).counter()
    ecc_port.counters = {} if lost is None else {vtpm.COUNTER_INDEX: lost}
    for use in (counter.value, counter.increment, lambda: counter.advance(3)):
        with pytest.raises(AttestationError, match="is not the one"):
            use()


def test_sealing_needs_a_folder(ecc_port, tmp_path):
    with pytest.raises(AttestationError, match="folder"):
        VtpmAttester(port=ecc_port).sealing_key("a")
    with pytest.raises(StoreError):
        VtpmAttester(port=ecc_port, folder=tmp_path / "missing").sealing_key("a")
    (tmp_path / SEALED_NAME).mkdir()
    with pytest.raises(AttestationError, match="cannot be read"):
        VtpmAttester(port=ecc_port, folder=tmp_path).sealing_key("a")


def test_sealed_secret_of_another_form(ecc_port, tmp_path):
    (tmp_path / SEALED_NAME).write_bytes(ecc_port.seal(b"short", vtpm.SEALING_PCRS))
    with pytest.raises(AttestationError, match="no sealed secret of this release"):
        VtpmAttester(port=ecc_port, folder=tmp_path).sealing_key("a")


def test_sealing_without_the_register_is_refused(ecc_port):
    with pytest.raises(AttestationError, match="same keys"):
        VtpmAttester(port=ecc_port, sealing_pcrs=(0, 7))


def test_claims_say_what_a_software_tpm_is(ecc_port, monkeypatch):
    attester = VtpmAttester(port=ecc_port, events=EVENTS)
    claims = attester.claims()
    json.dumps(claims)
    assert claims["simulated"] is True
    assert claims["manufacturer"] == "software TPM (SW SIMULATED)"
    assert claims["pcr15"] == expected_pcr(EVENTS).hex()
    assert repr(attester) == f"VtpmAttester(pcr15={expected_pcr(EVENTS).hex()[:16]}…)"
    assert attester.binding == "TPMS_ATTEST.extraData"
    monkeypatch.setattr(ecc_port, "vendor", lambda: "IFX SLB9670")
    assert attester.manufacturer == "IFX SLB9670"
    assert attester.claims()["simulated"] is False


def test_missing_extra_names_it(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(AttestationError, match=r"cloister\[vtpm\]"):
        VtpmAttester()
    with pytest.raises(AttestationError, match=r"cloister\[vtpm\]"):
        AzureAttester(b"collateral")


def test_unknown_key_algorithm():
    with pytest.raises(AttestationError, match='not "dsa"'):
        DeviceTpm(algorithm="dsa")


def test_simulated_tpm_refuses_as_a_tpm_does(ecc_port):
    for use in (
        lambda: ecc_port.read_nv(1),
        lambda: ecc_port.unseal(b"x", (0,)),
        lambda: ecc_port.quote(bytes(65), (0,)),
    ):
        with pytest.raises(AttestationError):
            use()


def azure(key, *, kind: int = 2, padding: int = 300, **options) -> AzureAttester:
    port = SimulatedTpm(key, nonce_bytes=50, nv={HCL_NV_INDEX: hcl_report(kind=kind) + bytes(padding)})
    return AzureAttester(port=port, events=EVENTS, **options)


def test_azure_evidence_on_snp(key, tmp_path):
    chain = tmp_path / "chain.pem"
    chain.write_bytes(b"chain")
    attester = azure(key, collateral=chain)
    evidence = attester.evidence(REPORT_DATA)
    assert (evidence.type, evidence.aux) == ("azure", b"chain")
    fields = unpack(evidence.blob, AZURE_KIND)
    assert set(fields) == set(AZURE_FIELDS)
    assert fields["hcl_report"] == hcl_report()
    assert fields["td_quote"] == b""
    assert tpm.verify_quote(fields, key.public_key()).report_data == REPORT_DATA
    claims = attester.claims()
    assert (claims["evidence_type"], claims["hardware"], claims["simulated"]) == ("azure", "snp", False)
    chain.write_bytes(b"renewed")
    assert attester.evidence(REPORT_DATA).aux == b"renewed"


def test_azure_evidence_on_tdx(key):
    evidence = azure(key, kind=4, collateral=b"{}", td_quote=b"quote").evidence(REPORT_DATA)
    assert unpack(evidence.blob, AZURE_KIND)["td_quote"] == b"quote"


def test_azure_seals_as_a_vtpm_does(key, tmp_path):
    attester = azure(key, collateral=b"chain", folder=tmp_path)
    assert attester.sealing_key("a") == attester.sealing_key("a")
    assert attester.counter().increment() == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"collateral": b""}, "is empty"),
        ({"collateral": b"c", "td_quote": b"quote"}, "SNP one"),
        ({"collateral": b"c", "kind": 4}, "none was given"),
        ({"collateral": b"c", "kind": 4, "td_quote": b""}, "is empty"),
        ({"collateral": b"c", "kind": 3}, "neither SNP nor TDX"),
    ],
)
def test_azure_parts_that_are_missing(key, options, text):
    with pytest.raises(AttestationError, match=text):
        azure(key, **options)


def test_azure_on_another_machine(ecc_port):
    with pytest.raises(AttestationError, match="0x01400001"):
        AzureAttester(b"collateral", port=ecc_port, events=EVENTS)
    assert ecc_port.pcrs[15] == bytes(32)  # nothing was extended
