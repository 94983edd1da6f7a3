"""Rule 2: secrets are of one job, layer and direction, end after 2^30 blocks, and are stored nowhere."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from tests.adversary.lattice.conftest import MakeWeight, OpenSource

from cloister.errors import PadExhaustedError, PadReuseError
from cloister.offload import FrozenLinear, OffloadedGroup, OffloadSession
from cloister.pad import MAX_POSITIONS, CheckKeys, Direction, LatticePads, PadKeys, PadMode, PadPool
from cloister.ring import FAST
from cloister.testing import FakeAccelerator

N = 1024
LAYERS = ["", "q", "qforward", "layers.1.q", "layers.11.q", "é"]


def features(source: LatticePads) -> list[bytes]:
    """Each input's secret, as it lies there."""
    return [source._secrets.s[i // 16, ..., i % 16].tobytes() for i in range(source._secrets.n_in)]


@pytest.mark.parametrize("stuck", [False, True], ids=["generator works", "generator is stuck"])
def test_every_job_layer_and_direction_has_secrets_of_its_own(
    keys: PadKeys, open_source: OpenSource, monkeypatch: pytest.MonkeyPatch, stuck: bool
):
    """Also where the system's generator is stuck: labels alone keep them apart. The weights are equal."""
    if stuck:
        monkeypatch.setattr(os, "urandom", lambda n: bytes(n))
    found: list[bytes] = []
    for _ in range(2):
        for layer in LAYERS:
            for direction in Direction:
                found += features(open_source(layer, direction, n_out=5))
        keys.new_job()
    assert len(found) == len(set(found)) == 2 * len(LAYERS) * 2 * 5


def test_secrets_of_two_layers_have_nothing_in_common(keys: PadKeys, monkeypatch: pytest.MonkeyPatch):
    """The digits agree as often as independent ones: a third of the time."""
    from cloister.pad import _lattice as lattice

    first, second = (lattice._ternary(bytearray(bytes([i]) * 32), 2 * N, 64) for i in range(2))
    agree = (first == second).mean()
    assert abs(agree - 1 / 3) < 6.2 * (2 / 9 / first.size) ** 0.5  # p = 6e-10


def test_one_secret_for_two_layers_is_refused(
    keys: PadKeys, pool: PadPool, open_source: OpenSource, make_weight: MakeWeight
):
    source = open_source("q")
    other = make_weight(n_out=7)
    with pytest.raises(PadReuseError, match="serve one source only"):
        open_source("q")
    with pytest.raises(PadReuseError, match="serve one source only"):
        keys.lattice("q", Direction.FORWARD, other, CheckKeys.generate(other, Direction.FORWARD), pool=pool)
    with pytest.raises(PadReuseError, match="a second layer"):
        LatticePads(bytearray(32), source._secrets, source.check, pool)
    assert source.take(1).use((1, 5)).r.any()


def test_one_secret_for_two_layers_at_the_same_time(keys: PadKeys, pool: PadPool, make_weight: MakeWeight):
    from cloister.pad import LATTICE_PARAMETERS
    from cloister.pad._lattice import LatticeSecrets

    weight = make_weight()
    for _ in range(5):
        secrets = LatticeSecrets.generate(bytearray(32), weight, Direction.FORWARD, LATTICE_PARAMETERS["fast"])
        barrier, made, refused = threading.Barrier(4), [], []

        def work(secrets=secrets, barrier=barrier, made=made, refused=refused) -> None:
            check = CheckKeys.generate(weight, Direction.FORWARD)
            barrier.wait(60)
            try:
                made.append(LatticePads(bytearray(32), secrets, check, pool))
            except PadReuseError as error:
                refused.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(made), len(refused)) == (1, 3)


def test_a_key_ends_after_2_to_the_30_blocks(keys: PadKeys, open_source: OpenSource):
    source = open_source()
    source.ledger._cell.n_taken = MAX_POSITIONS - N  # as after 2^30 - 1 blocks
    assert MAX_POSITIONS == N << 30
    assert source.take(N).use((N, 5)).r.any()
    with pytest.raises(PadExhaustedError, match="no positions left") as caught:
        source.take(1)
    assert "new job" in caught.value.hint
    keys.new_job()
    assert open_source().take(1).use((1, 5)).r.any()


@pytest.mark.parametrize("way", ["new_job", "close"])
def test_the_secrets_of_an_old_job_are_gone(keys: PadKeys, open_source: OpenSource, way: str):
    source = open_source()
    ticket = source.take(5)
    secrets, key, rests, check = source._secrets, source._key, list(source._rests), source.check
    before = secrets.s.copy()
    getattr(keys, way)()
    assert before.any() and rests and not any(key)
    for array in (secrets.s, secrets.z, check._rho, check._v, rests[0].pad.r, rests[0].pad.u):
        assert not array.any()
    with pytest.raises(PadExhaustedError):
        source.take(1)
    ticket.use((5, 5)).wipe()
    if way == "new_job":
        assert not np.array_equal(open_source()._secrets.s, before)


def test_nothing_can_be_copied_or_pickled(open_source: OpenSource):
    source = open_source()
    pad = source.take(5)
    source._rests[0].pad.start = 7
    for thing in (source, source._secrets, source.ledger, source.check, pad, source._rests[0].pad):
        for attempt in (
            copy.copy,
            copy.deepcopy,
            *(lambda thing, protocol=protocol: pickle.dumps(thing, protocol) for protocol in range(6)),
            lambda thing: pickle.dumps({"checkpoint": [thing]}),
            lambda thing: torch.save({"state": thing}, io.BytesIO()),
        ):
            with pytest.raises(PadReuseError, match="cannot be copied"):
                attempt(thing)
        with pytest.raises(TypeError):
            vars(thing)


def test_checkpoints_reports_and_logs_hold_no_secret(caplog: pytest.LogCaptureFixture, tmp_path):
    """A model whose linear runs under lattice pads: what its checkpoint, report, repr and logs have of secrets."""
    caplog.set_level(logging.DEBUG)
    with OffloadSession(FakeAccelerator(), FAST, pad=PadMode.LATTICE) as session:
        linear = torch.nn.Linear(32, 16)
        (module,) = OffloadedGroup(session, [FrozenLinear("q", linear.weight.data, linear.bias.data)]).members
        model = torch.nn.Sequential(module, torch.nn.LayerNorm(16))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.randn(5, 32, generator=torch.Generator().manual_seed(1))).sum().backward()
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
        with pytest.raises(PadReuseError, match="cannot be copied"):
            torch.save(model, tmp_path / "whole")
        written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        written += f"{session!r} {model!r} {json.dumps(session.describe())} {caplog.text}".encode()
        n_secrets = 0
        for layer in session._layers.values():
            for side in layer.sides.values():
                source = side.source
                assert isinstance(source, LatticePads)
                secrets = [source._secrets.s, source._secrets.z, source.check.rho, source.check.v]
                for part in [bytes(source._key), *(row.tobytes() for array in secrets for row in pieces(array))]:
                    n_secrets += 1
                    assert part not in written and part.hex().encode() not in written
        assert n_secrets > 100


def pieces(array: np.ndarray) -> list[np.ndarray]:
    """Some runs of 32 bytes."""
    whole = array.reshape(-1).view(np.uint8)
    rows = whole[: len(whole) // 32 * 32].reshape(-1, 32)
    return [row for row in rows[:: max(1, len(rows) // 64)] if row.any()]


FORK = """
import json, os
import torch
from cloister.errors import PadReuseError
from cloister.pad import CheckKeys, Direction, PadKeys, PadPool
from cloister.ring import FAST, quantize_weight

keys, pool = PadKeys(), PadPool(0)
weight = quantize_weight(torch.ones(4, 5), FAST, layer="q")
source = keys.lattice("q", Direction.FORWARD, weight, CheckKeys.generate(weight, Direction.FORWARD), pool=pool)
ticket = source.take(5)
check = CheckKeys.generate(weight, Direction.BACKWARD)
for lock in (keys._lock, source._lock, source.ledger._cell.lock):
    lock.acquire()
attempts = {
    "lattice": lambda: keys.lattice("q", Direction.BACKWARD, weight, check, pool=pool),
    "take": lambda: source.take(1),
    "make": lambda: source.make(1),
    "use": lambda: ticket.use((5, 5)),
    "close": source.close,
    "claim": source._secrets.claim,
    "wipe": source._secrets.wipe,
}
read, write = os.pipe()
if (pid := os.fork()) == 0:
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "went through"
        except Exception as error:
            found[name] = type(error).__name__
    os.write(write, json.dumps(found).encode())
    os._exit(0)
os.waitpid(pid, 0)
print(os.read(read, 65536).decode())
"""


def test_a_forked_child_is_refused_everything():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FORK)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 7 and set(found.values()) == {"PadReuseError"}, found
