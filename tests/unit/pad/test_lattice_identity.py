"""What spec/pad.md proves of lattice pads, tried in Python's integers alone, with polynomials of few coefficients."""

from __future__ import annotations

from dataclasses import replace
from math import isqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import slow_lattice as slow

_SETTINGS = settings(deadline=None, derandomize=True, max_examples=40)
SMALL = {name: replace(par, n=4) for name, par in slow.SETS.items()}
WIDTHS = st.integers(1, 4)


@pytest.mark.parametrize("name", SMALL)
@_SETTINGS
@given(data=st.data())
def test_unmasking_and_check_are_exact(name: str, data: st.DataObject) -> None:
    par = SMALL[name]
    n_in, n_out = data.draw(WIDTHS), data.draw(WIDTHS)
    weights = st.integers(-127, 127) | st.sampled_from([-127, 127, 0])
    weight = [[data.draw(weights) for _ in range(n_in)] for _ in range(n_out)]
    elements = st.integers(0, par.q - 1)
    a = [[data.draw(elements) for _ in range(par.n)] for _ in range(par.k)]
    digit = st.integers(-1, 1)
    s = [[[data.draw(digit) for _ in range(par.n)] for _ in range(par.k)] for _ in range(n_in)]
    rho = [data.draw(st.integers(0, 2**64 - 1)) for _ in range(n_out)]
    v_keys = [sum(key * row[i] for key, row in zip(rho, weight, strict=True)) % 2**64 for i in range(n_in)]
    noise = [[data.draw(st.integers(-22, 22)) for _ in range(n_in)] for _ in range(par.n)] if par.noise else None
    block = slow.block(a, s, slow.products(weight, s, par), v_keys, rho, par, noise)
    if block is None:
        return
    squares = max(max(sum(w * w for w in row) for row in weight), 1)
    limit = isqrt((par.p**2 - 1) // (4 * squares)) - (2 if par.noise else 1) * n_in**0.5 / 2 - 1
    most = int(limit / n_in**0.5)
    for r, u, k in zip(block.r, block.u, block.correction, strict=True):
        x = [data.draw(st.integers(-most, most) | st.sampled_from([-most, most])) for _ in range(n_in)]
        masked = [(each + pad) % par.p for each, pad in zip(x, r, strict=True)]
        y = []
        for row, off in zip(weight, u, strict=True):
            plain = sum(w * each for w, each in zip(row, x, strict=True))
            answer = (sum(w * each for w, each in zip(row, masked, strict=True)) - off) % par.p
            found = answer - par.p * (answer > par.p // 2)
            squared = sum(w * w for w in row)
            assert abs(found - plain) <= (1 if par.noise else 0.5) * (squared * n_in) ** 0.5 + 0.5
            y.append(found)
        left = sum(key * each for key, each in zip(rho, y, strict=True))
        assert (left - sum(key * each for key, each in zip(v_keys, x, strict=True)) - k) % 2**64 == 0


@pytest.mark.parametrize("name", SMALL)
@_SETTINGS
@given(data=st.data())
def test_the_two_ways_to_multiply(name: str, data: st.DataObject) -> None:
    par = SMALL[name]
    a, b = ([data.draw(st.integers(-(2**70), 2**70)) for _ in range(par.n)] for _ in range(2))
    assert slow.multiply(a, b, par.q) == slow.multiply_packed(a, b, par.q)


@pytest.mark.parametrize("q", slow.PSI)
def test_values_and_coefficients(q: int) -> None:
    """psi is the least root of psi^1024 = -1, and `from_values` undoes an evaluation."""
    psi = slow.PSI[q]
    assert pow(psi, 1024, q) == q - 1
    assert all(pow(less, 1024, q) != q - 1 for less in range(psi))
    root = pow(psi, 256, q)
    coefficients = [3, q - 1, 5, 0]
    values = [sum(c * pow(root, (2 * i + 1) * e, q) for e, c in enumerate(coefficients)) % q for i in range(4)]
    assert slow.from_values(values, q) == coefficients


def test_q_is_one_modulo_p():
    for par in slow.SETS.values():
        assert par.q % par.p == 1
        times = par.q // par.p
        assert times == (45 if par.is_fast else 133909048)
        assert all(q % 2048 == 1 for q in par.primes)
