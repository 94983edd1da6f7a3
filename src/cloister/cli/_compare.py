"""`cloister compare`: the same job by every method, shown while it runs, and one table at the end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from cloister._format import human_metric, human_time
from cloister.cli._views import JsonView, PlainView, View
from cloister.errors import ConfigError
from cloister.report import compare_cells

Event = dict[str, Any]

# What a comparison shows of each run: its progress. Decisions about evidence and its own metrics are in its report.
_SHOWN = ("phase", "progress", "step", "round", "restart", "warning", "error")


def compare(args: argparse.Namespace) -> int:
    """Trains by every method and seed; the exit code is that of the first method that failed."""
    from cloister import api

    options = {
        "methods": None if args.only is None else [name.strip() for name in args.only.split(",") if name.strip()],
        "seeds": None if args.seeds is None else parse_seeds(args.seeds),
        "generate": args.generate,
        "lr": parse_rates(args.lr) or None,
    }
    with _view(as_json=args.json, plain=args.plain) as view:
        try:
            done = api.compare(args.job, out=args.out, resume=args.resume, on_event=view, **options)
        except KeyboardInterrupt:
            if view.folder:
                sys.stderr.write(f"hint: cloister compare --resume {view.folder} goes on; what is finished is kept\n")
            raise
    if args.json:
        sys.stdout.write(json.dumps({"event": "comparison", **done.table}, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n" + table_text(done.table, done.folder))
    sys.stdout.flush()
    return first_failure(done.folder, done.table)


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` are those seeds, `3` alone is how many from 0 on; one certain seed is `7,`.

    Raises:
        ConfigError: something else.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        numbers = [int(part) for part in parts if part]
    except ValueError:
        raise ConfigError(
            f"--seeds {text} is no list of seeds", hint="--seeds 0,1,2, or --seeds 3 for the same"
        ) from None
    return numbers if len(parts) > 1 else list(range(numbers[0])) if numbers else []


def parse_rates(given: list[str] | None) -> dict[str, float]:
    """`METHOD=RATE`, each.

    Raises:
        ConfigError: something else.
    """
    found: dict[str, float] = {}
    for text in given or []:
        name, _, rate = text.partition("=")
        try:
            found[name.strip()] = float(rate)
        except ValueError:
            raise ConfigError(f"--lr {text} is no rate of a method", hint="--lr method1-prefix=0.01") from None
    return found


def first_failure(folder: Path, table: dict[str, Any]) -> int:
    """0, or the exit code of the first method in the table that failed."""
    for row in table["rows"]:
        if row["status"] == "failed":
            for seed in table["seeds"]:
                path = folder / f"{row['method']}-{seed}" / "failure.json"
                if path.is_file():
                    return int(json.loads(path.read_bytes()).get("exit_code", 1)) or 1
            return 1
    return 0


# --- while it runs ----------------------------------------------------------------------------------------------------


class CompareView:
    """One view after the other, one for each run, and a line at the beginning and end of each."""

    def __init__(self, make: Callable[[], View], stream: TextIO) -> None:
        self._make = make
        self._stream = stream
        self._inner: View | None = None
        self._is_protected = True
        self._name = ""
        self.folder = ""

    def __enter__(self) -> CompareView:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        if event["event"] == "compare":
            getattr(self, f"_on_{event['status']}", lambda _: None)(event)
        elif self._inner is not None:
            self._show(self._inner, event)

    def _show(self, inner: View, event: Event) -> None:
        if event["event"] == "run":
            inner.note({**event, "job": f"{event.get('job', '')}: {self._name}"})
        elif event["event"] in _SHOWN and (self._is_protected or event["event"] != "phase"):
            inner(event)  # what a phase is called is true of cloister's methods
        else:
            inner.note(event)

    def _on_plan(self, event: Event) -> None:
        self.folder = event["folder"]
        seeds = ", ".join(map(str, event["seeds"]))
        self._line(f"comparing {', '.join(event['methods'])}; seeds {seeds}; in {event['folder']}")

    def _on_unavailable(self, event: Event) -> None:
        self._line(f"{event['method']} is left out: {event['cause']}")

    def _on_begin(self, event: Event) -> None:
        number = f"{event['n_done'] + 1} of {event['n_total']}"
        self._name = f"{event['method']}, seed {event['seed']} ({number})"
        self._is_protected = event["is_protected"]
        self._line(f"[{number}] {event['method']}, seed {event['seed']}")
        self._inner = self._make()
        self._inner.__enter__()

    def _on_done(self, event: Event) -> None:
        self._ended(event, "done")

    def _on_kept(self, event: Event) -> None:
        self._ended(event, "kept from before")

    def _ended(self, event: Event, how: str) -> None:
        self._close()
        value = human_metric(event["metric"], event["value"])
        told = f"{event['metric']} {value} in {human_time(event['wall_s'])}"
        self._line(f"[{event['n_done']} of {event['n_total']}] {event['method']}, seed {event['seed']}: {told}, {how}")

    def _on_failed(self, event: Event) -> None:
        self._close()
        self._line(f"{event['method']}, seed {event['seed']}: FAILED: {event['cause']}")
        if event["hint"]:
            self._line(f"hint: {event['hint']}")

    def _close(self) -> None:
        if self._inner is not None:
            self._inner.__exit__(None, None, None)
            self._inner = None

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()


class _JsonCompareView(CompareView):
    """Every event as one JSON object a line."""

    def __init__(self) -> None:
        super().__init__(lambda: PlainView(sys.stderr), sys.stderr)
        self._json = JsonView(sys.stdout)

    def __call__(self, event: Event) -> None:
        self._json(event)
        self.folder = event.get("folder", self.folder)


def _view(*, as_json: bool, plain: bool) -> CompareView:
    if as_json:
        return _JsonCompareView()
    if plain or not (sys.stdout.isatty() and sys.stderr.isatty()):
        return CompareView(lambda: PlainView(sys.stderr), sys.stderr)
    from cloister.cli._live import LiveView

    return CompareView(LiveView, sys.stderr)


# --- the table --------------------------------------------------------------------------------------------------------


def table_text(table: dict[str, Any], folder: Path) -> str:
    """The comparison as aligned text, with what a reader must know below it."""
    cells = compare_cells(table)
    to = f"to {table['reference']}" if table["reference"] else ""
    heads = {"name": "method", "figure": f"{table['metric']} (95 %)", "difference": to, "p": "p",
             "rouge_l": "ROUGE-L", "exact_match": "exact match", "seconds": "time", "wire": "over the wire",
             "peak": "enclave", "trained": "trained"}  # fmt: skip
    done = [row for row in cells if row["done"]]
    keys = [key for key in heads if key == "name" or any(row[key] for row in done)]
    lines = [[heads[key] for key in keys], *([row[key] for key in keys] for row in done)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_aligned(line, widths) for line in lines]
    for row in cells:
        if not row["done"] or row["status"] == "failed":
            text.append(f"{row['name'].ljust(widths[0])}  {row['status'].upper()}: {row['reason']}")
    text += ["", *(f"- {note}" for note in table["notes"])]
    text += [
        "",
        *(f"{name:<8}{folder / file}" for name, file in (("report", "compare.html"), ("table", "compare.csv"))),
    ]
    return "\n".join(text) + "\n"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)])
