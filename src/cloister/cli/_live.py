"""The live view of a terminal: what is going on now, redrawn in place under the lines worth keeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cloister._format import human_bytes, human_time, sparkline
from cloister.cli._board import PHASES, Board
from cloister.cli._views import STAMP, event_lines

_STYLES = {"    ok ": "green", "    no ": "bold red", "warning": "yellow", STAMP: "black on yellow"}


class LiveView:
    """Phases, each client's decision and upload, loss, bytes and time left, in one panel."""

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self.board = Board()
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._lock = threading.Lock()
        self._live = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=8,
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes the panel away; later events still show as lines."""
        self._live.stop()

    def note(self, event: dict[str, Any]) -> None:
        """Takes an event in without a line above the panel."""
        with self._lock:
            self.board.apply(event)

    def __call__(self, event: dict[str, Any]) -> None:
        with self._lock:
            self.board.apply(event)
            # Phases are in the panel already; everything else that is worth a line stays above it.
            lines = [] if event.get("event") in ("phase", "round") else event_lines(event, self.board)
        for line in lines:
            style = next((style for start, style in _STYLES.items() if line.startswith(start)), "")
            self._console.print(f"[{style}]{escape(line)}[/]" if style else escape(line), highlight=False)

    def _render(self) -> RenderableType:
        with self._lock:
            board = self.board
            parts: list[RenderableType] = [_phases(board)]
            if board.clients:
                parts.append(_clients(board))
            parts += [line for line in (_rounds(board), _training(board), _footer(board)) if line is not None]
            elapsed = human_time(self._clock() - board.started_t) if board.started_t else "0:00"
            title = Text.assemble(("cloister ", "bold"), str(board.run.get("job", board.run.get("run_id", ""))))
            if board.simulated:
                title.append(f"  {STAMP} ", style="black on yellow")
            return Panel(Group(*parts), title=title, title_align="left", subtitle=elapsed, subtitle_align="right")


def _phases(board: Board) -> Text:
    text = Text()
    for phase in PHASES:
        if phase in board.phases_done and phase != board.phase:
            text.append(f"✓ {phase}  ", style="green")
        elif phase == board.phase:
            done = phase in board.phases_done
            text.append(f"{'✓' if done else '▶'} {phase}  ", style="green" if done else "bold cyan")
        else:
            text.append(f"· {phase}  ", style="dim")
    return text


def _clients(board: Board) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(width=28)
    table.add_column(justify="right", no_wrap=True)
    for client in board.clients:
        decision = board.evidence.get(client)
        if decision is None:
            mark = Text("checks evidence", style="dim")
        elif decision.get("accepted"):
            mark = Text("enclave accepted", style="green")
        else:
            mark = Text("enclave REFUSED", style="bold red")
        upload = board.uploads.get(client)
        if upload is None or not upload.n_total:
            table.add_row(client, mark, "", "")
            continue
        counts = f"{upload.n_done}/{upload.n_total} examples  {human_bytes(upload.n_bytes)}"
        table.add_row(client, mark, _bar(upload.n_done, upload.n_total), counts)
    return table


def _rounds(board: Board) -> RenderableType | None:
    done, n_rounds = board.rounds
    if not board.has_rounds or not n_rounds:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(width=28)
    grid.add_column(no_wrap=True)
    grid.add_row("rounds", _bar(done, n_rounds), f"{done}/{n_rounds}")
    return grid


def _training(board: Board) -> RenderableType | None:
    found = board.training
    if found is None:
        return None
    model, training = found
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(width=28)
    grid.add_column(no_wrap=True)
    loss = f"loss {training.losses[-1]:.3f} {sparkline(training.losses)}" if training.losses else "loss not told"
    words = f"step {training.step}/{training.n_steps}  {loss}  {training.examples_per_s:.0f} examples/s"
    name = "training" if model == "federated" else model
    grid.add_row(name, _bar(training.step, training.n_steps), words)
    return grid


def _bar(n_done: int, n_total: int) -> ProgressBar:
    return ProgressBar(total=max(1, n_total), completed=n_done, width=28, complete_style="cyan", finished_style="green")


def _footer(board: Board) -> Text | None:
    parts = [f"{boundary} {human_bytes(n)}" for boundary, n in sorted(board.n_bytes.items())]
    parts += [f"{process} restarted {n}x" for process, n in sorted(board.restarts.items())]
    left = board.seconds_left()
    if left is not None and left > 0:
        # How many models the baselines will train is not known here, so their time is that of the present one.
        of = "for this model" if board.phase == "baselines" else "in this phase"
        of = "in this round" if board.has_rounds else of
        parts.append(f"{human_time(left)} left {of}")
    return Text("  ".join(parts), style="dim") if parts else None
