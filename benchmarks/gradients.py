"""
Per-prompt LoRA gradients of one microbatch: this package beside what people would use instead.

    python benchmarks/gradients.py [--peers] [--device cuda --shape qwen2.5-1.5b]

Every way takes the gradient of the same objective over the same tokens of the same model (random weights). Times are
medians of ratios to a plain backward in the same round; floating point operations are those of matrix products, as
torch counts them; memory is the peak of what a call allocates. `--peers` needs benchmarks/requirements.txt.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peers import DIM, OURS, PEERS, loop_way, plain_way
from torch.utils.flop_counter import FlopCounterMode
from workload import GROUP, ROOT, SHAPES, build_trainer, draw_groups, installed, machine, peak_bytes

from trl_learnalign.gradients.sketch import Sketch


DIMS = (1024, 4096, 16384, 65536)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the makers' data sheets


def synchronize(arguments):
    if arguments.device == "cuda":
        torch.cuda.synchronize()


def seconds(way, arguments):
    synchronize(arguments)
    started = time.perf_counter()
    way()
    synchronize(arguments)
    return time.perf_counter() - started


def cosines(features):
    unit = torch.nn.functional.normalize(features.double().cpu())
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=bool)]


def measure(ways, trainer, groups, arguments):
    """Ratios of every way to the plain pass."""
    plain = plain_way(trainer, groups, arguments)
    plain()
    with FlopCounterMode(display=False) as counter:
        plain()
    flops, memory = counter.get_total_flops(), peak_bytes(plain, arguments.device)
    exact = loop_way(trainer, groups, arguments)()
    built, results = {}, {}
    for name, build in ways.items():
        way = build(trainer, groups, arguments)
        with FlopCounterMode(display=False) as counter:
            features = way()
        built[name] = way
        results[name] = {
            "flops": counter.get_total_flops() / flops,
            "memory": peak_bytes(lambda build=build: build(trainer, groups, arguments)(), arguments.device) / memory,
            "features": features.shape[1],
        }
        if features.shape == exact.shape:
            results[name]["relative_error"] = float((features - exact).norm() / exact.norm())
        results[name]["cosine_error"] = float((cosines(features) - cosines(exact)).square().mean().sqrt())
    times = {name: [] for name in built}
    plain_seconds = []
    for n in range(arguments.rounds):
        for name, way in built.items():
            if n < max(1, 30 // (times[name] or [1.0])[-1]):  # fewer rounds for the slow
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
    sketches = {dim: Sketch(sizes, dim, 0) for dim in DIMS}

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
