"""Honest evidence of every type, made by the simulated vendors, and the verifiers that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, verify_evidence
from cloister.attest._attesters.vtpm import VtpmAttester
from cloister.attest._simulated.amd_root import (
    SIMULATED_MEASUREMENT,
    SimulatedAmdRoot,
    SimulatedSnpAttester,
    certificate_table,
)
from cloister.attest._simulated.attester import SIMULATED_REGISTERS
from cloister.attest._simulated.gpu import SIMULATED_DRIVER, SIMULATED_VBIOS, SimulatedGpuRoot
from cloister.attest._simulated.sgx_quote import SIMULATED_MR_ENCLAVE, SimulatedEnclave, sgx_evidence
from cloister.attest._simulated.tpm import SimulatedTpm
from cloister.attest._verifiers.composite import pack_composite
from cloister.attest._verifiers.gpu import gpu_nonce
from cloister.wire import Evidence

NOW = 1_800_000_000
REPORT_DATA = bytes(64)
_REGISTER = "72" * 48
_CHEAP, _DEAR = 20, 4  # certificates and signatures cost a hundred times what framing costs

Found = tuple[str, Callable[[bytes], object], Sequence[bytes], int]


@dataclass(frozen=True)
class _Vendors:
    intel: SimulatedRoot
    amd: SimulatedAmdRoot
    nvidia: SimulatedGpuRoot
    tpm: VtpmAttester

    def policy_text(self) -> bytes:
        return f"""
version = 1
accept = ["azure", "simulated", "simulated-sgx", "simulated-snp", "vtpm", "with-gpu"]
allow_simulated = true
[roots]
intel_sha256 = ["{self.intel.root_sha256}"]
nvidia_sha256 = ["{self.nvidia.root_sha256}"]
amd_ark_sha256 = {{ milan = ["{self.amd.root_sha256}"] }}
[vtpm]
ak_source = ["hcl", "software"]
software_ak_sha256 = ["{self.tpm.ak_sha256}"]
[gpu]
driver = ["{SIMULATED_DRIVER}"]
vbios = ["{SIMULATED_VBIOS}"]
[tdx]
mr_td = ["{SIMULATED_REGISTERS["mr_td"].hex()}"]
rtmr1 = ["{SIMULATED_REGISTERS["rtmr1"].hex()}"]
rtmr2 = ["{SIMULATED_REGISTERS["rtmr2"].hex()}"]
[snp]
measurement = ["{SIMULATED_MEASUREMENT.hex()}"]
[roles.server.tdx]
rtmr3 = ["{_REGISTER}"]
[roles.server.sgx]
mr_enclave = ["{SIMULATED_MR_ENCLAVE.hex()}"]
[roles.server.snp]
host_data = ["{"00" * 32}"]
[roles.server.vtpm]
pcr15 = ["{"00" * 32}"]
""".encode()


def attest_targets(folder: Path) -> list[Found]:
    """The policy, and `blob` and `aux` of each type; the other half stays honest. `folder` is for the Intel root."""
    intel = SimulatedRoot.create(folder / "root", now=NOW)
    intel.refresh(NOW, tee="sgx")
    vendors = _Vendors(
        intel,
        SimulatedAmdRoot(now=NOW),
        SimulatedGpuRoot(now=NOW),
        VtpmAttester(port=SimulatedTpm(ec.generate_private_key(ec.SECP256R1()))),
    )
    text = vendors.policy_text()
    policy = Policy.parse(text)
    tdx = SimulatedAttester(intel.provision(), rtmr3=bytes.fromhex(_REGISTER)).evidence(REPORT_DATA)
    sgx = sgx_evidence(intel, SimulatedEnclave(), report_data=REPORT_DATA)
    snp = SimulatedSnpAttester(vendors.amd, host_data=bytes(32)).evidence(REPORT_DATA)
    table = Evidence(snp.type, snp.blob, certificate_table(vendors.amd.parts("vcek")))
    gpu = vendors.nvidia.device().evidence(gpu_nonce(REPORT_DATA))

    def verify(evidence: Evidence) -> object:
        return verify_evidence(evidence, policy, role="server", report_data=REPORT_DATA, now=NOW)

    def blob(honest: Evidence) -> Callable[[bytes], object]:
        return lambda data: verify(Evidence(honest.type, data, honest.aux))

    def aux(honest: Evidence) -> Callable[[bytes], object]:
        return lambda data: verify(Evidence(honest.type, honest.blob, data))

    found: list[Found] = [("attest.Policy", Policy.parse, [text], _DEAR)]
    for name, evidence in (("tdx", tdx), ("sgx", sgx), ("snp", snp)):
        found.append((f"attest: {name} blob", blob(evidence), [evidence.blob], _DEAR))
        found.append((f"attest: {name} aux", aux(evidence), [evidence.aux], _DEAR))
    quote = vendors.tpm.evidence(REPORT_DATA)
    found += [
        ("attest: snp table", aux(table), [table.aux], _DEAR),
        ("attest: vtpm blob", blob(quote), [quote.blob], _CHEAP),
        ("attest: azure blob", blob(Evidence("azure", b"", snp.aux)), [quote.blob, snp.blob], _CHEAP),
        ("attest: with-gpu blob", blob(pack_composite(tdx, [gpu])), [pack_composite(tdx, [gpu]).blob], _DEAR),
        (
            "attest: gpu blob",
            lambda data: verify(pack_composite(tdx, [Evidence(gpu.type, data, gpu.aux)])),
            [gpu.blob],
            _DEAR,
        ),
        (
            "attest: gpu aux",
            lambda data: verify(pack_composite(tdx, [Evidence(gpu.type, gpu.blob, data)])),
            [gpu.aux],
            _DEAR,
        ),
    ]
    return found
