"""What the events of a run add up to. Every view reads it; none keeps a state of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PHASES = ("start", "handshake", "prepare", "train", "evaluate", "baselines", "finish")


@dataclass
class Upload:
    """One client's near side: how much of its text is computed, sealed and stored."""

    n_done: int = 0
    n_total: int = 0
    n_bytes: int = 0
    first_t: float | None = None
    first_done: int = 0
    last_t: float = 0.0

    def seconds_left(self) -> float | None:
        """At the average speed since the first report; None before there is one."""
        done, seconds = self.n_done - self.first_done, self.last_t - (self.first_t or 0.0)
        return (self.n_total - self.n_done) * seconds / done if done > 0 and seconds > 0 else None


@dataclass
class Training:
    """One model that is trained: the federated one, one client's alone, or one client's part of a round.

    Attributes:
        round, round_at: of Method 1, else 0; how many losses there were before it.
    """

    round: int = 0
    round_at: int = 0
    step: int = 0
    n_steps: int = 0
    epoch: int = 0
    lr: float | None = None
    examples_per_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    first_t: float | None = None
    first_step: int = 0
    last_t: float = 0.0

    def seconds_left(self) -> float | None:
        """At the average speed since the first step seen, so that a resumed run is not measured by steps before it."""
        done, seconds = self.step - self.first_step, self.last_t - (self.first_t or 0.0)
        return (self.n_steps - self.step) * seconds / done if done > 0 and seconds > 0 else None


@dataclass
class Board:
    """The state of a run as its events told it so far."""

    run: dict[str, Any] = field(default_factory=dict)
    phase: str = ""
    phases_done: list[str] = field(default_factory=list)
    evidence: dict[str, dict[str, Any]] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    trainings: dict[str, Training] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    n_bytes: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    rounds: tuple[int, int] = (0, 0)
    started_t: float = 0.0
    last_t: float = 0.0

    def apply(self, event: dict[str, Any]) -> None:
        """Takes in one event. Kinds that this release does not know are left alone."""
        self.last_t = float(event.get("t", self.last_t))
        self.started_t = self.started_t or self.last_t
        handler = getattr(self, f"_on_{event.get('event')}", None)
        if handler is not None:
            handler(event)

    @property
    def clients(self) -> list[str]:
        """Names in the job's order; from what was heard, if the run has not introduced itself."""
        return list(self.run.get("clients", [])) or sorted({*self.evidence, *self.uploads})

    @property
    def simulated(self) -> bool:
        return bool(self.run.get("simulated"))

    @property
    def has_rounds(self) -> bool:
        """Whether the clients train, in rounds (Method 1)."""
        return self.run.get("method") == "enclave"

    @property
    def training(self) -> tuple[str, Training] | None:
        """The model that is trained now: the one heard of last."""
        return max(self.trainings.items(), key=lambda item: item[1].last_t, default=None)

    def seconds_left(self) -> float | None:
        """Until the end of this phase; None where nothing tells."""
        if self.phase == "prepare":
            waits = [upload.seconds_left() for upload in self.uploads.values()]
            known = [wait for wait in waits if wait is not None]
            return max(known) if known and len(known) == len(self.clients) else None
        if self.phase == "train" and self.training is not None:
            return self.training[1].seconds_left()
        if self.phase == "baselines" and self.training is not None and self.training[0] != "federated":
            return self.training[1].seconds_left()
        return None

    def _on_run(self, event: dict[str, Any]) -> None:
        self.run = event

    def _on_phase(self, event: dict[str, Any]) -> None:
        phase = str(event.get("phase"))
        if event.get("status") == "begin":
            self.phase = phase
        elif phase not in self.phases_done:
            self.phases_done.append(phase)

    def _on_evidence(self, event: dict[str, Any]) -> None:
        self.evidence[str(event.get("client"))] = event

    def _on_progress(self, event: dict[str, Any]) -> None:
        upload = self.uploads.setdefault(str(event.get("client")), Upload())
        # Client and server both tell of an upload; the one that is behind says nothing new.
        if upload.n_total and event["n_done"] < upload.n_done:
            return
        upload.n_done, upload.n_total, upload.n_bytes = event["n_done"], event["n_total"], event.get("n_bytes", 0)
        if upload.first_t is None:
            upload.first_t, upload.first_done = self.last_t, upload.n_done
        upload.last_t = self.last_t

    def _on_step(self, event: dict[str, Any]) -> None:
        training = self.trainings.setdefault(str(event.get("model", "federated")), Training())
        if event["step"] < training.step:  # A restarted enclave goes back to its checkpoint, or a round begins.
            if event.get("round", 0) == training.round:
                del training.losses[training.round_at + event["step"] :]
            training.first_t = None
        if event.get("round", 0) != training.round:
            training.round, training.round_at = event["round"], len(training.losses)
            training.first_t = None
        training.step, training.n_steps, training.epoch = event["step"], event["n_steps"], event.get("epoch", 0)
        training.lr = event.get("lr", training.lr)
        training.examples_per_s = event.get("examples_per_s", 0.0)
        if event.get("loss") is not None:
            training.losses.append(float(event["loss"]))
        if training.first_t is None:
            training.first_t, training.first_step = self.last_t, training.step
        training.last_t = self.last_t

    def _on_round(self, event: dict[str, Any]) -> None:
        self.rounds = (int(event["n_round"]), int(event["n_rounds"]))

    def _on_metric(self, event: dict[str, Any]) -> None:
        self.metrics[str(event.get("when"))] = event

    def _on_bytes(self, event: dict[str, Any]) -> None:
        self.n_bytes[str(event.get("boundary"))] = int(event.get("n_bytes", 0))

    def _on_restart(self, event: dict[str, Any]) -> None:
        process = str(event.get("process"))
        self.restarts[process] = self.restarts.get(process, 0) + 1

    def _on_warning(self, event: dict[str, Any]) -> None:
        self.warnings.append(str(event.get("cause")))

    def _on_error(self, event: dict[str, Any]) -> None:
        self.errors.append(event)
