"""
Writes docs/evidence.md and its figures from benchmarks/results/evidence, so that nobody types a number.

    python benchmarks/gsm8k_equations/evidence.py [--check]

The words are in evidence.md.in; `{{name}}` there stands for what the function `name` of this file returns.
"""

import json
import re
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
PAGE = ROOT / "docs" / "evidence.md"
WARMUP_STEPS, RESAMPLES = 19, 4000
NAMES = {
    "none": "nothing",
    "warm-up": "the warm-up only",
    "random": "random prompts",
    "filter": "success-rate filter",
    "learnability": "learnability alone",
    "alignment": "alignment alone",
    "learnalign": "LearnAlign",
    "random cold": "random prompts, no warm-up",
    "learnalign cold": "LearnAlign, no warm-up",
    "full": "all prompts",
    "staged": "LearnAlign, staged",
    "learnalign distinct": "LearnAlign, no step twice",
}
COMPARED = ("random", "filter", "learnability", "alignment", "learnalign")


@cache
def load(name: str):
    file = RESULTS / name
    return json.loads(file.read_text(encoding="utf-8")) if name.endswith(".json") else pd.read_parquet(file)


def sizes() -> list[int]:
    looks = load("looks.parquet")
    return sorted(size for size in looks[looks.arm == "learnalign"]["size"].unique())


def full_size() -> int:
    """Of the longest runs on all prompts, which were looked at where shorter ones end, too."""
    looks = load("looks.parquet")
    return looks[looks.arm == "full"]["size"].max()


def steps_of(size: int) -> int:
    conditions = load("runs.json")["conditions"]
    return int(np.ceil(conditions["passes"] * size / conditions["chunk"]))


@cache
def measured(arm: str, size: int, step: int, way: str = "sampled") -> dict[int, np.ndarray]:
    """Of every seed: the success rate on each test row after `step` steps, where that was looked at in full."""
    looks = load("looks.parquet")
    rows = looks[(looks.arm == arm) & (looks["size"] == size) & (looks.step == step) & (looks.samples == 8)]
    return {row.seed: np.asarray(getattr(row, way)) / (8 if way == "sampled" else 1) for row in rows.itertuples()}


@cache
def resamples(seeds: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the seeds and of the rows in each resample, the same for all that have as many."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in (seeds, rows))


def difference(ours: dict, theirs: dict) -> tuple[float, float, float, int] | None:
    """
    Mean paired difference and its 95 % interval by a bootstrap over seeds and test rows together; the number of seeds.
    One seed leaves the rows alone to be resampled.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    table = np.stack([ours[seed] - theirs[seed] for seed in seeds])
    by_seed, by_row = resamples(*table.shape)
    low, high = np.quantile(np.einsum("bs,sr,br->b", by_seed, table, by_row, optimize=True), (0.025, 0.975))
    return table.mean(), low, high, len(seeds)


def points(value: tuple | None) -> str:
    if value is None:
        return ""
    middle, low, high = (f"{100 * number:+.1f}".replace("-0.0", "+0.0") for number in value[:3])
    return f"{middle} [{low}, {high}]"


def mean(values: dict) -> str:
    return f"{100 * np.mean([rows.mean() for rows in values.values()]):.1f}" if values else ""


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
    verdict = "is better than" if value[1] > 0 else "is worse than" if value[2] < 0 else "cannot be told from"
    return f"{verdict} {'the ' * (base == 'filter')}{NAMES[base]} ({points(value)})"


def verdict() -> str:
    """The first paragraph: what came out, whatever it is."""
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
    matters = "matters" if gains["learnability"][1] > 0 else "cannot be shown to matter"
    helps = "does not help" if added[1] <= 0 else "helps"
    return (
        f"All sizes taken together, LearnAlign gains {points(gains['learnalign'])} points over random prompts, the filter "
        f"{points(gains['filter'])}, learnability alone {points(gains['learnability'])}; LearnAlign over the filter is "
        f"{points(difference(found['learnalign'], found['filter']))}, over learnability alone {points(added)}. That a prompt is learnable {matters} here; how its gradient aligns with the others' {helps}"
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
    """What the longest runs on all prompts reach without any selection, beside the runs on 500 chosen ones."""
    looks, costs = load("looks.parquet"), [one for one in load("runs.json")["costs"] if not one["cold"]]

    def minutes(arm, size, phases):
        rows = looks[(looks.arm == arm) & (looks["size"] == size) & (looks.step == steps_of(size))]
        before = sum(np.median([one[phase] for one in costs]) for phase in ("warm_up", *phases))
        minutes = (before + np.median(rows.seconds)) / 60
        return f"{mean(measured(arm, size, steps_of(size)))} % after {minutes:.0f} minutes ({len(rows)} seeds)"

    size = full_size()
    return (
        f"All prompts, {steps_of(size)} steps and nothing scored, reach {minutes('full', size, ())}; 500 prompts chosen by the "
        f"success-rate filter {minutes('filter', 500, ('rollouts',))}, by LearnAlign "
        f"{minutes('learnalign', 500, ('rollouts', 'gradients', 'scores'))}."
    )


def lengths() -> str:
    """What each score would choose of the same pools, by the length of its completions (Figure 3 of the paper)."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.success_rate > 0) & (table.success_rate < 1)]
    table = table.assign(
        learnability=table.success_rate * (1 - table.success_rate), inner=table.gradient_norm * table.alignment
    )
    lines = ["| chosen by | " + " | ".join(f"best {size:,}" for size in (100, 500, 1000, 2000)) + " |"]
    lines.append("| --- |" + " --- |" * 4)
    names = {
        "inner": "raw inner product",
        "alignment": "cosine (alignment alone)",
        "score": "cosine and learnability (LearnAlign)",
        "learnability": "learnability alone",
    }
    for column, name in names.items():
        means = []
        for size in (100, 500, 1000, 2000):
            shuffled = table.sample(frac=1, random_state=0).sort_values(column, ascending=False, kind="stable")
            best = shuffled.groupby("seed").head(size)
            means.append(best.groupby("seed").completion_length_mean.mean().mean())
        lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in means) + " |")
    pool = load("scores.parquet")
    pool = pool[~pool.cold].completion_length_mean.mean()
    learnable = table.completion_length_mean.mean()
    lines.append(f"| any learnable prompt | {learnable:.1f} | {learnable:.1f} | {learnable:.1f} | {learnable:.1f} |")
    lines.append(f"| any prompt | {pool:.1f} | {pool:.1f} | {pool:.1f} | {pool:.1f} |")
    return "\n".join(lines)


def agreement() -> str:
    """How far the selections of two seeds (their own warm-up, their own rollouts) agree."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.success_rate > 0) & (table.success_rate < 1)]
    seeds, pool = sorted(table.seed.unique()), load("runs.json")["conditions"]["pool"]
    lines = ["| best | Jaccard index of two seeds' selections | of two random ones |", "| --- | --- | --- |"]
    for size in (100, 500, 1000, 2000):
        best = [
            set(table[table.seed == seed].sort_values("score", ascending=False)["index"].head(size)) for seed in seeds
        ]
        pairs = [len(a & b) / len(a | b) for i, a in enumerate(best) for b in best[:i]]
        expected = size / pool
        lines.append(f"| {size:,} | {np.mean(pairs):.2f} | {expected / (2 - expected):.2f} |")
    return "\n".join(lines)


def movement() -> str:
    table = load("movement.parquet")
    lines = [
        "| trained on | prompts | runs | success before, % | after, % | neither always nor never solved, before | after |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (arm, chosen), rows in table.groupby(["arm", "chosen"], sort=True):
        learnable = [100 * rows[column].between(1, 7).mean() for column in ("before", "after")]
        lines.append(
            f"| {NAMES[arm]} | {'chosen' if chosen else 'not chosen'} | {rows.seed.nunique()} | "
            f"{100 * rows.before.mean() / 8:.1f} | {100 * rows.after.mean() / 8:.1f} | "
            f"{learnable[0]:.0f} % | {learnable[1]:.0f} % |"
        )
    return "\n".join(lines)


def luck() -> str:
    """The success rates of the chosen as the selection saw them, and from fresh rollouts of the same policy."""
    moved, scores = load("movement.parquet"), load("scores.parquet")
    moved = moved[(moved.arm == "learnalign") & moved.chosen]
    both = moved.merge(scores[~scores.cold], on=["seed", "index"])
    seen = (both.success_rate * (1 - both.success_rate)).mean()
    fresh = (both.before / 8 * (1 - both.before / 8)).mean()
    return (
        f"The {moved.groupby('seed').size().iloc[0]} chosen had a mean learnability of {seen:.3f} when they were scored and of "
        f"{fresh:.3f} in fresh rollouts of the same policy."
    )


def uniformity() -> str:
    """How different the alignments in a pool are."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.success_rate > 0) & (table.success_rate < 1)]
    groups = [group for _, group in table.groupby("seed")]
    best = [group.sort_values("score", ascending=False).head(500) for group in groups]
    return (
        f"The alignments of the learnable prompts of a pool have a mean of {np.mean([g.alignment.mean() for g in groups]):.2f} and a "
        f"standard deviation of {np.mean([g.alignment.std() for g in groups]):.2f}; "
        f"{np.mean([(g.alignment < 0).mean() for g in groups]):.0%} are negative. The best 500 by LearnAlign have a mean of "
        f"{np.mean([b.alignment.mean() for b in best]):.2f} (means over {len(groups)} seeds)."
    )


def given_up() -> str:
    """Learnability and alignment of the best by each score."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.success_rate > 0) & (table.success_rate < 1)].sample(frac=1, random_state=0)
    table = table.assign(learnability=table.success_rate * (1 - table.success_rate))

    def best(column, size):
        rows = table.sort_values(column, ascending=False, kind="stable").groupby("seed").head(size)
        means = rows.groupby("seed")[["learnability", "alignment"]].mean().mean()
        return f"{means.learnability:.3f} and {means.alignment:.2f}"

    listed = "; ".join(
        f"of the best {size:,} by LearnAlign {best('score', size)}, by learnability alone {best('learnability', size)}"
        for size in sizes()
    )
    return f"Mean learnability and alignment, {listed}."


def reselection() -> str:
    """What selecting again brings, if it was run."""
    ours = measured("staged", 500, steps_of(500))
    if not ours:
        return "whether that helps has not been tested."
    theirs = {name: measured(name, 500, steps_of(500)) for name in ("learnalign", "filter")}
    return (
        f"with 500 prompts in two stages of 250 it reaches {mean(ours)} % over {len(ours)} seed{'s' * (len(ours) > 1)}: "
        f"{points(difference(ours, theirs['learnalign']))} over one selection, {points(difference(ours, theirs['filter']))} over the filter."
    )


def redundancy() -> str:
    names = {
        "any": "any learnable prompts",
        "learnability": "learnability alone",
        "inner": "raw inner product",
        "alignment": "alignment alone",
        "score": "LearnAlign",
        "distinct": "LearnAlign, no step twice",
    }
    lines = [
        "| 500 chosen by | steps a prompt | steps that are distinct | prompts whose last step another has, too | distinct numbers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in load("redundancy.json"):
        lines.append(
            f"| {names[row['chosen_by']]} | {row['steps']:.1f} | {row['distinct_steps']:.0%} | {row['shared_last_step']:.0%} | "
            f"{row['distinct_numbers']:.0f} |"
        )
    return "\n".join(lines)


def staleness() -> str:
    """How the ranking after the warm-up agrees with that of the same policy some training later."""
    later = next(row for row in load("sensitivity.json")["rows"] if row["way"] == "1,000 warm-up prompts")
    same = next(row for row in load("sensitivity.json")["rows"] if row["way"] == "another seed")
    return (
        "The same prompts, ranked again after 1,000 random prompts in place of 300, which is 44 steps of training later, agree with the "
        f"ranking before by a rank correlation of {later['spearman_alignment']:.2f} in alignment and {later['spearman_score']:.2f} in score "
        f"(learnability {later['spearman_learnability']:.2f}); without those steps, from other rollouts alone, it is "
        f"{same['spearman_alignment']:.2f} and {same['spearman_score']:.2f} ({same['spearman_learnability']:.2f})."
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
        f"A bootstrap of five values from a normal distribution holds the truth in {share:.0%} of the cases, not in 95 %, so the "
        "intervals are too narrow; of one seed they say nothing about seeds."
    )


def steps_of_500() -> str:
    return str(steps_of(500))


def without_repetition() -> str:
    """The experiment: the same ranking, without near-duplicates."""
    ours = measured("learnalign distinct", 500, steps_of(500))
    theirs = {name: measured(name, 500, steps_of(500)) for name in ("learnalign", "filter", "random")}
    return (
        f"{mean(ours)} % over {len(ours)} seeds: {points(difference(ours, theirs['learnalign']))} over LearnAlign, "
        f"{points(difference(ours, theirs['filter']))} over the filter, {points(difference(ours, theirs['random']))} over random prompts"
    )


def tuning() -> str:
    table = load("tuning.json")
    lines = ["| learning rate | 1 pass | 2 passes | 4 passes |", "| --- | --- | --- | --- |"]
    for rate, values in sorted(table["runs"].items(), key=lambda item: float(item[0])):
        lines.append(f"| {float(rate):g} | " + " | ".join(f"{100 * values[p]:.1f}" for p in ("1", "2", "4")) + " |")
    return "\n".join(lines)


def sensitivity() -> str:
    table = load("sensitivity.json")
    lines = [
        f"| scored with | rank correlation of scores | of alignments | of learnabilities | Jaccard index of the best {table['best']} "
        f"| learnability of the chosen, as measured | from {table['true_rollouts']} other rollouts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in table["rows"]:
        lines.append(
            f"| {row['way']} | {row['spearman_score']:.3f} | {row['spearman_alignment']:.3f} | {row['spearman_learnability']:.3f} | "
            f"{row['jaccard']:.2f} | {row['chosen_learnability']:.3f} | {row['chosen_true_learnability']:.3f} |"
        )
    return "\n".join(lines)


def sensitivity_conditions() -> str:
    table = load("sensitivity.json")
    share = table["best"] / table["prompts"]
    return (
        f"{table['prompts']} prompts, each way against the defaults (8 rollouts, 300 warm-up prompts, d = 32,768); two random "
        f"choices of {table['best']} would have a Jaccard index of {share / (2 - share):.2f}"
    )


def repeatability() -> str:
    """Of the best by LearnAlign: what other rollouts of the same policy say of them."""
    row = next(row for row in load("sensitivity.json")["rows"] if row["way"] == "another seed")
    return (
        f"The {load('sensitivity.json')['best']} best had a mean alignment of {row['alignment_of_best']:.2f}; from other rollouts of the "
        f"same policy, those of them that are learnable again have {row['alignment_of_best_seen_again']:.2f}, all learnable prompts "
        f"{row['alignment_of_all']:.2f}. The rank correlation of a prompt's alignment with itself is "
        f"{row['spearman_alignment']:.2f}, that of its learnability {row['spearman_learnability']:.2f}. So "
        f"{1 - (row['alignment_of_best_seen_again'] - row['alignment_of_all']) / (row['alignment_of_best'] - row['alignment_of_all']):.0%} of "
        "what set the best apart was luck of their rollouts."
    )


def not_run() -> str:
    """What the grid names and the results do not hold."""
    done = {(size, arm) for size, _, arm in load("runs.json")["cells"]}
    arms = [arm for arm in NAMES if arm not in {arm for _, arm in done}]
    missing = [f"{size:,} prompts" for size in (100, 500, 1000, 2000) if (size, "learnalign") not in done]
    return "; ".join([NAMES[arm] for arm in arms] + missing) or "nothing"


def conditions() -> str:
    found = load("runs.json")["conditions"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return (
        f"{found['pool']:,} train rows as the pool, {found['test']:,} test rows x 8 samples at temperature 1, and greedy; "
        f"{found['passes']:g} passes, {found['chunk']} prompts x 8 rollouts a step, learning rate {found['learning_rate']:g}, "
        f"constant; {versions}"
    )


def render() -> str:
    template = (HERE / "evidence.md.in").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: globals()[match[1]](), template)


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
