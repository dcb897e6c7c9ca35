"""What a run says of its selections: values and tables in the trackers, model cards, bars, one line."""

import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from tiny import EAGER, config, make_trainer, online, parity_reward
from transformers import TrainerCallback

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, LearnAlignSampler, Selection, select_prompts
from trl_learnalign.ground import store
from trl_learnalign.ground.progress import ProgressLines, duration
from trl_learnalign.schedules import OnlineSchedule


def test_values_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "logs")
    try:
        settings = {"report_to": "tensorboard", "num_train_epochs": 3}
        trainer = make_trainer(tmp_path, config(write_report=True), **settings)
        trainer.train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    tags, images = {}, {}
    for path in {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(path))
        events.Reload()
        tags |= {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
        images |= {tag: events.Images(tag) for tag in events.Tags()["images"]}
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    value = next(event for tag, event in tags.items() if tag.endswith("learnalign/success_rate_pool"))
    assert value.step == 2 and value.value == pytest.approx(selection.mean_success_rates()[0])
    names = {tag.partition("learnalign/")[2] for tag in tags if "learnalign/" in tag}
    assert {f"seconds_{phase}" for phase in ("rollouts", "gradients", "scores")} < names
    assert {"learnable_fraction", "alignment_pool", "alignment_selected", "stage"} < names
    # TRL's own share of groups without a gradient: step 1 before the selection; step 2, at which it was made, before
    # it too, but logged after it; step 3 has the batch that was read ahead; step 4 is the first of the selection,
    # which the log of step 5 is the first to know
    shares = {e["step"]: e["frac_reward_zero_std"] for e in trainer.state.log_history if "frac_reward_zero_std" in e}
    for when, step, share in (("before", 2, shares[1]), ("after", 5, shares[4])):
        event = next(event for tag, event in tags.items() if tag.endswith(f"zero_variance_{when}"))
        assert event.step == step and event.value == pytest.approx(share)
    # The figures of the report, pixel by pixel
    drawn = {f"learnalign/figures/{file.stem}": file for file in (tmp_path / "learnalign/figures").iterdir()}
    assert len(drawn) == 4 and images.keys() == drawn.keys()
    for tag, file in drawn.items():
        (event,) = images[tag]
        shown, expected = (
            Image.open(source).convert("RGB") for source in (io.BytesIO(event.encoded_image_string), file)
        )
        assert event.step == 2 and shown.size == expected.size and shown.tobytes() == expected.tobytes()


def test_figures_that_cannot_be_drawn_are_no_reason_to_end_a_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    monkeypatch.setattr("trl_learnalign.selection.figures.drawings", lambda *args: 1 / 0)
    trainer = make_trainer(tmp_path, config(write_report=True), report_to="tensorboard")
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert "The table of scores and the figures could not be logged (ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"logging_steps": 2}, {"num_iterations": 2}])
def test_zero_variance_is_that_of_selected_prompts(tmp_path, changes):
    """
    Of chunks before the selection takes effect, the one read ahead with them, no group has a gradient; of the others,
    some have.
    """
    shares = []

    def dull_at_first(completions, **kwargs):
        rewards = parity_reward(completions)
        if trainer.num_generations == 4:  # not in a selection
            rewards = [0.0] * 16 if len(shares) < 3 else rewards
            shares.append(sum(len({*rewards[i : i + 4]}) == 1 for i in range(0, 16, 4)) / 4)
        return rewards

    settings = {"warmup_prompts": 8, "num_prompts": 8}
    trainer = make_trainer(tmp_path, config(**settings), reward=dull_at_first, num_train_epochs=4, **changes)
    trainer.train()
    start = trainer.learnalign.schedule.log[-1].start_chunk
    assert start == 3 and shares[:3] == [1.0] * 3 and max(shares[3:]) < 1
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    known, since = [], 0
    for entry in logged:
        expected = sum(known) / len(known) if known else None
        assert entry.get("learnalign/zero_variance_after") == (
            expected if expected is None else pytest.approx(expected)
        )
        steps = range(since, entry["step"])
        chunks = [step // trainer.num_iterations for step in steps if step % trainer.num_iterations == 0]
        if chunks and chunks[0] >= start:
            known.append(sum(shares[chunk] for chunk in chunks) / len(chunks))
        since = entry["step"]
    assert known


@pytest.mark.parametrize("backend", ["wandb", "trackio"])
def test_table_of_scores_reaches(tmp_path, backend):
    """Offline, with the tracker itself; what it has kept is read back from its files. The figures come with it."""
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    settings = f"config(write_report=True), report_to={backend!r}, num_train_epochs=2"
    run = f"make_trainer({str(tmp_path)!r}, {settings}).train()"
    places = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}
    command = [sys.executable, "-c", f"from tiny import config, make_trainer\n{run}"]
    # A process of its own, since trackio reads its directory when it is imported
    subprocess.run(command, cwd=Path(__file__).parent, env=os.environ | places, check=True, timeout=300)
    tables = {"wandb": _wandb_tables, "trackio": _trackio_tables}[backend](tmp_path)
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    expected = selection.to_pandas().reset_index()
    assert len(tables) == 1 and [row["index"] for row in tables[0]] == expected["index"].tolist()
    assert [row["score"] for row in tables[0]] == pytest.approx(expected["score"].tolist())
    report = sorted(_pixels(file) for file in (tmp_path / "learnalign/figures").iterdir())
    media = [file for file in tmp_path.rglob("*.png") if tmp_path / "learnalign" not in file.parents]
    assert len(report) == 4 and sorted(map(_pixels, media)) == report


def _pixels(file):
    image = Image.open(file).convert("RGB")
    return image.size, image.tobytes()


def _wandb_tables(path):
    tables = [json.loads(file.read_text()) for file in path.rglob("learnalign/scores*.table.json")]
    return [[dict(zip(table["columns"], row, strict=True)) for row in table["data"]] for table in tables]


def _trackio_tables(path):
    import sqlite3

    found = []
    for file in path.rglob("*.db"):
        with sqlite3.connect(file) as database:
            rows = [json.loads(metrics) for (metrics,) in database.execute("SELECT metrics FROM metrics")]
        found += [row["learnalign/scores"]["_value"] for row in rows if "learnalign/scores" in row]
    return found


@pytest.mark.parametrize(("terminal", "disabled"), [(True, False), (True, True), (False, False)])
def test_bars_are_for_terminals(tmp_path, terminal, disabled, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    select_prompts(make_trainer(tmp_path, disable_tqdm=disabled), config())
    for phase in ("rollouts", "gradients", "scores"):
        assert (f"LearnAlign {phase}" in stream.getvalue()) == (terminal and not disabled)


class Clock:
    """Seconds that pass as told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("total", "seconds"), [(1000, 1), (1000, 7), (60, 60), (7473, 0.5), (3, 10_000), (1, 99)])
def test_lines_where_no_bar_can_be(total, seconds, capsys):
    """Seldom enough and, unless the phase is short, often enough; with what is done and what is left."""
    clock = Clock()
    lines = ProgressLines("LearnAlign rollouts", total, "prompts", clock)
    said, texts = [], []
    for done in range(1, total + 1):
        clock.now += seconds
        lines.update()
        if text := capsys.readouterr().out:
            said.append(done)
            texts.append(text)
    for done, text in zip(said, texts, strict=True):
        left = duration((total - done) * seconds)
        assert text == f"LearnAlign rollouts: {done:,} of {total:,} prompts ({done / total:.0%}), {left} left\n"
    most = max(0.05 * total, 30 / seconds)
    gaps = [b - a for a, b in zip(said, [*said[1:], total], strict=False)]
    assert len(said) <= 20 and all(gap <= most + 1 for gap in gaps)
    assert all(gap >= most for gap in gaps[:-1])
    assert said[:1] == [max(1, math.ceil(30 / seconds))] * (total > 30 / seconds and total > 1)


def test_time_left_after_finished_parts_is_that_of_what_is_new(capsys):
    clock = Clock()
    lines = ProgressLines("x", 1000, "prompts", clock)
    lines.update(400)  # at once
    clock.now += 40
    lines.update(100)
    capsys.readouterr()
    clock.now += 100
    lines.update(100)
    assert capsys.readouterr().out == "x: 600 of 1,000 prompts (60%), 400 s left\n".replace("400 s", duration(400))


def test_durations():
    assert [duration(s) for s in (0.4, 45, 89.9, 90, 3000, 5400, 36000)] == [
        *("0 s", "45 s", "90 s", "2 min", "50 min", "1.5 h", "10.0 h")
    ]


@pytest.mark.parametrize(("terminal", "disabled"), [(True, False), (True, True), (False, False)])
def test_lines_take_the_place_of_bars_that_are_not_shown(tmp_path, terminal, disabled, monkeypatch, capsys):
    """Every look at the clock is half a minute later."""
    stream, clock = io.StringIO(), itertools.count(0, 30)
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(ProgressLines.__init__, "__defaults__", (lambda: float(next(clock)),))
    trainer = make_trainer(tmp_path, disable_tqdm=disabled)
    select_prompts(trainer, config(max_tokens_per_batch=100))
    text = capsys.readouterr().out
    for phase, unit in (("rollouts", "prompts"), ("gradients", "batches")):
        count = len(re.findall(rf"^LearnAlign {phase}: \d+ of \d+ {unit} \(\d+%\), \d+ (s|min) left$", text, re.M))
        assert (0 if terminal and not disabled else 1) <= count <= (0 if terminal and not disabled else 20)


def test_model_card(tmp_path):
    trainer = make_trainer(tmp_path, config(), num_train_epochs=2)
    trainer.train()
    trainer.create_model_card(model_name="mine", dataset_name="rows")
    card = (tmp_path / "README.md").read_text()
    header = card.split("---")[1]
    assert "- learnalign" in header and "- grpo" in header
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    assert f"- {selection.summary()}" in card and "arXiv:2506.11480" in card
    trainer.save_model(str(tmp_path / "saved"))  # PEFT's own card
    header = (tmp_path / "saved/README.md").read_text().split("---")[1]
    assert "- learnalign" in header and "- grpo" in header and "- lora" in header
    plain = make_trainer(tmp_path / "plain", config())
    plain.create_model_card()  # before anything was selected
    assert "## Prompts" not in (tmp_path / "plain/README.md").read_text()


def test_what_is_pushed_with_a_checkpoint(tmp_path, monkeypatch, caplog):
    """All of Trainer's own pushing; only the calls of the Hub's client copy the files to another folder instead."""
    hub = tmp_path / "hub"

    class Client:
        def create_repo(self, name, **kwargs):
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, folder_path, ignore_patterns=None, path_in_repo="", **kwargs):
            names = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*") if file.is_file()]
            for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
                target = hub / path_in_repo / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(folder_path) / name, target)
            done = Future()
            done.set_result(None)
            return done

    monkeypatch.setattr("transformers.trainer.hf_api", Client)
    run = make_trainer(
        tmp_path / "run",
        config(write_report=True, save_rollouts=True, after_warmup="restart"),
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
    )
    pushed = []
    run.add_callback(Noted(pushed, hub))
    run.train()
    assert pushed[0] == [] and pushed[-1] == ["learnalign/step-000002"]  # at the save of step 2 it is not yet made
    step = hub / "learnalign/step-000002"
    assert Selection.load(step).indices == Selection.load(tmp_path / "run/learnalign/step-000002").indices
    assert (hub / "learnalign/report.html").is_file() and not list(hub.rglob("*.log"))
    assert (hub / "adapter_model.safetensors").is_file()
    # Neither completions nor first weights, which stay here
    assert not [*hub.rglob("rollouts*"), *hub.rglob("initial*")]
    scratch = tmp_path / "run/_learnalign"
    assert (scratch / "rollouts/step-000002/rollouts.parquet").stat().st_size > 1000
    assert (scratch / "initial.safetensors").stat().st_size > 1000
    (warning,) = [record.getMessage() for record in caplog.records if "`push_to_hub=True` uploads" in record.message]
    assert "report.html, step-*/texts.parquet, in `learnalign/`, go to 'someone/run', which will be public" in warning
    assert "the Hub could not be asked" in warning and "set `hub_private_repo=True`;" in warning


@pytest.mark.parametrize(
    ("private", "wanted", "schedule", "words"),
    [
        (True, None, "staged", None),
        (False, True, "staged", "texts.parquet, in `learnalign/`, go to 'someone/mine', which is public."),
        (
            *(False, None, "online"),
            "online.json, prompt_features-*.safetensors (hidden states of the prompts), selected.jsonl, in "
            "`learnalign/`, go to 'someone/mine', which is public. To keep them private, set `hub_private_repo=True`, "
            "or `write_report=False` and `prompt_features=False`;",
        ),
        (None, True, "staged", None),
        # What runs decides, not what the configuration names
        (False, None, "passed", "report.html, suspects.parquet, online.json, prompt_features-*.safetensors"),
    ],
)
def test_uploads_are_warned_of_where_the_repository_is_public(
    tmp_path, monkeypatch, caplog, private, wanted, schedule, words
):
    """By what the Hub says, and where it says nothing by what was asked for."""

    def told(client, repo):
        assert repo == "someone/mine" and client.token == "secret"
        if private is None:
            raise ConnectionError("no network")
        return SimpleNamespace(private=private)

    client = SimpleNamespace(create_repo=lambda name, **kwargs: SimpleNamespace(repo_id=f"someone/{name}"))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: client)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", told)
    chosen = online(write_report=True, prompt_features=True) if schedule == "online" else config()
    (tmp_path / "learnalign").mkdir()
    if schedule == "online":
        (tmp_path / "learnalign/selected.jsonl").write_text("{}")
    more = {"push_to_hub": True, "hub_private_repo": wanted, "hub_token": "secret", "hub_model_id": "mine"}
    if schedule == "passed":
        passed = LearnAlignSampler(LearnAlignConfig(), schedule=partial(OnlineSchedule, settings=EAGER))
        trainer = make_trainer(tmp_path, max_steps=4, hub_strategy="end", **more)
        trainer.add_callback(LearnAlignCallback(trainer, passed))
    else:
        trainer = make_trainer(tmp_path, chosen, max_steps=4, hub_strategy="end", **more)
    trainer.train()
    if schedule == "staged":
        select_prompts(trainer, chosen)
    found = [record.getMessage() for record in caplog.records if "`push_to_hub=True` uploads" in record.message]
    assert len(found) == (words is not None) and all(words in text for text in found)


def test_uploads_that_are_asked_for_later_are_warned_of_too(tmp_path, monkeypatch, caplog):
    """`trainer.push_to_hub()` uploads the same without `push_to_hub=True`."""
    pushed = []
    monkeypatch.setattr("transformers.Trainer.push_to_hub", lambda trainer, *args, **kwargs: pushed.append(kwargs))
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda client, repo: SimpleNamespace(private=repo != "someone/mine")
    )
    trainer = make_trainer(tmp_path, config(), hub_model_id="someone/mine", hub_strategy="all_checkpoints")
    trainer.push_to_hub(dataset_name="mine")
    trainer.push_to_hub()
    (text,) = [record.getMessage() for record in caplog.records if "`push_to_hub` uploads" in record.message]
    assert "in `learnalign/`, go to 'someone/mine', which is public" in text
    assert [more.get("dataset_name") for more in pushed] == ["mine", None]


class SlowUpload:
    """
    The Hub's client, whose upload is under way, in a thread, as long as the selection is: whenever the selection calls
    `look`, it reads the files that it has listed the time before, and lists them anew.
    """

    def __init__(self):
        self.executor = ThreadPoolExecutor(1)
        self.under_way = False
        self.begin, self.end = Semaphore(0), Semaphore(0)
        self.listed, self.vanished, self.rounds = set(), [], 0

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, folder_path, ignore_patterns=None, run_as_future=False, **kwargs):
        assert run_as_future
        self.under_way = self.rounds == 0  # those after the selection are of no interest
        return self.executor.submit(self._upload, Path(folder_path), ignore_patterns)

    def _upload(self, folder, ignored):
        while self.under_way and self.begin.acquire(timeout=60):
            self.vanished += [name for name in self.listed if not (folder / name).is_file()]
            names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
            self.listed |= set(filter_repo_objects(names, ignore_patterns=ignored))
            self.rounds += 1
            self.end.release()

    def look(self):
        if self.under_way:
            self.begin.release()
            assert self.end.acquire(timeout=60)


def test_what_an_upload_finds_while_a_selection_runs(tmp_path, monkeypatch):
    client, renamed, appended, original = SlowUpload(), [], [], os.replace

    def replace(source, target):
        """Where a temporary file is there, and the file before it."""
        if "learnalign" in str(target):
            client.look()
            renamed.append((Path(source).relative_to(tmp_path), Path(target).relative_to(tmp_path)))
        original(source, target)

    def write(stream, data, original=store._write):
        client.look()
        appended.append(len(data))
        original(stream, data)

    class Over(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):  # after the selection
            client.look()
            client.under_way = False
            client.begin.release()

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: client)
    monkeypatch.setattr("trl_learnalign.ground.disk.os.replace", replace)
    monkeypatch.setattr(store, "_write", write)
    trainer = make_trainer(
        tmp_path,
        config(write_report=True, save_rollouts=True),
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=2,
        push_to_hub=True,
        hub_strategy="every_save",
    )
    trainer.add_callback(Over())
    trainer.train()
    client.executor.shutdown()
    between = [
        pair for pair in renamed if not pair[1].parts[0].startswith("checkpoint")
    ]  # a state is there before an upload
    assert len(appended) > 12 and client.rounds > len(between) + len(appended)  # the upload looked in between
    assert not client.vanished
    ours = {Path(name) for name in client.listed if "learnalign" in name}
    assert ours == {target for _, target in renamed if target.parts[0] == "learnalign"} and len(ours) > 5


class Noted(TrainerCallback):
    """After every save: which selections have been pushed."""

    def __init__(self, pushed, hub):
        self.pushed, self.hub = pushed, hub

    def on_save(self, args, state, control, **kwargs):
        self.pushed.append([str(path.parent.relative_to(self.hub)) for path in self.hub.rglob("selection.json")])


def test_summary_line(tmp_path, capsys):
    selection = select_prompts(make_trainer(tmp_path), config())
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("LearnAlign"))
    assert line == selection.summary()
    assert f"pool 24; learnable {selection.num_learnable()}; chosen 8; mean success rate" in line
    assert all(phase in line for phase in ("rollouts", "gradients", "scores"))
