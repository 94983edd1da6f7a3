"""The factory of attesters: every backend by its name, nothing silently weaker."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.attest import (
    BACKENDS,
    BackendSettings,
    Measured,
    Policy,
    SimulatedRoot,
    measurement_events,
    open_backend,
    render_policy,
    verify_evidence,
)
from cloister.attest import _backends as backends
from cloister.attest._attesters.gpu import WithGpuAttester
from cloister.errors import AttestationError

NOW = 1_800_000_000
DIGESTS = {"package": b"p" * 48, "job_sha384": b"j" * 48, "policy_template": b"t" * 48, "weights": b"w" * 48}
EVENTS = tuple(measurement_events(**DIGESTS))


def measured(root: SimulatedRoot) -> Measured:
    return Measured(EVENTS, ("seccomp",), root.provision())


def test_the_simulated_backend_attests_what_was_measured(root: SimulatedRoot):
    backend = open_backend("simulated", BackendSettings())
    assert backend.needs_provision
    own = measured(root)
    evidence = backend.start(own).evidence(bytes(64))
    policy = Policy.parse(render_policy(root_sha256=root.root_sha256, server_rtmr3=[own.register]))
    claims = verify_evidence(evidence, policy, role="server", report_data=bytes(64), now=NOW).claims
    assert claims.layers == ("seccomp",)
    assert own.provision.hex() not in repr(own)


def test_an_unknown_backend_names_those_that_there_are():
    with pytest.raises(AttestationError, match="unknown") as caught:
        open_backend("sev", BackendSettings())
    assert all(name in caught.value.hint for name in BACKENDS)


def test_an_unknown_sealing_is_refused():
    with pytest.raises(AttestationError, match="sealing"):
        open_backend("simulated", BackendSettings(sealing="none"))


@pytest.mark.parametrize("name", ["tdx", "snp", "sgx", "azure", "vtpm"])
def test_a_backend_that_this_machine_lacks_is_an_error_not_another_backend(name: str, tmp_path: Path):
    settings = BackendSettings(tcti="device:" + str(tmp_path / "no-tpm"), collateral=tmp_path / "none.json")
    with pytest.raises(AttestationError) as caught:
        open_backend(name, settings).start(Measured(EVENTS))
    assert caught.value.cause


@pytest.mark.parametrize("name", ["sgx"])
def test_collateral_that_was_not_named(name: str):
    with pytest.raises(AttestationError, match="collateral"):
        open_backend(name, BackendSettings()).start(Measured(EVENTS))


def test_ephemeral_sealing_keeps_its_keys_for_the_process_only(root: SimulatedRoot):
    first, second = (
        open_backend("simulated", BackendSettings(sealing="ephemeral")).start(measured(root)) for _ in range(2)
    )
    assert first.sealing_key("a") == first.sealing_key("a")
    assert len({first.sealing_key("a"), first.sealing_key("b"), second.sealing_key("a")}) == 3
    assert first.claims()["sealing"] == "ephemeral"
    assert first.counter() is None
    assert (first.type, first.binding) == ("simulated", "TDREPORT.REPORTDATA of a SIMULATED quote")
    assert first.evidence(bytes(64)).type == "simulated"
    assert first.sealing_key("a").hex() not in repr(first)


def test_gpu_evidence_goes_along_where_it_is_asked_for(root: SimulatedRoot, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "NvmlGpus", lambda: object())
    attester = open_backend("simulated", BackendSettings(gpu=True)).start(measured(root))
    assert isinstance(attester, WithGpuAttester)


def test_the_cpus_counter_is_that_of_evidence_with_gpus(root: SimulatedRoot):
    class Counting:
        def counter(self) -> str:
            return "the counter"

    assert WithGpuAttester(Counting(), object()).counter() == "the counter"  # type: ignore[arg-type]


def test_every_backend_starts_with_what_was_measured_and_what_its_operator_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: dict[str, tuple] = {}
    for name in ("DeviceTpm", "SevGuestDevice"):
        monkeypatch.setattr(backends, name, lambda *_, name=name, **__: name)
    for name in ("TdxAttester", "SnpAttester", "SgxAttester", "VtpmAttester", "AzureAttester"):
        monkeypatch.setattr(backends, name, lambda *args, name=name, **options: seen.update({name: (args, options)}))
    collateral = tmp_path / "collateral"
    settings = BackendSettings(collateral=collateral, state_dir=tmp_path, counter_index=0x1800007)
    own = Measured(EVENTS)
    for name in ("tdx", "snp", "sgx", "vtpm", "azure"):
        open_backend(name, settings).start(own)
    assert seen["TdxAttester"] == ((collateral,), {"events": EVENTS})
    assert seen["SnpAttester"] == ((collateral,), {"register": own.register, "keys": "SevGuestDevice"})
    assert seen["SgxAttester"] == ((collateral,), {})
    sealed = {"events": EVENTS, "folder": tmp_path, "counter_index": 0x1800007, "port": "DeviceTpm"}
    assert seen["VtpmAttester"][1] == sealed
    assert seen["AzureAttester"] == ((collateral,), {**sealed, "td_quote": None})


def test_a_hardened_process_still_reaches_what_its_backend_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backends, "DeviceTpm", lambda *_, **__: object())
    monkeypatch.setattr(backends, "SevGuestDevice", lambda: object())
    collateral, quote = tmp_path / "c", tmp_path / "q"
    settings = BackendSettings(collateral=collateral, td_quote=quote)
    found = {name: open_backend(name, settings) for name in BACKENDS}
    assert collateral in found["tdx"].read_dirs
    assert backends.REPORT_ROOT in found["tdx"].write_dirs
    assert backends.REPORT_ROOT in found["snp"].write_dirs
    assert found["azure"].read_dirs == (collateral, quote)
    assert not any(backend.needs_provision for name, backend in found.items() if name != "simulated")
