"""The results of a comparison beside each other: figures with intervals, differences to the reference, costs."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ._compare_jobs import METHODS, REFERENCE

if TYPE_CHECKING:
    from cloister.evaluate import ExampleScores

TABLE_VERSION = 1
_NO_TOKENS = 1.0  # a perplexity whose logarithm is 0: ln(peer / ours) is then that of ours alone

CSV_COLUMNS = (
    "method", "status", "seeds", "metric", "value", "low", "high", "interval", "reference", "difference",
    "difference_low", "difference_high", "unit", "p_value", "p_corrected", "test", "difference_over_seeds",
    "over_seeds_low", "over_seeds_high", "macro_f1", "rouge_l", "exact_match", "seconds", "wire_bytes",
    "accelerator_bytes", "enclave_peak_bytes", "n_trained", "n_steps", "reason",
)  # fmt: skip


@dataclass
class MethodRuns:
    """What there is of one method.

    Attributes:
        results: by seed, what `carry_out` returned.
        failures: by seed, `{code, cause, hint, exit_code}` of the last attempt.
        unavailable: why it cannot run this job at all.
    """

    results: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    failures: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    unavailable: str = ""


def build_table(task: str, runs: Mapping[str, MethodRuns], seeds: Sequence[int]) -> dict[str, Any]:
    """What `compare.json` holds of the figures. *public*, as metrics are: no text, no label.

    Args:
        task: of the job.
        runs: by method, in the order of the table.
        seeds: that were asked for.

    Raises:
        CloisterError: the extra `evaluate` is missing.
    """
    is_causal = task == "causal-lm"
    reference = next((name for name in (REFERENCE, "central") if runs.get(name) and runs[name].results), None)
    peer = runs[reference].results if reference else {}
    rows = [_row(name, found, seeds) for name, found in runs.items()]
    for row in rows:
        results = runs[row["method"]].results
        if results:
            row.update(_perplexity(results) if is_causal else _accuracy(results))
            row.update(_completions(results) | _costs(results))
            if row["method"] != reference:
                row.update(_against(results, peer, is_causal=is_causal))
    _correct(rows)
    return {
        "version": TABLE_VERSION,
        "metric": "perplexity" if is_causal else "accuracy",
        "higher_is_better": not is_causal,
        "reference": reference,
        "seeds": list(seeds),
        "rows": rows,
        "notes": _notes(rows, seeds, reference, is_causal=is_causal),
    }


def table_csv(table: Mapping[str, Any]) -> str:
    """One line a method under a line of names; what a method does not have is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table["rows"]:
        cells = _csv_row(row, table)
        writer.writerow("" if cells[column] is None else cells[column] for column in CSV_COLUMNS)
    return text.getvalue()


def _csv_row(row: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
    figure, pair, over = (row.get(key) or {} for key in ("figure", "pair", "pair_over_seeds"))
    main = pair or over
    return {
        "method": row["method"],
        "status": row["status"],
        "seeds": " ".join(map(str, row["seeds"])),
        "metric": table["metric"],
        **{key: figure.get(key) for key in ("value", "low", "high")},
        "interval": figure.get("method"),
        "reference": table["reference"] if main else None,
        "difference": main.get("difference"),
        "difference_low": main.get("low"),
        "difference_high": main.get("high"),
        **{key: main.get(key) for key in ("unit", "p_value", "test")},
        "p_corrected": row.get("p_corrected"),
        "difference_over_seeds": over.get("difference"),
        "over_seeds_low": over.get("low"),
        "over_seeds_high": over.get("high"),
        **{key: (row.get(key) or {}).get("value") for key in ("rouge_l", "exact_match")},
        **{key: row.get(key) for key in ("macro_f1", "seconds", *_COSTS)},
        "reason": row["reason"],
    }


# --- one row ----------------------------------------------------------------------------------------------------------


def _row(name: str, found: MethodRuns, seeds: Sequence[int]) -> dict[str, Any]:
    done = sorted(found.results)
    reason = found.unavailable or next((failure["cause"] for _, failure in sorted(found.failures.items())), "")
    if found.unavailable:
        status = "unavailable"
    elif found.failures:
        status = "failed"
    else:
        status = "done" if len(done) == len(seeds) else "pending"
    return {"method": name, "label": METHODS[name].label, "status": status, "reason": reason, "seeds": done}


def _accuracy(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    from cloister.evaluate import interval, macro_f1, seed_mean

    scores = {seed: _scores(found) for seed, found in results.items()}
    mean = seed_mean(list(scores.values()))
    told = [found["examples"] for found in results.values()]
    f1 = None
    if len(set(told[0]["labels"])) > 1:  # of a single class there is none
        f1 = statistics.fmean(macro_f1(each["labels"], each["predicted"]) for each in told)
    return {
        "figure": interval(mean).as_dict(),
        "per_seed": {str(seed): each.overall for seed, each in scores.items()},
        "per_client": mean.per_client(),
        "n": mean.n,
        "macro_f1": f1,
    }


def _scores(found: Mapping[str, Any]) -> ExampleScores:
    from cloister.evaluate import classification_scores

    told = found["examples"]
    return classification_scores(told["labels"], told["predicted"], ids=told["ids"], clients=told["clients"])


def _perplexity(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Runs tell perplexities, not each example's, so what varies here are seeds; the mean is geometric."""
    from cloister.evaluate import compare_seeds

    values = {str(seed): float(found["metric"]["value"]) for seed, found in results.items()}
    numbers = list(values.values())
    if len(numbers) < 2:
        figure: dict[str, Any] = {"value": numbers[0], "low": None, "high": None, "method": "one seed: no interval"}
    else:
        found = compare_seeds(numbers, [_NO_TOKENS] * len(numbers), metric="perplexity")
        value, low, high = (math.exp(-x) for x in (found.difference, found.high, found.low))
        figure = {"value": value, "low": low, "high": high, "method": f"over seeds, {found.method}"}
    return {"figure": figure, "per_seed": values}


def _completions(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """ROUGE-L and exact match of generated texts, with intervals over examples."""
    told = [found["completions"] for found in results.values() if found.get("completions")]
    if not told:
        return {}
    from cloister.evaluate import exact_match_scores, has_rouge_word, interval, rouge_l_scores, seed_mean

    found = {}
    for name, score in (("rouge_l", rouge_l_scores), ("exact_match", exact_match_scores)):
        if score is rouge_l_scores and not any(map(has_rouge_word, told[0]["references"])):
            continue
        runs = [
            score(each["references"], each["completions"], ids=each["ids"], clients=each["clients"], workers=1)
            for each in told
        ]
        found[name] = interval(seed_mean(runs)).as_dict()
    return found


_COSTS = ("wire_bytes", "accelerator_bytes", "enclave_peak_bytes", "n_trained", "n_steps")


def _costs(results: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    def mean(key: str) -> float | None:
        numbers = [found[key] for found in results.values() if found.get(key) is not None]
        return statistics.fmean(numbers) if numbers else None

    found = {key: None if (value := mean(key)) is None else round(value) for key in _COSTS}
    return {"seconds": mean("wall_s"), "simulated": any(each["simulated"] for each in results.values()), **found}


# --- against the reference --------------------------------------------------------------------------------------------


def _against(
    results: Mapping[int, Mapping[str, Any]], peer: Mapping[int, Mapping[str, Any]], *, is_causal: bool
) -> dict[str, Any]:
    """Paired by example, and by seed where there are two; over the seeds that both have."""
    common = sorted(set(results) & set(peer))
    if not common:
        return {}
    from cloister.evaluate import compare_pair, compare_seeds, seed_mean

    sides = (results, peer)
    found: dict[str, Any] = {}
    if is_causal:
        ours, theirs = ([float(side[seed]["metric"]["value"]) for seed in common] for side in sides)
    else:
        scores = [[_scores(side[seed]) for seed in common] for side in sides]
        ours, theirs = ([each.overall for each in side] for side in scores)
        if scores[0][0].n > 1:
            found["pair"] = compare_pair(seed_mean(scores[0]), seed_mean(scores[1])).as_dict()
    if len(common) > 1:
        metric = "perplexity" if is_causal else "accuracy"
        found["pair_over_seeds"] = compare_seeds(ours, theirs, metric=metric).as_dict()
    return found


def _correct(rows: Sequence[dict[str, Any]]) -> None:
    """Holm's correction for how many methods are compared with the reference."""
    from cloister.evaluate import holm

    tested = [(row, pair) for row in rows if (pair := row.get("pair") or row.get("pair_over_seeds"))]
    for (row, _), corrected in zip(tested, holm([pair["p_value"] for _, pair in tested]), strict=True):
        row["p_corrected"] = corrected


def _notes(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], reference: str | None, *, is_causal: bool
) -> list[str]:
    """What a reader must know to read the table aright."""
    notes = []
    if len(seeds) == 1 and is_causal:
        notes.append("one seed: perplexity has no interval; two seeds or more give one")
    elif len(seeds) == 1:
        notes.append("one seed: intervals over examples only, nothing is said about other seeds")
    elif is_causal:
        notes.append(f"intervals over {len(seeds)} seeds")
    else:
        notes.append(f"intervals over examples, of the mean over {len(seeds)} seeds; over seeds: see compare.json")
    if reference is None:
        notes.append("neither fedavg nor central is there, so there are no differences")
    elif reference != REFERENCE:
        notes.append(f"no result of {REFERENCE}: differences are to {reference}")
    if reference is not None and is_causal:
        notes.append("differences are ln(reference / method): above 0 is better")
    if any(len(row["seeds"]) not in (0, len(seeds)) for row in rows):
        notes.append("not every method has every seed; a difference is over the seeds that both have")
    if any(row.get("simulated") for row in rows):
        notes.append("enclaves were SIMULATED: hardened processes on this machine, not TEEs")
    if plain := [row["method"] for row in rows if row["seeds"] and not METHODS[row["method"]].is_protected]:
        notes.append(f"in the clear, nothing of theirs is protected: {', '.join(plain)}")
    return notes
