"""Figures of a selection, drawn by matplotlib, for light and dark pages."""

import io
import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .words import chosen_by, score_used


if TYPE_CHECKING:
    from .result import Selection
    from .stages import Stage

_MOST_POINTS = 20_000
_LIGHT = {"ink": "#1c2024", "page": "#fcfcfd", "pool": "#8b96a3", "chosen": "#c4500c", "grid": "#d3d9e0"}
_DARK = {"ink": "#e7eaee", "page": "#14171a", "pool": "#7f8a96", "chosen": "#ff9d5c", "grid": "#39424c"}


@dataclass
class Drawing:
    """A figure to draw: `name` of its file, a caption, and a description in words."""

    name: str
    caption: str
    words: str
    draw: Callable

    def figure(self, dark: bool = False, size: tuple[float, float] = (6.4, 4.0)) -> Figure:
        """Draw the figure, light or dark; `size` is in inches."""
        colours = _DARK if dark else _LIGHT
        with _style(colours):
            figure = Figure(figsize=size, layout="constrained")
            self.draw(figure.add_subplot(), colours)
        return figure

    def png(self, dark: bool = False) -> bytes:
        """Draw the figure into a PNG file."""
        buffer = io.BytesIO()
        self.figure(dark).savefig(buffer, format="png", dpi=144)
        return buffer.getvalue()


def drawings(last: "Selection", stages: Sequence["Stage"] = ()) -> list[Drawing]:
    """
    Prepare the figures of the last selection of a run and, if the run has several stages (the last one included), of
    their differences. A selection at random has none.
    """
    table = last.scores.to_pandas()
    found = []
    if table["success_rate"].notna().any():
        graded = "reward_mean" in last.outcomes()
        first = _rewards(table, last) if graded else _success_rates(table, last)
        scatter = [_scatter(table, last)] if last.num_learnable() else []
        found += [first, *scatter, _lengths(table)]
    if last.provenance["seconds"]:
        found.append(_seconds(last))
    if len(stages) > 1 and stages[-1].outcomes:
        found.append(_stages(stages))
    return found


def plot(selection: "Selection", dark: bool = False) -> Figure:
    """Plot success rates (or graded rewards), scores and lengths of pool and choice, side by side."""
    import matplotlib.pyplot as plt  # this also sets up figures in a notebook

    panels = [drawing for drawing in drawings(selection) if drawing.name != "seconds"]
    colours = _DARK if dark else _LIGHT
    with _style(colours):
        figure = plt.figure(figsize=(5.2 * max(1, len(panels)), 3.9), layout="constrained")
        for axes, drawing in zip(np.atleast_1d(figure.subplots(1, max(1, len(panels)))), panels, strict=False):
            drawing.draw(axes, colours)
        if not panels:
            reason = f"chosen {chosen_by(selection)}" + ", without rollouts" * (not selection.measures)
            reason = "no prompt could be scored" if "rollouts" in selection.measures else reason
            figure.axes[0].text(0.5, 0.5, reason, ha="center")
            figure.axes[0].set_axis_off()
    plt.close(figure)  # a notebook shows what is returned, and would show an open figure a second time
    return figure


@contextmanager
def _style(colours):
    settings = {
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), colours["ink"]
        ),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), colours["page"]),
        "legend.facecolor": colours["page"],
        "legend.edgecolor": colours["grid"],
        "grid.color": colours["grid"],
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
    }
    with matplotlib.rc_context(settings):
        yield


def _bars(table, column, edges, **labels) -> Callable:
    """Draw a histogram of the pool and of the chosen prompts, bar beside bar."""

    def draw(axes, colours):
        width, centres = 0.42 * (edges[1] - edges[0]), (edges[:-1] + edges[1:]) / 2
        for rows, label, place in ((table, "pool", -0.5), (table[table["selected"]], "chosen", 0.5)):
            shares = np.histogram(rows[column].dropna(), bins=edges)[0] / max(1, len(rows))
            bars = {"width": width, "color": colours[label], "label": f"{label} ({len(rows):,})"}
            axes.bar(centres + place * width, shares, **bars)
        axes.set(ylabel="share of prompts", **labels)
        axes.legend()

    return draw


def _success_rates(table, selection) -> Drawing:
    chosen = table[table["selected"]]
    rollouts = selection.provenance["num_rollouts"]
    edges = (np.arange(rollouts + 2) - 0.5) / rollouts  # a bar for each number of successes
    draw = _bars(table, "success_rate", edges, xlabel="success rate", title="Success rates")
    never, always = (table["success_rate"] == 0).mean(), (table["success_rate"] == 1).mean()
    mean = "" if chosen.empty else f" That of the chosen prompts is {chosen['success_rate'].mean():.2f}."
    return Drawing(
        "success_rates",
        "Success rates of the pool and of the chosen prompts.",
        f"{never:.0%} of the prompts of the pool are never solved and {always:.0%} always; the mean success rate is "
        f"{table['success_rate'].mean():.2f}.{mean}",
        draw,
    )


def _rewards(table, selection) -> Drawing:
    chosen = table[table["selected"]]
    least, most = table["reward_mean"].min(), table["reward_mean"].max()
    edges = np.linspace(least, most if most > least else least + 1.0, 21)
    draw = _bars(table, "reward_mean", edges, xlabel="mean reward of a prompt", title="Rewards")
    words = (
        f"For {(table['learnability'] == 0).mean():.0%} of the pool all rewards of a prompt are equal. Over the pool "
        f"the mean reward is {table['reward_mean'].mean():.2f} and the mean standard deviation of a prompt's rewards "
        f"{table['reward_std'].mean():.2f}."
    )
    if not chosen.empty:
        words += f" For the chosen ones: {chosen['reward_mean'].mean():.2f} and {chosen['reward_std'].mean():.2f}."
    return Drawing("rewards", "Mean rewards of the pool and of the chosen prompts.", words, draw)


def _scatter(table, selection) -> Drawing:
    learnable = table[table["learnability"] > 0]
    aligned = learnable["alignment"].notna().any()
    vertical, label = ("alignment", "alignment") if aligned else ("score", "score")
    points = learnable.sample(min(len(learnable), _MOST_POINTS), random_state=0).sort_values("selected")

    def draw(axes, colours):
        # V takes few values, so points would hide each other
        spread = np.random.default_rng(0).uniform(-0.25, 0.25, len(points)) * _smallest_gap(points["learnability"])
        for selected, name in ((False, "not chosen"), (True, "chosen")):
            mask = (points["selected"] == selected).to_numpy()
            axes.scatter(
                points["learnability"][mask] + spread[mask],
                points[vertical][mask],
                s=6,
                linewidths=0,
                color=colours["chosen" if selected else "pool"],
                label=f"{name} ({(learnable['selected'] == selected).sum():,})",
            )
        axes.set(xlabel="learnability (jittered)", ylabel=label, title=f"Learnability and {label}")
        axes.legend(markerscale=3)

    words = f"{len(learnable):,} learnable prompts."
    if len(learnable) and learnable["selected"].any() and aligned:
        means = learnable.groupby("selected")["alignment"].mean()
        words += f" Mean alignment of the chosen {means[True]:.2f}"
        words += f", of the others {means[False]:.2f}." if False in means else "."
    # |mean z| is one number for the whole pool: see `maths.scores_from_mean`
    score = {
        "learnalign": "learnability \u00d7 alignment \u00d7 |mean z|",
        "alignment": "alignment \u00d7 |mean z|",
        "learnability": "learnability",
    }.get(score_used(selection), "")
    constant = (
        ", where |mean z|, the length of the pool's mean gradient direction, is the same for every prompt"
        if "z" in score
        else ""
    )
    caption = f"Learnability and {label} of the learnable prompts."
    caption += f" Their score is {score}{constant}." if score else ""
    return Drawing("scores", caption, words, draw)


def _smallest_gap(values) -> float:
    levels = np.unique(values.round(6))
    return float(np.diff(levels).min()) if 1 < len(levels) < 50 else 0.0


def _lengths(table) -> Drawing:
    chosen = table[table["selected"]]
    lengths = table["completion_length_mean"].dropna()
    edges = np.linspace(0, max(1.0, float(lengths.quantile(0.995))), 41)

    def draw(axes, colours):
        for rows, label in ((table, "pool"), (chosen, "chosen")):
            values = rows["completion_length_mean"].dropna().clip(upper=edges[-1])
            if len(values):
                weights = np.full(len(values), 1 / len(values))
                axes.hist(
                    values,
                    bins=edges,
                    weights=weights,
                    histtype="step",
                    linewidth=2,
                    color=colours[label],
                    label=label,
                )
                axes.axvline(values.mean(), color=colours[label], linestyle="--", linewidth=1)
        axes.set(xlabel="mean completion length, tokens", ylabel="share of prompts", title="Completion length")
        axes.legend()

    words = f"Mean completion length {lengths.mean():.1f} tokens in the pool"
    words += "." if chosen.empty else f" and {chosen['completion_length_mean'].mean():.1f} among the chosen."
    return Drawing(
        "lengths",
        "Length of the completions of the pool and of the chosen prompts; dashed lines are means.",
        words,
        draw,
    )


def _seconds(selection) -> Drawing:
    seconds = selection.provenance["seconds"]

    def draw(axes, colours):
        names = list(seconds)[::-1]
        bars = axes.barh(names, [seconds[name] for name in names], color=colours["chosen"])
        axes.bar_label(bars, [f" {seconds[name]:,.1f} s" for name in names], color=colours["ink"])
        axes.set(xlabel="seconds", title="Time of each phase")
        axes.margins(x=0.18)

    words = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items()) + "."
    return Drawing("seconds", "Time of each phase of the selection:", words, draw)


def overlaps(stages: Sequence["Stage"]) -> list[float | None]:
    """Compute the share of each stage's prompts that the stage before had also chosen; `None` if there is no share."""
    shares = [
        float(np.isin(now.indices, before.indices).mean()) if len(now.indices) else None
        for before, now in itertools.pairwise(stages)
    ]
    return [None, *shares]


def _stages(stages) -> Drawing:
    name = next(iter(stages[-1].outcomes), "success_rate")
    rates = [stage.outcomes.get(name, (np.nan, np.nan)) for stage in stages]
    label = name.replace("_mean", "").replace("_", " ")
    steps = [stage.provenance["global_step"] for stage in stages]
    kept = overlaps(stages)

    def draw(axes, colours):
        axes.plot(steps, [rate[0] for rate in rates], "o-", color=colours["pool"], label=f"{label} of the pool")
        axes.plot(steps, [rate[1] for rate in rates], "s-", color=colours["chosen"], label=f"{label} of the chosen")
        axes.set(xlabel="optimizer step", title="Selections of this run")
        if name == "success_rate":  # rewards may have any scale
            shares = [np.nan if share is None else share for share in kept]
            axes.plot(steps, shares, "^:", color=colours["ink"], label="share also chosen before")
            axes.set(ylim=(0, 1))
        axes.legend()

    words = "; ".join(
        f"step {step}: mean {label} of the pool {rate[0]:.2f}, of the chosen {rate[1]:.2f}"
        + ("" if share is None else f", {share:.0%} kept")
        for step, rate, share in zip(steps, rates, kept, strict=True)
    )
    return Drawing("stages", "How the selections of a staged run differ.", words + ".", draw)
