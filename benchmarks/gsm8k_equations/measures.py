"""
What the page of the evidence is made of: success rates of runs, and differences with their intervals; then the reasons
why a choice helps or does not, and the settings that it depends on. `evidence.py` asks for both by name.
"""

from functools import cache

import harness
import numpy as np
import pandas as pd
from pages import table


RESULTS = harness.RESULTS / "evidence"
WARMUP_STEPS, RESAMPLES = 19, 4000
SIZES = (100, 500, 1000, 2000)
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
SLOW_ARMS = ("random", "filter", "learnability", "learnalign")  # arms with " slow" behind them


@cache
def load(name: str):
    return harness.read(RESULTS / name) if name.endswith(".json") else pd.read_parquet(RESULTS / name)


def sizes() -> list[int]:
    """Sizes at which LearnAlign and its rivals have a seed in common."""
    cells = {tuple(cell) for cell in load("runs.json")["cells"]}
    found = {cell[:2] for cell in cells if cell[2] == "learnalign"}
    return sorted({size for size, seed in found if all((size, seed, arm) in cells for arm in SLOW_ARMS)})


def full_size() -> int:
    """The longest runs on all prompts, which were also looked at where shorter ones end."""
    looks = load("looks.parquet")
    return looks[looks.arm == "full"]["size"].max()


def steps_of(size: int) -> int:
    conditions = load("runs.json")["conditions"]
    return int(np.ceil(conditions["passes"] * size / conditions["chunk"]))


@cache
def measured(arm: str, size: int, step: int, way: str = "sampled") -> dict[int, np.ndarray]:
    """Success rate of every seed on each test row after `step` steps, where all rows were looked at."""
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


def gap(arm: str, base: str, size: int, step: int | None = None) -> tuple[float, float, float, int] | None:
    """[`difference`] of two arms, after all of their steps or after `step`."""
    step = steps_of(size) if step is None else step
    return difference(measured(arm, size, step), measured(base, size, step))


@cache
def learnable() -> pd.DataFrame:
    """The scores of the prompts that are learnable after the warm-up."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.success_rate > 0) & (table.success_rate < 1)]
    return table.assign(learnability=table.success_rate * (1 - table.success_rate))


def points(value: tuple | None) -> str:
    if value is None:
        return ""
    middle, low, high = (f"{100 * number:+.1f}".replace("-0.0", "+0.0") for number in value[:3])
    return f"{middle} [{low}, {high}]"


def mean(values: dict) -> str:
    return f"{100 * np.mean([rows.mean() for rows in values.values()]):.1f}" if values else ""


def best(rows, size: int):
    return rows.sort_values("score", ascending=False).head(size)


def luck() -> dict:
    """The success rates of the chosen as the selection saw them, and from fresh rollouts of the same policy."""
    moved, scores = load("movement.parquet"), load("scores.parquet")
    moved = moved[(moved.arm == "learnalign") & moved.chosen]
    both = moved.merge(scores[~scores.cold], on=["seed", "index"])
    fresh = both.before / 8
    seen = (both.success_rate * (1 - both.success_rate)).mean()
    return {"chosen": moved.groupby("seed").size().iloc[0], "seen": seen, "fresh": (fresh * (1 - fresh)).mean()}


def uniformity() -> dict:
    """Spread of the alignments in a pool."""
    groups = [group for _, group in learnable().groupby("seed")]
    return {
        "mean": np.mean([group.alignment.mean() for group in groups]),
        "deviation": np.mean([group.alignment.std() for group in groups]),
        "negative": np.mean([(group.alignment < 0).mean() for group in groups]),
        "best": np.mean([best(group, 500).alignment.mean() for group in groups]),
        "seeds": len(groups),
    }


def given_up() -> str:
    """Learnability and alignment of the best by each score."""
    rows = learnable().sample(frac=1, random_state=0)

    def means(column, size):
        best = rows.sort_values(column, ascending=False, kind="stable").groupby("seed").head(size)
        found = best.groupby("seed")[["learnability", "alignment"]].mean().mean()
        return f"{found.learnability:.3f} and {found.alignment:.2f}"

    return "; ".join(
        f"of the best {size:,} by LearnAlign {means('score', size)}, by learnability alone "
        f"{means('learnability', size)}"
        for size in sizes()
    )


def reselection() -> str:
    """Gain of selecting again, if it was run."""
    ours = measured("staged", 500, steps_of(500))
    if not ours:
        return "whether that helps has not been tested."
    over = [points(gap("staged", base, 500)) for base in ("learnalign", "filter")]
    return (
        f"with 500 prompts in two stages of 250 success is {mean(ours)} % over {len(ours)} "
        f"seed{'s' * (len(ours) > 1)}: {over[0]} over one selection, {over[1]} over the filter."
    )


def redundancy() -> str:
    names = NAMES | {"any": "any learnable prompts", "inner": "raw inner product", "score": "LearnAlign"}
    names["distinct"] = "LearnAlign, no step twice"
    head = "500 chosen by | steps a prompt | steps that are distinct | prompts that share their last step with another"
    rows = []
    for row in load("redundancy.json"):
        shares = (f"{row[name]:.0%}" for name in ("distinct_steps", "shared_last_step"))
        rows.append([names[row["chosen_by"]], f"{row['steps']:.1f}", *shares, f"{row['distinct_numbers']:.0f}"])
    return table(f"{head} | distinct numbers", rows)


def early() -> str:
    """LearnAlign after the fewest steps that were looked at, when its ranking is still fresh."""
    step = steps_of(100) // 2
    gaps = [points(gap("learnalign", base, 100, step)) for base in ("random", "learnability")]
    over = f"{gaps[0]} over random prompts and {gaps[1]} over learnability alone"
    return f"after {step} steps on 100 prompts LearnAlign is {over}"


def slow() -> str:
    """The same choices, trained on at a fifth of the learning rate."""
    steps, rows = steps_of(500), []
    for arm in SLOW_ARMS:
        cells = []
        for step, bases in ((steps // 2, ("random",)), (steps, ("random", "learnability"))):
            ours = measured(f"{arm} slow", 500, step)
            gaps = ("" if base == arm else points(gap(f"{arm} slow", f"{base} slow", 500, step)) for base in bases)
            cells += [mean(ours), *gaps]
        rows.append([NAMES[arm], str(len(ours)), *cells])
    head = f"trained on | seeds | success after {steps // 2} steps, % | over random prompts | after {steps} steps, %"
    return table(f"{head} | over random prompts | over learnability alone", rows)


def slow_verdict() -> str:
    """Gain of LearnAlign over learnability and over random prompts, at either learning rate."""
    changes = [
        f"over {NAMES[base]} {points(gap('learnalign slow', f'{base} slow', 500))} points (at the full learning rate "
        f"{points(gap('learnalign', base, 500))})"
        for base in ("random", "learnability")
    ]
    return f"LearnAlign gains {' and '.join(changes)}."


def persistence_prompts() -> int:
    return load("persistence.json")["conditions"]["prompts"]


def persistence() -> str:
    """Agreement of a ranking with itself, from other rollouts and after more training."""
    found, rows = load("persistence.json"), []
    rate = load("runs.json")["conditions"]["learning_rate"]
    for (factor, step), group in pd.DataFrame(found["rows"]).groupby(["rate", "step"]):
        name = f"{step} steps at learning rate {factor * rate:g}" if step else "none, other rollouts"
        columns = (group[f"spearman_{of}"] for of in ("alignment", "score", "learnability"))
        means = (f"{group[f'alignment_of_{of}'].mean():.3f}" for of in ("best_seen_again", "all"))
        rows.append([name, str(len(group)), *(f"{one.mean():.2f} ± {one.std():.2f}" for one in columns), *means])
    head = "training since the ranking | seeds | rank correlation of alignments | of scores | of learnabilities"
    best = found["conditions"]["best"]
    return table(f"{head} | mean alignment of the {best} best before, then | of all learnable, then", rows)


def steps_of_500() -> int:
    return steps_of(500)


def without_repetition() -> str:
    """The experiment: the same ranking, without near-duplicates."""
    ours = measured("learnalign distinct", 500, steps_of(500))
    names = {"learnalign": "LearnAlign", "filter": "the filter", "random": "random prompts"}
    over = ", ".join(f"{points(gap('learnalign distinct', base, 500))} over {name}" for base, name in names.items())
    return f"{mean(ours)} % over {len(ours)} seeds: {over}"


def sensitivity() -> str:
    found, rows = load("sensitivity.json"), []
    for row in found["rows"]:
        ranks = (f"{row[f'spearman_{of}']:.3f}" for of in ("score", "alignment", "learnability"))
        means = (f"{row[f'chosen_{of}']:.3f}" for of in ("learnability", "true_learnability"))
        rows.append([row["way"], *ranks, f"{row['jaccard']:.2f}", *means])
    head = "scored with | rank correlation of scores | of alignments | of learnabilities | Jaccard index of the best"
    head += (
        f" {found['best']} | learnability of the chosen, as measured | from {found['true_rollouts']} other rollouts"
    )
    return table(head, rows)


def jaccard_by_chance(share: float) -> float:
    """Jaccard index of two random choices of this share."""
    return share / (2 - share)


def sensitivity_conditions() -> dict:
    found = load("sensitivity.json")
    return found | {"chance": jaccard_by_chance(found["best"] / found["prompts"])}


def repeatability() -> dict:
    """Alignments of the best by LearnAlign in other rollouts of the same policy."""
    row = next(row for row in load("sensitivity.json")["rows"] if row["way"] == "another seed")
    again, others = row["alignment_of_best_seen_again"], row["alignment_of_all"]
    return row | {"chance": 1 - (again - others) / (row["alignment_of_best"] - others)}


def agreement() -> str:
    """Agreement of the selections of two seeds (their own warm-up, their own rollouts)."""
    groups, pool = [rows for _, rows in learnable().groupby("seed")], load("runs.json")["conditions"]["pool"]
    rows = []
    for size in SIZES:
        chosen = [set(best(group, size)["index"]) for group in groups]
        pairs = [len(a & b) / len(a | b) for i, a in enumerate(chosen) for b in chosen[:i]]
        rows.append([f"{size:,}", f"{np.mean(pairs):.2f}", f"{jaccard_by_chance(size / pool):.2f}"])
    return table("best | Jaccard index of two seeds' selections | of two random ones", rows)


def lengths() -> str:
    """Completion lengths of the choices that each score makes from the same pools (Figure 3 of the paper)."""
    found, pool = learnable(), load("scores.parquet")
    found = found.assign(inner=found.gradient_norm * found.alignment)
    names = {
        "inner": "raw inner product",
        "alignment": "cosine (alignment alone)",
        "score": "cosine and learnability (LearnAlign)",
        "learnability": "learnability alone",
    }
    rows = []
    for column, name in names.items():
        ranked = found.sample(frac=1, random_state=0).sort_values(column, ascending=False, kind="stable")
        means = (
            ranked.groupby("seed").head(size).groupby("seed").completion_length_mean.mean().mean() for size in SIZES
        )
        rows.append([name, *(f"{value:.1f}" for value in means)])
    rows.append(["any learnable prompt", *[f"{found.completion_length_mean.mean():.1f}"] * 4])
    rows.append(["any prompt", *[f"{pool[~pool.cold].completion_length_mean.mean():.1f}"] * 4])
    return table(["chosen by", *(f"best {size:,}" for size in SIZES)], rows)


def movement() -> str:
    rows = []
    for (arm, chosen), group in load("movement.parquet").groupby(["arm", "chosen"], sort=True):
        means = (f"{100 * group[column].mean() / 8:.1f}" for column in ("before", "after"))
        between = (f"{100 * group[column].between(1, 7).mean():.0f} %" for column in ("before", "after"))
        rows.append([NAMES[arm], "chosen" if chosen else "not chosen", str(group.seed.nunique()), *means, *between])
    head = (
        "trained on | prompts | runs | success before, % | after, % | neither always nor never solved, before | after"
    )
    return table(head, rows)
