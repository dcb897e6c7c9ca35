"""SDPOTrainer, experimental in TRL, as the host: chunks chosen online, selections, the gradient of its policy loss."""

import warnings

import numpy as np
import pytest
import torch
from test_losses import assert_same_direction, backward_of_loss, batch_of, features, padded, whole_or_masked
from test_training import stock_trainer_fed
from tiny import (
    Seen,
    assert_same_weights,
    config,
    digit_reward,
    graded_reward,
    make_trainer,
    online,
    parity_reward,
    weights,
)
from transformers import TrainerCallback

from trl_learnalign import LearnAlignMixin, select_prompts
from trl_learnalign.host import find_host


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of everything experimental
    sdpo = pytest.importorskip("trl.experimental.sdpo", exc_type=ImportError)
    if not hasattr(sdpo.SDPOTrainer, "_prepare_training_batch"):
        pytest.skip("this version of TRL has an SDPOTrainer of another make", allow_module_level=True)


class Mine(LearnAlignMixin, sdpo.SDPOTrainer):
    """As the docs have it."""


def odd(completions, row, **kwargs):
    """Makes groups of odd rows live and those of even rows dead, whatever the policy writes."""
    return [float(r % 2 and place % 2) for place, r in enumerate(row)]


def test_chunks_are_chosen_from_the_rewards_of_training(tmp_path):
    """All are observed, and a resumed run is the run."""
    settings = {"cls": Mine, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    settings |= {"teacher_model_kind": "base"}  # with a LoRA adapter TRL cannot resume its default, "ema"
    whole = make_trainer(tmp_path, online(), reward=(seen := Seen(odd)), **settings)
    whole.train()
    rows = list(seen.rows)
    live = [entry["learnalign/live_fraction"] for entry in whole.state.log_history if "loss" in entry]
    assert len(rows) == 6 * 16 and live == [np.mean(np.array(rows[i : i + 16]) % 2) for i in range(0, 96, 16)]
    resumed = make_trainer(tmp_path, online(), reward=seen, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen.rows[96:] == rows[48:]
    assert_same_weights(weights(resumed), weights(whole))


class Told(TrainerCallback):
    """Counts the generations that the trainer tells its callbacks of."""

    generations = 0

    def on_generation_prompts_selected(self, args, state, control, **kwargs):
        self.generations += 1


@pytest.mark.parametrize(("weight", "score"), [(1.0, "learnability"), (0.0, "learnalign")])
def test_a_training_is_that_of_a_stock_trainer_with_the_same_prompts(tmp_path, weight, score):
    """By learnability with the self-distillation loss, by gradients with the policy loss."""
    kwargs = {"distillation_weight": weight, "max_steps": 8, "num_train_epochs": 2, "reward": parity_reward}
    kwargs |= {"steps_per_generation": 2, "per_device_train_batch_size": 8}
    choice = config(score=score, candidate_prompts=12, warmup_prompts=4)
    trainer = make_trainer(tmp_path / "run", choice, cls=Mine, **kwargs)
    trainer.add_callback(told := Told())
    trainer.train()
    (_, chosen) = trainer._get_train_sampler().schedule.log
    assert len(chosen.indices) == 8 and 0 < chosen.start_chunk < 4
    assert told.generations == 8 / 2  # for training, not for the selection
    stock = stock_trainer_fed(trainer._get_train_sampler(), tmp_path / "stock", sdpo.SDPOTrainer, **kwargs)
    stock.train()
    assert_same_weights(weights(trainer), weights(stock))


def test_gradients_of_self_distillation_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`distillation_weight` is 1.0.*score='learnability'.*schedule='online'"):
        make_trainer(tmp_path, config(), cls=Mine)
    with pytest.raises(ValueError, match="`distillation_weight` is 0.5"):
        select_prompts(make_trainer(tmp_path, cls=Mine, distillation_weight=0.5), config())
    trainer = make_trainer(tmp_path, cls=Mine, distillation_weight=0.0)
    trainer._compute_policy_loss = lambda inputs, logits: logits.sum()
    with pytest.raises(ValueError, match="Mine has its own `_compute_policy_loss`, so its gradients may differ"):
        select_prompts(trainer, config())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_the_trainer(tmp_path, scale):
    settings = {"scale_rewards": scale, "reward_weights": [1.0, 0.25], "mask_truncated_completions": True}
    trainer = make_trainer(tmp_path, cls=Mine, reward=[graded_reward, digit_reward], seed=3, **settings)
    host, outputs, generate = find_host(trainer), [], trainer._prepare_training_batch
    trainer._prepare_training_batch = lambda inputs: outputs.append(generate(inputs)) or outputs[-1]
    with host.left_as_found(4):
        drawn = host.generate(trainer.train_dataset, [0, 2, 5, 9], 1)
    rewards = torch.tensor(np.array([group.rewards for group in drawn]))
    theirs = outputs[0]["advantages"].view(4, 4).double()
    torch.testing.assert_close(host.advantages(rewards, torch.zeros(4, 4)), theirs, rtol=1e-4, atol=1e-5)
    assert theirs.abs().sum() > 0 and "old_per_token_logps" not in outputs[0]
    masks = [mask.tolist() for group in drawn for mask in group.loss_masks]
    assert any(not any(mask) for mask in masks) and any(any(mask) for mask in masks)


def gradient_of_training(trainer, rows):
    """Backward of SDPOTrainer's loss on a batch of these rows."""
    return backward_of_loss(trainer, batch_of(rows) | {"completion_mask": padded([row.loss_mask for row in rows])})


def test_the_gradient_is_that_of_the_policy_loss(tmp_path):
    trainer = make_trainer(tmp_path, cls=Mine, temperature=0.7, distillation_weight=0.0)
    for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo"):
        for level in ("token", "sequence"):
            trainer.loss_type, trainer.importance_sampling_level = loss_type, level
            ours, made = features(trainer, whole_or_masked(), tmp_path / f"{loss_type} {level}"), whole_or_masked()
            for index, rows in made.items():
                expected = gradient_of_training(trainer, rows)
                assert_same_direction(ours[index], expected)
                if loss_type == "grpo":
                    torch.testing.assert_close(ours[index], expected, rtol=1e-4, atol=1e-6)
