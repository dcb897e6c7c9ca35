"""
Writes docs/results.md from benchmarks/results/*.json, so that nobody types a number, and the table of docs/configuration.md
from the docstring of LearnAlignConfig.

    python benchmarks/render.py [--check]
"""

import json
import re
import sys
from dataclasses import fields
from pathlib import Path

from trl_learnalign.config import LearnAlignConfig, explanations


ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "random": "random prompts",
    "filter": "success-rate filter",
    "learnability": "learnability alone",
    "alignment": "alignment alone",
    "learnalign": "LearnAlign",
}


def load(name):
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def arms_table(results) -> str:
    conditions, summary = results["conditions"], results["summary"]
    lines = [
        "| trained on | held-out success | over random prompts |",
        "| --- | --- | --- |",
        f"| nothing | {results['before']:.3f} | |",
    ]
    for arm, values in summary.items():
        gap = ""
        if arm != "random":
            gap = f"{values['over_random']:+.3f} +- {values['standard_error']:.3f}"
        lines.append(f"| {NAMES[arm]} | {values['success']:.3f} | {gap} |")
    seeds = summary["random"]["seeds"]
    steps = {run["steps"] for run in results["runs"]}
    lines += [
        "",
        f"Mean over {seeds} seeds; the error is the standard error of the paired difference over seeds. "
        f"{conditions['data'][0].upper() + conditions['data'][1:]}, a pool of {conditions['pool']}, "
        f"{conditions['num_prompts']} prompts, {steps.pop()} steps of 32 prompts, of which 2 are warm-up and 1 was read ahead by the dataloader; {conditions['test']} "
        f"held-out prompts x {conditions['samples']} samples at temperature 1. Measured on a CPU with "
        f"{conditions['threads']} thread by `benchmarks/demo_arms.py`; {versions_of(conditions)}.",
    ]
    return "\n".join(lines)


def cost_table(results) -> str:
    runs = [run for run in results["runs"] if run["arm"] == "learnalign"]

    def median(values):
        return sorted(values)[len(values) // 2]

    rollouts = median([run["phases"]["rollouts"] for run in runs])
    gradients = median([run["phases"]["gradients"] for run in runs])
    scores = median([run["phases"]["scores"] for run in runs])
    share = median([run["learnable"] / results["conditions"]["pool"] for run in runs])
    return "\n".join(
        [
            "| phase of a selection | median seconds | relative to the rollouts |",
            "| --- | --- | --- |",
            f"| rollouts | {rollouts:.1f} | 1 |",
            f"| gradients | {gradients:.1f} | {gradients / rollouts:.2f} |",
            f"| scores | {scores:.2f} | {scores / rollouts:.3f} |",
            "",
            f"The same runs; {100 * share:.0f} % of the pool was learnable. A backward costs about two forwards. Generation with a "
            "tiny model on a CPU is fast, so the gradients are a large part of the cost here. On a GPU this has not been measured.",
        ]
    )


def length_table(results) -> str:
    lines = ["| score | mean completion length of the chosen | of the pool |", "| --- | --- | --- |"]
    for arm in ("learnability", "alignment", "learnalign"):
        runs = [run for run in results["runs"] if run["arm"] == arm]
        chosen, pool = (sum(run[key] for run in runs) / len(runs) for key in ("chosen_length", "pool_length"))
        lines.append(f"| {NAMES[arm]} | {chosen:.2f} tokens | {pool:.2f} |")
    return "\n".join(lines)


def versions_of(results) -> str:
    return ", ".join(f"{name} {number}" for name, number in results["versions"].items())


def gradients_table(results) -> str:
    conditions = results["conditions"]
    lines = [
        "| way to a microbatch's per-prompt gradients | time | FLOPs | peak memory | numbers per prompt | error of cosines |",
        "| --- | --- | --- | --- | --- | --- |",
        "| a plain backward, which gives no per-prompt gradients | 1 | 1 | 1 | | |",
    ]
    rows = list(results["ways"].items())
    rows += [(f"{name}, gradient checkpointing", row) for name, row in results["checkpointed"].items()]
    for name, row in rows:
        error = f"{row['cosine_error']:.1g}" if row["cosine_error"] > 1e-6 else "< 1e-6"
        lines.append(
            f"| {name} | {row['time']:.2f} | {row['flops']:.3f} | {row['memory']:.2f} | {row['features']:,} | {error} |"
        )
    sketch = "; ".join(f"{int(dim):,}: {ratio:.2f}" for dim, ratio in results["sketch"].items())
    lines += [
        "",
        "Ratios to a plain backward of the same microbatch, in the same round, median; rows with gradient checkpointing "
        "are relative to a plain backward with it. The error is the root mean square difference of the prompts' cosines "
        "from the exact ones. If a package gives a gradient per row, they are summed per prompt. bergson generates its "
        "projections on the CPU here; a GPU does this faster. A loop with one exact backward per prompt is cheap on a CPU, "
        "because small batches fit its caches. The dense projection of its gradients is expensive.",
        "",
        f"{conditions['prompts']} prompts x {conditions['rollouts_per_prompt']} rollouts x {conditions['tokens']} tokens, "
        f"a model of the shape `{conditions['shape']}` with random weights in {conditions['dtype']}, LoRA r = "
        f"{conditions['lora_rank']} on all linear layers ({conditions['lora_parameters']:,} weights); "
        f"{conditions['machine']}, {conditions['threads']} thread; the plain backward took "
        f"{results['plain']['plain_seconds']:.2f} s; {versions_of(conditions)}.",
        "",
        f"Time of the sketch alone by `projection_dim`, relative to the shortest: {sketch}.",
    ]
    return "\n".join(lines)


def unequal_table(results) -> str:
    conditions = results["conditions"]
    lines = ["| rows of a microbatch | time relative to a plain backward | peak memory |", "| --- | --- | --- |"]
    lines += [f"| {name} | {row['time']:.2f} | {row['memory']:.2f} |" for name, row in results["ways"].items()]
    lines += [
        "",
        f"Medians of {conditions['rounds']} rounds; {conditions['prompts']} groups with {conditions['rows']} rows of "
        f"{conditions['tokens']} tokens (and {conditions['rows'] // 8} of 8), the same model; {conditions['machine']}, 1 thread; "
        f"{versions_of(conditions)}. Measured by `benchmarks/unequal.py`.",
    ]
    return "\n".join(lines)


def gpu_section() -> str:
    if not (RESULTS / "gradients_cuda.json").is_file():
        return "Not measured on a GPU yet. `python benchmarks/gradients.py --peers --device cuda --shape qwen2.5-1.5b` does this."
    results = load("gradients_cuda")
    plain = results["plain"]
    share = f", {100 * plain['share_of_peak_flops']:.0f} % of the card's peak" if plain["share_of_peak_flops"] else ""
    return (
        f"{gradients_table(results)}\n\nA prompt takes {plain['milliseconds_per_prompt']:.0f} ms, its rollouts' forward and "
        f"backward included{share}."
    )


def scale_table(million, processes, rollouts) -> str:
    return "\n".join(
        [
            "| what | measured |",
            "| --- | --- |",
            f"| scores of {million['prompts']:,} prompts at d = {million['dim']:,} from the disk | "
            f"{million['score_seconds']:.0f} s, {million['ratio']:.2f} x reading the {million['bytes'] / 1e9:.0f} GB once |",
            f"| additional memory for that | {million['resident_bytes'] / 1e6:.0f} MB |",
            f"| memory of one process with the rollouts of {rollouts['prompts']:,} prompts, {rollouts['rollouts']} of {rollouts['tokens']:,} "
            f"tokens each, up to the rows of their gradients | {rollouts['resident_bytes'] / 1e6:.0f} MB over the start |",
            f"| on the disk for that | {rollouts['bytes'] / 1e9:.1f} GB in {rollouts['files']} files, by {rollouts['fsyncs']:,} fsyncs, one for "
            f"{rollouts['batch']} prompts |",
            f"| gradients on two processes against one | {processes['speedup']:.2f} x the prompts per second; "
            f"two unconnected processes on this machine: {processes['limit']:.2f} x |",
            "",
            f"By `benchmarks/million.py` (median of {million['rounds']} rounds, page cache emptied), `benchmarks/rollout_memory.py` and "
            f"`benchmarks/processes.py` (median of {processes['rounds']} rounds, a thread each); {processes['machine']}; "
            f"{versions_of(processes)}.",
        ]
    )


def robustness_table(counts) -> str:
    lines = ["| fault | on one process | on two processes |", "| --- | --- | --- |"]
    moments = sorted({name.split(": ")[1] for name in counts if name.startswith("kills")})
    for moment in moments:
        one, two = (counts.get(f"kills of {number}: {moment}", 0) for number in (1, 2))
        lines.append(f"| killed: {moment} | {one} | {two} |")
    one, two = (sum(counts.get(f"kills of {n}: {moment}", 0) for moment in moments) for n in (1, 2))
    lines.append(f"| killed, in all | {one} | {two} |")
    lines.append(f"| an error on one process | | {counts['failures on one of two processes']} |")
    nonsense = ", ".join(
        f"{number} {name.split(': ')[1]}" for name, number in counts.items() if name.startswith("nonsense")
    )
    return "\n".join(
        [
            *lines,
            "",
            "Every killed run, once resumed, gave the same result as an uninterrupted run. Every error on one process ended "
            f"both processes, with its cause. Invalid input, each time with a clear error or the right result: {nonsense}. "
            "Selections were also made on 1, 2 and 4 processes from pools whose size is not a multiple of that. The tests count "
            "the faults; `benchmarks/robustness.py` collects the counts.",
        ]
    )


def projection_table(results) -> str:
    lines = [
        "| `projection_dim` | Spearman with the exact score | kept of the exact top quarter |",
        "| --- | --- | --- |",
    ]
    for row in results["rows"]:
        name = f"{row['dim']:,}" + (" (default)" if row["dim"] == results["default"] else "")
        lines.append(f"| {name} | {row['spearman']:.4f} | {100 * row['top_quarter']:.0f} % |")
    lines += [
        "",
        f"{results['data'][0].upper() + results['data'][1:]}, {results['learnable']} learnable prompts of {results['pool']}, "
        f"{results['lora_parameters']:,} LoRA weights, after four steps of training; by `benchmarks/projection.py`.",
    ]
    return "\n".join(lines)


def loss_table(results) -> str:
    lines = [
        "| ranking | gradient of dapo instead of grpo: Spearman | kept of the top quarter | other rollouts: Spearman | kept of the top quarter |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        cells = (f"{row[key]['spearman']:.3f} | {100 * row[key]['top_quarter']:.0f} %" for key in ("loss", "rollouts"))
        lines.append(f"| {NAMES[row['score']]} | {' | '.join(cells)} |")
    loss, other = (results["rows"][0][key]["learnable"] for key in ("loss", "rollouts"))
    lines += [
        "",
        "Gradients are those of the trainer's loss ([which](how_it_works.md#the-loss)); without a KL term and with all tokens every loss has "
        "the direction of `grpo`, a mean over each completion as in the paper, or of `dapo`, a sum over tokens and TRL's default. "
        "On the left both gradients are of the same rollouts; on the right both are of `grpo`, from other rollouts of the same policy. Not measured with long completions. "
        f"{results['data'][0].upper() + results['data'][1:]}, a pool of {results['pool']}, {loss} of them learnable ({other} in "
        f"both draws), completions of {results['completion_length']} tokens on average, exact gradients, after four steps of "
        f"training; by `benchmarks/loss_types.py`, {results['threads']} thread; {versions_of(results)}.",
    ]
    return "\n".join(lines)


def policy_table(results) -> str:
    grpo = results["grpo"]
    seeds = ", ".join(f"{run['before']:.3f} to {run['after']:.3f}" for run in grpo["runs"])
    rows = [
        ("parameters", f"{results['parameters']:,}"),
        ("success at temperature 1, test", f"{results['test_sampled_success']:.3f}"),
        ("success of greedy decoding, test", f"{results['test_greedy_success']:.3f}"),
        (
            "train prompts neither always nor never solved in 8 rollouts",
            f"{100 * results['train_share_neither_always_nor_never_solved_in_8']:.1f} %",
        ),
        (
            f"stock GRPO on {grpo['settings']['train_prompts']:,} random prompts, {grpo['settings']['passes']:.0f} passes",
            f"{seeds} (mean lift {100 * grpo['mean_lift']:.1f} points)",
        ),
    ]
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows), ""]
    lines += [
        f"{results['dataset']}: {results['train_rows']:,} train and {results['test_rows']:,} test rows; measured on "
        f"{results['test_rows_measured']} test rows x {results['samples_per_row']} samples and "
        f"{results['train_prompts_measured']:,} train prompts, by `benchmarks/tiny_policy.py`; {versions_of(results)}."
    ]
    return "\n".join(lines)


def configuration_page() -> str:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    texts = explanations()
    for one in fields(LearnAlignConfig):
        default = f'"{one.default}"' if isinstance(one.default, str) else one.default
        rows.append(f"| `{one.name}` | `{default}` | {texts[one.name].replace('|', '&#124;')} |")
    table = "\n".join(rows)
    return re.sub(
        r"(<!-- fields.*-->\n).*(<!-- end)", lambda marks: f"{marks[1]}\n{table}\n\n{marks[2]}", page, flags=re.S
    )


def documents() -> dict[Path, str]:
    arms, policy = load("demo_arms"), load("tiny_policy")
    page = f"""# Results, and how they were measured

This page is written by `benchmarks/render.py` from `benchmarks/results/`. `make bench DATASET=DIR` measures all of it again,
`make bench-costs` what a selection costs.

## Equal training on different prompts

{arms_table(arms)}

Every run: `python benchmarks/demo_arms.py --dataset_path DIR`.

## What a selection costs

{cost_table(arms)}

## Per-prompt gradients, compared with other packages

{gradients_table(load("gradients_cpu"))}

{unequal_table(load("unequal_cpu"))}

{gpu_section()}

## Large pools, several processes

{scale_table(load("million"), load("processes"), load("rollout_memory"))}

## Fault injection, in numbers

{robustness_table(load("robustness"))}

## Length of what is chosen

{length_table(arms)}

## Projected against exact scores

{projection_table(load("projection"))}

## The gradient by loss

{loss_table(load("loss_types"))}

## The tiny policy

{policy_table(policy)}
"""
    return {ROOT / "docs" / "results.md": page, ROOT / "docs" / "configuration.md": configuration_page()}


def main():
    stale = [
        path for path, text in documents().items() if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        if stale:
            sys.exit(
                f"Not what the results and the docstring say: {', '.join(path.name for path in stale)}. Run benchmarks/render.py."
            )
        return
    for path in stale:
        path.write_text(documents()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
