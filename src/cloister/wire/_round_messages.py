"""Messages of Method 1 (`enclave`), inside records: seen by one client's enclave and the server enclave only.

    admit    what each side has loaded, so that a difference is named before any work is done
    round    the global adapter goes out, an update or measured sums come back

A round's request is answered at once or, when the work takes longer than `patience_s`, by progress; the poll that
follows carries no adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from cloister.wire import _fields, _limits
from cloister.wire._base import Message, Patient

Work = Literal["train", "evaluate"]
_WORK = ("train", "evaluate")


@dataclass(frozen=True)
class AdmitRequest(Patient):
    """Server to client: load backbone, adapter and data, and say what they are.

    Attributes:
        job_sha384: the job that the client must have approved.
        patience_s: how long the client may load before it answers with its progress.
    """

    KIND: ClassVar[str] = "admit.request"

    job_sha384: bytes
    patience_s: float

    def __post_init__(self) -> None:
        _fields.check_bytes("job_sha384", self.job_sha384, _limits.SHA384_BYTES, exact=True)
        self._check_patience()


@dataclass(frozen=True)
class AdmitAnswer(Message):
    """Client to server: what this client's enclave has loaded. Digests are *public*, counts are told to the server.

    Attributes:
        backbone_sha384: of the frozen weights' folder.
        tokenizer_sha384: of the tokenizer's files.
        adapter_sha384: of the adapter's names, shapes and kind.
        n_train: training examples.
        n_test: held-out examples; 0 for none.
    """

    KIND: ClassVar[str] = "admit.answer"

    backbone_sha384: bytes
    tokenizer_sha384: bytes
    adapter_sha384: bytes
    n_train: int
    n_test: int

    def __post_init__(self) -> None:
        for name in ("backbone_sha384", "tokenizer_sha384", "adapter_sha384"):
            _fields.check_bytes(name, getattr(self, name), _limits.SHA384_BYTES, exact=True)
        _fields.check_count("n_train", self.n_train, _limits.MAX_COUNT)
        _fields.check_count("n_test", self.n_test, _limits.MAX_COUNT)


@dataclass(frozen=True)
class RoundRequest(Patient):
    """Server to client: train from this adapter, or measure it, in this round.

    Attributes:
        round: from 1.
        work: "train" or "evaluate".
        adapter: *secret* to the relay; the global adapter. Empty in a poll: the one that was sent before.
        patience_s: how long the client may work before it answers with its progress.
    """

    KIND: ClassVar[str] = "round.request"

    round: int
    work: Work
    adapter: bytes = field(repr=False)
    patience_s: float

    def __post_init__(self) -> None:
        _fields.check_count("round", self.round, _limits.MAX_ROUND, minimum=1)
        _fields.check_choice("work", self.work, _WORK)
        _fields.check_bytes("adapter", self.adapter, _limits.MAX_RELEASE_BYTES)
        self._check_patience()


@dataclass(frozen=True)
class RoundProgress(Message):
    """Client to server: not done yet, ask again. A client that has lost the adapter says `is_lost`."""

    KIND: ClassVar[str] = "round.progress"

    n_done: int
    n_total: int
    is_lost: bool

    def __post_init__(self) -> None:
        _fields.check_count("n_total", self.n_total, _limits.MAX_COUNT)
        _fields.check_count("n_done", self.n_done, self.n_total)
        _fields.check_flag("is_lost", self.is_lost)


@dataclass(frozen=True)
class RoundAnswer(Message):
    """Client to server: the round's work is done.

    Attributes:
        round, work: of the request that this answers.
        adapter: *secret* to the relay; after "train" the trained state, after "evaluate" empty.
        n_examples: that this client trained or measured on.
        facts: JSON, at most 1 MiB: losses, seconds, what crossed to the accelerator; after "evaluate" the sums.
    """

    KIND: ClassVar[str] = "round.answer"

    round: int
    work: Work
    adapter: bytes = field(repr=False)
    n_examples: int
    facts: bytes = field(repr=False)

    def __post_init__(self) -> None:
        _fields.check_count("round", self.round, _limits.MAX_ROUND, minimum=1)
        _fields.check_choice("work", self.work, _WORK)
        _fields.check_bytes("adapter", self.adapter, _limits.MAX_RELEASE_BYTES)
        _fields.check_count("n_examples", self.n_examples, _limits.MAX_COUNT)
        _fields.check_bytes("facts", self.facts, _limits.MAX_FACTS_BYTES)
