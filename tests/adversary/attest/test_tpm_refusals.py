"""Every refusal of TPM quotes and of their keys; quotes under software keys, through the production verifier."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from cloister.attest import Policy, verify_evidence
from cloister.attest._attesters.tpm_port import ALL_PCRS, expected_pcr
from cloister.attest._attesters.vtpm import VtpmAttester
from cloister.attest._simulated.tpm import SimulatedTpm, quote_message, sign
from cloister.attest._verifiers.vtpm import TPM_KIND
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
POLICY = """
version = 1
accept = ["vtpm"]
[vtpm]
ak_source = ["pinned"]
ak_sha256 = ["{ak}"]
pcr0 = ["{zeros}"]
pcr4 = ["{zeros}"]
[roles.server.vtpm]
pcr15 = ["{pcr15}"]
"""
SOFTWARE = [
    ("ak_sha256", "software_ak_sha256"),
    ('"pinned"', '"software"'),
    ("[vtpm]", "allow_simulated = true\n[vtpm]"),
]


class Machine:
    """A TPM with a pinned key, an attester on it, and a policy that accepts exactly that."""

    def __init__(self, key) -> None:
        self.tpm = SimulatedTpm(key)
        self.attester = VtpmAttester(port=self.tpm, events=EVENTS)
        self.honest = unpack(self.attester.evidence(REPORT_DATA).blob, TPM_KIND)

    def policy(self, *changes: tuple[str, str]) -> Policy:
        pcr15 = expected_pcr(EVENTS).hex()
        text = POLICY.format(ak=self.attester.ak_sha256, zeros="0" * 64, pcr15=pcr15)
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        return Policy.parse(text.encode())

    def evidence(self, **changes: object) -> Evidence:
        return Evidence("vtpm", pack(TPM_KIND, {**self.honest, **changes}), b"")

    def signed(self, message: bytes, **changes: object) -> Evidence:
        """What the TPM's own key signs and no TPM would: only the check of the message itself is left to refuse it."""
        return self.evidence(message=message, signature=sign(self.tpm.key, message), **changes)

    def verify(self, evidence: Evidence | None = None, policy: Policy | None = None, *, role="server", expected=None):
        chosen, report_data = policy or self.policy(), expected or REPORT_DATA
        return verify_evidence(evidence or self.evidence(), chosen, role=role, report_data=report_data, now=NOW)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.honest["pcrs"]).digest()


@pytest.fixture(scope="module")
def machine():
    return Machine(rsa.generate_private_key(public_exponent=65537, key_size=2048))


@pytest.fixture(scope="module")
def ecc():
    return Machine(ec.generate_private_key(ec.SECP256R1()))


def test_honest_evidence_is_accepted(machine, ecc):
    assert machine.verify().claims.measurements["pcr15"] == expected_pcr(EVENTS).hex()
    assert ecc.verify().claims.report_data == REPORT_DATA


def test_another_session(machine):
    with pytest.raises(MeasurementMismatchError, match="not of this session"):
        machine.verify(expected=bytes(64))


@pytest.mark.parametrize("name", ["pcr0", "pcr4", "pcr15"])
def test_other_value_of_a_pcr(machine, name):
    policy = machine.policy((f'{name} = ["', f'{name} = ["{"11" * 32}"] # "'))
    with pytest.raises(MeasurementMismatchError, match=f"{name} is"):
        machine.verify(policy=policy)


@pytest.mark.parametrize("name", ["pcr0", "pcr4", "pcr15"])
def test_policy_that_does_not_name_a_pcr(machine, name):
    with pytest.raises(PolicyRejectedError, match=f"no value of {name}"):
        machine.verify(policy=machine.policy((f"\n{name} = ", f"\n#{name} = ")))


def test_role_without_a_set(machine):
    with pytest.raises(PolicyRejectedError, match='no measurement set for the role "client"'):
        machine.verify(role="client")


def test_pcr_that_the_policy_names_and_the_quote_lacks(machine):
    chosen = tuple(i for i in ALL_PCRS if i != 4)
    values = machine.tpm.read_pcrs(chosen)
    message = quote_message(REPORT_DATA, chosen, hashlib.sha256(values).digest())
    with pytest.raises(MeasurementMismatchError, match="has no pcr4"):
        machine.verify(machine.signed(message, pcrs=values))


def test_pcr_values_that_were_not_quoted(machine):
    values = bytearray(machine.honest["pcrs"])
    values[0] ^= 1
    with pytest.raises(EvidenceSignatureError, match="not those that the TPM quoted"):
        machine.verify(machine.evidence(pcrs=bytes(values)))


@pytest.mark.parametrize("cut", [0, 31, 32, 1])
def test_pcr_values_of_another_number(machine, cut):
    with pytest.raises(MalformedEvidenceError, match="selected PCRs"):
        machine.verify(machine.evidence(pcrs=machine.honest["pcrs"][:-cut] if cut else b""))


@pytest.mark.parametrize("who", ["machine", "ecc"])
def test_signature_of_another_key(request, who):
    place = request.getfixturevalue(who)
    kind = type(place.tpm.key)
    other = Machine(
        rsa.generate_private_key(public_exponent=65537, key_size=2048)
        if issubclass(kind, rsa.RSAPrivateKey)
        else ec.generate_private_key(ec.SECP256R1())
    )
    with pytest.raises(EvidenceSignatureError, match="not signed by its attestation key"):
        place.verify(place.evidence(signature=other.honest["signature"]))


@pytest.mark.parametrize("who", ["machine", "ecc"])
@pytest.mark.parametrize("field", ["message", "signature", "pcrs", "ak"])
def test_bit_flips(request, who, field):
    place = request.getfixturevalue(who)
    for at in range(0, len(place.honest[field]), 7):
        flipped = bytearray(place.honest[field])
        flipped[at] ^= 0x20
        with pytest.raises((EvidenceSignatureError, MalformedEvidenceError, PolicyRejectedError)):
            place.verify(place.evidence(**{field: bytes(flipped)}))


def test_not_generated_by_a_tpm(machine):
    message = quote_message(REPORT_DATA, ALL_PCRS, machine.digest, magic=0xFF544348)
    with pytest.raises(MalformedEvidenceError, match="generated"):
        machine.verify(machine.signed(message))


@pytest.mark.parametrize("kind", [0x8014, 0x8017, 0x8019])
def test_another_statement_than_a_quote(machine, kind):
    message = quote_message(REPORT_DATA, ALL_PCRS, machine.digest, kind=kind)
    with pytest.raises(MalformedEvidenceError, match="not a quote"):
        machine.verify(machine.signed(message))


def test_another_bank(machine):
    message = quote_message(REPORT_DATA, ALL_PCRS, machine.digest, bank=0x0004)
    with pytest.raises(MalformedEvidenceError, match="SHA-256 bank alone"):
        machine.verify(machine.signed(message))


def changed_at(message: bytes, old: bytes, new: bytes) -> bytes:
    assert message.count(old) == 1
    return message.replace(old, new)


SELECTION = bytes.fromhex("00000001000b03ffffff")


@pytest.mark.parametrize(
    "selection", ["00000000", "00000002000b03ffffff000403ffffff", "00000001000b02ffff", "00000001000b04ffffffff"]
)
def test_another_number_of_selections(machine, selection):
    message = changed_at(machine.honest["message"], SELECTION, bytes.fromhex(selection))
    with pytest.raises(MalformedEvidenceError, match="SHA-256 bank alone"):
        machine.verify(machine.signed(message))


def test_clock_flag_that_is_no_flag(machine):
    message = quote_message(REPORT_DATA, ALL_PCRS, machine.digest, safe=2)
    with pytest.raises(MalformedEvidenceError, match="neither yes nor no"):
        machine.verify(machine.signed(message))


@pytest.mark.parametrize("digest", [b"", bytes(20)])
def test_pcr_digest_of_another_length(machine, digest):
    with pytest.raises(MalformedEvidenceError, match="not a SHA-256"):
        machine.verify(machine.signed(quote_message(REPORT_DATA, ALL_PCRS, digest)))


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (quote_message(bytes(65), ALL_PCRS, bytes(32)), "extraData"),
        (quote_message(REPORT_DATA, ALL_PCRS, bytes(33)), "pcrDigest"),
        (quote_message(b"", ALL_PCRS, bytes(32)).replace(b"\x00\x22\x00\x0b", b"\x00\x43\x00\x0b"), "qualifiedSigner"),
    ],
)
def test_parts_over_their_limit(machine, message, name):
    with pytest.raises(MalformedEvidenceError, match=f"{name} .* over the limit"):
        machine.verify(machine.signed(message))


def test_quote_that_is_cut_short_anywhere(machine):
    message = machine.honest["message"]
    for size in range(len(message)):
        with pytest.raises(MalformedEvidenceError):
            machine.verify(machine.signed(message[:size]))


def test_bytes_behind_the_quote(machine):
    with pytest.raises(MalformedEvidenceError, match="left over"):
        machine.verify(machine.signed(machine.honest["message"] + b"\0"))


def test_quote_over_its_limit(machine):
    with pytest.raises(MalformedEvidenceError, match="longer than 512"):
        machine.verify(machine.signed(machine.honest["message"] + bytes(400)))


def test_report_data_that_the_quote_does_not_cover(machine):
    message = quote_message(hashlib.sha256(REPORT_DATA).digest(), ALL_PCRS, machine.digest)
    machine.verify(machine.signed(message, report_data=REPORT_DATA))
    with pytest.raises(EvidenceSignatureError, match="another report_data"):
        machine.verify(machine.signed(message, report_data=bytes(64)), expected=bytes(64))
    with pytest.raises(EvidenceSignatureError, match="another report_data"):
        machine.verify(machine.evidence(report_data=REPORT_DATA))


@pytest.mark.parametrize("size", [1, 63, 65])
def test_report_data_of_another_length(machine, size):
    sent = bytes(size)
    message = quote_message(hashlib.sha256(sent).digest(), ALL_PCRS, machine.digest)
    with pytest.raises(MalformedEvidenceError, match="not 64"):
        machine.verify(machine.signed(message, report_data=sent), expected=sent)


def test_digest_in_place_of_the_report_data(machine):
    message = quote_message(hashlib.sha256(REPORT_DATA).digest(), ALL_PCRS, machine.digest)
    with pytest.raises(MeasurementMismatchError, match="not of this session"):
        machine.verify(machine.signed(message))


@pytest.mark.parametrize(
    ("who", "damage", "text"),
    [
        ("machine", lambda blob: b"\x00\x16" + blob[2:], "not of its key's algorithm"),
        ("machine", lambda blob: blob[:2] + b"\x00\x04" + blob[4:], "not of its key's algorithm"),
        ("machine", lambda blob: blob + b"\0", "left over"),
        ("machine", lambda blob: blob[:-1], "cut short"),
        ("machine", lambda blob: blob[:4] + b"\x01\x01" + blob[6:], "over the limit"),
        ("machine", lambda blob: b"", "cut short"),
        ("ecc", lambda blob: b"\x00\x14" + blob[2:], "not of its key's algorithm"),
        ("ecc", lambda blob: blob + b"\0", "left over"),
        ("ecc", lambda blob: blob[:-1], "cut short"),
        ("ecc", lambda blob: blob[:4] + b"\x00\x21" + blob[6:], "over the limit"),
    ],
)
def test_signature_of_another_form(request, who, damage, text):
    place = request.getfixturevalue(who)
    with pytest.raises(MalformedEvidenceError, match=text):
        place.verify(place.evidence(signature=damage(place.honest["signature"])))


def test_numbers_of_an_ecdsa_signature_out_of_range(ecc):
    size = struct.pack(">H", 32)
    for r, s in ((bytes(32), bytes(32)), (b"\xff" * 32, b"\xff" * 32)):
        with pytest.raises(EvidenceSignatureError):
            ecc.verify(ecc.evidence(signature=b"\x00\x18\x00\x0b" + size + r + size + s))


def test_pss_and_other_hashes_are_not_taken(machine):
    key, message = machine.tpm.key, machine.honest["message"]
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    for scheme, digest in ((pss, hashes.SHA256()), (padding.PKCS1v15(), hashes.SHA512())):
        with pytest.raises(EvidenceSignatureError):
            machine.verify(machine.evidence(signature=key.sign(message, scheme, digest)))


def spki(key) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    "key",
    [
        b"",
        b"no key",
        spki(rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key()),  # noqa: S505
        spki(ec.generate_private_key(ec.SECP384R1()).public_key()),
        spki(ed25519.Ed25519PrivateKey.generate().public_key()),
    ],
    ids=["empty", "text", "short RSA", "P-384", "Ed25519"],
)
def test_keys_that_are_not_taken(machine, key):
    policy = machine.policy((machine.attester.ak_sha256, hashlib.sha256(key).hexdigest()))
    with pytest.raises(MalformedEvidenceError, match="attestation key"):
        machine.verify(machine.evidence(ak=key), policy)


@pytest.mark.parametrize(
    "body",
    [
        lambda honest: {name: value for name, value in honest.items() if name != "pcrs"},
        lambda honest: {**honest, "more": b""},
        lambda honest: {**honest, "message": "text"},
        lambda honest: {**honest, "signature": b"x" * 20_000},
    ],
)
def test_fields_of_another_form(machine, body):
    with pytest.raises(MalformedEvidenceError, match="TPM evidence"):
        machine.verify(Evidence("vtpm", pack(TPM_KIND, body(machine.honest)), b""))


@pytest.mark.parametrize("blob", [b"", b"CLST", pack("evidence.azure", {}), b"\xffTCG" + bytes(200)])
def test_evidence_that_is_no_tpm_evidence(machine, blob):
    with pytest.raises(MalformedEvidenceError, match="does not parse"):
        machine.verify(Evidence("vtpm", blob, b""))


def test_collateral_that_nothing_covers(machine):
    with pytest.raises(MalformedEvidenceError, match="no collateral"):
        machine.verify(Evidence("vtpm", machine.evidence().blob, b"{}"))


def test_type_that_is_not_accepted(machine):
    with pytest.raises(PolicyRejectedError, match="not accepted"):
        machine.verify(policy=machine.policy(('["vtpm"]', '["tdx"]')))


def test_key_that_is_not_pinned(machine, ecc):
    with pytest.raises(PolicyRejectedError, match="in neither"):
        machine.verify(ecc.evidence())


def test_source_that_is_not_named(machine):
    with pytest.raises(PolicyRejectedError, match='does not name "pinned"'):
        machine.verify(policy=machine.policy(('"pinned"', '"hcl"')))
    with pytest.raises(PolicyRejectedError, match='does not name "software"'):
        machine.verify(policy=machine.policy(("ak_sha256", "software_ak_sha256")))


def test_software_key_is_simulated_and_needs_permission(machine):
    policy = machine.policy(*SOFTWARE)
    claims = machine.verify(policy=policy).claims
    assert claims.simulated
    assert claims.details["root"] == "software TPM"
    with pytest.raises(PolicyRejectedError, match="does not allow simulated"):
        machine.verify(policy=dataclasses.replace(policy, allow_simulated=False))


def test_key_in_both_lists(machine):
    both = f'software_ak_sha256 = ["{machine.attester.ak_sha256}"]\npcr0'
    changes = [("pcr0", both), ('["pinned"]', '["pinned", "software"]'), SOFTWARE[2]]
    with pytest.raises(PolicyRejectedError, match="in both"):
        machine.verify(policy=machine.policy(*changes))


def test_software_tpm_needs_the_register_alone(machine):
    policy = machine.policy(*SOFTWARE, ("\npcr0 = ", "\n#pcr0 = "), ("\npcr4 = ", "\n#pcr4 = "))
    machine.verify(policy=policy)
    with pytest.raises(PolicyRejectedError, match="no value of pcr15"):
        machine.verify(policy=machine.policy(*SOFTWARE, ("\npcr15 = ", "\n#pcr15 = ")))


def test_platform_list_leaves_no_tpm_of_unknown_place(machine):
    policy = machine.policy(("[vtpm]", f'[platforms]\nallow_piid = ["{"00" * 16}"]\n[vtpm]'))
    with pytest.raises(PolicyRejectedError, match="without an id"):
        machine.verify(policy=policy)
