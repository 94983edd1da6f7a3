"""`python -m cloister.api._server_main`: the server enclave process.

Start-up order (attestation-and-channel.md section 2): listen, harden, and only then take secrets; measure everything
that decides what this process does, and only then make evidence.
"""

from __future__ import annotations

import argparse
import os
import site
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cloister.attest import (
    BackendSettings,
    Measured,
    Policy,
    measure_folder,
    measure_package,
    measurement_events,
    open_backend,
)
from cloister.enclave import HostServer, bind_host_socket, harden

from ._events import EventFile
from ._folder import RunFolder
from ._process import die_with_parent, fail_on_thread_bug, run_main, set_up_logging

if TYPE_CHECKING:
    from cloister.config import Job

MAX_PROVISION_BYTES = 1 << 20


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
    listener = bind_host_socket(socket_path)
    os.environ["TMPDIR"] = str(folder.server)
    backend = open_backend(job.enclave.backend, _settings(job, folder))
    layers = harden(
        work_dirs=[folder.server, *backend.write_dirs],
        read_dirs=[*_code_dirs(), folder.model, folder.inbox, *backend.read_dirs],
    )
    provision = sys.stdin.buffer.read(MAX_PROVISION_BYTES) if backend.needs_provision else b""

    from cloister.federation import SplitServer

    from ._plans import server_plan

    events_of_self = measurement_events(
        package=measure_package(),
        job_sha384=job.sha384,
        policy_template=policy.template_sha384,
        weights=measure_folder(folder.model),
    )
    measured = Measured(tuple(events_of_self), layers, provision)
    attester = backend.start(measured)
    plan = server_plan(job, folder, policy, node_keys)
    run = SplitServer(plan, attester, now=time.time, emit=events.emit)
    events.emit("ready", layers=list(layers), rtmr3=measured.register.hex(), pid=os.getpid())
    server = HostServer(listener, run.handle)
    threading.Thread(target=server.serve_forever, name="host-port", daemon=True).start()
    try:
        run.work()
        run.wait_for_stop()
    finally:
        run.close()


def _settings(job: Job, folder: RunFolder) -> BackendSettings:
    given = job.enclave
    return BackendSettings(
        collateral=Path(given.collateral) if given.collateral else None,
        td_quote=Path(given.td_quote) if given.td_quote else None,
        tcti=given.tcti,
        state_dir=folder.server,
        counter_index=given.counter_index,
        gpu=given.gpu,
        sealing=given.sealing,
    )


def _code_dirs() -> list[Path]:
    """Where the interpreter and the installed packages lie."""
    import cloister

    found = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *site.getsitepackages()}
    found.add(str(Path(cloister.__file__).parent))
    return [Path(path) for path in sorted(found) if Path(path).exists()]


if __name__ == "__main__":
    main()
