"""What a policy allows, in words, and what somebody who signs it should know first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloister.attest import Policy

# Which sections decide on evidence of a type, and which register is the least that a role has to name.
_TEES_OF_TYPE = {
    "azure": ("vtpm",),
    "sgx": ("sgx",),
    "simulated": ("tdx",),
    "simulated-sgx": ("sgx",),
    "simulated-snp": ("snp",),
    "snp": ("snp",),
    "tdx": ("tdx",),
    "vtpm": ("vtpm",),
}
_NEEDED = {
    "tdx": ("mr_td", "rtmr1", "rtmr2", "rtmr3"),
    "snp": ("measurement", "host_data"),
    "vtpm": ("pcr15",),
}
_PATCHED = ("UpToDate",)
_USUAL_AGE_D = 30
_USUAL_SKEW_S = 300
_USUAL_SESSION_S = 86400


def policy_allows(policy: Policy) -> list[str]:
    """One line for each thing that the policy allows. What is not said is denied."""
    lines = [f"evidence of the types {_words(sorted(policy.accept))}"]
    lines += _roots(policy)
    lines += [
        f"a session for {policy.max_session_age_s} s, then a new attestation",
        f"an issuer's clock that is ahead by up to {policy.clock_skew_s} s",
        "platforms: " + (f"{len(policy.platform_ids)} by id" if policy.platform_ids else "any"),
    ]
    present = {tee for tees in policy.roles.values() for tee in tees}
    for tee in sorted(present):
        lines += [f"[{tee}] {line}" for line in _RULES[tee](policy)]
    if policy.gpu.required or policy.gpu.drivers:
        lines += [f"[gpu] {line}" for line in _gpu(policy)]
    for role, tees in sorted(policy.roles.items()):
        for tee in sorted(tees):
            registers = policy.registers_for(role, tee) or {}
            for name in sorted(registers):
                values = [f"{value[:16]}…" for value in registers[name]]
                lines.append(f"{role} on {tee}: {name} is {' or '.join(values) or 'never right: an empty list'}")
    if policy.require_layers:
        lines.append(f"simulated enclaves with the hardening layers {_words(policy.require_layers)}")
    return lines


def policy_warnings(policy: Policy) -> list[str]:
    """One line for each thing that makes the policy weaker than it could be, or useless."""
    return [*_useless(policy), *_weak(policy), *_weak_platform(policy)]


def _useless(policy: Policy) -> Iterator[str]:
    if not policy.accept:
        yield "accept is empty: no evidence will be accepted"
    if not policy.roles:
        yield "no role has reference values ([roles.server.<tee>]): no evidence will be accepted"
    for kind in sorted(policy.accept):
        for tee in _TEES_OF_TYPE.get(kind, ()):
            if not any(tee in tees for tees in policy.roles.values()):
                yield f'accept names "{kind}", and no role has a set for it ([roles.<role>.{tee}]): it will be refused'
    for role, tees in sorted(policy.roles.items()):
        for tee in sorted(tees):
            registers = policy.registers_for(role, tee) or {}
            # What lies below a vTPM answers for less: there only what is named can be missing.
            direct = any(tee in _TEES_OF_TYPE.get(kind, ()) for kind in policy.accept)
            needed = set(_NEEDED.get(tee, ()) if direct else ()) | set(registers)
            if empty := [name for name in sorted(needed) if not registers.get(name)]:
                yield f"[roles.{role}.{tee}] has no value of {', '.join(empty)}: evidence for this role will be refused"
    keys = policy.vtpm.ak_sha256 | policy.vtpm.software_ak_sha256
    if not (policy.intel_sha256 or any(policy.amd_ark_sha256.values()) or keys):
        yield "no root and no attestation key is pinned: no evidence will be accepted"


def _weak(policy: Policy) -> Iterator[str]:
    if policy.allow_simulated:
        yield "allow_simulated = true: a software root is trusted, which protects nobody from whoever holds it"
    if not policy.platform_ids:
        yield "[platforms] is empty: any platform of these vendors is allowed, so one extracted key anywhere is enough"
    if policy.clock_skew_s > _USUAL_SKEW_S:
        yield f"clock_skew_s = {policy.clock_skew_s}: a clock that is ahead by more than {_USUAL_SKEW_S} s is wrong"
    if policy.max_session_age_s > _USUAL_SESSION_S:
        yield f"max_session_age_s = {policy.max_session_age_s}: a session should attest again at least once a day"
    for role, tees in sorted(policy.roles.items()):
        if "sgx" in tees and "mr_enclave" not in (policy.registers_for(role, "sgx") or {}):
            yield f"{role} on sgx: no mr_enclave, so every version of that signer's product is accepted"
    shared = [set(values.get("rtmr3", ())) for tees in policy.roles.values() for values in (tees.get("tdx", {}),)]
    if len(shared) > 1 and set.intersection(*shared):
        yield "server and client share a value of rtmr3: evidence of one passes as the other's"


def _weak_platform(policy: Policy) -> Iterator[str]:
    present = {tee for tees in policy.roles.values() for tee in tees}
    for tee in sorted(present & {"tdx", "sgx"}):
        rules = getattr(policy, tee).platform
        if unpatched := [word for word in rules.tcb_status if word not in _PATCHED]:
            yield f"[{tee}].tcb_status accepts {_words(unpatched)}: the vendor knows of weaknesses on such platforms"
        if rules.collateral_max_age_d > _USUAL_AGE_D:
            yield f"[{tee}].collateral_max_age_d = {rules.collateral_max_age_d}: news of a revocation may be as late"
    if "tdx" in present:
        if not any(policy.tdx.td_attributes_mask):
            yield "[tdx].td_attributes_mask is zero: no attribute is compared (debug domains are refused all the same)"
        if not policy.tdx.xfam:
            yield "[tdx].xfam is empty: any extended features are allowed"
    if "snp" in present:
        yield from _weak_snp(policy)
    if {"pinned", "software"} & set(policy.vtpm.ak_source) and "vtpm" in present:
        yield f"[vtpm].ak_source names {_words(policy.vtpm.ak_source)}: no vendor vouches for a pinned TPM key"


def _weak_snp(policy: Policy) -> Iterator[str]:
    pinned = [product for product, roots in policy.amd_ark_sha256.items() if roots]
    for product in sorted(pinned):
        if not policy.snp.min_tcb.get(product):
            yield f"[snp].min_tcb.{product} is missing: any firmware of that product is allowed, however old"
    if policy.snp.max_vmpl:
        yield f"[snp].max_vmpl = {policy.snp.max_vmpl}: less privileged software of the guest may ask for reports"
    if policy.snp.allow_migrate_ma:
        yield "[snp].guest_policy.migrate_ma = true: a migration agent may move the guest"


def _roots(policy: Policy) -> Iterator[str]:
    pinned: dict[str, frozenset[str]] = {"intel_sha256": policy.intel_sha256}
    pinned |= {f"amd_ark_sha256.{product}": roots for product, roots in policy.amd_ark_sha256.items()}
    pinned["nvidia_sha256"] = policy.nvidia_sha256
    for name, roots in pinned.items():
        if roots:
            yield f"roots {name}: {', '.join(f'{root[:16]}…' for root in sorted(roots))}"


def _dcap(rules: Any) -> list[str]:
    allowed = [name for name in ("dynamic", "cached_keys", "smt") if getattr(rules, f"allow_{name}")]
    lines = [
        f"patch level {_words(rules.tcb_status)}",
        f"collateral up to {rules.collateral_max_age_d} days old",
        f"platform properties: {_words(allowed)}",
    ]
    if rules.min_tcb_evaluation:
        lines.append(f"TCB data of generation {rules.min_tcb_evaluation} or later")
    return [*lines, *(f"refused where {name} applies" for name in rules.reject_advisories)]


def _tdx(policy: Policy) -> list[str]:
    rules = policy.tdx
    return [
        *_dcap(rules.platform),
        f"xfam {_words(rules.xfam) if rules.xfam else 'any'}",
        f"td_attributes {rules.td_attributes_value.hex()} under the mask {rules.td_attributes_mask.hex()}",
    ]


def _sgx(policy: Policy) -> list[str]:
    rules = policy.sgx
    product = "any product" if rules.prod_id is None else f"product {rules.prod_id}"
    return [*_dcap(rules.platform), f"{product}, security version {rules.min_svn} or later"]


def _snp(policy: Policy) -> list[str]:
    rules = policy.snp
    lines = [
        f"reports signed by a {_words(rules.signers)}, asked for at VMPL 0 to {rules.max_vmpl}",
        f"guest policy: migration agent {_yes(rules.allow_migrate_ma)}, SMT {_yes(rules.allow_smt)}, debug never",
    ]
    for product, parts in sorted(rules.min_tcb.items()):
        least = ", ".join(f"{part} {value}" for part, value in sorted(parts.items()))
        lines.append(f"{product} firmware of at least {least or 'anything'}")
    return lines


def _vtpm(policy: Policy) -> list[str]:
    rules = policy.vtpm
    lines = [f"attestation keys vouched for by {_words(rules.ak_source)}"]
    for name, keys in (("pinned", rules.ak_sha256), ("of software TPMs", rules.software_ak_sha256)):
        if keys:
            lines.append(f"{len(keys)} keys {name}")
    return lines


def _gpu(policy: Policy) -> list[str]:
    rules = policy.gpu
    return [
        "required" if rules.required else "not required",
        f"driver {_words(rules.drivers)}; VBIOS {_words(rules.vbios)}; mode {_words(rules.cc_modes)}",
        f"measurements compared: {_words(sorted(rules.measurements, key=int))}",
    ]


_RULES: Mapping[str, Any] = {"tdx": _tdx, "sgx": _sgx, "snp": _snp, "vtpm": _vtpm}


def _words(values: Any) -> str:
    return ", ".join(values) or "none"


def _yes(allowed: bool) -> str:
    return "allowed" if allowed else "not allowed"
