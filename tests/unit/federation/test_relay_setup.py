"""How the relay's processes are called, what they get to see, and when the relay gives up."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from cloister.errors import ConfigError, RelayError
from cloister.federation._deaths import DEATH_WINDOW_S, MAX_DEATHS, Deaths
from cloister.federation._flower import ClientEndpoint, FlowerSetup, free_port, json_in, require_free
from cloister.federation._keys import generate_node_key, register_node_key
from cloister.federation._relay import Relay
from cloister.federation._tls import make_tls

APP = Path(__file__).parents[3] / "src/cloister/federation/app"


@pytest.fixture
def endpoint(tmp_path: Path) -> ClientEndpoint:
    private, public = tmp_path / "a.pem", tmp_path / "a.pub"
    generate_node_key(private)
    register_node_key(private, public)
    return ClientEndpoint(tmp_path / "sock", private, public)


def make_setup(tmp_path: Path, endpoint: ClientEndpoint, *, tls: bool = True) -> FlowerSetup:
    private = tmp_path / "private"
    private.mkdir()
    return FlowerSetup(
        tmp_path / "relay", private, clients={"a": endpoint}, server_socket=tmp_path / "server", tls=tls,
        host="127.0.0.1", port=4242,
    )  # fmt: skip


def test_relaying_processes_get_no_secret_of_the_caller(
    tmp_path: Path, endpoint: ClientEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    setup = make_setup(tmp_path, endpoint)
    relaying = [
        setup.env(),
        setup.env("a"),
        setup.superexec_env("a", "superexec-a", "flwr-clientapp"),
        setup.clientapp_env("a"),
    ]
    for env in relaying:
        assert "hush" not in env.values()
        assert not any("proxy" in name.lower() for name in env)
    for env in [*relaying, setup.serverapp_env(), setup.keeper_env()]:
        assert env["FLWR_TELEMETRY_ENABLED"] == "0"
        assert env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    # The server's courier fetches shards: it needs the store's key, and must not go through the proxy to the SuperLink.
    assert setup.serverapp_env()["AWS_SECRET_ACCESS_KEY"] == "hush"
    assert "127.0.0.1" in setup.serverapp_env()["no_proxy"]


def test_a_superexec_finds_one_command_and_it_is_ours(tmp_path: Path, endpoint: ClientEndpoint) -> None:
    env = make_setup(tmp_path, endpoint).superexec_env("a", "superexec-a", "flwr-clientapp")
    (command,) = [p for folder in env["PATH"].split(":") for p in Path(folder).iterdir()]
    assert command.name == "flwr-clientapp"
    assert "_app_shim.py" in command.read_text(encoding="utf-8")


def test_tls_and_node_authentication_are_on_by_default(tmp_path: Path, endpoint: ClientEndpoint) -> None:
    setup = make_setup(tmp_path, endpoint)
    assert "--enable-supernode-auth" in setup.superlink()
    assert "--insecure" not in [*setup.superlink(), *setup.supernode("a", 1), *setup.server_superexec()]
    key_file = Path(setup.supernode("a", 1)[-1])
    key = load_ssh_private_key(key_file.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key_file.stat().st_mode & 0o077 == 0


def test_without_tls_no_key_lies_about(tmp_path: Path, endpoint: ClientEndpoint) -> None:
    setup = make_setup(tmp_path, endpoint, tls=False)
    assert "--insecure" in setup.superlink()
    assert not list((tmp_path / "private").glob("*.key*"))


def test_a_node_key_that_is_none_is_named(tmp_path: Path, endpoint: ClientEndpoint) -> None:
    endpoint.node_private_key_path.write_text("nonsense", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"a\.pem"):
        make_setup(tmp_path, endpoint)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_certificate_is_good_for_the_host_and_only_under_its_ca(tmp_path: Path, host: str) -> None:
    (tmp_path / "x").mkdir()
    files, other = make_tls(tmp_path, host), make_tls(tmp_path / "x", host)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.certificate, files.key)
    for ca, accepted in ((files.ca, True), (other.ca, False)):
        ours, theirs = socket.socketpair()

        def answer(end: socket.socket = theirs) -> None:
            try:
                server.wrap_socket(end, server_side=True).close()
            except (ssl.SSLError, OSError):
                end.close()

        thread = threading.Thread(target=answer)
        thread.start()
        context = ssl.create_default_context(cafile=str(ca))
        if accepted:
            context.wrap_socket(ours, server_hostname=host).close()
        else:
            with pytest.raises(ssl.SSLCertVerificationError):
                context.wrap_socket(ours, server_hostname=host)
            ours.close()
        thread.join()


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path, endpoint: ClientEndpoint) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        relay = Relay(tmp_path / "relay", clients={"a": endpoint}, server_socket=tmp_path / "s", port=port)
        with pytest.raises(RelayError, match=str(port)) as caught:
            relay.start()
        assert "federation.port" in caught.value.hint
        assert relay.processes() == {}
        assert not (tmp_path / "relay").exists()
    require_free("127.0.0.1", port)
    assert 0 < free_port() < 65536


def test_a_relay_that_was_never_started_stops_quietly(tmp_path: Path, endpoint: ClientEndpoint) -> None:
    relay = Relay(tmp_path / "relay", clients={"a": endpoint}, server_socket=tmp_path / "s")
    relay.poll()
    relay.stop()
    relay.stop()


def test_what_dies_again_and_again_is_hopeless(tmp_path: Path) -> None:
    events: list[dict[str, object]] = []
    now = [0.0]
    deaths = Deaths(events.append, tmp_path / "logs", clock=lambda: now[0])
    for _ in range(MAX_DEATHS):
        deaths.count("superlink")
    now[0] += DEATH_WINDOW_S
    deaths.count("superlink")
    assert [e["attempt"] for e in events] == list(range(1, MAX_DEATHS + 2))
    for _ in range(MAX_DEATHS - 1):
        deaths.count("superlink")
    deaths.count("supernode-a")
    with pytest.raises(RelayError, match="superlink") as caught:
        deaths.count("superlink")
    assert "logs" in caught.value.hint


@pytest.mark.parametrize(
    ("output", "found"),
    [("", {}), ("no", {}), ('Note\n{"run-id": "1"}\n', {"run-id": "1"}), ("{broken", {}), ("[{}]", {})],
)
def test_json_in_what_a_flower_command_prints(output: str, found: dict[str, str]) -> None:
    assert json_in(output) == found


# --- no code but our own ------------------------------------------------------------------------------------------

GUARDED = """
import importlib, sys
from pathlib import Path
from cloister.federation._app_guard import guard_apps
apps, expected, module = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
guard_apps(apps, expected)
import colorsys  # everything else goes on as before
sys.path.insert(0, str(apps / "bundle"))
try:
    importlib.import_module(module)
except ImportError as error:
    print("refused", error)
else:
    print("loaded")
"""


def load_bundle(tmp_path: Path, files: dict[str, str], module: str = "pkg.client") -> str:
    expected, bundle = tmp_path / "app", tmp_path / "home/apps/bundle"
    for folder in (expected, bundle):
        (folder / "pkg").mkdir(parents=True)
        (folder / "pkg/__init__.py").write_text("", encoding="utf-8")
        (folder / "pkg/client.py").write_text("app = 1\n", encoding="utf-8")
        (folder / "pyproject.toml").write_text("# note\n[a]\nb = 1\n", encoding="utf-8")
    (bundle / "pyproject.toml").write_text("[a]\nb = 1\n", encoding="utf-8")  # as Flower writes it anew
    (expected / "pkg/__pycache__").mkdir()
    (expected / "pkg/__pycache__/client.cpython-311.pyc").write_bytes(b"")
    for name, text in files.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(bundle.parent), str(expected), module],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()[0]


def test_our_own_bundle_is_loaded(tmp_path: Path) -> None:
    assert load_bundle(tmp_path, {}) == "loaded"


@pytest.mark.parametrize(
    ("files", "module"),
    [
        ({"pkg/client.py": "app = 2\n"}, "pkg.client"),
        ({"pkg/__init__.py": "import os\n"}, "pkg.client"),
        ({"evil.py": "\n"}, "evil"),
        ({"evil.py": "\n"}, "pkg.client"),
        ({"pyproject.toml": "[a]\nb = 2\n"}, "pkg.client"),
        ({"pkg/__pycache__/client.cpython-311.pyc": "planted"}, "pkg.client"),
        ({"colorsys.py": "\n"}, "sched"),
    ],
)
def test_any_other_bundle_is_refused(tmp_path: Path, files: dict[str, str], module: str) -> None:
    assert load_bundle(tmp_path, files, module) == "refused"


def test_the_app_is_in_the_installed_package() -> None:
    assert {p.relative_to(APP).as_posix() for p in APP.rglob("*") if p.is_file() and "__pycache__" not in p.parts} == {
        "pyproject.toml", "cloister_courier/__init__.py", "cloister_courier/client.py", "cloister_courier/server.py",
    }  # fmt: skip


def test_couriers_load_no_torch() -> None:
    code = (
        "import sys; from cloister.federation import _courier_client, _courier_server, _relay, _keeper;"
        "assert 'torch' not in sys.modules and 'flwr' not in sys.modules;"
        "_courier_client.make_app(); _courier_server.make_app(); from cloister.train import open_store;"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
