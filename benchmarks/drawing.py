"""Figures: means over seeds, with the range of the seeds."""

from statistics import fmean

import matplotlib
from harness import ROOT


matplotlib.use("Agg")
import matplotlib.pyplot as plt


FIGURES = ROOT / "docs" / "figures"
# Okabe and Ito's colours, which the colour-blind tell apart; markers tell the arms apart without any colour
STYLES = {
    "uniform": ("#000000", "o", "random prompts"),
    "online": ("#D55E00", "*", "chosen online"),
    "refill": ("#56B4E9", "s", "refill (DAPO)"),
    "mopps": ("#CC79A7", "D", "MoPPS"),
    "learnability": ("#009E73", "v", "selection by learnability"),
    "target": ("#0072B2", "^", "selection by the target"),
    "target then online": ("#E69F00", "P", "target's half, then online"),
}
FRONT = {
    "hard": "a quarter can be learnt, most are too hard",
    "clean": "all can be learnt, nearly half are live",
    "skills": "many skills, most levels too hard",
}
ONE = {"skills-target": "many skills, of which three are tested"}


def curves(axes, looks, against, scale, style, percent=1) -> None:
    """Success at the looks at each run, of which all have as many, against what the looks say, times `scale`."""
    places = [scale * fmean(look[against] for look in part) for part in zip(*looks, strict=True)]
    rates = [[percent * look.get("sampled", look.get("mean")) for look in own] for own in looks]
    line(axes, places, rates, style)


def line(axes, places, values, style) -> None:
    """Values of each run at these places: their mean, and their range."""
    colour, marker, name = style
    label = f"{name}, {len(values)} seed{'s' if len(values) > 1 else ''}"
    parts = [*zip(*values, strict=True)]
    axes.plot(places, [fmean(part) for part in parts], color=colour, marker=marker, label=label)
    axes.fill_between(places, [*map(min, parts)], [*map(max, parts)], color=colour, alpha=0.12, linewidth=0)


def finish(axes, xlabel, ylabel=None, **settings) -> None:
    """Labels, a grid, and more settings of the axes."""
    axes.set(xlabel=xlabel, **settings)
    if ylabel:
        axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)


def save(figure, path, **settings) -> None:
    figure.tight_layout()
    figure.savefig(path, **(settings or {"dpi": 120, "metadata": {"Software": None}}))
    plt.close(figure)


def draw_pools(runs, path, pools) -> None:
    """A panel for each pool: held-out success against rollouts."""
    from results import end, of, shared

    figure, panels = plt.subplots(1, len(pools), figsize=(1 + 4.4 * len(pools), 4), squeeze=False)
    for axes, (pool, title) in zip(panels[0], pools.items(), strict=True):
        for arm, style in STYLES.items():
            looks = shared(found) if (found := of(runs, pool, arm)) else []
            # If only start and end were measured, the end alone
            looks = [part[1:] if len(part) == 2 else part for part in looks]
            if looks:
                curves(axes, looks, "rollouts", 1e-3, style, 100)
        goal = fmean(end(run) for run in of(runs, pool, "uniform"))
        axes.axhline(100 * goal, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        finish(axes, "rollouts generated, thousands")
        axes.legend(fontsize=8, loc="lower right")
    panels[0][0].set_ylabel("success on the test, %")
    save(figure, path)
