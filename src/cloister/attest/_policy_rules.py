"""The sections of a policy, one for each TEE type: what each allows, and how it is read (spec section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloister.attest._policy_reader import TableReader

TDX_REGISTERS = ("mr_seam", "mr_td", "rtmr0", "rtmr1", "rtmr2", "rtmr3")
# Without these four a policy would accept other firmware, another kernel, another image or other code. The rest depend
# on the size of the machine (rtmr0) or follow from the vendor's own signature (mr_seam).
TDX_REQUIRED = ("mr_td", "rtmr1", "rtmr2", "rtmr3")
SGX_REGISTERS = ("mr_enclave", "mr_signer")
SNP_REGISTERS = ("measurement", "host_data")
SNP_REQUIRED = ("measurement", "host_data")
VTPM_REGISTERS = tuple(f"pcr{i}" for i in range(24))
# The PCR that the enclave process extends before its first quote: not resettable, and free on a stock Linux.
RUNTIME_PCR = "pcr15"
SNP_PRODUCTS = ("genoa", "milan", "turin")
SNP_TCB_PARTS = ("bootloader", "fmc", "microcode", "snp", "tee")
SNP_SIGNERS = ("vcek", "vlek")
AK_SOURCES = ("hcl", "pinned", "software")
GPU_CC_MODES = ("on", "protected_pcie")
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
_MAX_GPU_MEASUREMENTS = 64

Registers = Mapping[str, tuple[str, ...]]
"""Register name -> allowed values (lower-case hex). A missing name is not checked unless it is a required one; a name
with no values allows nothing."""


@dataclass(frozen=True)
class DcapRules:
    """What [tdx] and [sgx] have in common: the state of an Intel platform.

    Attributes:
        tcb_status: accepted words of the vendor on the patch level.
        reject_advisories: advisories that refuse.
        min_tcb_evaluation: least generation of the vendor's TCB data.
        allow_dynamic, allow_cached_keys, allow_smt: platform properties that multi-socket servers have.
        collateral_max_age_d: greatest age of the collateral in days.
    """

    tcb_status: tuple[str, ...]
    reject_advisories: tuple[str, ...]
    min_tcb_evaluation: int
    allow_dynamic: bool
    allow_cached_keys: bool
    allow_smt: bool
    collateral_max_age_d: int


@dataclass(frozen=True)
class TdxRules:
    """The section [tdx].

    Attributes:
        registers: of both roles, out of `TDX_REGISTERS` without rtmr3 (48 bytes each).
        xfam: allowed values (8 bytes hex); empty means any.
        td_attributes_mask, td_attributes_value: 8 bytes; the masked bits must equal the value.
        platform: the state of the platform.
    """

    registers: Registers
    xfam: tuple[str, ...]
    td_attributes_mask: bytes
    td_attributes_value: bytes
    platform: DcapRules


@dataclass(frozen=True)
class SgxRules:
    """The section [sgx]: one enclave (`mr_enclave`), or any of one signer and product from a version on.

    Attributes:
        registers: of both roles, out of `SGX_REGISTERS` (32 bytes each).
        prod_id: the product number that goes with `mr_signer`; None where none is named.
        min_svn: least security version of that product.
        platform: the state of the platform.
    """

    registers: Registers
    prod_id: int | None
    min_svn: int
    platform: DcapRules


@dataclass(frozen=True)
class SnpRules:
    """The section [snp].

    Attributes:
        registers: of both roles, out of `SNP_REGISTERS` (48 and 32 bytes).
        allow_migrate_ma, allow_smt: bits of the guest policy that may be set. The debug bit never may.
        max_vmpl: greatest privilege level (0 is the most privileged) that may ask for the report.
        signers: kinds of signing key that are accepted.
        min_tcb: product -> part -> least security version, for the committed and the launch TCB.
    """

    registers: Registers
    allow_migrate_ma: bool
    allow_smt: bool
    max_vmpl: int
    signers: tuple[str, ...]
    min_tcb: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class VtpmRules:
    """The section [vtpm].

    Attributes:
        registers: of both roles, PCRs of the SHA-256 bank (32 bytes each).
        ak_source: who may vouch for the attestation key: "hcl" (the report of the CPU below the vTPM), "pinned"
            (whoever wrote `ak_sha256`), "software" (a software TPM; needs allow_simulated).
        ak_sha256: hex SHA-256 of the DER of pinned attestation keys (SubjectPublicKeyInfo).
        software_ak_sha256: the same, of software TPMs: evidence under them is simulated.
    """

    registers: Registers
    ak_source: tuple[str, ...]
    ak_sha256: frozenset[str]
    software_ak_sha256: frozenset[str]


@dataclass(frozen=True)
class GpuRules:
    """The section [gpu].

    Attributes:
        required: evidence without an accepted GPU beside it is refused.
        drivers, vbios: allowed versions; empty allows nothing.
        measurements: index -> allowed values (48 bytes hex); an index that is not named is not checked.
        cc_modes: allowed confidential-computing modes.
    """

    required: bool
    drivers: tuple[str, ...]
    vbios: tuple[str, ...]
    measurements: Mapping[str, tuple[str, ...]]
    cc_modes: tuple[str, ...]


def read_registers(table: TableReader, tee: str, *, role: bool) -> Registers:
    """The reference values that `table` names for one TEE type; those of a role may also name the run-time register."""
    names, n_bytes = _REGISTERS[tee]
    if tee == "tdx" and not role:
        # rtmr3 measures code and job, which differ between roles: it has no place in what both share.
        names = tuple(name for name in names if name != "rtmr3")
    read = {name: table.hex_list(name, n_bytes=n_bytes.get(name, n_bytes[""])) for name in names}
    return {name: values for name, values in read.items() if values is not None}


_REGISTERS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "tdx": (TDX_REGISTERS, {"": 48}),
    "sgx": (SGX_REGISTERS, {"": 32}),
    "snp": (SNP_REGISTERS, {"": 48, "host_data": 32}),
    "vtpm": (VTPM_REGISTERS, {"": 32}),
}
TEES = tuple(_REGISTERS)


def read_tdx(table: TableReader) -> TdxRules:
    """[tdx]."""
    registers = read_registers(table, "tdx", role=False)
    mask, value = table.hex_bytes("td_attributes_mask", 8), table.hex_bytes("td_attributes_value", 8)
    if any(bit & ~covered for bit, covered in zip(value, mask, strict=True)):
        table.problem("td_attributes_value", "has bits that td_attributes_mask does not cover")
    rules = TdxRules(registers, table.hex_list("xfam", n_bytes=8) or (), mask, value, _read_dcap(table))
    table.finish()
    return rules


def read_sgx(table: TableReader) -> SgxRules:
    """[sgx]."""
    registers = read_registers(table, "sgx", role=False)
    prod_id = table.integer("prod_id", minimum=0, maximum=0xFFFF)
    min_svn = table.integer("min_svn", minimum=0, maximum=0xFFFF) or 0
    if registers.get("mr_signer") and prod_id is None:
        table.problem("prod_id", "missing: mr_signer alone accepts every product of that signer")
    rules = SgxRules(registers, prod_id, min_svn, _read_dcap(table))
    table.finish()
    return rules


def _read_dcap(table: TableReader) -> DcapRules:
    allow = table.table("allow")
    rules = DcapRules(
        tcb_status=table.choices("tcb_status", TCB_STATUSES, default=("UpToDate",)),
        reject_advisories=table.texts("reject_advisories"),
        min_tcb_evaluation=table.integer("min_tcb_eval", minimum=0, maximum=1 << 31) or 0,
        allow_dynamic=allow.boolean("dynamic", default=False),
        allow_cached_keys=allow.boolean("cached_keys", default=False),
        allow_smt=allow.boolean("smt", default=False),
        collateral_max_age_d=table.integer("collateral_max_age_d", minimum=1, maximum=366) or 30,
    )
    allow.finish()
    return rules


def read_snp(table: TableReader) -> SnpRules:
    """[snp]."""
    guest = table.table("guest_policy")
    if guest.boolean("debug", default=False):
        guest.problem("debug", "a debug guest is never accepted")
    minimum = table.table("min_tcb")
    rules = SnpRules(
        registers=read_registers(table, "snp", role=False),
        allow_migrate_ma=guest.boolean("migrate_ma", default=False),
        allow_smt=guest.boolean("smt", default=False),
        max_vmpl=table.integer("max_vmpl", minimum=0, maximum=3) or 0,
        signers=table.choices("signer", SNP_SIGNERS, default=("vcek",)),
        min_tcb={product: _read_tcb(minimum.table(product)) for product in SNP_PRODUCTS if minimum.has(product)},
    )
    for inner in (guest, minimum, table):
        inner.finish()
    return rules


def _read_tcb(table: TableReader) -> dict[str, int]:
    read = {part: table.integer(part, minimum=0, maximum=255) for part in SNP_TCB_PARTS}
    table.finish()
    return {part: value for part, value in read.items() if value is not None}


def read_vtpm(table: TableReader, *, allow_simulated: bool) -> VtpmRules:
    """[vtpm]."""
    rules = VtpmRules(
        registers=read_registers(table, "vtpm", role=False),
        ak_source=table.choices("ak_source", AK_SOURCES, default=("hcl",)),
        ak_sha256=frozenset(table.hex_list("ak_sha256", n_bytes=32) or ()),
        software_ak_sha256=frozenset(table.hex_list("software_ak_sha256", n_bytes=32) or ()),
    )
    if "software" in rules.ak_source and not allow_simulated:
        table.problem("ak_source", '"software" needs allow_simulated = true', hint="a software TPM protects nobody")
    table.finish()
    return rules


def read_gpu(table: TableReader) -> GpuRules:
    """[gpu]."""
    measured = table.table("measurements")
    names = [str(i) for i in range(1, _MAX_GPU_MEASUREMENTS + 1)]
    read = {name: measured.hex_list(name, n_bytes=48) for name in names}
    rules = GpuRules(
        required=table.boolean("required", default=False),
        drivers=table.texts("driver"),
        vbios=table.texts("vbios"),
        measurements={name: values for name, values in read.items() if values is not None},
        cc_modes=table.choices("cc_mode", GPU_CC_MODES, default=("on",)),
    )
    measured.finish()
    table.finish()
    return rules
