"""Products of planes: exact at the extremes, at awkward shapes, padded for CUDA; and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cloister.errors import OffloadError
from cloister.ring import FAITHFUL, FAST, MAX_FEATURES, RingFormat, product
from cloister.ring import _products as products

BOTH = pytest.mark.parametrize("fmt", [FAITHFUL, FAST], ids=lambda fmt: fmt.name)


def _planes(n: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (n, rows, columns), generator=generator, dtype=torch.int8)


def _slow(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.long() @ w.long().transpose(1, 2)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (0, 4, 3), (17, 8, 8), (16, 31, 33), (40, 257, 9)])
def test_exact(fmt: RingFormat, shape: tuple[int, int, int]) -> None:
    tokens, features, out = shape
    x, w = _planes(fmt.n_planes, tokens, features), _planes(fmt.n_weight_planes, out, features, seed=1)
    found = product(x, w, fmt)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), _slow(x, w))
    turned = w.transpose(1, 2).contiguous().transpose(1, 2)  # as backward_planes are
    assert torch.equal(product(x, turned, fmt), found)
    strided = torch.cat([x, x], dim=2)[:, :, :features]
    assert torch.equal(product(strided, w, fmt), found)


@BOTH
def test_into_memory_of_the_caller(fmt: RingFormat) -> None:
    x, w = _planes(fmt.n_planes, 3, 5), _planes(fmt.n_weight_planes, 2, 5, seed=1)
    out = torch.full((fmt.n_planes, 3, 2), 7, dtype=torch.int32)
    assert product(x, w, fmt, out=out) is out
    assert torch.equal(out.long(), _slow(x, w))
    for wrong in (out[:, :2], out.long(), torch.zeros((fmt.n_planes, 2, 3), dtype=torch.int32).transpose(1, 2)):
        with pytest.raises(OffloadError, match="does not go into"):
            product(x, w, fmt, out=wrong)


def _layouts(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """The same shape in every kind of memory, a side of size 1 with strides of its own choosing among them."""
    data = _planes(1, 3 * rows, 3 * columns)[0]
    return {
        "contiguous": data[:rows, :columns].contiguous(),
        "transposed": data[:columns, :rows].contiguous().t() if columns <= len(data) else data[:rows, :columns],
        "cut": data[:rows, :columns],
        "stepped": data[::3, ::3],
        "one row": data[:1, :columns].expand(rows, columns),
        "one column": data[:rows, :1].expand(rows, columns),
        "stride 0": data[:rows, :columns].contiguous().as_strided((rows, columns), (0, 1)),
    }


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("features", [1, 2, 17])
@pytest.mark.parametrize("out", [1, 2, 17])
def test_memory_layout_does_not_matter(tokens: int, features: int, out: int) -> None:
    """`torch._int_mm` alone returns memory that it never wrote for many of these (pytorch issue 195066)."""
    for x_name, x in _layouts(tokens, features).items():
        for w_name, w in _layouts(out, features).items():
            found = product(x.expand(3, *x.shape), w.unsqueeze(0), FAST)
            assert torch.equal(found[1].long(), x.long() @ w.long().T), (x_name, w_name)
            found = product(x.expand(4, *x.shape), w.expand(4, *w.shape), FAITHFUL)
            assert torch.equal(found[2].long(), x.long() @ w.long().T), (x_name, w_name)


@BOTH
@pytest.mark.parametrize("signs", [(-128, -128), (-128, 127), (127, 127)])
def test_the_widest_layer_at_the_extremes(fmt: RingFormat, signs: tuple[int, int]) -> None:
    x = torch.full((fmt.n_planes, 2, MAX_FEATURES), signs[0], dtype=torch.int8)
    w = torch.full((fmt.n_weight_planes, 3, MAX_FEATURES), signs[1], dtype=torch.int8)
    assert product(x, w, fmt).unique().tolist() == [signs[0] * signs[1] * MAX_FEATURES]


def test_one_feature_more_is_refused() -> None:
    x = torch.zeros((3, 1, MAX_FEATURES + 1), dtype=torch.int8)
    with pytest.raises(OffloadError, match="131072 features does not fit"):
        product(x, x[:1], FAST)
    assert MAX_FEATURES * 2**14 < 2**31 <= (MAX_FEATURES + 1) * 2**14


@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 8, 8), (24, 16, 8), (25, 15, 9), (40, 64, 64), (0, 8, 8)])
def test_padding_for_cuda(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, features, out = shape
    seen: list[tuple[int, ...]] = []

    def int_mm(x: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> None:
        seen.append((*x.shape, *weight.shape))
        torch._int_mm(x, weight.t(), out=found)

    monkeypatch.setattr(products, "_int_mm", int_mm)
    x, w = _planes(1, tokens, features)[0], _planes(1, out, features, seed=1)[0]
    found = torch.full((tokens, out), 7, dtype=torch.int32)
    products._multiply_padded(x, w, found)
    assert torch.equal(found.long(), x.long() @ w.long().T)
    ((m, k, n, k_again),) = seen
    assert k == k_again
    assert m > 16 and m % 8 == k % 8 == n % 8 == 0  # what torch._int_mm asks of CUDA tensors


def test_on_cuda_sizes_are_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(products, "_multiply_padded", lambda *tensors: given.extend(tensors))
    x, weight, out = SimpleNamespace(is_cuda=True), object(), object()
    products._multiply(x, weight, out)  # type: ignore[arg-type]
    assert given == [x, weight, out]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 8, 8), (25, 15, 9), (40, 257, 33)])
def test_exact_on_cuda(fmt: RingFormat, shape: tuple[int, int, int]) -> None:
    tokens, features, out = shape
    x, w = _planes(fmt.n_planes, tokens, features), _planes(fmt.n_weight_planes, out, features, seed=1)
    assert torch.equal(product(x.cuda(), w.cuda(), fmt).cpu().long(), _slow(x, w))
    turned = w.transpose(1, 2).contiguous().cuda().transpose(1, 2)
    assert torch.equal(product(x.cuda(), turned, fmt).cpu().long(), _slow(x, w))


@pytest.fixture
def unchecked_kernel():
    products.check_kernel.cache_clear()
    yield
    products.check_kernel.cache_clear()


@pytest.mark.usefixtures("unchecked_kernel")
def test_a_kernel_that_saturates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As x86 before VNNI: the first operand unsigned, and pairs of products cut to 16 bits."""

    def saturating(x: torch.Tensor, weight: torch.Tensor, found: torch.Tensor) -> None:
        terms = (x.long() + 128).unsqueeze(1) * weight.long().unsqueeze(0)
        pairs = (terms[:, :, ::2] + terms[:, :, 1::2]).clamp(-(2**15), 2**15 - 1)
        found.copy_(pairs.sum(2) - 128 * weight.long().sum(1))

    monkeypatch.setattr(products, "_int_mm", saturating)
    with pytest.raises(OffloadError, match="device cpu is not exact") as caught:
        product(_planes(3, 2, 2), _planes(1, 2, 2), FAST)
    assert "VNNI" in caught.value.hint


@pytest.mark.usefixtures("unchecked_kernel")
def test_a_kernel_is_checked_once() -> None:
    for _ in range(3):
        product(_planes(3, 2, 2), _planes(1, 2, 2), FAST)
    assert products.check_kernel.cache_info().misses == 1


@BOTH
@pytest.mark.parametrize(
    ("x", "w", "says"),
    [
        ((1, 2, 3), (1, 4, 3), "not of the format"),
        ((4, 2, 3), (3, 4, 3), "not of the format"),
        ((3, 2, 3), (4, 4, 3), "not of the format"),
        ((4, 2, 3), (4, 4, 5), "no product"),
        ((4, 2), (4, 4, 2), "no product"),
        ((4, 2, 3), (4, 3), "no product"),
    ],
)
def test_shapes_that_do_not_belong(fmt: RingFormat, x: tuple[int, ...], w: tuple[int, ...], says: str) -> None:
    with pytest.raises(OffloadError, match=says):
        product(torch.zeros(x, dtype=torch.int8), torch.zeros(w, dtype=torch.int8), fmt)


def test_no_features_is_refused() -> None:
    with pytest.raises(OffloadError, match="over 0 features"):
        product(torch.zeros((3, 2, 0), dtype=torch.int8), torch.zeros((1, 2, 0), dtype=torch.int8), FAST)


@pytest.mark.parametrize("types", [(torch.uint8, torch.int8), (torch.int8, torch.int32)])
def test_planes_are_int8(types: tuple[torch.dtype, torch.dtype]) -> None:
    x, w = torch.zeros((3, 2, 4), dtype=types[0]), torch.zeros((1, 2, 4), dtype=types[1])
    with pytest.raises(OffloadError, match="planes are int8"):
        product(x, w, FAST)
