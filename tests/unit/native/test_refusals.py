"""Arrays of another shape, type, order or layout are refused, and nothing is written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.unit.native import data

from cloister.kernels import _native


def arguments(kernel: str, ring: int = 0) -> dict[str, Any]:
    """Arguments that the kernel takes."""
    n = len(data.MODULI[ring])
    if kernel == "mask":
        return {
            "x": data.floats(1, (3, 5)), "fold": data.floats(2, (5,)), "room": 100.0, "r": data.pads(3, (3, 5), ring),
            "ring": ring, "v": data.integers(4, (5,), np.uint64), "planes": np.zeros((n, 3, 5), np.int8),
            "scales": np.zeros(3), "sums": np.zeros(3, np.uint64),
        }  # fmt: skip
    if kernel == "unmask":
        return {
            "answer": np.zeros((3, 5), np.uint32), "u": np.zeros((3, 5), np.uint32), "ring": ring,
            "scales": np.ones(3), "channel": data.floats(2, (5,)), "bias": data.floats(3, (5,)),
            "rho": data.integers(4, (5,), np.uint64), "expected": np.zeros(3, np.uint64),
            "y": np.zeros((3, 5), np.float32),
        }  # fmt: skip
    if kernel == "encode_pad":
        return {"r": data.pads(1, (7,), ring), "ring": ring, "planes": np.zeros((n, 7), np.int8)}
    if kernel == "combine":
        return {"acc": np.ones((n, 7), np.int32), "ring": ring, "out": np.zeros(7, np.uint32)}
    return {"row": np.full(1030, 255, np.uint8), "modulus": 251, "spares": np.zeros(128, np.uint8)}


WRITTEN = {
    "combine": ["out"], "encode_pad": ["planes"], "mask": ["planes", "scales", "sums"], "replace_rejected": ["row"],
    "unmask": ["y"],
}  # fmt: skip
OPTIONAL = {"fold", "channel", "bias"}
ARRAYS = [
    (kernel, name) for kernel in WRITTEN for name, value in arguments(kernel).items() if isinstance(value, np.ndarray)
]
_EACH_ARRAY = pytest.mark.parametrize(("kernel", "name"), ARRAYS, ids=[f"{kernel}-{name}" for kernel, name in ARRAYS])


def refuse(kernel: str, **changes: Any) -> None:
    args = {**arguments(kernel), **changes}
    before = {name: np.array(args[name]) for name in WRITTEN[kernel]}
    with pytest.raises((TypeError, ValueError)):
        getattr(_native, kernel)(**args)
    for name, value in before.items():
        assert np.array_equal(np.array(args[name]), value)


@pytest.mark.parametrize("kernel", WRITTEN)
@pytest.mark.parametrize("ring", data.RINGS, ids=["faithful", "fast"])
def test_what_the_others_change_is_taken(kernel: str, ring: int) -> None:
    getattr(_native, kernel)(**arguments(kernel, ring))


@_EACH_ARRAY
def test_another_number_of_elements(kernel: str, name: str) -> None:
    array = arguments(kernel)[name]
    for axis in range(array.ndim):
        if (kernel, name) == ("replace_rejected", "row"):
            continue  # it is the row that says how many spares there must be
        refuse(kernel, **{name: np.concatenate((array, array), axis)})
        refuse(kernel, **{name: np.ascontiguousarray(np.delete(array, 0, axis))})


def test_rows_of_other_spares() -> None:
    refuse("replace_rejected", row=np.full(1024, 255, np.uint8))
    refuse("replace_rejected", row=np.full(2049, 255, np.uint8))


@_EACH_ARRAY
def test_another_number_of_axes(kernel: str, name: str) -> None:
    array = arguments(kernel)[name]
    refuse(kernel, **{name: array[None].copy()})
    refuse(kernel, **{name: array.reshape(*array.shape, 1)})
    refuse(kernel, **{name: array[0].copy()})


@_EACH_ARRAY
def test_another_type(kernel: str, name: str) -> None:
    array = arguments(kernel)[name]
    for dtype in (np.int8, np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, np.float32, np.float64, bool):
        if array.dtype != dtype:
            refuse(kernel, **{name: array.astype(dtype)})


@_EACH_ARRAY
def test_another_byte_order(kernel: str, name: str) -> None:
    array = arguments(kernel)[name]
    if array.dtype.itemsize > 1:
        refuse(kernel, **{name: array.astype(array.dtype.newbyteorder(">"))})


@_EACH_ARRAY
def test_gaps_and_columns_first(kernel: str, name: str) -> None:
    """A copy made on the way would take with it what the kernel writes."""
    array = arguments(kernel)[name]
    gaps = np.zeros((*array.shape[:-1], array.shape[-1] * 2), array.dtype)[..., ::2]
    assert gaps.shape == array.shape
    refuse(kernel, **{name: gaps})
    refuse(kernel, **{name: array[..., ::-1]})
    if array.ndim > 1:
        refuse(kernel, **{name: np.asfortranarray(array)})


@_EACH_ARRAY
def test_no_array(kernel: str, name: str) -> None:
    refused = [[1], b"bytes", 1.0, memoryview(bytes(8)), *([] if name in OPTIONAL else [None])]
    for value in refused:
        if name not in WRITTEN[kernel]:
            refuse(kernel, **{name: value})
        with pytest.raises((TypeError, ValueError)):
            getattr(_native, kernel)(**{**arguments(kernel), name: value})


@pytest.mark.parametrize(("kernel", "name"), [(k, name) for k, names in WRITTEN.items() for name in names])
def test_results_into_memory_that_is_only_for_reading(kernel: str, name: str) -> None:
    array = arguments(kernel)[name]
    array.flags.writeable = False
    refuse(kernel, **{name: array})


@pytest.mark.parametrize("kernel", ["mask", "unmask", "encode_pad", "combine"])
def test_a_ring_that_is_not(kernel: str) -> None:
    for ring in (-1, 2, 2**31, 2**64, 0.0, "faithful", None):
        refuse(kernel, ring=ring)
    if kernel != "unmask":
        refuse(kernel, ring=1)  # the planes are those of 0


def test_rooms_that_integers_of_32_bits_do_not_have() -> None:
    for room in (0.0, -1.0, 0.999, 2.0**31, math.inf, -math.inf, math.nan, "1", None):
        refuse("mask", room=room)
    assert _native.mask(**arguments("mask") | {"room": 2.0**31 - 1})
    assert _native.mask(**arguments("mask") | {"room": 1})


def test_moduli_of_no_rejected_bytes() -> None:
    for modulus in (-1, 0, 128, 256, 2**32, 251.0, None):
        refuse("replace_rejected", modulus=modulus)
