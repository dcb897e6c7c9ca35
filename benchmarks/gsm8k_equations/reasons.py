"""What is chosen, what it depends on, and why it helps or does not: `evidence.py` asks for these by name."""

import numpy as np
import pandas as pd
from measures import NAMES, SLOW_ARMS, difference, load, mean, measured, points, sizes, steps_of


def luck() -> str:
    """The success rates of the chosen as the selection saw them, and from fresh rollouts of the same policy."""
    moved, scores = load("movement.parquet"), load("scores.parquet")
    moved = moved[(moved.arm == "learnalign") & moved.chosen]
    both = moved.merge(scores[~scores.cold], on=["seed", "index"])
    seen = (both.success_rate * (1 - both.success_rate)).mean()
    fresh = (both.before / 8 * (1 - both.before / 8)).mean()
    return (
        f"The {moved.groupby('seed').size().iloc[0]} chosen had a mean learnability of {seen:.3f} when they were scored and of "
        f"{fresh:.3f} in new rollouts of the same policy."
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
        f"with 500 prompts in two stages of 250 success is {mean(ours)} % over {len(ours)} seed{'s' * (len(ours) > 1)}: "
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
        "| 500 chosen by | steps a prompt | steps that are distinct | prompts that share their last step with another | distinct numbers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in load("redundancy.json"):
        lines.append(
            f"| {names[row['chosen_by']]} | {row['steps']:.1f} | {row['distinct_steps']:.0%} | {row['shared_last_step']:.0%} | "
            f"{row['distinct_numbers']:.0f} |"
        )
    return "\n".join(lines)


def early() -> str:
    """LearnAlign after the fewest steps that were looked at, when its ranking is still fresh."""
    size, step = 100, steps_of(100) // 2
    ours = measured("learnalign", size, step)
    gaps = [points(difference(ours, measured(base, size, step))) for base in ("random", "learnability")]
    return f"after {step} steps on {size} prompts LearnAlign is {gaps[0]} over random prompts and {gaps[1]} over learnability alone"


def slow() -> str:
    """The same choices, trained on at a fifth of the learning rate."""
    steps = steps_of(500)
    lines = [
        f"| trained on | seeds | success after {steps // 2} steps, % | over random prompts | after {steps} steps, % "
        "| over random prompts | over learnability alone |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm in SLOW_ARMS:
        cells = []
        for step, bases in ((steps // 2, ("random",)), (steps, ("random", "learnability"))):
            ours = measured(f"{arm} slow", 500, step)
            gaps = [
                "" if base == arm else points(difference(ours, measured(f"{base} slow", 500, step))) for base in bases
            ]
            cells += [mean(ours), *gaps]
        lines.append(f"| {NAMES[arm]} | {len(ours)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def slow_verdict() -> str:
    """What LearnAlign adds to learnability and to random prompts, at either learning rate."""

    def gap(base, ending):
        ours, theirs = (measured(arm + ending, 500, steps_of(500)) for arm in ("learnalign", base))
        return difference(ours, theirs)

    changes = [
        f"over {NAMES[base]} {points(gap(base, ' slow'))} points (at the full learning rate {points(gap(base, ''))})"
        for base in ("random", "learnability")
    ]
    return f"LearnAlign gains {' and '.join(changes)}."


def persistence_conditions() -> str:
    return f"{load('persistence.json')['conditions']['prompts']} prompts"


def persistence() -> str:
    """How a ranking agrees with itself, from other rollouts and after more training."""
    table = pd.DataFrame(load("persistence.json")["rows"])
    rate = load("runs.json")["conditions"]["learning_rate"]
    lines = [
        "| training since the ranking | seeds | rank correlation of alignments | of scores | of learnabilities "
        f"| mean alignment of the {load('persistence.json')['conditions']['best']} best before, then | of all learnable, then |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (factor, step), rows in table.groupby(["rate", "step"]):
        name = f"{step} steps at learning rate {factor * rate:g}" if step else "none, other rollouts"
        values = [
            f"{rows[column].mean():.2f} ± {rows[column].std():.2f}"
            for column in ("spearman_alignment", "spearman_score", "spearman_learnability")
        ]
        means = [f"{rows[column].mean():.3f}" for column in ("alignment_of_best_seen_again", "alignment_of_all")]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(values + means) + " |")
    return "\n".join(lines)


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
        f"The {load('sensitivity.json')['best']} best had a mean alignment of {row['alignment_of_best']:.2f}. With other rollouts of the "
        f"same policy, those of them that are learnable again have {row['alignment_of_best_seen_again']:.2f}, all learnable prompts "
        f"{row['alignment_of_all']:.2f}. The rank correlation of a prompt's alignment with itself is "
        f"{row['spearman_alignment']:.2f}, that of its learnability {row['spearman_learnability']:.2f}. So "
        f"{1 - (row['alignment_of_best_seen_again'] - row['alignment_of_all']) / (row['alignment_of_best'] - row['alignment_of_all']):.0%} of "
        "the lead of the best was due to chance in their rollouts."
    )


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
