"""Rule 1: raw outputs never leave. The attack finds every secret from raw outputs, and none in what the API exports."""

from __future__ import annotations

import json
import logging
import pickle
import traceback
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tests.adversary.lattice._recovery import N, P, n_recovered, recover

from cloister.errors import CloisterError, IntegrityError
from cloister.offload import OffloadSession
from cloister.pad import Direction, PadMode
from cloister.pad import _lattice as lattice
from cloister.pad import _lattice_pads as pads
from cloister.ring import FAST, QuantizedWeight, quantize_weight, row_room
from cloister.testing import FakeAccelerator

N_IN, N_OUT = 16, 128


class RecordingAccelerator(FakeAccelerator):
    """Honest; keeps its answers too. Adds one to the last one it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[np.ndarray] = []
        self.lies = False

    def answer(self, layer: str, direction: Direction, planes: np.ndarray) -> np.ndarray:
        answer = super().answer(layer, direction, planes)
        answer[0, 0] += np.uint32(self.lies)
        self.answers.append(answer.copy())
        return answer


@dataclass
class Run:
    """A layer in use, with what an attacker has (the accelerator, the weight, a) and what it wants (the secrets)."""

    session: OffloadSession
    accelerator: RecordingAccelerator
    weight: QuantizedWeight
    a: list[np.ndarray]
    secrets: np.ndarray
    raw: np.ndarray
    log: str

    def attack(self, raw: np.ndarray) -> int:
        """How many secrets the attack finds, with `raw` taken for raw outputs of both blocks."""
        planes = np.concatenate([planes for _, _, planes in self.accelerator.seen[:2]], 1).astype(np.int64)
        masked = (planes[0] + 256 * planes[1] + 65536 * planes[2]) % P
        limit = self.session._layers["q"].sides[Direction.FORWARD].source.input_limit
        w_q, scales = self.weight.w_q.numpy(), self.weight.scales.numpy().astype(np.float64)
        found = recover(raw, masked, w_q, scales, row_room(limit, N_IN), self.a)
        return n_recovered(found, self.secrets)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Two blocks of activations of all sizes through one layer."""
    a: list[np.ndarray] = []
    digits: list[np.ndarray] = []
    make_a, make_digits = pads._uniform, lattice._ternary

    def uniform(*arguments):
        a.append(make_a(*arguments))
        return a[-1].copy()

    def ternary(*arguments):
        digits.append(make_digits(*arguments))
        return digits[-1].copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pads, "_uniform", uniform)
        patch.setattr(lattice, "_ternary", ternary)
        accelerator = RecordingAccelerator()
        weight = quantize_weight(torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(1)), FAST, layer="q")
        records: list[logging.LogRecord] = []
        handler = logging.Handler()
        handler.emit = records.append
        logging.getLogger().addHandler(handler)
        with OffloadSession(accelerator, FAST, pad=PadMode.LATTICE) as session:
            session.add("q", weight)
            generator = torch.Generator().manual_seed(2)
            x = torch.randn(2 * N, N_IN, generator=generator) * torch.logspace(-3, 3, 2 * N).unsqueeze(1)
            raw = torch.cat([session.forward("q", part) for part in x.split(N)]).numpy()
            logging.getLogger().removeHandler(handler)
            secrets = digits[0].reshape(2, N, N_IN).transpose(2, 0, 1).astype(np.int64)
            log = "\n".join(record.getMessage() for record in records)
            yield Run(session, accelerator, weight, [vector[0] for vector in a], secrets, raw, log)


def test_a_leaky_twin_gives_every_secret_away(run: Run):
    """One that exports raw outputs in fp32. This is what the rule is for, and that the attack works."""
    assert run.attack(run.raw) == N_IN


def test_bf16_is_too_coarse_for_this_attack(run: Run):
    """What assumption A4 allows; that no other attack is known is for its reviewers to say."""
    assert run.attack(torch.from_numpy(run.raw).to(torch.bfloat16).to(torch.float32).numpy()) == 0


def exported_arrays(run: Run) -> dict[str, np.ndarray]:
    """Every array of the shape of the outputs that leaves the enclave. An API that exports more adds it here."""
    answers = np.concatenate(run.accelerator.answers[:2]).astype(np.int64)
    return {
        "answers": answers.astype(np.float64),
        "answers, centred": (answers - P * (answers > P // 2)).astype(np.float64),
        "answers, in fp32": answers.astype(np.float32),
    }


def exported_text(run: Run) -> dict[str, bytes]:
    """Everything else that leaves: reports, logs, words. An API that exports more adds it here."""
    source = run.session._layers["q"].sides[Direction.FORWARD].source
    things = (run.session, source, source.check, source.take(1), run.session._sources, run.weight)
    return {
        "report": json.dumps(run.session.describe()).encode(),
        "repr": " ".join(f"{thing!r} {thing}" for thing in things).encode(),
        "log": run.log.encode(),
        "masked tensors": b"".join(planes.tobytes() for _, _, planes in run.accelerator.seen),
        "answers": b"".join(answer.tobytes() for answer in run.accelerator.answers),
    }


def test_what_is_exported_gives_no_secret(run: Run):
    for name, array in exported_arrays(run).items():
        assert run.attack(array) == 0, name


def written(values: np.ndarray) -> list[bytes]:
    """Numbers as bytes and as words, long enough that none is there by chance."""
    some = values.reshape(-1)[:: max(1, values.size // 500)]
    some = some[np.abs(some) > 1e-3]
    return [part for value in some for part in (value.tobytes() * (4 // value.nbytes or 1), f"{value:.6g}".encode())
            if len(part.strip(b"-0.")) > 5]  # fmt: skip


def test_no_raw_output_and_no_secret_in_what_is_exported(run: Run):
    source = run.session._layers["q"].sides[Direction.FORWARD].source
    secrets = source._secrets
    texts = exported_text(run)
    texts.pop("masked tensors"), texts.pop("answers")  # where any four bytes may be: see the attack
    hidden = written(run.raw) + written(secrets.s) + written(secrets.z) + written(source.check.rho)
    assert len(hidden) > 1000
    for name, text in texts.items():
        assert not [each for each in hidden if each in text], name


def test_secrets_are_not_in_what_the_accelerator_sees(run: Run):
    """Rows of secrets as they lie in memory: 64 bytes, which nothing has by chance."""
    secrets = run.session._layers["q"].sides[Direction.FORWARD].source._secrets
    texts = exported_text(run)
    rows = [secrets.s.reshape(-1, 16)[i].tobytes() for i in range(0, 2 * N, 64)]
    rows += [run.secrets[i, j].astype(np.int8).tobytes()[:64] for i in range(N_IN) for j in range(2)]
    for name, text in texts.items():
        assert not [row for row in rows if row in text], name


def test_nothing_of_a_session_can_be_saved(run: Run):
    side = run.session._layers["q"].sides[Direction.FORWARD]
    for thing in (run.session, side.source, side.source.check, side.source._secrets, side.source.ledger):
        with pytest.raises(CloisterError, match="cannot be copied"):
            pickle.dumps(thing)


def arrays_in(thing: object) -> list[np.ndarray]:
    """Arrays in a local: itself, or what a container holds."""
    if isinstance(thing, torch.Tensor):
        return [thing.detach().float().numpy()]
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        return [array for each in thing for array in arrays_in(each)]
    return [thing] if isinstance(thing, np.ndarray) else []


def test_the_exception_of_a_failed_check_holds_no_output(run: Run):
    """Its words, and the locals of every frame of the package. Comes last: it ends the session."""
    source = run.session._layers["q"].sides[Direction.FORWARD].source
    secrets, key = source._secrets, source._key
    run.accelerator.lies = True
    x = torch.randn(5, N_IN, generator=torch.Generator().manual_seed(3))
    raw = (x @ (run.weight.w_q * run.weight.scales.unsqueeze(1)).T).numpy()
    with pytest.raises(IntegrityError) as caught:
        run.session.forward("q", x)
    frames = [frame for frame, _ in traceback.walk_tb(caught.tb) if "/cloister/" in frame.f_code.co_filename]
    assert frames
    arrays = arrays_in([frame.f_locals for frame in frames])
    like_raw = [array for array in arrays if array.size == raw.size and array.any()]
    assert not [array for array in like_raw if np.abs(array.reshape(raw.shape) - raw).max() < np.abs(raw).max() / 2]
    assert not [word for word in written(raw) if word in f"{caught.value!r} {vars(caught.value)}".encode()]
    assert not secrets.s.any() and not secrets.z.any() and not any(key)
    with pytest.raises(CloisterError):
        _ = source.check.rho
