"""The figures of docs/evidence.md; `evidence.py` calls `draw`."""

import matplotlib
import measures
import numpy as np
from harness import ROOT


matplotlib.use("Agg")
import matplotlib.pyplot as plt


FIGURES = ROOT / "docs" / "figures"
# Okabe and Ito's colours, which the colour-blind tell apart; markers tell the arms apart without any colour
STYLES = {
    "random": ("#000000", "o"),
    "filter": ("#E69F00", "s"),
    "learnability": ("#56B4E9", "^"),
    "alignment": ("#CC79A7", "D"),
    "learnalign": ("#D55E00", "*"),
    "random cold": ("#999999", "o"),
    "full": ("#009E73", "P"),
}
CURVES = ("random cold", "random", "filter", "learnalign", "full")


def label(arm):
    colour, marker = STYLES[arm]
    return {"color": colour, "marker": marker, "label": measures.NAMES[arm]}


def gains(axes, step_of, title):
    """Paired difference over random prompts, with its 95 % interval, by the number of prompts."""
    sizes = measures.sizes()
    axes.axhline(0, color="black", linewidth=1)
    for place, arm in enumerate(arm for arm in measures.COMPARED if arm != "random"):
        for position, size in enumerate(sizes):
            step = step_of(size)
            value = measures.difference(measures.measured(arm, size, step), measures.measured("random", size, step))
            if value is None:
                continue
            middle, low, high, _ = (100 * number for number in value)
            style = label(arm)
            style["label"] = style["label"] if position == 0 else None
            axes.errorbar(
                position + 0.14 * (place - 1.5),
                middle,
                [[middle - low], [high - middle]],
                capsize=3,
                linestyle="",
                **style,
            )
    axes.set_xticks(range(len(sizes)), [f"{size:,} prompts\n{step_of(size)} steps" for size in sizes])
    axes.set_ylabel("points over random prompts")
    axes.set_title(title)
    axes.grid(axis="y", alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # space for the legend above the intervals
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def curve(arm, size):
    """Steps, seconds of training and success rates, means over seeds; the look before the first step is shared."""
    looks = measures.load("looks.parquet")
    start = "none" if arm.endswith("cold") else "warm-up"
    first = looks[looks.arm == start]
    rows = looks[(looks.arm == arm) & (looks["size"] == (measures.full_size() if arm == "full" else size))]
    if not len(rows):
        return None
    rows = rows.assign(success=[np.mean(row.sampled) / row.samples for row in rows.itertuples()])
    begin = np.mean([np.mean(row.sampled) / row.samples for row in first.itertuples()])
    means = rows.groupby("step")[["seconds", "success"]].mean()
    return (np.array([0, *means.index]), np.array([0, *means.seconds]), 100 * np.array([begin, *means.success]))


def what_came_before(arm):
    """Steps, seconds and rollouts spent before the training on the chosen prompts begins."""
    runs = measures.load("runs.json")
    rows = [one for one in runs["costs"] if not one["cold"]]
    pool, chunk = runs["conditions"]["pool"], runs["conditions"]["chunk"]
    steps = seconds = rollouts = 0
    if not arm.endswith("cold"):
        steps = measures.WARMUP_STEPS
        seconds, rollouts = np.median([one["warm_up"] for one in rows]), steps * chunk * 8
    phases = {
        "filter": ("rollouts",),
        "learnability": ("rollouts",),
        "learnalign": ("rollouts", "gradients", "scores"),
    }
    seconds += sum(np.median([one[phase] for one in rows]) for phase in phases.get(arm, ()))
    return steps, seconds, rollouts + (pool * 8 if arm in phases else 0)


def curves(axes, size, against):
    chunk = measures.load("runs.json")["conditions"]["chunk"]
    for arm in CURVES:
        found = curve(arm, size)
        if found is None:
            continue
        steps, seconds, success = found
        before = what_came_before(arm)
        x = {
            "steps": before[0] + steps,
            "minutes": (before[1] + seconds) / 60,
            "rollouts": (before[2] + steps * chunk * 8) / 1000,
        }[against]
        axes.plot(x, success, markersize=5, **label(arm))
    axes.set_xlabel(
        {
            "steps": "optimizer steps, the warm-up counted",
            "minutes": "minutes on one core, warm-up and selection counted",
            "rollouts": "thousand rollouts generated, selection counted",
        }[against]
    )
    axes.set_ylabel("held-out success, %")
    axes.set_ylim(bottom=46)  # what has had no warm-up comes from below
    axes.grid(alpha=0.3)


def by_prompts(axes):
    for arm in measures.COMPARED:
        found = [(size, measures.measured(arm, size, measures.steps_of(size))) for size in measures.sizes()]
        found = [(size, np.mean([rows.mean() for rows in values.values()])) for size, values in found if values]
        axes.plot([size for size, _ in found], [100 * value for _, value in found], **label(arm))
    axes.set_xscale("log")
    axes.set_xticks(measures.sizes(), [f"{size:,}" for size in measures.sizes()])
    axes.minorticks_off()
    axes.set_xlabel("prompts trained on, two passes")
    axes.set_ylabel("held-out success, %")
    axes.grid(alpha=0.3)


def main_figure():
    """Gain and cost of the method in one look."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    gains(left, measures.steps_of, "What it buys: two passes, equal steps")
    curves(right, 500, "minutes")
    right.set_title("What it costs: 500 prompts of a pool of 7,378")
    right.legend(fontsize=8)
    return figure


def learning_curves():
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    by_prompts(axes[0])
    curves(axes[1], 500, "steps")
    curves(axes[2], 500, "rollouts")
    axes[0].legend(fontsize=8)
    axes[1].legend(fontsize=8)
    figure.suptitle("Against prompts; and, for 500 prompts, against steps and rollouts")
    return figure


def one_pass():
    figure, axes = plt.subplots(figsize=(6.5, 4.4))
    gains(axes, lambda size: measures.steps_of(size) // 2, "One pass, equal steps")
    return figure


def what_is_chosen():
    """Learnability against alignment over one pool, and the success rates of pool and choice."""
    table = measures.load("scores.parquet")
    table = table[~table.cold & (table.seed == table.seed.min())]
    best = table[(table.success_rate > 0) & (table.success_rate < 1)].sort_values("score", ascending=False).head(1000)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    rates = np.arange(9) / 8
    for rows, name, colour, shift in (
        (table, "pool", "#999999", -0.02),
        (best, "best 1,000 by LearnAlign", "#D55E00", 0.02),
    ):
        shares = [(rows.success_rate.round(3) == rate).mean() for rate in rates]
        left.bar(rates + shift, shares, width=0.04, color=colour, label=name)
    left.set_xlabel("success rate of a prompt's 8 rollouts")
    left.set_ylabel("share of prompts")
    left.legend()
    learnable = table[(table.success_rate > 0) & (table.success_rate < 1)]
    rng = np.random.default_rng(0)
    chosen = learnable["index"].isin(best["index"])
    for rows, name, colour in (
        (learnable[~chosen], "not chosen", "#999999"),
        (learnable[chosen], "best 1,000", "#D55E00"),
    ):
        right.scatter(
            rows.success_rate + rng.uniform(-0.03, 0.03, len(rows)),
            rows.alignment,
            s=3,
            color=colour,
            label=name,
            rasterized=True,
        )
    right.set_xlabel("success rate, spread out a little")
    right.set_ylabel("alignment")
    right.legend(markerscale=4)
    return figure


def draw():
    FIGURES.mkdir(parents=True, exist_ok=True)
    for name, figure in (
        ("evidence", main_figure()),
        ("evidence-one-pass", one_pass()),
        ("evidence-curves", learning_curves()),
        ("evidence-chosen", what_is_chosen()),
    ):
        figure.tight_layout()
        figure.savefig(FIGURES / f"{name}.png", dpi=110)
        plt.close(figure)
