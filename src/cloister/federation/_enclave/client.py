"""A client's part of Method 1, in its own enclave: a global adapter in, an update out, both sealed to the server."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cloister.channel import read_sealed, write_sealed
from cloister.errors import (
    ChannelError,
    CloisterError,
    FederationError,
    MalformedMessageError,
    StoreError,
    WireError,
)
from cloister.wire import AdmitAnswer, AdmitRequest, RecordMessage, RoundAnswer, RoundProgress, RoundRequest

if TYPE_CHECKING:
    from cloister.federation._plan import ClientPlan, EnclaveClientPlan

_log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.sealed"
"""The last global adapter that this client was given to measure, sealed to its enclave; for its own predictions."""

_ANSWER_FILE = "answer.sealed"
_SPENT_FILE = "spent.sealed"
_LOAD_S = 1.0
Progress = tuple[int, int]


class LocalModel(Protocol):
    """The backbone with its adapter over this client's examples. *Secret*, all of it."""

    def admission(self) -> AdmitAnswer:
        """What was loaded."""
        ...

    def train(self, adapter: bytes, n_round: int) -> tuple[bytes, int, dict[str, Any]]:
        """Update, number of examples, and what may be told of it."""
        ...

    def epsilon(self, n_rounds: int) -> float | None:
        """What so many rounds of training spend on each example; None without DP-SGD."""
        ...

    def evaluate(self, adapter: bytes) -> tuple[int, dict[str, Any]]:
        """Number of held-out examples, and the sums over them."""
        ...

    def save(self, adapter: bytes, folder: Path) -> None:
        """Write a released adapter in PEFT's format."""
        ...

    def progress(self) -> Progress:
        """Steps done and due in the work that is under way."""
        ...

    def stop(self) -> None:
        """End at the next step."""
        ...


class AdapterWork:
    """Loads once, then does one piece of work at a time in a thread of its own; a `ClientWork`.

    An answer is kept, sealed, until the next one: a request that comes again, also after this process was killed, gets
    the same update, so that nothing is counted twice or trained twice. With DP-SGD the trainings are counted too, each
    before it begins: one that is asked for again with another adapter, or that died, has spent its share.

    Args:
        load: loads model and data; called once, in this object's thread.
        sealing_key: 32 bytes of this enclave, *secret*.
    """

    def __init__(self, plan: EnclaveClientPlan, load: Callable[[], LocalModel], sealing_key: bytes) -> None:
        self._plan = plan
        self._load = load
        self._key = sealing_key
        self._model: LocalModel | None = None
        self._admission: AdmitAnswer | None = None
        self._doing: tuple[str, int] | None = None
        self._idle = threading.Event()
        self._answer: RoundAnswer | None = None
        self._answers_to = b""
        self._failure: CloisterError | None = None

    def __repr__(self) -> str:
        return f"AdapterWork({self._plan.name!r}, doing={self._doing})"

    def stop(self) -> None:
        """See `ClientWork`."""
        if self._model is not None:
            self._model.stop()

    def keep_release(self, release: bytes) -> None:
        """Writes the released adapter as a PEFT folder, `adapter`, beside the report."""
        while self._model is None:  # started anew since the last round
            self._admit(_LOAD_S)
        self._model.save(release, self._plan.work / "adapter")

    def serve(self, message: RecordMessage) -> RecordMessage:
        """See `ClientWork`."""
        if isinstance(message, AdmitRequest):
            return self._admit(message.patience_s)
        if isinstance(message, RoundRequest):
            return self._work_on(message)
        raise MalformedMessageError(f"a client of this method does not answer {message.KIND}")

    def _admit(self, patience_s: float) -> RecordMessage:
        if self._model is None and self._doing is None:
            self._start(("load", 0), self._open)
        if not self._wait(patience_s) or self._admission is None:
            return RoundProgress(0, 0, is_lost=False)
        return self._admission

    def _work_on(self, request: RoundRequest) -> RecordMessage:
        model, asked = self._model, (request.work, request.round)
        if model is None:  # started anew since it was admitted
            return self._admitted_again(request)
        if self._doing != asked:
            if self._doing is not None and not self._wait(request.patience_s):
                return RoundProgress(*model.progress(), is_lost=False)  # still at something older
            if not self._has_answer(request):
                if not request.adapter:
                    return RoundProgress(0, 0, is_lost=True)
                self._forget_answer()
                self._start(asked, lambda: self._run(model, request))
        if not self._wait(request.patience_s):
            return RoundProgress(*model.progress(), is_lost=False)
        if self._answer is None or (self._answer.work, self._answer.round) != asked:
            return RoundProgress(0, 0, is_lost=True)
        return self._answer

    def _admitted_again(self, request: RoundRequest) -> RecordMessage:
        answer = self._admit(request.patience_s)
        if isinstance(answer, AdmitAnswer) and self._has_answer(request) and self._answer is not None:
            return self._answer
        return RoundProgress(0, 0, is_lost=isinstance(answer, AdmitAnswer))

    def _wait(self, patience_s: float) -> bool:
        """Whether nothing is under way any more. Raises what the work raised."""
        if self._doing is not None and not self._idle.wait(timeout=patience_s):
            return False
        self._doing = None
        if self._failure is not None:
            raise self._failure  # for good: the server enclave goes on without this client
        return True

    def _start(self, what: tuple[str, int], body: Callable[[], None]) -> None:
        self._doing = what
        self._idle.clear()

        def work() -> None:
            try:
                body()
            except CloisterError as error:
                self._failure = error
            finally:
                self._idle.set()

        threading.Thread(target=work, name=f"{what[0]}-{what[1]}", daemon=True).start()

    def _open(self) -> None:
        model = self._load()
        self._admission = model.admission()  # which hashes the weights
        self._model = model

    def _run(self, model: LocalModel, request: RoundRequest) -> None:
        if request.work == "train":
            n_spent = self._count_training() if self._plan.dp_sgd is not None else 0
            update, n_examples, facts = model.train(request.adapter, request.round)
            if (epsilon := model.epsilon(n_spent)) is not None:
                facts["epsilon"] = round(epsilon, 6)
        else:
            update = b""
            n_examples, facts = model.evaluate(request.adapter)
            self._seal(self._plan.work / ADAPTER_FILE, request.adapter, "adapter")
        told = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        answer = RoundAnswer(request.round, request.work, update, n_examples, told)
        digest = hashlib.sha384(request.adapter).digest()
        self._seal(self._answer_path, digest + answer.to_bytes(), "answer")
        self._answer, self._answers_to = answer, digest

    def _count_training(self) -> int:
        """One more round of DP-SGD in this run; how many there are now. What was counted before MUST be readable."""
        path, before = self._plan.work / _SPENT_FILE, 0
        if path.exists():
            before, _ = read_sealed(path, key=self._key, label=sealed_label(self._plan, "spent"))
        write_sealed(path, b"", key=self._key, label=sealed_label(self._plan, "spent"), version=before + 1)
        return before + 1

    def _has_answer(self, request: RoundRequest) -> bool:
        """Whether the kept answer, in memory or sealed by an earlier process, is to this request."""
        if self._answer is None:
            self._recall()
        kept = self._answer
        if kept is None or (kept.work, kept.round) != (request.work, request.round):
            return False
        return not request.adapter or hashlib.sha384(request.adapter).digest() == self._answers_to

    def _forget_answer(self) -> None:
        """Before new work: should this process die in it, no older answer may stand for the new one."""
        self._answer, self._answers_to = None, b""
        self._answer_path.unlink(missing_ok=True)

    def _recall(self) -> None:
        if not self._answer_path.exists():
            return
        try:
            _, kept = read_sealed(self._answer_path, key=self._key, label=sealed_label(self._plan, "answer"))
            self._answer, self._answers_to = RoundAnswer.parse(kept[48:]), kept[:48]
        except (ChannelError, StoreError, WireError) as error:
            # Of another enclave or changed by the host: then the work is done again.
            _log.warning("the kept answer is not usable: %s", error.cause)

    @property
    def _answer_path(self) -> Path:
        return self._plan.work / _ANSWER_FILE

    def _seal(self, path: Path, content: bytes, what: str) -> None:
        write_sealed(path, content, key=self._key, label=sealed_label(self._plan, what), version=1)


def sealed_label(plan: ClientPlan, what: str) -> str:
    """What a client's sealed file is bound to: this run, client and job."""
    return f"client-{what}/{plan.run_id}/{plan.name}/{plan.job_sha384.hex()}"


def read_adapter(plan: ClientPlan, sealing_key: bytes) -> bytes:
    """The global adapter that this client's enclave keeps of a finished run. *Secret*.

    Raises:
        FederationError: there is none.
        DecryptionError: sealed by another enclave, measurement or machine, or for another run.
    """
    path = plan.work / ADAPTER_FILE
    if not path.exists():
        raise FederationError(f"client {plan.name} has no adapter of this run", hint="resume the run to its end")
    return read_sealed(path, key=sealing_key, label=sealed_label(plan, "adapter"))[1]
