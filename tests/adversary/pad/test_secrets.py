"""Keys come from the system's generator alone, no two purposes share one, and none is ever shown."""

from __future__ import annotations

import io
import logging
import os
import random  # noqa: TID251  # to make it refuse
import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cloister.errors import PadError
from cloister.pad import BLOCK_POSITIONS, CheckKeys, Direction, OtpPads, PadKeys, PadPool, PadStream
from cloister.pad import _expand as expand_module
from cloister.ring import FAITHFUL, quantize_weight

MODULI = (256, 255, 253, 251)


def otp_source(stream: PadStream, pool: PadPool, n_in: int = 64) -> OtpPads:
    weight = quantize_weight(torch.eye(n_in), FAITHFUL, layer="q")
    check = CheckKeys.generate(weight, Direction.FORWARD)
    return OtpPads(stream, weight, Direction.FORWARD, check, pool=pool, planes=weight.forward_planes())


@pytest.fixture
def aes_keys(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Every key that AES was used with."""
    found: list[bytes] = []
    real = expand_module.algorithms.AES256

    def recorded(key: bytes):
        found.append(key)
        return real(key)

    monkeypatch.setattr("cloister.pad._expand.algorithms.AES256", recorded)
    return found


def test_no_two_purposes_share_an_aes_key(aes_keys: list[bytes], monkeypatch: pytest.MonkeyPatch):
    """Even where the system's generator is stuck: labels alone keep jobs, layers, directions and blocks apart."""
    monkeypatch.setattr("cloister.pad._stream.os.urandom", lambda n: bytes(n))
    keys = PadKeys()
    layers = ["", "0", "00", "q", "qforward", "layer.1.q", "layer.11.q", "é"]
    for _ in range(2):
        for layer in layers:
            for way in Direction:
                keys.stream(layer, way).draw((BLOCK_POSITIONS + 1,), (256,)).use((BLOCK_POSITIONS + 1,))
        keys.new_job()
    assert len(aes_keys) == len(set(aes_keys)) == 2 * len(layers) * 2 * 2
    assert {len(key) for key in aes_keys} == {32}


def test_every_block_and_every_job_draws_fresh_bytes(monkeypatch: pytest.MonkeyPatch):
    drawn: list[bytes] = []
    real = os.urandom

    def recorded(n: int) -> bytes:
        drawn.append(real(n))
        return drawn[-1]

    monkeypatch.setattr("cloister.pad._stream.os.urandom", recorded)
    keys = PadKeys()
    stream = keys.stream("q", Direction.FORWARD)
    for _ in range(3):
        stream.draw((BLOCK_POSITIONS,), MODULI).use((BLOCK_POSITIONS,))
    keys.new_job()
    assert [len(fresh) for fresh in drawn] == [32] * 5
    assert len(set(drawn)) == 5


def test_no_caller_chooses_a_key():
    for attempt in (lambda: PadKeys(bytes(32)), lambda: PadKeys(seed=1), lambda: PadKeys().new_job(bytes(32))):
        with pytest.raises(TypeError):
            attempt()  # pyright: ignore


def _functions(module: object) -> list[str]:
    return [name for name in dir(module) if not name.startswith("_") and isinstance(getattr(module, name), Callable)]


def test_other_generators_are_never_asked(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a generator that makes no secrets was asked")

    with monkeypatch.context() as patch:
        for module in (random, np.random):  # noqa: TID251
            for name in _functions(module):
                patch.setattr(module, name, refuse)
        for name in ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"):
            patch.setattr(torch, name, refuse)
        for name in ("random_", "uniform_", "normal_", "bernoulli_"):
            patch.setattr(torch.Tensor, name, refuse)
        keys = PadKeys()
        stream = keys.stream("q", Direction.FORWARD)
        with PadPool(4000) as pool:
            source = otp_source(stream, pool)
            for n_tokens in (1, BLOCK_POSITIONS // 64):
                source.take(n_tokens).use((n_tokens, 64)).wipe()
        keys.new_job()
        keys.close()
        with pytest.raises(AssertionError):
            np.random.default_rng()  # noqa: TID251


def _written(value: bytes) -> list[str]:
    numbers = list(value)
    return [value.hex(), repr(value)[2:-1], str(numbers)[1:-1], " ".join(map(str, numbers[:6]))]


def test_no_secret_in_repr_errors_or_logs(aes_keys: list[bytes], caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    keys = PadKeys()
    stream = keys.stream("q", Direction.FORWARD)
    pool = PadPool(4000, wait_s=60)
    source = otp_source(stream, pool)
    ticket = source.take(1)
    pad = ticket.use((1, 64))
    shared = keys.stream("q", Direction.BACKWARD).draw_shared((64,), MODULI)
    _, ranges = shared.use((64,))
    drawn = stream.draw((64,), MODULI)
    block = next(iter(stream._blocks.values()))
    text = io.StringIO()
    for thing in (keys, stream, stream.ledger, ticket, pad, pool, drawn, block, source, source.check, shared, ranges):
        text.write(f"{thing!r} {thing} {thing:}\n")
    attempts = [
        lambda: ticket.use((1, 64)),
        lambda: shared.use((64,)),
        lambda: drawn.use((65,)),
        lambda: stream.draw((0,), MODULI),
        lambda: stream.expand(10**9, 1, MODULI),
        lambda: stream.spend(10**9, 1),
        lambda: source.take(100),
        lambda: source.take(0),
        lambda: pool.__reduce__(),
        lambda: pad.__reduce__(),
        lambda: source.check.__reduce__(),
    ]
    for attempt in attempts:
        with pytest.raises(PadError) as caught:
            attempt()
        text.write("".join(traceback.format_exception(caught.value)) + repr(vars(caught.value)) + caught.value.hint)
    arrays = (*pad.r, pad.u, source.check.rho, source.check.v)
    secrets = [bytes(keys._key), bytes(stream._key), bytes(block.key), *aes_keys, *(each.tobytes() for each in arrays)]
    secrets += [ranges[0].key, pad.u.astype(np.uint8).tobytes()]
    assert len(secrets) >= 12
    shown = text.getvalue() + caplog.text
    for secret in secrets:
        for written in _written(secret):
            assert written not in shown
    pool.close()
    keys.close()


def test_closing_zeroes_every_key():
    keys = PadKeys()
    stream = keys.stream("q", Direction.FORWARD)
    stream.take(BLOCK_POSITIONS)
    stream.expand(0, 10, MODULI)
    buffers = [keys._key, stream._key, stream._blocks[0].key]
    assert all(any(buffer) for buffer in buffers)
    keys.close()
    assert not any(any(buffer) for buffer in buffers)
