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
from cloister.attest._policy_rules import (
    SNP_PRODUCTS,
    TEES,
    GpuRules,
    Registers,
    SgxRules,
    SnpRules,
    TdxRules,
    VtpmRules,
    read_gpu,
    read_registers,
    read_sgx,
    read_snp,
    read_tdx,
    read_vtpm,
)
from cloister.errors import ConfigError, Problem
from cloister.wire import enc

POLICY_VERSION = 1
# What this release can verify; a policy that names another type is a mistake to be told of, not to be skipped.
EVIDENCE_TYPES = ("azure", "sgx", "simulated", "simulated-sgx", "simulated-snp", "snp", "tdx", "vtpm", "with-gpu")
SIMULATED_TYPES = ("simulated", "simulated-sgx", "simulated-snp")
ROLES = ("client", "server")
_TEMPLATE_LABEL = b"cloister-policy-template/v1"
_MAX_AGE_S = 366 * 86400
_MAX_SKEW_S = 3600
# What `rtmr3` and its kin measure is the policy without the values that measure it (spec/attestation.md section 3).
_RUNTIME_KEYS = ("host_data", "mr_enclave", "pcr15", "rtmr3")


@dataclass(frozen=True)
class Policy:
    """One parsed policy file. Public; both sides bind its hash into their session.

    Attributes:
        accept: accepted evidence types.
        allow_simulated: whether evidence under a root that is not the vendor's may be accepted.
        max_session_age_s: after which a session must attest again.
        clock_skew_s: how far the issuer's clock may be ahead.
        intel_sha256: pinned roots, hex SHA-256 of the DER certificate.
        amd_ark_sha256: product -> pinned AMD root keys (ARK), hex SHA-256 of the DER certificate.
        nvidia_sha256: pinned NVIDIA device roots, the same.
        tdx, sgx, snp, vtpm, gpu: rules of the sections of these names.
        require_layers: hardening layers that simulated evidence must report.
        platform_ids: allowed platform instance and chip ids in hex; empty means any.
        roles: role -> TEE -> reference values, over those of the TEE's own section.
        sha384: SHA-384 of the file's bytes.
        template_sha384: SHA-384 of the policy without what measures it, which is what the run-time register measures.
        source: where it was read from, for messages.
    """

    accept: frozenset[str]
    allow_simulated: bool
    max_session_age_s: int
    clock_skew_s: int
    intel_sha256: frozenset[str]
    amd_ark_sha256: Mapping[str, frozenset[str]]
    nvidia_sha256: frozenset[str]
    tdx: TdxRules
    sgx: SgxRules
    snp: SnpRules
    vtpm: VtpmRules
    gpu: GpuRules
    require_layers: tuple[str, ...]
    platform_ids: frozenset[str]
    roles: Mapping[str, Mapping[str, Registers]]
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

    def registers_for(self, role: str, tee: str) -> Registers | None:
        """The reference values of `role` on `tee` ("tdx", "sgx", "snp", "vtpm"), or None where it has no set."""
        if tee not in self.roles.get(role, {}):
            return None
        shared: Registers = getattr(self, tee).registers
        return {**shared, **self.roles[role][tee]}


def _read_fields(top: TableReader) -> dict[str, Any]:
    """Every field of `Policy` that the document sets; problems are collected by the reader."""
    if top.integer("version", minimum=POLICY_VERSION, maximum=POLICY_VERSION) is None:
        top.problem("version", "missing", hint=f"version = {POLICY_VERSION}")
    accept = frozenset(top.choices("accept", EVIDENCE_TYPES))
    allow_simulated = top.boolean("allow_simulated", default=False)
    for name in sorted(accept.intersection(SIMULATED_TYPES)):
        if not allow_simulated:
            hint = "simulated evidence protects nobody"
            top.problem("accept", f'"{name}" needs allow_simulated = true', hint=hint)
    fields: dict[str, Any] = {
        "accept": accept,
        "allow_simulated": allow_simulated,
        "max_session_age_s": top.integer("max_session_age_s", minimum=1, maximum=_MAX_AGE_S) or 86400,
        "clock_skew_s": top.integer("clock_skew_s", minimum=0, maximum=_MAX_SKEW_S) or 0,
        **_read_roots(top.table("roots")),
        "tdx": read_tdx(top.table("tdx")),
        "sgx": read_sgx(top.table("sgx")),
        "snp": read_snp(top.table("snp")),
        "vtpm": read_vtpm(top.table("vtpm"), allow_simulated=allow_simulated),
        "gpu": read_gpu(top.table("gpu")),
        "require_layers": _read_simulated(top.table("simulated")),
        "platform_ids": _read_platforms(top.table("platforms")),
        "roles": _read_roles(top.table("roles")),
    }
    top.finish()
    return fields


def _read_roots(table: TableReader) -> dict[str, Any]:
    amd = table.table("amd_ark_sha256")
    pinned = {
        "intel_sha256": frozenset(table.hex_list("intel_sha256", n_bytes=32) or ()),
        "amd_ark_sha256": {name: frozenset(amd.hex_list(name, n_bytes=32) or ()) for name in SNP_PRODUCTS},
        "nvidia_sha256": frozenset(table.hex_list("nvidia_sha256", n_bytes=32) or ()),
    }
    amd.finish()
    table.finish()
    return pinned


def _read_simulated(table: TableReader) -> tuple[str, ...]:
    layers = table.texts("require_layers")
    table.finish()
    return layers


def _read_platforms(table: TableReader) -> frozenset[str]:
    piid = table.hex_list("allow_piid", n_bytes=16) or ()
    chip = table.hex_list("allow_chip_id", n_bytes=64) or ()
    table.finish()
    return frozenset((*piid, *chip))


def _read_roles(table: TableReader) -> dict[str, dict[str, Registers]]:
    roles: dict[str, dict[str, Registers]] = {}
    for role in ROLES:
        if not table.has(role):
            continue
        role_table = table.table(role)
        roles[role] = {}
        for tee in TEES:
            if role_table.has(tee):
                registers = role_table.table(tee)
                roles[role][tee] = read_registers(registers, tee, role=True)
                registers.finish()
        role_table.finish()
    table.finish()
    return roles


def _template_sha384(document: dict[str, Any]) -> bytes:
    """Hash of what is known before the run-time register: the document, less what holds it, less empty tables."""
    stripped = _without_runtime(document)
    canonical = json.dumps(stripped, sort_keys=True, separators=(",", ":"))
    return hashlib.sha384(enc(_TEMPLATE_LABEL, canonical.encode())).digest()


def _without_runtime(table: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            if inner := _without_runtime(cast("dict[str, Any]", value)):
                kept[key] = inner
        elif key not in _RUNTIME_KEYS:
            kept[key] = value
    return kept
