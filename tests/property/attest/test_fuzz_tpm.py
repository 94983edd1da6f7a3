"""Whatever bytes come as TPM evidence or as an HCL report: a decision or a `CloisterError`, nothing else."""

from __future__ import annotations

import json
import struct

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.attest import Policy, verify_evidence
from cloister.attest._attesters.vtpm import VtpmAttester
from cloister.attest._simulated.tpm import SimulatedTpm
from cloister.attest._verifiers import azure, tpm
from cloister.attest._verifiers.azure import AZURE_FIELDS, AZURE_KIND
from cloister.attest._verifiers.vtpm import TPM_FIELDS, TPM_KIND
from cloister.errors import CloisterError
from cloister.wire import Evidence, pack, unpack

NOW = 1_800_000_000
REPORT_DATA = bytes(64)
FEW = settings(max_examples=150, deadline=None, derandomize=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


class Machine:
    def __init__(self, key) -> None:
        attester = VtpmAttester(port=SimulatedTpm(key))
        self.fields = unpack(attester.evidence(REPORT_DATA).blob, TPM_KIND)
        zeros = "0" * 64
        text = f"""
version = 1
accept = ["azure", "vtpm"]
[vtpm]
ak_source = ["hcl", "pinned"]
ak_sha256 = ["{attester.ak_sha256}"]
pcr0 = ["{zeros}"]
pcr4 = ["{zeros}"]
[roles.server.vtpm]
pcr15 = ["{zeros}"]
"""
        self.policy = Policy.parse(text.encode())

    def claims(self, kind: str, blob: bytes, aux: bytes = b""):
        evidence = Evidence(kind, blob, aux)
        return verify_evidence(evidence, self.policy, role="server", report_data=REPORT_DATA, now=NOW).claims

    def refused_or_equal(self, fields: dict[str, object]) -> None:
        try:
            claims = self.claims("vtpm", pack(TPM_KIND, fields))
        except CloisterError:
            return
        assert claims == self.claims("vtpm", pack(TPM_KIND, self.fields))


@pytest.fixture(scope="module", params=["rsa", "ecc"])
def machine(request):
    if request.param == "rsa":
        return Machine(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    return Machine(ec.generate_private_key(ec.SECP256R1()))


def test_honest_evidence_is_accepted(machine):
    assert machine.claims("vtpm", pack(TPM_KIND, machine.fields)).report_data == REPORT_DATA


@FEW
@given(blob=st.binary(max_size=2000), aux=st.binary(max_size=100))
def test_arbitrary_bytes(machine, blob, aux):
    for kind in ("vtpm", "azure"):
        with pytest.raises(CloisterError):
            machine.claims(kind, blob, aux)


@FEW
@given(data=st.data())
def test_fields_replaced(machine, data):
    names = data.draw(st.lists(st.sampled_from(TPM_FIELDS), min_size=1, max_size=2, unique=True))
    machine.refused_or_equal({**machine.fields, **{name: data.draw(st.binary(max_size=600)) for name in names}})


@FEW
@given(data=st.data())
def test_fields_damaged(machine, data):
    name = data.draw(st.sampled_from([name for name in TPM_FIELDS if machine.fields[name]]))
    changed = bytearray(machine.fields[name])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(changed)))
    for blob in (bytes(changed), bytes(changed[:cut]), bytes(changed) + bytes(changed[:cut])):
        machine.refused_or_equal({**machine.fields, name: blob})


@FEW
@given(head=st.binary(max_size=40), rest=st.binary(max_size=300))
def test_quotes_that_start_right(head, rest):
    for message in (struct.pack(">IH", 0xFF544347, 0x8018) + head + rest, head, rest):
        try:
            quote = tpm.parse_quote(message)
        except CloisterError:
            continue
        assert len(quote.extra_data) <= 64
        assert len(quote.pcr_digest) == 32


@FEW
@given(data=st.data())
def test_azure_with_arbitrary_fields(machine, data):
    fields = {name: data.draw(st.binary(max_size=300)) for name in AZURE_FIELDS}
    runtime = data.draw(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
    size = 1236 + len(runtime)
    numbers = [20 + len(runtime), 1, data.draw(st.sampled_from([2, 3, 4])), 1, len(runtime)]
    head = b"HCLA" + struct.pack("<II20x", 2, size) + data.draw(st.binary(min_size=1184, max_size=1184))
    fields["hcl_report"] = head + struct.pack("<5I", *numbers) + runtime
    with pytest.raises(CloisterError):
        machine.claims("azure", pack(AZURE_KIND, fields), data.draw(st.binary(max_size=300)))


@FEW
@given(value=st.dictionaries(st.sampled_from(["keys", "vm-configuration", "x"]), JSON | st.lists(JSON, max_size=3)))
def test_runtime_claims_of_any_shape(value):
    try:
        parsed = azure._parse_runtime(json.dumps(value).encode())
        assert all(text.isprintable() and len(text) <= 64 for text in azure._configuration(parsed).values())
        azure._attestation_key(parsed)
    except CloisterError:
        return


@FEW
@given(
    n=st.text(max_size=30) | st.binary(max_size=300).map(lambda b: b.hex()) | JSON,
    kty=st.sampled_from(["RSA", "EC", None]),
    e=st.sampled_from(["AQAB", "Aw", 65537]),
)
def test_keys_of_any_shape(n, kty, e):
    try:
        key = azure._attestation_key({"keys": [{"kid": "HCLAkPub", "kty": kty, "e": e, "n": n}]})
    except CloisterError:
        return
    assert key.key_size in (2048, 3072, 4096)
