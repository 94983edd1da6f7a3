"""Writes a strict policy from evidence that a person shows: proven first, then everything seen is pinned.

The result is checked against the same evidence before it is returned, by the verifiers that will apply it later.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from cloister.attest._certificates import PARSE_ERRORS
from cloister.attest._policy import EVIDENCE_TYPES, POLICY_VERSION, SIMULATED_TYPES, Policy
from cloister.attest._policy_init_sections import CHOICES, Choice, Lines, quoted, section_text
from cloister.attest._policy_rules import SNP_PRODUCTS, TCB_STATUSES
from cloister.attest._types import HARDENING_LAYERS, INTEL_ROOT_SHA256, Claims
from cloister.attest._verifiers.gpu import NVIDIA_ROOT_SHA256
from cloister.attest._verifiers.snp import AMD_ARK_SHA256
from cloister.attest._verifiers.snp_aux import parse_aux
from cloister.attest._verifiers.snp_report import parse_report
from cloister.attest._verifiers.tpm import MAX_TPM_BYTES, unpack_evidence
from cloister.attest._verifiers.vtpm import TPM_FIELDS, TPM_KIND
from cloister.attest._verify import appraise_evidence
from cloister.errors import AttestationError, PolicyRejectedError
from cloister.wire import Evidence

_PEM = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]{1,16384}-----END CERTIFICATE-----")
_MAX_CERTIFICATES = 256
_SKEW_S = 300
_TPM_TYPE, _SNP_TYPE = "vtpm", "simulated-snp"
_TEES = ("tdx", "sgx", "snp", "vtpm", "gpu")


def draft_policy(
    evidences: Sequence[Evidence], *, role: str, now: int, allow_simulated: bool = False, pin_platform: bool = False
) -> bytes:
    """The text of a strict policy that accepts exactly what `evidences` show, for one role. Public.

    Success means: each piece is genuine under its vendor's root (or, with `allow_simulated`, under the root that it
    brings), none is of a debug enclave, and the returned policy accepts each of them at `now`. The caller must still
    know by other means that the machines and the code which it shows are those that it wants: evidence says what runs,
    not that it is good.

    Args:
        evidences: at least one; untrusted.
        role: "server" or "client", whose reference values these are.
        now: Unix seconds at which the evidence has to be valid.
        allow_simulated: accept a root that is no vendor's.
        pin_platform: allow these platforms alone.

    Raises:
        AttestationError: of the class that `verify_evidence` gives, for the first piece that cannot be accepted.
    """
    seen = [_prove(evidence, role=role, now=now, allow_simulated=allow_simulated) for evidence in evidences]
    claims = [part for outer in seen for part in _flat(outer)]
    present = {part.tee for part in claims}
    chosen = {choice: choice.values[-1] for choice in CHOICES if choice.tee in present}

    def render(values: Mapping[Choice, str]) -> bytes:
        return _render(evidences, seen, claims, role=role, now=now, pin_platform=pin_platform, chosen=values)

    _refuse_unless_accepted(evidences, render(chosen), role=role, now=now)
    for choice in list(chosen):
        for value in choice.values[:-1]:  # the last one is in force already
            trial = {**chosen, choice: value}
            if _accepts(evidences, render(trial), role=role, now=now):
                chosen = trial
                break
    return render(chosen)


def _prove(evidence: Evidence, *, role: str, now: int, allow_simulated: bool) -> Claims:
    """The claims of genuine evidence, whatever its state; what a policy may never allow is refused already here."""
    if evidence.type in SIMULATED_TYPES and not allow_simulated:
        raise PolicyRejectedError(
            f'evidence of the type "{evidence.type}" proves nothing about hardware', hint="see --allow-simulated"
        )
    if evidence.type == _TPM_TYPE and not allow_simulated:
        raise PolicyRejectedError(
            "no vendor vouches for the attestation key of a TPM on its own, so it cannot be taken from its evidence",
            hint="get the key's SHA-256 from the machine's owner, and write it into [vtpm].ak_sha256",
        )
    policy = Policy.parse(_permissive(evidence, allow_simulated=allow_simulated))
    claims = appraise_evidence(evidence, policy, role=role, now=now).claims
    if any(part.debug for part in _flat(claims)):
        raise PolicyRejectedError("a debug enclave: its host can read its memory, and no policy may allow that")
    return claims


def _flat(claims: Claims) -> Iterator[Claims]:
    yield claims
    for part in claims.parts:
        yield from _flat(part)


def _permissive(evidence: Evidence, *, allow_simulated: bool) -> bytes:
    """A policy under which only what no policy allows is refused, to learn what evidence says. Decides nothing."""
    own, keys = _own_roots(evidence) if allow_simulated else ([], [])
    types = [name for name in EVIDENCE_TYPES if allow_simulated or name not in SIMULATED_TYPES]
    lines = [
        f"version = {POLICY_VERSION}",
        f"accept = {quoted(types)}",
        f"allow_simulated = {str(allow_simulated).lower()}",
        f"clock_skew_s = {_SKEW_S}",
        "[roots]",
        f"intel_sha256 = {quoted([INTEL_ROOT_SHA256, *own])}",
        *(f"amd_ark_sha256.{product} = {quoted([root, *own])}" for product, root in AMD_ARK_SHA256.items()),
        f"nvidia_sha256 = {quoted([NVIDIA_ROOT_SHA256, *own])}",
    ]
    for tee in ("tdx", "sgx", "snp", "gpu"):
        lines += [f"[{tee}]", *(f"{choice.key} = {choice.values[-1]}" for choice in CHOICES if choice.tee == tee)]
        if tee in ("tdx", "sgx"):
            lines += [f"tcb_status = {quoted(TCB_STATUSES)}", "collateral_max_age_d = 366"]
    sources = ["hcl", *(["software"] if allow_simulated else [])]
    return "\n".join(
        [*lines, "[vtpm]", f"ak_source = {quoted(sources)}", f"software_ak_sha256 = {quoted(keys)}"]
    ).encode()


def _own_roots(evidence: Evidence) -> tuple[list[str], list[str]]:
    """Root certificates and TPM keys that simulated evidence brings along, as SHA-256.

    Pinning what evidence itself names proves that it is consistent and no more, which is all that simulated evidence
    can prove.
    """
    if evidence.type == _TPM_TYPE:
        ak = unpack_evidence(evidence.blob, TPM_KIND, TPM_FIELDS, max_bytes=MAX_TPM_BYTES)["ak"]
        return [], [hashlib.sha256(ak).hexdigest()]
    if evidence.type == _SNP_TYPE:
        return [hashlib.sha256(parse_aux(evidence.aux, parse_report(evidence.blob).signer).ark).hexdigest()], []
    # The parts of a composite are inside of its blob, and in JSON a line's end is written as two characters.
    text = (evidence.blob + evidence.aux).decode("latin-1").replace("\\n", "\n")
    found: set[str] = set()
    for pem in _PEM.findall(text)[:_MAX_CERTIFICATES]:
        try:
            certificate = x509.load_pem_x509_certificate(pem.encode("latin-1"))
            is_root = certificate.issuer == certificate.subject
        except PARSE_ERRORS:
            continue  # the verifier says what is wrong with it
        if is_root:
            found.add(hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest())
    return sorted(found), []


def _accepts(evidences: Sequence[Evidence], policy: bytes, *, role: str, now: int) -> bool:
    try:
        _refuse_unless_accepted(evidences, policy, role=role, now=now)
    except AttestationError:
        return False
    return True


def _refuse_unless_accepted(evidences: Sequence[Evidence], policy: bytes, *, role: str, now: int) -> None:
    parsed = Policy.parse(policy)
    for evidence in evidences:
        refused = appraise_evidence(evidence, parsed, role=role, now=now).refused
        if refused:
            reasons = [finding.text for finding in refused]
            raise refused[0].error(reasons[0], reasons=reasons, hint="no strict policy can accept this evidence")


def _render(
    evidences: Sequence[Evidence],
    seen: Sequence[Claims],
    claims: Sequence[Claims],
    *,
    role: str,
    now: int,
    pin_platform: bool,
    chosen: Mapping[Choice, str],
) -> bytes:
    simulated = any(part.simulated for part in claims)
    when = datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    pieces = "one piece" if len(evidences) == 1 else f"{len(evidences)} pieces"
    lines = [
        f"# Written by `cloister policy init` from {pieces} of evidence that verified at {when}.",
        "# Everything seen is pinned, and what is not allowed here is denied. Format: spec/attestation.md section 4.",
        "# Before you rely on it: do these values belong to the code and the machines that you mean?",
    ]
    if simulated:
        lines.append("# SIMULATED: it trusts a software root, which protects nobody from whoever holds that root.")
    lines += [
        f"version = {POLICY_VERSION}",
        # Evidence with GPUs needs the type of its CPU, too.
        f"accept = {quoted([*(evidence.type for evidence in evidences), *(outer.evidence_type for outer in seen)])}",
        f"allow_simulated = {str(simulated).lower()}",
        "max_session_age_s = 86400",
        f"clock_skew_s = {_SKEW_S}",
        "",
        "[roots]",
        *_roots(claims),
        *_platforms(claims, pin_platform=pin_platform),
    ]
    for tee in _TEES:
        if of_tee := [part for part in claims if part.tee == tee]:
            everywhere = all(any(part.tee == tee for part in _flat(outer)) for outer in seen)
            below = all(outer.tee != tee for outer in seen)
            lines += section_text(tee, of_tee, role=role, chosen=chosen, everywhere=everywhere, below=below)
    if layers := _layers(seen):
        lines += ["", "[simulated]", f"require_layers = {quoted(layers)}"]
    return ("\n".join(lines) + "\n").encode()


def _roots(claims: Sequence[Claims]) -> Lines:
    intel = {part.root_sha256 for part in claims if part.tee in ("tdx", "sgx")}
    nvidia = {part.root_sha256 for part in claims if part.tee == "gpu"}
    lines = [f"intel_sha256 = {quoted(intel)}"] if intel else []
    for product in SNP_PRODUCTS:
        amd = {c.root_sha256 for c in claims if c.tee == "snp" and c.details.get("product") == product}
        lines += [f"amd_ark_sha256.{product} = {quoted(amd)}"] if amd else []
    return [*lines, f"nvidia_sha256 = {quoted(nvidia)}"] if nvidia else lines


def _platforms(claims: Sequence[Claims], *, pin_platform: bool) -> Lines:
    """The ids of what was seen: in force if they are to be pinned, else as a comment to be taken in."""
    ids = {
        "allow_piid": {part.platform_id for part in claims if part.tee in ("tdx", "sgx") and part.platform_id},
        "allow_chip_id": {part.platform_id for part in claims if part.tee == "snp" and part.platform_id},
    }
    lines = ["", "# The only answer to an extracted platform key. Empty means any platform of these vendors."]
    if pin_platform and not any(ids.values()):
        raise PolicyRejectedError("this evidence names no platform, so none can be pinned")
    lines.append("[platforms]")
    for key, values in ids.items():
        if values:
            lines.append(f"{'' if pin_platform else '# '}{key} = {quoted(values)}")
    return lines


def _layers(seen: Sequence[Claims]) -> list[str]:
    layers = [claims.layers for claims in seen if claims.simulated and claims.tee == "tdx"]
    return [name for name in HARDENING_LAYERS if layers and all(name in of_one for of_one in layers)]
