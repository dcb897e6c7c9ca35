"""Bad input: a clear error, early, with the value, the reason and the remedy."""

import asyncio
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from tiny import (
    config,
    digit_reward,
    graded_reward,
    grpo_args,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
    online,
    parity_reward,
    planned,
)
from torch.utils.data import Sampler

from trl_learnalign import (
    LearnAlignCallback,
    LearnAlignGRPOTrainer,
    LearnAlignSampler,
    Selection,
    select_prompts,
)
from trl_learnalign.host import find_host
from trl_learnalign.host.rewards import RewardError
from trl_learnalign.host.trial import COMPLETION, try_rewards


def test_budget_larger_than_the_pool_takes_all(tmp_path):
    with pytest.warns(UserWarning, match="`num_prompts` is 1000, but the training dataset has 24 rows"):
        trainer = make_trainer(tmp_path, config(num_prompts=1000), reward=parity_reward, num_train_epochs=1)
    trainer.train()
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    assert len(selection.indices) == selection.num_learnable() >= 20


def test_warmup_longer_than_the_run(tmp_path):
    trainer = make_trainer(tmp_path, config(warmup_prompts=20), max_steps=5)
    with pytest.raises(ValueError, match="warm-up of 20 prompts takes 24 .*5 steps holds 20.*Lower `warmup_prompts`"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_streaming_dataset(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(make_dataset()))
    with pytest.raises(ValueError, match="IterableDataset.*without streaming"):
        make_trainer(tmp_path, config(), dataset=stream, max_steps=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda rows: DatasetDict(train=rows, test=rows),
            r'DatasetDict with the splits train, test.*`dataset\["train"\]`',
        ),
        (
            lambda rows: rows.to_list(),
            r"type list, but.*`datasets.Dataset`. Make one with `Dataset.from_list\(rows\)`",
        ),
        (lambda rows: rows.to_dict(), r"type dict, but.*Make one with `Dataset.from_dict"),
        (lambda rows: rows.to_pandas(), r"type DataFrame, but.*Make one with `Dataset.from_pandas"),
        (lambda rows: range(3), r"type range, but.*Make one\."),
    ],
)
def test_what_is_no_dataset_is_told_what_it_is(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, config(), dataset=make(make_dataset()))


def test_environment_that_owns_the_data(tmp_path):
    placeholder = Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * 4})
    trainer = make_trainer(tmp_path, dataset=placeholder, max_steps=2)
    with pytest.raises(ValueError, match="environment of this trainer supplies the prompts.*Pass a `train_dataset`"):
        select_prompts(trainer, config())


def test_processes_that_do_not_know_of_each_other(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="launcher started 2 processes, but the trainer sees 1.*use_cpu=True"):
        select_prompts(trainer, config())


def test_empty_dataset(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train_dataset = make_dataset().select([])
    with pytest.raises(ValueError, match="training dataset is empty"):
        select_prompts(trainer, config())


def test_several_rewards_need_a_name(tmp_path):
    rewards = [graded_reward, digit_reward]
    with pytest.raises(ValueError, match=r"several reward functions \(graded_reward, digit_reward\).*success_reward"):
        make_trainer(tmp_path, config(), reward=rewards)
    with pytest.raises(ValueError, match="but 'accuracy' is not among.*graded_reward, digit_reward"):
        make_trainer(tmp_path, config(success_reward="accuracy"), reward=rewards)
    with pytest.raises(ValueError, match="names a function twice"):
        make_trainer(tmp_path, config(success_reward=["digit_reward"] * 2), reward=rewards)
    for names in ([], [3], {"digit_reward"}):
        with pytest.raises(ValueError, match="`success_reward` must be the name of a reward function, or a list of"):
            config(success_reward=names)
    with pytest.raises(ValueError, match="more than once"):
        make_trainer(tmp_path, config(success_reward="digit_reward"), reward=[digit_reward, digit_reward])
    with pytest.raises(ValueError, match="but 'x' is not among"):
        make_trainer(tmp_path, config(success_reward="x"))


def test_no_learnable_prompt_at_all(tmp_path, caplog):
    """Training goes on with random prompts, in the order it would have had, and a warning says what to change."""
    trainer = make_trainer(tmp_path, config(), reward=always, num_train_epochs=2)
    trainer.train()
    assert "No prompt is learnable" in caplog.text and "success_threshold" in caplog.text
    assert trainer.state.global_step == trainer.state.max_steps
    sampler = trainer._get_train_sampler()
    assert sampler.schedule.log[1].indices == ()
    random = make_trainer(tmp_path / "random", config(), num_train_epochs=2)._get_train_sampler()
    steps = trainer.state.global_step
    assert [planned(sampler, i) for i in range(steps)] == [random.chunk(i) for i in range(steps)]
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    assert selection.indices == [] and "learnable 0; chosen 0" in selection.summary()


def always(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize("value", [0.25, None])
def test_no_prompt_is_learnable_by_variance(tmp_path, caplog, value):
    """All rewards equal, or none given at all."""

    def constant_reward(completions, **kwargs):
        return [value] * len(completions)

    trainer = make_trainer(tmp_path, config(learnability="variance"), reward=constant_reward, max_steps=5)
    trainer.train()
    nothing = "No prompt could be scored" if value is None else "No prompt is learnable"
    assert trainer.state.global_step == 5 and nothing in caplog.text
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    assert selection.indices == [] and selection.num_learnable() == 0
    assert selection.scores.num_rows == (0 if value is None else 24)


def test_fewer_learnable_prompts_than_wanted(tmp_path, caplog):
    def rare(completions, row, **kwargs):
        return [r if i < 3 else 0.0 for r, i in zip(parity_reward(completions), row, strict=True)]

    trainer = make_trainer(tmp_path, config(), reward=rare, num_train_epochs=2)
    trainer.train()
    assert set(trainer._get_train_sampler().schedule.log[1].indices) <= {0, 1, 2}
    assert "prompts are learnable, fewer than `num_prompts` (8)" in caplog.text


def test_unscorable_prompts_are_out_of_the_pool(tmp_path):
    def patchy(completions, row, **kwargs):
        scores = parity_reward(completions)
        values = [None, math.nan, math.inf]
        return [
            values[r] if r < 3 else (None if r == 5 and j % 2 else s)
            for j, (s, r) in enumerate(zip(scores, row, strict=True))
        ]

    selection = select_prompts(make_trainer(tmp_path, reward=patchy), config())
    assert selection.provenance["unscorable"] == [0, 1, 2]
    assert selection.scores["index"].to_pylist() == list(range(3, 24))
    assert "pool 24 (3 unscorable: no finite reward)" in selection.summary()
    rate = selection.scores["success_rate"].to_pylist()[2]
    assert 0 <= rate <= 1 and (rate * 4) % 1 == 0  # over the four rollouts that were scored


def broken_reward(answer):
    def broken(completions, **kwargs):
        if isinstance(answer, Exception):
            raise answer
        return answer(completions)

    return broken


def in_a_loop(function):
    async def broken(**kwargs):
        await asyncio.sleep(0.001)
        return function(**kwargs)

    return broken


@pytest.mark.parametrize("wrapper", [lambda function: function, in_a_loop], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (ZeroDivisionError("by the grader"), "ZeroDivisionError: by the grader"),
        (lambda completions: [1.0], "ValueError: it returned 1 rewards for 16 completions"),
        (lambda completions: [1.0] * 99, "ValueError: it returned 99 rewards for 16 completions"),
        (lambda completions: None, "TypeError"),
        (lambda completions: ["good"] * len(completions), "TypeError: reward 0 is 'good', a str, not a number"),
        (lambda completions: [[1.0, 2.0]] * len(completions), "TypeError"),
    ],
)
def test_a_reward_function_that_fails_is_named_with_its_cause(tmp_path, answer, cause, wrapper, tally):
    tally["nonsense: reward functions"] += 1
    trainer = make_trainer(tmp_path, reward=wrapper(broken_reward(answer)))
    functions = list(trainer.reward_funcs)
    with pytest.raises(RewardError, match=rf"`broken` failed: {cause}.*Correct it and run again") as caught:
        select_prompts(trainer, config())
    assert type(caught.value.__cause__).__name__ in cause
    assert trainer.reward_funcs == functions
    assert not list(tmp_path.rglob("selection.json"))


def test_no_scorable_prompt_at_all(tmp_path, caplog):
    def silent(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, config(), reward=silent, num_train_epochs=2)
    trainer.train()
    selection = Selection.load(next((tmp_path / "learnalign").glob("step-*")))
    assert selection.provenance["unscorable"] == list(range(24)) and selection.scores.num_rows == 0
    assert "No prompt could be scored" in caplog.text and "24 unscorable" in selection.summary()


def test_threshold_is_met_by_a_reward_that_equals_it(tmp_path):
    def near(completions, **kwargs):
        return [0.9 if value else 0.1 for value in parity_reward(completions)]

    choice = config(success_threshold=0.9)
    selection = select_prompts(make_trainer(tmp_path, reward=near), choice)
    assert 0.2 < selection.mean_success_rates()[0] < 0.8


def test_a_sampler_given_to_two_trainers(tmp_path):
    sampler = LearnAlignSampler(config())
    stock = make_trainer(tmp_path)
    LearnAlignCallback(stock, sampler)
    with pytest.raises(ValueError, match="already belongs to a trainer"):
        LearnAlignCallback(make_trainer(tmp_path), sampler)
    with pytest.raises(ValueError, match="already belongs to a trainer"):
        LearnAlignGRPOTrainer(
            model=make_model(),
            reward_funcs=digit_reward,
            args=grpo_args(tmp_path),
            train_dataset=make_dataset(),
            processing_class=make_tokenizer(),
            train_sampler=sampler,
        )


def test_wrong_types(tmp_path):
    with pytest.raises(TypeError, match="`train_sampler` must be a LearnAlignSampler, but is a SequentialSampler"):
        from torch.utils.data import SequentialSampler

        LearnAlignGRPOTrainer(train_sampler=SequentialSampler([1]))
    with pytest.raises(TypeError, match="`sampler` must be a LearnAlignSampler, but is a Sampler"):
        LearnAlignCallback(make_trainer(tmp_path), Sampler())
    with pytest.raises(TypeError, match=r"works on a trl.GRPOTrainer, .* but got a str"):
        select_prompts("trainer", config())


def test_dataset_exchanged_after_the_sampler_was_given(tmp_path):
    trainer = make_trainer(tmp_path, config(), num_train_epochs=2)
    trainer.train_dataset = make_dataset(30)
    with pytest.raises(ValueError, match="has 30 rows, but had 24"):
        trainer.train()


def test_images_need_the_score_that_takes_no_gradients(tmp_path):
    dataset = make_dataset().add_column("image", [None] * 24)
    with pytest.raises(ValueError, match="images.*score='learnability'"):
        make_trainer(tmp_path, config(), dataset=dataset)
    make_trainer(tmp_path, config(score="learnability"), dataset=dataset)


def test_resume_from_a_checkpoint_without_learnalign(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="checkpoint of step 2 holds no LearnAlign state"):
        make_trainer(tmp_path, config(), max_steps=9).train(resume_from_checkpoint=True)


def test_resume_with_another_batch_size(tmp_path):
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, config(), **kwargs).train()
    with pytest.raises(ValueError, match="chunk_prompts was 4 and is 2.*number of processes"):
        other = make_trainer(tmp_path, config(), per_device_train_batch_size=8, **kwargs)
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resume_with_another_dataset(tmp_path):
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, config(), **kwargs).train()
    dataset = make_dataset()
    for other in (dataset.select(range(23, -1, -1)), dataset.map(lambda row: {"prompt": row["prompt"] + "0"})):
        with pytest.raises(ValueError, match="dataset has other rows, or the same in another order"):
            make_trainer(tmp_path, config(), dataset=other, **kwargs).train(resume_from_checkpoint=True)
    # the same rows made in another way are the same dataset
    same = Dataset.from_list(dataset.select(range(23, -1, -1)).to_list()).select(range(23, -1, -1))
    make_trainer(tmp_path, config(), dataset=same, **kwargs).train(resume_from_checkpoint=True)


def test_async_reward(tmp_path):
    async def slow_reward(completions, **kwargs):
        await asyncio.sleep(0.001)
        return parity_reward(completions)

    fast = select_prompts(make_trainer(tmp_path / "fast", reward=parity_reward), config())
    slow = select_prompts(make_trainer(tmp_path / "slow", reward=slow_reward), config())
    assert slow.scores.equals(fast.scores)


def test_resume_that_would_not_skip(tmp_path):
    kwargs = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, config(), **kwargs).train()
    with pytest.raises(ValueError, match="`ignore_data_skip=True` starts the epoch over"):
        make_trainer(tmp_path, config(), ignore_data_skip=True, **kwargs).train(resume_from_checkpoint=True)


def test_restart_with_a_used_optimizer(tmp_path):
    import torch

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[3, 4]])).logits.sum().backward()
    optimizer.step()
    trainer = LearnAlignGRPOTrainer(
        model=model,
        reward_funcs=digit_reward,
        args=grpo_args(tmp_path, num_train_epochs=2),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        optimizers=(optimizer, None),
        train_sampler=LearnAlignSampler(config(after_warmup="restart")),
    )
    with pytest.raises(ValueError, match="optimizer given to the trainer has a state"):
        trainer.train()


def test_restart_with_a_reference_policy_that_follows(tmp_path):
    make_model().save_pretrained(tmp_path / "policy")
    kwargs = {"model": str(tmp_path / "policy"), "peft": False, "beta": 0.1, "sync_ref_model": True}
    with pytest.raises(ValueError, match="after_warmup='restart'.*sync_ref_model=True.*Set `sync_ref_model=False`"):
        make_trainer(tmp_path, config(after_warmup="restart", score="learnability"), **kwargs)
    make_trainer(tmp_path, config(score="learnability"), **kwargs)


def test_restart_without_its_first_weights(tmp_path):
    kwargs = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, config(after_warmup="restart"), **kwargs).train()
    (tmp_path / "_learnalign" / "initial.safetensors").unlink()
    trainer = make_trainer(tmp_path, config(after_warmup="restart"), **kwargs)
    with pytest.raises(FileNotFoundError, match=r"initial.safetensors.*after_warmup='restart'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_stock_trainer_still_works_after_an_error(tmp_path):
    """An error in a selection puts the trainer back."""

    def broken(completions, **kwargs):
        raise RuntimeError("no reward today")

    trainer = make_trainer(tmp_path, reward=broken)
    attributes = set(vars(trainer))
    modes = [module.training for module in trainer.model.modules()]
    with pytest.raises(RuntimeError, match="no reward today"):
        select_prompts(trainer, config())
    assert set(vars(trainer)) == attributes
    assert modes == [module.training for module in trainer.model.modules()]
    assert trainer.num_generations == 4


def test_dataset_without_prompts_is_refused_before_a_model_is_loaded(tmp_path):
    """GSM8K has `question` and `answer`. An environment may supply the prompts instead."""
    rows = make_dataset().rename_column("prompt", "question")
    with pytest.raises(
        ValueError, match=r"no column `prompt`. Its columns are: question, row. Rename.*--prompt_column"
    ):
        LearnAlignGRPOTrainer("no/such/model", parity_reward, train_dataset=rows, train_sampler=LearnAlignSampler())
    with pytest.raises(ValueError, match="no column `prompt`"):
        select_prompts(make_trainer(tmp_path, dataset=rows, max_steps=1), config())

    class Environment:
        def reset(self, **kwargs):
            return "1+1="

    with pytest.raises(OSError, match="no/such/model"):  # goes on to the model
        LearnAlignGRPOTrainer(
            *("no/such/model", parity_reward),
            args=grpo_args(tmp_path),
            train_dataset=rows,
            environment_factory=Environment,
            train_sampler=LearnAlignSampler(config()),
        )


def reward_of(function):
    """With the name `own`."""

    def own(prompts, completions, completion_ids, **kwargs):
        return function(completions, kwargs)

    return own


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions, row: [missing for _ in completions], "NameError"),  # noqa: F821
        (lambda completions, row: [re.findall("[0-9]", [c]) for c in completions], "TypeError: .*'list'"),
        (lambda completions, row: ["1.0"] * 4, "TypeError: reward 0 is '1.0', a str, not a number"),
        (lambda completions, row: 0.5, "TypeError: it returned 0.5, a float, in place of a list of rewards"),
        (lambda completions, row: "0000", "TypeError: it returned '0000', a str, in place of a list of rewards"),
        (lambda completions, row: [0.0] * 3, "it returned 3 rewards for 4 completions"),
        (lambda completions, row: [{}] * 4, "TypeError: reward 0 is {}, a dict, not a number"),
    ],
)
def test_a_reward_function_that_cannot_work_is_found_before_the_forward_over_the_pool(
    tmp_path, function, message, capsys
):
    """After the plan, so that one sees what is under way."""
    trainer = make_trainer(tmp_path, online(prompt_features=True), reward=reward_of(function), max_steps=1)
    forwards = []
    trainer.model.register_forward_pre_hook(lambda *args: forwards.append(1))
    with pytest.raises(
        RewardError, match=rf"`own` failed on a made-up completion of row 0, before training: .*{message}"
    ):
        trainer.train()
    output = capsys.readouterr().out
    assert not forwards and "from length, hidden states" in output and "first a forward" in output


def test_a_reward_function_that_lacks_an_argument_is_found_before_the_forward(tmp_path):
    def own(completions, answer, **kwargs):
        return [0.0] * len(completions)

    trainer = make_trainer(tmp_path, online(prompt_features=True), reward=own, max_steps=1)
    with pytest.raises(RewardError, match="before training: TypeError: .*missing 1 required positional argument"):
        trainer.train()


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, row: [int(c) for c in completions],
        lambda completions, row: [c.split("=")[1] for c in completions],
        lambda completions, row: [re.search("[0-9]", c).group() for c in completions],
        lambda completions, row: [{"0": 1.0}[c[0]] for c in completions],
        lambda completions, row: [eval(c) for c in completions],
        lambda completions, row: [dict(re.findall("(answer)=(.*)", c))["answer"] for c in completions],
        lambda completions, row: [json.loads(f'"{c}"').get("answer") for c in completions],
    ],
)
def test_an_exception_that_the_made_up_completion_may_be_the_cause_of_is_a_warning(tmp_path, function, caplog):
    try_rewards(find_host(make_trainer(tmp_path, reward=reward_of(function))), 0)
    assert f"when it was tried with the completion '{COMPLETION}'" in caplog.text


async def asked_for(completions, row, **kwargs):
    return [None, True, np.float32(0.5), torch.tensor(1)]


def test_a_trial_leaves_no_trace_and_has_the_shape_of_training(tmp_path):
    seen = []

    def looks(prompts, completions, completion_ids, row, log_metric, trainer_state, **kwargs):
        seen.append((prompts, completions, row))
        log_metric("mine", 1.0)
        return [random.random() for _ in completions]

    dataset = make_dataset(conversational=True)
    trainer = make_trainer(tmp_path, reward=[looks, asked_for], dataset=dataset)
    state, metrics = random.getstate(), str(trainer._metrics)
    try_rewards(find_host(trainer), 0)
    message = [{"role": "assistant", "content": COMPLETION}]
    assert seen == [([dataset[0]["prompt"]] * 4, [message] * 4, [0] * 4)]
    assert random.getstate() == state and str(trainer._metrics) == metrics
    trainer._metrics["train"].clear()
    trainer.rollout_func = lambda prompts, trainer: None  # which may add arguments
    try_rewards(find_host(trainer), 0)
    assert len(seen) == 1
