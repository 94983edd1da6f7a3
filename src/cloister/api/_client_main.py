"""`python -m cloister.api._client_main`: one institution's client process, on an ordinary machine (Method 2)."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.attest import Policy, measure_folder
from cloister.enclave import HostServer, bind_host_socket
from cloister.errors import CloisterError

from ._events import EventFile
from ._folder import RunFolder
from ._process import die_with_parent, fail_on_thread_bug, run_main, set_up_logging

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cloister.federation import SplitClientPlan
    from cloister.slicing import BackboneInfo, NearSide
    from cloister.train import NearRun


def main() -> None:
    """Arguments name files only."""
    parser = argparse.ArgumentParser(prog="cloister-client")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    os.umask(0o077)
    folder = RunFolder(args.run)
    set_up_logging(folder.logs / f"client-{args.name}.log")
    fail_on_thread_bug()
    events = EventFile(folder.client(args.name) / "events.jsonl", f"client/{args.name}")
    run_main(lambda: _serve(folder, args.name, args.socket, events), events)


def _serve(folder: RunFolder, name: str, socket_path: Path, events: EventFile) -> None:
    from cloister.federation import ClientRun, NearWork

    from ._plans import client_plan

    listener = bind_host_socket(socket_path)
    plan = client_plan(folder.read_job(), folder, Policy.load(folder.policy), name)
    near = NearSideLoader(plan)
    work = NearWork(plan, near.near_run, emit=events.emit)
    run = ClientRun(plan, work, now=time.time, emit=events.emit)
    events.emit("ready", pid=os.getpid())
    server = HostServer(listener, run.handle)
    threading.Thread(target=server.serve_forever, name="host-port", daemon=True).start()
    near.start()
    run.wait_for_stop()


class NearSideLoader:
    """Loads the public near side while the relay comes up and the handshake runs; the text is not touched by that."""

    def __init__(self, plan: SplitClientPlan) -> None:
        self._plan = plan
        self._loaded: Future[tuple[NearSide, PreTrainedTokenizerBase, BackboneInfo]] = Future()

    def start(self) -> None:
        """Loads in the calling thread; an error waits for whoever needs the near side."""
        from cloister.slicing import inspect_backbone, load_near, load_tokenizer

        try:
            info = inspect_backbone(self._plan.model.path)
            self._loaded.set_result((load_near(info, self._plan.model.cut_layer), load_tokenizer(info), info))
        except CloisterError as error:
            self._loaded.set_exception(error)

    def near_run(self, on_progress: Callable[[int, int, int], None], stop: threading.Event) -> NearRun:
        """The near run; called once the server enclave is verified and asks for it."""
        from cloister.train import NearRun, open_store

        plan = self._plan
        near, tokenizer, info = self._loaded.result()
        return NearRun(
            near,
            tokenizer,
            plan.task,
            model_max_length=info.max_length,
            near_digest=measure_folder(Path(plan.model.path)) + bytes([plan.model.cut_layer]),
            boundary=plan.model.boundary,
            batch_size=plan.near_batch_size,
            shard_max_bytes=plan.shard_max_bytes,
            work_dir=plan.work,
            store=open_store(plan.store_url, **plan.store_options),
            run_id=plan.run_id,
            client=plan.name,
            job_sha384=plan.job_sha384,
            on_progress=on_progress,
            stop=stop,
        )


if __name__ == "__main__":
    main()
