"""A client runs the courier that its operator installed, and no other code that the SuperLink may send.

Stock Flower runs whatever app bundle the SuperLink delivers. The relay is trusted with delivery only, and a client's
host sees that client's text: so in the process that loads the bundle every import is watched (PEP 578), and the bundle
must be, file for file, the app of this cloister installation.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from types import CodeType

_CONFIG = "pyproject.toml"


def guard_apps(apps: Path, expected: Path) -> None:
    """From now on, code under `apps` runs in this process only if its bundle equals `expected`. Cannot be undone.

    Args:
        apps: where Flower unpacks bundles, one folder each.
        expected: the app folder of this installation.

    Raises:
        ImportError: not here, but at the import of anything from another bundle.
    """
    root = str(apps.absolute()) + "/"
    approved: set[str] = set()
    sys.dont_write_bytecode = True  # a bundle stays exactly what was unpacked

    def watch(event: str, args: tuple[object, ...]) -> None:
        if event == "import":
            places = [p for p in sys.path if isinstance(p, str)]
        elif event == "exec" and isinstance(args[0], CodeType):
            places = [args[0].co_filename]
        else:
            return
        for place in places:
            if (place + "/").startswith(root):
                bundle = place[len(root) :].split("/", maxsplit=1)[0]
                if bundle not in approved:
                    _require_same(Path(root) / bundle, expected)
                    approved.add(bundle)

    sys.addaudithook(watch)


def _require_same(bundle: Path, expected: Path) -> None:
    # The installation has bytecode of its own. In a bundle there is none, and what is there must not pass.
    installed = {name: content for name, content in _files(expected).items() if "__pycache__" not in name}
    if _files(bundle) != installed:
        raise ImportError(f"the SuperLink sent an app that is not this installation's courier: {bundle.name}")


def _files(folder: Path) -> dict[str, object]:
    """Path -> content. The configuration is compared by meaning: Flower writes it anew when it builds a bundle."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        if name == _CONFIG:
            found[name] = tomllib.loads(path.read_text(encoding="utf-8"))
        elif path.is_symlink() or not path.is_file():
            found[name] = None
        else:
            found[name] = path.read_bytes()
    return found
