"""Encoding and decoding: tiny rings whole, the shipped ones at their edges, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.oracle import slow_ring as slow

from cloister.errors import OffloadError
from cloister.ring import FAITHFUL, FAST, FORMATS, LimbFormat, ResidueFormat, RingFormat

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)
TINY = pytest.mark.parametrize(
    "fmt",
    [
        ResidueFormat(name="tiny", weight_bits=3, moduli=(4, 3, 5)),
        ResidueFormat(name="odd", weight_bits=3, moduli=(3, 5)),
        LimbFormat(name="tiny", weight_bits=3, n_limbs=3, limb_bits=2),
        LimbFormat(name="bits", weight_bits=2, n_limbs=2, limb_bits=1),
    ],
    ids=lambda fmt: f"{type(fmt).__name__}-{fmt.name}",
)


def _int64(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def _tiny_planes(fmt: RingFormat, x: int) -> list[int]:
    if isinstance(fmt, ResidueFormat):
        return slow.residues(x, fmt.moduli)
    assert isinstance(fmt, LimbFormat)
    return slow.limbs(x, fmt.n_limbs, 2**fmt.limb_bits)


def test_the_formats_are_those_of_the_specification() -> None:
    assert {name: fmt.modulus for name, fmt in FORMATS.items()} == slow.MODULUS
    assert FAITHFUL.moduli == slow.MODULI["faithful"]
    assert FAITHFUL.modulus == 4_145_475_840
    assert [(fmt.n_planes, fmt.n_weight_planes, fmt.bytes_per_element, fmt.weight_bits, fmt.MAX_WEIGHT_BITS)
            for fmt in (FAITHFUL, FAST)] == [(4, 4, 4, 12, 16), (3, 1, 3, 8, 8)]  # fmt: skip


def test_the_table_of_the_specification_is_right() -> None:
    m = FAITHFUL.modulus
    rows = ((256, 16193265, 17), (255, 16256768, 32), (253, 16385280, 21), (251, 16515840, 182))
    for modulus, cofactor, inverse in rows:
        assert cofactor == m // modulus
        assert cofactor * inverse % modulus == 1


@TINY
def test_tiny_rings_whole_encoding(fmt: RingFormat) -> None:
    m = fmt.modulus
    values = list(range(-2 * m, 2 * m))
    planes = fmt.encode(_int64(*values))
    assert planes[:, 0].T.tolist() == [_tiny_planes(fmt, x) for x in values]
    assert len({tuple(p) for p in planes[:, 0, :m].T.tolist()}) == m  # one encoding an element
    assert fmt.decode_product(planes.int())[0].tolist() == [x % m for x in values]
    assert fmt.centre(_int64(*values))[0].tolist() == [slow.centre(x, m) for x in values]
    assert all(-m < 2 * y <= m for y in fmt.centre(_int64(*values))[0].tolist())


@TINY
def test_tiny_rings_whole_masking(fmt: RingFormat) -> None:
    """For all x, r and w: the masked product less the pad's is w x; and it is the integer product where that fits."""
    m = fmt.modulus
    x, r = (side.reshape(-1, 1) for side in torch.meshgrid(torch.arange(m), torch.arange(m), indexing="ij"))
    x = fmt.centre(x)
    for w in range(-(2 ** (fmt.weight_bits - 1)) + 1, 2 ** (fmt.weight_bits - 1)):
        weight = fmt.encode_weight(torch.tensor([[w]], dtype=torch.int16))
        masked, pad = (fmt.decode_product(fmt.encode(side).int() * weight.int()) for side in (x + r, r))
        y = fmt.centre(masked - pad)
        assert torch.equal(torch.remainder(y, m), torch.remainder(w * x, m))
        small = 2 * (w * x).abs() < m
        assert torch.equal(y[small], (w * x)[small])


@TINY
def test_a_masked_element_says_nothing(fmt: RingFormat) -> None:
    """Over all pads, the planes of x + r are the same set for every x: each encoding exactly once."""
    m = fmt.modulus
    r = torch.arange(m).unsqueeze(0)
    expected = sorted(map(tuple, fmt.encode(r)[:, 0].T.tolist()))
    for x in range(m):
        assert sorted(map(tuple, fmt.encode(r + x)[:, 0].T.tolist())) == expected


@BOTH
def test_edges(fmt: RingFormat) -> None:
    m = fmt.modulus
    values = [k * m // 2 + d for k, d in itertools.product(range(-4, 5), range(-2, 3))]
    values += [2**k + d for k in (7, 8, 15, 16, 23, 24, 31, 32, 62) for d in (-1, 0, 1)] + [2**63 - 1, -(2**63)]
    planes = fmt.encode(_int64(*values))
    assert planes.dtype == torch.int8
    assert planes[:, 0].T.tolist() == [slow.encode(x, fmt.name) for x in values]
    assert fmt.decode_product(planes.int())[0].tolist() == [x % m for x in values]
    assert fmt.centre(_int64(*values))[0].tolist() == [slow.centre(x, m) for x in values]
    assert fmt.centre(_int64(m // 2, m // 2 + 1))[0].tolist() == [m // 2, 1 - m // 2]


@BOTH
def test_decoding_is_total(fmt: RingFormat) -> None:
    """Whatever int32 an accelerator returns, all extremes together among it."""
    extremes = (-(2**31), -1, 0, 1, 2**31 - 1)
    cases = list(itertools.product(extremes, repeat=fmt.n_planes))
    found = fmt.decode_product(torch.tensor(cases, dtype=torch.int32).T.unsqueeze(1))[0].tolist()
    assert found == [slow.decode(list(case), fmt.name) for case in cases]


@pytest.mark.parametrize(("fmt", "bits"), [(FAITHFUL, 16), (FAST, 8)], ids=["faithful", "fast"])
def test_every_weight_encodes(fmt: RingFormat, bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    values = range(-top, top + 1)
    planes = fmt.encode_weight(torch.tensor([list(values)], dtype=torch.int16))
    assert planes.dtype == torch.int8
    assert planes[:, 0].T.tolist() == [slow.encode_weight(w, fmt.name) for w in values]


@BOTH
def test_inputs_are_kept(fmt: RingFormat) -> None:
    x = torch.arange(-600, 600).reshape(2, 600)
    planes = fmt.encode(x)
    assert planes.shape == (fmt.n_planes, 2, 600)
    before = planes.int()
    fmt.decode_product(before)
    assert torch.equal(x, torch.arange(-600, 600).reshape(2, 600))
    assert torch.equal(before, planes.int())


@BOTH
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_empty(fmt: RingFormat, shape: tuple[int, int]) -> None:
    planes = fmt.encode(torch.zeros(shape, dtype=torch.int64))
    assert planes.shape == (fmt.n_planes, *shape)
    assert fmt.decode_product(planes.int()).shape == shape


@BOTH
def test_other_types_are_refused(fmt: RingFormat) -> None:
    wrong = torch.zeros(1, 1)
    for call in (fmt.encode, fmt.encode_weight, fmt.decode_product, fmt.centre):
        with pytest.raises(OffloadError, match="ring tensor"):
            call(wrong)
    with pytest.raises(OffloadError, match=f"{fmt.n_planes} planes, not 2"):
        fmt.decode_product(torch.zeros((2, 1, 1), dtype=torch.int32))


def test_moduli_with_a_common_factor_have_no_decoding() -> None:
    fmt = ResidueFormat(name="wrong", weight_bits=2, moduli=(4, 6))
    with pytest.raises(ValueError, match="invertible"):
        fmt.decode_product(torch.zeros((2, 1, 1), dtype=torch.int32))


def test_formats_are_values() -> None:
    assert ResidueFormat(name="faithful", weight_bits=12, moduli=(256, 255, 253, 251)) == FAITHFUL
    with pytest.raises(AttributeError):
        FAST.n_limbs = 4  # type: ignore[misc]
