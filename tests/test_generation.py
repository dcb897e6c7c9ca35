"""TRL's ways to generate, and what they do to dropout."""

from types import SimpleNamespace

import pytest
import torch
from tiny import config, lora, make_tokenizer, make_trainer, parity_reward
from transformers import OPTConfig, OPTForCausalLM
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from trl_learnalign import LearnAlignCallback, LearnAlignSampler, Selection, callback
from trl_learnalign.ground.randomness import random_state, set_random_state


@pytest.fixture
def selecting(monkeypatch):
    """Counts the dropouts in a selection, and those in train mode; the modes of all modules before and after."""
    seen = {"dropouts": 0, "active": 0, "modes": [], "on": False}
    select, forward = callback.select_at_stage, torch.nn.Dropout.forward

    def counted(module, input):
        if seen["on"]:
            seen["dropouts"] += 1
            seen["active"] += module.training and module.p > 0
        return forward(module, input)

    def modes(trainer):
        return {name: module.training for name, module in trainer.model.named_modules()}

    def select_watched(trainer, *args):
        before, seen["on"] = modes(trainer), True
        selection = select(trainer, *args)
        seen["on"] = False
        seen["modes"].append((before, modes(trainer)))
        return selection

    monkeypatch.setattr(callback, "select_at_stage", select_watched)
    monkeypatch.setattr(torch.nn.Dropout, "forward", counted)
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
    assert selecting["dropouts"] > 14 * 8 and selecting["active"] == 0
    ((before, after),) = selecting["modes"]
    assert before == after


def test_dropout_in_layers_that_checkpoint_their_activations(tmp_path):
    """They stay in train mode, or they would not checkpoint. The scores are those of a model without dropout."""
    sizes = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    vocabulary = {"vocab_size": len(make_tokenizer()), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    scores = {}
    for dropout in (0.0, 0.2):
        torch.manual_seed(0)
        model = OPTForCausalLM(OPTConfig(**sizes, **vocabulary, max_position_embeddings=64, dropout=dropout))
        kwargs = {"model": model, "peft": lora(target_modules=["q_proj", "v_proj"]), "reward": parity_reward}
        choice = config(num_prompts=4, warmup_prompts=0, candidate_prompts=8)
        path = tmp_path / str(dropout)
        torch.manual_seed(0)
        trainer = make_trainer(path, choice, max_steps=1, gradient_checkpointing=True, **kwargs)
        modes = []

        def note(layer, args, modes=modes):
            modes.append((layer.training, layer.gradient_checkpointing))

        for layer in (module for module in model.modules() if isinstance(module, OPTDecoderLayer)):
            layer.register_forward_pre_hook(note)
        trainer.train()
        assert modes.count((True, True)) > 4  # the step of training has two or, where hooks run again, four
        scores[dropout] = Selection.load(path / "learnalign" / "step-000000").scores.to_pandas()
    for column in ("success_rate", "alignment", "gradient_norm"):
        assert scores[0.2][column].tolist() == pytest.approx(scores[0.0][column].tolist(), rel=1e-5, nan_ok=True), (
            column
        )
    assert scores[0.0]["gradient_norm"].notna().any()


def test_tools_with_a_vllm_of_several_processes(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args.use_vllm, trainer.args.vllm_mode, trainer.args.vllm_tensor_parallel_size = True, "colocate", 2
    trainer.tools, trainer._last_loaded_step = [print], -1
    with pytest.raises(ValueError, match="`vllm_tensor_parallel_size` is 2, which TRL cannot combine with tools"):
        LearnAlignCallback(trainer, LearnAlignSampler(config()))
    trainer.args.vllm_mode = "server"  # which has a size of its own
    LearnAlignCallback(trainer, LearnAlignSampler(config()))


def test_random_states_of_all_kinds_of_devices_are_put_back(monkeypatch):
    """`set_seed` seeds them; torch has one generator for some of them, and one for each device of others."""
    state = {"xpu": [3, 4], "mps": 5}
    xpu = SimpleNamespace(
        is_available=lambda: True,
        get_rng_state_all=lambda: list(state["xpu"]),
        set_rng_state_all=lambda states: state.update(xpu=states),
    )
    mps = SimpleNamespace(get_rng_state=lambda: state["mps"], set_rng_state=lambda one: state.update(mps=one))
    monkeypatch.setattr(torch, "xpu", xpu)
    monkeypatch.setattr(torch, "mps", mps)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    before, number = random_state(), torch.rand(1)
    state.update(xpu=[0, 0], mps=0)
    set_random_state(before)
    assert state == {"xpu": [3, 4], "mps": 5} and torch.equal(torch.rand(1), number)
