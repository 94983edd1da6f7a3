"""The allow-list that decides what evidence a party accepts (spec/attestation.md section 4). Default deny."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from cloister.attest._policy_reader import TableReader
from cloister.errors import ConfigError, Problem
from cloister.wire import enc

POLICY_VERSION = 1
# What this release can verify; a policy that names another type is a mistake to be told of, not to be skipped.
EVIDENCE_TYPES = ("simulated", "tdx")
ROLES = ("client", "server")
TDX_REGISTERS = ("mr_seam", "mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3")
# Without these four a policy would accept other firmware, another kernel, another image or other code. The rest depend
# on the size of the machine (rtmr0) or follow from the vendor's own signature (mr_seam).
TDX_REQUIRED_REGISTERS = ("mr_td", "rtmr1", "rtmr2", "rtmr3")
TCB_STATUSES = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
)
_TEMPLATE_LABEL = b"cloister-policy-template/v1"
_MAX_AGE_S = 366 * 86400
_MAX_SKEW_S = 3600


@dataclass(frozen=True)
class TdxRules:
    """The section [tdx]: what holds for a TDX platform of either role.

    Attributes:
        registers: register name -> allowed values (48 bytes hex). A name that is missing is not checked, unless it is
            one of `TDX_REQUIRED_REGISTERS`; a name with no values allows nothing.
        xfam: allowed values (8 bytes hex); empty means any.
        td_attributes_mask, td_attributes_value: 8 bytes; the masked bits must equal the value.
        tcb_status: accepted words of the vendor on the patch level.
        reject_advisories: advisories that refuse.
        min_tcb_evaluation: least generation of the vendor's TCB data.
        allow_dynamic, allow_cached_keys, allow_smt: platform properties that multi-socket servers have.
        collateral_max_age_d: greatest age of the collateral in days.
    """

    registers: Mapping[str, tuple[str, ...]]
    xfam: tuple[str, ...]
    td_attributes_mask: bytes
    td_attributes_value: bytes
    tcb_status: tuple[str, ...]
    reject_advisories: tuple[str, ...]
    min_tcb_evaluation: int
    allow_dynamic: bool
    allow_cached_keys: bool
    allow_smt: bool
    collateral_max_age_d: int


@dataclass(frozen=True)
class Policy:
    """One parsed policy file. Public; both sides bind its hash into their session.

    Attributes:
        accept: accepted evidence types.
        allow_simulated: whether evidence under a root that is not the vendor's may be accepted.
        max_session_age_s: after which a session must attest again.
        clock_skew_s: how far the issuer's clock may be ahead.
        intel_sha256: pinned roots, hex SHA-256 of the DER certificate.
        tdx: rules of the section [tdx].
        require_layers: hardening layers that simulated evidence must report.
        platform_ids: allowed platform instance ids in hex; empty means any.
        roles: role -> register name -> allowed values, over those of `tdx.registers`.
        sha384: SHA-384 of the file's bytes.
        template_sha384: SHA-384 of the policy without `rtmr3` in its roles, which is what `rtmr3` itself measures.
        source: where it was read from, for messages.
    """

    accept: frozenset[str]
    allow_simulated: bool
    max_session_age_s: int
    clock_skew_s: int
    intel_sha256: frozenset[str]
    tdx: TdxRules
    require_layers: tuple[str, ...]
    platform_ids: frozenset[str]
    roles: Mapping[str, Mapping[str, tuple[str, ...]]]
    sha384: bytes
    template_sha384: bytes
    source: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file.

        Raises:
            ConfigError: the file cannot be read, or is wrong; every problem is listed.
        """
        try:
            blob = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the policy: {error.strerror}", source=str(path)) from None
        return cls.parse(blob, source=str(path))

    @classmethod
    def parse(cls, blob: bytes, source: str = "") -> Policy:
        """Parse the bytes of a policy file. Unknown keys are errors, and what is not allowed is denied.

        Raises:
            ConfigError: every problem found, each with its key.
        """
        try:
            document = tomllib.loads(blob.decode())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"not a TOML file: {error}", source=source) from None
        except RecursionError:
            raise ConfigError("not a TOML file: nested too deeply", source=source) from None
        problems: list[Problem] = []
        fields = _read_fields(TableReader(document, "", problems))
        if problems:
            raise ConfigError(problems, source=source)
        fields["sha384"] = hashlib.sha384(blob).digest()
        fields["template_sha384"] = _template_sha384(document)
        return cls(**fields, source=source)

    def registers_for(self, role: str) -> dict[str, tuple[str, ...]] | None:
        """The reference values of `role`, or None where the policy has no set for it."""
        if role not in self.roles:
            return None
        return {**self.tdx.registers, **self.roles[role]}


def _read_fields(top: TableReader) -> dict[str, Any]:
    """Every field of `Policy` that the document sets; problems are collected by the reader."""
    if top.integer("version", minimum=POLICY_VERSION, maximum=POLICY_VERSION) is None:
        top.problem("version", "missing", hint=f"version = {POLICY_VERSION}")
    accept = frozenset(top.choices("accept", EVIDENCE_TYPES))
    allow_simulated = top.boolean("allow_simulated", default=False)
    if "simulated" in accept and not allow_simulated:
        top.problem("accept", '"simulated" needs allow_simulated = true', hint="simulated evidence protects nobody")
    fields: dict[str, Any] = {
        "accept": accept,
        "allow_simulated": allow_simulated,
        "max_session_age_s": top.integer("max_session_age_s", minimum=1, maximum=_MAX_AGE_S) or 86400,
        "clock_skew_s": top.integer("clock_skew_s", minimum=0, maximum=_MAX_SKEW_S) or 0,
        "intel_sha256": _read_roots(top.table("roots")),
        "tdx": _read_tdx(top.table("tdx")),
        "require_layers": _read_simulated(top.table("simulated")),
        "platform_ids": _read_platforms(top.table("platforms")),
        "roles": _read_roles(top.table("roles")),
    }
    top.finish()
    return fields


def _read_roots(table: TableReader) -> frozenset[str]:
    pinned = frozenset(table.hex_list("intel_sha256", n_bytes=32) or ())
    table.finish()
    return pinned


def _read_simulated(table: TableReader) -> tuple[str, ...]:
    layers = table.texts("require_layers")
    table.finish()
    return layers


def _read_platforms(table: TableReader) -> frozenset[str]:
    allowed = frozenset(table.hex_list("allow_piid", n_bytes=16) or ())
    table.finish()
    return allowed


def _read_registers(table: TableReader, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    read = {name: table.hex_list(name, n_bytes=48) for name in names}
    return {name: values for name, values in read.items() if values is not None}


def _read_tdx(table: TableReader) -> TdxRules:
    allow = table.table("allow")
    # rtmr3 measures code and job, which differ between roles: it has no place in what both share.
    registers = _read_registers(table, tuple(name for name in TDX_REGISTERS if name != "rtmr3"))
    mask, value = table.hex_bytes("td_attributes_mask", 8), table.hex_bytes("td_attributes_value", 8)
    if any(bit & ~covered for bit, covered in zip(value, mask, strict=True)):
        table.problem("td_attributes_value", "has bits that td_attributes_mask does not cover")
    rules = TdxRules(
        registers=registers,
        xfam=table.hex_list("xfam", n_bytes=8) or (),
        td_attributes_mask=mask,
        td_attributes_value=value,
        tcb_status=table.choices("tcb_status", TCB_STATUSES, default=("UpToDate",)),
        reject_advisories=table.texts("reject_advisories"),
        min_tcb_evaluation=table.integer("min_tcb_eval", minimum=0, maximum=1 << 31) or 0,
        allow_dynamic=allow.boolean("dynamic", default=False),
        allow_cached_keys=allow.boolean("cached_keys", default=False),
        allow_smt=allow.boolean("smt", default=False),
        collateral_max_age_d=table.integer("collateral_max_age_d", minimum=1, maximum=366) or 30,
    )
    allow.finish()
    table.finish()
    return rules


def _read_roles(table: TableReader) -> dict[str, dict[str, tuple[str, ...]]]:
    roles: dict[str, dict[str, tuple[str, ...]]] = {}
    for role in ROLES:
        if not table.has(role):
            continue
        role_table = table.table(role)
        tdx = role_table.table("tdx")
        roles[role] = _read_registers(tdx, TDX_REGISTERS)
        tdx.finish()
        role_table.finish()
    table.finish()
    return roles


def _template_sha384(document: dict[str, Any]) -> bytes:
    """Hash of everything that can be known before rtmr3 is: the parsed document, less `rtmr3`, less empty tables."""
    stripped = _without_rtmr3(document)
    canonical = json.dumps(stripped, sort_keys=True, separators=(",", ":"))
    return hashlib.sha384(enc(_TEMPLATE_LABEL, canonical.encode())).digest()


def _without_rtmr3(table: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            if inner := _without_rtmr3(cast("dict[str, Any]", value)):
                kept[key] = inner
        elif key != "rtmr3":
            kept[key] = value
    return kept
