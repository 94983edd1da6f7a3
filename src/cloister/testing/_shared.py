"""Where tests find the data that is too large for the repository."""

from __future__ import annotations

import os
from pathlib import Path


def shared_dir() -> Path | None:
    """The folder of shared data and models, or None where this machine has none.

    `CLOISTER_SHARED` names it; otherwise it is looked for beside the checkout. A test that needs it skips with that
    reason when this is None: the product itself must work without the folder.
    """
    named = os.environ.get("CLOISTER_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[4] / "shared"
    return folder if (folder / "data").is_dir() else None
