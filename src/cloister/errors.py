"""Every error that cloister raises on purpose, as one tree.

    CloisterError
      ConfigError              every problem at once, with TOML key paths
      DataError                a row, column or text that the job cannot use
      ModelError               a backbone folder that cannot be used
        UnsupportedFamilyError
      WireError                MalformedMessageError  UnsupportedVersionError  LimitExceededError
      AttestationError         MalformedEvidenceError  EvidenceSignatureError  StaleEvidenceError
                               MeasurementMismatchError  PolicyRejectedError
      ChannelError             DecryptionError (one kind, no detail)  ReplayError  NoSessionError  RollbackError
      EnclaveError             HardeningError
      StoreError               ShardMismatchError  StoreFullError
      PadError                 PadReuseError (fatal)  PadExhaustedError
      OffloadError             RingOverflowError  IntegrityError (the accelerator lied)
                           AcceleratorLostError (it died or hung up)
      AdapterError             UnsupportedLayerError  StateMismatchError
      FederationError          InsufficientClientsError  UpdateRejectedError  RelayError  JobMismatchError  PeerError

Each error has a one-line cause, an optional hint, a stable `code` (all that ever travels over the network) and the
`exit_code` of its branch. Trust errors (AttestationError, ChannelError, PadReuseError, IntegrityError) are never
retried nor downgraded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class CloisterError(Exception):
    """Base of every error that cloister raises on purpose.

    Attributes:
        cause: one line that names the key, file or peer. Never holds a secret.
        hint: what the reader can do about it; empty where there is nothing to say.
        code: stable identifier, the only part that crosses the network.
        exit_code: what the command line exits with.
    """

    code: ClassVar[str] = "cloister"
    exit_code: ClassVar[int] = 1

    def __init__(self, cause: str, *, hint: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration file: the TOML key path, the cause, and a hint."""

    key: str
    cause: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.key}: {self.cause}" if self.key else self.cause


class ConfigError(CloisterError):
    """A configuration file is wrong. Carries every problem found, not only the first."""

    code = "config"
    exit_code = 2

    def __init__(self, problems: list[Problem] | str, *, source: str = "", hint: str = "") -> None:
        self.problems = [Problem("", problems, hint)] if isinstance(problems, str) else list(problems)
        self.source = source
        where = f"{source}: " if source else ""
        super().__init__(where + "; ".join(str(p) for p in self.problems), hint=hint)


class DataError(CloisterError):
    """Training or test data cannot be used: a missing file or column, a bad label, a text over the limit."""

    code = "data"
    exit_code = 3

    def __init__(self, cause: str, *, path: str = "", row: int | None = None, hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.path = path
        self.row = row


class ModelError(CloisterError):
    """A backbone cannot be loaded or cut."""

    code = "model"
    exit_code = 4

    def __init__(self, cause: str, *, path: str = "", hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.path = path


class UnsupportedFamilyError(ModelError):
    """The backbone is of a family that slicing has not been proven on."""

    code = "model.family"


class WireError(CloisterError):
    """Bytes from outside do not parse."""

    code = "wire"
    exit_code = 10


class MalformedMessageError(WireError):
    """The bytes are not a message of the expected kind."""

    code = "wire.malformed"


class UnsupportedVersionError(WireError):
    """The message is of a format version that this release does not speak."""

    code = "wire.version"


class LimitExceededError(WireError):
    """The message is larger or deeper than the specification allows."""

    code = "wire.limit"


class AttestationError(CloisterError):
    """The peer's evidence was not accepted. Never retried, never downgraded."""

    code = "attest"
    exit_code = 5

    def __init__(self, cause: str, *, reasons: list[str] | None = None, hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.reasons = reasons or [cause]


class MalformedEvidenceError(AttestationError):
    """The evidence does not parse."""

    code = "attest.malformed"


class EvidenceSignatureError(AttestationError):
    """The evidence's signature or certificate chain does not verify under a pinned root."""

    code = "attest.signature"


class StaleEvidenceError(AttestationError):
    """The evidence, its collateral or its session is too old, or from the future."""

    code = "attest.stale"


class MeasurementMismatchError(AttestationError):
    """The evidence is genuine, and is of other code, another job, other weights or another session."""

    code = "attest.measurement"


class PolicyRejectedError(AttestationError):
    """The evidence is genuine, and the policy does not allow what it states."""

    code = "attest.policy"


class ChannelError(CloisterError):
    """The encrypted channel broke. Never retried with another key, never downgraded."""

    code = "channel"
    exit_code = 6


class DecryptionError(ChannelError):
    """A ciphertext does not open. One kind and no detail, so that it tells an attacker nothing."""

    code = "channel.decryption"

    def __init__(self, cause: str = "ciphertext does not open", *, hint: str = "") -> None:
        super().__init__(cause, hint=hint)


class ReplayError(ChannelError):
    """A flight or record came twice, too late or out of order."""

    code = "channel.replay"


class NoSessionError(ChannelError):
    """There is no session with this peer (it restarted, or the session was closed): shake hands again."""

    code = "channel.no-session"


class RollbackError(ChannelError):
    """A sealed file, or the state that a peer comes back with, is older than what is known to have been there."""

    code = "channel.rollback"


class EnclaveError(CloisterError):
    """The trusted process could not be started, reached or kept."""

    code = "enclave"
    exit_code = 9


class HardeningError(EnclaveError):
    """A hardening layer that the design requires is not available, or a debugger is attached."""

    code = "enclave.hardening"


class StoreError(CloisterError):
    """The shard store or a sealed file failed."""

    code = "store"
    exit_code = 7

    def __init__(self, cause: str, *, path: str = "", hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.path = path


class ShardMismatchError(StoreError):
    """A sealed shard is not the one that its manifest names."""

    code = "store.shard"


class StoreFullError(StoreError):
    """No space is left on the store; what was complete before is kept, the unfinished file is gone."""

    code = "store.full"


class AdapterError(CloisterError):
    """An adapter cannot be placed, saved or restored."""

    code = "adapter"
    exit_code = 13


class UnsupportedLayerError(AdapterError):
    """A named layer does not exist or cannot carry this adapter."""

    code = "adapter.layer"


class StateMismatchError(AdapterError):
    """A saved adapter state is of another shape, adapter or backbone."""

    code = "adapter.state"

    def __init__(self, cause: str, *, key: str = "", hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.key = key


class PadError(CloisterError):
    """A one-time pad cannot be made or used."""

    code = "pad"
    exit_code = 11


class PadReuseError(PadError):
    """A pad position would be used a second time, which would give the masked tensors away. Fatal: never retried."""

    code = "pad.reuse"


class PadExhaustedError(PadError):
    """A key has no positions left, or the pool of pads made ahead of time ran dry."""

    code = "pad.exhausted"


class OffloadError(CloisterError):
    """A masked layer on the accelerator failed."""

    code = "offload"
    exit_code = 12


class RingOverflowError(OffloadError):
    """A number does not fit the fixed-point format, so that the ring would return another one."""

    code = "offload.overflow"


class IntegrityError(OffloadError):
    """The accelerator's answer is not the product that it was asked for. The step is not applied."""

    code = "offload.integrity"


class AcceleratorLostError(OffloadError):
    """The accelerator died, hung up or did not answer in time. The step may be tried again with fresh pads."""

    code = "offload.lost"


class FederationError(CloisterError):
    """The run as a whole cannot go on."""

    code = "federation"
    exit_code = 8

    def __init__(self, cause: str, *, peer: str = "", hint: str = "") -> None:
        super().__init__(cause, hint=hint)
        self.peer = peer


class InsufficientClientsError(FederationError):
    """Fewer clients answered in time than the job's `min_clients`."""

    code = "federation.clients"


class UpdateRejectedError(FederationError):
    """One client's update is not counted: malformed, of another adapter, not finite, or too large. The round goes on.

    `key` names the tensor or field that is wrong.
    """

    code = "federation.update"

    def __init__(self, cause: str, *, peer: str = "", key: str = "", hint: str = "") -> None:
        super().__init__(cause, peer=peer, hint=hint)
        self.key = key


class RelayError(FederationError):
    """Flower's SuperLink, a SuperNode or a courier could not be started or kept alive."""

    code = "federation.relay"


class JobMismatchError(FederationError):
    """A party was asked to take part in a job that its operator has not approved."""

    code = "federation.job"


class PeerError(FederationError):
    """A peer stopped with an error; only the stable code of it travelled here."""

    code = "federation.peer"

    def __init__(self, cause: str, *, peer: str = "", peer_code: str = "", hint: str = "") -> None:
        super().__init__(cause, peer=peer, hint=hint)
        self.peer_code = peer_code


def error_for_code(code: str) -> type[CloisterError]:
    """The class of a stable code that came over the network; CloisterError for an unknown one.

    Every class can be built as `cls(cause, hint=hint)`, so an error of another process can be raised again here.
    """
    found: dict[str, type[CloisterError]] = {}
    pending: list[type[CloisterError]] = [CloisterError]
    while pending:
        cls = pending.pop()
        found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found.get(code, CloisterError)
