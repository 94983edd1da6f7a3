"""The unprotected twin: the same programs with encryption and masks off, to show that a search for leaks finds them."""

from __future__ import annotations

import os
import runpy
import sys

from cloister.channel._chunked import CHUNK_BYTES, SEALED_CHUNK_BYTES, TAG_BYTES, ChunkCipher


def insecure_disable_encryption() -> None:
    """From now on this process seals nothing: every "ciphertext" is its plaintext with zeros for tags."""

    def seal_into(self: ChunkCipher, first: int, plaintext: memoryview, out: memoryview) -> None:
        for i in range(-(-len(out) // SEALED_CHUNK_BYTES)):
            chunk = bytes(plaintext[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES])
            out[i * SEALED_CHUNK_BYTES : (i + 1) * SEALED_CHUNK_BYTES] = chunk + bytes(TAG_BYTES)

    def open_into(self: ChunkCipher, first: int, ciphertext: memoryview, out: memoryview) -> None:
        for i in range(-(-len(ciphertext) // SEALED_CHUNK_BYTES)):
            chunk = bytes(ciphertext[i * SEALED_CHUNK_BYTES : (i + 1) * SEALED_CHUNK_BYTES])[:-TAG_BYTES]
            out[i * CHUNK_BYTES : i * CHUNK_BYTES + len(chunk)] = chunk

    ChunkCipher.seal_into = seal_into
    ChunkCipher.open_into = open_into


def insecure_disable_masks() -> None:
    """From now on every pad of the mode otp that this process makes is zero: an accelerator gets the features."""
    import numpy as np

    from cloister.pad import Pad
    from cloister.pad._otp import OtpPads

    def make(self: OtpPads, n_tokens: int) -> Pad:
        r = np.zeros((self._format.n_planes, n_tokens, self.check.n_in), np.uint8)
        return self._pad(0, r, np.zeros((n_tokens, self.check.n_out), np.uint32))

    OtpPads.make = make


def insecure_main() -> None:
    """`python -m cloister.testing._plaintext MODULE ARGS...`: runs a process main without encryption and masks."""
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy comes before hardening here, which wants one thread
    insecure_disable_encryption()
    insecure_disable_masks()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    insecure_main()
