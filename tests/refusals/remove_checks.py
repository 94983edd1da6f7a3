"""Remove each check of the trusted packages in turn, and run the test that must notice.

A test that still passes without the check that it is named for proves nothing. `checks.toml` beside this file lists
every refusal of spec/attestation.md section 5 and spec/wire.md: the file, the text of the check, what takes its place,
and the tests. For each, the package is copied, the one edit is made, and the tests run on the copy: one must fail.

    python tests/refusals/remove_checks.py [--only WORD ...] [--jobs 2]

Exit code 0: every removal was noticed. The suite itself checks (in seconds) that the list fits the code.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("checks.toml")
# An editable install puts a finder before every path; this runs at the start of each interpreter, right after it did.
FORGET_THE_CHECKOUT = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
"""
_FAILED = 1  # pytest: tests were collected and run, some failed


@dataclass(frozen=True)
class Check:
    """One check: what it refuses, where it stands, how it is removed, and who must notice."""

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def mutated(self) -> str:
        """The file without the check."""
        text = (ROOT / "src/cloister" / self.file).read_text(encoding="utf-8")
        found = text.count(self.find)
        if found != 1:
            raise ValueError(f"{self.name}: the text of the check stands {found} times in {self.file}, not once")
        return text.replace(self.find, self.replace)


def read_checks() -> list[Check]:
    """The list, in its order."""
    tables = tomllib.loads(LIST.read_text(encoding="utf-8"))["check"]
    return [Check(**{**table, "tests": tuple(table["tests"])}) for table in tables]


def run_without(check: Check) -> tuple[Check, str]:
    """Run the check's tests on a copy of the package that lacks it. Returns "" where they notice, else the problem."""
    with tempfile.TemporaryDirectory(prefix="cloister-removed-") as folder:
        package = Path(folder) / "cloister"
        shutil.copytree(ROOT / "src/cloister", package, ignore=shutil.ignore_patterns("__pycache__"))
        (package / check.file).write_text(check.mutated(), encoding="utf-8")
        (Path(folder) / "sitecustomize.py").write_text(FORGET_THE_CHECKOUT, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", *check.tests]
        # A path that comes first wins over the installed package; the test says so if it did not.
        environment = {**os.environ, "PYTHONPATH": folder, "CLOISTER_EXPECT_PACKAGE": str(package)}
        environment.setdefault("CLOISTER_SHARED", str(ROOT.parent / "shared"))
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == _FAILED:
        return check, ""
    if done.returncode != 0:
        return check, f"pytest ended with {done.returncode}: {done.stdout[-400:]}"
    return check, "skipped: its samples are not here" if " passed" not in done.stdout else "not noticed"


def main() -> int:
    """Every check, or those whose name holds one of the words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="words of the names to run")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chosen = [check for check in read_checks() if not args.only or any(word in check.name for word in args.only)]
    bad = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for check, problem in pool.map(run_without, chosen):
            bad += bool(problem)
            print(f"{'MISSED ' if problem else 'noticed'} {check.name}{': ' + problem if problem else ''}", flush=True)
    print(f"{len(chosen)} checks removed, {len(chosen) - bad} noticed")
    return 1 if bad or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
