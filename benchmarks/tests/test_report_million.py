"""The page of a large pool."""

import json
import re

import report_million

from trl_learnalign import Selection
from trl_learnalign.report.selection_page import write_report


def rows_on(page):
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    return [dict(zip((column["key"] for column in data["columns"]), row, strict=True)) for row in data["rows"]]


def test_size_of_the_page_is_bounded(tmp_path):
    """50,000 long prompts, of which 1,000 are chosen, through the code of the benchmark."""
    run = report_million.save(tmp_path, 50_000, 2_000)
    text = write_report(run).read_text(encoding="utf-8")
    rows, selection = rows_on(text), Selection.load(run / "step-000038")
    assert len(rows) == 20_000 < selection.scores.num_rows
    indices = {row["index"] for row in rows}
    ranked, table = selection.eligible(), selection.to_pandas()
    assert indices >= {*selection.indices, *ranked[:2500].tolist(), *ranked[-2500:].tolist()}
    others = table[~table.index.isin([*ranked[:2500], *ranked[-2500:]])]
    shown = others.index.isin(indices)  # a random part: as a draw of that many would be
    share = shown.mean()
    for half in (others["rank"] < others["rank"].median(), others.index < 25_000, others["learnability"] == 0):
        assert abs(shown[half].mean() - share) < 5 * (share / half.sum()) ** 0.5
    assert sum(len(row["prompt"]) for row in rows) <= 20_000 * (500 + 1)
    data = re.search(r'id="data">(.*?)</script>', text, re.S)[1]
    assert len(data) < 13_000_000 and len(text) - len(data) < 1_000_000
    assert "the 1,000 chosen, the 2,500 highest- and the 2,500 lowest-ranked" in text
    assert "Those of more than 500 characters are cut" in text
