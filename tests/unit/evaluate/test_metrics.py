"""Accuracy, macro F1, exact match, ROUGE-L, perplexity: by hand, against a slow oracle, in one process and in two."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import slow_evaluate as slow

from cloister.errors import CloisterError, DataError
from cloister.evaluate import (
    _text,
    classification_scores,
    exact_match_scores,
    f1_report,
    macro_f1,
    perplexity_scores,
    rouge_l_scores,
)
from cloister.train._evaluate import macro_f1 as macro_f1_of_counts

few = settings(max_examples=40, deadline=None)
labels = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=60)
words = st.text(alphabet="ab1 .-Ä", max_size=40)


def named(n: int) -> dict[str, list[str]]:
    return {"ids": [f"e{i}" for i in range(n)], "clients": ["a"] * n}


@pytest.mark.parametrize("kind", [list, np.array], ids=["list", "array"])
def test_accuracy_by_hand(kind):
    scores = classification_scores(kind([0, 1, 2, 2]), kind([0, 2, 2, 2]), **named(4))
    assert scores.metric == "accuracy"
    assert scores.values.tolist() == [1, 0, 1, 1]


def test_names_of_classes_are_labels_too():
    assert classification_scores(["ja", "nein"], ["ja", "ja"], **named(2)).overall == 0.5
    assert f1_report(["no", "yes"], ["yes", "yes"])["yes"]["precision"] == 0.5


def test_f1_by_hand():
    # Class 0: 2 of 3 found, nothing else called so. Class 1: found, with one too many. Class 2 is only predicted.
    report = f1_report([0, 0, 0, 1], [0, 0, 2, 1])
    assert report[0] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "n": 3}
    assert report[2] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "n": 0}
    assert macro_f1([0, 0, 0, 1], [0, 0, 2, 1]) == pytest.approx((0.8 + 1 + 0) / 3)


@few
@given(labels)
def test_macro_f1_is_the_one_that_runs_report(pairs):
    truth, guesses = zip(*pairs, strict=True)
    if len(set(truth)) > 1:
        counts = [(a, b, n) for (a, b), n in Counter(pairs).items()]
        assert macro_f1(truth, guesses) == pytest.approx(macro_f1_of_counts(counts))


def test_as_many_classes_as_examples_is_no_warning():
    assert macro_f1(list(range(40)), list(range(40))) == 1


@pytest.mark.parametrize("metric", [macro_f1, f1_report, lambda a, b: classification_scores(a, b, **named(len(a)))],
                         ids=["macro_f1", "f1_report", "accuracy"])  # fmt: skip
@pytest.mark.parametrize(
    ("truth", "guesses", "why"),
    [
        ([], [], "the split is empty"),
        ([0, 1], [0], "2 labels and 1 predictions"),
        ([0, 1], ["0", "1"], "both numbers of classes, or both names"),
        ([0, "1"], [0, 1], "a name and a number"),
        ([0, 1], [0, math.nan], "a number and float"),
        ([None, None], [0, 1], "NoneType"),
        (np.array([0.0, 1.0]), [0, 1], "float"),
    ],
    ids=["empty", "lengths", "kinds", "mixed", "nan", "none", "floats"],
)
def test_labels_that_are_refused(metric, truth, guesses, why):
    with pytest.raises(DataError, match=why):
        metric(truth, guesses)


def test_macro_f1_of_one_class_is_refused():
    with pytest.raises(DataError, match="all 3 labels are of one class"):
        macro_f1([1, 1, 1], [1, 0, 1])


@pytest.mark.parametrize(
    ("reference", "completion", "same"),
    [
        ("Yes", " yes.\n", True),
        ("type  2 diabetes", "Type 2\ndiabetes", True),
        ("ﬁbrosis", "fibrosis", True),
        ("GRÖSSE", "größe", True),
        ("1.5 mg", "15 mg", False),
        ("the cell", "cell", False),
        ("T-cell", "T cell", False),
        ("", "...", True),
    ],
)
def test_exact_match_by_hand(reference, completion, same):
    scores = exact_match_scores([reference], [completion], **named(1))
    assert scores.values.tolist() == [float(same)]
    assert exact_match_scores([completion], [reference], **named(1)).values.tolist() == [float(same)]


def test_rouge_l_by_hand():
    # Lin, 2004, section 3.1: the longest common subsequence of these has 3 words of 4 ("police", "the", "gunman").
    found = rouge_l_scores(
        ["police killed the gunman"] * 2, ["police kill the gunman", "the gunman kill police"], **named(2)
    )
    assert found.values.tolist() == pytest.approx([0.75, 0.5])


@few
@given(st.lists(st.tuples(words, words), min_size=1, max_size=5))
def test_rouge_l_is_the_dynamic_programme(pairs):
    references, completions = zip(("a", "a"), *pairs, strict=True)
    found = rouge_l_scores(references, completions, **named(len(references)))
    assert found.values.tolist() == pytest.approx(
        [slow.rouge_l(a, b) for a, b in zip(references, completions, strict=True)]
    )


def test_processes_give_the_same_and_tell_how_far_they_are():
    references = [f"the {i} cells of patient {i % 7} grew" for i in range(120)]
    completions = [f"The {i // 2 * 2} cells of patient {i % 5} grew." for i in range(120)]
    for score in (rouge_l_scores, exact_match_scores):
        told: list[tuple[int, int]] = []
        alone = score(references, completions, **named(120), workers=1)
        many = score(
            references, completions, **named(120), workers=2, progress=lambda *done, told=told: told.append(done)
        )
        assert many.values.tolist() == alone.values.tolist()
        assert told == [(50, 120), (100, 120), (120, 120)]


@pytest.mark.parametrize("score", [exact_match_scores, rouge_l_scores])
@pytest.mark.parametrize(
    ("references", "completions", "why"),
    [
        ([], [], "the split is empty"),
        (["a"], ["a", "b"], "1 references and 2 completions"),
        (["a", None], ["a", "b"], "reference 1 is NoneType"),
        (["a", "b"], ["a", 3], "completion 1 is int"),
    ],
    ids=["empty", "lengths", "reference", "completion"],
)
def test_texts_that_are_refused(score, references, completions, why):
    with pytest.raises(DataError, match=why):
        score(references, completions, **named(len(references)))


def test_a_script_that_rouge_l_cannot_read_is_refused():
    with pytest.raises(DataError, match="none of 2 references has a word"):
        rouge_l_scores(["болезнь", "病気"], ["болезнь", "病気"], **named(2))


def test_no_workers_is_refused():
    with pytest.raises(CloisterError, match="0 workers"):
        exact_match_scores(["a"], ["a"], **named(1), workers=0)


@pytest.mark.parametrize(("score", "limit"), [(exact_match_scores, "_LONG_EXACT"), (rouge_l_scores, "_LONG_ROUGE")])
def test_many_texts_choose_processes_by_themselves(monkeypatch, score, limit):
    chosen: list[int] = []
    monkeypatch.setattr(_text.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(_text, "_over_chunks", lambda _s, _p, workers, _: chosen.append(workers) or [1.0, 1.0])
    score(["abc", "d"], ["ab", "cd"], **named(2))
    monkeypatch.setattr(_text, limit, 7)  # 3 * 2 + 1 * 2 and 3 + 1 + 2 + 2 are 8
    score(["abc", "d"], ["ab", "cd"], **named(2))
    assert chosen == [1, 8]


def test_a_script_without_a_guard_is_told_what_is_wrong(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
from cloister.errors import CloisterError
from cloister.evaluate import exact_match_scores
texts = [str(i) for i in range(120)]
try:
    exact_match_scores(texts, texts, ids=texts, clients=texts, workers=2)
except CloisterError as error:
    print(error.cause, "|", error.hint)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert "a process that scores texts died before it was done | in a script, call this under" in done.stdout


def test_perplexity_by_hand():
    scores = perplexity_scores([2.0, 4.0], [1, 2], **named(2))
    assert scores.overall == pytest.approx(math.exp(2))
    with pytest.raises(DataError, match="the split is empty"):
        perplexity_scores([], [], **named(0))


@pytest.mark.parametrize(
    ("module", "package", "call"),
    [
        ("sklearn.metrics", "scikit-learn", lambda: macro_f1([0, 1], [0, 1])),
        ("rouge_score.rouge_scorer", "rouge-score", lambda: rouge_l_scores(["a"], ["a"], **named(1))),
    ],
    ids=["scikit-learn", "rouge-score"],
)
def test_a_missing_library_is_named_with_what_installs_it(monkeypatch, module, package, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CloisterError, match=f"needs {package}") as caught:
        call()
    assert caught.value.hint == "pip install 'cloister[evaluate]'"
