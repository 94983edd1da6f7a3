"""`cloister measure` and `cloister doctor`: what an enclave of this release will measure, and what this machine has."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

from cloister._format import human_bytes
from cloister.cli._views import STAMP


def measure(args: argparse.Namespace) -> int:
    """`cloister measure`: the expected registers, as lines for the policy."""
    from cloister.api import measure_job
    from cloister.config import check_job, load_job

    job = load_job(args.job)
    check_job(job)
    found = measure_job(job, policy_file=args.policy)
    if args.json:
        sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n")
        return 0
    if not found.policy_source:
        sys.stderr.write(
            f"{STAMP}: the job names no policy, so this is for the one that a run writes for a software root\n"
        )
    policy = found.policy_source or "of a simulated run on this machine"
    sys.stdout.write(
        f"# cloister measure: job {found.job_name}, policy {policy}\n"
        f"# package  {found.package}\n"
        f"# job      {found.job}\n"
        f"# policy   {found.policy_template}\n"
        f"# weights  {found.weights}\n"
        "\n"
        f'[roles.server.tdx]\nrtmr3 = ["{found.rtmr3}"]\n\n'
        f'[roles.server.snp]\nhost_data = ["{found.host_data}"]\n\n'
        f'[roles.server.vtpm]\npcr15 = ["{found.pcr15}"]\n'
    )
    sys.stderr.write("take in the lines of your TEE; these values do not change the policy's template hash\n")
    return 0


def doctor(args: argparse.Namespace) -> int:
    """`cloister doctor`: what was found, what is missing and what to do. A report, so it exits with 0."""
    from cloister.api import examine_machine

    found = examine_machine()
    if args.json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write("\n".join(_doctor_lines(found)) + "\n")
    return 0


def _doctor_lines(found: dict[str, Any]) -> Iterator[str]:
    yield "attestation backends"
    for backend in found["backends"]:
        yield f"  {backend['type'].ljust(10)} {'found' if backend['found'] else 'missing'}"
        yield from (f"    has      {line}" for line in backend["has"])
        yield from (f"    missing  {line}" for line in backend["missing"])
        if backend["hint"]:
            yield f"    hint     {backend['hint']}"
    stamp = f" ({STAMP}: no TEE)" if found["job_backend"].startswith("simulated") else ""
    yield f'  a job uses the one that it names in [enclave].backend; without that key "{found["job_backend"]}"{stamp}'
    yield ""
    yield "hardening of the enclave process"
    for layer in found["layers"]:
        need = "" if layer["available"] or not layer["required"] else "  REQUIRED: a run will not start"
        yield f"  {layer['name'].ljust(14)} {'available' if layer['available'] else 'not available'}{need}"
    yield ""
    yield "versions"
    yield from (f"  {name.ljust(14)} {version or 'not installed'}" for name, version in found["versions"].items())
    yield ""
    yield "Flower"
    for process in found["flower"]:
        state = "starts" if process["starts"] else f"DOES NOT START: {process['why']}"
        yield f"  {process['command'].ljust(18)} {state}"
    yield ""
    yield "room"
    memory = found["memory"]
    yield f"  memory  {human_bytes(memory['available'])} available of {human_bytes(memory['total'])}"
    yield from (f"  disk    {human_bytes(disk['free'])} free at {disk['folder']}" for disk in found["disk"])
