"""`python -m cloister.cli`: the same as the command `cloister`."""

from __future__ import annotations

import sys

from cloister.cli import main

sys.exit(main())
