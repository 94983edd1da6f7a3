"""One simulated platform with its evidence in a file, and a `cloister` that must not open a connection."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloister.attest import Policy, SimulatedAttester, SimulatedRoot, expected_rtmr3, render_policy
from cloister.cli import main
from cloister.testing import shared_dir
from cloister.wire import Evidence

NOW = 1_800_000_000
REPORT_DATA = bytes(range(64))


@dataclass
class Desk:
    """What a security officer has: evidence in a file, the policy, and a command line whose output is caught."""

    folder: Path
    root: SimulatedRoot
    rtmr3: bytes
    capsys: pytest.CaptureFixture[str]
    now: int = NOW
    report_data: bytes = REPORT_DATA

    @property
    def policy(self) -> Path:
        return self.folder / "policy.toml"

    @property
    def evidence(self) -> Path:
        return self.folder / "evidence.bin"

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def attest(self, **options) -> Evidence:
        options = {"rtmr3": self.rtmr3, "layers": ("no_dump", "seccomp"), **options}
        return SimulatedAttester(self.root.provision(), **options).evidence(REPORT_DATA)

    def run(self, *args: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr. No command may show a traceback, or more than one error."""
        code = main([str(arg) for arg in args])
        out, err = self.capsys.readouterr()
        assert "Traceback" not in out + err and "bug in cloister" not in err
        assert err.count("error: ") == (0 if code == 0 else 1), err
        return code, out, err


@pytest.fixture(scope="session")
def platform_root(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRoot:
    return SimulatedRoot.create(tmp_path_factory.mktemp("platform") / "root", now=NOW)


@pytest.fixture
def desk(platform_root: SimulatedRoot, tmp_path: Path, capsys, no_network) -> Desk:
    draft = Policy.parse(render_policy(root_sha256=platform_root.root_sha256))
    rtmr3 = expected_rtmr3(
        package=b"p" * 48, job_sha384=b"j" * 48, policy_template=draft.template_sha384, weights=b"w" * 48
    )
    desk = Desk(tmp_path, platform_root, rtmr3, capsys)
    desk.policy.write_bytes(render_policy(root_sha256=platform_root.root_sha256, server_rtmr3=[rtmr3]))
    desk.evidence.write_bytes(desk.attest().to_bytes())
    return desk


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attempt to connect fails the test, whoever makes it."""

    def refuse(self: socket.socket, address: object) -> None:
        pytest.fail(f"a connection to {address!r} was opened")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: refuse(None, args))  # pyright: ignore


@pytest.fixture(scope="session")
def samples() -> Path:
    shared = shared_dir()
    if shared is None:
        pytest.skip("the shared vectors are not here (set CLOISTER_SHARED)")
    return shared / "vectors" / "attestation"
