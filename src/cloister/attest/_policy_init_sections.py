"""The text of a strict policy's sections, one function for each TEE: what the claims showed, and nothing beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cloister.attest._policy_rules import (
    SGX_REGISTERS,
    SNP_PRODUCTS,
    SNP_REGISTERS,
    SNP_TCB_PARTS,
    TCB_STATUSES,
    TDX_REGISTERS,
    VTPM_REGISTERS,
)
from cloister.attest._types import Claims


@dataclass(frozen=True)
class Choice:
    """A key whose strictest sufficient value is found by trial, since not every claim tells it.

    Attributes:
        tee: the section.
        key: dotted, inside the section.
        values: TOML texts, the strictest first; the last one allows most.
    """

    tee: str
    key: str
    values: tuple[str, ...]


_SWITCH = ("false", "true")
CHOICES = (
    *(Choice(tee, f"allow.{key}", _SWITCH) for tee in ("tdx", "sgx") for key in ("dynamic", "cached_keys", "smt")),
    *(Choice("snp", f"guest_policy.{key}", _SWITCH) for key in ("migrate_ma", "smt")),
    Choice("snp", "max_vmpl", ("0", "1", "2", "3")),
    Choice("snp", "signer", ('["vcek"]', '["vlek"]', '["vcek", "vlek"]')),
    Choice("gpu", "cc_mode", ('["on"]', '["protected_pcie"]', '["on", "protected_pcie"]')),
)

_PART = re.compile(r"([a-z]+)=(\d+)")
_TCB_NAMES = ("reported", "committed", "launch", "current")

Chosen = Mapping[Choice, str]
Lines = list[str]


def section_text(
    tee: str, seen: Sequence[Claims], *, role: str, chosen: Chosen, everywhere: bool, below: bool
) -> Lines:
    """The lines of [<tee>] and of [roles.<role>.<tee>] for everything that `seen` showed of this TEE.

    Args:
        tee: "tdx", "sgx", "snp", "vtpm" or "gpu".
        seen: claims of this TEE, at least one.
        role: whose values.
        chosen: the values of `CHOICES`.
        everywhere: whether all the evidence had this TEE.
        below: whether it only vouches for a vTPM, whose PCRs then measure the code.
    """
    lines = ["", f"[{tee}]", *_SECTIONS[tee](seen)]
    lines += [f"{choice.key} = {value}" for choice, value in chosen.items() if choice.tee == tee]
    if tee == "gpu":
        return [*lines, "# Evidence without a GPU beside it is refused.", f"required = {str(everywhere).lower()}"]
    lines += ["", f"[roles.{role}.{tee}]", *([] if below else _ROLE_COMMENTS[tee])]
    for name in _names(tee, seen):
        if values := {claims.measurements[name] for claims in seen if name in claims.measurements}:
            lines.append(f"{name} = {quoted(values)}")
    return lines


def _names(tee: str, seen: Sequence[Claims]) -> tuple[str, ...]:
    # A signer without one product would be any product of that signer.
    if tee == "sgx" and len({claims.details["isv_prod_id"] for claims in seen}) > 1:
        return ("mr_enclave",)
    return _REGISTERS[tee]


def quoted(values: Iterable[str]) -> str:
    """A TOML list of texts, sorted, each once. What JSON escapes, TOML reads the same."""
    return "[" + ", ".join(json.dumps(value) for value in sorted(set(values))) + "]"


def _dcap(seen: Sequence[Claims]) -> Lines:
    words = {claims.tcb_status for claims in seen}
    generations = [int(claims.details["tcb_evaluation_number"]) for claims in seen]
    return [
        "# The vendor's words on the patch level, only as seen.",
        f"tcb_status = {_in_order(words)}",
        "# Data of the vendor older than what was seen is refused.",
        f"min_tcb_eval = {min(generations)}",
        "collateral_max_age_d = 30",
        "# Properties of the platform; multi-socket servers have all three.",
    ]


def _in_order(words: Iterable[str]) -> str:
    found = set(words)
    return "[" + ", ".join(f'"{word}"' for word in TCB_STATUSES if word in found) + "]"


def _tdx(seen: Sequence[Claims]) -> Lines:
    attributes = [bytes.fromhex(claims.details["td_attributes"]) for claims in seen]
    # Every bit in which all agree is fixed; of the others nothing is known.
    mask = bytes(0xFF ^ _differing(column) for column in zip(*attributes, strict=True))
    value = bytes(bit & covered for bit, covered in zip(attributes[0], mask, strict=True))
    return [
        f"xfam = {quoted(claims.details['xfam'] for claims in seen)}",
        f'td_attributes_mask = "{mask.hex()}"',
        f'td_attributes_value = "{value.hex()}"',
        *_dcap(seen),
    ]


def _differing(column: Sequence[int]) -> int:
    bits = 0
    for value in column:
        bits |= value ^ column[0]
    return bits


def _sgx(seen: Sequence[Claims]) -> Lines:
    """mr_enclave and mr_signer are both pinned; the reader asks for the product that goes with a signer."""
    products = {claims.details["isv_prod_id"] for claims in seen}
    lines = [f"prod_id = {product}" for product in products if len(products) == 1]
    return [*lines, f"min_svn = {min(int(claims.details['isv_svn']) for claims in seen)}", *_dcap(seen)]


def _snp(seen: Sequence[Claims]) -> Lines:
    lines = ["# Firmware older than what was seen is refused."]
    for product in SNP_PRODUCTS:
        levels = [_tcb(claims) for claims in seen if claims.details["product"] == product]
        if levels:
            parts = [f"{part} = {min(tcb[part] for tcb in levels)}" for part in SNP_TCB_PARTS if part in levels[0]]
            lines.append(f"min_tcb.{product} = {{ {', '.join(parts)} }}")
    return lines


def _tcb(claims: Claims) -> dict[str, int]:
    """The lowest level of each part: `min_tcb` is compared with all four TCB versions of a report."""
    levels = [dict(_PART.findall(claims.details[f"{name}_tcb"])) for name in _TCB_NAMES]
    return {part: min(int(tcb[part]) for tcb in levels) for part in SNP_TCB_PARTS if all(part in tcb for tcb in levels)}


def _vtpm(seen: Sequence[Claims]) -> Lines:
    """The CPU below vouches for a vTPM's key; of a software TPM the key itself is all that there is to pin."""
    # Evidence of the other kinds is of a key that no evidence can vouch for: `draft_policy` has refused it.
    software = {claims.root_sha256 for claims in seen if claims.evidence_type == "vtpm"}
    hcl = any(claims.evidence_type != "vtpm" for claims in seen)
    sources = [*(["software"] if software else []), *(["hcl"] if hcl else [])]
    lines = [f"ak_source = {quoted(sources)}"]
    return [*lines, f"software_ak_sha256 = {quoted(software)}"] if software else lines


def _gpu(seen: Sequence[Claims]) -> Lines:
    names = sorted({name for claims in seen for name in claims.measurements}, key=int)
    lines = [f"{key} = {quoted(claims.details[key] for claims in seen)}" for key in ("driver", "vbios")]
    for name in names:
        lines.append(f"measurements.{name} = {quoted(c.measurements[name] for c in seen if name in c.measurements)}")
    return lines


_SECTIONS: dict[str, Callable[[Sequence[Claims]], Lines]] = {
    "tdx": _tdx, "sgx": _sgx, "snp": _snp, "vtpm": _vtpm, "gpu": _gpu,
}  # fmt: skip
_REGISTERS: dict[str, tuple[str, ...]] = {
    "tdx": TDX_REGISTERS,
    "sgx": SGX_REGISTERS,
    "snp": SNP_REGISTERS,
    "vtpm": VTPM_REGISTERS,
}
_RUNTIME_COMMENT = (
    "# {0} measures code, job, weights and the policy that the enclave ran under, less its run-time registers: after",
    "# any change of those, `cloister measure JOB` gives the new value.",
)
_ROLE_COMMENTS: dict[str, Lines] = {
    "tdx": [line.format("rtmr3") for line in _RUNTIME_COMMENT],
    "sgx": ["# One enclave exactly. To allow later versions of one signer, see spec/attestation.md section 4."],
    "snp": [line.format("host_data") for line in _RUNTIME_COMMENT],
    "vtpm": [line.format("pcr15") for line in _RUNTIME_COMMENT],
}
