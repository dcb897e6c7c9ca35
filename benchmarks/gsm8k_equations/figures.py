"""The figures of docs/evidence.md; `evidence.py` calls `draw`."""

import numpy as np
from drawing import FIGURES, finish, plt, save
from measures import COMPARED, NAMES, WARMUP_STEPS, difference, full_size, load, measured, sizes, steps_of


# As in drawing.py
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
    return {"color": colour, "marker": marker, "label": NAMES[arm]}


def gains(axes, step_of, title):
    """Paired difference over random prompts, with its 95 % interval, by the number of prompts."""
    axes.axhline(0, color="black", linewidth=1)
    for place, arm in enumerate(arm for arm in COMPARED if arm != "random"):
        style = label(arm)
        for position, size in enumerate(sizes()):
            step = step_of(size)
            value = difference(measured(arm, size, step), measured("random", size, step))
            if value is not None:
                middle, low, high, _ = (100 * number for number in value)
                bounds = [[middle - low], [high - middle]]
                axes.errorbar(position + 0.14 * (place - 1.5), middle, bounds, capsize=3, linestyle="", **style)
                style["label"] = None
    axes.set_xticks(range(len(sizes())), [f"{size:,} prompts\n{step_of(size)} steps" for size in sizes()])
    axes.set(ylabel="points over random prompts", title=title)
    axes.grid(axis="y", alpha=0.3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.2 * (high - low))  # space for the legend above the intervals
    axes.legend(fontsize=8, ncols=2, loc="upper center")


def curve(arm, size):
    """Steps, seconds of training and success rates, means over seeds; the look before the first step is shared."""
    looks = load("looks.parquet")
    start = "none" if arm.endswith("cold") else "warm-up"
    first = looks[looks.arm == start]
    rows = looks[(looks.arm == arm) & (looks["size"] == (full_size() if arm == "full" else size))]
    if not len(rows):
        return None
    rows = rows.assign(success=[np.mean(row.sampled) / row.samples for row in rows.itertuples()])
    begin = np.mean([np.mean(row.sampled) / row.samples for row in first.itertuples()])
    means = rows.groupby("step")[["seconds", "success"]].mean()
    return (np.array([0, *means.index]), np.array([0, *means.seconds]), 100 * np.array([begin, *means.success]))


def what_came_before(arm):
    """Steps, seconds and rollouts spent before the training on the chosen prompts begins."""
    runs = load("runs.json")
    rows = [one for one in runs["costs"] if not one["cold"]]
    pool, chunk = runs["conditions"]["pool"], runs["conditions"]["chunk"]
    steps = seconds = rollouts = 0
    if not arm.endswith("cold"):
        steps = WARMUP_STEPS
        seconds, rollouts = np.median([one["warm_up"] for one in rows]), steps * chunk * 8
    phases = {"filter": ("rollouts",), "learnability": ("rollouts",)}
    phases["learnalign"] = ("rollouts", "gradients", "scores")
    seconds += sum(np.median([one[phase] for one in rows]) for phase in phases.get(arm, ()))
    return steps, seconds, rollouts + (pool * 8 if arm in phases else 0)


def curves(axes, size, against):
    chunk = load("runs.json")["conditions"]["chunk"]
    for arm in CURVES:
        found = curve(arm, size)
        if found is not None:
            steps, seconds, success = found
            before = what_came_before(arm)
            x = {"steps": before[0] + steps, "minutes": (before[1] + seconds) / 60}
            x["rollouts"] = (before[2] + steps * chunk * 8) / 1000
            axes.plot(x[against], success, markersize=5, **label(arm))
    texts = {
        "steps": "optimizer steps, the warm-up counted",
        "minutes": "minutes on one core, warm-up and selection counted",
        "rollouts": "thousand rollouts generated, selection counted",
    }
    finish(axes, texts[against], "held-out success, %")
    axes.set_ylim(bottom=46)  # what has had no warm-up comes from below


def by_prompts(axes):
    for arm in COMPARED:
        found = [(size, measured(arm, size, steps_of(size))) for size in sizes()]
        found = [(size, np.mean([rows.mean() for rows in values.values()])) for size, values in found if values]
        axes.plot([size for size, _ in found], [100 * value for _, value in found], **label(arm))
    axes.set_xscale("log")
    axes.set_xticks(sizes(), [f"{size:,}" for size in sizes()])
    axes.minorticks_off()
    finish(axes, "prompts trained on, two passes", "held-out success, %")


def main_figure():
    """Gain and cost of the method in one look."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    gains(left, steps_of, "What it buys: two passes, equal steps")
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
    gains(axes, lambda size: steps_of(size) // 2, "One pass, equal steps")
    return figure


def what_is_chosen():
    """Learnability against alignment over one pool, and the success rates of pool and choice."""
    table = load("scores.parquet")
    table = table[~table.cold & (table.seed == table.seed.min())]
    best = table[(table.success_rate > 0) & (table.success_rate < 1)].sort_values("score", ascending=False).head(1000)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    rates = np.arange(9) / 8
    both = (table, "pool", "#999999", -0.02), (best, "best 1,000 by LearnAlign", "#D55E00", 0.02)
    for rows, name, colour, shift in both:
        shares = [(rows.success_rate.round(3) == rate).mean() for rate in rates]
        left.bar(rates + shift, shares, width=0.04, color=colour, label=name)
    left.set(xlabel="success rate of a prompt's 8 rollouts", ylabel="share of prompts")
    left.legend()
    learnable = table[(table.success_rate > 0) & (table.success_rate < 1)]
    rng, chosen = np.random.default_rng(0), learnable["index"].isin(best["index"])
    both = (learnable[~chosen], "not chosen", "#999999"), (learnable[chosen], "best 1,000", "#D55E00")
    for rows, name, colour in both:
        rates = rows.success_rate + rng.uniform(-0.03, 0.03, len(rows))
        right.scatter(rates, rows.alignment, s=3, color=colour, label=name, rasterized=True)
    right.set(xlabel="success rate, spread out a little", ylabel="alignment")
    right.legend(markerscale=4)
    return figure


def draw():
    FIGURES.mkdir(parents=True, exist_ok=True)
    figures = {"evidence": main_figure, "evidence-one-pass": one_pass}
    for name, make in (figures | {"evidence-curves": learning_curves, "evidence-chosen": what_is_chosen}).items():
        save(make(), FIGURES / f"{name}.png", dpi=110)
