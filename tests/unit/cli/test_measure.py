"""`cloister measure`: the values of a release and a job, which every clean build of one commit gives alike."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

import cloister
from cloister.attest import (
    Policy,
    SimulatedRoot,
    expected_host_data,
    expected_pcr,
    expected_rtmr3,
    measure_package,
    measurement_events,
)
from cloister.testing import write_tiny_job

ROOT = Path(__file__).parents[3]
SOURCE = Path(cloister.__file__).parent


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def run(capsys, no_network):
    from cloister.cli import main

    def call(*args: object) -> tuple[int, str, str]:
        code = main(["measure", *map(str, args)])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call


def test_values_for_the_policy_of_a_job(run, job, desk):
    code, out, err = run(job, "--policy", desk.policy, "--json")
    found = json.loads(out)
    assert code == 0 and "SIMULATED" not in err
    policy = Policy.load(desk.policy)
    digests = {
        "package": measure_package(),
        "job_sha384": bytes.fromhex(found["job"]),
        "policy_template": policy.template_sha384,
        "weights": bytes.fromhex(found["weights"]),
    }
    assert found["rtmr3"] == expected_rtmr3(**digests).hex()
    assert found["host_data"] == expected_host_data(bytes.fromhex(found["rtmr3"])).hex()
    assert found["host_data"] == hashlib.sha256(bytes.fromhex(found["rtmr3"])).hexdigest()
    assert found["pcr15"] == expected_pcr(measurement_events(**digests)).hex()
    assert found["package"] == measure_package().hex() and found["policy_template"] == policy.template_sha384.hex()


def test_the_lines_go_into_the_policy_and_change_nothing_that_is_measured(run, job, desk):
    out = run(job, "--policy", desk.policy)[1]
    lines = tomllib.loads(out)["roles"]["server"]
    assert set(lines) == {"tdx", "snp", "vtpm"}
    desk.write("policy.toml", desk.policy.read_text().replace(desk.rtmr3.hex(), lines["tdx"]["rtmr3"][0]))
    assert run(job, "--policy", desk.policy)[1] == out


def test_without_a_policy_it_is_that_of_a_simulated_run(run, job, tmp_path, monkeypatch):
    """The same value that `cloister run` writes into its policy, and that the enclave then measures."""
    from cloister.api._setup import set_up
    from cloister.config import load_job

    code, out, err = run(job)
    assert code == 0 and err.startswith("SIMULATED: ") and "of a simulated run on this machine" in out
    folder = set_up(load_job(job), tmp_path / "runs")
    [rtmr3] = Policy.load(folder.policy).roles["server"]["tdx"]["rtmr3"]
    assert rtmr3 in out


def test_the_jobs_own_policy(run, job, desk, tmp_path):
    path = tmp_path / "job.toml"
    shutil.copytree(job.parent, tmp_path, dirs_exist_ok=True)
    path.write_text(path.read_text() + f'\n[policy]\nfile = "{desk.policy}"\n')
    code, out, err = run(path)
    assert code == 0 and "SIMULATED" not in err and str(desk.policy) in out
    desk.policy.write_text("version = 2\n")
    assert run(path)[0] == 2


def test_no_job(run, tmp_path):
    assert run(tmp_path / "no.toml")[0] == 2


def test_copies_of_other_times_modes_and_caches_measure_alike(tmp_path):
    first, second = tmp_path / "one" / "cloister", tmp_path / "other place" / "cloister"
    for folder in (first, second):
        shutil.copytree(SOURCE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for number, path in enumerate(sorted(second.rglob("*"))):
        if path.is_file():
            path.chmod(0o600)
            os.utime(path, (number, number))
    (second / "__pycache__").mkdir()
    (second / "__pycache__" / "errors.cpython-311.pyc").write_bytes(b"cache")
    (second / "old.pyc").write_bytes(b"cache")
    (second / ".DS_Store").write_bytes(b"hidden")
    assert measure_package(first) == measure_package(second)
    (second / "errors.py").write_bytes((second / "errors.py").read_bytes() + b"#")
    assert measure_package(first) != measure_package(second)


@pytest.mark.slow
def test_two_clean_builds_of_one_commit_measure_alike(tmp_path):
    """Two checkouts of other places, times and umask, compiled apart: each measures as its source with its kernels."""
    for module in ("scikit_build_core", "nanobind"):
        pytest.importorskip(module, reason=f"{module}, which builds the wheel, is not installed")
    for tool in ("cmake", "c++"):
        if not shutil.which(tool, path=_build_path()):
            pytest.skip(f"there is no {tool} to compile the kernels with")
    commit, measured = tmp_path / "commit", set()
    shutil.copytree(SOURCE, commit / "src" / "cloister", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "native", commit / "native")
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / file, commit / file)
    for name, umask in (("a", 0o022), ("other place", 0o077)):
        tree = shutil.copytree(commit, tmp_path / name)
        for path in (*(tree / "src").rglob("*.py"), *(tree / "native").rglob("*.cpp")):
            os.utime(path, (time.time() - 1000 * umask,) * 2)
        package = _install(tree, umask)
        [kernels] = package.rglob("*.so")
        shutil.copyfile(kernels, tree / "src" / "cloister" / kernels.relative_to(package))
        measured |= {measure_package(package), measure_package(tree / "src" / "cloister")}
    assert len(measured) == 1


def _build_path() -> str:
    """With the tools of this environment before those of the system."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))


def _install(tree: Path, umask: int) -> Path:
    """The package as a wheel of this tree unpacks it."""
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tree / "dist")]
    build = [sys.executable, "-m", "pip", "wheel", *options, "."]
    environment = {**os.environ, "PATH": _build_path()}
    subprocess.run(build, cwd=tree, env=environment, umask=umask, check=True, capture_output=True, timeout=250)
    [wheel] = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tree / "installed")
    return tree / "installed" / "cloister"


def test_the_simulated_root_is_made_once(run, job):
    from cloister.api._platform import cloister_home

    assert run(job)[1] == run(job)[1]
    assert SimulatedRoot.open(cloister_home() / "simulated").root_sha256
