"""Small jobs with a learnable rule and a tiny random backbone: a whole run of them takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

from cloister.testing._models import write_tiny_model

COLOURS = {"red": ("rose", "cherry", "blood"), "green": ("grass", "fern", "moss"), "blue": ("sea", "sky", "ink")}
_FILLER = ("the", "a", "old", "new", "near", "far", "under", "over", "warm", "cold")


def write_tiny_job(
    folder: Path,
    *,
    clients: tuple[str, ...] = ("alpha", "beta"),
    n_train: int = 24,
    n_test: int = 9,
    task: str = "sequence-classification",
    family: str = "bert",
    sections: str = "",
    training: str = "epochs = 2\nbatch_size = 8\nlr = 0.01\ncheckpoint_every_steps = 2",
) -> Path:
    """Writes model, data and `job.toml` into `folder`; returns the job's path.

    The rule: a text names one thing, and its label is the thing's colour. `sections` is TOML added at the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = write_tiny_model(folder / "model", family)
    for number, client in enumerate(clients):
        for split, n in (("train", n_train), ("test", n_test)):
            rows = [_row(i, number, split, task) for i in range(n)]
            path = folder / f"{client}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labels = f"labels = {json.dumps(list(COLOURS))}\n" if task == "sequence-classification" else ""
    parts = [
        f'version = 1\nname = "tiny"\n\n[task]\nname = "{task}"\n{labels}',
        f'[model]\npath = "{model}"\n',
        f"[training]\n{training}\n",
        *(f'[[clients]]\nname = "{c}"\ntrain = "{c}-train.jsonl"\ntest = "{c}-test.jsonl"\n' for c in clients),
        sections,
    ]
    path = folder / "job.toml"
    path.write_text("\n".join(parts), encoding="utf-8")
    return path


def _row(index: int, client: int, split: str, task: str) -> dict[str, str]:
    colours = list(COLOURS)
    colour = colours[(index + client) % len(colours)]
    thing = COLOURS[colour][(index // 3) % 3]
    words = [
        _FILLER[(index * 7 + client * 3 + k * (1 if split == "train" else 3)) % len(_FILLER)] for k in range(index % 5)
    ]
    text = " ".join([*words, thing, f"{client}{split[1]}{index}"])
    if task == "causal-lm":
        return {"prompt": text, "completion": f" is {colour}"}
    return {"text": text, "label": colour}
