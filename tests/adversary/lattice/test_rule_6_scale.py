"""Rule 6: no reaction channel. Nothing overflows, so a failed check means tampering, and ends everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.adversary.lattice.conftest import MakeWeight, OpenSource

from cloister.errors import CloisterError, IntegrityError, OffloadError
from cloister.offload import OffloadSession
from cloister.pad import LATTICE_PARAMETERS, LatticePads, PadMode
from cloister.ring import FORMATS, QuantizedWeight, RingFormat, quantize_rows, row_room
from cloister.testing import FakeAccelerator, FakeLyingAccelerator

NAMES = pytest.mark.parametrize("name", list(LATTICE_PARAMETERS))


def session_of(accelerator: FakeAccelerator, weight: QuantizedWeight, name: str) -> OffloadSession:
    made = OffloadSession(accelerator, weight.format, pad=PadMode.LATTICE, lattice=LATTICE_PARAMETERS[name])
    made.add("q", weight)
    return made


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("head_room", [1.0000001, 2, 16])
def test_head_room_is_refused(fmt: RingFormat, head_room: float):
    with pytest.raises(OffloadError, match="head-room is"):
        OffloadSession(FakeAccelerator(), fmt, pad=PadMode.LATTICE, head_room=head_room)


@NAMES
def test_the_limit_leaves_what_rounding_may_take(open_source: OpenSource, make_weight: MakeWeight, name: str):
    source, weight = open_source(name=name, n_out=40, n_in=100), make_weight(name, 40, 100)
    lost = (1.0 if name == "fast-mlwe" else 0.5) * 10 + 1
    assert source.input_limit == pytest.approx(weight.forward_limit - lost, abs=1e-6)
    longest = float(weight.row_norms.max())
    assert longest * (source.input_limit + lost - 1) + 0.5 < weight.format.modulus / 2
    x = torch.randn(50, 100, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 50).unsqueeze(1)
    x_q, _ = quantize_rows(x, source.input_limit)
    assert float(x_q.to(torch.float64).norm(dim=1).max()) <= source.input_limit
    assert row_room(source.input_limit, 100) < row_room(weight.forward_limit, 100)


@NAMES
def test_the_worst_inputs_pass_their_check(make_weight: MakeWeight, name: str):
    """Rows along the longest row of the weight, of every size, and outliers: no honest answer fails its check."""
    weight = make_weight(name, 30, 60)
    with session_of(FakeAccelerator(), weight, name) as session:
        longest = weight.w_q[weight.row_norms.argmax()].to(torch.float32)
        rows = [longest * scale for scale in (1e-30, 1.0, -1.0, 3e30)] + [torch.zeros(60)]
        rows += [torch.eye(60)[i] * scale for i in (0, 59) for scale in (1e-20, -7.0, 1e20)]
        rows += [torch.randn(60, generator=torch.Generator().manual_seed(i)) for i in range(20)]
        for _ in range(3):
            session.forward("q", torch.stack(rows))
            session.backward("q", torch.randn(70, 30, generator=torch.Generator().manual_seed(5)))
        assert session.describe()["overflows"] == 0


@pytest.mark.parametrize("where", ["first token", "last token", "one bit", "every element"])
@NAMES
def test_a_failed_check_ends_everything(make_weight: MakeWeight, name: str, where: str):
    """One uniform abort: no retry, no token, no output in the words; secrets, keys and rho are zero."""

    def change(answer: np.ndarray) -> None:
        if where == "every element":
            answer += np.uint32(1)
        else:
            answer[0 if where == "first token" else -1, 0] ^= np.uint32(1 << (20 if where == "one bit" else 0))

    accelerator = FakeLyingAccelerator(change)
    session = session_of(accelerator, make_weight(name, 8, 9), name)
    sources = [side.source for side in session._layers["q"].sides.values()]
    assert all(isinstance(source, LatticePads) for source in sources)
    arrays = [array for source in sources for array in (source._secrets.s, source._secrets.z)]  # pyright: ignore
    arrays += [array for source in sources for array in (source.check.rho, source.check.v)]
    with pytest.raises(IntegrityError) as caught:
        session.forward("q", torch.randn(7, 9, generator=torch.Generator().manual_seed(1)))
    assert str(caught.value).startswith("layer q, forward: ")
    assert not [character for character in str(caught.value) if character.isdigit()]
    assert len(accelerator.seen) == 1
    assert not any(array.any() for array in arrays)
    for attempt in (
        lambda: session.forward("q", torch.ones(1, 9)),
        lambda: sources[0].take(1),
        lambda: sources[1].take(1),
    ):
        with pytest.raises(CloisterError):
            attempt()
