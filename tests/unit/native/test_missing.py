"""Without the compiled module there is a clear word, and no slower way around it."""

from __future__ import annotations

import importlib
import sys

import pytest

from cloister import kernels
from cloister.errors import CloisterError


def test_a_package_without_its_compiled_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloister.kernels._native", None)
    monkeypatch.delattr(kernels, "_native")
    with pytest.raises(CloisterError, match="compiled kernels are not here") as caught:
        importlib.reload(kernels)
    assert "g++" in caught.value.hint
    assert isinstance(caught.value.__cause__, ImportError)
