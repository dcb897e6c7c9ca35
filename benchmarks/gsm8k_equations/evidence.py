"""
Writes docs/evidence.md and its figures from benchmarks/results/evidence, so that nobody types a number.

    python benchmarks/gsm8k_equations/evidence.py [--check]

The words are in evidence.md.in; `{{name}}` there stands for what the function `name` of this file or of
reasons.py returns.
"""

import re
import sys
from pathlib import Path

import numpy as np
import reasons
from measures import (
    COMPARED,
    NAMES,
    ROOT,
    WARMUP_STEPS,
    difference,
    full_size,
    load,
    mean,
    measured,
    points,
    sizes,
    steps_of,
)


HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs" / "evidence.md"


def arms_table(size: int, step: int) -> str:
    lines = [
        "| trained on | seeds | success, % | greedy, % | over random prompts | over the filter |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    base, simple = measured("random", size, step), measured("filter", size, step)
    rows = [
        (arm, measured(arm, size, step), measured(arm, size, step, "greedy"))
        for arm in (*COMPARED, "learnalign distinct", "staged")
    ]
    rows.append(("full", measured("full", full_size(), step), measured("full", full_size(), step, "greedy")))
    for arm, sampled, greedy in rows:
        if sampled:
            gaps = [
                "" if arm == name else points(difference(sampled, theirs))
                for name, theirs in (("random", base), ("filter", simple))
            ]
            lines.append(
                f"| {NAMES[arm]} | {len(sampled)} | {mean(sampled)} | {mean(greedy)} | {gaps[0]} | {gaps[1]} |"
            )
    return "\n".join(lines)


def after_warm_up() -> str:
    return "\n\n".join(
        f"**{size:,} prompts, {steps_of(size)} steps**\n\n{arms_table(size, steps_of(size))}" for size in sizes()
    )


def after_one_pass() -> str:
    return "\n\n".join(
        f"**{size:,} prompts, {steps_of(size) // 2} steps**\n\n{arms_table(size, steps_of(size) // 2)}"
        for size in sizes()
    )


def warm_up_counted() -> str:
    lines = [
        "| prompts | steps in all | trained on | seeds | success, % | over random prompts without a warm-up |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for size in sizes():
        steps = steps_of(size)
        base = measured("random cold", size, steps)
        if not base:
            continue
        lines.append(f"| {size:,} | {steps} | {NAMES['random cold']} | {len(base)} | {mean(base)} | |")
        for arm, step in [*((arm, steps - WARMUP_STEPS) for arm in COMPARED), ("learnalign cold", steps)]:
            ours = {seed: rows for seed, rows in measured(arm, size, step).items() if seed in base}
            if ours:
                gap = points(difference(ours, base))
                lines.append(f"| {size:,} | {steps} | {NAMES[arm]} | {len(ours)} | {mean(ours)} | {gap} |")
    return "\n".join(lines)


def compared_with(size: int, base: str, arm: str = "learnalign") -> str:
    value = difference(measured(arm, size, steps_of(size)), measured(base, size, steps_of(size)))
    verdict = (
        "is better than"
        if value[1] > 0
        else "is worse than"
        if value[2] < 0
        else "is not significantly different from"
    )
    return f"{verdict} {'the ' * (base == 'filter')}{NAMES[base]} ({points(value)})"


def verdict() -> str:
    """The list of results, one line for each number of prompts."""
    sentences = []
    for size in sizes():
        seeds = len(measured("learnalign", size, steps_of(size)))
        bases = "; ".join(compared_with(size, base) for base in ("random", "filter", "learnability"))
        sentences.append(f"- **{size:,} prompts** ({seeds} seed{'s' * (seeds > 1)}): LearnAlign {bases}.")
    return "\n".join(sentences)


def first_sentence() -> str:
    """What the reader takes away if nothing else is read; it follows from the intervals."""
    better = [
        NAMES[base]
        for base in ("filter", "learnability")
        if any(
            difference(measured("learnalign", size, steps_of(size)), measured(base, size, steps_of(size)))[1] > 0
            for size in sizes()
        )
    ]
    if better:
        return f"**On this task LearnAlign is better than {' and '.join(better)} at some number of prompts.**"
    return (
        "**On this task LearnAlign is not better than a plain success-rate filter, nor than learnability alone, at any number of "
        f"prompts measured ({', '.join(f'{size:,}' for size in sizes())}).**"
    )


def together() -> str:
    """All sizes in one: of each seed and test row the mean over the sizes, which says more than any size alone."""

    def over_sizes(arm):
        runs = [measured(arm, size, steps_of(size)) for size in sizes()]
        seeds = set.intersection(*(set(run) for run in runs))
        return {seed: np.mean([run[seed] for run in runs], axis=0) for seed in seeds}

    found = {arm: over_sizes(arm) for arm in ("random", "learnalign", "filter", "learnability")}
    gains = {arm: difference(values, found["random"]) for arm, values in found.items()}
    added = difference(found["learnalign"], found["learnability"])
    matters = "matters" if gains["learnability"][1] > 0 else "is not shown to matter"
    helps = "does not help" if added[1] <= 0 else "helps"
    return (
        f"All sizes taken together, LearnAlign gains {points(gains['learnalign'])} points over random prompts, the filter "
        f"{points(gains['filter'])}, learnability alone {points(gains['learnability'])}; LearnAlign over the filter is "
        f"{points(difference(found['learnalign'], found['filter']))}, over learnability alone {points(added)}. Learnability {matters} here; alignment {helps}"
    )


def headline() -> str:
    before, warm = measured("none", 0, 0), measured("warm-up", 0, 0)
    return (
        f"Before any training {mean(before)} % of the samples on the test rows succeed (greedy "
        f"{mean(measured('none', 0, 0, 'greedy'))} %), after the warm-up {mean(warm)} %."
    )


def costs() -> str:
    rows = [one for one in load("runs.json")["costs"] if not one["cold"]]
    looks = load("looks.parquet")
    lines = ["| what | median seconds |", "| --- | --- |"]

    def add(name, values):
        lines.append(f"| {name} | {np.median(list(values)):.0f} |")

    add("the warm-up", (one["warm_up"] for one in rows))
    for phase in ("rollouts", "gradients", "scores"):
        add(f"{phase} of a selection", (one[phase] for one in rows))
    for size in sizes():
        chosen = looks[(looks.arm == "learnalign") & (looks["size"] == size) & (looks.step == steps_of(size))]
        add(f"training on {size:,} prompts, {steps_of(size)} steps", chosen.seconds)
    return "\n".join(lines)


def same_time() -> str:
    """What the longest runs on all prompts reach without any selection, and the runs on 500 chosen ones."""
    looks, costs = load("looks.parquet"), [one for one in load("runs.json")["costs"] if not one["cold"]]

    def minutes(arm, size, phases):
        rows = looks[(looks.arm == arm) & (looks["size"] == size) & (looks.step == steps_of(size))]
        before = sum(np.median([one[phase] for one in costs]) for phase in ("warm_up", *phases))
        minutes = (before + np.median(rows.seconds)) / 60
        return f"{mean(measured(arm, size, steps_of(size)))} % after {minutes:.0f} minutes ({len(rows)} seeds)"

    def chosen(size):
        return (
            f"{size:,} prompts chosen by the success-rate filter {minutes('filter', size, ('rollouts',))}, by LearnAlign "
            f"{minutes('learnalign', size, ('rollouts', 'gradients', 'scores'))}"
        )

    size = full_size()
    return (
        f"Training on all prompts for {steps_of(size)} steps, without a selection, reaches {minutes('full', size, ())}; "
        f"{'; '.join(chosen(size) for size in sorted({500, max(sizes())}))}."
    )


def spread() -> str:
    """Of the arms at 500 prompts: how far seeds differ within one, and arms in their means."""
    found = {arm: [100 * rows.mean() for rows in measured(arm, 500, steps_of(500)).values()] for arm in COMPARED}
    means, deviations = [np.mean(values) for values in found.values()], [np.std(v, ddof=1) for v in found.values()]
    return (
        f"at 500 prompts the seeds of one arm have a standard deviation of {min(deviations):.1f} to {max(deviations):.1f} points, "
        f"and the means of the arms lie within {max(means) - min(means):.1f}"
    )


def coverage() -> str:
    """How often such an interval holds the truth, if five seeds are all that varies."""
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(2000, 5))
    means = np.stack([sample[rng.integers(0, 5, (1000, 5))].mean(1) for sample in samples])
    low, high = np.quantile(means, (0.025, 0.975), axis=1)
    share = np.mean((low <= 0) & (0 <= high))
    return (
        f"For five values from a normal distribution, such an interval contains the true mean in {share:.0%} of the cases, not in "
        "95 %. So the intervals are too narrow. An interval from one seed does not cover the variation between seeds."
    )


def tuning() -> str:
    table = load("tuning.json")
    lines = ["| learning rate | 1 pass | 2 passes | 4 passes |", "| --- | --- | --- | --- |"]
    for rate, values in sorted(table["runs"].items(), key=lambda item: float(item[0])):
        lines.append(f"| {float(rate):g} | " + " | ".join(f"{100 * values[p]:.1f}" for p in ("1", "2", "4")) + " |")
    return "\n".join(lines)


def fallen(arm: str, size: int) -> dict[int, float]:
    """Of the seeds that lost more than 3 points between the last two looks at them: how many."""
    before, after = (measured(arm, size, step) for step in (steps_of(size) - WARMUP_STEPS, steps_of(size)))
    lost = {seed: 100 * (before[seed].mean() - after[seed].mean()) for seed in sorted(before.keys() & after.keys())}
    return {seed: points for seed, points in lost.items() if points > 3}


def falls() -> str:
    return (
        "; ".join(
            f"{NAMES[arm]}, {size:,} of them, seed {seed}, {lost:.1f} points"
            for size in sizes()
            for arm in COMPARED
            for seed, lost in fallen(arm, size).items()
        )
        or "none"
    )


def beware() -> str:
    """What of the gain over random prompts is that these runs fell."""
    sentences = []
    for size in sizes():
        if seeds := fallen("random", size):
            half = steps_of(size) // 2
            gaps = " and ".join(
                f"{points(difference(measured(arm, size, half), measured('random', size, half)))} by {name}"
                for arm, name in (("filter", "the filter"), ("learnalign", "LearnAlign"))
            )
            sentences.append(
                f"Part of the gain over random prompts at {size:,} is due to runs that got worse: {len(seeds)} of {len(measured('random', size, steps_of(size)))} "
                f"runs on random prompts lost more than 3 points in their last {WARMUP_STEPS} steps ([limits](#limits-of-this-evidence)), and no run on "
                f"chosen prompts did. Half-way, after {half} steps, the gain is {gaps}."
                if not any(fallen(arm, size) for arm in ("filter", "learnability", "learnalign"))
                else f"At {size:,} prompts some runs lost more than 3 points in their last {WARMUP_STEPS} steps "
                f"([limits](#limits-of-this-evidence)). Half-way, after {half} steps, the gain over random prompts is {gaps}."
            )
    return " ".join(sentences)


def not_run() -> str:
    """What the grid names and the results do not hold."""
    done, listed = {(size, arm) for size, _, arm in load("runs.json")["cells"]}, []
    for size in (100, 500, 1000, 2000):
        arms = (*COMPARED, "random cold", "learnalign cold", "staged")
        missing = [NAMES[arm] for arm in arms if (size, arm) not in done]
        listed += [f"{size:,} prompts by {'; by '.join(missing)}"] if missing else []
    return ". ".join(listed) or "nothing"


def conditions() -> str:
    found = load("runs.json")["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['pool']:,} train rows as the pool, {found['test']:,} test rows x 8 samples at temperature 1, and greedy; "
        f"{found['passes']:g} passes, {found['chunk']} prompts x 8 rollouts a step, learning rate {found['learning_rate']:g}, "
        f"constant; {versions}"
    )


def render() -> str:
    functions = vars(reasons) | globals()
    template = (HERE / "evidence.md.in").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: functions[match[1]](), template)


def main():
    page = render()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            sys.exit("docs/evidence.md is not what the results say. Run benchmarks/gsm8k_equations/evidence.py.")
        return
    import figures

    PAGE.write_text(page, encoding="utf-8")
    figures.draw()
    print(f"wrote {PAGE.relative_to(ROOT)} and its figures")


if __name__ == "__main__":
    main()
