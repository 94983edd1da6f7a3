"""The TDX attester in a played guest: RTMR3, collateral, quotes; and one quote through the whole verifier."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest
from tests.unit.attest.fake_tsm import FakeTsm, raising

from cloister.attest import (
    Attester,
    Policy,
    SimulatedAttester,
    TdxAttester,
    expected_rtmr3,
    measurement_events,
    render_policy,
    verify_evidence,
)
from cloister.attest._attesters.tdx import RTMR3_PATH
from cloister.attest._attesters.tsm import ATTEMPTS, HostFileSystem
from cloister.errors import AttestationError
from cloister.wire import Evidence

NOW = 1_800_000_000
DATA = bytes(range(64))
LOADED = {"package": b"p" * 48, "job_sha384": b"j" * 48, "policy_template": b"t" * 48, "weights": b"w" * 48}
EVENTS = measurement_events(**LOADED)
REGISTER = expected_rtmr3(**LOADED)


@pytest.fixture
def collateral(root) -> bytes:
    return SimulatedAttester(root.provision(), rtmr3=bytes(48)).evidence(DATA).aux


@pytest.fixture
def guest(root) -> FakeTsm:
    """Its quotes state the register as it is when they are asked for."""

    def quote(inblob: bytes, _: int) -> tuple[bytes, bytes]:
        assert fs.rtmr3 is not None
        return SimulatedAttester(root.provision(), rtmr3=fs.rtmr3).evidence(inblob).blob, b""

    fs = FakeTsm(quote, hides_auxblob=True)
    return fs


def attester(fs: FakeTsm, collateral: bytes | Path | None, *, events=EVENTS, pauses=None) -> TdxAttester:
    return TdxAttester(collateral, events=events, fs=fs, sleep=(pauses if pauses is not None else []).append)


def test_register_is_extended_once_with_each_event(guest, collateral):
    subject = attester(guest, collateral)
    assert guest.log.count(f"write {RTMR3_PATH.name}") == 4
    assert guest.rtmr3 == REGISTER
    subject.evidence(DATA)
    subject.evidence(DATA)
    assert guest.log.count(f"write {RTMR3_PATH.name}") == 4


def test_evidence(guest, collateral):
    subject: Attester = attester(guest, collateral)
    evidence = subject.evidence(DATA)
    assert (evidence.type, subject.type, subject.binding) == ("tdx", "tdx", "TDREPORT.REPORTDATA")
    assert evidence.aux == collateral
    assert evidence.blob[568:632] == DATA
    assert guest.reports == {}
    assert subject.claims() == {"tee": "tdx", "evidence_type": "tdx", "simulated": False, "rtmr3": REGISTER.hex()}
    assert REGISTER.hex()[:16] in repr(subject)


def test_quote_passes_the_verifier_end_to_end(guest, root):
    """The played guest's quotes are those of a software root: wrapped as what they are, they verify."""
    draft = Policy.parse(render_policy(root_sha256=root.root_sha256))
    loaded = LOADED | {"policy_template": draft.template_sha384}
    policy = Policy.parse(render_policy(root_sha256=root.root_sha256, server_rtmr3=[expected_rtmr3(**loaded)]))
    aux = SimulatedAttester(root.provision(), rtmr3=bytes(48)).evidence(DATA).aux
    found = attester(guest, aux, events=measurement_events(**loaded)).evidence(DATA)

    evidence = Evidence(type="simulated", blob=found.blob, aux=found.aux)
    decision = verify_evidence(evidence, policy, role="server", report_data=DATA, now=NOW)
    assert decision.claims.simulated
    assert decision.claims.measurements["rtmr3"] == expected_rtmr3(**loaded).hex()
    with pytest.raises(AttestationError, match="report"):
        verify_evidence(evidence, policy, role="server", report_data=bytes(64), now=NOW)
    with pytest.raises(AttestationError):  # a software root never passes as hardware
        verify_evidence(found, policy, role="server", report_data=DATA, now=NOW)


# --- the register ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", range(5))
def test_a_process_that_starts_again_goes_on_where_the_register_is(guest, collateral, done):
    for event in EVENTS[:done]:
        guest.store(RTMR3_PATH, event)
    attester(guest, collateral).evidence(DATA)
    assert guest.rtmr3 == REGISTER
    assert guest.log.count(f"write {RTMR3_PATH.name}") == 4 - done


def test_a_register_that_others_have_extended(guest, collateral):
    guest.store(RTMR3_PATH, b"x" * 48)
    with pytest.raises(AttestationError, match=r"rtmr3:sha384 is [0-9a-f]{96}, which is no state") as caught:
        attester(guest, collateral)
    assert "start it anew" in caught.value.hint
    assert f"write {RTMR3_PATH.name}" not in guest.log


def test_a_register_that_others_extend_between_our_events(guest, collateral):
    def other(_: str, __: Path) -> None:
        if guest.log.count(f"write {RTMR3_PATH.name}") == 2:
            guest.before = lambda step, path: None
            guest.store(RTMR3_PATH, b"x" * 48)

    guest.before = other
    with pytest.raises(AttestationError, match="no state"):
        attester(guest, collateral)


def test_a_register_that_others_extend_later(guest, collateral):
    subject = attester(guest, collateral)
    guest.store(RTMR3_PATH, b"x" * 48)
    with pytest.raises(AttestationError, match="RTMR3 has changed since"):
        subject.evidence(DATA)


def test_no_register_file(guest, collateral):
    guest.rtmr3 = None
    with pytest.raises(AttestationError, match=r"cannot extend RTMR3: .*rtmr3:sha384: No such file") as caught:
        attester(guest, collateral)
    assert "6.16" in caught.value.hint


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EINTR])
@pytest.mark.parametrize("call", ["read", "write"])
def test_passing_faults_of_the_register(guest, collateral, code, call):
    pauses: list[float] = []
    guest.before = raising(code, f"{call} {RTMR3_PATH.name}", times=3)
    attester(guest, collateral, pauses=pauses)
    assert guest.rtmr3 == REGISTER
    assert len(pauses) == 3


def test_a_write_that_extends_and_still_fails_is_not_repeated(guest, collateral):
    def fail(step: str, _: Path) -> None:
        if step == f"write {RTMR3_PATH.name}" and guest.log.count(step) == 2:
            guest.store(RTMR3_PATH, EVENTS[1])
            raise OSError(errno.EINTR, "Interrupted system call")

    guest.before = fail
    attester(guest, collateral)
    assert guest.rtmr3 == REGISTER


@pytest.mark.parametrize(("code", "times"), [(errno.EBUSY, ATTEMPTS), (errno.EACCES, 1)])
def test_lasting_faults_of_the_register(guest, collateral, code, times):
    pauses: list[float] = []
    guest.before = raising(code, f"write {RTMR3_PATH.name}", times=times)
    with pytest.raises(AttestationError, match=r"cannot extend RTMR3: /sys/.*rtmr3"):
        attester(guest, collateral, pauses=pauses)
    assert len(pauses) == times - 1


def test_a_fault_without_a_path(guest, collateral):
    def fail(step: str, _: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    guest.before = fail
    with pytest.raises(AttestationError, match=r"RTMR3: /sys/.*: Input/output"):
        attester(guest, collateral)


def test_a_register_of_another_size(guest, collateral):
    guest.rtmr3 = bytes(32)
    with pytest.raises(AttestationError, match="holds 32 bytes, not 48"):
        attester(guest, collateral)


# --- quotes ---------------------------------------------------------------------------------------------------------


def test_a_quote_over_other_data(guest, collateral):
    subject, driver = attester(guest, collateral), guest.driver
    guest.driver = lambda inblob, level: driver(hashlib.sha512(inblob).digest(), level)
    with pytest.raises(AttestationError, match=r"version 4\) does not carry the report data"):
        subject.evidence(DATA)


@pytest.mark.parametrize(("version", "gap"), [(5, 6), (3, 0)])
def test_quote_versions(guest, collateral, version, gap):
    subject, driver = attester(guest, collateral), guest.driver

    def other(inblob: bytes, level: int) -> tuple[bytes, bytes]:
        quote = driver(inblob, level)[0]
        return version.to_bytes(2, "little") + quote[2:48] + bytes(gap) + quote[48:], b""

    guest.driver = other
    if version == 5:
        assert subject.evidence(DATA).blob[574:638] == DATA
    else:
        with pytest.raises(AttestationError, match="version 3"):
            subject.evidence(DATA)


# --- collateral and keys --------------------------------------------------------------------------------------------


def test_collateral_file_is_read_for_each_evidence(guest, collateral, tmp_path):
    path = tmp_path / "collateral.json"
    path.write_bytes(collateral)
    subject = attester(guest, path)
    newer = json.dumps(json.loads(collateral) | {"note": "newer"}).encode()
    path.write_bytes(newer)
    assert subject.evidence(DATA).aux == newer
    path.unlink()
    with pytest.raises(AttestationError, match=r"collateral\.json cannot be read"):
        subject.evidence(DATA)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (None, "none was given"),
        (Path("/nowhere/collateral.json"), "/nowhere/collateral.json cannot be read"),
        (b"", "is empty"),
        (b"not JSON", "not a JSON object"),
        (b"\xff", "not a JSON object"),
        (b"[]", "not a JSON object"),
        (b"{}", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
    ],
)
def test_without_collateral_the_register_stays_as_it_is(guest, source, reason):
    with pytest.raises(AttestationError, match=reason) as caught:
        attester(guest, source)
    assert "cloister collateral fetch" in caught.value.hint
    assert guest.log == []


def test_a_field_of_the_collateral_that_is_no_text(guest, collateral):
    with pytest.raises(AttestationError, match="not a JSON object"):
        attester(guest, json.dumps(json.loads(collateral) | {"tcb_info": {}}).encode())


def test_there_is_no_sealing_key(guest, collateral):
    with pytest.raises(AttestationError, match="no sealing key") as caught:
        attester(guest, collateral).sealing_key("shards")
    assert "vTPM" in caught.value.hint


def test_on_this_machine_there_is_one_clear_error(collateral):
    if HostFileSystem().exists(RTMR3_PATH):
        pytest.skip("this is a TDX guest, and its register would be extended")
    with pytest.raises(AttestationError, match="cannot extend RTMR3"):
        TdxAttester(collateral, events=EVENTS)
