"""The public names of the package: exact, sorted, each in its module, and loaded only when they are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cloister import train


def test_every_public_name_is_there_once_and_in_its_module() -> None:
    assert list(train.__all__) == sorted(set(train.__all__))
    assert set(train._HOME) == set(train.__all__)
    for name, home in train._HOME.items():
        value = getattr(train, name)
        module = getattr(value, "__module__", None)
        assert module is None or not module.startswith("cloister") or module == f"cloister.train.{home}", name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = train.nothing  # pyright: ignore[reportAttributeAccessIssue]
    assert dir(train) == train.__all__


@pytest.mark.parametrize("names", ["", "TaskSpec, Columns, check_dataset"])
def test_configuration_does_not_load_torch(names: str) -> None:
    code = f"import sys; import cloister.train; {f'from cloister.train import {names};' if names else ''}"
    code += "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'pyarrow', 'fsspec'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
