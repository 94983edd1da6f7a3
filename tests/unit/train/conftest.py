"""What the near half's tests share: a byte-level tokenizer, a near side that is a fixed table, and data files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister import train
from cloister.slicing import inspect_backbone, load_tokenizer
from cloister.testing import write_tiny_model

HIDDEN = 8
LABELS = ("cardiology", "oncology", "neurology")


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("bert"), "bert")


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def encoder_tokenizer(encoder_folder: Path) -> Any:
    return load_tokenizer(inspect_backbone(encoder_folder))


@pytest.fixture(scope="session")
def decoder_tokenizer(decoder_folder: Path) -> Any:
    return load_tokenizer(inspect_backbone(decoder_folder))


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """Storage options of an S3 server on this machine."""
    pytest.importorskip("s3fs", reason="the s3 extra is not installed")
    server_module = pytest.importorskip("moto.server", reason="moto is not installed")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test-secret"}
    server.stop()


@pytest.fixture
def near() -> Callable[..., torch.Tensor]:
    """A stand-in near side: a row of a fixed table per token, and it counts its calls."""

    class TableNear:
        def __init__(self) -> None:
            self.table = torch.randn(512, HIDDEN, generator=torch.Generator().manual_seed(0))
            self.n_examples = 0

        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            self.n_examples += len(input_ids)
            return self.table[input_ids] * attention_mask[:, :, None]

    return TableNear()


@pytest.fixture
def classification() -> train.TaskSpec:
    return train.TaskSpec("sequence-classification", labels=LABELS)


@pytest.fixture
def causal() -> train.TaskSpec:
    return train.TaskSpec("causal-lm")


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: Sequence[Mapping[str, Any] | str], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def rows() -> Callable[[int], list[dict[str, Any]]]:
    """n classification rows of differing lengths."""
    return lambda n: [{"text": f"row {i} " + "x" * (i * 7 % 23), "label": LABELS[i % 3]} for i in range(n)]
