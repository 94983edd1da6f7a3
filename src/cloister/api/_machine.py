"""A machine as `cloister plan` sees it: the rates and costs that the estimate multiplies by, each with its source.

A description is a TOML file with the fields of `Machine` as keys, and `[sources]` saying of every constant whether it
was measured, stands in a vendor's specification or in the design, or is assumed. The presets in `machines/` are such.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cloister._files import write_whole
from cloister.errors import ConfigError, Problem

TEES = ("tdx", "snp", "sgx", "none")
SOURCE_KINDS = ("measured", "vendor", "design", "assumed")
THIS = "this"

_FOLDER = Path(__file__).parent / "machines"
_MAX_FILE_BYTES = 64 * 1024
_MAY_BE_ZERO = ("_ns", "_us")  # a cost may be nothing; a rate or a size may not
# What no measurement on the machine itself can tell.
_ON_TRUST = ("network_mbit_s", ".tee", ".memory_bytes", ".confidential", ".confidential_share")


@dataclass(frozen=True)
class EnclaveSpec:
    """The trusted side. Rates are of all its cores together, of large products, as attained and not as advertised.

    Attributes:
        tee: one of `TEES`.
        cores: threads that the enclave may use.
        kernel_threads: how many of them make pads and masks of one message at the same time, in this release.
        fp32_gflop_s, bf16_gflop_s: floating-point products, 1e9 operations a second; a multiply-add counts as two.
        int8_gop_s: int8 products with int32 accumulation, in the same units.
        memory_gb_s: what streaming over memory attains, read and written bytes together.
        memory_bytes: what the enclave may fill before it fails, or before it pages (SGX).
        runtime_bytes: interpreter, torch and this library, before any model.
    """

    tee: str
    cores: float
    kernel_threads: float
    fp32_gflop_s: float
    bf16_gflop_s: float
    int8_gop_s: float
    memory_gb_s: float
    memory_bytes: float
    runtime_bytes: float


@dataclass(frozen=True)
class AcceleratorSpec:
    """The untrusted device.

    Attributes:
        shares_cpu: it is a process on the enclave's own cores, so that neither works while the other does.
        bf16_tflop_s, int8_top_s: of dense products, 1e12 operations a second.
        attained: the share of these that large products reach; 1 where they were measured.
        combine_ns: to make one ring element of its accumulators, for each output; nothing where it is fused.
        memory_gb_s, memory_bytes: of the device.
        confidential: whether it has a confidential-computing mode that joins a TEE virtual machine.
        confidential_share: what that mode leaves of its speed.
    """

    shares_cpu: bool
    bf16_tflop_s: float
    int8_top_s: float
    attained: float
    combine_ns: float
    memory_gb_s: float
    memory_bytes: float
    confidential: bool
    confidential_share: float


@dataclass(frozen=True)
class LinkSpec:
    """Between the enclave and an accelerator.

    Attributes:
        gb_s: in each direction.
        latency_us: of one product, there and back, when nothing is sent.
    """

    gb_s: float
    latency_us: float


@dataclass(frozen=True)
class KernelSpec:
    """What one element costs on one thread, in nanoseconds, for one ring format.

    Attributes:
        otp_ns: making the one-time pad of an input element, all its planes.
        encode_ns: making planes of a pad element that is to be multiplied.
        combine_ns: making the ring element of an output's accumulators.
        lattice_ns: an input's pad, or an output's unmasking term, of the lattice pad.
        mask_ns: quantising an input element, masking it, and its part of the check.
        unmask_ns: unmasking an output element, scaling it, and its part of the check.
    """

    otp_ns: float
    encode_ns: float
    combine_ns: float
    lattice_ns: float
    mask_ns: float
    unmask_ns: float


@dataclass(frozen=True)
class Machine:
    """All constants of an estimate. Made by `load_machine` and `measure_machine`.

    Attributes:
        name: of the description.
        about: one sentence on what is described.
        network_mbit_s: between a client and the server, in each direction.
        kernels: by the name of the ring format.
        helper_link: between the enclave and the second accelerator of the mode otp-2, which is on another host.
        sources: where each constant comes from, by key or by table, such as "enclave.tee" or "enclave": a word of
            `SOURCE_KINDS`, a colon, and the rest.
    """

    name: str
    about: str
    network_mbit_s: float
    enclave: EnclaveSpec
    accelerator: AcceleratorSpec
    link: LinkSpec
    helper_link: LinkSpec
    kernels: Mapping[str, KernelSpec]
    sources: Mapping[str, str]

    def source(self, key: str) -> str:
        """The source of one constant: its own, or that of the narrowest table that has one."""
        parts = key.split(".")
        return next((self.sources[path] for path in _upwards(parts) if path in self.sources), "")

    @property
    def is_measured(self) -> bool:
        """Whether every rate and cost of it was measured, and nothing but sizes and the network is taken on trust."""
        return all(self.source(key).startswith("measured") for key, _ in constants(self) if not key.endswith(_ON_TRUST))


_TABLES: Mapping[str, type] = {
    "enclave": EnclaveSpec,
    "accelerator": AcceleratorSpec,
    "link": LinkSpec,
    "helper_link": LinkSpec,
}
_FORMATS = ("faithful", "fast")


def machine_names() -> list[str]:
    """The presets, which are assumptions and say so."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_machine(name: str | Path) -> Machine:
    """A preset by its name, or a description from its file. To measure this machine, see `measure_machine`.

    Raises:
        ConfigError: there is no such preset or file, or the description is wrong; with every problem and its key.
    """
    preset = _FOLDER / f"{name}.toml" if str(name) in machine_names() else None
    path = preset or Path(name)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than 64 KiB and therefore no description of a machine")
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join([THIS, *machine_names()])
        raise ConfigError(f"{name} is neither a known machine nor a file", hint=f"known: {known}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", hint="give a TOML file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is not valid TOML: {error}", source=str(path)) from None
    return parse_machine(raw, source=str(path))


def parse_machine(raw: Mapping[str, Any], *, source: str = "") -> Machine:
    """A `Machine` from nested tables.

    Raises:
        ConfigError: with every problem and its key: unknown or missing keys, values of another kind or out of range,
            constants without a source.
    """
    problems: list[Problem] = []
    kernels = _table(raw, "kernels", problems)
    values: dict[str, Any] = {
        **_read_fields(raw, Machine, "", problems, skip=(*_TABLES, "kernels", "sources")),
        **{name: _read_fields(_table(raw, name, problems), cls, f"{name}.", problems) for name, cls in _TABLES.items()},
        "kernels": {
            name: _read_fields(_table(kernels, name, problems, "kernels."), KernelSpec, f"kernels.{name}.", problems)
            for name in _FORMATS
        },
    }
    problems += _unknown(kernels, _FORMATS, "kernels.")
    sources = _table(raw, "sources", problems)
    problems += _source_problems(sources)
    if problems:
        raise ConfigError(problems, source=source)
    return Machine(
        **{
            **values,
            **{name: cls(**values[name]) for name, cls in _TABLES.items()},
            "kernels": {name: KernelSpec(**found) for name, found in values["kernels"].items()},
            "sources": dict(sources),
        }
    )


def save_machine(machine: Machine, path: str | Path) -> None:
    """Write a description that `load_machine` reads back equal. Replaces a file that is there.

    Raises:
        StoreError: it cannot be written.
    """
    write_whole(Path(path), machine_to_toml(machine).encode(), mode=0o644)


def machine_to_toml(machine: Machine) -> str:
    """The description as TOML text."""
    raw = dataclasses.asdict(machine)
    kernels = raw.pop("kernels")
    tables = {**raw, **{f"kernels.{name}": costs for name, costs in kernels.items()}}
    tables["sources"] = tables.pop("sources")
    lines = [f"{key} = {_toml(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{_toml_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def constants(machine: Machine) -> Iterator[tuple[str, Any]]:
    """Every constant with its key, in the order of the description."""
    yield "network_mbit_s", machine.network_mbit_s
    for name in _TABLES:
        yield from ((f"{name}.{key}", value) for key, value in dataclasses.asdict(getattr(machine, name)).items())
    for name, costs in machine.kernels.items():
        yield from ((f"kernels.{name}.{key}", value) for key, value in dataclasses.asdict(costs).items())


# --- reading ----------------------------------------------------------------------------------------------------------


def _table(raw: Mapping[str, Any], key: str, problems: list[Problem], prefix: str = "") -> Mapping[str, Any]:
    found = raw.get(key)
    if isinstance(found, dict):
        return found
    # A missing table shows as its missing keys.
    if found is not None:
        problems.append(Problem(f"{prefix}{key}", "must be a table", f"write it as [{prefix}{key}]"))
    return {}


def _read_fields(
    raw: Mapping[str, Any], cls: type, prefix: str, problems: list[Problem], *, skip: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The values of a table's plain keys; what is wrong with them goes to `problems`."""
    kinds = {field.name: field.type for field in fields(cls) if field.name not in skip}
    values: dict[str, Any] = {}
    for key, kind in kinds.items():
        if key not in raw:
            problems.append(Problem(prefix + key, "missing"))
        elif cause := _cause(key, kind, raw[key]):
            problems.append(Problem(prefix + key, cause))
        else:
            values[key] = float(raw[key]) if kind == "float" else raw[key]
    problems += _unknown(raw, (*kinds, *skip), prefix)
    return values


def _cause(key: str, kind: Any, value: object) -> str:
    """What is wrong with one value; empty where nothing is."""
    if kind == "bool":
        return "" if isinstance(value, bool) else "must be true or false"
    if kind == "str":
        if key == "tee":
            return "" if value in TEES else f"must be one of {', '.join(TEES)}"
        return "" if isinstance(value, str) and value else "must be text"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "must be a number"
    if not math.isfinite(value) or value < 0 or (value == 0 and not key.endswith(_MAY_BE_ZERO)):
        return "must be a finite number above 0" if not key.endswith(_MAY_BE_ZERO) else "must be a finite number from 0"
    return "must be at most 1" if key in ("attained", "confidential_share") and value > 1 else ""


def _unknown(raw: Mapping[str, Any], known: tuple[str, ...], prefix: str) -> list[Problem]:
    return [Problem(prefix + key, "unknown key", _did_you_mean(key, known)) for key in raw if key not in known]


def _did_you_mean(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"


def _keys() -> list[str]:
    kernels = [f"kernels.{name}.{field.name}" for name in _FORMATS for field in fields(KernelSpec)]
    tables = [f"{name}.{field.name}" for name, cls in _TABLES.items() for field in fields(cls)]
    return ["network_mbit_s", *tables, *kernels]


def _source_problems(sources: Mapping[str, Any]) -> list[Problem]:
    keys = _keys()
    named = {path for key in keys for path in _upwards(key.split("."))}
    problems: list[Problem] = []
    for key, text in sources.items():
        if key not in named:
            problems.append(Problem(f"sources.{key}", "is the source of no key", "name a key or a table"))
        elif not isinstance(text, str) or text.partition(":")[0] not in SOURCE_KINDS or not text.partition(":")[2]:
            problems.append(
                Problem(f"sources.{key}", f"must begin with one of {', '.join(SOURCE_KINDS)}, a colon, and say which")
            )
    bare = [key for key in keys if not any(path in sources for path in _upwards(key.split(".")))]
    hint = "say where each comes from, for a key or for a whole table"
    return [*problems, *(Problem(f"sources.{key}", "missing", hint) for key in bare)]


def _upwards(parts: list[str]) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    for n in range(len(parts), 0, -1):
        yield ".".join(parts[:n])


def _toml_key(key: str) -> str:
    return key if "." not in key else json.dumps(key)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value) if isinstance(value, float) and not value.is_integer() else f"{value:.0f}"
