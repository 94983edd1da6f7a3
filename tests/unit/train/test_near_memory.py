"""The near side reads, computes, seals and stores more than the process may hold in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

N_ROWS = 1500
CAP_BYTES = 96 << 20

# Runs in its own process: RLIMIT_DATA counts every private writable page, so what is over the cap cannot be allocated.
PROGRAM = """
import json, resource, sys
from pathlib import Path
import torch
from cloister import channel, train, wire

folder, kind, cap = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
H, T = 512, 128

class Words:
    pad_token_id, eos_token_id, sep_token_id, model_input_names = 0, None, None, ("input_ids",)
    def __call__(self, texts, pair=None, **_):
        one = lambda text: [1 + ord(c) % 7 for c in text[:T]]
        return {"input_ids": one(texts) if isinstance(texts, str) else [one(text) for text in texts]}

table = torch.randn(8, H, generator=torch.Generator().manual_seed(0))
near = lambda ids, mask: table[ids]
task = train.TaskSpec("sequence-classification", labels=("a", "b"))

def run(name, shard_max_bytes):
    dataset = train.open_dataset(folder / name, columns=train.Columns(), task=task)
    store = train.open_store(folder / "store")
    return train.NearRun(near, Words(), task, work_dir=folder / f"work-{name}", store=store,
        run_id="r", client="c", job_sha384=bytes(48), boundary="fp32", batch_size=8, window=32,
        shard_max_bytes=shard_max_bytes).run({"train": dataset})

run(f"warm-up.{kind}", 4 << 20)  # libraries, thread stacks and allocator arenas are there before the cap is set
in_use = next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (in_use + cap, in_use + cap))
manifest = run(f"data.{kind}", int(sys.argv[4]))
print(json.dumps({"n_bytes": sum(e.n_bytes for e in manifest.shards), "n": sum(e.n_examples for e in manifest.shards)}))
"""


def _write(folder: Path, name: str, n_rows: int, filler: str) -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            for i in range(n_rows):
                file.write(json.dumps({"text": f"{i:08} " * 40, "label": i % 2, "scan": filler}) + "\n")
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"text": [f"{i:08} " * 40 for i in range(n_rows)], "label": [i % 2 for i in range(n_rows)]}
    table = pa.table({**rows, "scan": [filler] * n_rows})
    pq.write_table(table, path, row_group_size=100, compression="none", use_dictionary=False)
    return path


def _run(folder: Path, kind: str, shard_max_bytes: int) -> subprocess.CompletedProcess[str]:
    _write(folder, f"warm-up.{kind}", 64, "s")
    data = _write(folder, f"data.{kind}", N_ROWS, "scan" * 25_000)
    assert data.stat().st_size > CAP_BYTES
    arguments = [str(folder), kind, str(CAP_BYTES), str(shard_max_bytes)]
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_and_features_larger_than_memory(tmp_path: Path, kind: str) -> None:
    done = _run(tmp_path, kind, 4 << 20)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["n"] == N_ROWS
    assert found["n_bytes"] > 3 * CAP_BYTES


def test_the_cap_is_one(tmp_path: Path) -> None:
    """The twin: one shard of everything does not fit, so the test above would notice memory that is not bounded."""
    done = _run(tmp_path, "jsonl", 1 << 40)
    assert done.returncode != 0
    assert "memory" in done.stderr.lower()
