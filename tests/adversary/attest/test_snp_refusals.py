"""Every reason to refuse an SNP report that a simulated AMD can produce, each with a test of its own."""

from __future__ import annotations

import datetime
import hashlib
import uuid
from dataclasses import dataclass

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.attest import Policy, verify_evidence
from cloister.attest._simulated import amd_root
from cloister.attest._simulated.amd_root import (
    GUEST_POLICY,
    SIMULATED_MEASUREMENT,
    TCB_LEVELS,
    SimulatedAmdRoot,
    SimulatedSnpAttester,
    certificate_table,
    pem_chain,
    pem_item,
)
from cloister.attest._simulated.intel_pki import _der
from cloister.attest._verifiers.snp_certs import _signed_part, load_certificate
from cloister.errors import (
    EvidenceSignatureError,
    MalformedEvidenceError,
    MeasurementMismatchError,
    PolicyRejectedError,
    StaleEvidenceError,
)
from cloister.wire import Evidence

NOW = 1_800_000_000
DAY = 86_400
HOST_DATA = b"\x5a" * 32
REPORT_DATA = bytes(range(64))
SMT, MUST_BE_ONE, MIGRATE_MA, DEBUG, UNKNOWN = 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 26


@dataclass
class SnpWorld:
    """One simulated chip and a policy that accepts exactly its server guest."""

    root: SimulatedAmdRoot
    kind: str = "vcek"

    @property
    def policy_text(self) -> str:
        product, root = self.root.product, self.root.root_sha256
        minimum = "\n".join(f"{part} = {level}" for part, level in self.root.levels.items())
        return f"""
version = 1
accept = ["simulated-snp"]
allow_simulated = true
clock_skew_s = 60
[roots.amd_ark_sha256]
{product} = ["{root}"]
[snp]
measurement = ["{SIMULATED_MEASUREMENT.hex()}"]
signer = ["vcek", "vlek"]
[snp.min_tcb.{product}]
{minimum}
[roles.server.snp]
host_data = ["{HOST_DATA.hex()}"]
"""

    def evidence(self, **options) -> Evidence:
        options = {"host_data": HOST_DATA, "kind": self.kind} | options
        return SimulatedSnpAttester(self.root, **options).evidence(REPORT_DATA)

    def aux(self, **changes: bytes) -> bytes:
        return pem_chain(self.root.parts(self.kind, **changes))

    def with_aux(self, aux: bytes, **options) -> Evidence:
        evidence = self.evidence(**options)
        return Evidence(evidence.type, evidence.blob, aux)

    def resigned(self, **changes: bytes) -> Evidence:
        """The evidence with bytes of the report changed by the chip itself: at_<hex offset> = bytes."""
        evidence = self.evidence()
        body = bytearray(evidence.blob[:0x2A0])
        for at, value in changes.items():
            start = int(at.removeprefix("at_"), 16)
            body[start : start + len(value)] = value
        return Evidence(evidence.type, self.root.sign_report(bytes(body), self.kind), evidence.aux)

    def verify(self, evidence: Evidence | None = None, *changes: tuple[str, str], now: int = NOW, role="server"):
        text = self.policy_text
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        policy = Policy.parse(text.encode())
        return verify_evidence(evidence or self.evidence(), policy, role=role, report_data=REPORT_DATA, now=now)


@pytest.fixture(scope="module")
def milan() -> SnpWorld:
    return SnpWorld(SimulatedAmdRoot(now=NOW))


@pytest.fixture(scope="module")
def vlek(milan) -> SnpWorld:
    return SnpWorld(milan.root, kind="vlek")


@pytest.fixture(scope="module")
def turin() -> SnpWorld:
    return SnpWorld(SimulatedAmdRoot(now=NOW, product="turin"))


@pytest.fixture(scope="module")
def genoa() -> SnpWorld:
    return SnpWorld(SimulatedAmdRoot(now=NOW, product="genoa"))


# What is accepted: refusals mean nothing beside a verifier that refuses everything.


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
@pytest.mark.parametrize("version", [3, 5])
def test_honest_evidence_is_accepted_and_stamped(request, product, kind, version):
    world = SnpWorld(request.getfixturevalue(product).root, kind)
    decision = world.verify(world.evidence(version=version))
    assert decision.claims.simulated
    assert decision.claims.evidence_type == "simulated-snp"
    assert decision.claims.platform_id == world.root.chip_id.hex()
    assert decision.claims.details["product"] == product
    assert decision.claims.details["report_version"] == str(version)
    assert decision.claims.details.get("csp_id", "").startswith("CN=SIMULATED" if kind == "vlek" else "")
    assert any("SIMULATED" in reason for reason in decision.reasons)
    assert any("no TEE" in limit for limit in decision.limits)


@pytest.mark.parametrize("product", ["milan", "genoa", "turin"])
@pytest.mark.parametrize("form", ["table", "pem"])
def test_honest_version_2_takes_the_product_from_the_certificate(request, product, form):
    world = request.getfixturevalue(product)
    assert world.verify(world.evidence(version=2, form=form)).claims.details["product"] == product


def test_leaf_with_a_serial_number_of_its_own():
    world = SnpWorld(SimulatedAmdRoot(now=NOW, zero_serial=False))
    assert world.verify().accepted


# The report's form.


@pytest.mark.parametrize("change", [b"", b"\0", None])
def test_report_of_another_length(milan, change):
    evidence = milan.evidence()
    blob = evidence.blob[:-1] if change is None else evidence.blob + change if change else b""
    with pytest.raises(MalformedEvidenceError, match="bytes, not 1184"):
        milan.verify(Evidence(evidence.type, blob, evidence.aux))


@pytest.mark.parametrize("version", [0, 1, 4, 6])
def test_report_of_an_unknown_version(milan, version):
    with pytest.raises(MalformedEvidenceError, match=f"version {version}"):
        milan.verify(milan.resigned(at_0=version.to_bytes(4, "little")))


@pytest.mark.parametrize("at", [0x4C, 0x4F, 0x18B, 0x19F, 0x1EB, 0x1EF, 0x1F8, 0x207, 0x208, 0x29F])
def test_reserved_bytes_that_are_not_zero(milan, at):
    with pytest.raises(MalformedEvidenceError, match="reserved bytes"):
        milan.verify(milan.resigned(**{f"at_{at:x}": b"\x01"}))


def test_reserved_bytes_that_differ_by_version(milan):
    body = milan.evidence(version=2).blob[:0x2A0]
    with pytest.raises(MalformedEvidenceError, match="0x188 to 0x1a0"):
        changed = body[:0x188] + b"\x19" + body[0x189:]
        milan.verify(Evidence("simulated-snp", milan.root.sign_report(changed, "vcek"), milan.aux()))


@pytest.mark.parametrize("at", [0x2A0 + 144, 0x49F])
def test_bytes_after_the_signature(milan, at):
    evidence = milan.evidence()
    blob = evidence.blob[:at] + b"\x01" + evidence.blob[at + 1 :]
    with pytest.raises(MalformedEvidenceError, match="reserved bytes"):
        milan.verify(Evidence(evidence.type, blob, evidence.aux))


def test_reserved_bits_of_the_key_information(milan):
    with pytest.raises(MalformedEvidenceError, match="key information"):
        milan.verify(milan.resigned(at_48=b"\x20\0\0\0"))


def test_unknown_processor(milan):
    for cpuid in ((0x19, 0x20, 0), (0x1B, 0x01, 0)):
        with pytest.raises(MalformedEvidenceError, match="unknown processor"):
            milan.verify(milan.evidence(cpuid=cpuid))


def test_tcb_version_of_another_layout(milan, turin):
    with pytest.raises(MalformedEvidenceError, match="not of the layout of milan"):
        milan.verify(milan.resigned(at_38=b"\x04\x01\x01\x00\x00\x00\x18\xdb"))
    with pytest.raises(MalformedEvidenceError, match="not of the layout of turin"):
        turin.verify(turin.resigned(at_180=b"\x02\x04\x01\x18\x00\x00\x01\xdb"))


# The report's signature.


def test_signature_algorithm(milan):
    with pytest.raises(EvidenceSignatureError, match="algorithm is 2"):
        milan.verify(milan.evidence(algorithm=2))


@pytest.mark.parametrize("signing_key", [2, 6, 7])
def test_report_that_nothing_signed(milan, signing_key):
    with pytest.raises(EvidenceSignatureError, match="signed by no VCEK or VLEK"):
        milan.verify(milan.resigned(at_48=bytes([signing_key << 2])))


@pytest.mark.parametrize("at", [0x50, 0x90, 0xC0, 0x130, 0x2A0, 0x2A0 + 72])
def test_bit_flip(milan, at):
    evidence = milan.evidence()
    blob = bytearray(evidence.blob)
    blob[at] ^= 1
    with pytest.raises(EvidenceSignatureError, match="does not verify under the VCEK"):
        milan.verify(Evidence(evidence.type, bytes(blob), evidence.aux))


@pytest.mark.parametrize("number", [0, (1 << 576) - 1])
def test_signature_of_numbers_that_no_key_makes(milan, number):
    evidence = milan.evidence()
    blob = evidence.blob[:0x2A0] + number.to_bytes(72, "little") * 2 + bytes(368)
    with pytest.raises(EvidenceSignatureError, match="does not verify"):
        milan.verify(Evidence(evidence.type, blob, evidence.aux))


def test_masked_chip_key_excuses_no_signature(milan):
    evidence = milan.evidence(mask_chip_key=True)
    assert milan.verify(evidence).accepted
    with pytest.raises(EvidenceSignatureError, match="does not verify"):
        milan.verify(Evidence(evidence.type, evidence.blob[:0x2A0] + bytes(512), evidence.aux))


def test_masked_chip_id_matches_no_vcek(milan):
    with pytest.raises(EvidenceSignatureError, match="another chip than the report, or it is masked"):
        milan.verify(milan.evidence(chip_id=bytes(64)))


def test_masked_chip_id_of_a_vlek_has_no_platform(vlek):
    evidence = vlek.evidence(chip_id=bytes(64))
    assert vlek.verify(evidence).claims.platform_id == ""
    listed = ("[roles.server", f'[platforms]\nallow_chip_id = ["{"00" * 64}"]\n[roles.server')
    with pytest.raises(PolicyRejectedError, match="without an id"):
        vlek.verify(evidence, listed)


def test_author_key_without_its_bit_is_nobodys_word(milan):
    assert milan.verify().claims.details["author_key_digest"] == ""
    assert milan.verify(milan.evidence(author_key=True)).claims.details["author_key_digest"] == "aa" * 48


def test_report_of_another_chip(milan):
    other = SimulatedAmdRoot(now=NOW)
    blob = SimulatedSnpAttester(other, host_data=HOST_DATA, chip_id=milan.root.chip_id).evidence(REPORT_DATA).blob
    with pytest.raises(EvidenceSignatureError, match="does not verify"):
        milan.verify(Evidence("simulated-snp", blob, milan.aux()))


def test_vcek_of_another_chip(milan):
    with pytest.raises(EvidenceSignatureError, match="another chip"):
        milan.verify(milan.evidence(chip_id=b"\x07" * 64))


def test_turin_id_with_something_behind_it(turin):
    with pytest.raises(EvidenceSignatureError, match="another chip"):
        turin.verify(turin.evidence(chip_id=turin.root.hw_id + b"\x01" * 56))


@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_vcek_of_another_tcb(milan, part):
    levels = {**milan.root.levels, part: milan.root.levels[part] + 1}
    with pytest.raises(EvidenceSignatureError, match=f"is of {part} "):
        milan.verify(milan.evidence(tcb=levels))


def test_vcek_of_another_fmc(turin):
    with pytest.raises(EvidenceSignatureError, match="is of fmc 2"):
        turin.verify(turin.evidence(tcb={**turin.root.levels, "fmc": 3}))


def test_report_that_says_vlek_behind_a_vcek(milan):
    report = milan.root.sign_report(milan.evidence(kind="vlek").blob[:0x2A0], "vcek")
    chain = [milan.root.certificates[name] for name in ("vcek", "ask", "ark")]
    aux = pem_chain(dict(zip(("vlek", "issuer", "ark"), chain, strict=True)))
    with pytest.raises(EvidenceSignatureError, match="not SEV-VLEK"):
        milan.verify(Evidence("simulated-snp", report, aux))


def test_leaf_key_of_another_curve(milan):
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    for public_key in (key, rsa.generate_private_key(65537, 2048).public_key()):
        leaf = milan.root.issue("vcek", public_key=public_key)
        with pytest.raises(EvidenceSignatureError, match=r"not of P-384"):
            milan.verify(milan.with_aux(milan.aux(vcek=leaf)))


# The chain.


def test_unpinned_root(milan):
    other = SnpWorld(SimulatedAmdRoot(now=NOW))
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        milan.verify(other.evidence())


def test_no_pinned_root_at_all(milan):
    with pytest.raises(PolicyRejectedError, match="not pinned"):
        milan.verify(None, (f'"{milan.root.root_sha256}"', ""))


def test_root_pinned_for_another_product(milan):
    with pytest.raises(PolicyRejectedError, match=r"amd_ark_sha256\.milan"):
        milan.verify(None, ("milan = [", "genoa = ["))


def test_report_and_certificate_of_different_products(milan, genoa):
    evidence = genoa.with_aux(milan.aux())
    with pytest.raises(EvidenceSignatureError, match="certificate is of milan, the report of genoa"):
        milan.verify(evidence, ("milan = [", "genoa = ["))


def test_simulated_evidence_under_a_production_policy(milan):
    with pytest.raises(PolicyRejectedError, match="not accepted"):
        milan.verify(None, ('["simulated-snp"]', '["snp"]'), ("simulated = true", "simulated = false"))


def test_simulated_root_pinned_without_allow_simulated(milan):
    evidence = milan.evidence()
    declared = Evidence("snp", evidence.blob, evidence.aux)
    with pytest.raises(PolicyRejectedError, match="does not allow simulated"):
        milan.verify(declared, ('["simulated-snp"]', '["snp"]'), ("simulated = true", "simulated = false"))


def test_simulated_evidence_declared_as_real(milan):
    evidence = milan.evidence()
    with pytest.raises(PolicyRejectedError, match='declared "snp", and its root is not AMD'):
        milan.verify(Evidence("snp", evidence.blob, evidence.aux), ('["simulated-snp"]', '["snp"]'))


def pinning(world: SnpWorld, ark: bytes) -> tuple[str, str]:
    return world.root.root_sha256, hashlib.sha256(ark).hexdigest()


def test_root_that_is_not_self_signed(milan):
    ark = milan.root.issue("ark", signer="sev")
    with pytest.raises(EvidenceSignatureError, match="ARK certificate is not signed by the ARK"):
        milan.verify(milan.with_aux(milan.aux(ark=ark)), pinning(milan, ark))


def test_root_that_names_another_issuer(milan):
    ark = milan.root.issue("ark", issuer_name="ARK-Genoa")
    with pytest.raises(EvidenceSignatureError, match="ARK certificate does not name the ARK as issuer"):
        milan.verify(milan.with_aux(milan.aux(ark=ark)), pinning(milan, ark))


def test_root_of_another_product(milan):
    ark = milan.root.issue("ark", common_name="ARK-Genoa", issuer_name="ARK-Genoa")
    with pytest.raises(EvidenceSignatureError, match="ARK certificate is of another product or key, not ARK-Milan"):
        milan.verify(milan.with_aux(milan.aux(ark=ark)), pinning(milan, ark))


def test_root_that_is_no_authority(milan):
    ark = milan.root.issue("ark", is_ca=False)
    with pytest.raises(EvidenceSignatureError, match="ARK certificate must not sign"):
        milan.verify(milan.with_aux(milan.aux(ark=ark)), pinning(milan, ark))


def test_root_with_a_short_key(milan):
    ark = milan.root.issue("ark", public_key=rsa.generate_private_key(65537, 2048).public_key())
    with pytest.raises(EvidenceSignatureError, match="key of the ARK certificate is not RSA of 4096 bits"):
        milan.verify(milan.with_aux(milan.aux(ark=ark)), pinning(milan, ark))


def test_signing_key_that_is_no_rsa_key(milan):
    for key in (ec.generate_private_key(ec.SECP384R1()), ed25519.Ed25519PrivateKey.generate()):
        issuer = milan.root.issue("ask", public_key=key.public_key())
        with pytest.raises(EvidenceSignatureError, match="key of the ASK certificate is not RSA"):
            milan.verify(milan.with_aux(milan.aux(issuer=issuer)))


def test_signing_key_that_the_root_did_not_sign(milan):
    issuer = milan.root.issue("ask", signer="sev")
    with pytest.raises(EvidenceSignatureError, match="ASK certificate is not signed by the ARK"):
        milan.verify(milan.with_aux(milan.aux(issuer=issuer)))


def test_signing_key_that_names_another_root(milan):
    issuer = milan.root.issue("ask", issuer_name="ARK-Genoa")
    with pytest.raises(EvidenceSignatureError, match="ASK certificate does not name the ARK"):
        milan.verify(milan.with_aux(milan.aux(issuer=issuer)))


def test_signing_key_that_is_no_authority(milan):
    issuer = milan.root.issue("ask", is_ca=False)
    with pytest.raises(EvidenceSignatureError, match="ASK certificate must not sign"):
        milan.verify(milan.with_aux(milan.aux(issuer=issuer)))


@pytest.mark.parametrize(("may_issue", "may_sign"), [(True, False), (False, True), (True, True)])
def test_authority_by_half(may_issue, may_sign):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "SEV-Milan")])
    start = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    usage = x509.KeyUsage(False, False, False, False, False, may_sign, False, False, False)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, start, start + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(may_issue, None), True)
        .add_extension(usage, True)
        .sign(key, SHA384())
    )
    loaded = load_certificate(certificate.public_bytes(Encoding.DER), "ASK")
    assert loaded.is_ca is (may_issue and may_sign)


def test_signing_key_of_vleks_for_a_vcek(milan):
    with pytest.raises(EvidenceSignatureError, match="not SEV-Milan"):
        milan.verify(milan.with_aux(milan.aux(issuer=milan.root.certificates["asvk"])))


def test_signing_key_of_vceks_for_a_vlek(vlek):
    with pytest.raises(EvidenceSignatureError, match="not SEV-VLEK-Milan"):
        vlek.verify(vlek.with_aux(vlek.aux(issuer=vlek.root.certificates["ask"])))


def test_leaf_that_the_signing_key_did_not_sign(milan):
    leaf = milan.root.issue("vcek", signer="ark")
    with pytest.raises(EvidenceSignatureError, match="VCEK certificate is not signed by the ASK"):
        milan.verify(milan.with_aux(milan.aux(vcek=leaf)))


def test_leaf_that_names_another_issuer(milan):
    leaf = milan.root.issue("vcek", issuer_name="SEV-Genoa")
    with pytest.raises(EvidenceSignatureError, match="VCEK certificate does not name the ASK"):
        milan.verify(milan.with_aux(milan.aux(vcek=leaf)))


@pytest.mark.parametrize("name", ["SEV-VLEK", "SEV-Milan", "VCEK"])
def test_leaf_with_another_name(milan, name):
    leaf = milan.root.issue("vcek", common_name=name)
    with pytest.raises(EvidenceSignatureError, match="VCEK certificate is of another product or key, not SEV-VCEK"):
        milan.verify(milan.with_aux(milan.aux(vcek=leaf)))


def test_serial_number_is_under_the_signature(milan):
    leaf = bytearray(milan.root.certificates["vcek"])
    assert leaf[13:16] == b"\x02\x01\x00"
    leaf[15] = 1  # what the verifier's own parsing turns a zero into
    with pytest.raises(EvidenceSignatureError, match="VCEK certificate is not signed"):
        milan.verify(milan.with_aux(milan.aux(vcek=bytes(leaf))))


@pytest.mark.parametrize(
    ("oid", "value", "words"),
    [
        ("2", None, r"has no extension 1\.3\.6\.1\.4\.1\.3704\.1\.2"),
        ("2", b"\x16\x05Milan\x00", "is no text"),
        ("2", b"\x0c\x05Milan", "is no text"),
        ("2", b"\x16\x05Mila\xff", "is no text"),
        ("2", b"\x16\x05Mila\n", "is no text"),
        ("2", b"", "is no text"),
        ("2", b"\x16\x06Venice", "unknown product"),
        ("3.8", None, "has no extension"),
        ("3.8", b"", "microcode level"),
        ("3.8", b"\x02\x01\xdb", "microcode level"),
        ("3.8", b"\x02\x02\x00\x05", "microcode level"),
        ("3.8", b"\x02\x02\x01\xdb", "microcode level"),
        ("4", None, "has no extension"),
        ("4", bytes(63), "another length"),
        ("4", b"\x04\x3f" + bytes(64), "another length"),
        ("4", b"\x04\x08" + bytes(8), "another length"),
    ],
)
def test_extension_that_is_missing_or_malformed(milan, oid, value, words):
    leaf = milan.root.issue("vcek", extensions={oid: value})
    with pytest.raises(MalformedEvidenceError, match=words):
        milan.verify(milan.with_aux(milan.aux(vcek=leaf)))


def test_vlek_that_names_nobody(vlek):
    leaf = vlek.root.issue("vlek", extensions={"5": None})
    with pytest.raises(MalformedEvidenceError, match=r"no extension 1\.3\.6\.1\.4\.1\.3704\.1\.5"):
        vlek.verify(vlek.with_aux(vlek.aux(vlek=leaf)))


@pytest.mark.parametrize("name", ["vcek", "issuer", "ark"])
def test_certificate_that_does_not_parse(milan, name):
    aux = milan.aux(**{name: b"\x30\x03\x02\x01\x01"})
    change = [pinning(milan, b"\x30\x03\x02\x01\x01")] if name == "ark" else []
    with pytest.raises(MalformedEvidenceError, match="certificate does not parse"):
        milan.verify(milan.with_aux(aux), *change)


# Time.


@pytest.mark.parametrize(("slot", "name"), [("vcek", "vcek"), ("issuer", "ask"), ("ark", "ark")])
def test_expired_certificate(milan, slot, name):
    certificate = milan.root.issue(name, days=3)
    evidence = milan.with_aux(milan.aux(**{slot: certificate}))
    change = [pinning(milan, certificate)] if name == "ark" else []
    # Made a day before NOW, valid for three days, the last second included.
    assert milan.verify(evidence, *change, now=NOW + 2 * DAY).accepted
    with pytest.raises(StaleEvidenceError, match=f"{name.upper()} certificate expired"):
        milan.verify(evidence, *change, now=NOW + 2 * DAY + 1)


@pytest.mark.parametrize(("slot", "name"), [("vcek", "vcek"), ("issuer", "ask"), ("ark", "ark")])
def test_certificate_from_the_future(milan, slot, name):
    certificate = milan.root.issue(name, now=NOW + DAY + 60)
    evidence = milan.with_aux(milan.aux(**{slot: certificate}))
    change = [pinning(milan, certificate)] if name == "ark" else []
    assert milan.verify(evidence, *change).accepted, "the skew of the policy"
    with pytest.raises(StaleEvidenceError, match=f"{name.upper()} certificate is not valid before"):
        milan.verify(evidence, *change, now=NOW - 1)


def test_dates_of_the_proof(milan):
    claims = milan.verify().claims
    assert claims.collateral_issued == NOW - DAY
    assert claims.collateral_expires == NOW + 3649 * DAY
    claims = milan.verify(milan.with_aux(milan.aux(crl=milan.root.crl(now=NOW - 2 * DAY)))).claims
    assert claims.collateral_issued == NOW - 2 * DAY
    assert claims.collateral_expires == NOW + 28 * DAY


# Revocation.


def serial(world: SnpWorld, name: str) -> int:
    return x509.load_der_x509_certificate(world.root.certificates[name]).serial_number


@pytest.mark.parametrize("form", [pem_chain, certificate_table])
def test_revocation_list_that_revokes_nothing(milan, form):
    # The serial number 0 names every VCEK there is, so it names none.
    crl = milan.root.crl(revoked=(12345,))
    decision = milan.verify(milan.with_aux(form(milan.root.parts("vcek", crl=crl))))
    assert not any("revocation list" in limit for limit in decision.limits)
    assert any("no revocation list came" in limit for limit in milan.verify().limits)


def test_revoked_signing_key(milan):
    crl = milan.root.crl(revoked=(serial(milan, "ask"),))
    with pytest.raises(EvidenceSignatureError, match="ASK certificate is revoked"):
        milan.verify(milan.with_aux(milan.aux(crl=crl)))


def test_revoked_leaf():
    world = SnpWorld(SimulatedAmdRoot(now=NOW, zero_serial=False), kind="vlek")
    crl = world.root.crl(revoked=(7, serial(world, "vlek")))
    with pytest.raises(EvidenceSignatureError, match="VLEK certificate is revoked"):
        world.verify(world.with_aux(world.aux(crl=crl)))


def test_revocation_list_that_the_root_did_not_sign(milan):
    with pytest.raises(EvidenceSignatureError, match="not signed by the ARK"):
        milan.verify(milan.with_aux(milan.aux(crl=milan.root.crl(issuer="sev"))))


def test_revocation_list_of_another_root(milan, genoa):
    with pytest.raises(EvidenceSignatureError, match="of another root"):
        milan.verify(milan.with_aux(milan.aux(crl=genoa.root.crl())))


def test_revocation_list_that_is_expired_or_from_the_future(milan):
    evidence = milan.with_aux(milan.aux(crl=milan.root.crl()))
    assert milan.verify(evidence, now=NOW + 30 * DAY).accepted
    with pytest.raises(StaleEvidenceError, match="revocation list expired"):
        milan.verify(evidence, now=NOW + 30 * DAY + 1)
    with pytest.raises(StaleEvidenceError, match="revocation list is not valid before"):
        milan.verify(evidence, now=NOW - 61)


def test_revocation_list_without_an_end_has_ended(milan):
    # The library issues none of these: cut the second time (UTCTime, 15 bytes) out of one, and sign it again.
    signed = _signed_part(milan.root.crl())
    at = signed.index(b"\x17\x0d", signed.index(b"\x17\x0d") + 15)
    content = signed[signed.index(b"\x30", 2) : at] + signed[at + 15 :]
    whole = milan.root.crl()
    algorithm = whole[whole.index(signed) + len(signed) : -512 - 5]
    signed = _der(0x30, content)
    signature = amd_root._rsa_key("ark").sign(signed, amd_root._PSS, SHA384())
    crl = _der(0x30, signed + algorithm + _der(3, b"\0" + signature))
    assert x509.load_der_x509_crl(crl).next_update_utc is None
    evidence = milan.with_aux(milan.aux(crl=crl))
    with pytest.raises(StaleEvidenceError, match="revocation list expired"):
        milan.verify(evidence, now=NOW + 1)


def test_revocation_list_that_does_not_parse(milan):
    with pytest.raises(MalformedEvidenceError, match="revocation list does not parse"):
        milan.verify(milan.with_aux(milan.aux(crl=b"\x30\x00")))


# The frame of the certificates.


def test_no_certificates(milan):
    with pytest.raises(MalformedEvidenceError, match="certificates are missing"):
        milan.verify(milan.with_aux(b""))


@pytest.mark.parametrize("form", [pem_chain, certificate_table])
@pytest.mark.parametrize("n_left", [1, 2])
def test_missing_certificate(milan, form, n_left):
    parts = dict(list(milan.root.parts("vcek").items())[:n_left])
    with pytest.raises(MalformedEvidenceError, match="is missing"):
        milan.verify(milan.with_aux(form(parts)))


def test_table_without_the_leaf_that_the_report_names(milan, vlek):
    aux = certificate_table(milan.root.parts("vcek"))
    with pytest.raises(MalformedEvidenceError, match="VLEK certificate is missing"):
        vlek.verify(vlek.with_aux(aux))


def test_too_many_bytes_of_certificates(milan):
    with pytest.raises(MalformedEvidenceError, match="more than 65536"):
        milan.verify(milan.with_aux(milan.aux() + b"\n" * 65536))


def test_table_with_unknown_entries_certificates_as_pem_and_padding(milan):
    parts = {str(uuid.UUID(int=7)): b"of the host"} | milan.root.parts("vcek")
    parts["issuer"] = pem_item(parts["issuer"])
    assert milan.verify(milan.with_aux(certificate_table(parts) + bytes(100))).accepted


def test_table_with_both_leaves_takes_the_one_that_signed(milan):
    parts = milan.root.parts("vcek") | {"vlek": milan.root.certificates["vlek"]}
    assert milan.verify(milan.with_aux(certificate_table(parts))).accepted


def test_table_that_names_an_entry_twice(milan):
    parts = milan.root.parts("vcek") | {"63DA758D-e664-4564-adc5-f4b93be8accd": b"again"}
    with pytest.raises(MalformedEvidenceError, match="twice"):
        milan.verify(milan.with_aux(certificate_table(parts)))


@pytest.mark.parametrize(
    ("at", "value"),
    [(16, 1 << 20), (16, 0xFFFFFFFF), (20, 0), (20, 0xFFFFFFFF), (20, 20_000)],
    ids=["offset", "overflow", "empty", "long", "over the limit"],
)
def test_table_entry_outside_of_its_bounds(milan, at, value):
    aux = bytearray(certificate_table(milan.root.parts("vcek")) + bytes(30_000))
    aux[at : at + 4] = value.to_bytes(4, "little")
    with pytest.raises(MalformedEvidenceError, match="empty, too long or outside"):
        milan.verify(milan.with_aux(bytes(aux)))


@pytest.mark.parametrize("aux", [b"\x01" * 24 * 40, b"\x01" * 30, b"\x01"])
def test_table_without_an_end(milan, aux):
    with pytest.raises(MalformedEvidenceError, match="does not end within 16 entries"):
        milan.verify(milan.with_aux(aux))


def test_table_of_as_many_entries_as_allowed(milan):
    extra = {str(uuid.UUID(int=i)): b"x" for i in range(1, 14)}
    assert milan.verify(milan.with_aux(certificate_table(milan.root.parts("vcek") | extra))).accepted
    extra[str(uuid.UUID(int=14))] = b"x"
    with pytest.raises(MalformedEvidenceError, match="does not end"):
        milan.verify(milan.with_aux(certificate_table(milan.root.parts("vcek") | extra)))


def test_table_entry_that_is_more_or_other_than_one_pem_item(milan):
    ask = milan.root.certificates["ask"]
    for item in (pem_item(ask) * 2, pem_item(ask, "X509 CRL")):
        with pytest.raises(MalformedEvidenceError, match="is not one PEM item"):
            milan.verify(milan.with_aux(certificate_table(milan.root.parts("vcek", issuer=item))))


def test_pem_chain_with_an_item_too_many(milan):
    aux = milan.aux(crl=milan.root.crl()) + pem_item(milan.root.certificates["asvk"])
    with pytest.raises(MalformedEvidenceError, match="has 5 items"):
        milan.verify(milan.with_aux(aux))


def test_pem_chain_in_another_order(milan):
    aux = pem_item(milan.root.crl(), "X509 CRL") + milan.aux()
    with pytest.raises(MalformedEvidenceError, match="is not where it belongs"):
        milan.verify(milan.with_aux(aux))
    aux = milan.aux() + pem_item(milan.root.certificates["asvk"])
    with pytest.raises(MalformedEvidenceError, match="is not where it belongs"):
        milan.verify(milan.with_aux(aux))


@pytest.mark.parametrize(
    "aux",
    [
        b"-----BEGIN CERTIFICATE-----\nAAA\n-----END CERTIFICATE-----\n",
        b"-----BEGIN CERTIFICATE-----\nAA=A\n-----END CERTIFICATE-----\n",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END X509 CRL-----\n",
        b"-----BEGIN CERTIFICATE-----\n",
    ],
)
def test_text_that_is_no_pem(milan, aux):
    with pytest.raises(MalformedEvidenceError, match="not PEM"):
        milan.verify(milan.with_aux(aux))


def test_words_between_pem_items(milan):
    with pytest.raises(MalformedEvidenceError, match="not PEM"):
        milan.verify(milan.with_aux(milan.aux() + b"the end"))


# What the policy rules on.


@pytest.mark.parametrize("version", [2, 3, 5])
def test_debug_guest(milan, version):
    with pytest.raises(PolicyRejectedError, match="debug enclave"):
        milan.verify(milan.evidence(version=version, guest_policy=GUEST_POLICY | DEBUG))


def test_guest_that_may_migrate(milan):
    evidence = milan.evidence(guest_policy=GUEST_POLICY | MIGRATE_MA)
    with pytest.raises(PolicyRejectedError, match="allows migrate_ma"):
        milan.verify(evidence)
    assert milan.verify(evidence, ("signer =", "guest_policy = { migrate_ma = true }\nsigner =")).accepted


def test_guest_that_may_run_with_smt(milan):
    evidence = milan.evidence(guest_policy=GUEST_POLICY | SMT)
    with pytest.raises(PolicyRejectedError, match="allows smt"):
        milan.verify(evidence)
    assert milan.verify(evidence, ("signer =", "guest_policy = { smt = true }\nsigner =")).accepted


@pytest.mark.parametrize("bits", [GUEST_POLICY | UNKNOWN, GUEST_POLICY | 1 << 63, GUEST_POLICY & ~MUST_BE_ONE])
def test_guest_policy_with_unknown_bits(milan, bits):
    with pytest.raises(PolicyRejectedError, match="bits that this release does not know"):
        milan.verify(milan.evidence(guest_policy=bits))


@pytest.mark.parametrize(("vmpl", "limit"), [(1, 0), (3, 2), (0xFFFFFFFF, 3)])
def test_report_asked_for_at_a_lower_privilege(milan, vmpl, limit):
    with pytest.raises(PolicyRejectedError, match=f"VMPL {vmpl}, the policy allows at most {limit}"):
        milan.verify(milan.evidence(vmpl=vmpl), ("signer =", f"max_vmpl = {limit}\nsigner ="))
    if vmpl <= 3:
        assert milan.verify(milan.evidence(vmpl=vmpl), ("signer =", f"max_vmpl = {vmpl}\nsigner =")).accepted


@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_signer_that_is_not_accepted(milan, kind):
    world = SnpWorld(milan.root, kind)
    other = "vlek" if kind == "vcek" else "vcek"
    with pytest.raises(PolicyRejectedError, match=f"signed by a {kind.upper()}, the policy accepts {other}"):
        world.verify(None, ('["vcek", "vlek"]', f'["{other}"]'))
    with pytest.raises(PolicyRejectedError, match="the policy accepts none"):
        world.verify(None, ('["vcek", "vlek"]', "[]"))


@pytest.mark.parametrize("name", ["current", "committed", "launch"])
@pytest.mark.parametrize("part", ["bootloader", "tee", "snp", "microcode"])
def test_firmware_that_is_too_old(milan, name, part):
    older = {**milan.root.levels, part: milan.root.levels[part] - 1}
    with pytest.raises(PolicyRejectedError, match=f"{part} of the {name} TCB is {older[part]}") as caught:
        milan.verify(milan.evidence(**{name: older}))
    assert len(caught.value.reasons) == 1


def test_key_of_a_firmware_that_is_too_old():
    # All that the old firmware's key signs may be forged, so newer levels beside it prove nothing.
    old = {**TCB_LEVELS, "microcode": 1}
    world = SnpWorld(SimulatedAmdRoot(now=NOW, levels=old))
    evidence = world.evidence(current=TCB_LEVELS, committed=TCB_LEVELS, launch=TCB_LEVELS)
    with pytest.raises(PolicyRejectedError, match="microcode of the reported TCB is 1") as caught:
        world.verify(evidence, ("microcode = 1", "microcode = 2"))
    assert len(caught.value.reasons) == 1


def test_fmc_that_is_too_old(turin):
    with pytest.raises(PolicyRejectedError, match="fmc of the launch TCB is 1"):
        turin.verify(turin.evidence(launch={**turin.root.levels, "fmc": 1}))


def test_level_that_the_product_has_not(milan):
    with pytest.raises(PolicyRejectedError, match="level of fmc, which milan has not"):
        milan.verify(None, ("tee = 1", "tee = 1\nfmc = 0"))


def test_policy_without_minimum_levels_is_told(milan):
    decision = milan.verify(None, ("min_tcb.milan", "min_tcb.genoa"))
    assert any("min_tcb.milan" in limit for limit in decision.limits)
    assert not any("min_tcb" in limit for limit in milan.verify().limits)


def test_chip_that_is_not_listed(milan):
    listed = f'[platforms]\nallow_chip_id = ["{milan.root.chip_id.hex()}"]\n[roles.server'
    assert milan.verify(None, ("[roles.server", listed)).accepted
    with pytest.raises(PolicyRejectedError, match="allow_chip_id"):
        milan.verify(None, ("[roles.server", listed.replace(milan.root.chip_id.hex(), "ab" * 64)))


def test_wrong_code_job_or_weights(milan):
    with pytest.raises(MeasurementMismatchError, match="host_data"):
        milan.verify(milan.evidence(host_data=bytes(32)))


def test_wrong_image(milan):
    with pytest.raises(MeasurementMismatchError, match="measurement"):
        milan.verify(milan.evidence(measurement=b"\x01" * 48))


@pytest.mark.parametrize("register", ["measurement", "host_data"])
def test_required_register_without_a_value(milan, register):
    line = next(line for line in milan.policy_text.splitlines() if line.startswith(register))
    for change in ("", f"{register} = []"):
        with pytest.raises(PolicyRejectedError, match=f"no value of {register}"):
            milan.verify(None, (line, change))


def test_role_without_a_measurement_set(milan):
    with pytest.raises(PolicyRejectedError, match=r"no measurement set for the role \"client\""):
        milan.verify(role="client")


def test_evidence_of_another_session(milan):
    attester = SimulatedSnpAttester(milan.root, host_data=HOST_DATA)
    with pytest.raises(MeasurementMismatchError, match="report_data"):
        milan.verify(attester.evidence(bytes(64)))
