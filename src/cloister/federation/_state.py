"""What the server enclave must not lose: one sealed file, rewritten whole at every step of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cloister.channel import CountedFile, Counter, Uncounted
from cloister.errors import DecryptionError, JobMismatchError, MalformedMessageError
from cloister.wire import AdmitAnswer, Boundary, Manifest, pack, unpack

if TYPE_CHECKING:
    from ._plan import ServerPlan

Phase = Literal["prepare", "train", "evaluate", "finish", "done"]
_PHASES: tuple[Phase, ...] = ("prepare", "train", "evaluate", "finish", "done")
_LABEL = "run-state"
_OTHER_ENCLAVE_HINT = (
    "it was sealed by an enclave of another measurement: another release of cloister, job, policy, model or machine"
)
_MAX_STATE_BYTES = 256 * 1024 * 1024


class RunState:
    """Phase, manifests, results and report of a run. *Secret* (it holds the keys of the shards); sealed at rest.

    With a counter an older file in its place is refused. Without one (docs/limitations.md) the run would repeat work it
    had done, never mix in anything of another job, since the file is bound to run and job.
    """

    def __init__(self, path: Path, key: bytes, plan: ServerPlan, counter: Counter | None = None) -> None:
        self._path = path
        self._file = CountedFile(path, key=key, label=_LABEL, counter=counter or Uncounted())
        self._plan = plan
        self.phase: Phase = "prepare"
        self.manifests: dict[str, Manifest] = {}
        self.admitted: dict[str, AdmitAnswer] = {}
        self.results: dict[str, Any] = {}
        self.report = b""
        self.report_evidence = b""

    @classmethod
    def open(cls, path: Path, key: bytes, plan: ServerPlan, counter: Counter | None = None) -> RunState:
        """The saved state, or a fresh one where there is no file.

        Raises:
            DecryptionError: sealed by another enclave, measurement or machine.
            RollbackError: the counter has seen a newer one.
            JobMismatchError: sealed for another run or job.
        """
        state = cls(path, key, plan, counter)
        try:
            plaintext = state._file.read()
        except DecryptionError as error:
            raise DecryptionError(error.cause, hint=_OTHER_ENCLAVE_HINT) from error
        if plaintext is not None:
            state._load(unpack(plaintext, "run-state", max_bytes=_MAX_STATE_BYTES))
        return state

    def __repr__(self) -> str:
        return f"RunState(phase={self.phase!r}, clients={sorted(self.manifests)})"

    def _load(self, body: dict[str, Any]) -> None:
        if body.get("run_id") != self._plan.run_id or body.get("job_sha384") != self._plan.job_sha384:
            raise JobMismatchError(
                f"{self._path} belongs to another run or job", hint="resume with the job file that started the run"
            )
        if body.get("phase") not in _PHASES:
            raise MalformedMessageError(f"{self._path} holds an unknown phase")
        self.phase = body["phase"]
        self.manifests = {name: Manifest.parse(blob) for name, blob in body["manifests"].items()}
        self.admitted = {name: AdmitAnswer.parse(blob) for name, blob in body["admitted"].items()}
        self.results = json.loads(body["results"])
        self.report = body["report"]
        self.report_evidence = body["report_evidence"]

    def save(self) -> None:
        """Writes the sealed file; the old one is replaced only once the new one is complete."""
        body = {
            "run_id": self._plan.run_id,
            "job_sha384": self._plan.job_sha384,
            "phase": self.phase,
            "manifests": {name: manifest.to_bytes() for name, manifest in self.manifests.items()},
            "admitted": {name: answer.to_bytes() for name, answer in self.admitted.items()},
            "results": json.dumps(self.results),
            "report": self.report,
            "report_evidence": self.report_evidence,
        }
        self._file.write(pack("run-state", body))

    def advance(self, phase: Phase) -> None:
        self.phase = phase
        self.save()

    def set_result(self, name: str, value: Any) -> None:
        self.results[name] = value
        self.save()

    def set_report(self, report: bytes, evidence: bytes) -> None:
        self.report = report
        self.report_evidence = evidence
        self.save()

    def admit(self, client: str, answer: AdmitAnswer) -> None:
        """Takes a client of Method 1 in; a second answer is ignored."""
        if client not in self.admitted:
            self.admitted[client] = answer
            self.save()

    def accept_manifest(self, client: str, manifest: Manifest, *, boundary: Boundary) -> None:
        """Takes a client's manifest once it says what the job says; a second one is ignored.

        Raises:
            JobMismatchError: of another run, client, job, task or boundary encoding.
        """
        if client in self.manifests:
            return
        plan = self._plan
        said = (manifest.run_id, manifest.client, manifest.job_sha384, manifest.boundary, manifest.task)
        due = (plan.run_id, client, plan.job_sha384, boundary, plan.task.name)
        if said != due:
            raise JobMismatchError(f"client {client} sent a manifest of another run, job or encoding", peer=client)
        self.manifests[client] = manifest
        self.save()
