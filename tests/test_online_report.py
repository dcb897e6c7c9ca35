"""
What an online run writes: its tables, its page, what a resume reads back, and what the output and the model card say.
"""

import html
import json
import os
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from test_online import World
from tiny import make_trainer
from transformers import TrainerCallback

from trl_learnalign import LearnAlignConfig
from trl_learnalign.cli.main import main
from trl_learnalign.curriculum import judge, memory
from trl_learnalign.curriculum.history import COLUMNS
from trl_learnalign.report import online_page as online_report
from trl_learnalign.report import online_tables


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=window.hacked=1>{{data}}"
WRONG = (4, 11)  # rows whose answer no completion agrees with


def rows(num=24):
    prompts = [f"{i % 10}+{i // 10}={HOSTILE}" for i in range(num)]
    answers = [f"{i}<script>window.hacked = 1</script>" for i in range(num)]
    return Dataset.from_dict({"prompt": prompts, "row": list(range(num)), "answer": answers, "label": [1.5] * num})


def right_but_for_wrong_labels(completions, row, **kwargs):
    return [float(one not in WRONG) for one in row]


def trainer_of(path, reward=right_but_for_wrong_labels, write_report=True, **changes):
    settings = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10, "logging_steps": 5}
    config = LearnAlignConfig(schedule="online", prompt_features=False, write_report=write_report)
    return make_trainer(path, config, reward=reward, dataset=rows(), **(settings | changes))


class Known(TrainerCallback):
    """The completions that the schedule knows before the first step of a process."""

    def __init__(self, trainer):
        self.schedule, self.completions = trainer.learnalign.schedule, None
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.completions is None:
            self.completions = dict(self.schedule.completions)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 steps, and its trainer."""
    path = tmp_path_factory.mktemp("online")
    trainer = trainer_of(path)
    trainer.train()
    return path, trainer, trainer.learnalign.schedule


def numbers(path):
    return json.loads((path / "learnalign/online.json").read_text())


def test_every_prompt_is_in_the_table(run):
    path, _, schedule = run
    table = pq.read_table(path / "learnalign/online_prompts.parquet").to_pandas()
    assert table["index"].tolist() == list(range(24))
    for column, values in (("visits", schedule.memory.visits), ("ready_chunk", schedule.memory.ready)):
        np.testing.assert_array_equal(table[column], values)
    a, b = schedule.posterior(np.arange(24), schedule.observed)
    np.testing.assert_allclose(table["predicted_success"], a / (a + b), rtol=1e-6)
    np.testing.assert_allclose(table["utility"], a * b / ((a + b) * (a + b + 1)), rtol=1e-6)
    for row, one in table.iterrows():
        if schedule.memory.visits[row] == 0:
            expected, own, last = "new", None, None
        else:
            right = row not in WRONG
            streak = schedule.memory.solved[row] if right else schedule.memory.failed[row]
            expected = "resting" if streak < 16 else "retired" if right else "parked"
            own, last = float(right), schedule.memory.last[row]
        assert one["state"] == expected
        assert (None if np.isnan(one["success_rate"]) else one["success_rate"]) == own
        assert (None if np.isnan(one["last_chunk"]) else one["last_chunk"]) == last


def test_a_prompt_is_live_new_resting_retired_or_parked():
    world = World(size=400, chunk=8, mean=0.0)
    world.run(120)
    schedule = world.schedule
    states = schedule.prompt_columns()["state"]
    for row, state in enumerate(states.tolist()):
        solved, failed = schedule.memory.solved[row], schedule.memory.failed[row]
        match state:
            case "new":
                assert schedule.memory.visits[row] == 0
            case "retired" | "parked":
                assert (solved if state == "retired" else failed) >= 16
            case "resting":
                assert max(solved, failed) == 8
            case "live":
                assert solved == failed == 0 < schedule.memory.visits[row]
    assert set(states) == {"new", "live", "resting", "retired", "parked"}


def test_every_chunk_is_in_the_history(run):
    path, _, schedule = run
    table = pq.read_table(path / "learnalign/online_history.parquet").to_pandas()
    assert tuple(table) == COLUMNS and len(table) == len(schedule.history.chunks) == 20
    np.testing.assert_array_equal(table.astype(float), schedule.history.chunks)
    assert numbers(path)["step"] == numbers(path)["max_steps"] == 20
    for name in ("calibration", "by_visit", "revisits"):
        np.testing.assert_array_equal(numbers(path)[name], getattr(schedule.history, name))


def test_suspects_have_their_texts(run):
    path, _, schedule = run
    found = pq.read_table(path / "learnalign/suspects.parquet").to_pylist()
    assert sorted(one["index"] for one in found) == sorted(WRONG)
    chances = dict(zip(*(values.tolist() for values in schedule.memory.suspects()), strict=True))
    for one in found:
        assert one["prompt"] == rows()[one["index"]]["prompt"] and one["answer"] == rows()[one["index"]]["answer"]
        assert one["label"] == "1.5" and one["visits"] == schedule.memory.visits[one["index"]]
        assert one["chance"] == chances[one["index"]] < memory.SUSPICION
        assert one["completion"] == schedule.completions[one["index"]]


def test_revisits_are_those_of_a_loop():
    world = World(size=64, chunk=8, mean=0.0, spread=6.0)
    schedule, expected = world.schedule, np.zeros((2, 2))
    streaks = np.zeros((2, 64), int)
    drawn = [np.array(schedule.prompts(0))]
    for chunk in range(150):
        drawn.append(np.array(schedule.prompts(chunk + 1)))
        rewards = world.rewards(drawn[chunk])
        schedule.observe(chunk, rewards)
        for row, own in zip(drawn[chunk].tolist(), rewards[:, :, 0].sum(1), strict=True):
            for kind, same in enumerate((own == rewards.shape[1], own == 0)):
                if streaks[kind, row] >= memory.RETIRED_AFTER:
                    expected[kind] += [1, not same]
                streaks[kind, row] = streaks[kind, row] + 1 if same else 0
    np.testing.assert_array_equal(schedule.history.revisits, expected)
    assert (expected > 0).all()


def test_the_page_needs_nothing_and_no_markup_of_a_row_survives(run):
    path, _, _ = run
    page = (path / "learnalign/report.html").read_text(encoding="utf-8")
    assert "step 20 of 20" in page and "does not refresh by itself" in page
    for row in WRONG:
        assert html.escape(rows()[row]["prompt"]) in page and html.escape(rows()[row]["answer"]) in page
    assert "{{data}}" in page  # of a prompt: a template would have replaced it

    class Tags(HTMLParser):
        found = ()

        def handle_starttag(self, tag, attributes):
            self.found += ((tag, dict(attributes)),)

    parser = Tags()
    parser.feed(page)
    tags = [tag for tag, _ in parser.found]
    assert tags.count("img") == 8 and not {"script", "link", "iframe"} & set(tags)
    for tag, attributes in parser.found:
        for name in ("src", "srcset", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
        assert tag != "img" or len(attributes["alt"]) > 20


def test_the_command_writes_the_page_again(run, tmp_path, capsys):
    path = shutil.copytree(run[0], tmp_path / "copy")
    page = path / "learnalign/report.html"
    before = page.read_bytes()
    page.unlink()
    main(["report", str(path)])
    assert capsys.readouterr().out.strip() == str(page) and page.read_bytes() == before
    assert online_report.rewrite_online_report(path / "learnalign") == page
    # A selection that was made later has the page
    selection = path / "learnalign/step-000000/selection.json"
    selection.parent.mkdir()
    selection.touch()
    os.utime(selection, (2e9, 2e9))
    assert online_report.rewrite_online_report(path) is None
    os.utime(selection, (1e9, 1e9))
    (path / "learnalign/online_history.parquet").unlink()
    with pytest.raises(ValueError, match="files of the online run in"):
        online_report.rewrite_online_report(path)


def test_the_model_card_says_what_was_done(run):
    path, trainer, schedule = run
    trainer.create_model_card()
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "chosen online with trl-learnalign" in card and "li2025learnalign" in card
    assert (
        f"{np.count_nonzero(schedule.memory.visits)} of 24 prompts were trained on, in 20 chunks of 4 prompts" in card
    )
    live = schedule.history.column("live_fraction").mean()
    assert f"{live:.0%} of the groups were live" in card or "of their groups were live" in card


def test_completions_of_suspects_survive_a_resume(run, tmp_path):
    path = shutil.copytree(run[0], tmp_path / "copy")
    written = pq.read_table(path / "learnalign/suspects.parquet")
    first = dict(zip(*(written[name].to_pylist() for name in ("index", "completion")), strict=True))
    resumed = trainer_of(path, write_report=False)
    known = Known(resumed)
    resumed.train(resume_from_checkpoint=str(path / "checkpoint-10"))
    assert known.completions == first and len(first) == 2
    # Without the file they are asked for again
    (path / "learnalign/suspects.parquet").unlink()
    resumed = trainer_of(path, write_report=False)
    known = Known(resumed)
    resumed.train(resume_from_checkpoint=str(path / "checkpoint-10"))
    schedule = resumed.learnalign.schedule
    assert known.completions == {} and set(schedule.completions) <= set(WRONG)
    (path / "learnalign/suspects.parquet").write_bytes(b"damaged")
    assert online_tables.read_completions(path / "learnalign", 24) == {}


def test_completions_of_prompts_that_were_solved_make_room():
    schedule = World().schedule
    schedule.memory.surprise[[3, 5]] = 10.0
    schedule.remember({3: "a", 5: "b"})
    schedule.memory.surprise[3] = 0.0
    schedule.remember({})
    assert schedule.completions == {5: "b"}


def test_a_page_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_learnalign.report.online_tables.write_parquet", lambda *args: 1 / 0)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert "The report of the schedule could not be written (ZeroDivisionError" in caplog.text


def test_one_report_per_step_and_none_where_it_is_off(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "trl_learnalign.report.online_page.write_online_report",
        lambda schedule, host, directory: steps.append(host.trainer.state.global_step),
    )
    trainer_of(tmp_path / "on", max_steps=4, save_steps=2).train()
    assert steps == [2, 4]  # the last is of a checkpoint and of the end
    trainer_of(tmp_path / "off", write_report=False, max_steps=4, save_steps=2).train()
    assert steps == [2, 4]
    trainer_of(tmp_path / "unsaved", max_steps=3, save_strategy="no").train()
    assert steps == [2, 4, 3]


def test_figures_reach_tensorboard_at_the_end(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer_of(tmp_path, max_steps=4, save_steps=2, report_to="tensorboard").train()
    images = {}
    for folder in {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        images |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
    assert len(images) == 8 and all(name.startswith("learnalign/figures/online_") for name in images)
    assert all([image.step for image in found] == [4] for found in images.values())


# Without a trainer -------------------------------------------------------------------------------------------------


def in_place_of_a_trainer(world, dataset, step=30):
    """What the report reads of a trainer."""
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="policy", model_type="x"))
    state = SimpleNamespace(global_step=step, max_steps=100)
    control = SimpleNamespace(should_training_stop=False)
    trainer = SimpleNamespace(model=model, state=state, control=control)
    return SimpleNamespace(trainer=trainer, dataset=dataset, accelerator=SimpleNamespace(num_processes=1))


def test_of_a_large_pool_a_few_texts_are_read(tmp_path, monkeypatch):
    size, read = 50_000, []
    world = World(size=size, mean=0.0)
    world.run(30)
    monkeypatch.setattr(
        "trl_learnalign.report.online_tables.prompt_text", lambda prompt: read.append(prompt) or prompt, raising=True
    )
    dataset = Dataset.from_dict({"prompt": [f"prompt {row} " + "x" * 5000 for row in range(50)]})
    dataset = dataset.select([row % 50 for row in range(size)])
    online_report.write_online_report(world.schedule, in_place_of_a_trainer(world, dataset), tmp_path)
    assert len(read) == len(world.schedule.memory.suspects()[0]) + sum(
        len(part) for part in numbers_of(tmp_path)["samples"].values()
    )
    assert all(len(part) <= online_tables.SAMPLES for part in numbers_of(tmp_path)["samples"].values())
    assert pq.read_metadata(tmp_path / "online_prompts.parquet").num_rows == size
    assert (tmp_path / "online.json").stat().st_size < 150_000
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert {file.name for file in tmp_path.iterdir()} == {
        "online_prompts.parquet",
        "online_history.parquet",
        "suspects.parquet",
        "online.json",
        "report.html",
    }


def numbers_of(directory):
    return json.loads((directory / "online.json").read_text())


def test_when_and_why_draws_were_uniform(tmp_path):
    world = World()
    world.run(60)
    world.logits = np.zeros(2000)  # from now on everything is live
    world.run(300, first=60)
    schedule = world.schedule
    periods = schedule.periods()
    choosing = schedule.history.column("choosing") > 0
    assert [one["first"] for one in periods] == [0, *(np.flatnonzero(np.diff(choosing)) + 1)]
    assert [one["choosing"] for one in periods] == [n % 2 == 1 for n in range(len(periods))]
    for one in periods:
        part = choosing[one["first"] : one["last"] + 1]
        assert (part == one["choosing"]).all()
    assert "at the start" in periods[0]["why"] and periods[1]["why"] is None
    assert "needed: a headroom of 1.1" in periods[2]["why"]
    dataset = Dataset.from_dict(
        {"question": [f"row {row}" for row in range(2000)]}
    )  # an environment makes the prompts
    online_report.write_online_report(schedule, in_place_of_a_trainer(world, dataset), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert html.escape(periods[2]["why"]) in page and "question: row" in page


def test_without_skill_it_says_so():
    world = World(informed=False, noise=4.0, spread=0.0)
    world.run(60)
    last = world.schedule.periods()[-1]
    assert not last["choosing"] and world.schedule.judge.skill <= judge.BEGIN_SKILL
    assert "hardly better than the mean" in last["why"]
    young = World()
    young.run(1)
    assert young.schedule.periods()[0]["why"] == f"the prediction is judged after {judge.TRIED} uniform draws"


def test_lines_where_choosing_begins_and_ends(capsys):
    world = World()
    world.schedule.host.accelerator.is_main_process = True
    world.run(60)
    world.logits = np.zeros(2000)
    world.run(300, first=60)
    lines = [line for line in capsys.readouterr().out.splitlines() if "from now on" in line]
    choosing = world.schedule.history.column("choosing")
    switches = [int(chunk) + 1 for chunk in np.flatnonzero(np.diff(choosing))]
    assert [int(line.split()[2].rstrip(":")) for line in lines] == switches and len(lines) >= 2
    assert (
        "prompts are chosen by predicted learnability: their rewards should have " in lines[0]
        and "(skill 0." in lines[0]
    )
    assert "draws are uniform" in lines[1]


def test_moving_means_are_those_of_a_loop():
    from trl_learnalign.report.online_figures import _moving

    values = np.random.default_rng(0).random(50)
    values[[0, 3, *range(20, 30)]] = np.nan
    for window in (1, 4, 100):
        expected = []
        for end in range(50):
            part = values[max(0, end + 1 - window) : end + 1]
            part = part[np.isfinite(part)]
            expected.append(part.mean() if len(part) else np.nan)
        np.testing.assert_allclose(_moving(values, window), expected)


# In a browser ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(run, scheme):
    """Nothing is fetched or cut off at the side, on wide and on narrow pages."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(color_scheme=scheme, offline=True).new_page()
        faults = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: faults.append(request.url) if request.url.startswith("http") else None)
        page.goto((run[0] / "learnalign/report.html").as_uri())
        for width in (1280, 800, 400):
            page.set_viewport_size({"width": width, "height": 900})
            spare = "[...document.querySelectorAll('html, .wide')].map(e => e.clientWidth - e.scrollWidth)"
            assert set(page.evaluate(spare)) == {0}, width
        assert page.evaluate("window.hacked") is None
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 500)")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(20, 23, 26)" if scheme == "dark" else "rgb(252, 252, 253)")
        browser.close()
        assert not faults
