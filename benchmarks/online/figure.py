"""The figures: held-out success against rollouts, of the front pages and of the other testbeds."""

from statistics import fmean

import matplotlib
from results import end, of, shared


matplotlib.use("Agg")
import matplotlib.pyplot as plt


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


def draw(runs, path, pools=FRONT) -> None:
    """Means over seeds, with the range of the seeds; a panel for each pool."""
    figure, panels = plt.subplots(1, len(pools), figsize=(1 + 4.4 * len(pools), 4), squeeze=False)
    for axes, (pool, title) in zip(panels[0], pools.items(), strict=True):
        for arm, (colour, marker, name) in STYLES.items():
            found = of(runs, pool, arm)
            if not found:
                continue
            looks = list(zip(*shared(found), strict=True))
            rollouts = [fmean(look["rollouts"] for look in part) / 1000 for part in looks]
            rates = [[100 * look["sampled"] for look in part] for part in looks]
            if len(rates) == 2:  # only the start and the end were measured
                rollouts, rates = rollouts[1:], rates[1:]
            style = {
                "color": colour,
                "marker": marker,
                "label": f"{name}, {len(found)} seed{'s' if len(found) > 1 else ''}",
            }
            axes.plot(rollouts, [fmean(part) for part in rates], **style)
            axes.fill_between(rollouts, [*map(min, rates)], [*map(max, rates)], color=colour, alpha=0.12, linewidth=0)
        goal = fmean(end(run) for run in of(runs, pool, "uniform"))
        axes.axhline(100 * goal, color="black", linewidth=0.8, linestyle=":")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("rollouts generated, thousands")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    panels[0][0].set_ylabel("success on the test, %")
    figure.tight_layout()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)
