"""What a run trains on, that a selection leaves no trace, and that a resumed run is the run."""

import shutil
from collections import Counter
from functools import cache, partial, update_wrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    Seen,
    assert_same_weights,
    config,
    digit_reward,
    graded_reward,
    lora,
    make_dataset,
    make_model,
    make_trainer,
    online,
    parity_reward,
    planned,
    weights,
)
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignMixin, LearnAlignSampler, Selection, select_prompts
from trl_learnalign.host import find_host
from trl_learnalign.measures import gradients
from trl_learnalign.run.restart import restart
from trl_learnalign.selection.run import SelectionRun


class Fixed(Sampler):
    """A stream written out in full, epoch after epoch."""

    def __init__(self, epochs):
        self.epochs = epochs
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(self.epochs[self.epoch])

    def __len__(self):
        return len(self.epochs[0])


def stock_trainer_fed(sampler, path, kind=GRPOTrainer, **kwargs):
    """A stock trainer that draws what `sampler`, whose log is complete, would yield from the first step on."""
    layout = sampler.layout
    chunks = [np.repeat(planned(sampler, i), layout.group_size).tolist() for i in range(10 * layout.epoch_chunks)]
    epochs = [
        [row for chunk in chunks[first : first + layout.epoch_chunks] for row in chunk * layout.repeats]
        for first in range(0, len(chunks), layout.epoch_chunks)
    ]

    class Stock(kind):
        def _get_train_sampler(self, dataset=None):
            return Fixed(epochs)

    return make_trainer(path, cls=Stock, **kwargs)


@pytest.mark.parametrize("score", ["learnalign", "learnability", "alignment", "random"])
def test_a_selection_leaves_no_trace(tmp_path, score):
    """Everything selected and no warm-up: bit-identical to a stock trainer fed the same order."""
    kwargs = {"reward": parity_reward, "num_train_epochs": 2, "max_grad_norm": 0.1}
    choice = config(num_prompts=24, warmup_prompts=0, score=score)
    trainer = make_trainer(tmp_path / "ours", choice, **kwargs)
    selecting = [
        callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LearnAlignCallback)
    ]
    before = torch.get_rng_state()
    trainer.train()
    assert len(selecting[0].selections[0].indices) == 24
    torch.set_rng_state(before)
    stock = stock_trainer_fed(selecting[0].sampler, tmp_path / "stock", **kwargs)
    torch.set_rng_state(before)
    stock.train()
    assert stock.state.global_step == trainer.state.global_step == 12
    assert_same_weights(weights(stock), weights(trainer))
    ours = [entry for entry in trainer.state.log_history if "loss" in entry]
    theirs = [entry for entry in stock.state.log_history if "loss" in entry]
    for a, b in zip(ours, theirs, strict=True):
        a.pop("step_time"), b.pop("step_time"), a.pop("learnalign/zero_variance_after", None)  # ours alone
        assert a == b


def test_a_selection_in_mid_run_leaves_no_trace(tmp_path):
    """After a warm-up, with LoRA dropout, gradient checkpointing and a KL term, which all keep state of their own."""

    kwargs = {"reward": parity_reward, "num_train_epochs": 2, "beta": 0.1, "peft": lora(lora_dropout=0.2)}
    kwargs |= {"gradient_checkpointing": True, "logging_steps": 3}
    trainer = make_trainer(tmp_path / "ours", config(reselect_every=1), **kwargs)
    trainer.train()
    stock = stock_trainer_fed(trainer._get_train_sampler(), tmp_path / "stock", **kwargs)
    stock.train()
    assert len(trainer._get_train_sampler().schedule.log) == 3
    assert_same_weights(weights(stock), weights(trainer))
    ours = [entry for entry in trainer.state.log_history if "loss" in entry]
    theirs = [entry for entry in stock.state.log_history if "loss" in entry]
    for a, b in zip(ours, theirs, strict=True):
        a.pop("step_time"), b.pop("step_time")
        assert a == b
    assert all(module.training for module in trainer.model.modules())


def test_select_prompts_leaves_no_trace_and_needs_no_training(tmp_path):
    kwargs = {"reward": parity_reward, "max_steps": 3}
    trainer, stock = (make_trainer(tmp_path / name, **kwargs) for name in ("a", "b"))
    before = weights(trainer)
    metrics = {mode: dict(values) for mode, values in trainer._metrics.items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    selection = select_prompts(trainer, config())
    assert torch.equal(state, torch.get_rng_state())
    assert_same_weights(before, weights(trainer))
    assert metrics == {mode: dict(values) for mode, values in trainer._metrics.items()}
    assert trainer.state.num_input_tokens_seen == 0 and not trainer._logs["prompt"]
    assert len(trainer.train_dataset.select(selection.indices)) == 8
    torch.set_rng_state(state)
    trainer.train()
    torch.set_rng_state(state)
    stock.train()
    assert_same_weights(weights(stock), weights(trainer))


SHAPES = {
    "plain": {},
    "budget not a multiple": {"num_prompts": 7, "warmup_prompts": 5},
    "accumulation": {"gradient_accumulation_steps": 3, "steps_per_generation": 1},
    "steps_per_generation": {"gradient_accumulation_steps": 2, "steps_per_generation": 2},
    "more steps per generation": {"gradient_accumulation_steps": 1, "steps_per_generation": 2},
    "iterations": {"num_iterations": 3, "num_prompts": 7},
    "workers": {"dataloader_num_workers": 2, "num_train_epochs": 4},
    "max_steps": {"max_steps": 9},
    "no warm-up": {"warmup_prompts": 0, "num_prompts": 10},
    "unshuffled": {"shuffle_dataset": False},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_that_reach_the_reward_function(tmp_path, shape):
    """Exactly the warm-up, then the selection, each selected prompt equally often."""
    changes = {"num_train_epochs": 3, "per_device_train_batch_size": 8, **SHAPES[shape]}
    ours = {name: changes.pop(name) for name in ("num_prompts", "warmup_prompts") if name in changes}
    seen = Seen()
    trainer = make_trainer(tmp_path, config(**ours), reward=seen, **changes)
    sampler = trainer._get_train_sampler()
    layout, rolled_out = sampler.layout, []
    during = SelectionRun.run

    def run(self, *args):  # the rollouts of the selection itself pass through the same reward function
        start = len(seen.rows)
        result = during(self, *args)
        rolled_out.append(seen.rows[start:])
        del seen.rows[start:]
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectionRun, "run", run)
        trainer.train()

    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    assert Counter(rolled_out[0]) == dict.fromkeys(range(24), 8)
    trained = seen.rows[:: layout.group_size]
    assert seen.rows == [row for row in trained for _ in range(layout.group_size)]
    assert layout.first_selection == (selection.provenance["global_step"], sampler.schedule.log[1].start_chunk)
    start = sampler.schedule.log[1].start_chunk * layout.chunk_prompts
    assert sampler.config.warmup_prompts <= start <= layout.warmup_end * layout.chunk_prompts
    assert trained == [row for i in range(len(trained) // layout.chunk_prompts) for row in planned(sampler, i)]
    assert len(set(trained[:start])) == start  # the warm-up visits no prompt twice
    counts = Counter(trained[start:])
    assert set(counts) == set(selection.indices) == set(sampler.schedule.log[1].indices)
    assert max(counts.values()) - min(counts.values()) <= 1
    if "max_steps" not in changes:
        assert min(counts.values()) >= changes["num_train_epochs"]
        assert trainer.state.global_step == trainer.state.max_steps
    assert selection.provenance["global_step"] == (0 if not layout.warmup_prompts else selection_step(layout))


def selection_step(layout):
    return next(step for step in range(1000) if layout.chunks_trained(step) >= layout.warmup_chunks)


def test_a_resume_with_more_workers_may_not_skip_chunks(tmp_path):
    """Whole, the run has 7 chunks in an epoch; with two workers it would have 8, and skip two at each epoch's end."""
    kwargs = {"gradient_accumulation_steps": 4, "steps_per_generation": 1, "num_train_epochs": 3}
    kwargs |= {"save_strategy": "steps", "save_steps": 5}
    settings = config(num_prompts=20, warmup_prompts=4, score="random")
    whole = make_trainer(tmp_path, settings, **kwargs)
    whole.train()
    assert whole._get_train_sampler().layout.epoch_chunks == 7
    resumed = make_trainer(tmp_path, settings, dataloader_num_workers=2, **kwargs)
    assert resumed._get_train_sampler().layout.epoch_chunks == 8
    with pytest.raises(ValueError, match="another stream.*read_ahead.* was 1 and is 5.*settings"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


class OutOfTime(TrainerCallback):
    """Ends a run after a step, as a limit of its time does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_that_is_ending_makes_no_selection(tmp_path, saves):
    """The one that is resumed makes it."""
    kwargs = {"max_steps": 6, "save_strategy": "steps" if saves else "no", "save_steps": 100}
    whole = make_trainer(tmp_path / "whole", config(), **kwargs)
    whole.train()
    (step,) = (selection.provenance["global_step"] for selection in whole.learnalign.selections)
    seen = Seen(digit_reward)
    stopped = make_trainer(tmp_path / "stopped", config(), reward=seen, **kwargs)
    if saves:
        stopped.add_callback(OutOfTime(step))  # after the one that finds the selection due
    else:
        stopped.callback_handler.callbacks.insert(1, OutOfTime(step))
    stopped.train()
    assert stopped.state.global_step == step and not stopped.learnalign.selections
    assert len(seen.rows) == 16 * step and not list(tmp_path.glob("stopped/learnalign/step-*"))
    if saves:
        resumed = make_trainer(tmp_path / "stopped", config(), **kwargs)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.learnalign.selections[0].indices == whole.learnalign.selections[0].indices
        assert_same_weights(weights(whole), weights(resumed))


class Killed(Exception):
    pass


def killed_at(point, monkeypatch):
    """Makes a run stop as if killed: in the rollouts, before the gradients, or after the files are written."""
    from trl_learnalign.host import generation
    from trl_learnalign.selection import run as selector

    calls = {"left": 2}

    def after(function):
        def wrapper(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Killed
            return function(*args, **kwargs)

        return wrapper

    match point:
        case "rollouts":
            monkeypatch.setattr(generation, "generate_groups", after(generation.generate_groups))
        case "gradients":
            monkeypatch.setattr(gradients.GradientFeatures, "_collect", after(gradients.GradientFeatures._collect))
        case "after":
            publish = selector.SelectionRun._publish

            def wrapper(self, *args):
                publish(self, *args)
                raise Killed

            monkeypatch.setattr(selector.SelectionRun, "_publish", wrapper)


def build(path, after_warmup, seen):
    kwargs = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 8}
    kwargs |= {"num_iterations": 2, "gradient_accumulation_steps": 2}
    return make_trainer(path, config(num_prompts=7, after_warmup=after_warmup), reward=seen, **kwargs)


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory):
    """By `after_warmup`: a trainer whose run is done, its directory, and the rows that it saw."""

    @cache
    def run(after_warmup):
        path, seen = tmp_path_factory.mktemp(after_warmup), Seen(digit_reward)
        trainer = build(path, after_warmup, seen)
        trainer.train()
        assert trainer.state.max_steps > 8
        return trainer, path, seen.rows

    return run


@pytest.mark.parametrize("point", ["rollouts", "gradients", "after", "before", "at", "later"])
@pytest.mark.parametrize("after_warmup", ["continue", "restart"])
def test_a_resumed_run_is_the_run(never_killed, tmp_path, monkeypatch, point, after_warmup):
    """From a checkpoint before, at and after a selection: the same prompts and, bit for bit, the same weights."""
    whole, done, whole_rows = never_killed(after_warmup)
    path, rows = tmp_path / "killed", Seen(digit_reward)
    step = {"before": 2, "at": 4, "later": 8}.get(point)  # where a chunk ends: TRL itself loses the rest of a chunk
    if step is None:
        with monkeypatch.context() as patch:
            killed_at(point, patch)
            with pytest.raises(Killed):
                build(path, after_warmup, Seen(digit_reward)).train()
    else:
        shutil.copytree(done, path)
    resumed = build(path, after_warmup, rows)
    resumed.train(resume_from_checkpoint=str(path / f"checkpoint-{step}") if step else True)
    assert resumed.learnalign.schedule.log == whole.learnalign.schedule.log
    assert rows.rows[-40:] == whole_rows[-40:]
    assert_same_weights(weights(whole), weights(resumed))
    a, b = (Selection.load(next((at / "learnalign").glob("step-*"))) for at in (done, path))
    assert a.indices == b.indices and a.scores.equals(b.scores)
    assert {file.name for file in (path / "_learnalign").iterdir()} - {"initial.safetensors"} == {"lock"}


def test_a_killed_selection_does_not_roll_out_again_what_is_finished(tmp_path, monkeypatch):
    first = Seen(digit_reward)
    trainer = make_trainer(tmp_path, reward=first)
    with monkeypatch.context() as patch:
        killed_at("gradients", patch)
        with pytest.raises(Killed):
            select_prompts(trainer, config())
    assert len(first.rows) == 24 * 8
    second = Seen(digit_reward)
    selection = select_prompts(make_trainer(tmp_path, reward=second), config())
    assert not second.rows
    assert "of_rollouts" not in selection.provenance["cost"]  # the rollouts' time died with the first run
    fresh = select_prompts(make_trainer(tmp_path / "fresh", reward=Seen(digit_reward)), config())
    assert selection.scores.equals(fresh.scores)

    again = Seen(digit_reward)  # a finished selection of the same key is read
    assert select_prompts(make_trainer(tmp_path, reward=again), config()).scores.equals(fresh.scores)
    assert not again.rows
    other = Seen(digit_reward)  # one made from other weights is not
    trainer = make_trainer(tmp_path, reward=other)
    with torch.no_grad():
        next(iter(weights(trainer).values()))
        next(p for p in trainer.model.parameters() if p.requires_grad).add_(0.1)
    select_prompts(trainer, config())
    assert len(other.rows) == 24 * 8


def shifted_reward(completions, row, shift=0, **kwargs):
    return digit_reward(completions, [one + shift for one in row])


def shifted_by(shift):
    return update_wrapper(partial(shifted_reward, shift=shift), shifted_reward)  # TRL 1.8 wants its name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"reward": shifted_by(0)}, {"reward": shifted_by(3)}),
        ({}, {"mask_truncated_completions": True}),
        ({}, {"temperature": 0.9}),
        ({}, {"peft": lora(lora_alpha=16)}),  # the weights are the same numbers, and another policy
    ],
)
def test_a_selection_is_made_again_where_it_would_be_another(tmp_path, first, second):
    choice = config(save_rollouts=True)
    keys = [
        select_prompts(make_trainer(tmp_path, **settings), choice).provenance["key"]
        for settings in (first, first, second)
    ]
    assert keys[0] == keys[1] != keys[2]
    (step,) = (tmp_path / "learnalign").glob("step-*")
    rollouts = tmp_path / "_learnalign/rollouts" / step.name / "rollouts.parquet"
    assert Selection.load(step).provenance["key"] == keys[2] and rollouts.is_file()
    select_prompts(make_trainer(tmp_path, **second), config())
    assert not rollouts.exists()  # those of the selection that was replaced


def test_a_selection_depends_on_tokens_rewards_and_what_functions_were_made_with(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset(conversational=True))
    host, choice = find_host(trainer), config(score="learnability")
    keys = [select_prompts(trainer, choice).provenance["key"]]
    trainer.processing_class.chat_template = trainer.processing_class.chat_template.replace("a:", "t:")
    keys.append(select_prompts(trainer, choice).provenance["key"])
    assert keys[0] != keys[1]

    known = [host.identity()]
    trainer._tokenizer(["1", "22"], padding=True, truncation=True, max_length=5)  # which it notes
    assert host.identity() == known[0]
    trainer._tokenizer.add_tokens(["12"])
    known.append(host.identity())
    trainer.args.vllm_structured_outputs_regex = "[0-9]+"
    known.append(host.identity())
    trainer.reward_func_names = ["judge"]
    for name in ("one/judge", "another/judge"):
        model = make_model()
        model.config._name_or_path = name
        trainer.reward_funcs = [model]
        known.append(host.identity())
    assert all(a != b for i, a in enumerate(known) for b in known[:i])


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_resumes_with_functions_objects_and_tuples_as_settings(tmp_path, changed):
    """A checkpoint names what cannot be written into it by what it is, not by where it lies in memory."""

    def build():
        score = [partial(ranked_on, k=2), Ranked()][changed]
        choice = config(score=score, score_measures=("rollouts",), warmup_prompts=4)
        return make_trainer(tmp_path, choice, max_steps=4, save_strategy="steps", save_steps=2)

    build().train()
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4


def ranked_on(table, k):
    return table["success_rate"] * k


class Ranked:
    def __call__(self, table):
        return table["success_rate"]


def test_names_of_scores_tell_their_arguments_and_no_addresses():
    names = [config(score=score).to_dict()["score"] for score in (partial(ranked_on, k=2), Ranked(), ranked_on)]
    assert names == [f"{__name__}.ranked_on(k=2)", f"{__name__}.Ranked", f"{__name__}.ranked_on"]
    targets = [config(score="target", target_dataset=make_dataset(2).select(rows)) for rows in ([0, 1], [1, 0])]
    assert targets[0].changes(targets[1].to_dict()).keys() == {"target_dataset"}
    assert not targets[0].changes(targets[0].to_dict())


def test_features_lost_between_sum_and_scores_are_an_error_not_a_score(tmp_path, monkeypatch):
    weighted_sum = gradients.GradientFeatures.weighted_sum

    def lose_one(self, *args):
        total = weighted_sum(self, *args)
        next(self.log.path.glob("*.log")).write_bytes(b"")
        return total

    with monkeypatch.context() as patch:
        patch.setattr(gradients.GradientFeatures, "weighted_sum", lose_one)
        with pytest.raises(RuntimeError, match="features of .* prompts could not be read back"):
            select_prompts(make_trainer(tmp_path), config())
    assert not list(tmp_path.glob("learnalign/*/selection.json"))
    again = select_prompts(make_trainer(tmp_path), config())  # what is left is used
    assert again.scores.equals(select_prompts(make_trainer(tmp_path / "fresh"), config()).scores)


def test_measures_made_from_something_else_are_discarded(tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        killed_at("gradients", patch)
        with pytest.raises(Killed):
            select_prompts(make_trainer(tmp_path), config())
    seen = Seen(digit_reward)
    select_prompts(make_trainer(tmp_path, reward=seen, temperature=0.5), config())
    assert len(seen.rows) == 24 * 8
    assert "from other reward function `digit_reward`, `temperature`, so it is discarded" in caplog.text


def test_staged_selection(tmp_path):
    trainer = make_trainer(tmp_path, config(reselect_every=1.5), num_train_epochs=4)
    trainer.train()
    log = trainer._get_train_sampler().schedule.log
    paths = sorted((tmp_path / "learnalign").glob("step-*"))
    assert len(paths) == len(log) - 1 >= 3
    for stage, path in enumerate(paths):
        selection = Selection.load(path)
        assert selection.provenance["stage"] == stage
        assert tuple(selection.indices) == log[stage + 1].indices
    # a chunk of 4 prompts: 1.5 passes over 8 are 3 chunks, then one that was read ahead unless an epoch ends there
    assert {b.start_chunk - a.start_chunk for a, b in zip(log[1:], log[2:], strict=False)} <= {3, 4}
    stages = [entry["learnalign/stage"] for entry in trainer.state.log_history if "learnalign/stage" in entry]
    assert stages == list(range(len(paths)))
    # the values of a selection do not take the place of those of the step that it follows
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == list(range(1, trainer.state.max_steps + 1))


def test_restart_goes_back_to_the_first_weights_and_a_fresh_optimizer(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, config(after_warmup="restart"), num_train_epochs=2)
    first = weights(trainer)
    seen = {}

    def check(host, file):
        seen["warm"] = weights(trainer)
        assert trainer.optimizer.optimizer.state
        restart(host, file)
        seen["after"] = weights(trainer)
        assert not trainer.optimizer.optimizer.state

    monkeypatch.setattr("trl_learnalign.callback.restart", check)
    trainer.train()
    assert_same_weights(first, seen["after"])
    assert any(not torch.equal(first[name], seen["warm"][name]) for name in first)


def test_callback_and_mixin_choose_as_the_trainer_does(tmp_path):
    class MyTrainer(GRPOTrainer):
        pass

    class Mine(LearnAlignMixin, MyTrainer):
        pass

    kwargs = {"num_train_epochs": 2}
    ours = make_trainer(tmp_path / "a", config(), **kwargs)
    ours.train()
    mixed = make_trainer(tmp_path / "b", config(), cls=Mine, **kwargs)
    mixed.train()
    stock = make_trainer(tmp_path / "c", **kwargs)
    stock.add_callback(LearnAlignCallback(stock, LearnAlignSampler(config())))
    stock.train()
    assert ours.learnalign.schedule.log == mixed.learnalign.schedule.log == stock.learnalign.schedule.log
    assert_same_weights(weights(ours), weights(mixed))
    assert_same_weights(weights(ours), weights(stock))


def test_without_a_sampler_the_trainer_is_what_it_was(tmp_path):
    class Mine(LearnAlignMixin, GRPOTrainer):
        pass

    ours = make_trainer(tmp_path / "a", cls=Mine, max_steps=2)
    ours.train()
    stock = make_trainer(tmp_path / "b", max_steps=2)
    stock.train()
    assert_same_weights(weights(ours), weights(stock))
    assert ours.learnalign is None and not hasattr(stock, "learnalign")


def test_the_handle_of_a_trainer_writes_a_report_when_asked(tmp_path):
    """By whatever way the trainer got a sampler, and though `write_report` is off."""
    staged = make_trainer(tmp_path / "staged", max_steps=3)
    staged.add_callback(LearnAlignCallback(staged, LearnAlignSampler(config(score="learnability", warmup_prompts=4))))
    for trainer in (staged, make_trainer(tmp_path / "online", online(), max_steps=2)):
        handle, page = trainer.learnalign, Path(trainer.args.output_dir, "learnalign/report.html")
        assert handle.selections == [] and handle.report() is None and not page.exists()
        trainer.train()
        assert not page.exists() and handle.report() == page and page.is_file()
        chosen = [list(version.indices) for version in getattr(handle.schedule, "log", [])[1:]]
        assert [one.indices for one in handle.selections] == chosen and bool(chosen) == (trainer is staged)


def test_training_twice_starts_afresh(tmp_path):
    trainer = make_trainer(tmp_path, config(), max_steps=6)
    trainer.train()
    first = trainer._get_train_sampler().schedule.log
    trainer.train()
    assert [v.start_chunk for v in trainer._get_train_sampler().schedule.log] == [v.start_chunk for v in first]


def second_reward(completions, **kwargs):
    return [0.5 for _ in completions]


def test_several_reward_functions(tmp_path):
    choice = config(success_reward="digit_reward")
    trainer = make_trainer(tmp_path / "a", choice, reward=[second_reward, digit_reward], num_train_epochs=2)
    trainer.train()
    one = make_trainer(tmp_path / "b", config(), num_train_epochs=2)
    one.train()
    # a constant second reward changes neither success nor advantages
    assert trainer._get_train_sampler().schedule.log == one._get_train_sampler().schedule.log


def test_graded_rewards(tmp_path):
    trainer = make_trainer(tmp_path, config(learnability="variance"), reward=graded_reward, num_train_epochs=2)
    trainer.train()
    table = Selection.load(next((tmp_path / "learnalign").glob("step-*"))).scores.to_pandas()
    assert (table["success_rate"] == 0).all() and (table["learnability"] > 0).sum() > 12
    assert table["selected"].sum() == 8


@pytest.mark.parametrize("conversational", [True, False])
def test_conversational_prompts_and_extra_columns(tmp_path, conversational):
    dataset = make_dataset(16, conversational=conversational, extra=True)
    seen = []

    def reward(completions, note, **kwargs):
        seen.extend(note)
        return parity_reward(completions)

    trainer = make_trainer(tmp_path, config(save_rollouts=True), reward=reward, dataset=dataset, num_train_epochs=2)
    trainer.train()
    assert {entry["b"] for entry in seen} == {"x" * i for i in range(16)}
    import pyarrow.parquet as pq

    path = next((tmp_path / "_learnalign/rollouts").glob("step-*"))
    table = pq.read_table(path / "rollouts.parquet").to_pandas()
    assert len(table) == 16 * 8 and table["completion"].map(type).eq(str).all()
    assert table["completion"].str.contains("assistant").all() == conversational
    assert abs(table.groupby("index")["advantage"].sum()).max() < 1e-5


@pytest.mark.parametrize("gradient_rollouts", ["all", "one_correct"])
def test_one_correct_rollout_has_the_gradient_of_the_first_success(tmp_path, monkeypatch, gradient_rollouts):
    from trl_learnalign.host import objective

    rows = []
    original = objective.policy_objective
    monkeypatch.setattr(objective, "policy_objective", lambda t, batch: (rows.extend(batch), original(t, batch))[1])
    selection = select_prompts(make_trainer(tmp_path), config(gradient_rollouts=gradient_rollouts))
    if gradient_rollouts == "one_correct":
        assert len(rows) == selection.num_learnable()
        assert all(row.advantage > 0 and row.weight == 1 for row in rows)
    else:
        assert len(rows) == 8 * selection.num_learnable()
        assert {row.weight for row in rows} == {1 / 8}


def test_candidates_are_a_random_part_of_the_pool(tmp_path):
    selection = select_prompts(make_trainer(tmp_path), config(candidate_prompts=10))
    indices = selection.scores["index"].to_pylist()
    assert len(set(indices)) == 10 and indices == sorted(indices) and indices != list(range(10))
    assert set(selection.indices) <= set(indices)


def test_seed_decides_the_selection(tmp_path):
    def scores(name, **changes):
        return select_prompts(make_trainer(tmp_path / name), config(**changes)).scores

    assert scores("a").equals(scores("b"))
    assert scores("c", selection_seed=7).equals(scores("d"))  # the trainer's own seed is 7
    assert not scores("e", selection_seed=8).equals(scores("f"))


def test_ties_are_drawn_from_the_whole_dataset(tmp_path):
    """
    Where all prompts are equally learnable, seed and stage decide, and not the place in a dataset that may be sorted
    by source.
    """

    def half(completions, **kwargs):
        return [float(i % 2) for i in range(len(completions))]

    def settings(seed):
        return config(num_prompts=12, warmup_prompts=0, score="learnability", selection_seed=seed, reselect_every=1)

    kwargs = {"reward": half, "dataset": make_dataset(48), "max_steps": 6}
    trainer = make_trainer(tmp_path / "a", settings(0), **kwargs)
    trainer.train()
    assert all(one.to_pandas()["learnability"].eq(0.25).all() for one in trainer.learnalign.selections)
    first, second = (one.indices for one in trainer.learnalign.selections)
    for indices in (first, second):
        assert len(set(indices)) == 12 and min(indices) < 16 and max(indices) >= 32 and indices != sorted(indices)
    same, other = (select_prompts(make_trainer(tmp_path / f"{seed}", **kwargs), settings(seed)) for seed in (0, 1))
    assert first != second and first == same.indices and other.indices not in (first, second)


def test_dora_with_the_score_that_takes_no_gradients(tmp_path):

    peft = lora(use_dora=True, init_lora_weights=True)
    trainer = make_trainer(tmp_path, config(score="learnability"), peft=peft, num_train_epochs=2)
    trainer.train()
    assert trainer._get_train_sampler().schedule.log[1].indices


def test_full_fine_tuning(tmp_path):
    trainer = make_trainer(tmp_path, config(), peft=False, num_train_epochs=2)
    trainer.train()
    table = Selection.load(next((tmp_path / "learnalign").glob("step-*"))).scores.to_pandas()
    assert (table["gradient_norm"] > 0).sum() == (table["learnability"] > 0).sum() > 8


def test_a_processor_in_place_of_a_tokenizer(tmp_path):
    """
    As vision-language models have it, with prompts of text. tests/sharded_run.py has it where filler rows are made.
    """
    from trl_learnalign.host import find_host

    trainer = make_trainer(tmp_path, config(), processor=True, num_train_epochs=2)
    assert not hasattr(trainer.processing_class, "eos_token_id")
    trainer.train()
    table = Selection.load(next((tmp_path / "learnalign").glob("step-*"))).scores.to_pandas()
    assert (table["gradient_norm"] > 0).sum() == (table["learnability"] > 0).sum() > 8
    host = find_host(trainer)
    with host.left_as_found(4):
        (group,) = host.generate(trainer.train_dataset, [3], 0)
    text = host.text(group.completion_ids[0])
    assert text == trainer.processing_class.tokenizer.decode(group.completion_ids[0], skip_special_tokens=True)
    trainer._tokenizer.eos_token = None
    row = host.filler()
    assert row.prompt_ids == row.completion_ids == [trainer._tokenizer.pad_token_id] and row.weight == 0
