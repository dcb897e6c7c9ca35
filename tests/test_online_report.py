"""
What an online run writes: its tables, its page, what a resume reads back, and what the output and the model card say.
"""

import html
import json
import math
import os
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from test_curriculum import DEFAULTS, World
from tiny import make_trainer
from transformers import TrainerCallback

from trl_learnalign import LearnAlignConfig
from trl_learnalign.cli.main import main
from trl_learnalign.curriculum import Group
from trl_learnalign.curriculum.history import COLUMNS
from trl_learnalign.curriculum.report import periods, prompt_columns
from trl_learnalign.report import online_page as online_report
from trl_learnalign.report import online_tables
from trl_learnalign.run.layout import Layout
from trl_learnalign.schedules.base import Run
from trl_learnalign.schedules.online import OnlineSchedule


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
        self.trainer, self.completions = trainer, None
        trainer.add_callback(self)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.completions is None:
            self.completions = dict(self.trainer.learnalign.schedule.curriculum.completions)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 20 steps, its trainer, and its curriculum."""
    path = tmp_path_factory.mktemp("online")
    trainer = trainer_of(path)
    trainer.train()
    return path, trainer, trainer.learnalign.schedule.curriculum


def numbers(path):
    return json.loads((path / "learnalign/online.json").read_text())


def beta_binomial(k, a, b):
    """The chance of k successes of 4, for p ~ Beta(a, b)."""
    up, down = [a + i for i in range(k)], [b + i for i in range(4 - k)]
    return math.comb(4, k) * np.prod([*up, *down], axis=0) / np.prod([a + b + i for i in range(4)], axis=0)


def test_every_prompt_is_in_the_table(run):
    path, _, curriculum = run
    table = pq.read_table(path / "learnalign/online_prompts.parquet").to_pandas()
    assert table["index"].tolist() == list(range(24))
    for column, values in (("visits", curriculum.memory.visits), ("ready_draw", curriculum.memory.ready)):
        np.testing.assert_array_equal(table[column], values)
    a, b = curriculum.posterior(np.arange(24))
    np.testing.assert_allclose(table["predicted_success"], a / (a + b), rtol=1e-6)
    chances = [beta_binomial(k, one, other) for k in range(5) for one, other in [(a, b)]]
    expected = sum(chance * math.sqrt(k / 4 * (1 - k / 4)) for k, chance in enumerate(chances))
    np.testing.assert_allclose(table["utility"], expected * curriculum.alignment.factor(np.arange(24)), rtol=1e-5)
    for row, one in table.iterrows():
        if curriculum.memory.visits[row] == 0:
            expected, own, last = "new", None, None
        else:
            right = row not in WRONG
            streak = curriculum.memory.solved[row] if right else curriculum.memory.failed[row]
            expected = "resting" if streak < 16 else "retired" if right else "parked"
            own, last = float(right), curriculum.memory.last[row]
        assert one["state"] == expected
        assert (None if np.isnan(one["success_rate"]) else one["success_rate"]) == own
        assert (None if np.isnan(one["last_draw"]) else one["last_draw"]) == last
    assert table["last_draw"].max() == 79  # of 80: the last chunk was trained on


def test_a_prompt_is_live_new_resting_retired_or_parked():
    world = World(size=400, chunk=8, mean=0.0)
    world.run(120)
    memory = world.curriculum.memory
    states = prompt_columns(world.curriculum)["state"]
    for row, state in enumerate(states.tolist()):
        solved, failed = memory.solved[row], memory.failed[row]
        match state:
            case "new":
                assert memory.visits[row] == 0
            case "retired" | "parked":
                assert (solved if state == "retired" else failed) >= 16
            case "resting":
                assert max(solved, failed) == 8
            case "live":
                assert solved == failed == 0 < memory.visits[row]
    assert set(states) == {"new", "live", "resting", "retired", "parked"}


def test_every_group_is_in_the_history(run):
    path, trainer, curriculum = run
    table = pq.read_table(path / "learnalign/online_history.parquet").to_pandas()
    history = curriculum.history
    assert tuple(table) == COLUMNS and len(table) == len(history.rows) == 5  # 16 groups each
    np.testing.assert_array_equal(table.astype(float), history.rows)
    assert table["groups"].tolist() == [16, 32, 48, 64, 80]
    assert table["step"].tolist() == [3, 7, 11, 15, 19]  # a group is observed before its step ends
    observed = [entry["rewards/right_but_for_wrong_labels/mean"] for entry in trainer.state.log_history[:-1]]
    assert np.mean(observed) == pytest.approx(table["observed_success"].mean())
    assert numbers(path)["step"] == numbers(path)["max_steps"] == 20
    for name in ("calibration", "by_visit", "revisits"):
        np.testing.assert_array_equal(numbers(path)[name], getattr(history, name))


def test_a_row_that_is_not_full_is_in_the_history(tmp_path):
    trainer_of(tmp_path, max_steps=5, save_strategy="no").train()
    table = pq.read_table(tmp_path / "learnalign/online_history.parquet").to_pandas()
    assert table["groups"].tolist() == [16, 20] and table["step"].tolist() == [3, 4]


def test_suspects_have_their_texts(run):
    path, _, curriculum = run
    found = pq.read_table(path / "learnalign/suspects.parquet").to_pylist()
    assert sorted(one["index"] for one in found) == sorted(WRONG)
    chances = dict(zip(*(values.tolist() for values in curriculum.suspects()), strict=True))
    for one in found:
        assert one["prompt"] == rows()[one["index"]]["prompt"] and one["answer"] == rows()[one["index"]]["answer"]
        assert one["label"] == "1.5" and one["visits"] == curriculum.memory.visits[one["index"]]
        assert one["chance"] == chances[one["index"]] < DEFAULTS.suspicion
        assert one["completion"] == curriculum.completions[one["index"]]


def test_revisits_are_those_of_a_loop():
    world = World(size=64, chunk=8, mean=0.0, spread=6.0)
    expected, streaks = np.zeros((2, 2)), np.zeros((2, 64), int)
    world.draw()
    for _ in range(150):
        world.draw()
        rows = np.array([draw.row for draw in world.queue[0]])
        rewards = world.rewards(rows)
        world.finish(rewards)
        for row, own in zip(rows.tolist(), rewards[:, :, 0].sum(1), strict=True):
            for kind, same in enumerate((own == world.group, own == 0)):
                if streaks[kind, row] >= DEFAULTS.retired_after * DEFAULTS.doubling:
                    expected[kind] += [1, not same]
                streaks[kind, row] = streaks[kind, row] + 8 if same else 0
    np.testing.assert_array_equal(world.curriculum.history.revisits, expected)
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
    path, trainer, curriculum = run
    trainer.create_model_card()
    card = (path / "README.md").read_text(encoding="utf-8")
    assert "chosen online with trl-learnalign" in card and "li2025learnalign" in card
    visited = np.count_nonzero(curriculum.memory.visits)
    assert f"{visited} of 24 prompts were trained on, in 80 groups of 4 rollouts." in card
    assert f"Prompts were chosen for {curriculum.history.choosing_share:.0%} of the groups" in card
    live = curriculum.history.column("live_fraction").mean()
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
    curriculum = resumed.learnalign.schedule.curriculum
    assert known.completions == {} and set(curriculum.completions) <= set(WRONG)
    (path / "learnalign/suspects.parquet").write_bytes(b"damaged")
    assert online_tables.read_completions(path / "learnalign", 24) == {}


def test_completions_of_prompts_that_were_solved_make_room():
    curriculum = World().curriculum
    curriculum.memory.surprise[[3, 5]] = 10.0
    curriculum.remember({3: "a", 5: "b"})
    curriculum.memory.surprise[3] = 0.0
    curriculum.remember({})
    assert curriculum.completions == {5: "b"}


def test_a_page_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("trl_learnalign.report.online_tables.write_parquet", lambda *args: 1 / 0)
    trainer = trainer_of(tmp_path, max_steps=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert "The report of the schedule could not be written (ZeroDivisionError" in caplog.text


def test_one_report_per_step_and_none_where_it_is_off(tmp_path, monkeypatch):
    steps, logged = [], []

    def write(schedule, host, directory, log):
        steps.append(host.trainer.state.global_step)
        logged.append(log)

    monkeypatch.setattr("trl_learnalign.report.online_page.write_online_report", write)
    trainer = trainer_of(tmp_path / "on", max_steps=4, save_steps=2)
    assert trainer.learnalign.schedule.metrics() == {} and trainer.learnalign.report() is None  # before it begins
    with pytest.raises(RuntimeError, match="no curriculum yet"):
        trainer.learnalign.schedule.state_dict()
    trainer.train()
    assert steps == [2, 4]  # the last is of a checkpoint and of the end
    trainer.learnalign.report()
    assert steps.pop() == 4 and logged == [False, True, False]  # figures go to the trackers once
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
    state = SimpleNamespace(global_step=step)
    control = SimpleNamespace(should_training_stop=False)
    trainer = SimpleNamespace(model=model, state=state, control=control)
    accelerator = SimpleNamespace(num_processes=1)
    return SimpleNamespace(trainer=trainer, dataset=dataset, accelerator=accelerator, max_steps=100)


def schedule_of(world):
    """A schedule around the curriculum of a simulated world."""
    size = len(world.logits)
    config = LearnAlignConfig(schedule="online", prompt_features=False)
    schedule = OnlineSchedule(Run(size, world.chunk, world.group, 0, config, None))
    schedule.curriculum, schedule.pool = world.curriculum, world.curriculum.pool
    schedule.layout = Layout(
        pool_size=size,
        num_prompts=size,
        group_size=world.group,
        chunk_prompts=world.chunk,
        repeats=1,
        accumulation=1,
        warmup_prompts=0,
        read_ahead=1,
        epochs=1.0,
        shuffle=True,
        seed=0,
    )
    return schedule


def test_of_a_large_pool_a_few_texts_are_read(tmp_path, monkeypatch):
    size, read = 50_000, []
    world = World(size=size, mean=0.0)
    world.run(30)
    monkeypatch.setattr(
        "trl_learnalign.selection.excerpt.prompt_text", lambda prompt: read.append(prompt) or prompt, raising=True
    )
    dataset = Dataset.from_dict({"prompt": [f"prompt {row} " + "x" * 5000 for row in range(50)]})
    dataset = dataset.select([row % 50 for row in range(size)])
    online_report.write_online_report(schedule_of(world), in_place_of_a_trainer(world, dataset), tmp_path)
    samples = numbers_of(tmp_path)["samples"].values()
    typical = 3 * len(world.curriculum.kinds)
    assert len(read) == len(world.curriculum.suspects()[0]) + sum(map(len, samples)) + typical
    assert all(len(part) <= online_tables.SAMPLES for part in samples)
    assert pq.read_metadata(tmp_path / "online_prompts.parquet").num_rows == size
    assert (tmp_path / "online.json").stat().st_size < 150_000
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert {file.name for file in tmp_path.iterdir()} == {
        "online_prompts.parquet",
        "online_history.parquet",
        "suspects.parquet",
        "noise.parquet",
        "online.json",
        "report.html",
    }


def numbers_of(directory):
    return json.loads((directory / "online.json").read_text())


def test_when_and_why_draws_were_uniform(tmp_path):
    world, switches = World(), []
    draw, judge = world.draw, world.curriculum.judge

    def noted():
        before, number = judge.choosing, world.curriculum.drawn
        rows = draw()
        switches.extend([number] * (judge.choosing != before))
        return rows

    world.draw = noted
    world.run(60)
    world.logits = np.zeros(2000)  # from now on everything is live
    world.run(300)
    history = world.curriculum.history
    found = periods(history, DEFAULTS, DEFAULTS.tried)
    assert len(switches) >= 2 and [one["first"] for one in found] == [0, *switches]
    assert [one["last"] + 1 for one in found] == [*switches, history.observed]
    assert [one["choosing"] for one in found] == [n % 2 == 1 for n in range(len(found))]
    choosing, groups = history.column("choosing") > 0, history.column("groups")
    for one in found:
        part = choosing[(groups > one["first"]) & (groups <= one["last"] + 1)]
        assert len(part) and (part == one["choosing"]).all()
    assert "at the start" in found[0]["why"] and found[1]["why"] is None
    assert "needed: a headroom of 1.1" in found[2]["why"]
    # An environment makes the prompts
    dataset = Dataset.from_dict({"question": [f"row {row}" for row in range(2000)]})
    online_report.write_online_report(schedule_of(world), in_place_of_a_trainer(world, dataset), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert html.escape(found[2]["why"]) in page and "question: row" in page


def test_without_skill_it_says_so():
    world = World(informed=False, noise=4.0, spread=0.0)
    world.run(60)
    last = periods(world.curriculum.history, DEFAULTS, DEFAULTS.tried)[-1]
    assert not last["choosing"] and world.curriculum.judge.skill <= DEFAULTS.begin_skill
    assert "hardly better than the mean" in last["why"]
    young = World()
    assert young.curriculum.report()["run"]["periods"] == []  # before any group
    young.run(1)
    (only,) = periods(young.curriculum.history, DEFAULTS, DEFAULTS.tried)
    assert only["why"] == f"the prediction is judged after {DEFAULTS.tried} uniform draws"


def test_lines_where_choosing_begins_and_ends(capsys):
    world = World()
    schedule, curriculum = schedule_of(world), world.curriculum
    schedule.host = SimpleNamespace(accelerator=SimpleNamespace(is_main_process=True))
    switches, before = [], False
    for chunk in range(360):
        if chunk == 60:
            world.logits = np.zeros(2000)
        first, rows = curriculum.drawn, np.array(schedule.choose(world.chunk))
        if curriculum.judge.choosing != before:
            switches, before = [*switches, first], not before
        groups = zip(range(first, curriculum.drawn), rows.tolist(), world.rewards(rows), strict=True)
        curriculum.observe([Group(*group) for group in groups])
        schedule.tick(1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "from now on" in line]
    numbers = [int(line.split()[2].replace(",", "")) for line in lines]
    assert numbers == switches and len(lines) >= 2
    assert all(line.startswith("LearnAlign, after ") and " prompts: from now on " in line for line in lines)
    assert "prompts are chosen by predicted learnability: their expected utility is " in lines[0]
    assert "(skill 0." in lines[0] and "draws are uniform" in lines[1]
    assert f"for {DEFAULTS.patience} prompts" in lines[1]


def test_moving_means_are_those_of_a_loop():
    from trl_learnalign.report.online_figures import _moving, _success

    values = np.random.default_rng(0).random(50)
    values[[0, 3, *range(20, 30)]] = np.nan
    for window in (1, 4, 100):
        expected = []
        for end in range(50):
            part = values[max(0, end + 1 - window) : end + 1]
            part = part[np.isfinite(part)]
            expected.append(part.mean() if len(part) else np.nan)
        np.testing.assert_allclose(_moving(values, window), expected)
    # Rows count as the groups that they have: the last is being filled
    columns = {"groups": np.array([16.0, 32, 33]), "choosing": np.zeros(3), "pool_success": np.full(3, 0.5)}
    columns |= {"observed_success": np.array([0.25, 0.25, 1.0]), "predicted_success": np.array([0.5, 0.5, 0.0])}
    assert f"{9 / 33:.2f} was observed, {16 / 33:.2f} predicted" in _success(columns, {"graded": False}).words


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
