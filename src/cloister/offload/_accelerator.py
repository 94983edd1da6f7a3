"""What an accelerator is to the enclave: it multiplies masked planes by layers that it was given, perhaps wrongly.

Nothing that passes here is secret: planes and answers are *masked*, weights, shapes and order are *public*.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Int8, UInt32

if TYPE_CHECKING:
    from cloister.pad import Direction
    from cloister.ring import QuantizedWeight


class AcceleratorCall(Protocol):
    """One product. `planes` is where its input belongs, until the context ends."""

    @property
    def planes(self) -> Int8[np.ndarray, "planes tokens in"]:
        """*Masked*: whatever is written here is the accelerator's to see. What it holds before that is arbitrary."""
        ...

    def multiply(self) -> UInt32[np.ndarray, "tokens out"]:
        """The answer, *masked*; once a call.

        Valid until the context ends. The accelerator may change it at any time, and it may hold any uint32 at all: the
        caller reads every element once, and checks what came of it.

        Raises:
            AcceleratorLostError: it died, hung up, answered in another form, or did not answer in time. Whether it saw
                the planes is not known: their pad is spent.
            OffloadError: it refused, with its stable code in the cause.
        """
        ...


class Accelerator(Protocol):
    """An untrusted device that holds integer weights and multiplies by them. Methods are for one thread at a time."""

    def load(self, layer: str, weight: QuantizedWeight) -> None:
        """Give it the integers of a layer, *public*; the same layer again replaces it.

        Raises:
            AcceleratorLostError: see `AcceleratorCall.multiply`. `revive` loads this layer too.
            OffloadError: it refused.
        """
        ...

    def call(self, layer: str, direction: Direction, n_tokens: int) -> AbstractContextManager[AcceleratorCall]:
        """A product with a loaded layer: forward with W_q, backward with its transpose. One is open at a time.

        Raises:
            OffloadError: the layer was never loaded, another call is open, or so many tokens are over a limit.
            AcceleratorLostError: it was lost before, and not revived.
        """
        ...

    def revive(self) -> None:
        """After an `AcceleratorLostError`: a fresh process or connection with every loaded layer loaded again.

        Raises:
            OffloadError: it cannot be had again.
        """
        ...

    def close(self) -> None:
        """Let it go. May be called again."""
        ...

    def describe(self) -> dict[str, object]:
        """For reports, *public*: `device` and `kernel` as it says, `bytes_out`, `bytes_in`, `calls`, `restarts`."""
        ...
