"""What an estimate knows of a model: its frozen linears as they are offloaded, and a few sizes. Numbers only."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from cloister.adapters import PartName, SpfSpec
from cloister.pad import PadMode

SMALLEST_SIDE = 32
"""A product with fewer inputs or outputs stays inside, as `cloister.slicing` decides."""
MAX_ROWS = 1 << 15
"""Outputs of one masked layer at most, as `cloister.offload` cuts them."""


@dataclass(frozen=True)
class LinearShape:
    """Frozen linears that read the same features and are one message to the accelerator: q/k/v, gate/up, or one alone.

    Attributes:
        name: *public*.
        n_in, n_out: of the forward product; outputs of all members together.
        n_members: linears in it.
        block: which block it belongs to, from 0; None for a language-model head.
        has_backward: whether a gradient of its input is ever asked for. Below the first adapter nothing trains, so the
            linears that read the embeddings directly have none.
    """

    name: str
    n_in: int
    n_out: int
    n_members: int
    block: int | None
    has_backward: bool

    @property
    def n_weights(self) -> int:
        return self.n_in * self.n_out

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of the layers that a session makes of it: as many as keep each to `MAX_ROWS` outputs."""
        n_parts = -(-self.n_out // MAX_ROWS)
        sizes = [self.n_out // n_parts + (i < self.n_out % n_parts) for i in range(n_parts)]
        return tuple((self.n_in, size) for size in sizes)

    @property
    def is_head(self) -> bool:
        return self.block is None


@dataclass(frozen=True)
class UnitShape:
    """What SPF chooses from in every block: its head groups, or its neurons.

    Attributes:
        name: "heads" or "neurons".
        n_units: in a block.
        n_numbers: weights in the rows of one unit, over all linears that have rows of it.
    """

    name: PartName
    n_units: int
    n_numbers: int


@dataclass(frozen=True)
class ModelShape:
    """A backbone in numbers.

    Attributes:
        path, family: as `slicing.inspect_backbone` has them.
        n_layers: transformer blocks.
        hidden_size: features of a token between blocks.
        query_size: features of all attention heads together.
        kv_size: features of all keys of a token, which are those of its values.
        vocab_size: rows of the embedding.
        max_length: positions of a text.
        is_encoder: every token attends to all others; there is no language-model head.
        has_tied_head: the head's weight is the embedding's.
        linears: in the order of the model.
        units: head groups and neurons, of each block; empty where SPF does not know the layout.
        n_embedding: parameters of the embeddings, of tokens, positions and types, that a lookup reads.
        n_other: parameters of each block that are no linear's weight: norms and biases; the mean over the blocks.
        n_after: the same after the last block.
    """

    path: str
    family: str
    n_layers: int
    hidden_size: int
    query_size: int
    kv_size: int
    vocab_size: int
    max_length: int
    is_encoder: bool
    has_tied_head: bool
    linears: tuple[LinearShape, ...]
    units: tuple[UnitShape, ...]
    n_embedding: int
    n_other: float
    n_after: int

    def offloaded(self, pad: PadMode) -> tuple[LinearShape, ...]:
        """The linears that run masked; as `slicing.check_offload` decides: no head with lattice pads, nothing tiny."""
        return tuple(
            linear
            for linear in self.linears
            if min(linear.n_in, linear.n_out) >= SMALLEST_SIDE and not (linear.is_head and pad is PadMode.LATTICE)
        )

    def kept_inside(self, pad: PadMode) -> tuple[LinearShape, ...]:
        """The others, which the enclave computes in fp32."""
        masked = self.offloaded(pad)
        return tuple(linear for linear in self.linears if linear not in masked)

    @property
    def n_parameters(self) -> int:
        """Of the whole model, each once."""
        return self.n_embedding + round(self.n_other * self.n_layers) + self.n_after + self.n_stored(self.linears)

    def n_stored(self, linears: Iterable[LinearShape]) -> int:
        """Weights of linears, without a head that is the embedding."""
        return sum(linear.n_weights for linear in linears if not (linear.is_head and self.has_tied_head))

    def from_block(self, cut: int) -> tuple[LinearShape, ...]:
        """The linears of the far side of a cut, the head included. No gradient leaves it."""
        far = [linear for linear in self.linears if linear.block is None or linear.block >= cut]
        first = next((linear.name for linear in far if linear.block == cut), "")
        return tuple(replace(linear, has_backward=linear.has_backward and linear.name != first) for linear in far)

    def below_block(self, cut: int) -> tuple[LinearShape, ...]:
        """The linears of the near side of a cut, which only go forward."""
        return tuple(linear for linear in self.linears if linear.block is not None and linear.block < cut)


@dataclass(frozen=True)
class Workload:
    """What is trained, and how.

    Attributes:
        n_tokens: of a batch, which is one message a layer; also the length of the one text that it is taken for, up to
            the model's longest.
        rank: of LoRA on every linear of the blocks; 0 where a prefix trains.
        prefix_tokens: of a prefix of keys and values at every layer (P-tuning v2); 0 where LoRA trains.
        cut_layer: Method 2's number of near-side blocks.
        n_clients: institutions.
        feature_bytes: what Method 2's server keeps of decrypted features (`enclave.memory_budget_bytes`).
        spf: train SPF's rows, and LoRA on the attentions' output projections alone; None for LoRA or a prefix.
    """

    n_tokens: int
    rank: int
    prefix_tokens: int
    cut_layer: int
    n_clients: int
    feature_bytes: int
    spf: SpfSpec | None = None
