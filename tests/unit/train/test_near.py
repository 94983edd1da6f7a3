"""The near side's run: what it seals is what the near side computed, once, whatever interrupts it."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister import channel, train, wire
from cloister.errors import CloisterError, DataError, DecryptionError, ModelError, ShardMismatchError, StoreFullError
from cloister.slicing import inspect_backbone, load_near

JOB = b"j" * 48
Rows = Callable[[int], list[dict[str, Any]]]


class Bench:
    """One client's run with everything it needs; `run` can be called again as a restarted process would."""

    def __init__(self, tmp_path: Path, near: Any, tokenizer: Any, task: train.TaskSpec, files: dict[str, Path]) -> None:
        self.near, self.tokenizer, self.task, self.files = near, tokenizer, task, files
        self.work_dir = tmp_path / "work"
        self.store = train.open_store(tmp_path / "store")
        self.puts: list[str] = []
        put = self.store.put_file
        self.store.put_file = lambda name, path: (self.puts.append(name), put(name, path))[1]

    def datasets(self, **options: Any) -> dict[str, train.Dataset]:
        columns = options.pop("columns", train.Columns())
        return {s: train.open_dataset(p, columns=columns, task=self.task, **options) for s, p in self.files.items()}

    def run(self, **options: Any) -> wire.Manifest:
        defaults: dict[str, Any] = {
            "work_dir": self.work_dir,
            "store": self.store,
            "run_id": "run-1",
            "client": "lake",
            "job_sha384": JOB,
            "batch_size": 4,
            "window": 10,
            "shard_max_bytes": 3000,
        }
        datasets = options.pop("datasets", None) or self.datasets()
        return train.NearRun(self.near, self.tokenizer, self.task, **{**defaults, **options}).run(datasets)

    def features(self, manifest: wire.Manifest, split: str) -> dict[int, train.Feature]:
        found: dict[int, train.Feature] = {}
        for entry, context in train.shard_entries(manifest):
            if entry.split != split:
                continue
            path = self.store.fetch(entry.name, self.work_dir)
            train.verify_shard_file(path, entry)
            blob = channel.decrypt_chunked(manifest.feature_key, path.read_bytes(), context)
            path.unlink()
            body = train.decode_shard(blob, hidden_size=manifest.hidden_size, task=self.task)
            assert (len(body), body.n_tokens) == (entry.n_examples, entry.n_tokens)
            for i in range(len(body)):
                feature = body.example(i)
                assert feature.index not in found, "an example twice"
                found[feature.index] = feature
        return found


@pytest.fixture
def bench(
    tmp_path: Path, near: Any, encoder_tokenizer: Any, classification: train.TaskSpec, write_jsonl: Any, rows: Rows
) -> Bench:
    files = {"train": write_jsonl(rows(57)), "test": write_jsonl(rows(13), "test.jsonl")}
    return Bench(tmp_path, near, encoder_tokenizer, classification, files)


class Killed(BaseException):
    """Stands for kill -9 in a test: nothing in the library catches it."""


class TestWhatIsSealed:
    @pytest.mark.parametrize("boundary", ["fp32", "bf16", "int8"])
    def test_every_example_once_with_the_near_sides_own_tensor(self, bench: Bench, boundary: Any) -> None:
        manifest = bench.run(boundary=boundary)
        assert [e.split for e in manifest.shards] == sorted((e.split for e in manifest.shards), reverse=True)
        assert len(manifest.shards) > 3
        for split, dataset in bench.datasets().items():
            found = bench.features(manifest, split)
            assert sorted(found) == list(range(len(dataset)))
            for example in dataset:
                ids = torch.tensor(bench.tokenizer(example.text)["input_ids"])
                expected = train.dequantize(train.quantize(bench.near.table[ids], boundary))
                assert torch.equal(found[example.index].hidden, expected)
                assert found[example.index].label == example.label

    def test_shards_keep_to_their_size_unless_one_example_is_larger(self, bench: Bench) -> None:
        manifest = bench.run(shard_max_bytes=2500)
        assert all(e.n_bytes <= channel.ciphertext_size(2500) for e in manifest.shards)
        tiny = bench.run(shard_max_bytes=10)
        assert [e.n_examples for e in tiny.shards] == [1] * 70

    def test_causal_lm_seals_the_labels_of_each_token(
        self, tmp_path: Path, near: Any, decoder_tokenizer: Any, causal: train.TaskSpec, write_jsonl: Any
    ) -> None:
        rows = [{"prompt": f"Q{i}:", "completion": f" answer {'y' * i}"} for i in range(9)]
        bench = Bench(tmp_path, near, decoder_tokenizer, causal, {"train": write_jsonl(rows)})
        found = bench.features(bench.run(), "train")
        for i, row in enumerate(rows):
            prompt = [1, *decoder_tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
            completion = [*decoder_tokenizer(row["completion"], add_special_tokens=False)["input_ids"], 2]
            assert found[i].labels is not None
            assert found[i].labels.tolist() == [-100] * len(prompt) + completion
            assert torch.equal(
                found[i].hidden, train.dequantize(train.quantize(near.table[prompt + completion], "int8"))
            )

    def test_a_pair_reaches_bert_with_its_type_ids(
        self, tmp_path: Path, encoder_folder: Path, encoder_tokenizer: Any, classification: Any, write_jsonl: Any
    ) -> None:
        near = load_near(inspect_backbone(encoder_folder), 2)
        files = {
            "train": write_jsonl([{"text": "ab", "more": "cd", "label": 0}, {"text": "e", "more": "f", "label": 1}])
        }
        bench = Bench(tmp_path, near, encoder_tokenizer, classification, files)
        manifest = bench.run(boundary="fp32", datasets=bench.datasets(columns=train.Columns(text_b="more")))
        found = bench.features(manifest, "train")
        batch = encoder_tokenizer([("ab", "cd"), ("e", "f")], padding=True, return_tensors="pt")
        with torch.inference_mode():
            hidden = near(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        for i in range(2):
            expected = hidden[i, : int(batch["attention_mask"][i].sum())]
            torch.testing.assert_close(found[i].hidden, expected, atol=1e-6, rtol=1e-6)

    def test_truncated_examples_are_counted(self, bench: Bench) -> None:
        bench.task = train.TaskSpec(
            "sequence-classification", labels=bench.task.labels, max_length=20, on_too_long="truncate"
        )
        manifest = bench.run()
        lengths = [len(bench.tokenizer(e.text)["input_ids"]) for dataset in bench.datasets().values() for e in dataset]
        assert manifest.n_truncated == sum(length > 20 for length in lengths) > 0

    def test_a_shard_opens_only_in_its_own_place(self, bench: Bench) -> None:
        manifest = bench.run()
        (first, context), (_, other) = train.shard_entries(manifest)[:2]
        blob = (Path(bench.store._root) / first.name).read_bytes()
        channel.decrypt_chunked(manifest.feature_key, blob, context)
        for key, place in ((manifest.feature_key, other), (bytes(32), context)):
            with pytest.raises(DecryptionError):
                channel.decrypt_chunked(key, blob, place)

    def test_a_shard_altered_by_one_byte_is_refused(self, bench: Bench) -> None:
        entry = bench.run().shards[1]
        path = Path(bench.store._root) / entry.name
        path.chmod(0o600)
        blob = bytearray(path.read_bytes())
        blob[len(blob) // 2] ^= 1
        path.write_bytes(blob)
        with pytest.raises(ShardMismatchError, match=entry.name):
            bench.store.fetch(entry.name, bench.work_dir)
        with pytest.raises(ShardMismatchError, match=entry.name):
            train.verify_shard_file(path, entry)

    def test_neither_store_nor_journal_hold_the_text(self, bench: Bench, tmp_path: Path) -> None:
        bench.run()
        marks = (b"row 1", b"cardiology", bench.near.table[20].numpy().tobytes())
        kept = [p for folder in ("store", "work") for p in (tmp_path / folder).rglob("*") if p.is_file()]
        assert len(kept) > 3
        assert not [p for p in kept for mark in marks if mark in p.read_bytes()]
        # The twin: the search does find them where they are in the clear.
        assert marks[0] in bench.files["train"].read_bytes()


class TestStores:
    def test_an_object_store_serves_as_a_folder_does(self, bench: Bench, s3_options: dict[str, Any]) -> None:
        bench.store = train.open_store("s3://near-run/run-1/lake", **s3_options)
        bench.store._fs.mkdir("near-run")
        manifest = bench.run()
        assert bench.store.list() == sorted(e.name for e in manifest.shards)
        assert bench.run() == manifest
        assert sorted(bench.features(manifest, "train")) == list(range(57))


class TestProgress:
    def test_it_counts_up_to_everything(self, bench: Bench) -> None:
        seen: list[tuple[int, int, int]] = []
        manifest = bench.run(on_progress=lambda *step: seen.append(step))
        assert seen[0] == (0, 70, 0)
        assert seen[-1] == (70, 70, sum(e.n_bytes for e in manifest.shards))
        assert seen == sorted(seen)
        assert len(seen) > 18

    def test_stop_ends_it_with_a_hint_and_it_goes_on_later(self, bench: Bench) -> None:
        stop = threading.Event()

        def on_progress(n_done: int, _total: int, _bytes: int) -> None:
            if n_done >= 30:
                stop.set()

        with pytest.raises(CloisterError, match="was stopped") as caught:
            bench.run(stop=stop, on_progress=on_progress)
        assert "--resume" in caught.value.hint
        assert sorted(bench.features(bench.run(), "train")) == list(range(57))


class TestResume:
    @pytest.mark.parametrize("killed_at", [1, 5, 9, 14, 18])
    def test_killed_after_any_batch_it_goes_on_and_sends_nothing_twice(self, bench: Bench, killed_at: int) -> None:
        calls = 0

        def on_progress(*_: int) -> None:
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise Killed

        with pytest.raises(Killed):
            bench.run(on_progress=on_progress)
        stored = list(bench.puts)
        computed = bench.near.n_examples
        manifest = bench.run()
        assert len(bench.puts) == len(set(bench.puts)) == len(manifest.shards)
        assert bench.puts[: len(stored)] == stored
        # Computed again: at most the open shard, the batch it begins in, and what was already lost with the kill.
        largest = max(e.n_examples for e in manifest.shards)
        assert bench.near.n_examples - computed <= 70 - computed + largest + 4 + 4
        for split, n in (("train", 57), ("test", 13)):
            assert sorted(bench.features(manifest, split)) == list(range(n))

    def test_resumed_shards_hold_the_same_examples_with_the_same_bits(self, bench: Bench, tmp_path: Path) -> None:
        whole = bench.run(boundary="fp32")
        other = Bench(tmp_path / "other", bench.near, bench.tokenizer, bench.task, bench.files)
        put = other.store.put_file
        for kill_after in (2, 3):
            n_left = kill_after

            def put_then_die(name: str, path: Any) -> None:
                nonlocal n_left
                put(name, path)
                n_left -= 1
                if n_left == 0:
                    raise Killed

            other.store.put_file = put_then_die
            with pytest.raises(Killed):
                other.run(boundary="fp32")
        other.store.put_file = put
        resumed = other.run(boundary="fp32")
        assert [(e.split, e.n_examples, e.n_tokens) for e in resumed.shards] == [
            (e.split, e.n_examples, e.n_tokens) for e in whole.shards
        ]
        first, second = bench.features(whole, "train"), other.features(resumed, "train")
        assert all(torch.equal(first[i].hidden, second[i].hidden) for i in range(57))
        assert len(other.puts) == len(set(other.puts)) == len(resumed.shards)

    def test_killed_between_sealing_and_storing_the_same_file_is_sent(self, bench: Bench) -> None:
        put = bench.store.put_file

        def die(*_: Any) -> None:
            raise Killed

        bench.store.put_file = die
        with pytest.raises(Killed):
            bench.run()
        (waiting,) = bench.work_dir.glob("*.sealed")
        bench.store.put_file = put
        manifest = bench.run()
        assert f"shard-{manifest.shards[0].name}" == waiting.stem
        assert not list(bench.work_dir.glob("*.sealed"))

    def test_a_waiting_file_that_was_damaged_is_made_again(self, bench: Bench) -> None:
        self.test_killed_between_sealing_and_storing_the_same_file_is_sent(bench)
        journal = bench.work_dir / "journal"
        lines = journal.read_text().splitlines()
        first = json.loads(lines[1])["sealed"]["name"]
        journal.write_text("\n".join(lines[:2]) + "\n")
        (Path(bench.store._root) / first).unlink()
        (bench.work_dir / f"shard-{first}.sealed").write_bytes(b"damaged")
        manifest = bench.run()
        assert first not in {e.name for e in manifest.shards}
        assert sorted(bench.features(manifest, "train")) == list(range(57))

    def test_a_finished_run_gives_the_same_manifest_and_computes_nothing(self, bench: Bench) -> None:
        manifest = bench.run()
        computed, sent = bench.near.n_examples, len(bench.puts)
        assert bench.run() == manifest
        assert (bench.near.n_examples, len(bench.puts)) == (computed, sent)

    def test_a_shard_that_the_store_lost_is_made_again(self, bench: Bench) -> None:
        manifest = bench.run()
        (Path(bench.store._root) / manifest.shards[2].name).unlink()
        again = bench.run()
        assert again.shards[:2] == manifest.shards[:2]
        assert again.shards[2].name != manifest.shards[2].name
        assert again.feature_key == manifest.feature_key
        assert sorted(bench.features(again, "train")) == list(range(57))

    def test_a_journal_cut_off_in_the_middle_of_a_line_is_continued(self, bench: Bench) -> None:
        manifest = bench.run()
        journal = bench.work_dir / "journal"
        journal.write_bytes(journal.read_bytes()[:-20])
        assert bench.run() == manifest

    @pytest.mark.parametrize("damage", [b"", b"{}\n", b"nonsense\n", b'{"version":1}\n'])
    def test_a_damaged_journal_starts_anew_under_a_fresh_key(self, bench: Bench, damage: bytes) -> None:
        manifest = bench.run()
        (bench.work_dir / "journal").write_bytes(damage)
        again = bench.run()
        assert again.feature_key != manifest.feature_key
        assert sorted(bench.features(again, "test")) == list(range(13))

    @pytest.mark.parametrize(
        "change",
        [
            {"run_id": "run-2"},
            {"client": "north"},
            {"job_sha384": b"k" * 48},
            {"boundary": "bf16"},
            {"batch_size": 5},
            {"shard_max_bytes": 4000},
            {"near_digest": b"other"},
            {"model_max_length": 300},
        ],
        ids=lambda c: next(iter(c)),
    )
    def test_other_content_never_has_the_same_key(self, bench: Bench, change: dict[str, Any]) -> None:
        key = bench.run().feature_key
        assert bench.run(**change).feature_key != key

    def test_other_data_never_has_the_same_key(self, bench: Bench, write_jsonl: Any, rows: Rows) -> None:
        key = bench.run().feature_key
        write_jsonl([*rows(57), {"text": "one more", "label": 0}])
        manifest = bench.run()
        assert manifest.feature_key != key
        assert sorted(bench.features(manifest, "train")) == list(range(58))

    def test_files_of_others_in_the_work_folder_are_left_alone(self, bench: Bench) -> None:
        bench.work_dir.mkdir()
        for name in ("session.sealed", "report.part", "shard-old.sealed", "shard-train-0.part"):
            (bench.work_dir / name).write_bytes(b"x")
        bench.run()
        assert sorted(p.name for p in bench.work_dir.iterdir()) == ["journal", "report.part", "session.sealed"]

    def test_the_journal_is_private(self, bench: Bench) -> None:
        manifest = bench.run()
        assert (bench.work_dir / "journal").stat().st_mode & 0o777 == 0o600
        assert manifest.feature_key.hex() not in repr(manifest)


class TestBadInput:
    def test_a_bad_row_at_the_end_stops_it_before_anything_is_sent(
        self, bench: Bench, write_jsonl: Any, rows: Rows
    ) -> None:
        write_jsonl([*rows(57), {"text": "x", "label": "radiology"}])
        with pytest.raises(DataError, match="line 58: column 'label' is 'radiology'"):
            bench.run()
        assert (bench.near.n_examples, bench.puts, list(bench.work_dir.iterdir())) == (0, [], [])

    def test_a_text_over_the_limit_stops_it_before_anything_is_sent(
        self, bench: Bench, write_jsonl: Any, rows: Rows
    ) -> None:
        write_jsonl([*rows(13), {"text": "x" * 200, "label": 0}], "test.jsonl")
        with pytest.raises(DataError, match=r"test\.jsonl, line 14: 202 tokens, and the limit is 100"):
            bench.run(model_max_length=100)
        assert (bench.near.n_examples, bench.puts, list(bench.work_dir.iterdir())) == (0, [], [])

    def test_data_that_changes_under_way_is_noticed(self, bench: Bench, rows: Rows, write_jsonl: Any) -> None:
        def on_progress(n_done: int, *_: int) -> None:
            if n_done >= 57:
                write_jsonl(rows(20), "test.jsonl")

        with pytest.raises(DataError, match="it had 13 examples and now has 20"):
            bench.run(on_progress=on_progress)

    @pytest.mark.parametrize("splits", [["test"], ["train", "valid"]])
    def test_train_must_be_there_and_nothing_unknown(self, bench: Bench, splits: list[str]) -> None:
        datasets = bench.datasets()
        with pytest.raises(DataError, match="expected train and test"):
            bench.run(datasets=dict.fromkeys(splits, datasets["train"]))

    def test_a_near_side_that_overflows_is_named(self, bench: Bench) -> None:
        bench.near.table[40:] = float("inf")
        with pytest.raises(ModelError, match=r"example \d+ is not finite") as caught:
            bench.run()
        assert "float32" in caught.value.hint
        assert bench.puts == []

    def test_a_near_side_of_another_shape_is_named(self, bench: Bench) -> None:
        bench.near = lambda ids, mask: torch.zeros(len(ids), 3)
        with pytest.raises(ModelError, match="the near side gives"):
            bench.run()


class TestFullDisk:
    def test_while_sealing_nothing_half_written_is_left_and_it_goes_on(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fsync, n_left = os.fsync, 5

        def full(handle: int) -> None:
            nonlocal n_left
            n_left -= 1
            if n_left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(handle)

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", full)
            with pytest.raises(StoreFullError, match="no space is left") as caught:
                bench.run()
        assert "--resume" in caught.value.hint
        assert not [p for p in bench.work_dir.parent.rglob("*") if p.name.endswith(".part")]
        manifest = bench.run()
        assert sorted(bench.features(manifest, "train")) == list(range(57))

    def test_in_the_journal_too(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(StoreFullError, match="journal"):
            bench.run()
        assert list(bench.work_dir.iterdir()) == []

    def test_a_work_folder_that_cannot_be_made_is_named(self, bench: Bench, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(CloisterError, match="cannot use the work folder") as caught:
            bench.run(work_dir=tmp_path / "file" / "work")
        assert caught.value.exit_code == 7


class TestQuestions:
    def test_a_question_has_the_tensors_that_training_would_have_had(self, bench: Bench) -> None:
        encoder = train.NearEncoder(bench.near, bench.tokenizer, bench.task, boundary="fp32", batch_size=2)
        texts = ["chest pain", "a", "headache"]
        body = train.decode_shard(encoder.question(texts), hidden_size=8, task=bench.task, labelled=False)
        assert body.indices == [0, 1, 2]
        for i, text in enumerate(texts):
            assert torch.equal(body.example(i).hidden, bench.near.table[bench.tokenizer(text)["input_ids"]])
            assert body.example(i).label is None

    def test_a_prompt_is_a_question_too(self, near: Any, decoder_tokenizer: Any, causal: train.TaskSpec) -> None:
        encoder = train.NearEncoder(near, decoder_tokenizer, causal)
        body = train.decode_shard(encoder.question(["Q:"]), hidden_size=8, task=causal)
        labels = body.example(0).labels
        assert labels is not None
        assert labels.tolist() == [-100] * 3

    @pytest.mark.parametrize(
        ("texts", "cause"),
        [
            ([], "no text"),
            (["a", " "], "text 2 is empty"),
            ([("a", "")], "text 1 is empty"),
            (["x" * 99], "text 1: 101"),
        ],
    )
    def test_a_bad_question_is_named_by_its_number(self, bench: Bench, texts: Any, cause: str) -> None:
        encoder = train.NearEncoder(bench.near, bench.tokenizer, bench.task, model_max_length=64)
        with pytest.raises(DataError, match=cause):
            encoder.question(texts)
