"""The structure that architecture.md draws holds: import floors, public names, a light import, recipes that parse."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "cloister"
# The Flower bundle is no package of ours: it is a copy on Flower's side that imports the courier and nothing else.
PACKAGES = sorted(
    path.parent
    for path in PACKAGE.rglob("__init__.py")
    if "app" not in path.parts and not path.parent.name.startswith("_")
)


def test_import_floors_hold():
    done = subprocess.run([sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
                          cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: str(p.relative_to(PACKAGE.parent)))
def test_public_names_are_a_sorted_literal_and_exist(package: Path):
    tree = ast.parse((package / "__init__.py").read_text())
    found = [node.value for node in tree.body if isinstance(node, ast.Assign)
             for target in node.targets if isinstance(target, ast.Name) and target.id == "__all__"]  # fmt: skip
    assert found, f"{package} has no __all__"
    names = ast.literal_eval(found[0])
    constants = [name for name in names if name.isupper() and len(name) > 1]
    classes = [name for name in names if name not in constants and name[0].isupper()]
    functions = [name for name in names if not name[0].isupper()]
    assert names == sorted(constants) + sorted(classes) + sorted(functions)
    module = ".".join(package.relative_to(PACKAGE.parent).parts)
    __import__(module)
    for name in names:
        assert hasattr(sys.modules[module], name), f"{module}.{name}"


def test_only_private_modules_inside_packages():
    public = [path for path in PACKAGE.glob("*/*.py") if not path.name.startswith("_")]
    assert public == []


@pytest.mark.parametrize(
    "module",
    ["cloister", "cloister.config", "cloister.cli", "cloister.train", "cloister.federation", "cloister.evaluate"],
)
def test_importing_is_light(module: str):
    heavy = ["torch", "transformers", "flwr", "datasets", "pyarrow", "matplotlib", "scipy", "sklearn", "statsmodels"]
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["wire", "attest", "channel", "enclave"])
def test_trusted_packages_never_import_torch(package: str):
    for path in (PACKAGE / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in {"torch", "numpy", "transformers"} for name in names), path


def test_every_recipe_parses():
    from cloister.config import load_job

    jobs = sorted((ROOT / "recipes").glob("*/*.toml"))
    assert len(jobs) >= 14
    for path in jobs:
        assert load_job(path).name
        assert (path.parent / "README.md").is_file()
