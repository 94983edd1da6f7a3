"""Verifies AMD SEV-SNP reports: types "snp" and "simulated-snp", by one code path under their own roots."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from cloister.attest._finding import Findings, Proven, check_registers
from cloister.attest._policy import Policy
from cloister.attest._policy_rules import SNP_REQUIRED
from cloister.attest._types import Claims
from cloister.attest._verifiers import snp_certs as certs
from cloister.attest._verifiers.dcap import utc
from cloister.attest._verifiers.root import check_root
from cloister.attest._verifiers.snp_aux import parse_aux
from cloister.attest._verifiers.snp_report import SnpReport, parse_report, tcb_parts
from cloister.errors import EvidenceSignatureError, PolicyRejectedError
from cloister.wire import Evidence

SIMULATED_TYPE = "simulated-snp"

# SHA-256 of the DER of AMD's root certificates, CN=ARK-Milan (until 2045), ARK-Genoa (2047) and ARK-Turin (2048).
AMD_ARK_SHA256 = {
    "genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    "milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
}

# Guest policy, AMD publication 56860 section 4.3.
_SMT, _MUST_BE_ONE, _MIGRATE_MA, _DEBUG = 1 << 16, 1 << 17, 1 << 18, 1 << 19
_POLICY_KNOWN = (1 << 26) - 1  # bit 25, PAGE_SWAP_DISABLE, is the last that this release knows

_LIMITS = (
    "not proven: that nobody with physical access reads or writes the memory bus",
    "not proven: that sealed files are the newest (SNP has no counter)",
    "not proven by AMD: host_data, which the host sets at launch; it binds code and job because the measured image "
    "compares it with what it loaded, and only if it does",
)
_NO_CRL = "not proven: that no certificate was revoked (no revocation list came along)"
_SIMULATED_LIMITS = ("not proven: anything against whoever holds the simulated root's keys; this is no TEE",)


@dataclass(frozen=True)
class SnpProof:
    """A report that verified under a pinned root.

    Attributes:
        claims: what it states.
        findings: what the policy's section [snp] says of platform and guest policy; registers are not judged yet.
        limits: what it cannot prove.
    """

    claims: Claims
    findings: Findings
    limits: tuple[str, ...]


def verify_snp(evidence: Evidence, policy: Policy, *, role: str, now: int) -> Proven:
    """Prove what an SNP report states under a pinned root, and judge it by [snp] and the role's registers.

    Success means what `prove_snp` says. The caller must still refuse when the result has findings or the claims say
    debug, and compare the report data.

    Raises:
        AttestationError: as `prove_snp`.
    """
    proof = prove_snp(evidence, policy, now=now)
    registers = policy.registers_for(role, "snp")
    check_registers(proof.claims, registers, proof.findings, role=role, required=SNP_REQUIRED)
    return Proven(proof.claims, proof.findings, proof.limits)


def prove_snp(evidence: Evidence, policy: Policy, *, now: int) -> SnpProof:
    """Prove an SNP report under a root that the policy pins, and judge platform and guest policy (spec section 5).

    Success means: the report was signed by a VCEK or VLEK for exactly the chip (VCEK) and the reported TCB in the
    report, that key was certified by an ASK or ASVK, and that by the pinned ARK of the processor's product, all valid
    at `now`, and not revoked by the list that came along, if one did. The caller must still compare registers and
    report data, refuse debug guests, and refuse when there are findings.

    Args:
        evidence: `blob` is the report, `aux` the certificates in one of the forms of `snp_aux`. Untrusted.
        policy: pins the ARK and rules on the rest.
        now: Unix seconds.

    Raises:
        MalformedEvidenceError: report or certificates do not parse.
        PolicyRejectedError: the root is not pinned or not allowed.
        StaleEvidenceError: a certificate or the revocation list has expired or is from the future.
        EvidenceSignatureError: a signature, chain or binding does not hold, or a certificate is revoked.
    """
    report = parse_report(evidence.blob)
    collateral = parse_aux(evidence.aux, report.signer)
    leaf = certs.load_certificate(collateral.leaf, report.signer.upper())
    certified = certs.product_of(leaf)
    product = report.product or certified
    root_sha256 = hashlib.sha256(collateral.ark).hexdigest()
    root = check_root(
        evidence.type,
        root_sha256,
        policy,
        vendor="AMD",
        genuine=AMD_ARK_SHA256.values(),
        pinned=policy.amd_ark_sha256[product],
        key=f"amd_ark_sha256.{product}",
        real=("snp",),
        software=(SIMULATED_TYPE,),
    )
    simulated = root_sha256 not in AMD_ARK_SHA256.values()
    findings = Findings([root if simulated else f"{root}, of {product}"])
    if certified != product:
        raise EvidenceSignatureError(f"the {leaf.what} certificate is of {certified}, the report of {product}")
    chain = certs.verify_chain(leaf, collateral, report, product, now=now, skew_s=policy.clock_skew_s)
    certs.verify_signature(report.signed, report.r, report.s, leaf)
    findings.passed.append(f"report and {leaf.what} certificate of {product} verify under that root at {utc(now)}")
    tcb = {name: tcb_parts(raw, product) for name, raw in report.tcb.items()}
    _check_tcb(tcb, product, policy, findings)
    _check_guest(report, policy, findings)
    claims = Claims(
        tee="snp",
        evidence_type=evidence.type,
        simulated=simulated,
        root_sha256=root_sha256,
        measurements={"measurement": report.measurement.hex(), "host_data": report.host_data.hex()},
        debug=bool(report.guest_policy & _DEBUG),
        report_data=report.report_data,
        platform_id=report.chip_id.hex() if any(report.chip_id) else "",
        collateral_issued=chain.issued,
        collateral_expires=chain.expires,
        details=_details(report, product, tcb, chain.csp_id),
    )
    return SnpProof(claims, findings, _limits(simulated, chain.has_crl, product, policy))


def _check_tcb(tcb: dict[str, dict[str, int]], product: str, policy: Policy, findings: Findings) -> None:
    """The least patch levels. Of the reported TCB too: its level chose the key that signed all the others."""
    minimum = policy.snp.min_tcb.get(product, {})
    before = len(findings.refused)
    for name in ("reported", "committed", "launch", "current"):
        for part, least in minimum.items():
            level = tcb[name].get(part)
            if level is None:
                findings.refuse(PolicyRejectedError, f"the policy asks for a level of {part}, which {product} has not")
            elif level < least:
                text = f"{part} of the {name} TCB is {level}, the policy asks for {least}"
                findings.refuse(PolicyRejectedError, text)
    if minimum and len(findings.refused) == before:
        findings.passed.append(f"reported, committed, launch and current TCB are at least {_text(minimum)}")


def _check_guest(report: SnpReport, policy: Policy, findings: Findings) -> None:
    rules, bits = policy.snp, report.guest_policy
    findings.check(
        report.signer in rules.signers,
        f"the report is signed by a {report.signer.upper()}",
        f"the report is signed by a {report.signer.upper()}, the policy accepts {', '.join(rules.signers) or 'none'}",
    )
    findings.check(
        report.vmpl <= rules.max_vmpl,
        f"the report was asked for at VMPL {report.vmpl}",
        f"the report was asked for at VMPL {report.vmpl}, the policy allows at most {rules.max_vmpl}",
    )
    before = len(findings.refused)
    unknown = bits & ~_POLICY_KNOWN or not bits & _MUST_BE_ONE
    findings.check(not unknown, "", f"the guest policy {bits:#x} has bits that this release does not know")
    for name, bit, allowed in (("migrate_ma", _MIGRATE_MA, rules.allow_migrate_ma), ("smt", _SMT, rules.allow_smt)):
        text = f"the guest policy {bits:#x} allows {name}, and [snp].guest_policy does not"
        findings.check(allowed or not bits & bit, "", text)
    if len(findings.refused) == before:
        findings.passed.append(f"guest policy {bits:#x} is allowed")


def _limits(simulated: bool, has_crl: bool, product: str, policy: Policy) -> tuple[str, ...]:
    limits: list[str] = list(_SIMULATED_LIMITS if simulated else _LIMITS)
    if not has_crl:
        limits.append(_NO_CRL)
    if not policy.snp.min_tcb.get(product):
        limits.append(f"not proven: that the firmware is new enough (the policy has no [snp].min_tcb.{product})")
    return tuple(limits)


def _details(report: SnpReport, product: str, tcb: dict[str, dict[str, int]], csp_id: str) -> dict[str, str]:
    details = {
        "product": product,
        "report_version": str(report.version),
        "signer": report.signer,
        "vmpl": str(report.vmpl),
        "guest_policy": f"{report.guest_policy:#x}",
        "guest_svn": str(report.guest_svn),
        "platform_info": f"{report.platform_info:#x}",
        "family_id": report.family_id.hex(),
        "image_id": report.image_id.hex(),
        "id_key_digest": report.id_key_digest.hex(),
        # Without AUTHOR_KEY_EN the field is nobody's word.
        "author_key_digest": report.author_key_digest.hex() if report.author_key_enabled else "",
    }
    details |= {f"{name}_tcb": _text(parts) for name, parts in tcb.items()}
    return details | ({"csp_id": csp_id} if csp_id else {})


def _text(parts: Mapping[str, int]) -> str:
    return " ".join(f"{part}={level}" for part, level in parts.items())
