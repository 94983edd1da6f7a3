"""Search for many needles in much of what was seen, in one pass over it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

_WORD = 8


def kinds_in(needles: Mapping[str, Iterable[bytes]], haystack: Iterable[bytes]) -> set[str]:
    """The kinds that at least one needle of is somewhere in the haystack. A needle has 8 bytes or more.

    Every place of the haystack is looked up among the needles' first 8 bytes; what is found there is compared whole.
    """
    by_head: dict[bytes, list[tuple[str, bytes]]] = defaultdict(list)
    for kind, found in needles.items():
        for needle in found:
            assert len(needle) >= _WORD, f"a needle of {kind} is too short to mean anything"
            by_head[needle[:_WORD]].append((kind, needle))
    heads = np.unique(np.frombuffer(b"".join(by_head), np.uint64))
    kinds: set[str] = set()
    for hay in haystack:
        for place in _places_of(heads, hay):
            kinds |= {kind for kind, needle in by_head[hay[place : place + _WORD]] if hay.startswith(needle, place)}
    return kinds


def _places_of(heads: np.ndarray, hay: bytes) -> Iterable[int]:
    for shift in range(min(_WORD, len(hay) - _WORD + 1)):
        words = np.frombuffer(hay, np.uint64, count=(len(hay) - shift) // _WORD, offset=shift)
        at = np.searchsorted(heads, words)
        hits = np.flatnonzero(heads[np.minimum(at, len(heads) - 1)] == words) if len(heads) else ()
        yield from (shift + _WORD * int(i) for i in hits)
