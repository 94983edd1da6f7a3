"""Writes the strict policy of a simulated run: what `cloister run` uses where the job names none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cloister._files import write_whole
from cloister.attest._policy import POLICY_VERSION
from cloister.attest._simulated.attester import SIMULATED_REGISTERS, TD_ATTRIBUTES, XFAM
from cloister.errors import ConfigError, StoreError

_TEMPLATE = """\
# Policy of a SIMULATED run: it trusts a software root on this machine, which protects nobody from its operator.
# Format: spec/attestation.md section 4. What is not allowed here is denied.
version = {version}
accept = ["simulated"]
allow_simulated = true
max_session_age_s = 86400
clock_skew_s = 300

[roots]
intel_sha256 = ["{root}"]

[tdx]
mr_td = ["{mr_td}"]
mr_seam = ["{mr_seam}"]
rtmr0 = ["{rtmr0}"]
rtmr1 = ["{rtmr1}"]
rtmr2 = ["{rtmr2}"]
xfam = ["{xfam}"]
td_attributes_mask = "ffffffffffffffff"
td_attributes_value = "{td_attributes}"
tcb_status = ["UpToDate"]
collateral_max_age_d = 30

[simulated]
require_layers = [{layers}]

# rtmr3 measures the installed code, the job, this policy without rtmr3, and the backbone's weights.
[roles.server.tdx]
rtmr3 = [{server}]
"""
_CLIENT = """
[roles.client.tdx]
rtmr3 = [{client}]
"""


def render_policy(
    *,
    root_sha256: str,
    server_rtmr3: Iterable[bytes] = (),
    client_rtmr3: Iterable[bytes] | None = None,
    require_layers: Iterable[str] = (),
) -> bytes:
    """The text of a strict policy for simulated evidence under one root. Public.

    Without `server_rtmr3` the policy accepts nobody: such a draft is what `rtmr3` measures (its template hash is the
    same), and what the expected value is then computed from.

    Args:
        root_sha256: hex, from `SimulatedRoot.root_sha256`.
        server_rtmr3: expected values of the server enclave, 48 bytes each.
        client_rtmr3: of client enclaves; None where clients have none (Method 2).
        require_layers: hardening layers that the evidence must report.
    """

    def quoted(values: Iterable[str]) -> str:
        return ", ".join(f'"{value}"' for value in values)

    text = _TEMPLATE.format(
        version=POLICY_VERSION,
        root=root_sha256,
        xfam=XFAM.hex(),
        td_attributes=TD_ATTRIBUTES.hex(),
        layers=quoted(require_layers),
        server=quoted(value.hex() for value in server_rtmr3),
        **{name: value.hex() for name, value in SIMULATED_REGISTERS.items()},
    )
    if client_rtmr3 is not None:
        text += _CLIENT.format(client=quoted(value.hex() for value in client_rtmr3))
    return text.encode()


def write_policy(
    path: str | Path,
    *,
    root_sha256: str,
    server_rtmr3: Iterable[bytes] = (),
    client_rtmr3: Iterable[bytes] | None = None,
    require_layers: Iterable[str] = (),
) -> None:
    """Write what `render_policy` returns to `path`, whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    blob = render_policy(
        root_sha256=root_sha256,
        server_rtmr3=server_rtmr3,
        client_rtmr3=client_rtmr3,
        require_layers=require_layers,
    )
    try:
        write_whole(Path(path), blob, mode=0o644)  # public, and others compare it with theirs
    except StoreError as error:
        raise ConfigError(f"cannot write the policy: {error.cause}", source=str(path)) from None
