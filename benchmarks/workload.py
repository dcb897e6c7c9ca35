"""A model of random weights, a trainer around it, and rollouts: what the cost benchmarks run on."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign.host.groups import Row


ROOT = Path(__file__).resolve().parent.parent
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
GROUP = 8


def build_trainer(arguments, output_dir):
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[arguments.shape], max_position_embeddings=4096, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config).to(arguments.dtype)
    args = GRPOConfig(
        output_dir=output_dir,
        use_cpu=arguments.device == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        report_to="none",
        save_strategy="no",
    )
    # Random B: the gradient of A is 0 where B is, which would flatter every projection
    lora = LoraConfig(r=arguments.rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * GROUP}),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "examples" / "assets" / "tiny-policy"),
        peft_config=lora,
    )
    trainer.model.train()  # there is no dropout
    return trainer


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


def machine(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def installed(names):
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def save_results(output, values):
    """Writes what a benchmark has measured, and on what, and prints it."""
    versions = installed(("torch", "transformers", "trl", "peft", "trl-learnalign"))
    text = json.dumps(values | {"machine": machine("cpu"), "versions": versions}, indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    print(text)


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
