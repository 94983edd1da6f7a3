"""Lattice pads against the slow oracle; what is zeroed, what is refused, and the bound."""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from tests.oracle import slow_lattice as slow
from tests.unit.pad._lattice_sources import MakeWeight, open_source, use

from cloister.errors import PadError, PadExhaustedError
from cloister.kernels import _native
from cloister.pad import (
    LATTICE_PARAMETERS,
    Direction,
    Pad,
    PadKeys,
    PadMode,
    PadPool,
)
from cloister.pad import _lattice_pads as pads_module
from cloister.ring import FAITHFUL, FAST, FORMATS, QuantizedWeight, RingFormat, product, row_room

N = 1024
NAMES = pytest.mark.parametrize("name", list(LATTICE_PARAMETERS))
BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
WAYS = pytest.mark.parametrize("direction", list(Direction))


@pytest.fixture
def pool():
    with PadPool(0) as pool:
        yield pool


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the system's generator gave, in order."""
    found: list[bytes] = []
    real = os.urandom

    def recorded(n: int) -> bytes:
        found.append(real(n))
        return found[-1]

    monkeypatch.setattr(os, "urandom", recorded)
    return found


@NAMES
def test_a_pad_is_that_of_the_specification(
    pool: PadPool, make_weight: MakeWeight, drawn: list[bytes], name: str, monkeypatch: pytest.MonkeyPatch
):
    """From the job's key to the correction, at the real size: secrets, vectors, products, rounding."""
    par, direction = slow.SETS[name], Direction.BACKWARD if name == "faithful" else Direction.FORWARD
    keys = PadKeys()
    weight = make_weight(FORMATS[LATTICE_PARAMETERS[name].ring], 2, 2)
    source = open_source(keys, weight, pool, direction, name)
    job_key, rho_bytes, secrets_fresh = drawn
    n_tokens = N + 10 if name == "fast" else 10
    pad = use(source, n_tokens)
    keys.close()

    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).tolist()
    rho = np.frombuffer(rho_bytes, np.uint64).tolist()
    v = [sum(key * row[i] for key, row in zip(rho, w_q, strict=True)) % 2**64 for i in range(len(w_q[0]))]
    key = slow.lattice_key(job_key, 1, weight.layer, direction.value, 0)
    s = slow.secrets(key, [secrets_fresh], par, len(w_q[0]))
    z = slow.products(w_q, s, par)
    blocks, pending = [], drawn[3:]
    for counter in itertools.count():
        if not pending:
            break
        vector_key = slow.vector_key(key, counter, pending.pop(0))
        noise = slow.noise(vector_key, [pending.pop(0)], par, len(v)) if par.noise else None
        polynomials = slow.polynomials(slow.vector(vector_key, par), par)
        made = slow.block(polynomials, s, z, v, rho, par, noise)
        if made is not None:
            blocks.append(made)
    assert len(blocks) == -(-n_tokens // N)
    rows = [row for block in blocks for row in block.r][:n_tokens]
    assert pad.r.transpose(1, 2, 0).tolist() == [[list(slow.planes(r, par)) for r in row] for row in rows]
    rows = [row for block in blocks for row in block.u][:n_tokens]
    assert pad.u.tolist() == [[u % par.p for u in row] for row in rows]
    assert pad.correction.tolist() == [k for block in blocks for k in block.correction][:n_tokens]


@NAMES
@WAYS
def test_the_check_is_exact_over_the_integers(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, name: str, direction: Direction
):
    """A masked product of Python's integers, with the largest rows that are allowed; one unit more is found out."""
    fmt = FORMATS[LATTICE_PARAMETERS[name].ring]
    weight = make_weight(fmt, 21, 34)
    source = open_source(keys, weight, pool, direction, name)
    w_q = (weight.w_q if direction is Direction.FORWARD else weight.w_q.T).to(torch.int64)
    n_tokens, n_in = 1030, w_q.shape[1]
    pad = use(source, n_tokens)
    x_q = aligned_rows(w_q, source.input_limit, n_tokens)
    whole = fmt.decode_product(torch.from_numpy(pad.r).to(torch.int32)).view(n_tokens, n_in)
    planes = weight.forward_planes() if direction is Direction.FORWARD else weight.backward_planes()
    answer = fmt.decode_product(product(fmt.encode(x_q + whole), planes, fmt))
    y = fmt.centre(answer - torch.from_numpy(pad.u.astype(np.int64)))
    exact = x_q @ w_q.T
    noise = (y - exact).to(torch.float64)
    bound = source.parameters.rounding * math.sqrt(n_in) * w_q.to(torch.float64).norm(dim=1) + 0.5
    assert bool((noise.abs() <= bound).all()) and bool(noise.any())
    assert int(exact.abs().max()) > 0.97 * fmt.modulus / 2 * source.input_limit / limit_of(weight, direction)
    rho, v = (array.astype(object) for array in (source.check.rho, source.check.v))
    left = (y.numpy().astype(object) @ rho) % 2**64
    right = (x_q.numpy().astype(object) @ v + pad.correction.astype(object)) % 2**64
    assert left.tolist() == right.tolist()
    assert source.mode is PadMode.LATTICE


def limit_of(weight: QuantizedWeight, direction: Direction) -> float:
    return weight.forward_limit if direction is Direction.FORWARD else weight.backward_limit


def aligned_rows(w_q: torch.Tensor, limit: float, n_tokens: int) -> torch.Tensor:
    """Rows of nearly the largest norm, in the direction of the longest row of the weight: the worst case."""
    longest = w_q[w_q.to(torch.float64).norm(dim=1).argmax()].to(torch.float64)
    x_q = torch.trunc(longest * ((limit - 1) / longest.norm())).to(torch.int64)
    assert float(x_q.to(torch.float64).norm()) <= limit
    return x_q.repeat(n_tokens, 1) * (1 - 2 * (torch.arange(n_tokens) % 2)).unsqueeze(1)


@BOTH
def test_a_layer_through_the_kernels(keys: PadKeys, pool: PadPool, make_weight: MakeWeight, fmt: RingFormat):
    """Mask, multiply, unmask and check, as a session does it."""
    weight = make_weight(fmt, 48, 40)
    source = open_source(keys, weight, pool)
    x = torch.randn(100, 40, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        pad = use(source, 100)
        planes, scales, sums = np.empty(pad.r.shape, np.int8), np.empty(100), np.empty(100, np.uint64)
        room = row_room(source.input_limit, 40)
        assert _native.mask(x.numpy(), None, room, pad.r, fmt.CODE, source.check.v, planes, scales, sums)
        answer = fmt.decode_product(product(torch.from_numpy(planes), weight.forward_planes(), fmt)).numpy()
        y, expected = np.empty((100, 48), np.float32), sums + pad.correction
        rest = (fmt.CODE, scales, weight.scales.numpy(), None, source.check.rho, expected, y)
        answer = answer.astype(np.uint32)
        assert _native.unmask(answer, pad.u, *rest)
        plain = x @ (weight.w_q * weight.scales.unsqueeze(1)).T
        assert float((torch.from_numpy(y) - plain).abs().max()) < (0.02 if fmt is FAST else 2e-3)
        answer[7, 3] ^= 1
        assert not _native.unmask(answer, pad.u, *rest)


def test_what_cannot_be_taken(keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pads_module, "MAX_PAD_POSITIONS", 1000)
    source = open_source(keys, make_weight(FAST, 4, 5), pool)
    for n_tokens in (0, -1):
        with pytest.raises(PadError, match="at least one token"):
            source.take(n_tokens)
    with pytest.raises(PadError, match="at most"):
        source.take(201)
    assert source.n_used == 0 and source.ledger.n_taken == 0
    assert source.take(200).use((200, 5)).r.any()


def test_after_closing(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    source = open_source(keys, make_weight(FAST, 4, 5), pool)
    use(source, 10)
    rests, secrets, key = list(source._rests), source._secrets, source._key
    assert rests[0].pad.r.any() and rests[0].pad.u.any() and secrets.s.any() and secrets.z.any() and any(key)
    for _ in range(2):
        source.close()
    assert not any(array.any() for array in (rests[0].pad.r, rests[0].pad.u, secrets.s, secrets.z)) and not any(key)
    for attempt in (lambda: source.take(1), lambda: source.make(1)):
        with pytest.raises(PadExhaustedError):
            attempt()
    with pytest.raises(PadError, match="keys of the check are gone"):
        _ = source.check.rho


def test_rows_that_were_moved_are_zeroed(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    source = open_source(keys, make_weight(FAITHFUL, 6, 5), pool)
    use(source, 300)
    (rest,) = source._rests
    for array in (rest.pad.r.swapaxes(0, 1), rest.pad.u, rest.pad.correction):
        assert not array[:300].any() and array[300:].any()
    use(source, 724)
    assert not any(array.any() for array in (rest.pad.r, rest.pad.u, rest.pad.correction))
    memory = rest.pad.r
    use(source, 1)
    assert source._rests[0].pad.r is memory


@pytest.mark.parametrize("n_tokens", [5, N, N + 5])
def test_closing_while_a_pad_is_made(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch, n_tokens: int
):
    """Secrets of zeros would make a pad of zeros: it is not given out, and nothing is kept."""
    source, made = open_source(keys, make_weight(FAST, 4, 5), pool), []
    real = _native.lattice_block

    class Closing:
        @staticmethod
        def lattice_block(*arguments: Any) -> bool:
            source.close()
            made.extend(arguments[7:10])
            return real(*arguments)

    monkeypatch.setattr(pads_module, "_native", Closing)
    with pytest.raises(PadExhaustedError):
        source.make(n_tokens)
    assert not source._rests and len(made) == 3 and not any(array.any() for array in made)


def test_closing_just_before_a_rest_is_put_back(keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch):
    source = open_source(keys, make_weight(FAST, 4, 5), pool)
    real, seen = pads_module._Rest.move, []

    def move(rest: Any, to: Pad, done: int, n: int) -> int:
        seen.append(rest)
        source.close()
        return real(rest, to, done, n)

    monkeypatch.setattr(pads_module._Rest, "move", move)
    with pytest.raises(PadExhaustedError):
        source.take(5)
    assert not source._rests and not seen[0].pad.r.any() and not seen[0].pad.u.any()


def test_sizes_and_counts(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    source = open_source(keys, make_weight(FAITHFUL, 6, 5), pool)
    n_used = 0
    for n_tokens in (1, 700, 1024, 2500):
        pad = use(source, n_tokens)
        assert (pad.r.shape, pad.u.shape, pad.correction.shape) == ((4, n_tokens, 5), (n_tokens, 6), (n_tokens,))
        assert pad.n_bytes == source.pad_bytes(n_tokens)
        assert all(array.flags.c_contiguous and array.flags.writeable for array in (pad.r, pad.u, pad.correction))
        n_used += 5 * n_tokens
        assert source.n_used == n_used
    assert repr(source) == f"LatticePads(n_used={n_used})"
    assert "5" in repr(source._secrets) and "array" not in repr(source._secrets)


def test_pads_made_ahead_of_time(keys: PadKeys, make_weight: MakeWeight):
    weight = make_weight(FAST, 4, 5)
    with PadPool(1 << 20, wait_s=60) as pool:
        source = open_source(keys, weight, pool)
        pads = [use(source, 600).r.tobytes() for _ in range(5)]
        assert len(set(pads)) == 5
        source.close()
        assert pool.n_ready == 0


def test_blocks_with_the_excluded_value_are_drawn_again(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    source = open_source(keys, make_weight(FAST, 4, 5), pool)
    real, seen = _native.lattice_block, []

    class Unlucky:
        n_times = 2

        @classmethod
        def lattice_block(cls, *arguments: Any) -> bool:
            seen.append(arguments[1].copy())
            usable = real(*arguments)
            return usable and len(seen) > cls.n_times

    monkeypatch.setattr(pads_module, "_native", Unlucky)
    pad = use(source, N)
    assert len(seen) == 3 and len({a.tobytes() for a in seen}) == 3
    assert pad.start == 2 * N and source.ledger.n_taken == 3 * N
    seen.clear()
    Unlucky.n_times = 64
    with pytest.raises(PadError, match="not random"):
        source.take(1)
    assert len(seen) == 64


def test_a_generator_that_is_stuck(keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch):
    """Words that are never below the prime: refused, and nothing of them stays."""

    class Stuck:
        def __init__(self, *_: object) -> None:
            pass

        def encryptor(self) -> Stuck:
            return self

        def reset_nonce(self, _: bytes) -> None:
            pass

        def update_into(self, zeros: bytes, out: memoryview) -> None:
            out.cast("B")[:] = b"\xff" * len(zeros)

    source = open_source(keys, make_weight(FAST, 4, 5), pool)
    monkeypatch.setattr(pads_module, "Cipher", Stuck)
    with pytest.raises(PadError, match="key stream"):
        source.take(1)
