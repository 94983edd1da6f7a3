"""The pad keys of a process: made when it starts, stored nowhere, one for each job, layer and direction."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from cloister.errors import PadExhaustedError, PadReuseError
from cloister.pad._check import CheckKeys
from cloister.pad._guard import ProcessBound
from cloister.pad._lattice import LATTICE_PARAMETERS, LatticeParameters, LatticeSecrets
from cloister.pad._lattice_pads import LatticePads
from cloister.pad._modes import Direction
from cloister.pad._pool import PadPool
from cloister.pad._stream import KEY_BYTES, PadStream, derive_key

if TYPE_CHECKING:
    from cloister.ring import QuantizedWeight


class PadKeys(ProcessBound):
    """The key of one job at a time, and under it a stream or lattice secrets for each layer and direction. Thread-safe.

    The job key is 32 bytes of os.urandom, and no caller can give another: a restarted process and a restored copy of
    any file have other pads. It cannot be copied or pickled, and refuses to work in a forked child.
    """

    __slots__ = ("_key", "_lattices", "_lock", "_n_jobs", "_n_lattices", "_streams")

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._key = bytearray()
        self._n_jobs = 0
        self._n_lattices = 0
        self._streams: dict[tuple[str, Direction], PadStream] = {}
        self._lattices: dict[tuple[str, Direction], LatticePads] = {}
        self.new_job()

    def __repr__(self) -> str:
        return f"PadKeys(n_jobs={self._n_jobs}, n_streams={len(self._streams)})"

    def new_job(self) -> None:
        """Retire every stream, close every source of lattice pads, and start over with a fresh key.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._retire()
            self._n_jobs += 1
            self._key[:] = os.urandom(KEY_BYTES)

    def stream(self, layer: str, direction: Direction) -> PadStream:
        """The pads of a layer and direction in this job: one stream, with one ledger, however often asked for.

        Args:
            layer: *public*, the layer's name in the model.
            direction: *public*.

        Raises:
            PadReuseError: in a forked process.
            PadExhaustedError: after `close`.
        """
        self._stay_home()
        with self._lock:
            found = self._streams.get((layer, direction))
            if found is None:
                key = self._derive(b"stream", layer, direction)
                found = self._streams[layer, direction] = PadStream(key)
            return found

    def lattice(
        self,
        layer: str,
        direction: Direction,
        weight: QuantizedWeight,
        check: CheckKeys,
        *,
        pool: PadPool,
        parameters: LatticeParameters | None = None,
    ) -> LatticePads:
        """The lattice pads of a layer and direction in this job, with fresh secrets of their own.

        Takes seconds for a wide layer: W s is computed here, in the enclave.

        Args:
            layer: *public*, the layer's name in the model.
            direction: *public*.
            weight: *public*, of the layer.
            check: *secret*, of this layer and direction; from now on the source's, which zeroes it.
            pool: shared by the sources of a session.
            parameters: *public*, otherwise those of the weight's format.

        Raises:
            PadReuseError: the layer has such pads in this direction, which are not closed; or in a forked process.
            PadExhaustedError: after `close`.
            PadError: parameters or check keys that do not fit the weight.
            RingOverflowError: the weight leaves no room for the rounding of these pads.
        """
        self._stay_home()
        with self._lock:
            before = self._lattices.get((layer, direction))
            if before is not None and not before.ledger.is_retired:
                raise PadReuseError(f"the layer {layer}, {direction}, has lattice secrets, which serve one source only")
            # Numbered, so that the secrets that follow closed ones have another key.
            key = self._derive(b"lattice", layer, direction, self._n_lattices.to_bytes(8, "big"))
            self._n_lattices += 1
            chosen = parameters or LATTICE_PARAMETERS[weight.format.name]
            secrets = LatticeSecrets.generate(key, weight, direction, chosen)
            try:
                made = self._lattices[layer, direction] = LatticePads(key, secrets, check, pool)
            except BaseException:
                secrets.wipe()
                raise
            return made

    def close(self) -> None:
        """Retire every stream, close every source of lattice pads, and zero the job's key. May be called again.

        Raises:
            PadReuseError: in a forked process.
        """
        self._stay_home()
        with self._lock:
            self._retire()
            self._key.clear()

    def _derive(self, kind: bytes, layer: str, direction: Direction, *more: bytes) -> bytearray:
        if not self._key:
            raise PadExhaustedError("the pad keys were closed")
        labels = (kind, self._n_jobs.to_bytes(8, "big"), layer.encode(), direction.encode(), *more)
        return bytearray(derive_key(self._key, *labels))

    def _retire(self) -> None:
        for stream in self._streams.values():
            stream.retire()
        for source in self._lattices.values():
            source.close()
        self._streams.clear()
        self._lattices.clear()
        self._key[:] = bytes(len(self._key))
