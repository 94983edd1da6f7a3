"""A client releases nothing to an enclave that its policy does not accept: wrong policy, measurement or code."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import cloister
from cloister import run
from cloister.api import Programs
from cloister.api._platform import simulated_platform
from cloister.attest import render_policy
from cloister.cli import main
from cloister.errors import AttestationError, EvidenceSignatureError, MeasurementMismatchError, PolicyRejectedError
from cloister.testing import FakeRelay, write_tiny_job
from cloister.wire import Envelope

TRAINING = "epochs = 1\nbatch_size = 8"


class Recording:
    """Keeps what the relay carried, so that a test can say what a client has sent."""

    def __init__(self) -> None:
        self.relays: list[FakeRelay] = []

    def __call__(self, *args, **kwargs) -> FakeRelay:
        relay = FakeRelay(*args, **kwargs)
        self.relays.append(relay)
        return relay

    def sent_by_clients(self) -> set[str]:
        return {Envelope.parse(blob).kind for relay in self.relays for _, way, blob in relay.seen if way == "up"}


def _refused(
    job: Path, runs: Path, expected: type[AttestationError], *, programs: Programs | None = None
) -> AttestationError:
    recording = Recording()
    base = programs or Programs()
    with pytest.raises(expected) as caught:
        run(
            job, runs_dir=runs, programs=Programs(server=base.server, client=base.client, relay=recording, env=base.env)
        )
    folder = (runs / "latest").resolve()
    assert recording.sent_by_clients() <= {"f2", "error"}, "a client sent more than a handshake flight"
    assert "f2" in recording.sent_by_clients(), "the handshake never got to the evidence"
    assert list((folder / "inbox").iterdir()) == [], "a client put something on the store"
    assert not list(folder.glob("clients/*/journal*")), "a client began to work on its text"
    return caught.value


def _policy_job(tmp_path: Path, policy: bytes) -> Path:
    (tmp_path / "policy.toml").write_bytes(policy)
    return write_tiny_job(tmp_path, clients=("alpha",), training=TRAINING, sections='[policy]\nfile = "policy.toml"\n')


def test_policy_of_another_measurement(tmp_path: Path):
    policy = render_policy(root_sha256=simulated_platform().root_sha256, server_rtmr3=[b"\1" * 48])
    job = _policy_job(tmp_path, policy)
    error = _refused(job, tmp_path / "runs", MeasurementMismatchError)
    assert "rtmr3" in error.cause and error.exit_code == 5 and error.hint


def test_policy_that_allows_no_simulated_evidence(tmp_path: Path):
    text = render_policy(root_sha256=simulated_platform().root_sha256, server_rtmr3=[b"\1" * 48]).decode()
    strict = text.replace("allow_simulated = true", "allow_simulated = false").replace('"simulated"', '"tdx"')
    assert strict != text
    job = _policy_job(tmp_path, strict.encode())
    error = _refused(job, tmp_path / "runs", PolicyRejectedError)
    assert "simulated" in error.cause


def test_policy_that_pins_another_root(tmp_path: Path):
    job = _policy_job(tmp_path, render_policy(root_sha256="ab" * 32, server_rtmr3=[b"\1" * 48]))
    _refused(job, tmp_path / "runs", (EvidenceSignatureError, PolicyRejectedError))  # type: ignore[arg-type]


def test_an_enclave_of_other_code(tmp_path: Path):
    """The same program with one line more, on the same genuine platform: its measurement differs; that is enough."""
    other = tmp_path / "other"
    shutil.copytree(Path(cloister.__file__).parent, other / "cloister", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "cloister" / "federation" / "_split" / "far_work.py").open("a") as file:
        file.write("\n# one more line: perhaps one that keeps a copy\n")
    # An editable install has a finder before every path.
    server = (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(other)!r}); "
              "sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith('ScikitBuild')]; "
              "import runpy; runpy.run_module('cloister.api._server_main', run_name='__main__')")  # fmt: skip
    job = write_tiny_job(tmp_path, clients=("alpha",), training=TRAINING)
    error = _refused(job, tmp_path / "runs", MeasurementMismatchError, programs=Programs(server=server))
    assert "rtmr3" in error.cause


def test_the_command_line_says_why_and_exits_with_the_branch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    job = _policy_job(tmp_path, render_policy(root_sha256="ab" * 32, server_rtmr3=[b"\1" * 48]))
    code = main(["run", str(job), "--runs-dir", str(tmp_path / "runs"), "--plain"])
    said = capsys.readouterr()
    assert code == AttestationError.exit_code
    assert "error:" in said.err and "hint:" in said.err and "Traceback" not in said.err
    assert list((tmp_path / "runs" / "latest" / "inbox").iterdir()) == []


def test_a_client_refuses_a_job_that_it_has_not_approved(tmp_path: Path):
    """The server side works by a job with one more epoch than the one in the client's hands."""
    from cloister.errors import CloisterError

    job = write_tiny_job(tmp_path, clients=("alpha",), training=TRAINING)

    client = (sys.executable, "-c", "import runpy, cloister.api._folder as f; "
              "read = f.RunFolder.read_job; "
              "change = lambda j: j.model_copy(update={'training': j.training.model_copy(update={'epochs': 9})}); "
              "f.RunFolder.read_job = lambda self: change(read(self)); "
              "runpy.run_module('cloister.api._client_main', run_name='__main__')")  # fmt: skip
    with pytest.raises(CloisterError) as caught:
        run(job, runs_dir=tmp_path / "runs", programs=Programs(client=client, relay=FakeRelay))
    assert caught.value.code == "federation.job"
    assert list((tmp_path / "runs" / "latest" / "inbox").iterdir()) == []
