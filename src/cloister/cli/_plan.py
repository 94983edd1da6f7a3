"""`cloister plan`: tables, what they mean, and one line of advice; or the same numbers as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cloister._format import human_bytes

if TYPE_CHECKING:
    from cloister.api import Estimate, Machine, SplitEstimate

_WIDTH = 132  # where no terminal says how wide it is


def plan(args: argparse.Namespace) -> int:
    """`cloister plan`: what each method costs. A prediction, so it exits with 0 also where nothing fits."""
    from cloister import api

    machine = _machine(args.machine, as_json=args.json)
    if args.save_machine:
        api.save_machine(machine, args.save_machine)
        sys.stderr.write(f"wrote {args.save_machine}\n")
    found = api.plan_model(
        args.model,
        machine,
        n_tokens=args.tokens,
        cut_layer=args.cut_layer,
        rank=args.rank,
        prefix_tokens=args.prefix_tokens,
        heads=args.heads,
        neurons=args.neurons,
        n_clients=args.clients,
    )
    if args.json:
        sys.stdout.write(json.dumps(api.estimate_to_json(found), ensure_ascii=False) + "\n")
    else:
        _show(found)
    return 0


def _machine(name: str, *, as_json: bool) -> Machine:
    from cloister import api

    if name != "this":
        return api.load_machine(name)
    if not as_json:
        sys.stderr.write("measuring this machine; take it as it is when nothing else runs\n")
    return api.measure_machine()


def _show(found: Estimate) -> None:
    from cloister import api

    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    for line in _head(found):
        console.print(escape(line), soft_wrap=True)
    for table in (_speeds(found), _bytes(found), _memory(found)):
        console.print()
        console.print(table)
    for title, text in (
        ("Method 1, masked offload", api.method1_words(found)),
        ("Method 2, split tuning", api.method2_words(found)),
        ("Recommendation", api.recommendation(found)),
    ):
        console.print(f"\n[bold]{title}[/]")
        console.print(escape(text))
    console.print("\nWhat the constants rest on")
    for line in _sources(found):
        console.print(escape(line), soft_wrap=True)


def _head(found: Estimate) -> Iterable[str]:
    model, work, machine = found.model, found.work, found.machine
    trained = f"LoRA of rank {work.rank}" if work.rank else f"a prefix of {work.prefix_tokens} tokens"
    yield (
        f"model    {model.path}: {model.family}, {_count(model.n_parameters)} parameters, {model.n_layers} blocks of "
        f"{model.hidden_size}"
    )
    yield (
        f"work     {trained} ({_count(found.n_adapter)} numbers), batches of {work.n_tokens} tokens, cut at "
        f"{work.cut_layer}, {work.n_clients} clients"
    )
    yield f"machine  {machine.name}: {machine.about}"
    if not machine.is_measured:
        yield "         not all of it was measured: take the numbers as orders of magnitude"


def _speeds(found: Estimate) -> Table:
    table = _table("Speed of training, forward and backward", "", "tokens/s", "at best", "x TEE fp32", "x TEE bf16",
                   "x plain", "enclave", "fits")  # fmt: skip
    tee = found.inside
    for row in (*tee.values(), found.plain, found.gpu_tee):
        if row is not None:
            ratios = [row.tokens_per_s / base.tokens_per_s for base in (*tee.values(), found.plain)]
            size = sum(row.memory.values())
            fits = ("yes" if row.fits else "NO") if size else ""
            table.add_row(row.name, _speed(row.tokens_per_s), "", *map(_ratio, ratios), _size(size), fits)
    table.add_section()
    for row in found.masked:
        ratios = [*row.times_tee.values(), row.times_plain]
        fits = "yes" if row.is_usable else "NO" if not row.fits else "no: accelerator"
        table.add_row(
            f"Method 1, {row.pad.value}, {row.format}", _speed(row.tokens_per_s), _speed(row.limit_tokens_per_s),
            *map(_ratio, ratios), _size(sum(row.memory.values())), fits,
        )  # fmt: skip
    table.add_section()
    for name, split in _splits(found).items():
        ratios = [*split.times_tee.values(), split.times_plain]
        size = _size(sum(split.memory.values()))
        table.add_row(
            f"{name}, far side", _speed(split.tokens_per_s), "", *map(_ratio, ratios), size,
            "yes" if split.fits else "NO",
        )  # fmt: skip
    return table


def _splits(found: Estimate) -> dict[str, SplitEstimate]:
    named = {"Method 2": found.split, "Method 2, SPF": found.split_spf}
    return {name: split for name, split in named.items() if split is not None}


def _bytes(found: Estimate) -> Table:
    table = _table("Bytes over each boundary", "", "out", "back", "backward out", "backward back", "in all")
    for fmt in dict.fromkeys(row.format for row in found.masked):
        for pad, link in {row.pad: row.link for row in found.masked if row.format == fmt}.items():
            each = (link.forward_out, link.forward_back, link.backward_out, link.backward_back, link.total)
            table.add_row(f"accelerator, {pad.value}, {fmt}, a token", *map(human_bytes, each))
    helper = next(row for row in found.masked if row.helper_bytes)
    away = (human_bytes(helper.link.forward_back), "", human_bytes(helper.link.backward_back))
    table.add_row("second accelerator, otp-2, a token", "", *away, human_bytes(helper.helper_bytes))
    table.add_section()
    table.add_row("network, Method 1, an update, each client and round", human_bytes(found.update_bytes),
                  human_bytes(found.update_bytes), "", "", human_bytes(2 * found.update_bytes))  # fmt: skip
    boundary = human_bytes(found.split.boundary_bytes)
    table.add_row("network, Method 2, a token, once a run", boundary, "0 B", "", "", boundary)
    return table


def _memory(found: Estimate) -> Table:
    bills = {"TEE fp32": found.inside["fp32"].memory}
    bills |= {f"{row.pad.value} {row.format}": row.memory for row in found.masked}
    bills |= {name: split.memory for name, split in _splits(found).items()}
    table = _table("Memory of the enclave", "", *bills)
    for name in dict.fromkeys(name for bill in bills.values() for name in bill):
        table.add_row(name, *(_size(bill.get(name, 0)) for bill in bills.values()))
    table.add_section()
    table.add_row("in all", *(_size(sum(bill.values())) for bill in bills.values()))
    return table


def _sources(found: Estimate) -> Iterable[str]:
    """Each source once, with what rests on it."""
    keys: dict[str, list[str]] = {}
    for key, text in found.machine.sources.items():
        keys.setdefault(text, []).append(key)
    for text, named in sorted(keys.items(), key=lambda item: item[0].partition(":")[0] != "measured"):
        yield f"  {', '.join(named)}: {text}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=not i)
    return table


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.2g}"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}"


def _size(n_bytes: int) -> str:
    return human_bytes(n_bytes) if n_bytes else ""


def _count(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n:,}"
