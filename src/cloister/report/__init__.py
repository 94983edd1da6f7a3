"""What a run leaves for people: one self-contained HTML page, and TensorBoard logs. Prints nothing."""

from __future__ import annotations

from cloister.report._compare_page import compare_cells, render_compare_page, write_compare_page
from cloister.report._models import model_rows
from cloister.report._page import render_report, write_report
from cloister.report._tensorboard import write_tensorboard

__all__ = [
    "compare_cells",
    "model_rows",
    "render_compare_page",
    "render_report",
    "write_compare_page",
    "write_report",
    "write_tensorboard",
]
