"""
The report of a pool of 1,000,000 prompts: time and memory to write the page, and the time until Chromium shows it.

    python benchmarks/report_million.py [--prompts N] [--rounds N]

Needs Chromium and playwright.
"""

import shutil
import statistics
import tempfile
import time
from pathlib import Path

import harness
import numpy as np
import pyarrow as pa

from trl_learnalign import LearnAlignConfig, Selection
from trl_learnalign.choice.table import SCORES_SCHEMA
from trl_learnalign.report.selection_page import write_report
from trl_learnalign.selection.excerpt import ranking_ends, shortened, shown_rows


def selection_of(num: int, num_prompts: int = 1000) -> Selection:
    """A selection of random scores, with every kind of column."""
    draws = np.random.default_rng(0)
    rates = draws.integers(0, 9, num) / 8
    variances = rates * (1 - rates)
    learnable = variances > 0
    alignments = np.where(learnable, draws.normal(0.05, 0.1, num), np.nan)
    scores = np.where(learnable, variances * alignments, 0.0)
    ranks = np.empty(num, int)
    ranks[np.lexsort((~learnable, -scores))] = np.arange(num)
    table = {
        "index": np.arange(num),
        "success_rate": rates,
        "learnability": variances,
        "alignment": alignments,
        "score": scores,
        "rank": ranks,
        "selected": np.zeros(num, bool),
        "reward_mean": rates,
        "reward_std": np.sqrt(variances),
        "completion_length_mean": draws.integers(100, 8000, num) / 8,
        "gradient_norm": np.where(learnable, draws.random(num), np.nan),
        "eligible": learnable,
    }
    provenance = {
        "config": LearnAlignConfig(num_prompts).to_dict(),
        "num_rows": num,
        "num_rollouts": 8,
        "global_step": 38,
    }
    provenance |= {"measures": ["rollouts", "gradients"], "unscorable": [], "model": "none", "stage": 0, "seed": 0}
    provenance |= {"seconds": {"rollouts": 60.0, "gradients": 60.0}, "dataset_fingerprint": "none", "versions": {}}
    return Selection([], pa.table(table, schema=SCORES_SCHEMA), provenance).chosen()


def save(path: Path, num: int, characters: int) -> Path:
    """A finished run whose only selection is of `num` prompts of that many characters."""
    selection = selection_of(num)
    words = np.random.default_rng(1).choice(list("abcdefghij klmno"), 2 * characters)
    listed = sorted({*shown_rows(selection), *(index for end in ranking_ends(selection) for index in end)})
    texts = {"index": listed, "prompt": [shortened("".join(np.roll(words, index)[:characters])) for index in listed]}
    texts |= {"completion": ["so"] * len(listed), "reward": [1.0] * len(listed)}
    return selection.save(path / "learnalign" / "step-000038", texts=pa.table(texts)).parent


def write(path: Path) -> dict:
    """Seconds, and bytes of resident memory over the start: to be measured in a process of its own."""
    before = harness.most_memory(anew=True)
    started = time.perf_counter()
    page = write_report(path)
    found = {"write_seconds": time.perf_counter() - started, "resident_bytes": harness.most_memory() - before}
    return found | {"page_bytes": page.stat().st_size}


def painted(tab, act, *arguments) -> float:
    """Seconds until the table is drawn."""
    begin = time.perf_counter()
    act(*arguments)
    tab.locator("#table tbody tr").first.wait_for()
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return time.perf_counter() - begin


def open_page(page: Path, rounds: int) -> dict:
    """
    Median seconds from asking for the page, in a new browser each time, until the table is painted, and to search it.
    """
    from playwright.sync_api import sync_playwright

    opened, searched = [], []
    with sync_playwright() as started:
        for _ in range(rounds):
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page()
            opened.append(painted(tab, tab.goto, page.as_uri()))
            searched.append(painted(tab, tab.fill, "#search", "99"))
            version = browser.version
            browser.close()
    return {
        "open_seconds": statistics.median(opened),
        "open_seconds_most": max(opened),
        "search_seconds": statistics.median(searched),
        "chromium": version.partition(".")[0],
    }


def main():
    sizes = {"prompts": 1_000_000, "characters": 2000, "rounds": 5}
    arguments = harness.options(__doc__, **sizes, output="report_million")
    with tempfile.TemporaryDirectory() as scratch:
        run = save(Path(scratch), arguments.prompts, arguments.characters)
        written = harness.apart(write, run)
        opened = open_page(run / "report.html", arguments.rounds)
    settings = {"prompts": arguments.prompts, "characters": arguments.characters, "rounds": arguments.rounds}
    harness.report(arguments.output, settings | written | opened)


if __name__ == "__main__":
    main()
