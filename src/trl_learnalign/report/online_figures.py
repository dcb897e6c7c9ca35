"""Figures of an online run."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from ..selection.figures import Drawing


_MOST_POINTS = 1000
_MOST_VISITS = 20  # in a bar of their own
_LEAST_GROUPS = 5  # that a dot is drawn for


def drawings(prompts: pa.Table, history: pa.Table, run: dict) -> list[Drawing]:
    """
    Prepare the figures, in the order of the page.

    Args:
        prompts, history (`pa.Table`), run (`dict`): as `online_tables.load_tables` returns them.
    """
    columns = {name: history[name].to_numpy(zero_copy_only=False).astype(float) for name in history.column_names}
    return [
        _live(columns, run),
        _success(columns, run),
        _skill(columns),
        _headroom(columns, run),
        _calibration(run),
        _by_visit(run),
        _visits(prompts),
        _coverage(columns, run),
    ]


def _moving(values: np.ndarray, window: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Average the last `window` values at each place, weighted, without those that are NaN."""
    weights = np.where(np.isfinite(values), 1.0 if weights is None else weights, 0.0)
    sums = np.cumsum(np.where(weights > 0, values, 0.0) * weights)
    counts = np.cumsum(weights)
    ends = np.arange(len(values))
    before = np.maximum(ends - window, -1)
    sums = sums - np.where(before >= 0, sums[before], 0.0)
    counts = counts - np.where(before >= 0, counts[before], 0)
    return np.where(counts > 0, sums / np.maximum(counts, 1e-9), np.nan)


def _windows(columns) -> tuple[int, int]:
    """Count the rows that a mean is taken over: a mean of all groups, and one of the few uniform draws."""
    number = len(columns["groups"])
    return max(10, number // 20), max(40, number // 5)


def _over_time(columns, lines, level=None, bottom=None, **labels) -> Callable:
    """
    Draw lines over the groups trained on.

    Args:
        lines (`dict[str, tuple]`): by label the values and a key of `_STYLES`.
        level (`float`, *optional*): where a thin horizontal line goes.
        bottom (`float`, *optional*): the lower end of the vertical axis.
        labels: for `axes.set`.
    """

    def draw(axes, colours):
        _shade(axes, columns, colours)
        if level is not None:
            axes.axhline(level, color=colours["ink"], linewidth=0.8)
        for label, (values, style) in lines.items():
            step = max(1, len(values) // _MOST_POINTS)
            kept = slice(None, None, -step)  # from the end, so that the latest value is drawn
            axes.plot(
                columns["groups"][kept][::-1],
                values[kept][::-1],
                label=label,
                **_STYLES[style] | {"color": colours[style]},
            )
        axes.set(xlabel="prompts trained on", **labels)
        axes.set_ylim(bottom=bottom)
        axes.legend()

    return draw


_STYLES: dict[str, dict] = {
    "chosen": {"linewidth": 2},
    "pool": {"linewidth": 2, "linestyle": "--"},
    "ink": {"linewidth": 1.2, "linestyle": ":"},
}


def _shade(axes, columns, colours):
    """Shade the groups that were drawn uniformly. Groups are counted, so ticks are whole numbers."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    uniform = np.concatenate([[0], columns["choosing"] <= 0.5, [0]]).astype(int)
    starts, ends = np.flatnonzero(np.diff(uniform) > 0), np.flatnonzero(np.diff(uniform) < 0)
    last, first = columns["groups"], np.concatenate([[0], columns["groups"][:-1]])
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        label = None if number else "drawn uniformly"
        axes.axvspan(first[start], last[end - 1], color=colours["grid"], alpha=0.7, lw=0, label=label)


def _share(value) -> str:
    return f"{value:.0%}" if np.isfinite(value) else "unknown"


def _number(value) -> str:
    return f"{value:.2f}" if np.isfinite(value) else "unknown"


def _groups(number) -> str:
    return "1 group" if number == 1 else f"{number:,.0f} groups"


def _live(columns, run) -> Drawing:
    _, window = _windows(columns)
    draws = columns["uniform_draws"]
    chosen = _moving(columns["live_chosen"], window, np.diff(columns["groups"], prepend=0) - draws)
    uniform = _moving(columns["live_uniform"], window, draws)

    lines = {"uniform draws": (uniform, "pool"), "chosen prompts": (chosen, "chosen")}
    draw = _over_time(columns, lines, ylabel="share of live groups", title="Live groups", ylim=(0, 1))
    return Drawing(
        "online_live",
        f"Share of groups whose rewards differ, so that they have a gradient: means over {window} rows of the "
        "history, in which uniform draws are few where prompts are chosen.",
        f"At the end {_share(chosen[-1])} of chosen prompts and {_share(uniform[-1])} of "
        f"{draws[-window:].sum():,.0f} uniform draws.",
        draw,
    )


def _success(columns, run) -> Drawing:
    short, _ = _windows(columns)
    groups = np.diff(columns["groups"], prepend=0)  # the last row may have few
    observed, predicted = (_moving(columns[f"{name}_success"], short, groups) for name in ("observed", "predicted"))
    pool, name = columns["pool_success"], "scaled reward" if run["graded"] else "success rate"
    lines = {"pool, estimated": (pool, "pool"), "predicted": (predicted, "ink"), "all groups": (observed, "chosen")}
    draw = _over_time(columns, lines, ylabel=f"mean {name}", title="Success", ylim=(0, 1))
    return Drawing(
        "online_success",
        f"Mean {name} of the prompts trained on, as observed and as predicted before, over {short} rows of the "
        "history. That of the whole pool is estimated: the mean prediction, corrected by its mean error on the latest "
        "200 uniform draws or so. Chosen prompts are meant to be near one half.",
        f"At the end {_number(observed[-1])} was observed, {_number(predicted[-1])} predicted, and the pool's is "
        f"{_number(pool[-1])}.",
        draw,
    )


def _skill(columns) -> Drawing:
    skill = columns["skill"]
    ends = max(-0.25, min(-0.05, np.nanmin(skill))), 1
    labels = {"ylabel": "skill", "title": "Skill of the prediction", "ylim": ends}
    draw = _over_time(columns, {"skill": (skill, "chosen")}, level=0, **labels)
    return Drawing(
        "online_skill",
        "Skill of the prediction of success against the mean, on uniform draws: 1 minus the ratio of squared "
        "errors. 0 is no better, 1 is without error; random rollouts keep it below 1.",
        f"It is {columns['skill'][-1]:.2f} at the end.",
        draw,
    )


def _headroom(columns, run) -> Drawing:
    headroom = columns["headroom"]
    labels = {"ylabel": "ratio", "title": "Expected gain of choosing"}
    least = min(0.9, np.nanmin(headroom))
    draw = _over_time(columns, {"headroom": (headroom, "chosen")}, level=1, bottom=least, **labels)
    return Drawing(
        "online_headroom",
        f"Headroom: the expected {'variance of the rewards' if run['graded'] else 'p (1 - p)'} of the prompts that "
        "would be chosen, divided by that of random ones.",
        f"It is {columns['headroom'][-1]:.2f} at the end.",
        draw,
    )


def _calibration(run) -> Drawing:
    sums = np.array(run["calibration"])  # (chosen and uniform, bins, groups and predicted and observed)
    words = []

    def means(of):
        groups = sums[of, :, 0]
        kept = groups > 0
        return groups[kept], sums[of, kept, 1] / groups[kept], sums[of, kept, 2] / groups[kept]

    for of, name in ((0, "chosen prompts"), (1, "uniform draws")):
        groups, predicted, observed = means(of)
        if len(groups):
            distance = np.average(np.abs(predicted - observed), weights=groups)
            words.append(f"{name} {distance:.2f} ({_groups(groups.sum())})")

    def draw(axes, colours):
        axes.plot([0, 1], [0, 1], color=colours["ink"], linewidth=0.8)
        for of, name, colour, marker in ((1, "uniform draws", "pool", "s--"), (0, "chosen prompts", "chosen", "o-")):
            groups, predicted, observed = means(of)
            if len(groups):
                label = f"{name} ({groups.sum():,.0f})"
                axes.plot(predicted, observed, marker, color=colours[colour], linewidth=1, markersize=3, label=label)
                sizes = 12 + 120 * groups / groups.max()
                axes.scatter(predicted, observed, sizes, color=colours[colour], alpha=0.45, linewidths=0)
        name = "scaled reward" if run["graded"] else "success"
        axes.set(xlabel=f"predicted {name}", ylabel=f"observed {name}", xlim=(0, 1), ylim=(0, 1))
        axes.set_title("Predicted against observed")
        if axes.has_data() and axes.get_legend_handles_labels()[0]:
            axes.legend()

    return Drawing(
        "online_calibration",
        "Groups by what was predicted of them before their rollouts; larger dots are more groups. On the diagonal the "
        "prediction is right on average.",
        f"Mean distance from the diagonal: {', '.join(words)}." if words else "",
        draw,
    )


def _by_visit(run) -> Drawing:
    groups, success, live = np.array(run["by_visit"]).T
    kept = groups >= _LEAST_GROUPS
    number = np.flatnonzero(kept) + 1
    success, live = success[kept] / groups[kept], live[kept] / groups[kept]

    def draw(axes, colours):
        name = "mean scaled reward" if run["graded"] else "success rate"
        axes.plot(number, live, "o-", color=colours["chosen"], label="share of live groups")
        axes.plot(number, success, "s--", color=colours["pool"], label=name)
        axes.set(xlabel="number of the visit", ylabel="share", title="By number of the visit", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    words = ""
    if len(number):
        words = f"Visit {number[0]}: {_groups(groups[kept][0])}, success {success[0]:.2f}, {live[0]:.0%} live."
        if len(number) > 1:
            words += f" Visit {number[-1]}: {_groups(groups[kept][-1])}, {success[-1]:.2f}, {live[-1]:.0%}."
    last = f" Visits of fewer than {_LEAST_GROUPS} groups are left out."
    last += f" Visit {len(groups)} includes all later ones." if kept[-1] else ""
    return Drawing(
        "online_by_visit",
        f"Success and live groups by how often a prompt had come before.{last} Prompts that come often were chosen "
        "for their success rate, so the lines are not learning curves.",
        words,
        draw,
    )


def _visits(prompts) -> Drawing:
    visits = prompts["visits"].to_numpy()
    counts = np.bincount(np.minimum(visits, _MOST_VISITS))
    shares = counts / len(visits)

    def draw(axes, colours):
        bars = np.arange(len(shares))
        axes.bar(bars[:1], shares[:1], color=colours["pool"], label="never visited")
        axes.bar(bars[1:], shares[1:], color=colours["chosen"], label="visited")
        axes.set(xlabel="visits", ylabel="share of prompts", title="Visits per prompt")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    last = f" {_MOST_VISITS} stands for {_MOST_VISITS} or more." if len(counts) > _MOST_VISITS else ""
    return Drawing(
        "online_visits",
        f"Visits of each prompt.{last}",
        f"{counts[0]:,} of {len(visits):,} prompts ({shares[0]:.0%}) were never visited; the most visits of one are "
        f"{visits.max():,}.",
        draw,
    )


def _coverage(columns, run) -> Drawing:
    styles = {"visited": "chosen", "retired": "pool", "parked": "ink"}
    lines = {name: (columns[name], style) for name, style in styles.items()}
    draw = _over_time(columns, lines, bottom=0, ylabel="prompts", title="Coverage")
    last = {name: columns[name][-1] for name in styles}
    chosen_by = run["settings"]["curriculum"]
    return Drawing(
        "online_coverage",
        f"Different prompts visited so far, in a pool of {run['pool']:,}; retired prompts (solved by all of the last "
        f"{chosen_by['retired_after'] * chosen_by['doubling']} rollouts or more) and parked ones (solved by none).",
        f"At the end {last['visited']:,.0f} visited, {last['retired']:,.0f} retired, {last['parked']:,.0f} parked.",
        draw,
    )
