"""What the accelerator saw is uniform and independent, whatever was masked; and these tests would see it otherwise.

Inputs are the most structured ones: all zeros, and one row again and again. Bounds are on the p of all tests
of a sample together, 1e-7, so that keys of the system's generator never fail them; what is weak fails at 1e-30.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from bench._uniformity import SeenStatistics, chi_square_sf, p_of_counts, p_of_normal, residues_of
from tests.adversary.masks._seen import KINDS, Kind, Session, encode_with, limit_of, public_table

from cloister.pad import Direction
from cloister.ring import FORMATS, RingFormat, quantize_rows

P_BOUND = 1e-7
P_WEAK = 1e-30
TOKENS, FEATURES = 512, 384
MESSAGES = 14  # 11 million bytes of `faithful`, 8 million of `fast`

BOTH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


def rows_of(kind: str) -> torch.Tensor:
    if kind == "zeros":
        return torch.zeros((TOKENS, FEATURES))
    if kind == "constant":
        return torch.full((TOKENS, FEATURES), 0.5)
    if kind == "one row":
        return public_table()[7].expand(TOKENS, FEATURES)
    return public_table()[:TOKENS]


def statistics_of(fmt: RingFormat, messages: Iterable[np.ndarray]) -> SeenStatistics:
    found = SeenStatistics(fmt)
    for planes in messages:
        found.add(planes)
    return found


def uniform_elements(fmt: RingFormat, seed: bytes, n_rows: int = TOKENS) -> torch.Tensor:
    """Elements as good as uniform, of a fixed stream."""
    stream = hashlib.shake_256(seed).digest(8 * n_rows * FEATURES)
    return torch.from_numpy((np.frombuffer(stream, np.uint64) % fmt.modulus).astype(np.int64)).view(n_rows, FEATURES)


# --- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["zeros", "one row"])
@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_the_accelerator_saw_is_uniform(kind: Kind, direction: Direction, content: str):
    rows = rows_of(content)
    with Session(kind, direction, FEATURES) as session:
        found = statistics_of(kind.fmt, (session.planes_of(rows) for _ in range(MESSAGES)))
    assert found.n_bytes == MESSAGES * TOKENS * FEATURES * kind.fmt.n_planes
    assert not found.too_small
    name, p = found.worst()
    assert p > P_BOUND, name


# --- the tests have power ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zeros", "constant", "one row", "text"])
@BOTH
def test_unmasked_planes_are_rejected(fmt: RingFormat, kind: str):
    x_q, _ = quantize_rows(rows_of(kind), limit_of(fmt, Direction.FORWARD, FEATURES))
    found = statistics_of(fmt, [fmt.encode(x_q).numpy()] * 2)
    assert found.p_values()["element"] < P_WEAK
    assert found.worst()[1] < P_WEAK


@BOTH
def test_a_pad_that_is_used_for_two_messages_is_rejected(fmt: RingFormat):
    """Their difference is the difference of what they say. Each message alone is fine, plane by plane."""
    limit, pad = limit_of(fmt, Direction.FORWARD, FEATURES), uniform_elements(fmt, b"twice")
    messages = [encode_with(fmt, public_table()[i * TOKENS :][:TOKENS], limit, pad) for i in range(2)]
    assert statistics_of(fmt, messages[:1]).worst()[1] > P_BOUND
    found = statistics_of(fmt, messages)
    assert found.worst()[0] == "element: difference to next message"
    assert found.worst()[1] < P_WEAK
    assert found.p_values()["element: autocorrelation, next message"] < P_WEAK


@pytest.mark.parametrize(("axis", "name"), [(0, "next token"), (1, "next feature")])
@BOTH
def test_a_pad_that_is_used_twice_in_a_message_is_rejected(fmt: RingFormat, axis: int, name: str):
    """Once for all tokens, or once for all features."""
    pad = uniform_elements(fmt, b"within").select(axis, 0).unsqueeze(axis)
    found = statistics_of(fmt, [encode_with(fmt, rows_of("text"), limit_of(fmt, Direction.FORWARD, FEATURES), pad)])
    assert found.p_values()[f"element: difference to {name}"] < P_WEAK
    assert found.p_values()[f"element: autocorrelation, {name}"] < P_WEAK


@BOTH
def test_a_pad_that_is_not_uniform_is_rejected(fmt: RingFormat):
    """A quarter of the ring; a byte modulo 250 in a plane; a plane that repeats another."""
    limit, pad = limit_of(fmt, Direction.FORWARD, FEATURES), uniform_elements(fmt, b"uneven", 4 * TOKENS)
    rows = rows_of("text").repeat(4, 1)
    short = statistics_of(fmt, [encode_with(fmt, rows, limit, pad // 4)])
    assert short.p_values()["element"] < P_WEAK
    planes = encode_with(fmt, rows, limit, pad)
    assert statistics_of(fmt, [planes]).p_values()["element"] > P_BOUND
    reduced = planes.copy()
    byte = np.frombuffer(hashlib.shake_256(b"bytes").digest(planes[0].size), np.uint8).reshape(planes[0].shape)
    reduced[-1] = byte.astype(np.int16) % 250 - 125
    found = statistics_of(fmt, [reduced]).p_values()
    assert found[f"plane {len(planes) - 1}: residues"] < P_WEAK
    assert found["plane 0: residues"] > P_BOUND
    repeated = planes.copy()
    repeated[1] = np.clip(planes[0], -(fmt.pad_moduli[1] // 2), None)
    assert statistics_of(fmt, [repeated, repeated]).p_values()["planes 0 and 1"] < P_WEAK


@BOTH
def test_serial_pairs_see_what_residues_do_not(fmt: RingFormat):
    """A counter: every residue as often, the next one known from the one before. Too even is rejected as well."""
    moduli = np.array(fmt.pad_moduli)[:, None, None]
    count = np.arange(4 * TOKENS * FEATURES).reshape(1, 4 * TOKENS, FEATURES)
    found = statistics_of(fmt, [(count % moduli - moduli // 2).astype(np.int8)]).p_values()
    assert found["plane 0: next feature"] < P_WEAK
    assert found["plane 0: next token"] < P_WEAK
    assert found["plane 0: residues"] < 1e-15


# --- the statistics themselves ----------------------------------------------------------------------------------------


@BOTH
def test_uniform_planes_pass_and_p_is_uniform(fmt: RingFormat):
    """Of fixed streams, so this never changes: p is small as often as it should be."""
    found: list[float] = []
    for seed in range(12):
        found += statistics_of(fmt, [fmt.encode(uniform_elements(fmt, b"%d" % seed)).numpy()]).p_values().values()
    assert len(found) > 80
    below = sum(p < 0.1 for p in found) / len(found)
    assert 0.03 < below < 0.2
    assert min(found) > 1e-4


def test_small_samples_are_named_and_not_tested():
    fmt = FORMATS["fast"]
    found = SeenStatistics(fmt)
    found.add(np.zeros((3, 1, 1), np.int8))
    assert "plane 0: residues" in found.too_small
    assert "element" in found.too_small
    assert found.p_values() == {}
    with pytest.raises(ValueError, match="no test"):
        found.worst()


def test_messages_of_another_shape_are_not_compared():
    fmt = FORMATS["fast"]
    found = statistics_of(fmt, [np.zeros((3, rows, 8), np.int8) for rows in (2, 4, 2)])
    assert not any("next message" in name for name in (*found.too_small, *found.p_values()))


@pytest.mark.parametrize("modulus", [256, 255, 253, 251])
def test_residues_of_balanced_planes(modulus: int):
    values = np.arange(-(modulus // 2), (modulus + 1) // 2, dtype=np.int8)
    assert residues_of(values, modulus).tolist() == [int(x) % modulus for x in values]


@pytest.mark.parametrize("value", [-128, -126, 126, 127])
def test_a_residue_out_of_range_is_an_error(value: int):
    with pytest.raises(ValueError, match="plane 3 is not of balanced residues modulo 251"):
        SeenStatistics(FORMATS["faithful"]).add(np.full((4, 2, 2), [[[0]], [[0]], [[0]], [[value]]], np.int8))


@pytest.mark.parametrize("degrees", [2, 250, 254, 64008, 65024, 65534])
@pytest.mark.parametrize("deviations", [-5, -1, 0, 1, 3, 6, 10])
def test_the_survival_function_of_chi_square(degrees: int, deviations: int):
    """Of even degrees it is a Poisson sum: Q(k, x) = sum over i < k of e^-x x^i / i!."""
    statistic = max(0.5, degrees + deviations * math.sqrt(2 * degrees))
    x, k = statistic / 2, degrees // 2
    exact = math.fsum(math.exp(i * math.log(x) - x - math.lgamma(i + 1)) for i in range(k))
    assert chi_square_sf(statistic, degrees) == pytest.approx(exact, rel=1e-6, abs=1e-14)


def test_p_values_are_two_sided():
    assert p_of_counts(np.full(256, 1000)) < 1e-100
    assert p_of_counts(np.array([10**6] + [10**4] * 255)) < 1e-100
    assert p_of_normal(0) == 1
    assert p_of_normal(-1.959964) == pytest.approx(0.05, rel=1e-5) == p_of_normal(1.959964)
