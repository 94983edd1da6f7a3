"""What sealing and attestation add to Method 2: its data path with both, beside the same with neither.

`ours` is what a run of three clients does, in one process: a handshake with evidence for every client, the near sides
into sealed shards on a folder store, their verification, the far side's training and evaluation. `peer` is the same
code without the handshakes, and with a cipher that copies and gives a tag of zeros; shards, manifests and their hashes
stay. Start-up, relay and evaluation at the clients, which cost a whole run more time, are left out of both, so the
share of a whole run's wall time is smaller than the one told here.

    python bench/protection_share.py [--quick] [--pairs 7] [--out bench/results/protection_share.csv]

Needs the project's data folder (CLOISTER_SHARED, or `shared` beside the checkout) and the `quickstart` extra.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench._common import load_average, out_path, row, write_csv
from bench.boundary_cost import CLIENTS, Setting, run_sealed, seal, settings
from bench.channel import Parties

TAG = bytes(16)
GOAL = "<= 1.03"


class NoCipher:
    """AES-GCM's interface: copies, and a tag of zeros."""

    def __init__(self, key: bytes) -> None:
        pass

    def encrypt_into(self, nonce: bytes, data: memoryview, aad: None, out: memoryview) -> None:
        out[: len(data)] = data
        out[len(data) :] = TAG

    def decrypt_into(self, nonce: bytes, data: memoryview, aad: None, out: memoryview) -> None:
        out[:] = data[: len(data) - len(TAG)]


@contextlib.contextmanager
def unprotected() -> Iterator[None]:
    with mock.patch("cloister.channel._chunked.AESGCM", NoCipher):
        yield


def path_s(setting: Setting, folder: Path, *, is_protected: bool) -> dict[str, float]:
    """Seconds of one way through, and of its handshakes."""
    folder.mkdir()
    parties = Parties(folder)  # a platform is provisioned once in its life
    began = time.perf_counter()
    with contextlib.nullcontext() if is_protected else unprotected():
        for _ in CLIENTS if is_protected else ():
            parties.shake()
        shaken = time.perf_counter()
        run_sealed(setting, seal(setting, "int8", folder), seed=0)
    found = {"whole": time.perf_counter() - began, "handshakes": shaken - began}
    shutil.rmtree(folder)
    return found


def measure(setting: Setting, folder: Path, n_pairs: int) -> list[dict[str, object]]:
    """Pairs; who begins changes. The first pair of all only warms up."""
    ours: list[dict[str, float]] = []
    peer: list[dict[str, float]] = []
    for pair in range(n_pairs + 1):
        for is_protected in (True, False) if pair % 2 else (False, True):
            found = path_s(setting, folder / "run", is_protected=is_protected)
            (ours if is_protected else peer).append(found)
        print(f"{setting.name}: {ours[-1]['whole']:.2f} s / {peer[-1]['whole']:.2f} s", file=sys.stderr)
    whole = [[found["whole"] for found in side[1:]] for side in (ours, peer)]
    shakes = [found["handshakes"] for found in ours[1:]]
    return [
        row(f"{setting.name}: data path with sealing and attestation / with neither", *whole, "s", GOAL),
        row(f"{setting.name}: handshakes with evidence of {len(CLIENTS)} clients / data path", shakes, whole[1], "s"),
    ]


def main() -> None:
    """Runs alone; writes the CSV and prints where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run: two pairs, few examples")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if load_average() > 1:
        print(f"warning: this machine is busy (load {load_average():.1f})", file=sys.stderr)
    size = {"n_train": 96, "n_test": 60, "epochs": 1} if args.quick else {"n_train": 600, "n_test": 400, "epochs": 1}
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for setting in settings(Path(scratch), **size):
            rows += measure(setting, Path(scratch), 2 if args.quick else args.pairs)
    write_csv(out_path("protection_share", args.out, quick=args.quick), rows)


if __name__ == "__main__":
    main()
