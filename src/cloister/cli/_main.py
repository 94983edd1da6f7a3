"""The command's entry: arguments, exit codes, and how errors are shown. Starts fast: nothing heavy is imported here."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cloister import __version__
from cloister.cli import _help
from cloister.cli._attest_arguments import Adder, add_attest_commands
from cloister.errors import AttestationError, CloisterError, ConfigError

EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h.
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it.
EXIT_TERMINATED = 143  # 128 + SIGTERM.
EXIT_PIPE = 141  # 128 + SIGPIPE.


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is cleaned up after like Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = build_parser().parse_args(argv)
    _set_up(debug=args.debug)
    try:
        return int(args.command(args) or 0)
    except CloisterError as error:
        show_error(error, as_json=getattr(args, "json", False))
        return error.exit_code
    except KeyboardInterrupt as stop:
        _talk("error: stopped; everything that was started is down")
        if runs_dir := getattr(args, "runs_dir", None):
            _talk(f"hint: cloister run --resume {Path(runs_dir) / 'latest'} goes on from here")
        return EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone (`cloister run --json | head`). Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except Exception as error:
        # The one place that catches everything: a person must not meet a traceback, and must learn whose fault it is.
        if args.debug:
            raise
        return _show_bug(error)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Command functions are bound by name and imported when called."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="log to stderr, and show the traceback of a bug")
    parser = argparse.ArgumentParser(
        prog="cloister",
        description=_help.CLOISTER,
        epilog=_help.EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cloister {__version__}")
    add = _adder(parser, common)

    def group(name: str, text: str) -> Adder:
        child = add(name, text, "")
        return _adder(child, common)

    _add_quickstart(add("quickstart", *_help.QUICKSTART))
    init = add("init", *_help.INIT)
    init.add_argument("path", nargs="?", default="job.toml", metavar="PATH", help="the new file (default: job.toml)")
    check = add("check", *_help.CHECK)
    check.add_argument("job", metavar="JOB", help="a job file")
    _add_run(add("run", *_help.RUN))
    _add_predict(add("predict", *_help.PREDICT))
    _add_compare(add("compare", *_help.COMPARE, module="_compare"))
    _add_plan(add("plan", *_help.PLAN, module="_plan"))
    add_attest_commands(add, group)
    _add_accelerator(add("accelerator", *_help.ACCELERATOR, module="_accelerator"))
    return parser


def _adder(parent: argparse.ArgumentParser, common: argparse.ArgumentParser) -> Adder:
    """What adds commands below `parent`, each with its text, its example, and the function that it calls."""
    commands = parent.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, text: str, example: str, *, module: str = "_commands", function: str = ""
    ) -> argparse.ArgumentParser:
        child = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=example,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        child.set_defaults(command=lambda args: _call(module, function or name, args))
        return child

    return add


def _call(module: str, function: str, args: argparse.Namespace) -> int:
    return getattr(import_module(f"cloister.cli.{module}"), function)(args)


def _add_views(parser: argparse.ArgumentParser) -> None:
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="events and the result as JSON lines on stdout")
    shown.add_argument("--plain", action="store_true", help="plain lines, as when stdout is no terminal")
    parser.add_argument("--runs-dir", default="runs", metavar="DIR", help="where run folders go (default: runs)")


def _add_quickstart(parser: argparse.ArgumentParser) -> None:
    _add_views(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="a job file; with --resume the run's own if left out")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run that was stopped, such as runs/latest")
    parser.add_argument("--serve", action="store_true", help="keep the enclave up for predictions, until Ctrl-C")
    _add_views(parser)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, metavar="RUN_DIR", help="a finished run, such as runs/latest")
    parser.add_argument("--client", required=True, metavar="NAME", help="the client that asks")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("texts", nargs="*", default=[], metavar="TEXT", help="texts to classify, or prompts")
    given.add_argument("--file", metavar="F", help="one text a line; .jsonl with text, text_b; - is stdin")
    parser.add_argument("--json", action="store_true", help="one JSON object for each text on stdout")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", nargs="?", metavar="JOB", help="a job file; with --resume may be left out")
    parser.add_argument("--only", metavar="M1,M2", help="these methods (default: all that can run the job)")
    parser.add_argument("--seeds", metavar="S", help="0,1,2 are those; 3 alone is how many, from 0 on (default: 3)")
    parser.add_argument("--lr", action="append", metavar="METHOD=RATE", help="a learning rate of a method's own")
    parser.add_argument("--generate", type=int, metavar="N", help="complete N held-out prompts (causal-lm; default: 0)")
    parser.add_argument("--out", default="compare", metavar="DIR", help="where its folder goes (default: compare)")
    parser.add_argument("--resume", metavar="DIR", help="go on with this folder, such as compare/quickstart")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="events and the table as JSON lines on stdout")
    shown.add_argument("--plain", action="store_true", help="plain lines, as when stdout is no terminal")


def _add_accelerator(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--listen", metavar="ADDRESS", help="unix:/path or tcp://host:port")
    where.add_argument("--connect", metavar="ADDRESS", help="where a client's enclave waits for its accelerator")
    devices = ("auto", "cpu", "cuda")
    parser.add_argument("--device", choices=devices, default="auto", help="default: auto, CUDA where there is one")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's folder with config.json, or a name on the hub")
    parser.add_argument(
        "--machine", default="this", metavar="M",
        help="this (measured now), a description's file, or a preset: tdx-96-h200, snp-64-h100, sgx-8-cpu, laptop",
    )  # fmt: skip
    parser.add_argument("--save-machine", metavar="F", help="write the machine's description, to keep or to edit")
    parser.add_argument("--tokens", type=int, default=512, metavar="N", help="tokens of a batch (default: 512)")
    parser.add_argument("--cut-layer", type=int, metavar="N", help="Method 2's near-side blocks (default: half)")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--rank", type=int, default=8, metavar="R", help="of LoRA on every linear (default: 8)")
    trained.add_argument(
        "--prefix-tokens", type=int, default=0, metavar="N", help="train a prefix (P-tuning v2) in place of LoRA"
    )
    for part, of in (("heads", "head groups"), ("neurons", "feed-forward neurons")):
        parser.add_argument(
            f"--{part}", type=float, default=0.5, metavar="S",
            help=f"share of the {of} that Method 2 trains with SPF (default: 0.5)",
        )  # fmt: skip
    parser.add_argument("--clients", type=int, default=3, metavar="N", help="institutions (default: 3)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def _set_up(*, debug: bool) -> None:
    # Libraries must not draw bars or print advice over our views.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    handler = logging.StreamHandler() if debug else logging.NullHandler()
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler])
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def show_error(error: CloisterError, *, as_json: bool = False) -> None:
    """`error:` and `hint:` lines on stderr; every problem of a configuration, every reason of a refusal."""
    if as_json:
        event = {"t": round(time.time(), 3), "source": "run", "event": "error", "code": error.code}
        event |= {"cause": error.cause, "hint": error.hint, "exit_code": error.exit_code}
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()
    if isinstance(error, ConfigError):
        where = f"{error.source}: " if error.source else ""
        for problem in error.problems:
            _talk(f"error: {where}{problem}")
            if problem.hint:
                _talk(f"hint: {problem.hint}")
        hints = {problem.hint for problem in error.problems}
        if error.hint and error.hint not in hints:
            _talk(f"hint: {error.hint}")
        return
    _talk(f"error: {error.cause}")
    if isinstance(error, AttestationError):
        for reason in error.reasons:
            if reason != error.cause:
                _talk(f"  - {reason}")
    if error.hint:
        _talk(f"hint: {error.hint}")


def _show_bug(error: Exception) -> int:
    """Says that it is a bug and where its traceback lies. The traceback names files and lines, and no data."""
    handle, path = tempfile.mkstemp(prefix="cloister-bug-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        # Only the frames: the text of an unexpected exception may hold a row of somebody's data.
        file.write(f"cloister {__version__}, python {sys.version.split()[0]}\n")
        file.writelines(traceback.format_tb(error.__traceback__))
        file.write(f"{type(error).__name__}\n")
    _talk(f"error: this is a bug in cloister ({type(error).__name__})")
    _talk(f"hint: please report it with {Path(path)}; --debug shows the whole traceback")
    return EXIT_BUG


def _talk(line: str) -> None:
    sys.stderr.write(line + "\n")
