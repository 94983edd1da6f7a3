"""What relay, hosts' disks and accelerators saw of a run of Method 1, searched for adapters, activations, ids and text.

What is looked for is computed here, from the job alone: the same round, in this process. The search is only worth
something if it finds it where it is: the twin runs the same programs with encryption and masks switched off.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from tests._rounds import trained_round
from tests._search import kinds_in

from cloister import run
from cloister.adapters import AdapterState, AdapterUpdate
from cloister.api import Programs
from cloister.api._folder import RunFolder
from cloister.api._local_model import starting_adapter
from cloister.api._plans import enclave_client_plan, enclave_server_plan
from cloister.attest import Policy
from cloister.federation import Aggregator
from cloister.pad import Pad
from cloister.pad._otp import OtpPads
from cloister.testing import FakeRelay, write_tiny_job

SECTIONS = '[method]\nname = "enclave"\nrounds = 1\n[federation]\npatience_s = 0.5\n'
CLIENTS = ("alpha", "beta")
RUN_BYTES = 64
ACCELERATOR = """
import os, runpy
from cloister.offload._compute import CpuDevice
real = CpuDevice.multiply
def multiply(self, weight, direction, planes, answer):
    real(self, weight, direction, planes, answer)
    with open(os.path.join(os.environ["CLOISTER_TEST_SEEN"], str(os.getpid())), "ab") as file:
        file.write(planes.tobytes() + answer.tobytes())
CpuDevice.multiply = multiply
runpy.run_module("cloister.api._accelerator_main", run_name="__main__")
"""


class Recording:
    """Keeps what the relay carried."""

    def __call__(self, *args, **kwargs) -> FakeRelay:
        self.relay = FakeRelay(*args, **kwargs)
        return self.relay

    def blobs(self) -> list[bytes]:
        return [blob for _, _, blob in self.relay.seen]


@dataclass
class Needles:
    """What must not be seen, as the bytes that would give it away."""

    update: set[bytes] = field(default_factory=set)
    adapter: set[bytes] = field(default_factory=set)
    features: set[bytes] = field(default_factory=set)
    tokens: set[bytes] = field(default_factory=set)
    text: set[bytes] = field(default_factory=set)

    def kinds_in(self, haystack: list[bytes]) -> set[str]:
        return kinds_in(vars(self), haystack)


def _runs_of(state: AdapterState) -> set[bytes]:
    """The beginning and the middle of every tensor, in the forms that it could have been sent in."""
    found: set[bytes] = set()
    for tensor in state.tensors.values():
        numbers = torch.from_numpy(np.array(tensor)).reshape(-1)
        scale = float(numbers.abs().max()) / 127 or 1.0
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
            sent = (numbers / scale).round().to(dtype) if dtype is torch.int8 else numbers.to(dtype)
            raw = sent.view(torch.uint8).numpy().tobytes()
            middle = len(raw) // 2 // 4 * 4
            found |= {part for at in (0, middle) if _tells(part := raw[at : at + RUN_BYTES])}
    return found


def _tells(part: bytes) -> bool:
    """Long and varied enough not to come about by chance, or out of zeros."""
    return len(part) >= 16 and len(set(part)) >= 8


def _needles(job: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Needles:
    """Round 1 of both clients, as their enclaves did it, on an accelerator that is not masked from."""

    def unmasked(self: OtpPads, n_tokens: int) -> Pad:
        r = np.zeros((self._format.n_planes, n_tokens, self.check.n_in), np.uint8)
        return self._pad(0, r, np.zeros((n_tokens, self.check.n_out), np.uint32))

    monkeypatch.setattr(OtpPads, "make", unmasked)
    folder = RunFolder.open(run_dir)
    read, policy = folder.read_job(), Policy.load(folder.policy)
    server = enclave_server_plan(read, folder, policy, {})
    start, _ = starting_adapter(server)
    needles = Needles()
    aggregator = Aggregator(server.aggregation, start, min_clients=2, folder=run_dir / "server")
    aggregator.begin(CLIENTS)
    for name in CLIENTS:
        plan = enclave_client_plan(read, folder, policy, name)
        done, source, accelerator = trained_round(plan, start.to_bytes(), 1)
        aggregator.add(name, done.n_examples, done.update, round=1)
        needles.update |= _runs_of(AdapterUpdate.parse(done.update, start.spec))
        for _, _, planes in accelerator.seen[:: len(accelerator.seen) // 20]:
            needles.features |= {row.tobytes() for row in planes[0][:4] if _tells(row.tobytes())}
        for key in source.split("train"):
            ids = source.get(key).hidden
            ids = ids[:, 0] if ids.dim() == 2 else ids
            for dtype in (torch.int64, torch.int32, torch.int16):
                needles.tokens |= {ids.to(dtype).numpy().tobytes()} if len(ids) >= 6 else set()
        for line in (job.parent / f"{name}-train.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            needles.text |= {text.encode(), text.encode("utf-16-le")} if len(text) >= 10 else set()
    aggregator.finish()
    # What is looked for is what the run made, to the last bit.
    report = json.loads((run_dir / "clients" / "alpha" / "report.json").read_text())
    assert report["adapter_sha384"] == hashlib.sha384(aggregator.to_bytes()).hexdigest()
    needles.adapter = _runs_of(aggregator.state)
    return needles


def _run_recorded(tmp_path: Path, programs: dict[str, object]) -> tuple[Path, Path, dict[str, list[bytes]]]:
    seen, recording = tmp_path / "seen", Recording()
    seen.mkdir()
    job = write_tiny_job(tmp_path, n_train=12, n_test=3, sections=SECTIONS, training="epochs = 1\nbatch_size = 4")
    accelerator = (sys.executable, "-c", ACCELERATOR)
    env = {"CLOISTER_TEST_SEEN": str(seen)}
    done = run(job, runs_dir=tmp_path / "runs",
               programs=Programs(relay=recording, accelerator=accelerator, env=env, **programs))  # type: ignore[arg-type]  # fmt: skip
    places = {
        "relay": recording.blobs(),
        "disk": [path.read_bytes() for path in done.run_dir.rglob("*") if path.is_file() and not path.is_symlink()],
        "accelerator": [path.read_bytes() for path in seen.iterdir()],
    }
    assert len(places["accelerator"]) == 2 and all(sum(map(len, found)) > 50_000 for found in places.values())
    return job, done.run_dir, places


@pytest.fixture
def one_thread():
    """As the clients compute, of which two share the cores: the same sums in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_nothing_is_in_the_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job, run_dir, places = _run_recorded(tmp_path, {})
    needles = _needles(job, run_dir, monkeypatch)
    assert all(len(found) >= 10 for found in vars(needles).values())
    for place, haystack in places.items():
        assert needles.kinds_in(haystack) == set(), place


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_same_search_finds_everything_in_the_unprotected_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    twin = (sys.executable, "-m", "cloister.testing._plaintext")
    mains = {"server": "cloister.api._server_main", "enclave_client": "cloister.api._enclave_client_main"}
    job, run_dir, places = _run_recorded(tmp_path, {key: (*twin, main) for key, main in mains.items()})
    needles = _needles(job, run_dir, monkeypatch)
    assert needles.kinds_in(places["relay"]) >= {"update", "adapter"}
    assert needles.kinds_in(places["disk"]) >= {"adapter"}
    assert needles.kinds_in(places["accelerator"]) >= {"features"}
    # Text and ids leave no client in any form. That the search would find them is shown on what a naive one sends.
    rows = (tmp_path / "alpha-train.jsonl").read_bytes()
    assert "text" in needles.kinds_in([b"POST /train HTTP/1.1\r\n\r\n" + rows])
    batch = b"".join(sorted(needles.tokens))
    assert "tokens" in needles.kinds_in([b"\x93NUMPY" + batch])
