"""What a run says of its selections: values and tables in the trackers, model cards, bars, one line."""

import io
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from tiny import config, make_trainer, parity_reward
from transformers import TrainerCallback

from trl_learnalign import Selection, select_prompts


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
    # TRL's own share of groups without a gradient: step 1 before the selection; step 2, at which it was made, before it too,
    # but logged after it; step 3 has the batch that was read ahead; step 4 is the first of the selection, which the log of
    # step 5 is the first to know
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
    monkeypatch.setattr("trl_learnalign.figures.drawings", lambda selections: 1 / 0)
    trainer = make_trainer(tmp_path, config(write_report=True), report_to="tensorboard")
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps
    assert "The table of scores and the figures could not be logged (ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("changes", [{}, {"logging_steps": 2}, {"num_iterations": 2}])
def test_zero_variance_is_that_of_selected_prompts(tmp_path, changes):
    """Of chunks before the selection takes effect, the one read ahead with them, no group has a gradient; of the others, some have."""
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
    start = trainer._learnalign.sampler.log[-1].start_chunk
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
    run = f"make_trainer({str(tmp_path)!r}, config(write_report=True), report_to={backend!r}, num_train_epochs=2).train()"
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


def test_what_is_pushed_with_a_checkpoint(tmp_path, monkeypatch):
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
        config(write_report=True),
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
    assert (hub / "learnalign/report.html").is_file() and not list(hub.rglob("journal"))
    assert (hub / "adapter_model.safetensors").is_file()


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
