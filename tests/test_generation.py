"""TRL's ways to generate, and what they do to dropout."""

import pytest
import torch
from tiny import config, lora, make_tokenizer, make_trainer, parity_reward
from transformers import OPTConfig, OPTForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler, callback
from trl_learnalign.gradients import PromptGradients


@pytest.fixture
def selecting(monkeypatch):
    """Counts the dropouts in a selection, and those that are on; the modes of all modules before and after."""
    seen = {"dropouts": 0, "active": 0, "modes": [], "on": False}
    select, dropout = callback.select_at_stage, torch.nn.functional.dropout

    def counted(input, p=0.5, training=True, inplace=False):
        if seen["on"]:
            seen["dropouts"] += 1
            seen["active"] += training and p > 0
        return dropout(input, p, training, inplace)

    def modes(trainer):
        return {name: module.training for name, module in trainer.model.named_modules()}

    def select_watched(trainer, *args):
        before, seen["on"] = modes(trainer), True
        selection = select(trainer, *args)
        seen["on"] = False
        seen["modes"].append((before, modes(trainer)))
        return selection

    monkeypatch.setattr(callback, "select_at_stage", select_watched)
    monkeypatch.setattr(torch.nn.functional, "dropout", counted)
    return seen


WAYS = {
    "transformers": {},
    "transformers, checkpointing": {"gradient_checkpointing": True},
    "continuous batching": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256},
    },
    "rollout function": {},
    "layers with dropout of their own": {"gradient_checkpointing": True},
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
    if way == "layers with dropout of their own":
        sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}
        vocabulary = {"vocab_size": len(make_tokenizer()), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
        kwargs["model"] = OPTForCausalLM(
            OPTConfig(**sizes, **vocabulary, num_hidden_layers=2, max_position_embeddings=64, dropout=0.2)
        )
        kwargs["peft"] = lora(lora_dropout=0.2, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(tmp_path, choice, **kwargs, **WAYS[way])
    if way == "rollout function":
        trainer.rollout_func = RolloutFunction()
    trainer.train()
    (selection,) = (entry for entry in trainer.state.log_history if "learnalign/stage" in entry)
    assert selection["learnalign/selected_prompts"] == 4 and 0 < selection["step"] < 3
    assert selecting["dropouts"] > 14 * 8 and selecting["active"] == 0
    ((before, after),) = selecting["modes"]
    assert before == after


def test_layers_still_checkpoint_their_activations_in_a_selection(tmp_path, monkeypatch):
    """Each runs twice for a gradient: once forward, and again in the backward."""
    runs, collect = [], PromptGradients.collect
    kwargs = {"reward": parity_reward, "gradient_checkpointing": True, "peft": lora(lora_dropout=0.2)}
    trainer = make_trainer(tmp_path, config(num_prompts=4, warmup_prompts=4, candidate_prompts=8), max_steps=3, **kwargs)
    (*_, layer) = (module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer))

    def collected(*args):
        count = []
        hook = layer.register_forward_pre_hook(lambda module, args: count.append(module.training))
        part = collect(*args)
        hook.remove()
        runs.append(count)
        return part

    monkeypatch.setattr(PromptGradients, "collect", collected)
    trainer.train()
    assert len(runs) >= 2 and all(count == [False, False] for count in runs)


def test_tools_with_a_vllm_of_several_processes(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.use_vllm, trainer.vllm_mode, trainer.vllm_tensor_parallel_size = True, "colocate", 2
    trainer.tools = [print]
    with pytest.raises(ValueError, match="`vllm_tensor_parallel_size` is 2, which TRL cannot combine with tools"):
        LearnAlignCallback(trainer, LearnAlignSampler(config()))
    trainer.vllm_mode = "server"  # which has a size of its own
    LearnAlignCallback(trainer, LearnAlignSampler(config()))
