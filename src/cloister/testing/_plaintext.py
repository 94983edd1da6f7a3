"""The unprotected twin: the same programs with encryption switched off, to show that a search for leaks finds them."""

from __future__ import annotations

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


def insecure_main() -> None:
    """`python -m cloister.testing._plaintext MODULE ARGS...`: runs a process main without encryption."""
    insecure_disable_encryption()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    insecure_main()
