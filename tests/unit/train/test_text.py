"""Tokenising: what a model of each kind is given, where the loss is, and what happens at the limit."""

from __future__ import annotations

from typing import Any

import pytest

from cloister.errors import DataError
from cloister.train import Example, TaskSpec, TextEncoder, Tokenised

BOS, EOS = 1, 2
CLASSES = ("a", "b")


def _classification(**options: Any) -> TaskSpec:
    return TaskSpec("sequence-classification", labels=CLASSES, **options)


def _encode(encoder: TextEncoder, **fields: Any) -> Tokenised:
    return encoder.encode([Example(0, 7, **fields)], place=lambda e: f"train.jsonl, line {e.row}")[0]


def _bytes(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class TestClassification:
    def test_one_text_has_the_tokenizers_special_tokens(self, encoder_tokenizer: Any) -> None:
        item = _encode(TextEncoder(encoder_tokenizer, _classification()), text="ab", label=1)
        assert item.input_ids == [BOS, *_bytes(encoder_tokenizer, "ab"), EOS]
        assert (item.label, item.labels, item.type_ids, item.truncated) == (1, None, None, False)
        assert "input_ids" not in repr(item)

    def test_a_pair_has_a_separator_and_type_ids_where_the_model_knows_them(self, encoder_tokenizer: Any) -> None:
        item = _encode(TextEncoder(encoder_tokenizer, _classification()), text="ab", text_b="c", label=0)
        ids = _bytes(encoder_tokenizer, "abc")
        assert item.input_ids == [BOS, *ids[:2], EOS, ids[2], EOS]
        assert item.type_ids == [0, 0, 0, 0, 1, 1]

    def test_a_pair_without_a_separator_gets_a_line_break(self, decoder_tokenizer: Any) -> None:
        item = _encode(TextEncoder(decoder_tokenizer, _classification()), text="ab", text_b="c", label=0)
        assert item.input_ids == [BOS, *_bytes(decoder_tokenizer, "ab\nc")]
        assert item.type_ids is None

    def test_too_long_names_place_length_limit_and_a_way_out(self, encoder_tokenizer: Any) -> None:
        encoder = TextEncoder(encoder_tokenizer, _classification(), model_max_length=16)
        with pytest.raises(DataError, match=r"train\.jsonl, line 7: 22 tokens, and the limit is 16") as caught:
            _encode(encoder, text="x" * 20, label=0)
        assert 'on_too_long = "truncate"' in caught.value.hint
        assert caught.value.row == 7
        assert len(_encode(encoder, text="x" * 14, label=0)) == 16

    def test_truncation_keeps_the_end_token_and_is_counted(self, encoder_tokenizer: Any) -> None:
        encoder = TextEncoder(encoder_tokenizer, _classification(max_length=16, on_too_long="truncate"))
        item = _encode(encoder, text="x" * 20, label=0)
        assert (len(item), item.input_ids[-1], item.truncated) == (16, EOS, True)

    def test_truncating_a_pair_cuts_the_longer_text(self, encoder_tokenizer: Any) -> None:
        encoder = TextEncoder(encoder_tokenizer, _classification(max_length=16, on_too_long="truncate"))
        item = _encode(encoder, text="x" * 30, text_b="yz", label=0)
        assert len(item) == 16
        assert item.input_ids[-3:] == [*_bytes(encoder_tokenizer, "yz"), EOS]
        assert item.type_ids == [0] * 13 + [1] * 3


class TestCausal:
    def test_the_loss_is_on_the_completion_and_the_end(self, decoder_tokenizer: Any) -> None:
        item = _encode(TextEncoder(decoder_tokenizer, TaskSpec("causal-lm")), prompt="ab", completion=" c")
        prompt, completion = _bytes(decoder_tokenizer, "ab"), _bytes(decoder_tokenizer, " c")
        assert item.input_ids == [BOS, *prompt, *completion, EOS]
        assert item.labels == [-100, -100, -100, *completion, EOS]

    def test_a_question_is_the_beginning_of_what_was_trained_on(self, decoder_tokenizer: Any) -> None:
        encoder = TextEncoder(decoder_tokenizer, TaskSpec("causal-lm"))
        trained = _encode(encoder, prompt="ab", completion=" c")
        asked = _encode(encoder, prompt="ab")
        assert asked.input_ids == trained.input_ids[: len(asked)]
        assert asked.labels == [-100] * 3

    def test_a_bert_tokenizer_ends_with_its_separator(self, encoder_tokenizer: Any) -> None:
        item = _encode(TextEncoder(encoder_tokenizer, TaskSpec("causal-lm")), prompt="a", completion="b")
        assert item.input_ids == [BOS, *_bytes(encoder_tokenizer, "ab"), EOS]

    @pytest.mark.parametrize(
        ("prompt", "completion", "kept_prompt", "kept_completion"),
        [
            # limit 16: BOS, then the prompt loses its beginning before the completion loses its end
            ("p" * 20, "c" * 4, 10, 4),
            ("p" * 4, "c" * 20, 4, 11),
            ("p" * 20, "c" * 20, 7, 8),
        ],
    )
    def test_truncation_takes_from_the_prompt_first(
        self, decoder_tokenizer: Any, prompt: str, completion: str, kept_prompt: int, kept_completion: int
    ) -> None:
        encoder = TextEncoder(decoder_tokenizer, TaskSpec("causal-lm", max_length=16, on_too_long="truncate"))
        item = _encode(encoder, prompt=prompt, completion=completion)
        p, c = _bytes(decoder_tokenizer, "p")[0], _bytes(decoder_tokenizer, "c")[0]
        assert item.truncated
        assert len(item) == 16
        assert item.input_ids[0] == BOS
        assert item.input_ids.count(p) == kept_prompt
        assert item.input_ids.count(c) == kept_completion
        assert item.labels is not None
        assert [i for i in item.labels if i != -100] == item.input_ids[1 + kept_prompt :]

    def test_truncating_a_question_keeps_its_end(self, decoder_tokenizer: Any) -> None:
        encoder = TextEncoder(decoder_tokenizer, TaskSpec("causal-lm", max_length=16, on_too_long="truncate"))
        item = _encode(encoder, prompt="a" * 30 + "z")
        assert (len(item), item.input_ids[0], item.input_ids[-1]) == (16, BOS, _bytes(decoder_tokenizer, "z")[0])


class TestLimits:
    def test_the_tasks_limit_may_not_be_over_the_models(self, encoder_tokenizer: Any) -> None:
        with pytest.raises(DataError, match="max_length is 1024, and the model's limit is 512"):
            TextEncoder(encoder_tokenizer, _classification(max_length=1024), model_max_length=512)

    def test_a_limit_without_room_is_refused(self, encoder_tokenizer: Any) -> None:
        with pytest.raises(DataError, match="leaves no room"):
            TextEncoder(encoder_tokenizer, _classification(max_length=2))

    def test_the_smaller_limit_holds(self, encoder_tokenizer: Any) -> None:
        assert TextEncoder(encoder_tokenizer, _classification(max_length=64), model_max_length=512).limit == 64
        assert TextEncoder(encoder_tokenizer, _classification(), model_max_length=512).limit == 512
        assert TextEncoder(encoder_tokenizer, _classification()).limit is None

    def test_a_text_of_no_tokens_is_refused(self) -> None:
        class Mute:
            """A tokenizer that drops what it does not know, as some do."""

            eos_token_id = sep_token_id = pad_token_id = None
            model_input_names = ("input_ids",)

            def __call__(self, text: Any, pair: Any = None, **_: Any) -> dict[str, Any]:
                return {"input_ids": [] if isinstance(text, str) else [[] for _ in text]}

        with pytest.raises(DataError, match=r"train\.jsonl, line 7: the tokenizer finds no tokens"):
            _encode(TextEncoder(Mute(), _classification()), text="x", label=0)

    def test_nothing_in_nothing_out(self, encoder_tokenizer: Any) -> None:
        assert TextEncoder(encoder_tokenizer, _classification()).encode([], place=str) == []
