"""Every refusal of the `azure` verifier: a software AMD and a software Intel in the place of the genuine ones."""

from __future__ import annotations

import base64
import hashlib
import json
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from cloister.attest import Policy, SimulatedAttester, verify_evidence
from cloister.attest._attesters.azure import HCL_NV_INDEX, AzureAttester
from cloister.attest._attesters.tpm_port import expected_pcr
from cloister.attest._simulated.amd_root import SimulatedAmdRoot, SimulatedSnpAttester
from cloister.attest._simulated.attester import SIMULATED_REGISTERS
from cloister.attest._simulated.tpm import SimulatedTpm
from cloister.attest._verifiers import dcap, snp
from cloister.attest._verifiers.azure import AZURE_KIND
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
)
from cloister.wire import Evidence, pack, unpack

NOW = 1_800_000_000
REPORT_DATA = bytes(range(64))
EVENTS = [bytes([i]) * 48 for i in range(4)]
MEASUREMENT = bytes([7]) * 48


def base64url(number: int) -> str:
    return base64.urlsafe_b64encode(number.to_bytes((number.bit_length() + 7) // 8, "big")).rstrip(b"=").decode()


def jwk(key: rsa.RSAPrivateKey, **changes: object) -> dict[str, object]:
    n = key.public_key().public_numbers().n
    return {"kid": "HCLAkPub", "key_ops": ["sign"], "kty": "RSA", "e": "AQAB", "n": base64url(n)} | changes


def hcl_report(hardware: bytes, runtime: bytes, **changes: int) -> bytes:
    size = 32 + 1184 + 20 + len(runtime)
    values = {"version": 2, "size": size, "data_size": 20 + len(runtime), "runtime_version": 1, "hash_type": 1}
    values |= {"runtime_size": len(runtime)} | changes
    v = values
    head = struct.pack("<4sIIII12x", b"HCLA", v["version"], v["size"], 2, 0)
    inner = struct.pack("<5I", v["data_size"], v["runtime_version"], v["kind"], v["hash_type"], v["runtime_size"])
    return head + hardware.ljust(1184, b"\0") + inner + runtime


class Machine:
    """An Azure machine whose CPU and vTPM are software; `runtime` is what its paravisor would have signed."""

    def __init__(self, tee: str, key, amd: SimulatedAmdRoot, intel) -> None:
        self.tee, self.key, self.amd, self.intel = tee, key, amd, intel
        self.runtime: object = {"keys": [{"kid": "HCLEkPub"}, jwk(key)], "vm-configuration": {"secure-boot": True}}
        self.fields: dict[str, object] = {}
        self.header: dict[str, int] = {}
        self.text: bytes | None = None
        self.bound: bytes | None = None
        self.vmpl = 0
        self.aux: bytes | None = None

    def evidence(self) -> Evidence:
        text = self.text if self.text is not None else json.dumps(self.runtime).encode()
        bound = self.bound if self.bound is not None else hashlib.sha256(text).digest() + bytes(32)
        if self.tee == "snp":
            attester = SimulatedSnpAttester(self.amd, host_data=bytes(32), measurement=MEASUREMENT, vmpl=self.vmpl)
            below = attester.evidence(bound)
            report, td_quote = hcl_report(below.blob, text, **({"kind": 2} | self.header)), b""
        else:
            below = SimulatedAttester(self.intel.provision(), rtmr3=bytes(48)).evidence(bound)
            report, td_quote = hcl_report(bytes(1024), text, **({"kind": 4} | self.header)), below.blob
        aux = below.aux if self.aux is None else self.aux
        port = SimulatedTpm(self.key, nonce_bytes=50, nv={HCL_NV_INDEX: hcl_report(b"", b"{}", kind=2)})
        made = AzureAttester(b"-", events=EVENTS, port=port).evidence(REPORT_DATA)
        fields = unpack(made.blob, AZURE_KIND) | {"hcl_report": report, "td_quote": td_quote} | self.fields
        return Evidence("azure", pack(AZURE_KIND, fields), aux)

    def policy(self, *changes: tuple[str, str]) -> Policy:
        text = f"""
version = 1
accept = ["azure"]
[roots]
intel_sha256 = ["{self.intel.root_sha256}"]
amd_ark_sha256.milan = ["{self.amd.root_sha256}"]
[snp]
max_vmpl = 1
[vtpm]
ak_source = ["hcl"]
pcr4 = ["{"0" * 64}"]
[roles.server.snp]
measurement = ["{MEASUREMENT.hex()}"]
[roles.server.tdx]
mr_td = ["{SIMULATED_REGISTERS["mr_td"].hex()}"]
[roles.server.vtpm]
pcr15 = ["{expected_pcr(EVENTS).hex()}"]
"""
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        return Policy.parse(text.encode())

    def verify(self, *changes: tuple[str, str], evidence: Evidence | None = None, role: str = "server"):
        chosen = evidence or self.evidence()
        return verify_evidence(chosen, self.policy(*changes), role=role, report_data=REPORT_DATA, now=NOW)


@pytest.fixture(scope="module")
def parts():
    return rsa.generate_private_key(public_exponent=65537, key_size=2048), SimulatedAmdRoot(now=NOW)


@pytest.fixture(params=["snp", "tdx"])
def machine(request, parts, world, monkeypatch):
    """Its roots pass for the vendors' own, so that only the check under test is left to refuse."""
    monkeypatch.setitem(snp.AMD_ARK_SHA256, "milan", parts[1].root_sha256)
    monkeypatch.setattr(dcap, "INTEL_ROOT_SHA256", world.root.root_sha256)
    return Machine(request.param, *parts, world.root)


def test_honest_evidence_is_accepted(machine):
    claims = machine.verify().claims
    assert (claims.tee, claims.simulated, claims.report_data) == ("vtpm", False, REPORT_DATA)
    assert claims.parts[0].tee == machine.tee
    assert claims.details["root"] == f"{machine.tee} below the vTPM"
    assert claims.details["binding"] == "SHA-256 in extraData"
    assert claims.details["vm_secure-boot"] == "True"


def test_the_cpus_root_is_not_the_vendors(parts, world):
    """Nothing below a vTPM is ever accepted as simulated, whatever the policy says."""
    for tee in ("snp", "tdx"):
        place = Machine(tee, *parts, world.root)
        with pytest.raises(PolicyRejectedError, match="its root is not"):
            place.verify(('accept = ["azure"]', 'accept = ["azure"]\nallow_simulated = true'))


def test_source_hcl_is_not_named(machine):
    with pytest.raises(PolicyRejectedError, match='does not name "hcl"'):
        machine.verify(('"hcl"', '"pinned"'))


def test_claims_that_the_report_does_not_carry(machine):
    for bound in (bytes(64), hashlib.sha256(b"other").digest() + bytes(32)):
        machine.bound = bound
        with pytest.raises(EvidenceSignatureError, match="hash of the runtime claims"):
            machine.verify()


def test_more_than_the_hash_in_the_report(machine):
    text = json.dumps(machine.runtime).encode()
    machine.bound = hashlib.sha256(text).digest() + bytes(31) + b"\1"
    with pytest.raises(EvidenceSignatureError, match="hash of the runtime claims"):
        machine.verify()


def test_key_that_the_cpu_does_not_vouch_for(machine):
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    machine.runtime = {"keys": [jwk(other)]}
    with pytest.raises(EvidenceSignatureError, match="not signed by its attestation key"):
        machine.verify()


@pytest.mark.parametrize("machine", ["snp"], indirect=True)
def test_report_that_the_guest_itself_asked_for(machine):
    machine.vmpl = 1
    with pytest.raises(PolicyRejectedError, match="VMPL 1, so not by the paravisor"):
        machine.verify()


@pytest.mark.parametrize(
    "runtime",
    [
        {},
        {"keys": None},
        {"keys": {}},
        {"keys": []},
        {"keys": ["HCLAkPub", None]},
        {"keys": [{"kid": "HCLEkPub"}]},
    ],
)
def test_no_attestation_key_in_the_claims(machine, runtime):
    machine.runtime = runtime
    with pytest.raises(MalformedEvidenceError, match="0 keys HCLAkPub"):
        machine.verify()


def test_two_attestation_keys(machine):
    machine.runtime = {"keys": [jwk(machine.key), jwk(machine.key)]}
    with pytest.raises(MalformedEvidenceError, match="2 keys HCLAkPub"):
        machine.verify()


@pytest.mark.parametrize(
    "change",
    [
        {"kty": "EC"},
        {"e": "Aw"},
        {"e": 65537},
        {"n": 17},
        {"n": ""},
        {"n": "no base64 !"},
        {"n": "A" * 701},
        {"n": "AAAAA"},
        {"n": base64url((1 << 1023) + 1)},
    ],
)
def test_attestation_key_of_another_form(machine, change):
    machine.runtime = {"keys": [jwk(machine.key, **change)]}
    with pytest.raises(MalformedEvidenceError, match=r"HCLAkPub|attestation key"):
        machine.verify()


def test_even_modulus(machine):
    machine.runtime = {"keys": [jwk(machine.key, n=base64url(1 << 2047))]}
    with pytest.raises((EvidenceSignatureError, MalformedEvidenceError)):
        machine.verify()


@pytest.mark.parametrize("text", [b"x", b"\xff\xfe", b"[" * 5000, b"[1]", b'"text"', b"1" * 5000])
def test_claims_that_are_no_json_object(machine, text):
    machine.text = text
    with pytest.raises(MalformedEvidenceError, match="no JSON"):
        machine.verify()


def test_configuration_is_text_for_a_person_only(machine):
    listed = {"secure-boot": "x" * 900, "tpm-enabled": {"deep": 1}, "console-enabled": "a\x1b[2J", "vmUniqueId": "id"}
    machine.runtime = {"keys": [jwk(machine.key)], "vm-configuration": listed}
    details = machine.verify().claims.details
    assert details["vm_secure-boot"] == "x" * 64
    assert details["vm_vmUniqueId"] == "id"
    assert not {"vm_tpm-enabled", "vm_console-enabled"} & set(details)
    machine.runtime = {"keys": [jwk(machine.key)], "vm-configuration": ["no table"]}
    assert not any(name.startswith("vm_") for name in machine.verify().claims.details)


@pytest.mark.parametrize(
    ("header", "text"),
    [
        ({"version": 0}, "version 1 or 2"),
        ({"version": 3}, "version 1 or 2"),
        ({"size": 1237}, "do not add up"),
        ({"data_size": 21}, "do not add up"),
        ({"runtime_size": 1}, "do not add up"),
        ({"runtime_version": 2}, "of version 1 with SHA-256"),
        ({"hash_type": 2}, "of version 1 with SHA-256"),
        ({"kind": 3}, "neither SNP nor TDX"),
    ],
)
def test_hcl_report_of_another_form(machine, header, text):
    machine.header = header
    with pytest.raises(MalformedEvidenceError, match=text):
        machine.verify()


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda blob: b"", "0 bytes"),
        (lambda blob: blob[:1236], "1236 bytes"),
        (lambda blob: blob + b"\0", "do not add up"),
        (lambda blob: blob[:-1], "do not add up"),
        (lambda blob: blob + bytes(16 << 10), "bytes, not"),
        (lambda blob: b"HCLB" + blob[4:], "not an HCL report"),
    ],
)
def test_hcl_report_of_another_size(machine, damage, text):
    honest = unpack(machine.evidence().blob, AZURE_KIND)["hcl_report"]
    machine.fields = {"hcl_report": damage(honest)}
    with pytest.raises(MalformedEvidenceError, match=text):
        machine.verify()


def test_td_quote_that_is_missing_or_too_many(machine):
    machine.fields = {"td_quote": b"" if machine.tee == "tdx" else b"quote"}
    text = "without its TD quote" if machine.tee == "tdx" else "comes with a TD quote"
    with pytest.raises(MalformedEvidenceError, match=text):
        machine.verify()


def test_collateral_that_is_missing(machine):
    machine.aux = b""
    with pytest.raises(MalformedEvidenceError, match=r"missing|come without"):
        machine.verify()


@pytest.mark.parametrize(
    ("machine", "name", "size"),
    [
        ("snp", "pcr4", 32),
        ("tdx", "pcr4", 32),
        ("snp", "pcr15", 32),
        ("tdx", "pcr15", 32),
        ("snp", "measurement", 48),
        ("tdx", "mr_td", 48),
    ],
    indirect=["machine"],
)
def test_register_with_another_value_or_without_one(machine, name, size):
    with pytest.raises(MeasurementMismatchError, match=f"{name} is"):
        machine.verify((f'{name} = ["', f'{name} = ["{"11" * size}"] # "'))
    with pytest.raises(PolicyRejectedError, match=f"no value of {name}"):
        machine.verify((f"\n{name} = ", f"\n#{name} = "))


@pytest.mark.parametrize(
    ("machine", "tee"), [("snp", "snp"), ("snp", "vtpm"), ("tdx", "tdx"), ("tdx", "vtpm")], indirect=["machine"]
)
def test_role_without_a_set(machine, tee):
    with pytest.raises(PolicyRejectedError, match="no measurement set"):
        machine.verify((f"[roles.server.{tee}]", f"[roles.client.{tee}]"))


def test_chip_that_is_not_allowed(machine):
    listed = f'[platforms]\nallow_chip_id = ["{"00" * 64}"]\n[vtpm]'
    with pytest.raises(PolicyRejectedError, match="is not in"):
        machine.verify(("[vtpm]", listed))


def test_fields_of_another_form(machine):
    with pytest.raises(MalformedEvidenceError, match="exactly the fields"):
        machine.verify(evidence=Evidence("azure", pack(AZURE_KIND, {"hcl_report": b""}), b""))
    with pytest.raises(MalformedEvidenceError, match="does not parse"):
        machine.verify(evidence=Evidence("azure", bytes(200_000), b""))
