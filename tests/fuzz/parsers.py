"""Fuzzing of every parser that takes bytes from outside: a result or a `CloisterError`, nothing else.

    python tests/fuzz/parsers.py [--cases 1000000] [--seed 0] [--only WORD ...]

A case is one honest input, changed: bits flipped, cut, grown, spliced with another, a length field overwritten, or pure
noise. The suite runs a bounded number of cases with a fixed seed (test_fuzz_parsers.py). A case that ends in any other
exception is printed with its target, seed and number, which make it again.
"""

from __future__ import annotations

import argparse
import random  # noqa: TID251 - a fuzzer's cases come again from their seed; nothing here is secret
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloister.errors import CloisterError

_LENGTHS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF_FFFF, 0xFFFF_FFFF)


@dataclass(frozen=True)
class Target:
    """A parser, honest inputs for it, and its share of the cases (cheap parsers get more)."""

    name: str
    parse: Callable[[bytes], object]
    seeds: Sequence[bytes]
    share: int = 10


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """One changed input."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(8):
            case 0 | 1 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                data[at:at] = rng.randbytes(rng.randrange(1, 64))
            case 5:
                other = rng.choice(seeds)
                data[at:] = other[rng.randrange(len(other) + 1) :]
            case 6:
                n = rng.choice((1, 2, 4, 8))
                data[at : at + n] = (rng.choice(_LENGTHS) & ((1 << 8 * n) - 1)).to_bytes(
                    n, rng.choice(("big", "little"))
                )
            case _:
                data[:] = data if rng.randrange(50) else rng.randbytes(rng.randrange(300))
    return bytes(data)


def fuzz(targets: Sequence[Target], *, cases: int, seed: int = 0) -> Iterator[tuple[Target, int, int]]:
    """Run `cases` in all; yields each target with how many cases it had and how many parsed.

    Raises:
        AssertionError: a case ended in something that is no CloisterError.
    """
    whole = sum(target.share for target in targets)
    for target in targets:
        n = max(1, cases * target.share // whole)
        parsed = 0
        for case in range(n):
            data = mutate(random.Random(f"{seed}/{target.name}/{case}"), target.seeds)
            try:
                target.parse(data)
                parsed += 1
            except CloisterError:
                pass
            except Exception as error:
                where = f"{target.name}, seed {seed}, case {case}"
                raise AssertionError(f"{where}: {type(error).__name__}: {error}: {data[:200].hex()}") from error
        yield target, n, parsed


def all_targets(folder: Path) -> list[Target]:
    """Every parser, with honest inputs made here. `folder` is for the simulated root."""
    from tests.fuzz.evidence import attest_targets

    honest = [Target(*found) for found in attest_targets(folder)]
    return [*_wire_targets(), *_channel_targets(), *honest, *_adapter_targets(), *_train_targets()]


def _wire_targets() -> list[Target]:
    from cloister import wire

    shard = wire.ShardEntry("ab" * 32, 100, 3, 40, "train")
    messages: list[wire.RecordMessage] = [
        wire.Manifest("run", "north", b"j" * 48, b"k" * 32, 8, "int8", "sequence-classification", (shard,), 0),
        wire.FinishRequest(b"{}", b"", b""),
        wire.FinishAnswer(b"h" * 48),
        wire.PredictRequest(b"body"),
        wire.ErrorAnswer("attest.policy"),
    ]
    header = wire.Header("run", 1, "manifest", "north", "server", 2).to_bytes()
    evidence = wire.Evidence("simulated", b"quote", b"{}").to_bytes()
    packed = wire.pack("kind", {"a": 1, "b": [b"x", "y", {"c": None}], "d": True})
    seeds = [header, evidence, packed, *(message.to_bytes() for message in messages)]
    accelerator: list[wire.AcceleratorMessage] = [
        wire.AcceleratorHello("cpu", "int-mm"),
        wire.AcceleratorLoad(3, 0, 12, 4096, 11_008, b"d" * 48),
        wire.AcceleratorMultiply(3, 1, 4, 512, 4096),
        wire.AcceleratorAnswer(512, 4096),
        wire.AcceleratorError("offload"),
    ]
    questions = [message.to_bytes() for message in accelerator]
    return [
        Target("wire.parse_accelerator_message", wire.parse_accelerator_message, questions, 60),
        Target("wire.unpack_any", wire.unpack_any, seeds, 60),
        Target("wire.dec", lambda data: wire.dec(data, 3), [wire.enc(b"a", b"bc", b""), wire.enc(b"x" * 99)], 60),
        Target("wire.Header", wire.Header.parse, [header, *seeds], 40),
        Target("wire.Evidence", wire.Evidence.parse, [evidence, *seeds], 40),
        Target("wire.Envelope", wire.Envelope.parse, [wire.Envelope("record", b"body").to_bytes(), *seeds], 40),
        Target("wire.parse_message", wire.parse_message, seeds, 80),
    ]


def _channel_targets() -> list[Target]:
    from cloister import channel, wire
    from cloister.channel._proof import parse_proof

    key = b"k" * 32
    sealed = channel.encrypt_chunked(key, b"secret" * 9, b"context")
    header = wire.Header("run", 1, "manifest", "north", "server", 2).to_bytes()
    record = (0).to_bytes(8, "big") + wire.enc(header) + sealed
    proof = wire.Evidence("simulated", b"quote", b"{}").to_bytes()
    both = channel.AttestedNodeProof(b"signature", proof).to_bytes()
    return [
        Target("channel.decrypt_chunked", lambda data: channel.decrypt_chunked(key, data, b"context"), [sealed], 20),
        Target("channel.peek_header", channel.peek_header, [record], 40),
        Target("channel.parse_proof", parse_proof, [proof, both], 20),
        Target("channel.ServerHandshake", _flight2, [_honest_flight2()], 2),
        Target("channel.ClientHandshake", lambda data: _client().flight2(data), [_server().flight1()], 2),
    ]


def _parties() -> tuple[object, bytes]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.derive_private_key(7, ec.SECP384R1())
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    return key, key.public_key().public_bytes(serialization.Encoding.DER, spki)


def _context() -> Any:
    from cloister import channel

    return channel.SessionContext("run", "north", b"\1" * 48, b"\2" * 48, _parties()[1])


def _server() -> Any:
    from cloister import channel, wire

    return channel.ServerHandshake(
        _context(),
        make_evidence=lambda data: wire.Evidence("simulated", data, b""),
        verify_client=channel.NodeKeyVerifier(_parties()[1]),
        now=lambda: 0.0,
    )


def _client() -> Any:
    from cloister import channel

    key: Any = _parties()[0]
    return channel.ClientHandshake(
        _context(), prove=channel.NodeKeyProver(key), verify_server=lambda *_: None, now=lambda: 0.0
    )


def _honest_flight2() -> bytes:
    return _client().flight2(_server().flight1())


def _flight2(data: bytes) -> bytes:
    server = _server()
    server.flight1()
    return server.flight3(data)


def _adapter_targets() -> list[Target]:
    """States as they travel, and the two files of PEFT's format, each changed beside an honest other one."""
    import numpy as np

    from cloister import adapters

    lora = adapters.LoraSpec(r=2, alpha=4.0, targets=("q",))
    names = ("base_model.model.m.0.q.lora_A.weight", "base_model.model.m.0.q.lora_B.weight")
    head = "base_model.model.score.weight"
    shapes = {names[0]: (2, 6), names[1]: (5, 2), head: (3, 6)}
    prefix = adapters.PrefixLayout(n_layers=2, n_heads=2, width=4)
    specs = [
        adapters.StateSpec(lora, "sequence-classification", shapes, {}),
        adapters.StateSpec(
            adapters.PrefixSpec(3), "causal-lm", {"prompt_encoder.embedding.weight": (3, 16)}, {}, layout=prefix
        ),
    ]
    states = [
        adapters.AdapterState(spec, {name: np.ones(shape, np.float32) for name, shape in spec.shapes.items()})
        for spec in specs
    ]
    update = adapters.AdapterUpdate(specs[0], states[0].tensors).to_bytes()
    targets = [
        Target("adapters.AdapterState", lambda data: adapters.AdapterState.parse(data, specs[0]),
               [state.to_bytes() for state in states], 20),
        Target("adapters.AdapterUpdate", lambda data: adapters.AdapterUpdate.parse(data, specs[0]), [update], 20),
    ]  # fmt: skip
    for state in states:
        honest = adapters.peft_files(state)
        targets += [
            Target(f"adapters.parse_peft_files, {state.spec.kind}, {name}", _one_of(honest, name), [blob], 2)
            for name, blob in honest.items()
        ]
    return targets


def _one_of(honest: dict[str, bytes], name: str) -> Callable[[bytes], object]:
    from cloister.adapters import parse_peft_files

    return lambda data: parse_peft_files({**honest, name: data})


def _train_targets() -> list[Target]:
    import torch

    from cloister.federation._report import parse_report
    from cloister.train import Feature, TaskSpec, decode_shard, encode_shard

    task = TaskSpec("sequence-classification", labels=("a", "b"))
    features = [Feature(i, torch.ones(3 + i, 8), i % 2, None) for i in range(3)]
    shard = encode_shard(features, boundary="int8", task=task)

    def decode(data: bytes) -> object:
        return decode_shard(data, task=task, hidden_size=8)

    return [
        Target("train.decode_shard", decode, [shard], 10),
        Target("federation.parse_report", parse_report, [b'{"version": 1, "metric": {"name": "accuracy"}}'], 10),
    ]


def main() -> int:
    """The whole run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = [t for t in all_targets(Path(folder)) if not args.only or any(word in t.name for word in args.only)]
        began, whole = time.monotonic(), 0
        for target, n, parsed in fuzz(targets, cases=args.cases, seed=args.seed):
            whole += n
            print(f"{target.name}: {n} cases, {parsed} parsed, {time.monotonic() - began:.0f} s", flush=True)
    print(f"{whole} cases, only CloisterError")
    return 0


if __name__ == "__main__":
    sys.exit(main())
