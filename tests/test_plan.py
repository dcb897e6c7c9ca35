"""What a run says of its plan, and what a resumed run may change."""

import contextlib
import io
import logging
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from test_sampler import LAYOUT
from tiny import (
    Seen,
    assert_same_weights,
    config,
    digit_reward,
    make_dataset,
    make_trainer,
    online,
    parity_reward,
    weights,
)

from trl_learnalign import LearnAlignConfig, Selection, select_prompts
from trl_learnalign.host import generation
from trl_learnalign.schedules.staged import Version
from trl_learnalign.schedules.staged_plan import Work, estimate_line, plan_lines, rollouts_text, warmup_warning
from trl_learnalign.selection.stages import load_run


GSM8K = replace(
    LAYOUT,
    pool_size=7473,
    num_prompts=1000,
    warmup_prompts=300,
    chunk_prompts=48,
    repeats=1,
    group_size=8,
    epochs=1.0,
)
ALL = Work(7473)
START = [Version(0, ())]
CHOSEN = [*START, Version(8, tuple(range(1000)))]


def lines(layout=GSM8K, step=0, log=START, due=False, max_steps=None, work=ALL, **settings):
    max_steps = max_steps or layout.steps_of(layout.epoch_chunks)
    return plan_lines(layout, LearnAlignConfig(**settings), work, max_steps, step, log, due)


def test_plan_of_a_new_run():
    assert lines() == [
        "steps 1 to 8 of 29 warm up on 384 random prompts (300, and 84 read ahead).",
        "selection after step 7: 7,473 prompts x 8 rollouts = 59,784.",
        "steps 9 to 29 train on the 1,000 selected prompts: 1.0 passes (`num_train_epochs`).",
    ]
    page = (Path(__file__).parent.parent / "docs/configuration.md").read_text()
    assert "".join(f"LearnAlign plan: {line}\n" for line in lines()) in page
    layout = replace(GSM8K, warmup_prompts=0)
    first, second, third = lines(layout, due=True, reselect_every=1.5, work=Work(2000))
    assert first == "no warm-up."
    assert second == (
        "selection now, and again after every 1.5 passes over the selected prompts: 2,000 prompts x 8 rollouts = "
        "16,000."
    )
    assert third.startswith("steps 1 to 21 train on")
    at_random = rollouts_text(GSM8K, LearnAlignConfig(score="random"), ALL)
    assert at_random == "1,000 of 7,473 prompts at random, without rollouts"
    assert rollouts_text(GSM8K, LearnAlignConfig(num_rollouts=4), ALL) == "7,473 prompts x 4 rollouts = 29,892"


def test_plan_of_a_part_of_the_dataset_and_of_a_target():
    """As many as are rolled out: those that a condition on the dataset leaves, and the target."""
    some = Work(320)
    assert lines(work=some)[1:] == [
        "selection after step 7: 320 prompts x 8 rollouts = 2,560.",
        "steps 9 to 29 train on the 320 selected prompts: 3.1 passes (`num_train_epochs`).",
    ]
    measured = Work(7473, filtered=True)
    assert lines(work=measured)[1] == "selection after step 7: 7,473 prompts x 8 rollouts = 59,784."
    assert lines(work=measured)[2] == (
        "steps 9 to 29 train on the selected prompts, at most 1,000: 1.0 passes or more (`num_train_epochs`)."
    )
    assert lines(work=measured, log=CHOSEN, step=15)[2].startswith(
        "steps 16 to 29 train on the 1,000 selected prompts:"
    )
    aimed = LearnAlignConfig(score="target", target_dataset="target.jsonl")
    assert rollouts_text(GSM8K, aimed, Work(320, 16)) == "320 prompts and 16 of the target x 8 rollouts = 2,688"
    # 38.4 rollouts a second
    assert "2,688; about 70 s at the pace" in estimate_line(GSM8K, aimed, Work(320, 16), 7, 0, 70.0)
    by_column = LearnAlignConfig(score="column:grade")
    assert rollouts_text(GSM8K, by_column, Work(320, filtered=True)).startswith(
        "at most 320 of 320 prompts by column:grade"
    )


def test_plan_of_a_resumed_run():
    assert lines(step=3)[0] == "goes on after step 3 of 29, in the warm-up, which ends with step 8."
    assert lines(step=3)[1:] == lines()[1:]
    assert lines(step=7, due=True)[:2] == [
        "goes on after step 7 of 29, after the warm-up.",
        "selection now: 7,473 prompts x 8 rollouts = 59,784.",
    ]
    first, second, third = lines(step=15, log=CHOSEN)
    assert first == "goes on after step 15 of 29, after the warm-up."
    assert second == "selection number 1 was made, of 1,000 prompts."
    assert third.startswith("steps 16 to 29 train on the 1,000 selected prompts: 0.7 passes")
    few = [*START, Version(8, tuple(range(100)))]
    assert "and again after every pass over" in lines(step=15, log=few, reselect_every=1)[1]
    assert "the 100 selected prompts: 6.7 passes" in lines(step=15, log=few)[2]
    none = lines(step=15, log=[*START, Version(8, ())])
    assert none[2] == "steps 16 to 29 train on random prompts, as the selection chose none."
    assert lines(step=29, log=CHOSEN)[2] == "no step is left. To train longer, raise `max_steps`."


def test_a_long_warmup_is_remarked():
    assert warmup_warning(GSM8K, 29) is None and warmup_warning(GSM8K, 24) is None
    assert re.match(
        r"The warm-up takes 8 of the 23 steps of this run \(35%\).*"
        r"Lower `warmup_prompts` \(300; the dataset has 7473 rows\)",
        warmup_warning(GSM8K, 23),
    )
    assert warmup_warning(replace(GSM8K, warmup_prompts=0), 1) is None


def test_estimate_is_in_proportion():
    """7 steps of 48 x 8 rollouts in 70 s: 38.4 a second, so 59,784 take 1,557 s."""
    line = estimate_line(GSM8K, LearnAlignConfig(), ALL, 7, 0, 70.0)
    assert line == (
        "LearnAlign, step 7: selecting, 7,473 prompts x 8 rollouts = 59,784; about 26 min at the pace of training "
        "(38.4 rollouts a second, with their gradients)."
    )
    assert "about 52 min" in estimate_line(GSM8K, LearnAlignConfig(), ALL, 7, 0, 140.0)
    assert "about 26 min" in estimate_line(GSM8K, LearnAlignConfig(), ALL, 17, 10, 70.0)
    assert "about 13 min" in estimate_line(GSM8K, LearnAlignConfig(num_rollouts=4), ALL, 7, 0, 70.0)
    assert "not known yet" in estimate_line(GSM8K, LearnAlignConfig(), ALL, 0, 0, 5.0)
    assert "not known yet" in estimate_line(GSM8K, LearnAlignConfig(), ALL, 9, 9, 5.0)
    assert estimate_line(GSM8K, LearnAlignConfig(score="random"), ALL, 7, 0, 5.0).endswith("without rollouts.")


# Of real runs


def shortest(table):
    return 1 / table["completion_length_mean"]


ROWS = make_dataset().add_column("tens", [row // 10 for row in range(24)])
KWARGS = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
KWARGS |= {"dataset": ROWS}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a checkpoint of every step, what it printed, and what it said in its log."""
    path, out, said = tmp_path_factory.mktemp("run"), io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("trl_learnalign").addHandler(handler)
    seen = Seen(digit_reward)
    try:
        with contextlib.redirect_stdout(out):
            trainer = make_trainer(path, config(), reward=seen, **KWARGS)
            trainer.train()
    finally:
        logging.getLogger("trl_learnalign").removeHandler(handler)
    return trainer, path, seen.rows, out.getvalue(), said.getvalue()


def plans(text):
    return [line.removeprefix("LearnAlign plan: ") for line in text.splitlines() if line.startswith("LearnAlign plan")]


def test_the_plan_is_what_happens(run):
    trainer, path, rows, text, said = run
    layout, selection = trainer._get_train_sampler().layout, trainer._get_train_sampler().schedule.log[1]
    first, second, third = plans(text)
    assert first.startswith("steps 1 to 3 of 8 warm up on 12 random prompts (8, and 4 ")
    assert selection.start_chunk * layout.chunk_prompts == 12
    step = int(re.search(r"selection after step (\d+)", second)[1])
    made = Selection.load(path / f"learnalign/step-{step:06d}")
    assert f"{made.scores.num_rows} prompts x 8 rollouts = {made.scores.num_rows * 8}." in second
    assert third.startswith("steps 4 to 8 train on the 8 selected prompts: 2.5 passes")
    trained = (
        rows[: 12 * 4] + rows[12 * 4 + 24 * 8 :]
    )  # without the rollouts of the selection, whose next chunk is drawn
    assert set(trained[-20 * 4 :]) == set(selection.indices) and len(trained) == 8 * 16
    assert "LearnAlign, step 2: selecting, 24 prompts x 8 rollouts = 192; about" in text
    assert text.index("LearnAlign plan") < text.index("selecting, 24") < text.index("LearnAlign, step 2: pool 24")
    assert "The warm-up takes 3 of the 8 steps of this run (38%)" in said


def resumed(path, step, choice, capsys, **changes):
    trainer = make_trainer(path, choice, reward=Seen(digit_reward), **KWARGS | changes)
    trainer.train(resume_from_checkpoint=str(path / f"checkpoint-{step}"))
    return trainer, capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"score": "learnability"},
        {"learnability": "variance"},
        {"success_threshold": 0.5},
        {"num_rollouts": 4},
        {"selection_seed": 3, "deduplicate": True},
        {
            "projection_dim": 1024,
            "gradient_rollouts": "one_correct",
            "candidate_prompts": 20,
            "after_warmup": "restart",
        },
    ],
)
def test_what_decides_a_selection_must_not_change(run, capsys, changes):
    was = config().to_dict()
    text = ".*".join(
        sorted((f"`{name}` was {was[name]!r} and is {value!r}" for name, value in changes.items()), key=place)
    )
    with pytest.raises(
        ValueError, match=f"not that of the checkpoint: {text}.*start a new run.*only `reselect_every`"
    ):
        resumed(run[1], 4, config(**changes), capsys)


def place(text):
    return list(config().to_dict()).index(text.split("`")[1])


def test_what_decides_nothing_may_change(run, tmp_path, capsys, caplog):
    trainer, path, *_ = run
    shutil.copytree(path, tmp_path / "run")
    free = config(reselect_every=9, max_tokens_per_batch=200, save_rollouts=True, write_report=True)
    again, text = resumed(tmp_path / "run", 4, free, capsys)
    assert again._get_train_sampler().schedule.log == trainer._get_train_sampler().schedule.log
    assert_same_weights(weights(again), weights(trainer))
    assert plans(text)[0] == "goes on after step 4 of 8, after the warm-up."
    assert "`reselect_every` was None and is 9: the selections to come follow the new value" in caplog.text
    assert "The warm-up takes" not in caplog.text


BEFORE = {
    **{"num_rollouts": 4, "rollout_batch_prompts": 2, "score": shortest, "score_measures": ["rollouts"]},
    **{"learnability": "variance", "success_threshold": 0.5, "success_reward": "digit_reward"},
    **{"candidate_prompts": 20, "deduplicate": True, "where": "row > 1", "quota_column": "tens", "quota": "equal"},
    **{"take": "proportional", "prompt_order": "ranked", "selection_seed": 3},
}


def test_what_only_the_coming_selection_uses_may_change_until_it_is_made(run, tmp_path, capsys, caplog):
    """And the run is then the one that had it from the start: up to the selection they are the same."""
    shutil.copytree(run[1], tmp_path / "run")
    again, _ = resumed(tmp_path / "run", 1, config(**BEFORE), capsys)
    whole = make_trainer(tmp_path / "whole", config(**BEFORE), reward=Seen(digit_reward), **KWARGS)
    whole.train()
    log = again._get_train_sampler().schedule.log
    assert log == whole._get_train_sampler().schedule.log != run[0]._get_train_sampler().schedule.log
    assert_same_weights(weights(again), weights(whole))
    assert "`where` was None and is 'row > 1'" in caplog.text
    assert "the selections to come follow the new values" in caplog.text
    with pytest.raises(ValueError, match="`where` was 'row > 1' and is None.*The selections so far were made with"):
        resumed(tmp_path / "run", 4, config(**(BEFORE | {"where": None})), capsys)


@pytest.mark.parametrize(("changes", "name"), [({"num_prompts": 6}, "num_prompts"), ({"after_warmup": "restart"}, "")])
def test_what_training_has_begun_with_may_not_change_before_a_selection_either(run, capsys, changes, name):
    with pytest.raises(ValueError, match=f"follows from `{name}`" if name else "`after_warmup` was 'continue'"):
        resumed(run[1], 1, config(**changes), capsys)


def test_the_advice_against_full_memory_can_be_followed(tmp_path, monkeypatch, capsys):
    """In any selection: the run goes on from the checkpoint with fewer prompts at once."""
    kwargs = {"reward": Seen(parity_reward), "per_device_train_batch_size": 16, "num_train_epochs": 2}
    kwargs |= {"save_strategy": "steps", "save_steps": 1}
    settings = {"reselect_every": 0.5, "rollout_batch_prompts": 4, "score": "learnability"}
    full = []

    def generate(host, dataset, rows, *args, original=generation.generate_groups):
        if full and len(rows) > 2:
            raise MemoryError("4 rollouts at once do not fit. Lower `rollout_batch_prompts`")
        return original(host, dataset, rows, *args)

    monkeypatch.setattr(generation, "generate_groups", generate)
    trainer = make_trainer(tmp_path, config(**settings), **kwargs)
    accept = trainer.learnalign.schedule.accept
    trainer.learnalign.schedule.accept = lambda *version: (full.append(version), accept(*version))
    with pytest.raises(MemoryError):
        trainer.train()
    assert len(full) == 1
    again = make_trainer(tmp_path, config(**settings | {"rollout_batch_prompts": 2}), **kwargs)
    again.train(resume_from_checkpoint=True)
    assert len(again._get_train_sampler().schedule.log) > 2 and again.state.global_step == again.state.max_steps


def test_another_schedule_is_named(run, capsys):
    with pytest.raises(ValueError, match=r"schedule StagedSchedule \(`schedule='staged'`\).*has OnlineSchedule"):
        resumed(run[1], 4, online(), capsys)


def test_a_finished_run_is_trained_longer_with_max_steps(run, tmp_path, capsys):
    """The same as one that was that long from the start."""
    _, path, *_ = run
    with pytest.raises(
        ValueError, match="epochs was 2 and is 4.*keep `num_train_epochs=2`.*`max_steps=12` are 4 epochs"
    ):
        resumed(path, 8, config(), capsys, num_train_epochs=4)
    shutil.copytree(path, tmp_path / "longer")
    longer, text = resumed(tmp_path / "longer", 8, config(), capsys, max_steps=12)
    assert plans(text)[2].startswith("steps 9 to 12 train on the 8 selected prompts: 2.0 passes")
    seen = Seen(digit_reward)
    whole = make_trainer(tmp_path / "whole", config(), reward=seen, **KWARGS, max_steps=12)
    whole.train()
    assert longer.state.global_step == whole.state.global_step == 12
    assert longer._get_train_sampler().schedule.log == whole._get_train_sampler().schedule.log
    assert longer.reward_funcs[0].rows == seen.rows[-4 * 16 :]
    assert_same_weights(weights(longer), weights(whole))


def test_a_staged_run_whose_reselect_every_changed_is_one_run(run, tmp_path, capsys):
    shutil.copytree(run[1], tmp_path / "run")
    trainer, text = resumed(tmp_path / "run", 4, config(reselect_every=1), capsys)
    stages = [one.provenance["stage"] for one in load_run(tmp_path / "run")]
    assert stages == list(range(len(trainer._get_train_sampler().schedule.log) - 1)) and len(stages) > 1
    assert "LearnAlign, step 5: selecting" in text


def test_a_finished_selection_that_is_used_again_says_so(tmp_path, capsys):
    first = select_prompts(make_trainer(tmp_path), config(score="learnability"))
    assert "Used again" not in capsys.readouterr().out
    second = select_prompts(make_trainer(tmp_path), config(score="learnability", write_report=True))
    out = capsys.readouterr().out
    path = tmp_path / "learnalign/step-000000"
    assert f"Used again: '{path}' holds this selection already" in out and "delete that directory" in out
    assert f"(made: {first.provenance['made']}). Its times are those of that run" in out
    assert second.provenance == first.provenance
    with pytest.warns(
        UserWarning, match=rf"is 500, but the pool of 24 has only {first.num_learnable()} learnable prompts"
    ):
        assert len(first.select(500).indices) == first.num_learnable()
    select_prompts(make_trainer(tmp_path), config(score="learnability", num_rollouts=3))
    out = capsys.readouterr().out
    assert f"Will be replaced: '{path}' holds a selection from other `num_rollouts`" in out and "Used again" not in out


def nearly_reward(completions, **kwargs):
    """Graded, and never a success by the threshold that is set if none is given."""
    return [0.9 * reward for reward in parity_reward(completions)]


LATER = {"save_strategy": "steps", "save_steps": 1, "max_steps": 7, "dataset": make_dataset(12)}


def test_what_chose_nothing_has_decided_nothing(tmp_path, caplog):
    """The advice of its warning can be followed, and not only until the next selection was made."""
    settings = {"score": "learnability", "reselect_every": 0.5}
    trainer = make_trainer(tmp_path, config(**settings), reward=nearly_reward, **LATER | {"max_steps": 4})
    trainer.train()
    log = trainer.learnalign.schedule.log
    assert len(log) > 1 and not any(version.indices for version in log)
    assert "or another `success_threshold`" in caplog.text
    settings |= {"learnability": "variance"}
    once = make_trainer(tmp_path, config(**settings | {"reselect_every": None}), reward=nearly_reward, **LATER)
    caplog.clear()
    once.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "None is to come: set `reselect_every`" in caplog.text and not once.learnalign.schedule.log[-1].indices
    again = make_trainer(tmp_path, config(**settings), reward=nearly_reward, **LATER)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.learnalign.schedule.log[: len(log)] == log and again.learnalign.schedule.log[-1].indices
    settings |= {"learnability": "success_rate"}
    with pytest.raises(ValueError, match="`learnability` was 'variance' and is 'success_rate'"):
        make_trainer(tmp_path, config(**settings), reward=nearly_reward, **LATER).train(resume_from_checkpoint=True)


def test_another_target_may_follow_one_that_nothing_was_learnt_from(tmp_path, caplog):
    def reward(completions, row, **kwargs):
        return [0.0 if r >= 200 else value for r, value in zip(row, parity_reward(completions), strict=True)]

    def run(first, **changes):
        target = Dataset.from_dict({"prompt": ["1=", "2="], "row": [first, first + 1]})
        settings = {"score": "target", "target_dataset": target, "reselect_every": 0.5}
        return make_trainer(tmp_path, config(**settings | changes), reward=reward, **LATER)

    run(200).train()
    assert "with more `num_rollouts` or other target prompts" in " ".join(caplog.text.split())
    with pytest.raises(ValueError, match="`take` was 'top'"):
        run(100, take="proportional").train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    again = run(100, num_rollouts=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "instead" not in again.learnalign.selections[-1].provenance["target"]
    with pytest.raises(ValueError, match="`target_dataset` was"):
        run(200, num_rollouts=4).train(resume_from_checkpoint=True)
