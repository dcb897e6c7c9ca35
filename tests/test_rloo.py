"""RLOOTrainer as the host: its selections, its advantages and its gradient against its own."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from test_losses import assert_same_direction, backward_of_loss, batch_of, features, logps_of, padded, whole_or_masked
from test_training import stock_trainer_fed
from tiny import (
    assert_same_weights,
    config,
    digit_reward,
    graded_reward,
    make_dataset,
    make_model,
    make_trainer,
    parity_reward,
    weights,
)
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignMixin, LearnAlignSampler, Selection, select_prompts
from trl_learnalign.host import find_host, generation
from trl_learnalign.host.groups import Row


class Mine(LearnAlignMixin, RLOOTrainer):
    """As the docs have it."""


@pytest.mark.parametrize("score", ["learnalign", "learnability", "alignment", "random", "target"])
def test_a_training_is_that_of_a_stock_trainer_with_the_same_prompts(tmp_path, score):
    kwargs = {"num_train_epochs": 2, "num_iterations": 2, "reward": parity_reward}
    more = {"target_dataset": make_dataset(6)} if score == "target" else {}
    trainer = make_trainer(tmp_path / "run", config(score=score, **more), cls=Mine, **kwargs)
    trainer.train()
    (_, chosen) = trainer._get_train_sampler().schedule.log
    assert len(chosen.indices) == 8 and trainer.state.global_step > chosen.start_chunk
    stock = stock_trainer_fed(trainer._get_train_sampler(), tmp_path / "stock", RLOOTrainer, **kwargs)
    stock.train()
    assert_same_weights(weights(trainer), weights(stock))
    (step,) = (tmp_path / "run/learnalign").glob("step-*")
    table = Selection.load(step).scores.to_pandas()
    if score in ("learnalign", "alignment", "target"):
        assert (table["gradient_norm"] > 0).sum() == (table["learnability"] > 0).sum() > 20


def test_a_resumed_run_is_the_run(tmp_path):
    kwargs = {"cls": Mine, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "steps_per_generation": 2}
    kwargs |= {"per_device_train_batch_size": 8}
    whole = make_trainer(tmp_path, config(), **kwargs)
    whole.train()
    for step in (2, 4):
        resumed = make_trainer(tmp_path, config(), **kwargs)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed._get_train_sampler().schedule.log == whole._get_train_sampler().schedule.log
        assert_same_weights(weights(resumed), weights(whole))


def test_the_callback_on_a_trainer_already_built(tmp_path):
    trainer = make_trainer(tmp_path, cls=RLOOTrainer, num_train_epochs=2)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config())))
    trainer.train()
    assert len(trainer._get_train_sampler().schedule.log) == 2


def partly(completions, row, **kwargs):
    """Some rollouts have no reward, of one prompt all but one."""
    rewards = graded_reward(completions)
    return [
        None if (i % 7 == 3 or (r == 2 and i % 4)) else reward
        for i, (r, reward) in enumerate(zip(row, rewards, strict=True))
    ]


SETTINGS = {
    "plain": {"beta": 0.0},
    "KL term": {"beta": 0.3},
    "clipped": {"beta": 0.0, "reward_clip_range": (0.2, 0.5)},
    "clipped, then KL term": {"beta": 0.3, "reward_clip_range": (0.2, 0.5)},
    "normalized": {"beta": 0.3, "normalize_advantages": True},
    "two rewards": {"beta": 0.3, "reward_weights": [1.0, 0.25]},
    "truncated completions masked": {"beta": 0.3, "mask_truncated_completions": True},
}


def penalty(trainer, reference, group):
    """beta times log pi - log pi_ref of each completion, one after another, with the plain forward of the model."""

    def log_probability(model, prompt, completion, mask):
        ids = torch.tensor([[*prompt, *completion]])
        logps = (model(ids).logits[0, :-1] / trainer.temperature).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return (logps[-len(completion) :] * torch.tensor(mask)).sum()

    found = []
    for rollout in zip(group.prompt_ids, group.completion_ids, group.loss_masks, strict=True):
        with torch.no_grad(), reference() as other:
            reference_logp = log_probability(other, *rollout)
        with torch.no_grad():
            found.append(trainer.beta * (log_probability(trainer.model, *rollout) - reference_logp))
    return torch.stack(found)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("peft", [True, False])
def test_advantages_and_penalties_are_those_of_the_trainer(tmp_path, name, peft):
    settings = {"temperature": 0.7, "seed": 3} | SETTINGS[name]
    reward = [partly, digit_reward] if "two" in name else partly
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    model.config._name_or_path = str(tmp_path / "model")  # where the trainer finds the reference of a full fine-tuning
    trainer = make_trainer(tmp_path, cls=RLOOTrainer, reward=reward, peft=peft, model=model, **settings)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    host, outputs, generate = find_host(trainer), [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: outputs.append(generate(inputs)) or outputs[-1]
    with host.left_as_found(4):
        drawn = host.generate(trainer.train_dataset, [0, 2, 5, 9], 1)
    rewards = torch.tensor(np.array([group.rewards for group in drawn]))
    penalties = torch.tensor(np.array([group.penalties for group in drawn]))
    theirs = outputs[0]["advantages"].view(4, 4).double()
    torch.testing.assert_close(host.advantages(rewards, penalties), theirs, rtol=1e-4, atol=1e-5)
    assert theirs.abs().sum() > 0 and (theirs == 0).any() == (len(host.reward_names) == 1)
    assert ((outputs[0]["completion_mask"].sum(1) == 0).any().item()) == ("masked" in name)
    reference = trainer.model.disable_adapter if peft else lambda: nullcontext(trainer.ref_model)

    @contextmanager
    def reference_policy():
        with reference() as other:
            yield trainer.model if peft else other

    if trainer.beta:
        slow = torch.stack([penalty(trainer, reference_policy, group) for group in drawn])
        torch.testing.assert_close(penalties, slow, rtol=1e-4, atol=1e-5)
        assert slow.abs().max() > 0.01
    else:
        assert not penalties.any()


def test_no_reference_is_run_where_no_gradient_is_taken(tmp_path):
    trainer, forwards = make_trainer(tmp_path, cls=RLOOTrainer, beta=0.3), []
    logps = trainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: forwards.append(len(a[1])) or logps(*a, **k)
    select_prompts(trainer, config(score="learnability"))
    assert not forwards
    select_prompts(trainer, config(score="learnalign"))
    rolled_out = sum(forwards[: 2 * 12])  # the policy and the reference, for 24 prompts in batches of two
    assert forwards[:24] == [16] * 24 and rolled_out == 2 * 24 * 8 and len(forwards) > 24


def gradient_of_training(trainer, rows):
    """Backward of RLOOTrainer's loss on a batch of these rows."""
    inputs = batch_of(rows) | {"completion_mask": padded([row.loss_mask for row in rows])}
    inputs["old_logps"] = (logps_of(trainer, inputs) * inputs["completion_mask"]).sum(1)
    return backward_of_loss(trainer, inputs)


def test_the_gradient_is_that_of_the_trainers_loss(tmp_path):
    trainer = make_trainer(tmp_path, cls=RLOOTrainer, temperature=0.7)
    ours, made = features(trainer, whole_or_masked(), tmp_path), whole_or_masked()
    for index, rows in made.items():
        expected = gradient_of_training(trainer, rows)
        torch.testing.assert_close(ours[index], expected, rtol=1e-4, atol=1e-6)
        assert expected.norm() > 0
    batch = gradient_of_training(trainer, [row for rows in made.values() for row in rows])
    assert_same_direction(sum(ours.values()), batch)


def test_the_gradient_of_a_selection_is_that_of_a_step_on_the_group(tmp_path):
    """From generation to gradient norm: each prompt's own batch, with the KL term in its rewards."""
    trainer = make_trainer(tmp_path, cls=RLOOTrainer, beta=0.3, reward=graded_reward, dataset=make_dataset(6))
    host, kept, generate = find_host(trainer), {}, generation.generate_groups

    def keep(*args):
        made = generate(*args)
        kept.update({group.row: group for group in made})
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate_groups", keep)
        choice = config(learnability="variance", projection_dim=None, num_prompts=6)
        table = select_prompts(trainer, choice).to_pandas()
    assert set(kept) == set(range(6)) and (table["learnability"] > 0).all()
    for index, group in kept.items():
        rewards, penalties = torch.tensor(group.rewards)[None], torch.tensor(group.penalties)[None]
        columns = group.prompt_ids, group.completion_ids, group.loss_masks
        parts = zip(*columns, host.advantages(rewards, penalties)[0].tolist(), strict=True)
        rows = [Row(*(part.astype(int) for part in arrays), advantage, 1 / 8) for *arrays, advantage in parts]
        norm = gradient_of_training(trainer, rows).norm().item()
        assert table.loc[index, "gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_images(tmp_path):
    dataset = make_dataset(8).add_column("images", [[]] * 8)
    trainer = make_trainer(tmp_path, cls=RLOOTrainer, dataset=dataset)
    with pytest.raises(ValueError, match="has images, and gradients of multimodal prompts are not supported"):
        select_prompts(trainer, config())


def test_prompt_tokens_are_those_that_training_continues(tmp_path):
    for cls in (RLOOTrainer, GRPOTrainer):
        for conversational in (True, False):
            dataset = make_dataset(12, conversational=conversational)
            trainer = make_trainer(tmp_path, cls=cls, dataset=dataset, chat_template_kwargs={"some": 1})
            host = find_host(trainer)
            with host.left_as_found(1):
                drawn = host.generate(dataset, [3, 11], 0)
            ids = host.prompt_ids([dataset[3], dataset[11]])
            assert ids == [group.prompt_ids[0].tolist() for group in drawn] and len(ids[0]) > 3
            assert host.text(ids[0]).replace(" ", "").endswith("a:" if conversational else "=")


class Neither(LearnAlignMixin, Trainer):
    """A trainer without rollouts."""


def test_another_trainer_is_refused_before_the_model_is_loaded():
    with pytest.raises(TypeError, match="works on a trl.GRPOTrainer, .* is registered for, but got a Neither"):
        Neither(model="no/such/model", train_sampler=LearnAlignSampler())


def test_a_selection_of_the_other_trainer_is_not_reused(tmp_path):
    keys = []
    for cls, changes in ((RLOOTrainer, {}), (RLOOTrainer, {"normalize_advantages": True}), (GRPOTrainer, {})):
        keys.append(select_prompts(make_trainer(tmp_path, cls=cls, beta=0.0, **changes), config()).provenance["key"])
    assert len(set(keys)) == 3
