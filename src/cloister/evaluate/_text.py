"""Figures of generated text, by example. Long lists run over several processes, with the same result as in one."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from cloister.errors import CloisterError, DataError
from cloister.evaluate._libraries import library
from cloister.evaluate._scores import ExampleScores, column

Progress = Callable[[int, int], None]
_Texts = Sequence[str]
_Scorer = Callable[[tuple[_Texts, _Texts]], list[float]]

_MOST_WORKERS = 8
_CHUNK = 50  # examples between two calls of `progress`
# Other processes take some seconds to start (nltk's import), so they pay from about ten on: so many letters of one text
# times letters of the other for ROUGE-L, which compares word with word, and letters of both for exact match.
_LONG_ROUGE, _LONG_EXACT = 2_000_000_000, 100_000_000


def exact_match_scores(
    references: Sequence[str],
    completions: Sequence[str],
    *,
    ids: Sequence[str],
    clients: Sequence[str],
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExampleScores:
    """1 where the completion is the reference. Texts are *secret* of their client.

    Both are compared after Unicode NFKC, case folding, white space as single blanks, and without white space and full
    stops at the end. Punctuation within and articles stay: "1.5" is not "15".

    Args:
        references: [n], the wanted texts.
        completions: [n], what the model wrote, without the prompt.
        ids: [n], what each example is called.
        clients: [n], whose it is.
        workers: processes, at most 8; None takes one a core where the texts are long enough to pay for it, else one.
        progress: called in this process as progress(n_done, n_total).

    Raises:
        DataError: an empty split, lengths that differ, something that is no text.
        CloisterError: the processes could not be started.
    """
    pairs = _pairs(references, completions, "exact_match")
    long = sum(map(len, references)) + sum(map(len, completions)) > _LONG_EXACT
    found = _over_chunks(_exact_match, pairs, _n_workers(workers, long=long), progress)
    return ExampleScores("exact_match", column(found, "exact_match: the figures"), tuple(ids), tuple(clients))


def rouge_l_scores(
    references: Sequence[str],
    completions: Sequence[str],
    *,
    ids: Sequence[str],
    clients: Sequence[str],
    workers: int | None = None,
    progress: Progress | None = None,
) -> ExampleScores:
    """F1 of the longest common subsequence of words, by the package rouge-score, without stemming.

    Its words are runs of a-z and 0-9 after lower-casing: other letters separate words. A text without any scores 0.
    (Lin, 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.)

    Args: as `exact_match_scores` has them.

    Raises:
        DataError: as `exact_match_scores`; or no reference has a word that ROUGE-L counts.
        CloisterError: rouge-score is not installed, or the processes could not be started.
    """
    pairs = _pairs(references, completions, "rouge_l")
    library("rouge_score.rouge_scorer")  # here, so that its absence is an error of this process
    if not any(has_rouge_word(text) for text in references):
        raise DataError(
            f"rouge_l: none of {len(references)} references has a word of a-z or 0-9, all that ROUGE-L counts",
            hint="use exact match or perplexity for text in other scripts",
        )
    long = sum(len(a) * len(b) for a, b in zip(references, completions, strict=True)) > _LONG_ROUGE
    found = _over_chunks(_rouge_l, pairs, _n_workers(workers, long=long), progress)
    return ExampleScores("rouge_l", column(found, "rouge_l: the figures"), tuple(ids), tuple(clients))


def _exact_match(pair: tuple[_Texts, _Texts]) -> list[float]:
    return [float(_normalised(a) == _normalised(b)) for a, b in zip(*pair, strict=True)]


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(". ")


def _rouge_l(pair: tuple[_Texts, _Texts]) -> list[float]:
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    return [float(scorer.score(a, b)["rougeL"].fmeasure) for a, b in zip(*pair, strict=True)]


def has_rouge_word(text: str) -> bool:
    """Whether a text has a word that ROUGE-L counts: of a-z or 0-9."""
    return any(letter.isascii() and letter.isalnum() for letter in text.lower())


def _pairs(references: _Texts, completions: _Texts, metric: str) -> list[tuple[_Texts, _Texts]]:
    """Both lists in chunks of `_CHUNK`."""
    if len(references) != len(completions):
        raise DataError(f"{metric}: {len(references)} references and {len(completions)} completions")
    if not references:
        raise DataError(f"{metric}: the split is empty, there is no text to score")
    for i, text in enumerate((*references, *completions)):
        if not isinstance(text, str):
            what = "reference" if i < len(references) else "completion"
            raise DataError(f"{metric}: {what} {i % len(references)} is {type(text).__name__} and no text")
    starts = range(0, len(references), _CHUNK)
    return [(references[at : at + _CHUNK], completions[at : at + _CHUNK]) for at in starts]


def _n_workers(workers: int | None, *, long: bool) -> int:
    if workers is None:
        return min(_MOST_WORKERS, len(os.sched_getaffinity(0))) if long else 1
    if workers < 1:
        raise CloisterError(f"{workers} workers cannot score anything", hint="workers=1 runs in this process")
    return min(workers, _MOST_WORKERS)


def _over_chunks(
    score: _Scorer, pairs: list[tuple[_Texts, _Texts]], workers: int, progress: Progress | None
) -> list[float]:
    workers = min(workers, len(pairs))
    n_total = sum(len(references) for references, _ in pairs)
    if workers == 1:
        return _collected(map(score, pairs), n_total, progress)
    try:
        # A fork would copy torch's threads half-way through whatever they do.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return _collected(pool.map(score, pairs), n_total, progress)
    except BrokenProcessPool:
        raise CloisterError(
            "a process that scores texts died before it was done",
            hint="in a script, call this under `if __name__ == '__main__':`; or pass workers=1",
        ) from None


def _collected(chunks: Iterable[list[float]], n_total: int, progress: Progress | None) -> list[float]:
    found: list[float] = []
    for chunk in chunks:
        found += chunk
        if progress is not None:
            progress(len(found), n_total)
    return found
