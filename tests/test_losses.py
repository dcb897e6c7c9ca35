"""A prompt's gradient is the one that training takes: against the trainer's own loss, for every loss that TRL has."""

import inspect
import re

import numpy as np
import pytest
import torch
from test_gradients import features_of
from tiny import config, make_dataset, make_trainer, online
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler, host, select_prompts
from trl_learnalign.host import find_host, objective
from trl_learnalign.host.groups import Row
from trl_learnalign.host.objective import LOSS_TYPES


SOURCE = inspect.getsource(GRPOTrainer._compute_loss)
# Older versions of TRL take the mean of this loss over the padding, too, unless all of it is one number a sequence
LUSPO_WITH_PADDING = "mask.sum(1, keepdim=True)" in SOURCE


def groups(num=2, seed=0):
    """Of four rollouts of unequal lengths, one with a tool's answer in it and one whose tokens are all masked."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        return torch.randint(3, 20, (length,), generator=generator).tolist()

    tasks = {}
    for index in range(num):
        prompt = tokens(3 + 2 * index)
        lengths = [2, 13, 5 + 9 * index, 7, 4]
        masks = [[1] * length for length in lengths]
        masks[1][4:7] = [0, 0, 0]
        masks[4] = [0] * 4
        advantages = torch.randn(len(lengths), generator=generator).tolist()
        tasks[index] = [
            Row(prompt, tokens(length), mask, advantage, 1 / len(lengths))
            for length, mask, advantage in zip(lengths, masks, advantages, strict=True)
        ]
    return tasks


def whole_or_masked():
    """Groups as RLOO and SDPO have them: of a completion all tokens count, or none."""
    made = groups()
    for rows in made.values():
        for row in rows:
            row.loss_mask = [min(row.loss_mask[:1])] * len(row.loss_mask)
    return made


def padded(sequences, side="right"):
    tensors = [torch.as_tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_side=side)


def batch_of(rows):
    """A batch of these rows as a trainer's loss takes it, padded as training pads it; all tokens count."""
    return {
        "prompt_ids": padded([row.prompt_ids for row in rows], "left"),
        "prompt_mask": padded([[1] * len(row.prompt_ids) for row in rows], "left"),
        "completion_ids": padded([row.completion_ids for row in rows]),
        "completion_mask": padded([[1] * len(row.completion_ids) for row in rows]),
        "advantages": torch.tensor([row.advantage for row in rows]),
    }


def logps_of(trainer, inputs):
    """Log-probabilities of the completions of a batch."""
    arguments = [torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], 1) for kind in ("ids", "mask")]
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(
            trainer.model, *arguments, inputs["completion_ids"].shape[1]
        )[0]


def backward_of_loss(trainer, inputs):
    """Of a batch, with the sign of an objective."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, inputs).backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    trainer.model.zero_grad()
    return -gradient  # the loss falls where the objective rises


def gradient_of_training(trainer, rows):
    """Backward of the trainer's loss on a batch of these rows."""
    inputs = batch_of(rows) | {
        "tool_mask": padded([row.loss_mask for row in rows]),
        "num_items_in_batch": torch.tensor(sum(sum(row.loss_mask) for row in rows)),
    }
    if trainer.beta:
        with trainer.model.disable_adapter():
            inputs["ref_per_token_logps"] = logps_of(trainer, inputs)
    return backward_of_loss(trainer, inputs)


def features(trainer, tasks, tmp_path):
    """As a selection computes them, which leaves out rows without a trained token; in microbatches of a few rows."""
    kept = {index: [row for row in rows if any(row.loss_mask)] for index, rows in tasks.items()}
    return features_of(trainer, kept, tmp_path, max_tokens=50)


def assert_same_direction(ours, theirs):
    assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.9999 and theirs.norm() > 0


def cases():
    for loss_type in LOSS_TYPES:
        for level in ("token", "sequence"):
            for beta, bias_correction in ((0.0, False), (0.3, False), (0.3, True)):
                for quantile in (1.0, 0.5):
                    plain = level == "sequence" and beta == 0.0 and quantile == 1.0
                    if loss_type != "luspo" or plain or not LUSPO_WITH_PADDING:
                        yield loss_type, level, beta, bias_correction, quantile


def test_every_loss_of_the_installed_trl_is_known():
    compared = re.findall(r'self\.loss_type (?:==|in) (\[.*?\]|".*?")', SOURCE)
    assert {name for part in compared for name in re.findall(r'"(\w+)"', part)} == set(LOSS_TYPES)


@pytest.fixture(scope="module")
def shared_trainer(tmp_path_factory):
    return make_trainer(tmp_path_factory.mktemp("trainer"), temperature=0.7)


@pytest.mark.parametrize(("loss_type", "level", "beta", "bias_correction", "quantile"), cases())
def test_the_gradient_is_that_of_the_trainers_loss(
    tmp_path, shared_trainer, loss_type, level, beta, bias_correction, quantile
):
    trainer = shared_trainer
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    trainer.beta, trainer.args.use_bias_correction_kl = beta, bias_correction
    trainer.top_entropy_quantile = quantile
    tasks = groups()
    ours = features(trainer, tasks, tmp_path)
    for index, rows in tasks.items():
        assert_same_direction(ours[index], gradient_of_training(trainer, rows))
    if quantile == 1.0:  # else training's quantile is that of the batch
        # In a batch of several groups they weigh as much as here
        batch = gradient_of_training(trainer, [row for rows in tasks.values() for row in rows])
        assert_same_direction(sum(ours.values()), batch)


@pytest.mark.parametrize("settings", [{"delta": 0.5}, {"delta": 2.0}, {"epsilon_high": 5.0, "loss_type": "cispo"}])
def test_settings_that_cut_ratios(tmp_path, settings):
    trainer = make_trainer(tmp_path, beta=0.3, **settings)
    tasks = groups()
    for index, feature in features(trainer, tasks, tmp_path).items():
        assert_same_direction(feature, gradient_of_training(trainer, tasks[index]))


def test_the_gradient_itself_of_a_batch_of_one_group(tmp_path):
    """Times the factor of losses whose divisor counts the tokens of the batch."""
    for loss_type in LOSS_TYPES:
        level = "sequence" if loss_type == "luspo" else "token"
        trainer = make_trainer(tmp_path / loss_type, loss_type=loss_type, importance_sampling_level=level)
        tasks = groups()
        for index, feature in features(trainer, tasks, tmp_path / loss_type).items():
            expected = gradient_of_training(trainer, tasks[index])
            scale = find_host(trainer).scale_alone(np.mean([sum(row.loss_mask) for row in tasks[index]]))
            assert (scale == 1.0) == (loss_type in ("grpo", "dr_grpo", "luspo", "sapo"))
            torch.testing.assert_close(feature * scale, expected, rtol=1e-4, atol=1e-6)


def test_entropies_are_compared_with_those_of_rollouts_without_an_advantage(tmp_path, monkeypatch):
    """
    Every rollout of a learnable prompt takes part in the quantile, and the mask does not depend on the microbatches.
    """

    def mostly_half(completions, **kwargs):
        return [(0.0, 1.0, *[0.5] * 6)[i % 8] for i in range(len(completions))]

    seen, original = [], objective.policy_objective
    monkeypatch.setattr(
        objective, "policy_objective", lambda trainer, rows: (seen.extend(rows), original(trainer, rows))[1]
    )
    runs = []
    for max_tokens in (30, 400):
        trainer = make_trainer(
            tmp_path / str(max_tokens), reward=mostly_half, dataset=make_dataset(8), top_entropy_quantile=0.5
        )
        choice = config(learnability="variance", max_tokens_per_batch=max_tokens)
        runs.append(select_prompts(trainer, choice).scores.to_pandas())
    assert len(seen) == 2 * 8 * 8 and sum(row.advantage == 0 for row in seen) == 2 * 8 * 6
    kept, tokens = (sum(int(sum(getattr(row, name))) for row in seen) for name in ("entropy_mask", "loss_mask"))
    assert 0.5 * tokens <= kept <= 0.6 * tokens
    assert runs[0]["score"].tolist() == pytest.approx(runs[1]["score"].tolist(), rel=1e-4, abs=1e-7)


def test_out_of_memory_halves_the_entropies(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, top_entropy_quantile=0.5)
    expected = features(trainer, groups(), tmp_path / "whole")
    original = objective.token_entropies

    def too_large(trainer, rows):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(trainer, rows)

    monkeypatch.setattr(objective, "token_entropies", too_large)
    for index, feature in features(trainer, groups(), tmp_path / "halves").items():
        torch.testing.assert_close(feature, expected[index], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("loss_type", "grpo2"), ("importance_sampling_level", "word")])
def test_an_unknown_loss_is_refused_when_the_trainer_is_built(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` is '{value}'.*Use one of .*score='learnability'"):
        make_trainer(tmp_path, config(), **{name: value})
    make_trainer(tmp_path, config(score="learnability"), **{name: value})
    make_trainer(tmp_path, **{name: value})


class Squared(GRPOTrainer):
    """A subclass with a loss of its own, as TRL's experimental ones have."""

    def _compute_loss(self, model, inputs):
        return super()._compute_loss(model, inputs) ** 2


class Logging(GRPOTrainer):
    """A subclass whose override changes no gradient."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_gradients_of_a_loss_that_a_subclass_overrides_are_refused(tmp_path, monkeypatch):
    """In silence they would be those of another loss. What takes no gradients works, and a registered host vouches."""
    monkeypatch.setattr(host, "_HOSTS", dict(host._HOSTS))
    message = "Squared has its own `_compute_loss`, so its gradients may differ from those of GRPOTrainer"
    with pytest.raises(ValueError, match=f"{message}.*score='learnability'.*register_host.Squared, GRPOHost"):
        select_prompts(make_trainer(tmp_path, cls=Squared), config())
    trainer = make_trainer(tmp_path, cls=Squared)
    select_prompts(trainer, config(score="learnability"))
    LearnAlignCallback(trainer, LearnAlignSampler(online()))
    trainer = make_trainer(tmp_path, cls=Logging)
    with pytest.raises(ValueError, match="Logging has its own `compute_loss`"):
        host.find_host(trainer).check_gradients()
    host.register_host(Logging, host.GRPOHost)
    host.find_host(trainer).check_gradients()
    with pytest.raises(ValueError, match="Logging has its own `compute_loss`"):
        monkeypatch.setattr(trainer, "compute_loss", lambda *args: 0)
        host.find_host(trainer).check_gradients()
    with pytest.raises(TypeError, match="`register_host` takes a subclass of Trainer and a subclass of Host, but got"):
        host.register_host(Squared, Squared)


def test_the_nearest_registered_class_decides(tmp_path, monkeypatch):
    class OwnHost(host.GRPOHost):
        pass

    monkeypatch.setattr(host, "_HOSTS", dict(host._HOSTS))
    host.register_host(Squared, OwnHost)

    class Further(Squared):
        pass

    assert host.check_kind(Further) is OwnHost and host.check_kind(Logging) is host.GRPOHost


def test_a_selection_of_another_loss_is_not_reused(tmp_path):
    keys = []
    more = [
        {"loss_type": "grpo"},
        {"top_entropy_quantile": 0.5},
        {"use_bias_correction_kl": True},
        {"loss_type": "dapo"},
    ]
    for changes in ({}, *more):
        settings = {"use_bias_correction_kl": False, "dataset": make_dataset(8)} | changes
        keys.append(select_prompts(make_trainer(tmp_path, **settings), config()).provenance["key"])
    assert len(set(keys)) == 4 and keys[0] == keys[-1]  # dapo is TRL's default
