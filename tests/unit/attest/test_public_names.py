from __future__ import annotations

import subprocess
import sys

import pytest

import cloister.attest
import cloister.enclave


@pytest.mark.parametrize("package", [cloister.attest, cloister.enclave])
def test_public_names_exist_once_and_in_order(package):
    names = package.__all__
    constants = [name for name in names if name.isupper()]
    classes = [name for name in names if name not in constants and name[0].isupper()]
    functions = [name for name in names if name[0].islower()]
    assert names == sorted(constants) + sorted(classes) + sorted(functions)
    assert len(set(names)) == len(names)
    assert all(hasattr(package, name) for name in names)


def test_attest_and_enclave_do_not_import_torch():
    code = "import sys, cloister.attest, cloister.enclave; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
