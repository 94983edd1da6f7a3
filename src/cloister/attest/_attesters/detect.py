"""What this machine offers to attest with, found by looking alone: no report is asked for, no device is opened.

For `cloister doctor`. Nothing here is a proof: a host can show its guest any file it likes.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cloister.attest._attesters.snp import PROVIDER as SNP_PROVIDER
from cloister.attest._attesters.snp import SEV_GUEST_PATH
from cloister.attest._attesters.tdx import PROVIDER as TDX_PROVIDER
from cloister.attest._attesters.tdx import RTMR3_PATH
from cloister.attest._attesters.tsm import REPORT_ROOT

_MAX_FILE_BYTES = 1 << 16
_RTMR_KERNEL = (6, 16)
_TSM_KERNEL = (6, 7)
# What Azure writes into the chassis asset tag of each of its machines, in every region.
_AZURE_ASSET_TAG = "7783-7084-3265-9085-8269-3286-77"
_TPM_PATH = Path("/dev/tpmrm0")
_GPU_PATH = Path("/dev/nvidia0")
_GRAMINE_PATH = Path("/dev/attestation")


@dataclass(frozen=True)
class BackendReport:
    """What one backend needs, and what of it is here. Public.

    Attributes:
        type: evidence type, or "gpu", which goes along with one.
        found: everything that can be looked for is here. Whether it works is known once it has made evidence.
        has: what is here, one line each.
        missing: what is not, one line each; empty exactly where `found`.
        hint: what to do about it, or what looking cannot tell.
    """

    type: str
    found: bool
    has: tuple[str, ...]
    missing: tuple[str, ...]
    hint: str = ""


def detect_backends(root: Path = Path("/")) -> list[BackendReport]:
    """One report for each backend, in the order in which they should be preferred. Changes nothing.

    Args:
        root: where the file system begins; tests build machines of their own there.
    """
    machine = _Machine(root)
    return [
        _tdx(machine),
        _snp(machine),
        _sgx(machine),
        _azure(machine),
        _vtpm(machine),
        _gpu(machine),
        _simulated(),
    ]


class _Machine:
    """Looks at files below a root. What cannot be read counts as not there."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, path: Path | str) -> Path:
        return self._root / str(path).lstrip("/")

    def exists(self, path: Path | str) -> bool:
        return os.path.exists(self.path(path))  # noqa: PTH110 - Path.exists raises where this user may not look

    def text(self, path: Path | str) -> str:
        try:
            with self.path(path).open("rb") as stream:
                return stream.read(_MAX_FILE_BYTES).decode(errors="replace").strip()
        except OSError:
            return ""

    def names(self, folder: Path) -> list[str]:
        try:
            return sorted(path.name for path in self.path(folder).iterdir())
        except OSError:
            return []

    def may(self, path: Path | str, mode: int) -> bool:
        return os.access(self.path(path), mode)

    def kernel(self) -> tuple[str, tuple[int, int]]:
        release = self.text("proc/sys/kernel/osrelease")
        found = re.match(r"(\d{1,6})\.(\d{1,6})", release)
        return release or "unknown", (int(found[1]), int(found[2])) if found else (0, 0)


class _Notes:
    """Collects the lines of one report."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._has: list[str] = []
        self._missing: list[str] = []

    def need(self, ok: bool, has: str, missing: str) -> bool:
        if ok:
            self._has.append(has)
        else:
            self._missing.append(missing)
        return ok

    def mention(self, line: str) -> None:
        self._has.append(line)

    def report(self, *, hint: str, always: str = "") -> BackendReport:
        found = not self._missing
        return BackendReport(self._kind, found, tuple(self._has), tuple(self._missing), always if found else hint)


def _tdx(machine: _Machine) -> BackendReport:
    notes = _Notes("tdx")
    driver = "/sys/devices/virtual/misc/tdx_guest"
    notes.need(machine.exists(driver), "the TDX guest driver", f"the TDX guest driver ({driver})")
    _configfs_tsm(machine, notes, TDX_PROVIDER)
    if machine.exists(RTMR3_PATH):
        line = f"the run-time register {RTMR3_PATH}"
        notes.need(machine.may(RTMR3_PATH, os.W_OK), line, f"the right to write to {RTMR3_PATH}")
    else:
        _needs_kernel(machine, notes, _RTMR_KERNEL, f"the run-time register {RTMR3_PATH}")
    return notes.report(
        hint="needs a TDX guest with Linux 6.16 or newer (modprobe tdx_guest), and a user who may use these files",
        always="collateral is not looked for: `cloister collateral fetch` gets it",
    )


def _snp(machine: _Machine) -> BackendReport:
    notes = _Notes("snp")
    _device(machine, notes, SEV_GUEST_PATH, "the SNP guest device")
    _configfs_tsm(machine, notes, SNP_PROVIDER)
    return notes.report(
        hint="needs an SEV-SNP guest with Linux 6.7 or newer (modprobe sev_guest), and a user who may use these files",
        always="HOST_DATA is not looked at: it must be what `cloister measure` prints",
    )


def _configfs_tsm(machine: _Machine, notes: _Notes, provider: str) -> None:
    mounted = any(line.split(" ")[2:3] == ["configfs"] for line in machine.text("proc/mounts").splitlines())
    if not notes.need(mounted, "configfs is mounted", "configfs (mount -t configfs none /sys/kernel/config)"):
        return
    if not machine.exists(REPORT_ROOT):
        _needs_kernel(machine, notes, _TSM_KERNEL, f"{REPORT_ROOT}")
        return
    may = machine.may(REPORT_ROOT, os.W_OK | os.X_OK)
    if not notes.need(may, f"{REPORT_ROOT}", f"the right to make folders in {REPORT_ROOT}"):
        return
    # The kernel names its provider only inside a report folder; one may be there, and none is made for a look.
    for name in machine.names(REPORT_ROOT):
        found = machine.text(REPORT_ROOT / name / "provider")
        if found:
            notes.need(found == provider, f"provider {provider}", f"provider {provider} (it is {found})")
            return


def _needs_kernel(machine: _Machine, notes: _Notes, least: tuple[int, int], what: str) -> None:
    """Note a missing file of the kernel, and whether an older kernel is the reason."""
    release, version = machine.kernel()
    old = f" (Linux {least[0]}.{least[1]} or newer; this is {release})" if version < least else ""
    notes.need(False, "", what + old)


def _device(machine: _Machine, notes: _Notes, path: Path, name: str) -> None:
    line = f"{name} {path}"
    if notes.need(machine.exists(path), line, line):
        may = machine.may(path, os.R_OK | os.W_OK)
        notes.need(may, f"the right to use {path}", f"the right to read and write {path}")


def _sgx(machine: _Machine) -> BackendReport:
    notes = _Notes("sgx")
    for device in ("/dev/sgx_enclave", "/dev/sgx/enclave"):
        if machine.exists(device):
            notes.mention(f"the SGX device {device}")
    line = f"Gramine's {_GRAMINE_PATH}"
    if notes.need(machine.exists(_GRAMINE_PATH), line, f"{line} (this process does not run in Gramine)"):
        kind = machine.text(_GRAMINE_PATH / "attestation_type")
        notes.need(kind == "dcap", "attestation type dcap", f"attestation type dcap (it is {kind or 'not set'})")
        for name in ("user_report_data", "quote", "keys/_sgx_mrenclave"):
            path = _GRAMINE_PATH / name
            notes.need(machine.exists(path), str(path), str(path))
    return notes.report(
        hint='run under gramine-sgx on a machine with SGX, with sgx.remote_attestation = "dcap" in the manifest',
        always="collateral is not looked for: `cloister collateral fetch` gets it",
    )


def _azure(machine: _Machine) -> BackendReport:
    notes = _Notes("azure")
    vendor = machine.text("sys/class/dmi/id/sys_vendor")
    tag = machine.text("sys/class/dmi/id/chassis_asset_tag")
    here = vendor == "Microsoft Corporation" and tag == _AZURE_ASSET_TAG
    notes.need(here, "a machine of Azure", "a machine of Azure (DMI vendor and asset tag)")
    _tpm(machine, notes)
    return notes.report(
        hint="needs a confidential VM of Azure (DCas, DCes, ECas, ECes series), tpm2-pytss and the group tss",
        always="whether this is a confidential VM is known once its TPM hands out the HCL report (NV index 0x01400001)",
    )


def _vtpm(machine: _Machine) -> BackendReport:
    notes = _Notes("vtpm")
    _tpm(machine, notes)
    return notes.report(
        hint="needs a TPM 2.0, tpm2-pytss (pip install tpm2-pytss), and a user in the group tss",
        always="a software TPM looks the same from here: its claims say so, and it hides nothing from its host",
    )


def _tpm(machine: _Machine, notes: _Notes) -> None:
    _device(machine, notes, _TPM_PATH, "the TPM")
    version = machine.text("sys/class/tpm/tpm0/tpm_version_major")
    if version:
        notes.need(version == "2", "TPM version 2", f"TPM version 2 (it is {version})")
    _package(notes, "tpm2_pytss", "tpm2-pytss")


def _gpu(machine: _Machine) -> BackendReport:
    notes = _Notes("gpu")
    _device(machine, notes, _GPU_PATH, "the NVIDIA GPU")
    for line in machine.text("proc/driver/nvidia/version").splitlines()[:1]:
        notes.mention(line)
    _package(notes, "pynvml", "nvidia-ml-py")
    return notes.report(
        hint="needs an NVIDIA GPU of the Hopper generation or newer, its driver, and nvidia-ml-py",
        always="whether its confidential mode is on is known once it has made a report",
    )


def _package(notes: _Notes, module: str, distribution: str) -> None:
    line = f"the Python package {distribution}"
    notes.need(importlib.util.find_spec(module) is not None, line, line)


def _simulated() -> BackendReport:
    notes = _Notes("simulated")
    notes.mention("a SIMULATED platform in software")
    return notes.report(hint="", always="for trying out: it is no TEE and hides nothing from root or from its launcher")
