"""What a hardened process can no longer do, tried in real processes. The honest limits are in spec/attestation.md."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cloister.enclave._kernel import REFUSED_SYSCALLS, LinuxKernel, syscall_number

HARDEN = "results['layers'] = list(harden(work_dirs=[work], read_dirs=[read]))\n"
kernel = LinuxKernel()
needs_landlock = pytest.mark.skipif(
    kernel.syscall("landlock_create_ruleset", None, 0, 1) < 1, reason="this kernel has no Landlock"
)
NOBODY = 65534


def test_layers_hold_and_are_reported(hardened):
    results = hardened(
        HARDEN
        + """
import resource
results["dumpable"] = kernel.syscall("prctl", 3, 0, 0, 0, 0)
results["core"] = list(resource.getrlimit(resource.RLIMIT_CORE))
status = dict(line.split(":", 1) for line in kernel.process_status().splitlines())
results["seccomp"], results["new_privs"] = int(status["Seccomp"]), int(status["NoNewPrivs"])
"""
    )
    assert {"no_dump", "no_tracer", "no_core", "no_new_privs", "seccomp"} <= set(results["layers"])
    assert results["dumpable"] == 0
    assert results["core"] == [0, 0]
    assert (results["seccomp"], results["new_privs"]) == (2, 1)


def test_every_refused_system_call(hardened):
    names = [name for name in REFUSED_SYSCALLS if syscall_number(name, kernel.machine, REFUSED_SYSCALLS) >= 0]
    results = hardened(HARDEN + f"for name in {names!r}:\n    results[name] = raw(name, 0, 0, 0, 0, 0, 0)\n")
    assert {name: results[name] for name in names} == dict.fromkeys(names, errno.EPERM)


def test_no_network_no_programs_no_processes(hardened):
    results = hardened(
        HARDEN
        + """
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", 9)))
attempt("unix", lambda: socket.socket(socket.AF_UNIX))
attempt("program", lambda: subprocess.run([sys.executable, "-c", ""]))
attempt("exec", lambda: os.execv(sys.executable, [sys.executable]))
attempt("fork", os.fork)
attempt("dumpable", lambda: raw("prctl", 4, 1, 0, 0, 0))
attempt("ptracer", lambda: raw("prctl", 0x59616D61, os.getppid(), 0, 0, 0))
attempt("namespace", lambda: raw("clone", 0x10000011, 0, 0, 0, 0))
attempt("clone3", lambda: raw("clone3", 0, 0))
attempt("pair", socket.socketpair)
def in_thread():
    attempt("thread", lambda: socket.socket(socket.AF_INET))
thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
"""
    )
    refused = ("tcp", "unix", "program", "exec", "fork", "thread")
    assert {name: results[name] for name in refused} == dict.fromkeys(refused, "PermissionError")
    assert (results["dumpable"], results["ptracer"], results["namespace"]) == (errno.EPERM,) * 3
    assert results["clone3"] == errno.ENOSYS
    assert results["pair"] == "ok"


@needs_landlock
def test_files_only_where_they_are_allowed(hardened):
    results = hardened(
        HARDEN
        + """
attempt("write", lambda: (work / "file").write_text("x"))
attempt("folder", lambda: (work / "sub").mkdir())
attempt("move", lambda: (work / "file").replace(work / "sub" / "file"))
attempt("remove", lambda: (work / "sub" / "file").unlink())
attempt("read", lambda: (read / "file").read_text())
attempt("random", lambda: len(open("/dev/urandom", "rb").read(4)))
attempt("null", lambda: open("/dev/null", "wb").write(b"x"))
attempt("read_elsewhere", lambda: (folder / "secret").read_text())
attempt("write_read_only", lambda: (read / "new").write_text("x"))
attempt("truncate_read_only", lambda: os.truncate(read / "file", 0))
attempt("write_elsewhere", lambda: (folder / "new").write_text("x"))
attempt("move_out", lambda: (work / "sub").replace(folder / "sub"))
attempt("link_in", lambda: os.link(folder / "secret", work / "secret"))
attempt("parent_memory", lambda: open(f"/proc/{os.getppid()}/mem", "rb"))
attempt("parent_environment", lambda: open(f"/proc/{os.getppid()}/environ", "rb").read())
attempt("signal_parent", lambda: os.kill(os.getppid(), 0))
def in_thread():
    attempt("thread", lambda: (folder / "secret").read_text())
thread = threading.Thread(target=in_thread)
thread.start()
thread.join()
"""
    )
    assert results["read"] == "readable"
    allowed = ("write", "folder", "move", "remove", "random", "null")
    assert all(results[name] in ("ok", 1, 4) for name in allowed), results
    denied = ("read_elsewhere", "write_read_only", "truncate_read_only", "write_elsewhere", "parent_memory", "thread")
    assert {name: results[name] for name in denied} == dict.fromkeys(denied, "PermissionError")
    assert {results[name] for name in ("move_out", "link_in")} <= {"PermissionError", "OSError"}
    if "landlock_scope" in results["layers"]:
        assert results["signal_parent"] == "PermissionError"


def test_socket_that_was_bound_before_still_serves(hardened):
    results = hardened(
        """
listener = bind_host_socket(work / "s")
client = socket.socket(socket.AF_UNIX)
client.connect(str(work / "s"))
"""
        + HARDEN
        + """
from cloister.wire import pack, unpack
server = HostServer(listener, lambda method, body: {"got": method})
threading.Thread(target=server.serve_forever, daemon=True).start()
message = pack("host.request", {"method": "hello", "body": {}})
client.sendall(len(message).to_bytes(4, "big") + message)
size = int.from_bytes(client.recv(4), "big")
results["answer"] = unpack(client.recv(size), "host.answer")["body"]["got"]
server.close()
"""
    )
    assert results["answer"] == "hello"


def test_secret_memory_after_hardening(hardened):
    results = hardened(HARDEN + "s = SecretBytes(b'k' * 32); results['same'] = s.reveal() == b'k' * 32; s.close()")
    assert results["same"]


def test_threads_before_hardening_are_refused(hardened):
    results = hardened(
        """
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
attempt("harden", lambda: harden(work_dirs=[work], read_dirs=[]))
stop.set()
"""
    )
    assert results["harden"] == "HardeningError"


def test_attached_tracer_is_refused(hardened):
    """A child traces the enclave process before it hardens itself."""
    results = hardened(
        """
kernel.syscall("prctl", 0x59616D61, -1, 0, 0, 0)
ready, go = os.pipe(), os.pipe()
parent = os.getpid()
child = os.fork()
if child == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    PTRACE_SEIZE = 0x4206
    seized = libc.ptrace(PTRACE_SEIZE, parent, None, None)
    os.write(ready[1], b"1" if seized == 0 else b"0")
    os.read(go[0], 1)
    os._exit(0)
results["seized"] = os.read(ready[0], 1) == b"1"
attempt("harden", lambda: harden(work_dirs=[work], read_dirs=[]))
os.write(go[1], b"x")
os.waitpid(child, 0)
"""
    )
    if not results["seized"]:
        pytest.skip("this system lets no process trace another")
    assert results["harden"] == "HardeningError"


VICTIM = """
import ctypes, os, sys, time
from pathlib import Path
from cloister.enclave import harden
if os.getuid() == 0:
    os.setresgid({nobody}, {nobody}, {nobody})
    os.setresuid({nobody}, {nobody}, {nobody})
# Changing the user makes a process undumpable by itself: undo that, so that the control shows the difference.
libc = ctypes.CDLL(None)
libc.prctl(4, 1, 0, 0, 0)
libc.prctl(0x59616D61, -1, 0, 0, 0)
secret = ctypes.create_string_buffer(b"the key of " + b"the enclave")
if sys.argv[1] == "hardened":
    harden(work_dirs=[], read_dirs=[])
print(ctypes.addressof(secret), flush=True)
time.sleep(60)
"""
THIEF = """
import ctypes, os, sys
pid, address = int(sys.argv[1]), int(sys.argv[2])
if os.getuid() == 0:
    os.setresgid({nobody}, {nobody}, {nobody})
    os.setresuid({nobody}, {nobody}, {nobody})
libc = ctypes.CDLL(None, use_errno=True)
def report(name, stolen):
    print(name, "stolen" if stolen else "refused", flush=True)
try:
    with open(f"/proc/{{pid}}/mem", "rb") as memory:
        memory.seek(address)
        report("mem", memory.read(22) == b"the key of the enclave")
except OSError:
    report("mem", False)
class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
buffer = ctypes.create_string_buffer(22)
local, remote = IoVec(ctypes.addressof(buffer), 22), IoVec(address, 22)
n_read = libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
report("process_vm_readv", n_read == 22 and buffer.raw == b"the key of the enclave")
report("ptrace", libc.ptrace(0x4206, pid, None, None) == 0)
try:
    os.listdir(f"/proc/{{pid}}/fd")
    report("descriptors", True)
except OSError:
    report("descriptors", False)
"""


def steal(mode: str, tmp_path: Path) -> dict[str, str]:
    """What another process of the same user gets out of a victim."""
    victim_code = textwrap.dedent(VICTIM).format(nobody=NOBODY)
    thief_code = textwrap.dedent(THIEF).format(nobody=NOBODY)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(
        [sys.executable, "-c", victim_code, mode], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert victim.stdout is not None
        address = victim.stdout.readline().strip()
        assert address, "the victim could not start as another user"
        thief = subprocess.run(
            [sys.executable, "-c", thief_code, str(victim.pid), address],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
    return dict(line.split() for line in thief.stdout.splitlines())


def test_other_process_of_the_same_user_reads_nothing(tmp_path):
    control = steal("plain", tmp_path)
    if set(control.values()) == {"refused"}:
        pytest.skip("this system already keeps processes of one user apart (Yama); there is nothing to compare with")
    assert control["mem"] == control["process_vm_readv"] == control["ptrace"] == "stolen"
    found = steal("hardened", tmp_path)
    assert set(found) == {"mem", "process_vm_readv", "ptrace", "descriptors"}
    assert set(found.values()) == {"refused"}


@pytest.mark.slow
def test_torch_trains_in_a_hardened_process(hardened):
    results = hardened(
        HARDEN
        + """
import torch
torch.manual_seed(0)
layer = torch.nn.Linear(16, 16)
optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
inputs = torch.randn(256, 16)
losses = []
for _ in range(5):
    loss = (layer(inputs) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
results["falls"] = losses[-1] < losses[0]
torch.set_num_threads(2)
results["threads"] = float((torch.randn(600, 600) @ torch.randn(600, 600)).sum()) != 0.0
attempt("socket", lambda: socket.socket(socket.AF_INET))
"""
    )
    assert results["falls"]
    assert results["threads"]
    assert results["socket"] == "PermissionError"
