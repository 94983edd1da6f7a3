"""Rule 8: W S is computed inside, from the integers of the digest; v, w and S are wiped; no device holds a key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.adversary.lattice.conftest import MakeWeight, OpenSource

from cloister import ring
from cloister.kernels import _native
from cloister.offload import OffloadSession
from cloister.pad import CheckKeys, Direction, LatticePads, PadKeys, PadMode, PadPool
from cloister.pad import _lattice as lattice
from cloister.ring import FAITHFUL, FAST, quantize_weight
from cloister.testing import FakeAccelerator

N = 1024


def test_digits_and_products_are_zeroed(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    """Everything between the generator and the transformed secrets: bytes, digits, accumulators, sums."""
    seen: dict[str, list[np.ndarray]] = {"drawn": [], "digits": [], "products": [], "values": []}
    real_digits, real_product, real_encode = _native.lattice_digits, ring.product, _native.lattice_encode

    class Kernels:
        @staticmethod
        def lattice_digits(drawn: np.ndarray, digits: np.ndarray) -> None:
            real_digits(drawn, digits)
            seen["drawn"].append(drawn)
            seen["digits"].append(digits)

        @staticmethod
        def lattice_encode(values: np.ndarray, code: int, to: np.ndarray) -> None:
            assert values.any()
            real_encode(values, code, to)
            seen["values"].append(values)

    def product(x: torch.Tensor, weight: torch.Tensor, fmt: ring.RingFormat, *, out: torch.Tensor) -> torch.Tensor:
        assert x.any() and {x.device.type, weight.device.type, out.device.type} == {"cpu"}
        seen["products"].append(out.numpy())
        return real_product(x, weight, fmt, out=out)

    monkeypatch.setattr(lattice, "_native", Kernels)
    monkeypatch.setattr(ring, "product", product)
    weight = make_weight("faithful", 300, 20)
    source = keys.lattice("q", Direction.FORWARD, weight, CheckKeys.generate(weight, Direction.FORWARD), pool=pool)
    assert {name: len(arrays) for name, arrays in seen.items()} == {
        "drawn": 1, "digits": 1, "products": 4, "values": 3,
    }  # fmt: skip
    for name, arrays in seen.items():
        assert not any(array.any() for array in arrays), name
    assert source._secrets.s.any() and source._secrets.z.any()


def test_products_that_fail_are_zeroed_too(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    held: list[torch.Tensor] = []
    real, add = ring.product, torch.Tensor.add_

    def product(x: torch.Tensor, weight: torch.Tensor, fmt: ring.RingFormat, *, out: torch.Tensor) -> torch.Tensor:
        held.extend((x, real(x, weight, fmt, out=out)))
        if len(held) > 3:
            raise MemoryError
        return out

    def recorded(total: torch.Tensor, found: torch.Tensor, *, alpha: int) -> torch.Tensor:
        held.append(total)
        return add(total, found, alpha=alpha)

    monkeypatch.setattr(torch.Tensor, "add_", recorded)

    monkeypatch.setattr(ring, "product", product)
    weight = make_weight("faithful", 300, 20)
    with pytest.raises(MemoryError):
        keys.lattice("q", Direction.FORWARD, weight, CheckKeys.generate(weight, Direction.FORWARD), pool=pool)
    assert len(held) == 5 and not any(tensor.any() for tensor in held)


@pytest.mark.parametrize("direction", list(Direction))
def test_the_product_is_of_the_integers_of_the_digest(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch, direction: Direction
):
    """A weight whose integers were changed has another digest, and other z: u no longer takes off what r puts on."""
    values: list[np.ndarray] = []
    real = lattice._encode

    def recorded(array: np.ndarray, code: int, to: np.ndarray, start: int) -> None:
        values.append(array.copy())
        real(array, code, to, start)

    monkeypatch.setattr(lattice, "_encode", recorded)
    weight = make_weight("fast", 6, 5)
    digest = weight.digest()
    keys.lattice("q", direction, weight, CheckKeys.generate(weight, direction), pool=pool)
    s, z = values
    w_q = weight.w_q.numpy().astype(np.int64)
    assert np.array_equal(z, s @ (w_q.T if direction is Direction.FORWARD else w_q))
    weight.w_q[0, 0] += 1
    assert weight.digest() != digest


@pytest.mark.parametrize("fmt", [FAST, FAITHFUL], ids=lambda fmt: fmt.name)
def test_keys_never_reach_a_device(fmt: ring.RingFormat):
    """What the accelerator was sent, whole: no row of a secret, of z, of a check key or of a pad is in it."""
    accelerator = FakeAccelerator()
    sent: list[bytes] = []
    load = accelerator.load

    def recorded(layer: str, weight: ring.QuantizedWeight) -> None:
        sent.extend((weight.w_q.numpy().tobytes(), weight.scales.numpy().tobytes()))
        load(layer, weight)

    accelerator.load = recorded
    with OffloadSession(accelerator, fmt, pad=PadMode.LATTICE) as session:
        values = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
        session.add("q", quantize_weight(values, fmt, layer="q"))
        session.forward("q", torch.randn(40, 30, generator=torch.Generator().manual_seed(2)))
        session.backward("q", torch.randn(40, 20, generator=torch.Generator().manual_seed(3)))
        sent += [planes.tobytes() for _, _, planes in accelerator.seen]
        rows: list[bytes] = []
        for side in session._layers["q"].sides.values():
            source = side.source
            assert isinstance(source, LatticePads)
            (rest,) = source._rests
            for array in (
                source._secrets.s,
                source._secrets.z,
                source.check.rho,
                source.check.v,
                rest.pad.r,
                rest.pad.u,
            ):
                assert isinstance(array, np.ndarray)  # numpy's memory is the process's own
                whole = array.reshape(-1).view(np.uint8)
                pieces = whole[: len(whole) // 16 * 16].reshape(-1, 16)
                rows += [row.tobytes() for row in pieces[:: len(pieces) // 50 + 1] if np.count_nonzero(row) > 8]
            rows.append(bytes(source._key))
        assert len(rows) > 300
        assert not [row for row in rows if any(row in each for each in sent)]


def test_no_tensor_is_moved_while_secrets_are_made(
    keys: PadKeys, pool: PadPool, make_weight: MakeWeight, monkeypatch: pytest.MonkeyPatch
):
    """The weight may lie on a device; it comes to the CPU, and nothing goes the other way."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was moved to a device")

    for name in ("cuda", "to_mkldnn", "pin_memory", "share_memory_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    devices: set[str] = set()
    real = torch.Tensor.to

    def to(tensor: torch.Tensor, *arguments: object, **options: object) -> torch.Tensor:
        moved = real(tensor, *arguments, **options)
        devices.add(moved.device.type)
        return moved

    monkeypatch.setattr(torch.Tensor, "to", to)
    weight = make_weight("faithful")
    keys.lattice("q", Direction.FORWARD, weight, CheckKeys.generate(weight, Direction.FORWARD), pool=pool).take(5)
    assert devices == {"cpu"}


def test_the_working_memory_of_a_block_is_zeroed(open_source: OpenSource):
    """A block of zeros after one of secrets has nothing of it, and rows beyond a block stay as they were."""
    source = open_source(n_in=70, n_out=40)
    source.take(5)
    secrets = source._secrets
    zeros = [np.zeros_like(array) for array in (secrets.s, secrets.z)]
    pad = source._empty(N)
    a = np.zeros((1, 2, N), np.uint32)
    check = source.check
    out = (pad.r, pad.u, pad.correction)
    assert _native.lattice_block(1, a, *zeros, check.v, check.rho, None, *out, 0)
    assert not any(array.any() for array in out)
