"""`python -m cloister.api._enclave_client_main`: one institution's enclave process (Method 1).

It reads the institution's own text, trains the adapter, and talks to the server enclave; its accelerator and its host
see masked tensors and ciphertext. With `--ask` it only answers the institution's own questions, on its host port.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister.attest import Policy
from cloister.channel import AttestedNodeProver
from cloister.enclave import HostServer
from cloister.errors import MalformedMessageError
from cloister.offload import accelerator_port

from ._enclave_start import StartedEnclave, start_enclave
from ._events import EventFile
from ._folder import RunFolder
from ._process import die_with_parent, fail_on_thread_bug, run_main, set_up_logging

if TYPE_CHECKING:
    from cloister.config import Job
    from cloister.federation import EnclaveClientPlan

MAX_TEXTS = 10_000


def main() -> None:
    """Arguments name files only; the one secret comes over standard input after hardening."""
    parser = argparse.ArgumentParser(prog="cloister-client-enclave")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--accelerator", required=True)
    parser.add_argument("--ask", action="store_true")
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    os.umask(0o077)
    folder = RunFolder(args.run)
    set_up_logging(folder.logs / f"client-{args.name}.log")
    fail_on_thread_bug()
    events = EventFile(folder.client(args.name) / "events.jsonl", f"client/{args.name}")
    serve = _answer if args.ask else _take_part
    run_main(lambda: serve(folder, args.name, args.socket, args.accelerator, events), events)


def _start(
    folder: RunFolder, name: str, socket_path: Path, accelerator: str, *, with_data: bool
) -> tuple[EnclaveClientPlan, StartedEnclave, socket.socket]:
    job, policy = folder.read_job(), Policy.load(folder.policy)
    port = accelerator_port(accelerator)  # a hardened process opens no socket
    started = start_enclave(
        job,
        folder,
        policy,
        socket_path=socket_path,
        work=folder.client(name),
        read=[*_data_paths(job, name, with_data=with_data), folder.path],
    )
    from ._plans import enclave_client_plan  # which loads what starts threads: after hardening

    plan = enclave_client_plan(job, folder, policy, name, with_data=with_data)
    return plan, started, port


def _take_part(folder: RunFolder, name: str, socket_path: Path, accelerator: str, events: EventFile) -> None:
    from cloister.federation import AdapterWork, ClientRun

    from ._local_model import MaskedModel

    plan, started, port = _start(folder, name, socket_path, accelerator, with_data=True)
    work = AdapterWork(plan, partial(MaskedModel, plan, port, emit=events.emit), started.attester.sealing_key("client"))
    prove = partial(AttestedNodeProver, make_evidence=started.attester.evidence)
    run = ClientRun(plan, work, now=time.time, emit=events.emit, prove=prove)
    _ready(events, started)
    _serve_in_thread(started, run.handle)
    run.wait_for_stop()


def _answer(folder: RunFolder, name: str, socket_path: Path, accelerator: str, events: EventFile) -> None:
    """Answers the institution's own questions until its side says stop."""
    from cloister.federation import read_adapter

    from ._local_model import MaskedModel

    plan, started, port = _start(folder, name, socket_path, accelerator, with_data=False)
    adapter = read_adapter(plan, started.attester.sealing_key("client"))
    model = MaskedModel(plan, port, emit=events.emit, with_data=False)
    stop, lock = threading.Event(), threading.Lock()

    def handle(method: str, body: Mapping[str, Any]) -> dict[str, Any]:
        texts, limit = body.get("texts"), body.get("max_new_tokens")
        if method == "status":
            return {"serving": True}
        if method == "stop":
            stop.set()
            return {}
        if method != "ask" or not isinstance(texts, list) or len(texts) > MAX_TEXTS or not isinstance(limit, int):
            raise MalformedMessageError(f"unknown host call {method!r}")
        with lock:
            questions = [tuple(text) if isinstance(text, list) else text for text in texts]
            return {"answers": model.answer(adapter, questions, limit)}

    _ready(events, started)
    _serve_in_thread(started, handle)
    stop.wait()
    model.close()


def _ready(events: EventFile, started: StartedEnclave) -> None:
    events.emit("ready", layers=list(started.layers), rtmr3=started.register.hex(), pid=os.getpid())


def _serve_in_thread(started: StartedEnclave, handle: Callable[[str, Mapping[str, Any]], dict[str, Any]]) -> None:
    server = HostServer(started.listener, handle)
    threading.Thread(target=server.serve_forever, name="host-port", daemon=True).start()


def _data_paths(job: Job, name: str, *, with_data: bool) -> list[Path]:
    return [Path(data.path) for data in job.client(name).datasets.values()] if with_data else []


if __name__ == "__main__":
    main()
