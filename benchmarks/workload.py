"""A model of random weights, a trainer around it, and rollouts; what a call costs: what cost benchmarks share."""

import time

import harness
import torch
from datasets import Dataset
from policies import GROUP, POLICY, arguments_of, trainer_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from trl_learnalign.host.groups import Row


SHAPES = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
}


def build_trainer(arguments, output_dir):
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[arguments.shape], max_position_embeddings=4096, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config).to(arguments.dtype)
    args = arguments_of(output_dir, use_cpu=arguments.device == "cpu", per_device_train_batch_size=GROUP)
    # Random B: the gradient of A is 0 where B is, which would flatter every projection
    lora = {"r": arguments.rank, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    rows = Dataset.from_dict({"prompt": ["1"] * GROUP})
    trainer = trainer_of((model, AutoTokenizer.from_pretrained(POLICY)), no_reward, args, rows, lora=lora)
    trainer.model.train()  # there is no dropout
    return trainer


def conditions(arguments, *names, **more) -> dict:
    """On what, and with which of the arguments, a cost was measured."""
    found = harness.conditions(**{name: getattr(arguments, name) for name in names}, **more)
    return found | ({"machine": torch.cuda.get_device_name()} if arguments.device == "cuda" else {})


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


def draw_groups(arguments) -> list[list[Row]]:
    """Groups of rollouts of equal length, so that no way computes padding. Prompts share some of their tokens."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[arguments.shape]["vocab_size"]
    prompt, completion = arguments.tokens // 4, arguments.tokens - arguments.tokens // 4
    common = torch.randint(8, vocabulary, (completion,), generator=generator)
    groups = []
    for _ in range(arguments.prompts):
        start = torch.randint(8, vocabulary, (prompt,), generator=generator).numpy()
        rows = []
        for g in range(GROUP):
            own = torch.randint(8, vocabulary, (completion,), generator=generator)
            ids = torch.where(torch.rand(completion, generator=generator) < 0.5, own, common).numpy()
            advantage = float(torch.randn((), generator=generator)) + (1.0 if g % 2 else -1.0)
            rows.append(Row(start, ids, [1] * completion, advantage, 1 / GROUP))
        groups.append(rows)
    return groups


def flops(call):
    """Floating point operations of matrix products; and what the call returns."""
    with FlopCounterMode(display=False) as counter:
        found = call()
    return counter.get_total_flops(), found


def seconds(call, device="cpu"):
    """How long a call takes, a GPU's work included."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started


def peak_bytes(call, device="cpu"):
    """Most memory that `call` holds at a time above what was held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
