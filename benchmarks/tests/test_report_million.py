"""The benchmark of a large page, with a small pool."""

import report_million

from trl_learnalign import Selection
from trl_learnalign.report.selection_page import write_report


def test_a_made_up_run_has_a_report(tmp_path):
    run = report_million.save(tmp_path, 2_000, 100)
    assert len(Selection.load(run / "step-000038").indices) == 1000
    assert write_report(run).stat().st_size > 100_000
