"""Method 2 inside the server enclave.

prepare   every client's sealed manifest; the host lays the sealed shards in the inbox
train     far side over the global shuffle of all clients' features
evaluate  held-out features of every client, then the baselines the job asks for
done      predictions are answered
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.federation._peer import ROUND
from cloister.federation._server import Emit, ServerRun
from cloister.federation._split.answers import PredictDesk
from cloister.federation._split.far_work import FarWork
from cloister.wire import Manifest, PrepareProgress, PrepareRequest, RecordMessage

if TYPE_CHECKING:
    from cloister.attest import Attester
    from cloister.federation._plan import SplitServerPlan


class SplitServer(ServerRun):
    """The server enclave's run of Method 2; arguments as of `ServerRun`."""

    _plan: SplitServerPlan

    def __init__(self, plan: SplitServerPlan, attester: Attester, *, now: Callable[[], float], emit: Emit) -> None:
        super().__init__(plan, attester, now=now, emit=emit)
        self._far = FarWork(plan, self._state, attester, emit=emit, stop=self._stop)
        self._desk = PredictDesk(self._new_peer, self._far)

    @property
    def is_serving(self) -> bool:
        """Whether the run is done and the tuned far side is loaded."""
        return self._state.phase == "done" and self._far.is_loaded

    def close(self) -> None:
        """Erases every session's keys."""
        super().close()
        self._desk.close()

    def _exchange(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._desk.exchange(body, is_open=self.is_serving)

    def _next_work(self, name: str) -> tuple[int, RecordMessage] | None:
        if self._state.phase == "prepare" and name not in self._state.manifests:
            return ROUND, PrepareRequest(self._plan.job_sha384, self._plan.patience_s)
        return None

    def _take_work(self, name: str, message: RecordMessage) -> bool:
        if isinstance(message, PrepareProgress):
            self._emit("progress", client=name, n_done=message.n_done, n_total=message.n_total,
                       n_bytes=message.n_bytes)  # fmt: skip
        elif isinstance(message, Manifest):
            self._state.accept_manifest(name, message, boundary=self._plan.model.boundary)
        else:
            return False
        return True

    def _members(self) -> Collection[str]:
        return self._state.manifests

    def _release(self) -> bytes:
        return self._far.release_bytes()

    def _to_fetch(self) -> list[str]:
        wanted = [entry for manifest in self._state.manifests.values() for entry in manifest.shards]
        return [e.name for e in wanted if not _is_there(self._plan.inbox / e.name, e.n_bytes)]

    def _work(self) -> None:
        if self._state.phase == "prepare":
            self._phase("prepare", self._prepare)
            self._state.advance("train")
        else:
            self._far.load()
        if self._state.phase in ("train", "evaluate"):
            self._far.open_features()
        if self._state.phase == "train":
            self._phase("train", self._far.train)
            self._check_stop()
            self._state.advance("evaluate")
        if self._state.phase == "evaluate":
            self._phase("evaluate", self._far.evaluate)
            self._phase("baselines", self._far.baselines)
            self._check_stop()
            self._sign_report(self._facts())

    def _prepare(self) -> None:
        self._far.load()  # while the clients shake hands and work
        self._await(
            lambda: [n for n, peer in self._peers.items() if n not in self._state.manifests and not peer.failed],
            lambda: len(self._state.manifests),
            is_whole=lambda: not self._to_fetch(),
        )

    def _facts(self) -> dict[str, Any]:
        manifests = sorted(self._state.manifests.items())
        return {
            "method": "split",
            "cut_layer": self._plan.model.cut_layer,
            "boundary": self._plan.model.boundary,
            "n_examples": {name: _counts(manifest) for name, manifest in manifests},
            "n_truncated": {name: manifest.n_truncated for name, manifest in manifests},
            "left_out": sorted(set(self._plan.node_keys) - set(self._state.manifests)),
            "store_bytes": sum(entry.n_bytes for _, manifest in manifests for entry in manifest.shards),
        }


def _counts(manifest: Manifest) -> dict[str, int]:
    counts = {"train": 0, "test": 0, "tokens": 0}
    for entry in manifest.shards:
        counts[entry.split] += entry.n_examples
        counts["tokens"] += entry.n_tokens
    return counts


def _is_there(path: Path, n_bytes: int) -> bool:
    try:
        return path.stat().st_size == n_bytes
    except OSError:
        return False
