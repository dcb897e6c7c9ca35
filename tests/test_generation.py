"""TRL's ways to generate, and what they leave behind: modes, images."""

import pytest
import torch
from tiny import config, lora, make_trainer, parity_reward

from trl_learnalign import callback


@pytest.fixture
def selecting(monkeypatch):
    """Notes every dropout that is on in a forward of a selection, and the modes of all modules before and after."""
    seen = {"forwards": 0, "active": 0, "modes": [], "on": False}
    select = callback.select_at_stage

    def watch(module, args, output):
        if seen["on"]:
            seen["forwards"] += 1
            seen["active"] += module.training

    def modes(trainer):
        return {name: module.training for name, module in trainer.model.named_modules()}

    def select_watched(trainer, *args):
        dropouts = [module for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)]
        assert len(dropouts) == 14 and all(module.p == 0.2 for module in dropouts)
        hooks = [module.register_forward_hook(watch) for module in dropouts]
        before, seen["on"] = modes(trainer), True
        selection = select(trainer, *args)
        seen["on"] = False
        seen["modes"].append((before, modes(trainer)))
        for hook in hooks:
            hook.remove()
        return selection

    monkeypatch.setattr(callback, "select_at_stage", select_watched)
    return seen


WAYS = {
    "transformers": {},
    "transformers, checkpointing": {"gradient_checkpointing": True},
    "continuous batching": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
    },
    "rollout function": {},
}


class RolloutFunction:
    """Of a user who leaves the policy in train mode, then in eval mode, in turn."""

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, trainer):
        assert trainer.model.training  # else TRL would take this for an evaluation
        tokenizer, model = trainer.processing_class, trainer.model
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        outputs = [model.generate(torch.tensor([one]), max_new_tokens=2, do_sample=True)[0].tolist() for one in ids]
        self.calls += 1
        model.train(self.calls % 2 == 1)
        completions = [output[len(one) :] for one, output in zip(ids, outputs, strict=True)]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


@pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, of experimental features
@pytest.mark.parametrize("way", WAYS)
def test_dropout_is_off_in_a_selection_whatever_generates(tmp_path, selecting, way):
    choice = config(num_prompts=4, warmup_prompts=4, candidate_prompts=8)
    kwargs = {"reward": parity_reward, "peft": lora(lora_dropout=0.2), "max_steps": 3}
    trainer = make_trainer(tmp_path, choice, **kwargs, **WAYS[way])
    if way == "rollout function":
        trainer.rollout_func = RolloutFunction()
    trainer.train()
    (selection,) = (entry for entry in trainer.state.log_history if "learnalign/stage" in entry)
    assert selection["learnalign/selected_prompts"] == 4 and 0 < selection["step"] < 3
    assert selecting["forwards"] > 14 * 8 and selecting["active"] == 0
    ((before, after),) = selecting["modes"]
    assert before == after
