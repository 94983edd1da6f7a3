from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

import cloister
from cloister.attest import expected_rtmr3, measure_folder, measure_package
from cloister.errors import AttestationError


def enc(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one")
    (tmp_path / "b" / "c.bin").write_bytes(b"two")
    return tmp_path


def test_folder_known_answer(folder):
    expected = enc(b"a.txt", hashlib.sha384(b"one").digest()) + enc(b"b/c.bin", hashlib.sha384(b"two").digest())
    assert measure_folder(folder) == hashlib.sha384(expected).digest()


def test_caches_and_hidden_files_do_not_count(folder):
    before = measure_folder(folder)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder / "stray.pyc").write_bytes(b"x")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_bytes(b"x")
    (folder / ".hidden").write_bytes(b"x")
    assert measure_folder(folder) == before


@pytest.mark.parametrize("change", ["content", "name", "extra", "moved"])
def test_every_other_change_counts(folder, change):
    before = measure_folder(folder)
    if change == "content":
        (folder / "a.txt").write_bytes(b"One")
    elif change == "name":
        (folder / "a.txt").rename(folder / "A.txt")
    elif change == "extra":
        (folder / "empty").write_bytes(b"")
    else:
        (folder / "b" / "c.bin").rename(folder / "c.bin")
    assert measure_folder(folder) != before


def test_link_to_a_file_counts_as_the_file(folder, tmp_path_factory):
    before = measure_folder(folder)
    blob = tmp_path_factory.mktemp("blobs") / "blob"
    (folder / "a.txt").rename(blob)
    (folder / "a.txt").symlink_to(blob)
    assert measure_folder(folder) == before


def test_link_to_a_folder_is_refused(folder, tmp_path_factory):
    (folder / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(AttestationError, match="link to a folder"):
        measure_folder(folder)


def test_nothing_to_measure(tmp_path):
    with pytest.raises(AttestationError, match="nothing to measure"):
        measure_folder(tmp_path)
    with pytest.raises(AttestationError, match="cannot measure"):
        measure_folder(tmp_path / "missing")


def test_dangling_link(folder):
    (folder / "dangling").symlink_to(folder / "nowhere")
    with pytest.raises(AttestationError, match="dangling"):
        measure_folder(folder)


def test_package_measures_the_installed_files(tmp_path):
    installed = Path(cloister.__file__).parent
    copy = tmp_path / "cloister"
    shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert measure_package() == measure_package(copy)
    (copy / "errors.py").write_text("# other code\n")
    assert measure_package() != measure_package(copy)


def test_package_without_its_lock_file(folder):
    with pytest.raises(AttestationError, match=r"constraints\.txt"):
        measure_package(folder)


def test_rtmr3_known_answer():
    register = bytes(48)
    for label, value in ((b"package", b"p"), (b"job", b"j"), (b"policy", b"t"), (b"weights", b"w")):
        event = hashlib.sha384(enc(b"cloister-measure/v1", label, value * 48)).digest()
        register = hashlib.sha384(register + event).digest()
    assert register == expected_rtmr3(
        package=b"p" * 48, job_sha384=b"j" * 48, policy_template=b"t" * 48, weights=b"w" * 48
    )


@pytest.mark.parametrize("name", ["package", "job_sha384", "policy_template", "weights"])
def test_rtmr3_depends_on_every_measurement(name):
    values = dict.fromkeys(["package", "job_sha384", "policy_template", "weights"], bytes(48))
    assert expected_rtmr3(**values) != expected_rtmr3(**{**values, name: b"\x01" * 48})
    with pytest.raises(AttestationError, match="not 48"):
        expected_rtmr3(**{**values, name: bytes(32)})
