"""The store, as folder, in memory and on S3: whole or not there, never another's bytes, one branch of errors."""

from __future__ import annotations

import errno
import hashlib
import importlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloister import wire
from cloister.errors import ShardMismatchError, StoreError, StoreFullError
from cloister.train import ShardStore, open_store, verify_shard_file

BLOB = b"ciphertext" * 1000
NAME = hashlib.sha256(BLOB).hexdigest()
OTHER = "0" * 64


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ShardStore:
    if request.param == "folder":
        return open_store(tmp_path / "shards")
    if request.param == "memory":
        return open_store(f"memory://{tmp_path.name}")
    options = request.getfixturevalue("s3_options")
    bucket = f"bucket-{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"
    store = open_store(f"s3://{bucket}/run/client", **options)
    store._fs.mkdir(bucket)
    return store


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "local.sealed"
    path.write_bytes(BLOB)
    return path


def _entry(name: str = NAME, n_bytes: int = len(BLOB)) -> wire.ShardEntry:
    return wire.ShardEntry(name, n_bytes, 1, 1, "train")


class TestEveryStore:
    def test_what_is_put_is_fetched(self, store: ShardStore, sealed: Path, tmp_path: Path) -> None:
        assert store.list() == []
        assert not store.exists(NAME, len(BLOB))
        store.put_file(NAME, sealed)
        assert sealed.read_bytes() == BLOB
        assert store.exists(NAME, len(BLOB))
        assert not store.exists(NAME, len(BLOB) - 1)
        assert store.size(NAME) == len(BLOB)
        assert store.list() == [NAME]
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        assert store.fetch(NAME, inbox) == inbox / NAME
        assert store.fetch(NAME, tmp_path / "copy").read_bytes() == BLOB
        verify_shard_file(inbox / NAME, _entry())
        assert sorted(p.name for p in inbox.iterdir()) == [NAME]

    def test_putting_twice_is_the_same(self, store: ShardStore, sealed: Path) -> None:
        store.put_file(NAME, sealed)
        store.put_file(NAME, sealed)
        assert store.list() == [NAME]

    def test_what_is_missing_is_named_with_a_hint(self, store: ShardStore, tmp_path: Path) -> None:
        for call in (lambda: store.size(OTHER), lambda: store.fetch(OTHER, tmp_path / "x")):
            with pytest.raises(StoreError, match=f"shard {OTHER} is not there") as caught:
                call()
            assert store.url in caught.value.cause
            assert caught.value.hint
        assert not list(tmp_path.glob("*x*"))

    def test_altered_bytes_are_not_fetched(self, store: ShardStore, sealed: Path, tmp_path: Path) -> None:
        store.put_file(OTHER, sealed)
        with pytest.raises(ShardMismatchError, match=f"shard {OTHER} was altered"):
            store.fetch(OTHER, tmp_path / "x")
        assert not list(tmp_path.glob("*x*"))

    @pytest.mark.parametrize("name", ["", "a", "../" + "0" * 61, "0" * 63 + "G", "0" * 64 + "\n", "/" + "0" * 63])
    def test_only_a_hash_becomes_a_path(self, store: ShardStore, sealed: Path, tmp_path: Path, name: str) -> None:
        for call in (
            lambda: store.put_file(name, sealed),
            lambda: store.exists(name, 1),
            lambda: store.size(name),
            lambda: store.fetch(name, tmp_path),
        ):
            with pytest.raises(StoreError, match="is not a shard name"):
                call()


class TestFolder:
    def test_an_upload_that_breaks_leaves_nothing(
        self, tmp_path: Path, sealed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(tmp_path / "shards")

        def full(source: Path, target: Path) -> None:
            Path(target).write_bytes(BLOB[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "hardlink_to", _other_file_system)
        monkeypatch.setattr(shutil, "copyfile", full)
        with pytest.raises(StoreFullError, match="no space is left") as caught:
            store.put_file(NAME, sealed)
        assert NAME in caught.value.cause
        assert "--resume" in caught.value.hint
        assert caught.value.exit_code == 7
        assert list((tmp_path / "shards").iterdir()) == []

    def test_another_file_system_gets_a_copy(
        self, tmp_path: Path, sealed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "hardlink_to", _other_file_system)
        store = open_store(tmp_path / "shards")
        store.put_file(NAME, sealed)
        assert (tmp_path / "shards" / NAME).read_bytes() == BLOB
        assert store.list() == [NAME]

    def test_a_full_disk_while_fetching_leaves_nothing(
        self, tmp_path: Path, sealed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = open_store(tmp_path / "shards")
        store.put_file(NAME, sealed)
        inbox = tmp_path / "inbox"
        inbox.mkdir()
        monkeypatch.setattr("os.fsync", _full)
        with pytest.raises(StoreFullError):
            store.fetch(NAME, inbox)
        assert list(inbox.iterdir()) == []

    def test_a_file_in_the_way_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(StoreError, match="cannot open the store"):
            open_store(tmp_path / "file" / "shards")

    def test_strangers_in_the_folder_are_not_listed(self, tmp_path: Path, sealed: Path) -> None:
        store = open_store(tmp_path / "shards")
        store.put_file(NAME, sealed)
        (tmp_path / "shards" / "notes.txt").write_text("x")
        assert store.list() == [NAME]

    def test_file_urls_are_folders(self, tmp_path: Path, sealed: Path) -> None:
        open_store(f"file://{tmp_path}/shards").put_file(NAME, sealed)
        assert open_store(tmp_path / "shards").list() == [NAME]


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _other_file_system(*_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


class TestOpening:
    def test_an_unknown_protocol_is_named(self) -> None:
        with pytest.raises(StoreError, match="nosuch://bucket") as caught:
            open_store("nosuch://bucket")
        assert caught.value.hint

    def test_a_missing_package_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The attribute of that name on the package is another thing, so the module is taken by its name.
        monkeypatch.delitem(importlib.import_module("fsspec.registry")._registry, "s3", raising=False)
        monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(StoreError, match="not installed") as caught:
            open_store("s3://bucket/x")
        assert caught.value.hint == "pip install 'cloister[s3]'"

    def test_an_unreachable_store_is_a_store_error_without_the_secret(self, sealed: Path) -> None:
        pytest.importorskip("s3fs", reason="the s3 extra is not installed")
        config = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
        store = open_store(
            "s3://bucket/x", key="k", secret="hush", endpoint_url="http://127.0.0.1:9", config_kwargs=config
        )
        with pytest.raises(StoreError) as caught:
            store.put_file(NAME, sealed)
        assert "s3://bucket/x" in caught.value.cause
        assert "hush" not in f"{caught.value.cause} {caught.value.hint} {store!r}"

    def test_a_bucket_that_is_not_there_is_a_store_error(self, s3_options: dict[str, Any], sealed: Path) -> None:
        with pytest.raises(StoreError, match="s3://no-such-bucket"):
            open_store("s3://no-such-bucket", **s3_options).put_file(NAME, sealed)


class TestVerify:
    def test_the_file_of_its_entry_passes(self, sealed: Path) -> None:
        verify_shard_file(sealed, _entry())

    @pytest.mark.parametrize("position", [0, 5000, len(BLOB) - 1])
    def test_one_altered_byte_is_refused_by_name(self, sealed: Path, position: int) -> None:
        blob = bytearray(BLOB)
        blob[position] ^= 1
        sealed.write_bytes(blob)
        with pytest.raises(ShardMismatchError, match=f"shard {NAME} of client lake was altered"):
            verify_shard_file(sealed, _entry(), client="lake")

    def test_another_size_or_no_file_is_refused(self, sealed: Path, tmp_path: Path) -> None:
        with pytest.raises(ShardMismatchError, match="has 10000 bytes, its manifest says 9999"):
            verify_shard_file(sealed, _entry(n_bytes=9999))
        with pytest.raises(ShardMismatchError, match="cannot be read"):
            verify_shard_file(tmp_path / "none", _entry())


def test_the_courier_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cloister.train import open_store, verify_shard_file; "
        f"open_store({str(tmp_path)!r}).list(); "
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'numpy', 'safetensors', 'flwr'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
