"""
Per-prompt LoRA gradients of one microbatch: this package beside what people would use instead.

    python benchmarks/gradients.py [--peers] [--device cuda] [--shape qwen2.5-1.5b]

Every way takes the gradient of the same objective over the same tokens of the same model (random weights). Times are
medians of ratios to a plain backward in the same round; floating point operations are those of matrix products, as
torch counts them; memory is the peak of what a call allocates. `--peers` needs benchmarks/requirements.txt.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign.gradients import PromptGradients
from trl_learnalign.projection import Sketch
from trl_learnalign.rollouts import Row, policy_objective


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
LESS_DIM, BERGSON_SIDE, DIM = 8192, 16, 32768
DIMS = (1024, 4096, 16384, 65536)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the makers' data sheets


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


# Ways to per-prompt gradients: a function of nothing that returns features of shape (P, d), and whether these are exact


def flat_gradient(model):
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def plain_way(trainer, groups, arguments):
    rows = [row for group in groups for row in group]

    def run():
        policy_objective(trainer, rows).backward()
        trainer.model.zero_grad()

    return run


def our_way(dim):
    def build(trainer, groups, arguments):
        engine = PromptGradients(trainer.model, dim, 0)
        rows, counts = [row for group in groups for row in group], [len(group) for group in groups]

        def run():
            with engine:
                return engine.collect(counts, arguments.tokens, lambda: policy_objective(trainer, rows))

        return run

    return build


def loop_way(trainer, groups, arguments):
    def run():
        features = []
        for group in groups:
            policy_objective(trainer, group).backward()
            features.append(flat_gradient(trainer.model))
            trainer.model.zero_grad()
        return torch.stack(features)

    return run


def less_way(trainer, groups, arguments):
    """A backward per prompt, then a dense random projection, which LESS makes anew for every 16 gradients."""
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    device = trainer.accelerator.device
    projector = BasicProjector(size, LESS_DIM, 0, ProjectionType.rademacher, device, block_size=128)
    gradients = loop_way(trainer, groups, arguments)

    def run():
        return torch.cat([projector.project(part, model_id=0) for part in gradients().split(16)])

    return run


def vmap_way(trainer, groups, arguments):
    """With an objective of its own, as TRL's cannot be mapped."""
    model, device, start = trainer.model, trainer.accelerator.device, arguments.tokens // 4
    ids = torch.tensor([[[*row.prompt_ids, *row.completion_ids] for row in group] for group in groups], device=device)
    factors = [[row.advantage * row.weight / len(row.completion_ids) for row in group] for group in groups]
    factors = torch.tensor(factors, device=device)[..., None]
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    positions = torch.arange(arguments.tokens, device=ids.device)[None]
    causal = torch.full((arguments.tokens, arguments.tokens), -1e9, device=ids.device).triu(1)[None, None]
    causal = causal.to(arguments.dtype)

    def objective(parameters, ids, factors):
        output = torch.func.functional_call(
            model,
            parameters,
            (ids,),
            {"attention_mask": causal, "position_ids": positions, "use_cache": False},
        )
        logps = output.logits[:, start - 1 : -1].float() / trainer.temperature
        logps = logps.log_softmax(-1).gather(2, ids[:, start:, None])[..., 0]
        return (factors * logps).sum()

    per_prompt = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0, 0))

    def run():
        gradients = per_prompt(trained, ids, factors)
        return torch.cat([gradients[name].flatten(1).float() for name in trained], 1)

    return run


def opacus_way(trainer, groups, arguments):
    """Its gradients are per row; the rows of a prompt are added."""
    from opacus.grad_sample import GradSampleModule

    rows = [row for group in groups for row in group]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]

    def run():
        wrapped = GradSampleModule(trainer.model, strict=False, loss_reduction="sum")
        policy_objective(trainer, rows).backward()
        parts = [p.grad_sample.view(len(groups), GROUP, -1).sum(1).float() for p in trained]
        for p in trained:
            p.grad = p.grad_sample = None
        wrapped.to_standard_module()
        return torch.cat(parts, 1)

    return run


def bergson_way(dim, target):
    """Its gradients are per row; the rows of a prompt are added, which its linear projections allow."""

    def build(trainer, groups, arguments):
        from bergson.collector.gradient_collectors import GradientCollector
        from bergson.config import IndexConfig
        from bergson.gradients import GradientProcessor

        model = trainer.model
        rows = [row for group in groups for row in group]
        names = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad]
        collector = GradientCollector(
            model=model.base_model.model,
            data=Dataset.from_dict({"input_ids": [[0]] * len(rows)}),
            cfg=IndexConfig(run_path=arguments.scratch),
            processor=GradientProcessor(projection_dim=dim, projection_target=target),
            target_modules={name.removeprefix("base_model.model.") for name in names},
            skip_index=True,
        )

        def run():
            with collector:
                policy_objective(trainer, rows).backward()
                collector.finalize_global_projection()
                parts = list(collector.mod_grads.values())
                if dim is None:
                    order = [name.removeprefix("base_model.model.") for name in names]
                    parts = [collector.mod_grads[name] for name in order]
                collector.mod_grads.clear()
            model.zero_grad()
            return torch.cat([part.view(len(groups), GROUP, -1).sum(1).float() for part in parts], 1)

        return run

    return build


OURS = {f"learnalign, d = {DIM:,}": our_way(DIM), "learnalign, exact": our_way(None)}
PEERS = {
    "loop, exact": loop_way,
    f"loop and dense projection as in LESS (traker), d = {LESS_DIM:,}": less_way,
    "torch.func.vmap, exact": vmap_way,
    "opacus, exact": opacus_way,
    "bergson, exact": bergson_way(None, "per_module"),
    f"bergson, per module {BERGSON_SIDE} x {BERGSON_SIDE}": bergson_way(BERGSON_SIDE, "per_module"),
    f"bergson, global, d = {DIM:,}": bergson_way(DIM, "global"),
}


# Measures


def synchronize(arguments):
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def seconds(way, arguments):
    synchronize(arguments)
    started = time.perf_counter()
    way()
    synchronize(arguments)
    return time.perf_counter() - started


def peak_bytes(call, arguments):
    """Peak of the memory that `call` holds above what was held before."""
    if arguments.device == "cuda":
        synchronize(arguments)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize(arguments)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cosines(features):
    unit = torch.nn.functional.normalize(features.double().cpu())
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=bool)]


def measure(ways, trainer, groups, arguments):
    """Ratios of every way to the plain pass."""
    plain = plain_way(trainer, groups, arguments)
    plain()
    with FlopCounterMode(display=False) as counter:
        plain()
    flops, memory = counter.get_total_flops(), peak_bytes(plain, arguments)
    exact = loop_way(trainer, groups, arguments)()
    built, results = {}, {}
    for name, build in ways.items():
        way = build(trainer, groups, arguments)
        features = way()
        with FlopCounterMode(display=False) as counter:
            way()
        built[name] = way
        results[name] = {
            "flops": counter.get_total_flops() / flops,
            "memory": peak_bytes(lambda build=build: build(trainer, groups, arguments)(), arguments) / memory,
            "features": features.shape[1],
        }
        if features.shape == exact.shape:
            results[name]["relative_error"] = float((features - exact).norm() / exact.norm())
        results[name]["cosine_error"] = float((cosines(features) - cosines(exact)).square().mean().sqrt())
    times = {name: [] for name in built}
    plain_seconds = []
    for n in range(arguments.rounds):
        for name, way in built.items():
            if n < 3 or times[name][-1] < 3:  # the slow ones take three rounds
                base = seconds(plain, arguments)
                plain_seconds.append(base)
                times[name].append(seconds(way, arguments) / base)
    for name, ratios in times.items():
        results[name]["time"] = statistics.median(ratios)
        print(name, json.dumps(results[name]), flush=True)
    return {"plain_seconds": statistics.median(plain_seconds), "plain_flops": flops, "plain_bytes": memory}, results


def measure_sketch(trainer, groups, arguments):
    """Time of the sketch alone, of the gradients of one microbatch, relative to the shortest."""
    sizes = {name: p.numel() for name, p in trainer.model.named_parameters() if p.requires_grad}
    device = trainer.accelerator.device
    gradients = {name: torch.randn(len(groups), size, device=device) for name, size in sizes.items()}
    sketches = {dim: Sketch(sizes, dim, 0, device) for dim in DIMS}

    def run(dim):
        out = torch.zeros(len(groups), dim, device=device)
        for name, gradient in gradients.items():
            sketches[dim].add_(out, name, slice(None), gradient)

    run(DIMS[0])
    times = {dim: [] for dim in DIMS}
    for _ in range(5 * arguments.rounds):
        base = seconds(lambda: run(DIMS[0]), arguments)
        for dim in DIMS:
            times[dim].append(seconds(lambda dim=dim: run(dim), arguments) / base)
    return {dim: statistics.median(ratios) for dim, ratios in times.items()}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="store_true", help="measure the others too")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--rank", type=int, help="of the LoRA; default: 8, or 16 for the large shape")
    parser.add_argument("--prompts", type=int, help="in the microbatch; default: 16, or 4 for the large shape")
    parser.add_argument("--tokens", type=int, help="of a rollout; default: 64, or 512 for the large shape")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    large = arguments.shape != "small"
    arguments.dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    arguments.rank = arguments.rank or (16 if large else 8)
    arguments.prompts = arguments.prompts or (4 if large else 16)
    arguments.tokens = arguments.tokens or (512 if large else 64)
    arguments.output = arguments.output or ROOT / "benchmarks" / "results" / f"gradients_{arguments.device}.json"
    torch.set_num_threads(arguments.threads)

    with tempfile.TemporaryDirectory() as scratch:
        arguments.scratch = str(Path(scratch) / "index")
        trainer = build_trainer(arguments, scratch)
        groups = draw_groups(arguments)
        plain, results = measure(OURS | (PEERS if arguments.peers else {}), trainer, groups, arguments)
        sketch = measure_sketch(trainer, groups, arguments)
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        _, checkpointed = measure(OURS, trainer, groups, arguments)
    if arguments.device == "cuda":
        peak = next((flops for name, flops in PEAK_FLOPS.items() if name in machine("cuda")), None)
        ours = plain["plain_seconds"] * results[f"learnalign, d = {DIM:,}"]["time"]
        plain["milliseconds_per_prompt"] = 1000 * ours / arguments.prompts
        plain["share_of_peak_flops"] = peak and plain["plain_flops"] / ours / peak
    document = {
        "conditions": {
            "machine": machine(arguments.device),
            "cpu_count": os.cpu_count(),
            "threads": arguments.threads,
            "shape": arguments.shape,
            "dtype": str(arguments.dtype).removeprefix("torch."),
            "lora_rank": arguments.rank,
            "lora_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            "prompts": arguments.prompts,
            "rollouts_per_prompt": GROUP,
            "tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "versions": installed(
                ("torch", "transformers", "trl", "peft", "trl-learnalign", "traker", "bergson", "opacus")
            ),
        },
        "plain": plain,
        "ways": results,
        "checkpointed": checkpointed,
        "sketch": sketch,
    }
    arguments.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
