"""How a run shows itself: plain lines and JSON lines here, the live view in `_live`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Protocol, Self, TextIO

from cloister._format import human_bytes, human_metric, human_time
from cloister.cli._board import Board

Event = dict[str, Any]

STAMP = "SIMULATED"
PROGRESS_EVERY_S = 5.0

ENCLAVE_PHASE_WORDS = {
    "start": "start the enclaves, their accelerators and the relay",
    "prepare": "attest both ways; every client's enclave loads backbone, adapter and data",
    "train": "rounds: clients' enclaves train, the server enclave aggregates",
    "evaluate": "measure the final adapter on held-out examples, in the clients' enclaves",
}
PHASE_WORDS = {
    "start": "start the enclave, the relay and the clients",
    "handshake": "shake hands: every client checks the server enclave's evidence",
    "prepare": "run the near side over the text, seal and upload",
    "train": "train the far side in the server enclave",
    "evaluate": "evaluate on held-out examples",
    "baselines": "train what the result is compared with",
    "finish": "hand out the signed report, close the sessions",
}


class View(Protocol):
    """Shows a run while it goes on. A context manager, called with every event in order."""

    board: Board

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, event: Event) -> None: ...

    def note(self, event: Event) -> None:
        """Take an event in without a line of it."""
        ...

    def close(self) -> None:
        """Leave the screen to others; later events still show as lines."""
        ...


def choose_view(*, as_json: bool, plain: bool) -> View:
    """JSON if asked for; the live view on a terminal; plain lines everywhere else."""
    if as_json:
        return JsonView(sys.stdout)
    if plain or not (sys.stdout.isatty() and sys.stderr.isatty()):
        return PlainView(sys.stderr)
    from cloister.cli._live import LiveView

    return LiveView()


class _BaseView:
    def __init__(self) -> None:
        self.board = Board()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, event: Event) -> None:
        self.board.apply(event)

    def close(self) -> None:
        return None


class JsonView(_BaseView):
    """Every event as one JSON object a line, flushed at once, for programs."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def __call__(self, event: Event) -> None:
        self.board.apply(event)
        self._stream.write(json.dumps(event, separators=(",", ":"), ensure_ascii=False) + "\n")
        self._stream.flush()


class PlainView(_BaseView):
    """A line for each noteworthy event; progress at most every few seconds and once at its end."""

    def __init__(self, stream: TextIO, *, every_s: float = PROGRESS_EVERY_S) -> None:
        super().__init__()
        self._stream = stream
        self._every_s = every_s
        self._last_t: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, event: Event) -> None:
        self.board.apply(event)
        for line in self._lines(event):
            elapsed = human_time(self.board.last_t - self.board.started_t)
            self._stream.write(f"[{elapsed:>5}] {line}\n")
        self._stream.flush()

    def _lines(self, event: Event) -> list[str]:
        kind = event.get("event")
        if kind == "progress":
            return self._progress(event)
        if kind == "step":
            return self._step(event)
        return event_lines(event, self.board)

    def _progress(self, event: Event) -> list[str]:
        client = str(event["client"])
        upload = self.board.uploads[client]
        if not self._is_due(f"progress/{client}", ended=upload.n_done >= upload.n_total):
            return []
        share = 100 * upload.n_done // max(1, upload.n_total)
        sent = f"{share:3} %  {upload.n_done}/{upload.n_total} examples, {human_bytes(upload.n_bytes)} sealed"
        return [f"  {client}: {sent}{_left(upload.seconds_left())}"]

    def _step(self, event: Event) -> list[str]:
        model = str(event.get("model", "federated"))
        training = self.board.trainings[model]
        # One line a round for each client; without rounds, the end of each model once.
        key = f"step/{model}/{event.get('round', 0)}"
        if not self._is_due(key, ended=training.step >= training.n_steps):
            return []
        loss = f", loss {training.losses[-1]:.3f}" if training.losses else ""
        name = "" if model == "federated" else f"{model}: "
        speed = f", {training.examples_per_s:.0f} examples/s"
        return [f"  {name}step {training.step}/{training.n_steps}{loss}{speed}{_left(training.seconds_left())}"]

    def _is_due(self, key: str, *, ended: bool) -> bool:
        """Rate limit: the first, then one each `every_s`, and the end exactly once."""
        if key in self._ended:
            return False
        now = self.board.last_t
        due = ended or key not in self._last_t or now - self._last_t[key] >= self._every_s
        if due:
            self._last_t[key] = now
        if ended:
            self._ended.add(key)
        return due


def event_lines(event: Event, board: Board) -> list[str]:
    """The lines of an event that every view for people shows, and none for those that only move a bar."""
    formatter = _FORMATTERS.get(str(event.get("event")))
    return formatter(event, board) if formatter is not None else []


def _run_lines(event: Event, _: Board) -> list[str]:
    lines = [f"run {event.get('run_id')}: {', '.join(event.get('clients', []))}"]
    if event.get("simulated"):
        lines.append(f"{STAMP}: {_enclaves(event)} a hardened process on this machine, not a TEE")
    if event.get("assumption"):
        lines.append(f"pad {event.get('pad')}, ring {event.get('ring')}: {event['assumption']}")
    return lines


def _enclaves(run: Event) -> str:
    return "every enclave is" if run.get("method") == "enclave" else "the server enclave is"


def _phase_lines(event: Event, board: Board) -> list[str]:
    phase = str(event.get("phase"))
    if event.get("status") != "begin" or phase not in PHASE_WORDS:
        return []
    words = PHASE_WORDS | (ENCLAVE_PHASE_WORDS if board.has_rounds else {})
    return [f"{phase}: {words[phase]}"]


def _evidence_lines(event: Event, board: Board) -> list[str]:
    """A client's decision in full; from the second client on, only what differs from the first."""
    client, reasons = event.get("client"), list(event.get("reasons", []))
    stamp = f" [{STAMP}]" if event.get("claims", {}).get("simulated") else ""
    if not event.get("accepted"):
        code = f" ({event['error']})" if event.get("error") else ""
        head = f"{client} REFUSES the server enclave{code}{stamp}; it sends nothing:"
        return [head, *(f"    no  {reason}" for reason in reasons)]
    first = next(iter(board.evidence.values()))
    if first is not event and first.get("accepted") and len(first.get("reasons", [])) == len(reasons):
        return [f"{client} accepts the server enclave{stamp}: the same {len(reasons)} checks under its own policy"]
    return [f"{client} accepts the server enclave{stamp}:", *(f"    ok  {reason}" for reason in reasons)]


def _metric_lines(event: Event, board: Board) -> list[str]:
    if event.get("value") is None:
        return []
    value = human_metric(str(event["name"]), float(event["value"]))
    when = str(event.get("when"))
    kind, _, client = when.partition("/")
    words = {
        "before": "before tuning",
        "after": "tuned together",
        "epoch": f"after epoch {event.get('epoch')}, on examples held out of training",
        "majority": "majority class",
        "linear-head": "linear head on the frozen model",
        "alone": f"{client} alone",
    }
    return [f"  {event['name']} {value}: {words.get(kind, when)}"]


def _round_lines(event: Event, _: Board) -> list[str]:
    words = f"round {event.get('n_round')}/{event.get('n_rounds')}: {len(event.get('clients', []))} updates"
    words += f", mean loss {event['loss']:.3f}" if event.get("loss") is not None else ""
    words += f", epsilon {event['epsilon']:.2f}" if event.get("epsilon") is not None else ""
    for key in ("rejected", "missing"):
        words += f"; {key}: {', '.join(event[key])}" if event.get(key) else ""
    return [f"  {words}"]


def _restart_lines(event: Event, _: Board) -> list[str]:
    return [f"{event.get('process')} died and was started again (attempt {event.get('attempt')})"]


def _serving_lines(event: Event, _: Board) -> list[str]:
    ask = f'cloister predict --run {event.get("run_dir")} --client NAME "a text"'
    return ["the enclave stays up for predictions; Ctrl-C ends it", f"  {ask}"]


def _warning_lines(event: Event, _: Board) -> list[str]:
    return [f"warning: {event.get('cause')}"]


def _error_lines(event: Event, _: Board) -> list[str]:
    """One party's error as it happens: the run may go on without it, and ends with its own error if it cannot."""
    party = event.get("peer") or event.get("source")
    hint = f" ({event['hint']})" if event.get("hint") else ""
    return [f"{party}: error: {event.get('cause')}{hint}"]


_FORMATTERS: dict[str, Callable[[Event, Board], list[str]]] = {
    "run": _run_lines,
    "phase": _phase_lines,
    "evidence": _evidence_lines,
    "error": _error_lines,
    "metric": _metric_lines,
    "restart": _restart_lines,
    "round": _round_lines,
    "serving": _serving_lines,
    "warning": _warning_lines,
}


def _left(seconds: float | None) -> str:
    return f", {human_time(seconds)} left" if seconds is not None and seconds > 0 else ""
