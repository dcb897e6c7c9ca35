"""report.html and its figures: what they say, that they need nothing, and that they hold in a browser."""

import html
import itertools
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tiny import config, digit_reward, graded_reward, make_trainer, parity_reward

from trl_learnalign import Selection, select_prompts
from trl_learnalign.data.prompts import prompt_text
from trl_learnalign.ground.disk import rollouts_of
from trl_learnalign.host import find_host
from trl_learnalign.report.selection_page import write_report
from trl_learnalign.selection.dry_run import plan_selection
from trl_learnalign.selection.excerpt import ranking_ends, shown_rows
from trl_learnalign.selection.run import checked_run
from trl_learnalign.selection.stages import load_run


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DASH = "\u2013"
HOSTILE = "<script>window.hacked = 1</script>{{data}}</script><img src=x onerror=window.hacked=1>\u2028"


def reported(**changes):
    return config(**{"write_report": True} | changes)


def hostile_dataset(num=24):
    prompts = [f"{i % 10}+{i // 10}=" for i in range(num)]
    prompts[3] += HOSTILE
    return Dataset.from_dict({"prompt": prompts, "row": list(range(num))})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two selections, of rows with markup in them."""
    path = tmp_path_factory.mktemp("run")
    settings = {"reward": parity_reward, "dataset": hostile_dataset(), "num_train_epochs": 3}
    make_trainer(path, reported(reselect_every=1), **settings).train()
    return path / "learnalign"


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_a_run_leaves_a_report(run):
    steps = sorted(run.glob("step-*"))
    assert len(steps) == 2
    page = (run / "report.html").read_text(encoding="utf-8")
    selection = Selection.load(steps[-1])
    data = data_of(page)
    keys = [column["key"] for column in data["columns"]]
    rows = {row[keys.index("index")]: dict(zip(keys, row, strict=True)) for row in data["rows"]}
    table = selection.scores.to_pandas().set_index("index")
    assert set(rows) == set(table.index)
    for index, row in rows.items():
        assert row["selected"] == table.loc[index, "selected"] and row["rank"] == table.loc[index, "rank"]
        assert row["score"] == pytest.approx(table.loc[index, "score"], rel=1e-5)
        assert row["prompt"] == hostile_dataset()[index]["prompt"]
    assert f"<dd>{len(selection.indices)}</dd>" in page and f"<dd>{selection.num_learnable()}</dd>" in page
    # The caption's formula: score = learnability x alignment x a constant
    ranked = table[table["alignment"].abs() > 0.01]
    constants = ranked["score"] / (ranked["learnability"] * ranked["alignment"])
    assert len(ranked) > 5 and constants.tolist() == pytest.approx([constants.iloc[0]] * len(ranked))
    assert "Their score is learnability \u00d7 alignment \u00d7 |mean z|, where |mean z|" in page
    names = {file.name for file in (run / "figures").iterdir()}
    assert names == {f"{name}.png" for name in ("success_rates", "scores", "lengths", "seconds", "stages")}
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in (run / "figures").iterdir())


def test_both_ends_of_the_ranking_come_with_a_completion(run):
    step = sorted(run.glob("step-*"))[-1]
    best, last = ranking_ends(Selection.load(step))
    texts = {row["index"]: row for row in pq.read_table(step / "texts.parquet").to_pylist()}
    assert len(best) == 10 and not set(best) & set(last)
    for index, row in texts.items():
        assert (row["completion"] is not None) == (index in best + last) == (row["reward"] is not None)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count("<td class=text data-label=") == 2 * len(best + last)
    assert "<h3>Highest-ranked</h3>" in page and "<h3>Lowest-ranked</h3>" in page


def test_completions_are_those_of_the_rollouts(tmp_path):
    trainer = make_trainer(tmp_path, reward=[digit_reward, parity_reward], reward_weights=[1.0, 0.5])
    select_prompts(trainer, reported(save_rollouts=True, success_reward="digit_reward"))
    step = tmp_path / "learnalign/step-000000"
    rollouts = pq.read_table(rollouts_of(step) / "rollouts.parquet").to_pandas().groupby("index").first()
    shown = [row for row in pq.read_table(step / "texts.parquet").to_pylist() if row["completion"] is not None]
    assert shown
    for row in shown:
        first = rollouts.loc[row["index"]]
        assert row["completion"] == first["completion"]
        assert row["reward"] == pytest.approx(first["rewards"][0] + 0.5 * first["rewards"][1])


def rows_on(page):
    data = data_of(page)
    return [dict(zip((column["key"] for column in data["columns"]), row, strict=True)) for row in data["rows"]]


def test_a_large_pool_is_shown_by_a_sample_and_the_page_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_learnalign.selection.excerpt.MOST_ROWS", 8)
    monkeypatch.setattr("trl_learnalign.selection.excerpt.MOST_CHARACTERS", 3)
    selection = select_prompts(make_trainer(tmp_path), reported())
    page = (tmp_path / "learnalign/report.html").read_text(encoding="utf-8")
    rows = rows_on(page)
    ranked = selection.eligible().tolist()
    assert len(rows) == 8 and {*selection.indices[:4], ranked[0], ranked[-1]} < {row["index"] for row in rows}
    assert [row["rank"] for row in rows] == sorted(row["rank"] for row in rows)
    assert all(row["prompt"] == f"{row['index'] % 10}+{row['index'] // 10}\u2026" for row in rows)
    assert (
        "A sample of 8 of 24 prompts: the first 4 of the 8 chosen, the 1 highest- and the 1 lowest-ranked that may be "
        "chosen, "
        "and a random part of the others. scores.parquet has all." in page
    )
    assert "Texts over 3 characters are cut and end with \u201c\u2026\u201d." in page
    texts = set(pq.read_table(tmp_path / "learnalign/step-000000/texts.parquet")["index"].to_pylist())
    best, last = ranking_ends(selection)
    assert texts == {*best, *last, *(row["index"] for row in rows)} and len(texts) < 24


def as_if_of_a_large_pool(run, path, num):
    """Save a selection of 1,000 of `num` long prompts, with the columns and the provenance of a real one."""
    small = Selection.load(sorted(run.glob("step-*"))[0])
    draws = np.random.default_rng(0)
    table = small.scores.take(draws.integers(0, small.scores.num_rows, num)).to_pandas()
    table = table.assign(index=np.arange(num), score=draws.random(num) * table["eligible"])
    table["rank"] = table["score"].rank(ascending=False, method="first").astype(int) - 1
    settings = small.provenance["config"] | {"num_prompts": 1000}
    provenance = small.provenance | {"config": settings, "num_rows": num}
    large = Selection([], pa.Table.from_pandas(table, small.scores.schema, preserve_index=False), provenance).chosen()
    listed = sorted({*shown_rows(large), *itertools.chain(*ranking_ends(large))})
    texts = {"index": listed, "prompt": [f"{index} " + "x" * 1990 for index in listed]}
    texts |= {"completion": ["so"] * len(listed), "reward": [1.0] * len(listed)}
    return large.save(path / "learnalign/step-000038", pa.table(texts)).parent


def test_size_of_the_page_is_bounded(tmp_path, run):
    """50,000 long prompts, of which 1,000 are chosen."""
    run = as_if_of_a_large_pool(run, tmp_path, 50_000)
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
    assert "Texts over 500 characters are cut" in text


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    """By reports, logged figures and model cards of a staged run with a checkpoint, and so a card, at every step."""
    read = []
    load = Selection.load
    monkeypatch.setattr(Selection, "load", lambda path: read.append(path.name) or load(path))
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}
    trainer = make_trainer(tmp_path, reported(reselect_every=1), **settings)
    trainer.train()
    steps = sorted((tmp_path / "learnalign").glob("step-*"))
    assert len(steps) >= 2 and trainer.state.global_step > len(steps)
    assert read == [step.name for step in steps]
    for _ in range(3):
        trainer.create_model_card()
    assert len(read) == len(steps)
    lines = [f"- {load(step).summary()}" for step in steps]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert all(line in card for line in lines)
    # Another selection in the same place, as large as before and of the same time
    file = steps[0] / "selection.json"
    before = file.stat()
    changed = load(steps[0])
    changed.provenance["seconds"] = {name: 9 - value for name, value in changed.provenance["seconds"].items()}
    changed.save(steps[0])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    trainer.create_model_card()
    assert read[len(steps) :] == [steps[0].name]
    assert f"- {changed.summary()}" in (tmp_path / "README.md").read_text(encoding="utf-8")
    # A report needs all of the last one, and no more
    write_report(tmp_path)
    assert read[len(steps) + 1 :] == [steps[-1].name]


def test_nothing_is_fetched_and_no_markup_of_a_row_survives(run, tmp_path):
    step = shutil.copytree(sorted(run.glob("step-*"))[-1], tmp_path / "hostile")
    texts = pq.read_table(step / "texts.parquet").to_pylist()
    for row in texts:
        row["completion"] = row["completion"] and HOSTILE
    pq.write_table(pa.Table.from_pylist(texts), step / "texts.parquet")
    page = write_report(step).read_text(encoding="utf-8")
    assert page.count(html.escape(HOSTILE)) > 5

    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.found = []

        def handle_starttag(self, tag, attributes):
            self.found.append((tag, dict(attributes)))

    parser = Tags()
    parser.feed(page)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("script") == 2 and "link" not in tags and "iframe" not in tags
    for tag, attributes in parser.found:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert len(attributes["alt"]) > 20


def test_paths(run, tmp_path):
    assert write_report(run.parent) == write_report(run) == run / "report.html"
    step = sorted(run.glob("step-*"))[0]
    alone = shutil.copytree(step, tmp_path / "alone")
    (alone / "texts.parquet").unlink()
    page = write_report(str(alone))
    assert page == alone / "report.html"
    text = page.read_text(encoding="utf-8")
    assert "Selections of this run" not in text and "texts of the prompts were not kept" in text
    with pytest.raises(FileNotFoundError, match="holds no finished selection"):
        write_report(tmp_path)


def test_switched_off_and_never_in_the_way(tmp_path, monkeypatch, caplog, capsys):
    select_prompts(make_trainer(tmp_path / "off"), config(write_report=False))
    assert [file.name for file in (tmp_path / "off/learnalign").iterdir() if file.name != "lock"] == ["step-000000"]
    select_prompts(make_trainer(tmp_path / "on"), reported())
    assert f"Why each prompt was chosen: {tmp_path / 'on/learnalign/report.html'}" in capsys.readouterr().out
    monkeypatch.setattr("trl_learnalign.report.selection_page.write_report", lambda *args: 1 / 0)
    selection = select_prompts(make_trainer(tmp_path / "broken"), reported())
    assert selection.indices and "could not be written (ZeroDivisionError" in caplog.text
    assert "Why each prompt" not in capsys.readouterr().out
    # Who makes a selection decides whether there is a page, and how it is written
    trainer, written = make_trainer(tmp_path / "other"), []
    checked_run(find_host(trainer), reported(score="random"), 0).run(lambda *where: written.append(where))
    assert written == [(tmp_path / "other/learnalign", 0)]


def test_selections_of_an_earlier_run_stay_out_of_it(tmp_path):
    """The earlier run selected after its warm-up of two steps, the later one before its first."""
    make_trainer(tmp_path, reported(num_prompts=7, warmup_prompts=8), num_train_epochs=2).train()
    trainer = make_trainer(tmp_path, reported(num_prompts=5, warmup_prompts=0), num_train_epochs=2)
    trainer.train()
    old, new = sorted((tmp_path / "learnalign").glob("step-*"), reverse=True)
    assert len(Selection.load(old).indices) == 7 and new.name == "step-000000"
    page = (tmp_path / "learnalign/report.html").read_text(encoding="utf-8")
    assert "5 of 24 prompts" in page and "7 of 24 prompts" not in page
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "chosen 5" in card and "chosen 7" not in card
    runs = load_run(tmp_path, until=0), load_run(tmp_path)
    assert [[stage.path for stage in run] for run in runs] == [[new], [old]]


@pytest.mark.parametrize("score", ["random", "learnability"])
def test_other_scores(tmp_path, score, caplog):
    def patchy(completions, row, **kwargs):
        return [None if r < 3 else own for r, own in zip(row, digit_reward(completions, row), strict=True)]

    select_prompts(make_trainer(tmp_path, reward=patchy), reported(score=score))
    page = (tmp_path / "learnalign/report.html").read_text(encoding="utf-8")
    # The page has what the log warns of
    warned = [record.message for record in caplog.records if record.name == "trl_learnalign.selection.run"]
    assert len(warned) == (score == "learnability") and all(html.escape(text) in page for text in warned)
    assert ("chosen at random" in page) == (score == "random")
    keys = [column["key"] for column in data_of(page)["columns"]]
    assert "alignment" not in keys and ("success_rate" in keys) == (score == "learnability")
    assert ("First of the random order" in page) == ("Some of the prompts" in page) == (score == "random")
    assert ("Highest-ranked" in page) == ("learnable" in page.partition("<script")[0]) == (score == "learnability")
    assert " cut and end with" not in page


def test_graded_rewards_are_shown_as_rewards(tmp_path):
    """
    No reward reaches 1, so that a success rate would be 0: on the page, in the line, in the log and in the dry run.
    """
    settings = reported(learnability="variance")
    trainer = make_trainer(tmp_path, settings, reward=graded_reward, num_train_epochs=2)
    trainer.train()
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    table = selection.to_pandas()
    chosen = table[table["selected"]]
    assert table["success_rate"].max() == 0 and len(chosen) == 8
    means = {
        f"reward_{name}": (table[f"reward_{name}"].mean(), chosen[f"reward_{name}"].mean()) for name in ("mean", "std")
    }
    assert selection.outcomes() == {name: pytest.approx(values) for name, values in means.items()}
    page = (tmp_path / "learnalign/report.html").read_text(encoding="utf-8")
    visible = page.partition("<script")[0]
    words = [selection.summary(), repr(selection), plan_selection(trainer, settings)[0]]
    for text in (*words, visible.replace("prompts have no success rate here", "")):
        assert "success rate" not in text and "solved" not in text
    for name, (pool, of_chosen) in means.items():
        label = {"reward_mean": "mean reward", "reward_std": "mean reward std"}[name]
        assert f"; {label} {pool:.3f} (pool), {of_chosen:.3f} (chosen)" in words[0]
        assert f"{name}={pool:.3f} (pool), {of_chosen:.3f} (chosen)" in words[1]
        assert re.search(rf"^{label}: \d\.\d{{3}}$", words[2], re.M)
        assert f"<dt>{label}, pool</dt><dd>{pool:.2f}</dd>" in page
    keys = [column["key"] for column in data_of(page)["columns"]]
    assert {"reward_mean", "reward_std"} < set(keys) and "success_rate" not in keys
    assert (tmp_path / "learnalign/figures/rewards.png").is_file()
    (logged,) = (entry for entry in trainer.state.log_history if "learnalign/stage" in entry)
    assert not any("success_rate" in name for name in logged)
    for name, values in means.items():
        assert (logged[f"learnalign/{name}_pool"], logged[f"learnalign/{name}_selected"]) == pytest.approx(values)


@pytest.mark.parametrize(
    ("reward", "learnability", "reason"),
    [
        (None, "success_rate", "the rewards of all 24 prompts were None, NaN or infinite"),
        (0.0, "success_rate", "none was ever solved"),
        (0.3, "variance", "the rollouts of every prompt had equal rewards"),
    ],
)
def test_the_page_says_why_nothing_was_chosen(tmp_path, reward, learnability, reason):
    def constant(completions, **kwargs):
        return [reward] * len(completions)

    selection = select_prompts(make_trainer(tmp_path, reward=constant), reported(learnability=learnability))
    page = (tmp_path / "learnalign/report.html").read_text(encoding="utf-8")
    assert selection.indices == [] and "LearnAlign: 0 of 24 prompts" in page and reason in page
    assert page.count("<p>No prompt ") == 1 and ("solved" in page) == (reward == 0.0)
    assert not re.search(r"\bnan\b", selection.summary() + repr(selection) + page.partition("<script")[0])
    assert ("24 unscorable" in selection.summary()) == (reward is None)
    names = {"seconds"} if reward is None else {"seconds", "lengths", "rewards" if reward else "success_rates"}
    assert {file.stem for file in (tmp_path / "learnalign/figures").iterdir()} == names


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(run, tmp_path, scheme):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page_file = run / "report.html"
    text = page_file.read_text(encoding="utf-8")
    data = data_of(text)
    keys = [column["key"] for column in data["columns"]]
    rows = data["rows"]
    many = [[*row] for _ in range(20_000 // len(rows) + 1) for row in rows][:20_000]
    for number, row in enumerate(many):
        row[keys.index("index")] = number
    large = json.dumps(data | {"rows": many}).replace("<", "\\u003c")
    big_file = tmp_path / "big.html"
    big_file.write_text(
        re.sub(r'(id="data">).*?(</script>)', lambda match: match[1] + large + match[2], text, flags=re.S),
        encoding="utf-8",
    )
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(color_scheme=scheme, offline=True, viewport={"width": 1280, "height": 900})
        page = context.new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
        page.goto(page_file.as_uri())
        assert page.locator("#status").inner_text() == f"1{DASH}{len(rows)} of {len(rows)}"
        assert page.evaluate("window.hacked") is None
        page.fill("#search", "<script>")
        assert page.locator("#table tbody tr").count() == 1
        page.fill("#search", "nowhere to be found")
        assert page.locator("#status").inner_text() == "No prompt matches."
        page.fill("#search", "")
        page.select_option("#filter", "chosen")
        chosen = sum(row[keys.index("selected")] for row in rows)
        assert page.locator("#table tbody tr").count() == chosen == page.locator("tr.chosen").count()
        page.select_option("#filter", "all")
        # By keyboard alone
        page.locator("th button", has_text="success rate").focus()
        page.keyboard.press("Enter")
        head = page.locator("#table th", has_text="success rate")
        assert head.get_attribute("aria-sort") == "descending"
        cells = page.locator(f"#table tbody td:nth-child({keys.index('success_rate') + 1})").all_inner_texts()
        assert [float(cell) for cell in cells] == sorted((float(cell) for cell in cells), reverse=True)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 26)" if scheme == "dark" else "rgb(252, 252, 253)")
        page.goto(big_file.as_uri())
        assert page.locator("#status").inner_text() == f"1{DASH}50 of 20,000"
        # Only a page of the rows is in the document, and sorting all of them is one turn of the event loop
        assert page.locator("#table tbody tr").count() == 50
        page.locator("th button", has_text="index").click()
        page.fill("#search", "1999")
        assert page.locator("#status").inner_text().endswith(" of 12")
        page.fill("#search", "")
        page.locator("#next").click()
        assert page.locator("#status").inner_text() == f"51{DASH}100 of 20,000"
        browser.close()
        assert not faults


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_long_prompts_and_narrow_pages(run, tmp_path):
    """Nothing is cut off at the side, no row is higher than half a page, and every text can be opened."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    step = shutil.copytree(sorted(run.glob("step-*"))[-1], tmp_path / "long")
    texts = pq.read_table(step / "texts.parquet").to_pylist()
    kinds = ["word " * 400, "x" * 2000, "\n".join(map(str, range(300))), "<b>" * 600]
    for number, row in enumerate(texts):
        row["prompt"] = f"{row['index']}: {kinds[number % 4]}"
        row["completion"] = row["completion"] and kinds[number % 4]
    pq.write_table(pa.Table.from_pylist(texts), step / "texts.parquet")
    page_file = write_report(step)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(page_file.as_uri())
        for width in (1200, 800, 400):
            page.set_viewport_size({"width": width, "height": 900})
            spare = "[...document.querySelectorAll('html, .wide')].map(e => e.clientWidth - e.scrollWidth)"
            assert set(page.evaluate(spare)) == {0}
            assert page.evaluate("Math.max(...[...document.querySelectorAll('tr')].map(e => e.offsetHeight))") < 620
        for table in ("#table", ".wide:not(:has(#table)) table >> nth=0"):
            text = page.locator(f"{table} >> details.long").first
            whole = text.locator("div")
            assert not whole.is_visible() and text.locator("summary span").inner_text().endswith("\u2026")
            text.locator("summary").press("Enter")
            assert whole.is_visible() and len(whole.inner_text()) > 1000
        browser.close()


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("1+1=", "1+1="),
        ([{"role": "user", "content": "1+1="}], "1+1="),
        ([{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}], "system: Add.\nuser: 1+1="),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}], "[image] what?"),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([1, 2], "[1, 2]"),
        (None, "None"),
    ],
)
def test_prompts_as_text(prompt, text):
    assert prompt_text(prompt) == text
