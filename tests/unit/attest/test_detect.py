"""What `detect_backends` says of machines that are built below a folder."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from cloister.attest import BackendReport, detect_backends
from cloister.attest._attesters import detect

TSM = "sys/kernel/config/tsm/report"
MOUNTS = "sysfs /sys sysfs rw 0 0\nconfigfs /sys/kernel/config configfs rw,relatime 0 0\n"
RTMR3 = "sys/devices/virtual/misc/tdx_guest/measurements/rtmr3:sha384"


class Machine:
    """A folder that looks like the root of a machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.file("proc/sys/kernel/osrelease", "6.17.0-test\n")

    def file(self, path: str, text: str = "") -> Machine:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return self

    def folder(self, path: str) -> Machine:
        (self.root / path).mkdir(parents=True)
        return self

    def __getitem__(self, kind: str) -> BackendReport:
        return {report.type: report for report in detect_backends(self.root)}[kind]


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture(autouse=True)
def packages(monkeypatch) -> set[str]:
    """Every Python package that is asked for is here, but for those that a test takes out."""
    gone: set[str] = set()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else object())
    return gone


@pytest.fixture
def forbidden(monkeypatch) -> set[str]:
    """Paths that this user may not use; tests often run as root, who may."""
    paths: set[str] = set()
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not any(str(path).endswith(p) for p in paths) and access(path, mode)
    )
    return paths


@pytest.fixture
def tdx(machine) -> Machine:
    return machine.file("proc/mounts", MOUNTS).folder(TSM).file(RTMR3)


@pytest.fixture
def snp(machine) -> Machine:
    return machine.file("proc/mounts", MOUNTS).folder(TSM).file("dev/sev-guest")


@pytest.fixture
def gramine(machine) -> Machine:
    machine.file("dev/attestation/attestation_type", "dcap").file("dev/attestation/user_report_data")
    return machine.file("dev/attestation/quote").file("dev/attestation/keys/_sgx_mrenclave")


def test_a_machine_without_anything(machine):
    reports = detect_backends(machine.root)
    assert [report.type for report in reports] == ["tdx", "snp", "sgx", "azure", "vtpm", "gpu", "simulated"]
    assert [report.type for report in reports if report.found] == ["simulated"]
    assert all(report.found == (not report.missing) for report in reports)
    assert all(report.hint for report in reports)
    assert "SIMULATED" in machine["simulated"].has[0]


def test_this_machine_is_only_looked_at():
    assert detect_backends()[-1].type == "simulated"


# --- TDX and SNP ----------------------------------------------------------------------------------------------------


def test_tdx(tdx):
    assert tdx["tdx"].found, tdx["tdx"].missing
    assert not tdx["snp"].found
    assert len(tdx["tdx"].has) == 4


def test_tdx_on_an_old_kernel(machine):
    machine.file("proc/mounts", MOUNTS).folder("sys/devices/virtual/misc/tdx_guest")
    machine.file("proc/sys/kernel/osrelease", "6.6.30-5.el9\n")
    lines = "\n".join(machine["tdx"].missing)
    assert "/sys/kernel/config/tsm/report (Linux 6.7 or newer; this is 6.6.30-5.el9)" in lines
    assert "rtmr3:sha384 (Linux 6.16 or newer; this is 6.6.30-5.el9)" in lines


@pytest.mark.parametrize(("release", "old"), [("6.15.9", True), ("6.16.0", False), ("7.0", False), ("5.19", True)])
def test_kernel_versions_are_compared_as_numbers(machine, release, old):
    machine.file("proc/sys/kernel/osrelease", release)
    assert ("this is" in machine["tdx"].missing[-1]) is old


@pytest.mark.parametrize("release", ["", "odd"])
def test_a_kernel_version_that_is_none(machine, release):
    machine.file("proc/sys/kernel/osrelease", release)
    assert f"this is {release or 'unknown'})" in machine["tdx"].missing[-1]


def test_configfs_that_is_not_mounted(tdx):
    tdx.file("proc/mounts", "configfs-like /x sysfs rw 0 0\nshort\n")
    assert "configfs (mount -t configfs none /sys/kernel/config)" in tdx["tdx"].missing


@pytest.mark.parametrize("path", [TSM, RTMR3])
def test_tdx_without_permission(tdx, forbidden, path):
    forbidden.add(path)
    assert not tdx["tdx"].found
    assert any("the right to" in line and path in line for line in tdx["tdx"].missing)


def test_provider_of_a_report_folder_that_is_there(tdx):
    tdx.folder(f"{TSM}/empty").file(f"{TSM}/other/provider", "sev_guest\n")
    assert "provider tdx_guest (it is sev_guest)" in tdx["tdx"].missing
    assert "provider sev_guest" in tdx["snp"].has
    tdx.file(f"{TSM}/other/provider", "tdx_guest\n")
    assert tdx["tdx"].found


def test_report_folder_that_cannot_be_listed(tdx, monkeypatch):
    def fail(_: Path):
        raise PermissionError

    monkeypatch.setattr(Path, "iterdir", fail)
    assert tdx["tdx"].found


def test_snp(snp):
    assert snp["snp"].found, snp["snp"].missing
    assert not snp["tdx"].found


def test_snp_without_permission(snp, forbidden):
    forbidden.add("dev/sev-guest")
    assert snp["snp"].missing == ("the right to read and write /dev/sev-guest",)


# --- SGX ------------------------------------------------------------------------------------------------------------


def test_sgx(gramine):
    assert gramine["sgx"].found, gramine["sgx"].missing


@pytest.mark.parametrize("name", ["user_report_data", "quote", "keys/_sgx_mrenclave"])
def test_sgx_file_that_is_missing(gramine, name):
    (gramine.root / "dev/attestation" / name).unlink()
    assert gramine["sgx"].missing == (f"/dev/attestation/{name}",)


@pytest.mark.parametrize("kind", ["none", "epid", ""])
def test_sgx_attestation_type(gramine, kind):
    gramine.file("dev/attestation/attestation_type", kind)
    assert gramine["sgx"].missing == (f"attestation type dcap (it is {kind or 'not set'})",)


@pytest.mark.parametrize("device", ["dev/sgx_enclave", "dev/sgx/enclave"])
def test_sgx_outside_of_gramine(machine, device):
    report = machine.file(device)["sgx"]
    assert not report.found
    assert report.has == (f"the SGX device /{device}",)
    assert "does not run in Gramine" in report.missing[0]


# --- TPM and Azure --------------------------------------------------------------------------------------------------


def test_vtpm(machine, packages, forbidden):
    machine.file("dev/tpmrm0").file("sys/class/tpm/tpm0/tpm_version_major", "2\n")
    assert machine["vtpm"].found
    assert "TPM version 2" in machine["vtpm"].has
    assert not machine["azure"].found
    packages.add("tpm2_pytss")
    forbidden.add("dev/tpmrm0")
    assert machine["vtpm"].missing == ("the right to read and write /dev/tpmrm0", "the Python package tpm2-pytss")


def test_tpm_of_version_1(machine):
    machine.file("dev/tpmrm0").file("sys/class/tpm/tpm0/tpm_version_major", "1\n")
    assert machine["vtpm"].missing == ("TPM version 2 (it is 1)",)


@pytest.mark.parametrize(
    ("vendor", "tag", "found"),
    [
        ("Microsoft Corporation", detect._AZURE_ASSET_TAG, True),
        ("Microsoft Corporation", "a local Hyper-V", False),
        ("QEMU", detect._AZURE_ASSET_TAG, False),
    ],
)
def test_azure(machine, vendor, tag, found):
    machine.file("dev/tpmrm0").file("sys/class/dmi/id/sys_vendor", vendor + "\n")
    machine.file("sys/class/dmi/id/chassis_asset_tag", tag + "\n")
    assert machine["azure"].found is found
    assert ("HCL report" in machine["azure"].hint) is found


# --- GPU ------------------------------------------------------------------------------------------------------------


def test_gpu(machine, packages, forbidden):
    machine.file("dev/nvidia0").file("proc/driver/nvidia/version", "NVRM version: 550.90.07\nGCC version: 12\n")
    assert machine["gpu"].found
    assert "NVRM version: 550.90.07" in machine["gpu"].has
    packages.add("pynvml")
    forbidden.add("dev/nvidia0")
    assert machine["gpu"].missing == ("the right to read and write /dev/nvidia0", "the Python package nvidia-ml-py")
