"""Everything that relay, store and sockets carried is recorded and searched for text, token ids, features and keys.

The search is only worth something if it finds them where they are: the twin runs the same programs with encryption
switched off, and the same search finds what it looks for in its store and on its sockets.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from tests._search import kinds_in

from cloister import run
from cloister.api import Programs
from cloister.federation import _flower
from cloister.slicing import inspect_backbone, load_near, load_tokenizer
from cloister.testing import write_tiny_job
from cloister.train import Columns, NearEncoder, TaskSpec, open_dataset

SECTIONS = '[federation]\ntls = false\n[method]\nboundary = "fp32"\n'
TWIN = Programs(
    server=(sys.executable, "-m", "cloister.testing._plaintext", "cloister.api._server_main"),
    client=(sys.executable, "-m", "cloister.testing._plaintext", "cloister.api._client_main"),
)


class Recorder:
    """A TCP proxy in front of the SuperLink that keeps every byte, both ways."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._streams: list[list[bytes]] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def recorded(self) -> list[bytes]:
        return [b"".join(stream) for stream in self._streams]

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:
                near.close()
                continue
            for a, b in ((near, far), (far, near)):
                stream: list[bytes] = []
                self._streams.append(stream)
                threading.Thread(target=self._pump, args=(a, b, stream), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket, stream: list[bytes]) -> None:
        try:
            while data := source.recv(65536):
                stream.append(data)
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                end.close()


@dataclass
class Needles:
    """What must not be seen, as the bytes that would give it away."""

    text: list[bytes] = field(default_factory=list)
    tokens: list[bytes] = field(default_factory=list)
    features: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)

    def kinds_in(self, haystack: list[bytes]) -> set[str]:
        return kinds_in(vars(self), haystack)


def _needles(job: Path, run_dir: Path) -> Needles:
    model = job.parent / "model"
    info = inspect_backbone(model)
    task = TaskSpec("causal-lm")
    encoder = NearEncoder(
        load_near(info, 2), load_tokenizer(info), task, boundary="fp32", model_max_length=info.max_length
    )
    needles = Needles()
    for client in ("alpha", "beta"):
        dataset = open_dataset(job.parent / f"{client}-train.jsonl", columns=Columns(), task=task)
        for row in (job.parent / f"{client}-train.jsonl").read_text().splitlines():
            prompt = json.loads(row)["prompt"]
            needles.text += [prompt.encode(), prompt.encode("utf-16-le")] if len(prompt) >= 8 else []
        for batch in encoder.window(list(dataset), dataset.place):
            for item, block in zip(batch, encoder.blocks(batch), strict=True):
                answer = [i for i in item.labels or [] if i >= 0]
                for dtype in (torch.int64, torch.int32, torch.int16):
                    needles.tokens += [
                        torch.tensor(ids, dtype=dtype).numpy().tobytes()
                        for ids in (item.input_ids, answer)
                        if len(ids) >= 4
                    ]
                for dtype in (torch.float32, torch.float16, torch.bfloat16):
                    row = block.values[0].to(dtype)
                    needles.features.append(row.view(torch.uint8).numpy().tobytes())
        needles.keys.append(_feature_key(run_dir / "clients" / client / "journal"))
    return needles


def _feature_key(journal: Path) -> bytes:
    first = json.loads(journal.read_text().splitlines()[0])
    return next(bytes.fromhex(v) for k, v in first.items() if "key" in k)


def _run_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Programs | None):
    made: dict[int, Recorder] = {}

    def address(self: _flower.FlowerSetup) -> str:
        if self.port not in made:
            made[self.port] = Recorder(("127.0.0.1", self.port))
        return made[self.port].address

    monkeypatch.setattr(_flower.FlowerSetup, "address", property(address))
    job = write_tiny_job(tmp_path, task="causal-lm", family="llama", n_train=12, n_test=3, sections=SECTIONS,
                         training="epochs = 1\nbatch_size = 8")  # fmt: skip
    result = run(job, runs_dir=tmp_path / "runs", programs=programs)
    sockets = [stream for recorder in made.values() for stream in recorder.recorded()]
    for recorder in made.values():
        recorder.close()
    store = [path.read_bytes() for path in (result.run_dir / "inbox").iterdir()]
    relay = [path.read_bytes() for path in (result.run_dir / "relay").rglob("*") if path.is_file()]
    assert sum(map(len, sockets)) > 10_000 and store and relay, "nothing was recorded"
    return _needles(job, result.run_dir), {"sockets": sockets, "store": store, "relay": relay}


@pytest.mark.slow
@pytest.mark.xdist_group("traffic")
def test_nothing_is_in_the_clear_where_the_relay_the_store_or_the_network_can_look(tmp_path: Path, monkeypatch):
    needles, seen = _run_recorded(tmp_path, monkeypatch, None)
    assert (
        len(needles.text) >= 10 and len(needles.tokens) >= 10 and len(needles.features) >= 10 and len(needles.keys) == 2
    )
    for place, haystack in seen.items():
        assert needles.kinds_in(haystack) == set(), place


@pytest.mark.slow
@pytest.mark.xdist_group("traffic")
def test_the_same_search_finds_everything_in_the_unprotected_twin(tmp_path: Path, monkeypatch):
    needles, seen = _run_recorded(tmp_path, monkeypatch, TWIN)
    assert needles.kinds_in(seen["store"]) >= {"features", "tokens"}
    assert "keys" in needles.kinds_in(seen["sockets"])
    # Text never leaves a client, sealed or not; that the search would find it is shown on what a naive client sends.
    rows = (tmp_path / "alpha-train.jsonl").read_bytes()
    assert "text" in needles.kinds_in([b"POST /upload HTTP/1.1\r\n\r\n" + rows])
