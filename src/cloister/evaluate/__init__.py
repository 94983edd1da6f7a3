"""How good models are and whether one is better: figures by example, intervals, paired tests, tables; docs/evaluate.md.

Needs the extra `evaluate` (scipy, scikit-learn, statsmodels, rouge-score), which is imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.evaluate._intervals import Interval, interval
    from cloister.evaluate._metrics import classification_scores, f1_report, macro_f1, perplexity_scores
    from cloister.evaluate._pairs import PairTest, compare_pair, compare_seeds, holm, pooled
    from cloister.evaluate._scores import ExampleScores, seed_mean
    from cloister.evaluate._table import ComparisonRow, ComparisonTable, comparison_table
    from cloister.evaluate._text import exact_match_scores, has_rouge_word, rouge_l_scores

_HOME = {
    "ComparisonRow": "_table",
    "ComparisonTable": "_table",
    "ExampleScores": "_scores",
    "Interval": "_intervals",
    "PairTest": "_pairs",
    "classification_scores": "_metrics",
    "compare_pair": "_pairs",
    "compare_seeds": "_pairs",
    "comparison_table": "_table",
    "exact_match_scores": "_text",
    "f1_report": "_metrics",
    "has_rouge_word": "_text",
    "holm": "_pairs",
    "interval": "_intervals",
    "macro_f1": "_metrics",
    "perplexity_scores": "_metrics",
    "pooled": "_pairs",
    "rouge_l_scores": "_text",
    "seed_mean": "_scores",
}

__all__ = [
    "ComparisonRow",
    "ComparisonTable",
    "ExampleScores",
    "Interval",
    "PairTest",
    "classification_scores",
    "compare_pair",
    "compare_seeds",
    "comparison_table",
    "exact_match_scores",
    "f1_report",
    "has_rouge_word",
    "holm",
    "interval",
    "macro_f1",
    "perplexity_scores",
    "pooled",
    "rouge_l_scores",
    "seed_mean",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
