"""The report in a real browser: no error on its console, nothing asked of the network, every plot drawn with a size."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cloister.report import write_report

SAMPLE = Path(__file__).parents[1] / "unit" / "report" / "sample"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--enable-logging=stderr", "--log-level=0", "--window-size=1200,2800",
)  # fmt: skip


@pytest.fixture
def chromium(tmp_path: Path):
    program = next(
        (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
    )
    if program is None:
        pytest.skip("chromium is not installed")

    def start(*args: str) -> subprocess.CompletedProcess[str]:
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [program, *FLAGS, profile, *args], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done

    return start


def console_lines(stderr: str) -> list[str]:
    """What the page wrote to its console: errors of scripts, of loading and of the content security policy."""
    return [line for line in stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
def test_the_report_opens_without_an_error_and_draws_its_plots(tmp_path: Path, chromium):
    result = json.loads((SAMPLE / "result.json").read_text())
    events = [json.loads(line) for line in (SAMPLE / "events.jsonl").read_text().splitlines()]
    report = write_report(tmp_path, result, events)

    done = chromium("--dump-dom", report.as_uri())
    assert console_lines(done.stderr) == []
    dom = done.stdout
    assert dom.count("<svg") == 6 and "78.6 %" in dom and "SIMULATED" in dom
    for plot in (
        "training loss",
        "accuracy on each client",
        "accuracy of each model",
        "time by phase",
        "bytes carried",
    ):
        assert f'aria-label="{plot}' in dom, plot

    # A script of the test's own measures the drawn page; the report itself carries none, and forbids them.
    probe = tmp_path / "probe.html"
    probe.write_text(
        re.sub(r"<meta http-equiv[^>]*>", "", report.read_text()).replace(
            "</body>",
            """<script>
            const boxes = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
            document.title = JSON.stringify({
              sizes: boxes.map(b => [Math.round(b.width), Math.round(b.height)]),
              wide: document.documentElement.scrollWidth,
              shapes: [...document.querySelectorAll("rect, polyline")].filter(s => s.getBBox().width > 0).length,
              loaded: performance.getEntriesByType("resource").length,
            });
            </script></body>""",
        )
    )
    title = re.search(r"<title>(.*?)</title>", chromium("--dump-dom", probe.as_uri()).stdout)
    assert title is not None
    drawn = json.loads(title.group(1))
    assert all(width > 200 and height > 20 for width, height in drawn["sizes"]), drawn
    assert drawn["wide"] <= 1200 and drawn["shapes"] > 30 and drawn["loaded"] == 0, drawn


@pytest.mark.slow
def test_the_check_sees_an_error(tmp_path: Path, chromium):
    """The twin: a page with a blocked script and a failing one is caught by the same look at the console."""
    page = tmp_path / "bad.html"
    page.write_text("<script>undefined_function()</script>")
    assert console_lines(chromium("--dump-dom", page.as_uri()).stderr)


@pytest.mark.slow
def test_a_screenshot_is_not_blank(tmp_path: Path, chromium):
    result = json.loads((SAMPLE / "result.json").read_text())
    events = [json.loads(line) for line in (SAMPLE / "events.jsonl").read_text().splitlines()]
    report = write_report(tmp_path, result, events)
    chromium(f"--screenshot={tmp_path / 'shot.png'}", report.as_uri())
    assert (tmp_path / "shot.png").stat().st_size > 50_000  # A blank page of this size is under 15 kB.
