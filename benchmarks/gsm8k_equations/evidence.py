"""
Writes docs/evidence.md and its figures from benchmarks/results/evidence, so that nobody types a number.

    python benchmarks/gsm8k_equations/evidence.py [--check]

The words are in evidence.md.in; `{{name}}` there stands for what the function `name` of this file or of
measures.py returns.
"""

import sys
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import figures
import measures
import numpy as np
from harness import ROOT
from measures import (
    COMPARED,
    NAMES,
    WARMUP_STEPS,
    difference,
    full_size,
    gap,
    load,
    mean,
    measured,
    points,
    sizes,
    steps_of,
)
from pages import columns, fill, publish, table


PAGE = ROOT / "docs" / "evidence.md"


def arms_table(size: int, step: int) -> str:
    def found(arm, way="sampled"):
        return measured(arm, full_size() if arm == "full" else size, step, way)

    def over(arm, base):
        return "" if arm == base else points(difference(found(arm), measured(base, size, step)))

    labels = {
        "trained on": NAMES.get,
        "seeds": lambda arm: len(found(arm)),
        "success, %": lambda arm: mean(found(arm)),
        "greedy, %": lambda arm: mean(found(arm, "greedy")),
        "over random prompts": lambda arm: over(arm, "random"),
        "over the filter": lambda arm: over(arm, "filter"),
    }
    return columns(labels, [arm for arm in (*COMPARED, "learnalign distinct", "staged", "full") if found(arm)])


def by_size(share: int) -> str:
    """A table for each number of prompts, after a part of the steps."""
    steps = {size: steps_of(size) // share for size in sizes()}
    tables = (f"**{size:,} prompts, {step} steps**\n\n{arms_table(size, step)}" for size, step in steps.items())
    return "\n\n".join(tables)


def warm_up_counted() -> str:
    rows = []
    for size in sizes():
        steps = steps_of(size)
        base = measured("random cold", size, steps)
        arms = [("random cold", steps), *((arm, steps - WARMUP_STEPS) for arm in COMPARED), ("learnalign cold", steps)]
        for arm, step in arms if base else ():
            ours = {seed: found for seed, found in measured(arm, size, step).items() if seed in base}
            if ours:
                over = "" if arm == "random cold" else points(difference(ours, base))
                rows.append([f"{size:,}", str(steps), NAMES[arm], str(len(ours)), mean(ours), over])
    head = "prompts | steps in all | trained on | seeds | success, % | over random prompts without a warm-up"
    return table(head, rows)


def compared_with(size: int, base: str) -> str:
    value = gap("learnalign", base, size)
    words = "is better than" if value[1] > 0 else "is worse than"
    words = words if value[1] > 0 or value[2] < 0 else "is not significantly different from"
    return f"{words} {'the ' * (base == 'filter')}{NAMES[base]} ({points(value)})"


def verdict() -> str:
    """The list of results, one line for each number of prompts."""
    sentences = []
    for size in sizes():
        seeds = len(measured("learnalign", size, steps_of(size)))
        bases = "; ".join(compared_with(size, base) for base in ("random", "filter", "learnability"))
        sentences.append(f"- **{size:,} prompts** ({seeds} seed{'s' * (seeds > 1)}): LearnAlign {bases}.")
    return "\n".join(sentences)


def first_sentence() -> str:
    """The result in a sentence, as the intervals say it."""
    bases = ("filter", "learnability")
    better = [NAMES[base] for base in bases if any(gap("learnalign", base, size)[1] > 0 for size in sizes())]
    if better:
        return f"**On this task LearnAlign is better than {' and '.join(better)} at some number of prompts.**"
    return (
        "**On this task LearnAlign is not better than a plain success-rate filter, nor than learnability alone, at "
        f"any number of prompts measured ({', '.join(f'{size:,}' for size in sizes())}).**"
    )


def together() -> dict:
    """All sizes in one: of each seed and test row the mean over the sizes, which says more than any size alone."""

    def over_sizes(arm):
        runs = [measured(arm, size, steps_of(size)) for size in sizes()]
        seeds = set.intersection(*(set(run) for run in runs))
        return {seed: np.mean([run[seed] for run in runs], axis=0) for seed in seeds}

    found = {arm: over_sizes(arm) for arm in ("random", "learnalign", "filter", "learnability")}
    gains = {arm: difference(values, found["random"]) for arm, values in found.items()}
    added = difference(found["learnalign"], found["learnability"])
    return {arm: points(gain) for arm, gain in gains.items()} | {
        "over_filter": points(difference(found["learnalign"], found["filter"])),
        "over_learnability": points(added),
        "matters": "matters" if gains["learnability"][1] > 0 else "is not shown to matter",
        "helps": "does not help" if added[1] <= 0 else "helps",
    }


def headline() -> dict:
    greedy = mean(measured("none", 0, 0, "greedy"))
    return {"before": mean(measured("none", 0, 0)), "greedy": greedy, "warm": mean(measured("warm-up", 0, 0))}


def seconds_of(arm: str, size: int):
    looks = load("looks.parquet")
    return looks[(looks.arm == arm) & (looks["size"] == size) & (looks.step == steps_of(size))].seconds


def cost(phase: str) -> float:
    return np.median([one[phase] for one in load("runs.json")["costs"] if not one["cold"]])


def costs() -> str:
    values = {"the warm-up": cost("warm_up")}
    values |= {f"{phase} of a selection": cost(phase) for phase in ("rollouts", "gradients", "scores")}
    for size in sizes():
        values[f"training on {size:,} prompts, {steps_of(size)} steps"] = np.median(seconds_of("learnalign", size))
    return table("what | median seconds", [[name, f"{value:.0f}"] for name, value in values.items()])


def same_time() -> str:
    """Success of the longest runs on all prompts without any selection, and of the runs on 500 chosen ones."""

    def minutes(arm, size, *phases):
        seconds = seconds_of(arm, size)
        took = (sum(cost(phase) for phase in ("warm_up", *phases)) + np.median(seconds)) / 60
        return f"{mean(measured(arm, size, steps_of(size)))} % after {took:.0f} minutes ({len(seconds)} seeds)"

    def chosen(size):
        return (
            f"{size:,} prompts chosen by the success-rate filter {minutes('filter', size, 'rollouts')}, by LearnAlign "
            f"{minutes('learnalign', size, 'rollouts', 'gradients', 'scores')}"
        )

    size = full_size()
    return (
        f"Training on all prompts for {steps_of(size)} steps, without a selection, reaches {minutes('full', size)}; "
        f"{'; '.join(chosen(size) for size in sorted({500, max(sizes())}))}."
    )


def spread() -> dict:
    """Spread at 500 prompts: of seeds within an arm, and of the arms' means."""
    found = [[100 * rows.mean() for rows in measured(arm, 500, steps_of(500)).values()] for arm in COMPARED]
    deviations = [np.std(values, ddof=1) for values in found]
    return {"least": min(deviations), "most": max(deviations), "means": np.ptp([np.mean(values) for values in found])}


def coverage() -> float:
    """Share of such intervals that hold the truth, if five seeds are all that varies."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2000, 5))
    means = np.stack([sample[rng.integers(0, 5, (1000, 5))].mean(1) for sample in samples])
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    return np.mean((low <= 0) & (0 <= high))


def tuning() -> str:
    runs = sorted(load("tuning.json")["runs"].items(), key=lambda item: float(item[0]))
    rows = [[f"{float(rate):g}", *(f"{100 * values[p]:.1f}" for p in ("1", "2", "4"))] for rate, values in runs]
    return table("learning rate | 1 pass | 2 passes | 4 passes", rows)


def fallen(arm: str, size: int) -> dict[int, float]:
    """Number of seeds that lost more than 3 points between the last two looks at them."""
    before, after = (measured(arm, size, step) for step in (steps_of(size) - WARMUP_STEPS, steps_of(size)))
    lost = {seed: 100 * (before[seed].mean() - after[seed].mean()) for seed in sorted(before.keys() & after.keys())}
    return {seed: points for seed, points in lost.items() if points > 3}


def falls() -> str:
    found = [
        f"{NAMES[arm]}, {size:,} of them, seed {seed}, {lost:.1f} points"
        for size in sizes()
        for arm in COMPARED
        for seed, lost in fallen(arm, size).items()
    ]
    return "; ".join(found) or "none"


def beware() -> str:
    """Part of the gain over random prompts that comes from the fall of those runs."""
    sentences = []
    for size in sizes():
        seeds, half = fallen("random", size), steps_of(size) // 2
        if not seeds:
            continue
        names = {"filter": "the filter", "learnalign": "LearnAlign"}
        gaps = " and ".join(f"{points(gap(arm, 'random', size, half))} by {name}" for arm, name in names.items())
        lost = f"lost more than 3 points in their last {WARMUP_STEPS} steps ([limits](#limits-of-this-evidence))"
        if any(fallen(arm, size) for arm in ("filter", "learnability", "learnalign")):
            sentences.append(
                f"At {size:,} prompts some runs {lost}. Half-way, after {half} steps, the gain over random prompts is "
                f"{gaps}."
            )
        else:
            sentences.append(
                f"Part of the gain over random prompts at {size:,} is due to runs that got worse: {len(seeds)} of "
                f"{len(measured('random', size, steps_of(size)))} runs on random prompts {lost}, and no run on chosen "
                f"prompts did. Half-way, after {half} steps, the gain is {gaps}."
            )
    return " ".join(sentences)


def not_run() -> str:
    """Runs that the grid names and the results do not hold."""
    done, listed = {(size, arm) for size, _, arm in load("runs.json")["cells"]}, []
    for size in (100, 500, 1000, 2000):
        arms = (*COMPARED, "random cold", "learnalign cold", "staged")
        missing = [NAMES[arm] for arm in arms if (size, arm) not in done]
        listed += [f"{size:,} prompts by {'; by '.join(missing)}"] if missing else []
    return ". ".join(listed) or "nothing"


def conditions() -> dict:
    found = load("runs.json")["conditions"]
    return found | {"versions": ", ".join(f"{name} {number}" for name, number in found["versions"].items())}


def render() -> str:
    names = {"after_warm_up": lambda: by_size(1), "after_one_pass": lambda: by_size(2)}
    return fill((HERE / "evidence.md.in").read_text(encoding="utf-8"), vars(measures) | globals() | names)


if __name__ == "__main__":
    publish({PAGE: render()}, "benchmarks/gsm8k_equations/evidence.py", figures.draw)
