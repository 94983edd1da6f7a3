"""The search of the adversarial tests finds what is there, wherever it begins, and nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests._search import kinds_in

# Few different bytes, so that needles begin alike and often nearly match.
needle = st.binary(min_size=8, max_size=12).map(lambda raw: bytes(byte % 2 for byte in raw))
needles = st.dictionaries(st.sampled_from(["text", "tokens", "keys"]), st.lists(needle, max_size=3))
hays = st.lists(st.binary(max_size=64).map(lambda raw: bytes(byte % 2 for byte in raw)), max_size=3)


@given(needles, hays)
def test_as_the_plain_search(looked_for, haystack):
    expected = {kind for kind, found in looked_for.items() if any(n in hay for n in found for hay in haystack)}
    assert kinds_in(looked_for, haystack) == expected


@given(needle, st.binary(max_size=20), st.binary(max_size=20))
def test_at_every_place(looked_for, before, after):
    assert kinds_in({"text": [looked_for]}, [b"", before, before + looked_for + after]) == {"text"}
