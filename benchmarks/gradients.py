"""
Per-prompt LoRA gradients of one microbatch: this package beside what people would use instead.

    python benchmarks/gradients.py [--peers] [--device cuda --shape qwen2.5-1.5b]

Every way takes the gradient of the same objective over the same tokens of the same model (random weights). Times are
medians of ratios to a plain backward in the same round; floating point operations are those of matrix products, as
torch counts them; memory is the peak of what a call allocates. `--peers` needs benchmarks/requirements.txt.
"""

import json
import statistics
import tempfile
from pathlib import Path

import harness
import torch
from peers import DIM, OURS, PEERS, loop_way, plain_way
from workload import GROUP, SHAPES, build_trainer, conditions, draw_groups, flops, peak_bytes, seconds

from trl_learnalign.gradients.sketch import Sketch


DIMS = (1024, 4096, 16384, 65536)
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, from the makers' data sheets


def cosines(features):
    unit = torch.nn.functional.normalize(features.double().cpu())
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=bool)]


def measure(ways, trainer, groups, arguments):
    """Ratios of every way to the plain pass."""
    plain = plain_way(trainer, groups, arguments)
    plain()
    operations, memory = flops(plain)[0], peak_bytes(plain, arguments.device)
    exact = loop_way(trainer, groups, arguments)()
    built, results = {}, {}
    for name, build in ways.items():
        built[name] = build(trainer, groups, arguments)
        counted, features = flops(built[name])
        results[name] = {
            "flops": counted / operations,
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
                base = seconds(plain, arguments.device)
                plain_seconds.append(base)
                times[name].append(seconds(way, arguments.device) / base)
    for name, ratios in times.items():
        results[name]["time"] = statistics.median(ratios)
        print(name, json.dumps(results[name]), flush=True)
    plain = {"plain_seconds": statistics.median(plain_seconds), "plain_flops": operations, "plain_bytes": memory}
    return plain, results


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
        base = seconds(lambda: run(DIMS[0]), device.type)
        for dim in DIMS:
            times[dim].append(seconds(lambda dim=dim: run(dim), device.type) / base)
    return {dim: statistics.median(ratios) for dim, ratios in times.items()}


def main():
    arguments = harness.options(
        __doc__,
        {"device": ("cpu", "cuda"), "shape": SHAPES, "dtype": ("float32", "bfloat16")},
        peers=(False, "measure the others too"),
        device="cpu",
        shape="small",
        dtype=(str, "default: bfloat16 on a GPU"),
        rank=(int, "of the LoRA; default: 8, or 16 for the large shape"),
        prompts=(int, "in the microbatch; default: 16, or 4 for the large shape"),
        tokens=(int, "of a rollout; default: 64, or 512 for the large shape"),
        rounds=9,
        threads=1,
        output=Path,
    )
    large = arguments.shape != "small"
    arguments.dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    arguments.rank = arguments.rank or (16 if large else 8)
    arguments.prompts = arguments.prompts or (4 if large else 16)
    arguments.tokens = arguments.tokens or (512 if large else 64)
    arguments.output = arguments.output or harness.RESULTS / f"gradients_{arguments.device}.json"
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
        card = torch.cuda.get_device_name()
        peak = next((number for name, number in PEAK_FLOPS.items() if name in card), None)
        ours = plain["plain_seconds"] * results[f"learnalign, d = {DIM:,}"]["time"]
        plain["milliseconds_per_prompt"] = 1000 * ours / arguments.prompts
        plain["share_of_peak_flops"] = peak and plain["plain_flops"] / ours / peak
    found = conditions(
        arguments,
        *("threads", "shape", "prompts", "tokens", "rounds"),
        dtype=str(arguments.dtype).removeprefix("torch."),
        lora_rank=arguments.rank,
        lora_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        rollouts_per_prompt=GROUP,
    )
    document = {
        "conditions": found | {"versions": harness.versions("trl-learnalign", "traker", "bergson", "opacus")},
        "plain": plain,
        "ways": results,
        "checkpointed": checkpointed,
        "sketch": sketch,
    }
    harness.write(arguments.output, document)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
