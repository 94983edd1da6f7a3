"""`cloister collateral fetch` against a server of our own, and how it fails; nothing here leaves this machine."""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote as percent

import httpx
import pytest

import cloister
from cloister.api import fetch_for_quote, fetch_for_snp_report
from cloister.attest import SimulatedAttester, SimulatedRoot, snp_certificate_paths
from cloister.attest._simulated.amd_root import SimulatedAmdRoot, SimulatedSnpAttester
from cloister.cli import main
from cloister.errors import AttestationError, CloisterError, ConfigError, MalformedEvidenceError

NOW = 1_800_000_000
Answer = tuple[int, dict[str, str], bytes]


class Service:
    """A vendor's service on the loopback interface: path -> answer, and what it was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.delay_s = 0.0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                service.asked.append(self.path)
                time.sleep(service.delay_s)
                status, headers, body = next(
                    (a for start, a in service.answers.items() if self.path.startswith(start)), (404, {}, b"")
                )
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


@pytest.fixture
def run(capsys):
    def call(*args: object) -> tuple[int, str]:
        code = main(["collateral", "fetch", *map(str, args)])
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err and err.count("error: ") == (0 if code == 0 else 1)
        return code, err

    return call


@pytest.fixture
def intel(tmp_path: Path, service: Service):
    """A simulated quote, and the service that has its collateral."""
    root = SimulatedRoot.create(tmp_path / "root", now=NOW)
    evidence = SimulatedAttester(root.provision(), rtmr3=bytes(48)).evidence(bytes(64))
    found = json.loads(evidence.aux)

    def statement(name: str, key: str) -> bytes:
        return f'{{"{key}":{found[name]},"signature":"{found[f"{name}_signature"]}"}}'.encode()

    tcb, identity = statement("tcb_info", "tcbInfo"), statement("qe_identity", "enclaveIdentity")
    service.answers = {
        "/sgx/certification/v4/pckcrl": (
            200, {"SGX-PCK-CRL-Issuer-Chain": percent(found["pck_crl_issuer_chain"])}, bytes.fromhex(found["pck_crl"]),
        ),
        "/tdx/certification/v4/tcb": (200, {"TCB-Info-Issuer-Chain": percent(found["tcb_info_issuer_chain"])}, tcb),
        "/tdx/certification/v4/qe/identity": (
            200, {"SGX-Enclave-Identity-Issuer-Chain": percent(found["qe_identity_issuer_chain"])}, identity,
        ),
        "/sgx/certification/v4/rootcacrl": (200, {}, found["root_ca_crl"].encode()),
    }  # fmt: skip
    (tmp_path / "quote.bin").write_bytes(evidence.blob)
    return tmp_path / "quote.bin"


def test_collateral_of_a_quote_is_what_a_verifier_takes(intel, service, run, tmp_path, capsys):
    out = tmp_path / "collateral.json"
    code, err = run("--quote", intel, "--out", out, "--pccs", service.url + "/")
    assert code == 0 and service.url in err and "untrusted until" in err
    assert len(service.asked) == 4 and not any("report" in path for path in service.asked)
    given = [str(intel), "--type", "simulated", "--collateral", str(out), "--now", str(NOW)]
    assert main(["policy", "init", *given, "--allow-simulated", "--out", str(tmp_path / "p.toml")]) == 0
    assert main(["verify", *given, "--policy", str(tmp_path / "p.toml")]) == 0


def test_service_that_is_down_or_answers_nonsense(intel, service, run, tmp_path):
    out = tmp_path / "c.json"
    code, err = run("--quote", intel, "--out", out, "--pccs", "http://127.0.0.1:1")
    assert code == 1 and "could not be fetched" in err and "hint: " in err
    service.answers = {"/": (200, {}, b"hello")}
    assert run("--quote", intel, "--out", out, "--pccs", service.url)[0] == 1
    service.answers = {"/": (503, {}, b"")}
    assert run("--quote", intel, "--out", out, "--pccs", service.url)[0] == 1
    assert not out.exists()


def test_service_that_is_slow(intel, service):
    service.delay_s = 0.5
    with pytest.raises(CloisterError, match="did not answer within 0 s"):
        fetch_for_quote(intel.read_bytes(), url=service.url, timeout_s=0.1)


def test_answer_that_is_too_large(intel, service, monkeypatch):
    monkeypatch.setattr("cloister.attest._collateral.MAX_EVIDENCE_AUX_BYTES", 100)
    with pytest.raises(CloisterError, match="larger than 100 bytes"):
        fetch_for_quote(intel.read_bytes(), url=service.url)


@pytest.mark.parametrize("url", ["nonsense", "ftp://x", "https://x y", "", "file:///etc/passwd"])
def test_address_that_is_none(intel, url, no_network):
    with pytest.raises(ConfigError, match="not the address"):
        fetch_for_quote(intel.read_bytes(), url=url)
    with pytest.raises(ConfigError, match="not the address"):
        fetch_for_snp_report(bytes(1184), url=url)


def test_what_is_no_quote_is_not_asked_for(run, service, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello")
    assert run("--quote", path, "--out", tmp_path / "c", "--pccs", service.url)[0] == 5
    assert run("--snp-report", path, "--out", tmp_path / "c", "--kds", service.url)[0] == 5
    assert run("--quote", tmp_path / "no", "--out", tmp_path / "c")[0] == 2
    assert service.asked == []


def test_file_that_cannot_be_written(intel, service, run, tmp_path):
    assert run("--quote", intel, "--out", tmp_path / "no" / "c", "--pccs", service.url)[0] == 7


@pytest.fixture(scope="module")
def amd() -> SimulatedAmdRoot:
    return SimulatedAmdRoot(now=NOW)


def report(root: SimulatedAmdRoot, **fields: object) -> bytes:
    return SimulatedSnpAttester(root, host_data=bytes(32), **fields).evidence(bytes(64)).blob  # pyright: ignore


def answers(root: SimulatedAmdRoot) -> dict[str, Answer]:
    """What AMD's service has of this chip."""
    parts = list(root.parts("vcek").values())
    chain = "".join(ssl.DER_cert_to_PEM_cert(der) for der in parts[1:3]).encode()
    return {"/vcek/v1/Milan/cert_chain": (200, {}, chain), f"/vcek/v1/Milan/{root.chip_id.hex()}": (200, {}, parts[0])}


def test_certificates_of_a_report_are_what_a_verifier_takes(amd, service, run, tmp_path):
    service.answers = answers(amd)
    path, out = tmp_path / "report.bin", tmp_path / "chain.pem"
    path.write_bytes(report(amd))
    code, err = run("--snp-report", path, "--out", out, "--kds", service.url)
    assert code == 0 and "learns the chip's id" in err
    assert service.asked[0].endswith("?blSPL=04&teeSPL=01&snpSPL=24&ucodeSPL=219")
    given = [str(path), "--type", "simulated-snp", "--aux", str(out), "--now", str(NOW)]
    assert main(["policy", "init", *given, "--allow-simulated", "--out", str(tmp_path / "p.toml")]) == 0
    assert main(["verify", *given, "--policy", str(tmp_path / "p.toml")]) == 0


def test_amds_service_fails(amd, service, run, tmp_path):
    path = tmp_path / "report.bin"
    path.write_bytes(report(amd))
    given = ("--snp-report", path, "--out", tmp_path / "chain.pem", "--kds", service.url)
    assert run(*given)[0] == 1
    service.answers = {"/": (429, {}, b"")}
    assert "limits how often" in run(*given)[1]
    service.answers = {"/": (200, {}, b"hello")}
    assert "not VCEK, ASK and ARK" in run(*given)[1]
    service.answers = answers(amd) | {
        "/vcek/v1/Milan/cert_chain": (200, {}, answers(amd)["/vcek/v1/Milan/cert_chain"][2] * 2)
    }
    assert "not VCEK, ASK and ARK" in run(*given)[1]
    service.answers = {"/": (200, {}, bytes(70_000))}
    assert "larger than" in run(*given)[1]
    service.answers = {"/": (302, {"Location": "http://127.0.0.1:1/"}, b"")}
    assert "status 302" in run(*given)[1]
    assert "cannot be reached" in run(*given[:-1], "http://127.0.0.1:1")[1]
    assert not (tmp_path / "chain.pem").exists()


def test_amds_own_address_is_the_default(amd):
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        found = next(a for start, a in answers(amd).items() if request.url.path.startswith(start))
        return httpx.Response(200, content=found[2])

    pem = fetch_for_snp_report(report(amd), transport=httpx.MockTransport(answer))
    assert pem.count(b"BEGIN CERTIFICATE") == 3 and {url.host for url in asked} == {"kdsintf.amd.com"}


def test_reports_that_amd_cannot_be_asked_about(amd):
    with pytest.raises(AttestationError, match="only the cloud provider"):
        snp_certificate_paths(report(amd, kind="vlek"))
    with pytest.raises(AttestationError, match="masks the chip id"):
        snp_certificate_paths(report(amd, chip_id=bytes(64)))
    with pytest.raises(MalformedEvidenceError):
        snp_certificate_paths(b"hello")
    with pytest.raises(ConfigError, match="of a milan processor, not of genoa"):
        snp_certificate_paths(report(amd), product="genoa")


def test_turin_has_short_ids_and_other_levels():
    root = SimulatedAmdRoot(now=NOW, product="turin")
    paths = snp_certificate_paths(report(root))
    assert paths.leaf == f"vcek/v1/Turin/{root.hw_id.hex()}?fmcSPL=02&blSPL=04&teeSPL=01&snpSPL=24&ucodeSPL=219"
    assert paths.chain == "vcek/v1/Turin/cert_chain"


def test_report_of_version_2_does_not_say_its_product(samples):
    blob = (samples / "snp" / "trustee" / "test-report.bin").read_bytes()
    with pytest.raises(ConfigError, match="version 2"):
        snp_certificate_paths(blob)
    paths = snp_certificate_paths(blob, product="milan")
    assert paths.leaf.endswith("?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115") and len(paths.leaf) > 128


def test_nothing_else_asks_the_vendors():
    """The tests of the other commands watch Python's sockets; the quote library has its own, behind one function."""
    package = Path(cloister.__file__).parent
    calls = {path.name: path.parent.name for path in package.rglob("*.py") if "get_collateral" in path.read_text()}
    assert calls == {"_collateral.py": "attest"}
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"fetch_intel_collateral|fetch_for_quote|fetch_for_snp_report", path.read_text())
    }
    assert users == {
        "api/__init__.py", "api/_collateral.py", "attest/__init__.py", "attest/_collateral.py", "cli/_evidence.py",
    }  # fmt: skip


def test_arguments(capsys):
    for args in ([], ["--quote", "q"], ["--quote", "q", "--snp-report", "r", "--out", "o"]):
        with pytest.raises(SystemExit):
            main(["collateral", "fetch", *args])
    with pytest.raises(SystemExit):
        main(["collateral"])
    assert "COMMAND" in capsys.readouterr().err
