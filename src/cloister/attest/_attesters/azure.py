"""Attester of an Azure confidential VM: the HCL report out of the vTPM, and a quote by the key that it vouches for.

Played through in tests with a software TPM behind the port and with reports recorded on Azure; not yet run there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cloister.attest._attesters.tpm_device import DEFAULT_TCTI, DeviceTpm
from cloister.attest._attesters.tpm_port import TpmPort, quote_fields
from cloister.attest._attesters.tsm import side_file
from cloister.attest._attesters.vtpm import COUNTER_INDEX, SEALING_PCRS, VtpmAttester
from cloister.attest._verifiers.azure import AZURE_KIND, HclReport, parse_hcl
from cloister.errors import AttestationError
from cloister.wire import Evidence, pack

HCL_NV_INDEX = 0x01400001
AK_HANDLE = 0x81000003
_SIZE_FIELD = slice(8, 12)
_HINT = "get it once from the instance metadata service of this machine, and give its file here; it is never fetched"


class AzureAttester(VtpmAttester):
    """Vouches for a process in an Azure confidential VM on SEV-SNP or TDX.

    Args:
        collateral: what the CPU's report needs, public, as bytes or as a file that is read anew for each evidence:
            VCEK, ASK and ARK in PEM on SNP, the collateral of the TD quote in JSON on TDX. Never fetched.
        td_quote: on TDX, the TD quote over the present HCL report, as bytes or as a file; None on SNP.
        tcti, events, folder, sealing_pcrs, counter_index, port: as `VtpmAttester`.

    Raises:
        AttestationError: as `VtpmAttester`; or the vTPM has no HCL report, or collateral or TD quote are missing.
    """

    type = "azure"
    binding = "TPMS_ATTEST.extraData (SHA-256), by the key that the CPU's REPORT_DATA vouches for"

    def __init__(
        self,
        collateral: bytes | Path,
        *,
        td_quote: bytes | Path | None = None,
        tcti: str = DEFAULT_TCTI,
        events: Sequence[bytes] = (),
        folder: str | Path | None = None,
        sealing_pcrs: Sequence[int] = SEALING_PCRS,
        counter_index: int | None = COUNTER_INDEX,
        port: TpmPort | None = None,
    ) -> None:
        port = port or DeviceTpm(tcti, key_handle=AK_HANDLE)
        self._collateral = collateral
        self._td_quote = td_quote
        # All that can be missing is asked for before the PCR: extending cannot be undone.
        self._side_files(_read_report(port)[0])
        super().__init__(
            events=events, folder=folder, sealing_pcrs=sealing_pcrs, counter_index=counter_index, port=port
        )

    def evidence(self, report_data: bytes) -> Evidence:
        """The HCL report and a fresh quote of all PCRs over `report_data` (64 bytes, public).

        Raises:
            AttestationError: a part is missing, or the run-time PCR is not what this process left.
        """
        report, blob = _read_report(self._port)
        td_quote, collateral = self._side_files(report)
        fields = quote_fields(self._port, report_data, runtime=self._runtime)
        return Evidence(self.type, pack(AZURE_KIND, {**fields, "hcl_report": blob, "td_quote": td_quote}), collateral)

    def claims(self) -> dict[str, Any]:
        """What this attester would claim, unproven; JSON types only."""
        report, _ = _read_report(self._port)
        # Whether the CPU below is genuine only its verifier can tell.
        return super().claims() | {"simulated": False, "hardware": report.tee}

    def _side_files(self, report: HclReport) -> tuple[bytes, bytes]:
        """The TD quote, empty on SNP, and the collateral."""
        collateral = side_file(self._collateral, what=f"collateral of the {report.tee.upper()} report", hint=_HINT)
        if report.tee == "snp":
            if self._td_quote is not None:
                raise AttestationError("a TD quote was given, and this machine is an SNP one")
            return b"", collateral
        if self._td_quote is None:
            raise AttestationError("a TDX machine needs its TD quote, and none was given", hint=_HINT)
        return side_file(self._td_quote, what="TD quote", hint=_HINT), collateral


def _read_report(port: TpmPort) -> tuple[HclReport, bytes]:
    """The HCL report, parsed and as bytes without the padding of its NV index."""
    stored = port.read_nv(HCL_NV_INDEX)
    blob = stored[: int.from_bytes(stored[_SIZE_FIELD], "little")]
    return parse_hcl(blob), blob
