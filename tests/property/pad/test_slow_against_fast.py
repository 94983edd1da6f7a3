"""The stream equals the slow oracle at arbitrary ranges, in any order and cut anywhere."""

from __future__ import annotations

import importlib.util
import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.pad import BLOCK_POSITIONS, Direction, PadKeys
from cloister.pad._expand import expand_block

_SPEC = importlib.util.spec_from_file_location("slow_pad", Path(__file__).parents[2] / "oracle" / "slow_pad.py")
assert _SPEC is not None and _SPEC.loader is not None
slow = importlib.util.module_from_spec(_SPEC)
sys.modules["slow_pad"] = slow
_SPEC.loader.exec_module(slow)

_SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
_KEY = bytes(range(32))
_N = 3 * BLOCK_POSITIONS
# Around the edges of groups and blocks, and anywhere else.
_POSITIONS = st.integers(0, _N - 1) | st.builds(
    lambda edge, d: max(0, edge + d),
    st.sampled_from([0, 1024, BLOCK_POSITIONS - 1024, BLOCK_POSITIONS, 2 * BLOCK_POSITIONS]),
    st.integers(-20, 20),
)
_MODULI = st.sampled_from([(256, 255, 253, 251), (256, 256, 256), (251,), (192, 251), (129,)])


@pytest.fixture(scope="module")
def drawn() -> list[bytes]:
    """What os.urandom gave, in order."""
    return []


@pytest.fixture(scope="module")
def stream(drawn: list[bytes]):
    real = os.urandom

    def recorded(n: int) -> bytes:
        drawn.append(real(n))
        return drawn[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloister.pad._stream.os.urandom", recorded)
        keys = PadKeys()
        keys.new_job()
        stream = keys.stream("model.layers.0.mlp.gate_proj", Direction.BACKWARD)
        stream.take(_N)
        for index in (2, 0, 1):  # each block's fresh bytes are drawn when it is first expanded
            stream.expand(index * BLOCK_POSITIONS + 5, 1, (256,))
    yield stream
    keys.close()


@pytest.fixture(scope="module")
def block_keys(stream, drawn: list[bytes]) -> dict[int, bytes]:
    assert [len(fresh) for fresh in drawn] == [32] * 5
    key = slow.stream_key(drawn[1], 2, "model.layers.0.mlp.gate_proj", "backward")
    return {index: slow.block_key(key, index, fresh) for index, fresh in zip((2, 0, 1), drawn[2:], strict=True)}


@_SETTINGS
@given(position=_POSITIONS, n=st.integers(1, 40), moduli=_MODULI)
def test_the_stream_is_the_oracles(stream, block_keys, position: int, n: int, moduli: tuple[int, ...]):
    n = min(n, _N - position)
    assert stream.expand(position, n, moduli).tolist() == slow.expand(block_keys, position, n, moduli)


def test_rejected_positions_are_the_oracles(stream, block_keys):
    """Random ranges rarely meet a rejected byte of the high moduli: look for those of one block and ask for each."""
    for plane, modulus in ((1, 255), (2, 253), (3, 251)):
        main = slow.Cipher(slow.algorithms.AES(block_keys[1]), slow.modes.CTR(bytes([plane, modulus - 1]) + bytes(14)))
        rejected = [i for i, byte in enumerate(main.encryptor().update(bytes(BLOCK_POSITIONS))) if byte >= modulus]
        assert len(rejected) > BLOCK_POSITIONS * (256 - modulus) / 256 * 0.7
        for position in rejected[:: max(1, len(rejected) // 25)]:
            found = stream.expand(BLOCK_POSITIONS + position, 1, (256,) * plane + (modulus,))[plane, 0]
            assert found == slow.residue(block_keys[1], plane, modulus, position)


@_SETTINGS
@given(position=_POSITIONS, n=st.integers(1, _N), cuts=st.lists(st.floats(0, 1), max_size=5), moduli=_MODULI,
       order=st.randoms(use_true_random=False))  # fmt: skip
def test_pieces_in_any_order_make_the_whole(stream, position: int, n: int, cuts: list[float], moduli, order):
    n = min(n, _N - position)
    whole = stream.expand(position, n, moduli)
    edges = sorted({0, n, *(int(cut * n) for cut in cuts)})
    pieces = list(pairwise(edges))
    order.shuffle(pieces)
    for start, end in pieces:
        assert np.array_equal(stream.expand(position + start, end - start, moduli), whole[:, start:end])


@_SETTINGS
@given(first=st.integers(0, BLOCK_POSITIONS - 1), n=st.integers(1, 3000), rejected=st.integers(60, 1024),
       modulus=st.integers(129, 255))  # fmt: skip
def test_groups_that_run_out_of_spares_go_on(first: int, n: int, rejected: int, modulus: int):
    """With streams made by hand, in which nearly every byte is rejected: the k-th rejected gets the k-th good spare."""
    n = min(n, BLOCK_POSITIONS - first)

    def byte(round_: int, offset: int) -> int:
        if round_ == 0:
            return 255 if offset % 1024 < rejected else 1
        return 255 if offset % 3 == 0 else (offset * 7 + round_ * 11) % 129

    def fill(stream, plane, modulus, round_, offset, out):
        out[:] = [byte(round_, offset + i) for i in range(len(out))]

    out = np.empty((1, n), np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cloister.pad._expand._KeyStream.fill", fill)
        expand_block(_KEY, first, (modulus,), out)
        patch.setattr(slow, "key_byte", lambda key, plane, modulus, round_, offset: byte(round_, offset))
        for i in {0, n // 2, n - 1, *range(0, n, 97)}:
            assert out[0, i] == slow.residue(_KEY, 0, modulus, first + i)
