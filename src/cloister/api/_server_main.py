"""`python -m cloister.api._server_main`: the server enclave process, of either method."""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.attest import Policy, verify_evidence
from cloister.enclave import HostServer

from ._enclave_start import start_enclave
from ._events import EventFile
from ._folder import RunFolder
from ._process import die_with_parent, fail_on_thread_bug, run_main, set_up_logging

if TYPE_CHECKING:
    from cloister.attest import Attester, Decision
    from cloister.federation import EnclaveServerPlan, ServerRun, SplitServerPlan
    from cloister.wire import Evidence


def main() -> None:
    """Arguments name files only; the one secret comes over standard input after hardening."""
    parser = argparse.ArgumentParser(prog="cloister-server-enclave")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    die_with_parent(args.parent)
    os.umask(0o077)
    folder = RunFolder(args.run)
    set_up_logging(folder.logs / "server.log")
    fail_on_thread_bug()
    events = EventFile(folder.server / "events.jsonl", "server")
    run_main(lambda: _serve(folder, args.socket, events), events)


def _serve(folder: RunFolder, socket_path: Path, events: EventFile) -> None:
    from cloister.federation import read_node_key

    job = folder.read_job()
    policy = Policy.load(folder.policy)
    node_keys = {name: read_node_key(folder.registered_key(name)) for name in job.client_names}
    started = start_enclave(
        job, folder, policy, socket_path=socket_path, work=folder.server, read=[folder.inbox]
    )  # fmt: skip
    from ._plans import enclave_server_plan, server_plan

    if job.method.name == "enclave":
        run = _enclave_server(enclave_server_plan(job, folder, policy, node_keys), started.attester, events)
    else:
        run = _split_server(server_plan(job, folder, policy, node_keys), started.attester, events)
    events.emit("ready", layers=list(started.layers), rtmr3=started.register.hex(), pid=os.getpid())
    server = HostServer(started.listener, run.handle)
    threading.Thread(target=server.serve_forever, name="host-port", daemon=True).start()
    try:
        run.work()
        run.wait_for_stop()
    finally:
        run.close()


def _split_server(plan: SplitServerPlan, attester: Attester, events: EventFile) -> ServerRun:
    from cloister.federation import SplitServer

    return SplitServer(plan, attester, now=time.time, emit=events.emit)


def _enclave_server(plan: EnclaveServerPlan, attester: Attester, events: EventFile) -> ServerRun:
    from cloister.federation import EnclaveServer

    from ._local_model import starting_adapter

    def verify(evidence: Evidence, data: bytes) -> Decision:
        return verify_evidence(evidence, plan.policy, role="client", report_data=data, now=int(time.time()))

    return EnclaveServer(
        plan,
        attester,
        load=lambda: starting_adapter(plan),
        verify_client=verify,
        now=time.time,
        emit=events.emit,
    )


if __name__ == "__main__":
    main()
