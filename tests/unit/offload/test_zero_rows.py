"""A row of zeros, as padding's gradient is, gives a row of zeros in every mode: no rounding of a pad comes out."""

from __future__ import annotations

import pytest
import torch

from cloister.offload import OffloadSession
from cloister.pad import Direction, PadMode
from cloister.ring import FORMATS, quantize_weight
from cloister.testing import FakeAccelerator


@pytest.mark.parametrize("direction", list(Direction), ids=str)
@pytest.mark.parametrize("pad", [PadMode.OTP, PadMode.LATTICE], ids=str)
@pytest.mark.parametrize("ring", list(FORMATS))
def test_zeros_stay_zeros_beside_other_rows(ring: str, pad: PadMode, direction: Direction) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 40, generator=generator)
    rows = torch.randn(5, 40, generator=generator) * 1e-3
    rows[2] = 0.0
    with OffloadSession(FakeAccelerator(), FORMATS[ring], pad=pad) as session:
        session.add("layer", quantize_weight(weight, FORMATS[ring], layer="layer"))
        run = session.forward if direction is Direction.FORWARD else session.backward
        found = run("layer", rows)
    expected = rows @ (weight.T if direction is Direction.FORWARD else weight)
    assert not found[2].any()
    assert torch.allclose(found, expected, atol=0.03 * float(expected.abs().max()))
