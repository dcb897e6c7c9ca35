"""`report.html` of an online run: what was chosen, why, and with what result, in one file that needs no network."""

import html
import json
import os
from pathlib import Path

import numpy as np

from ..ground.disk import write_atomically
from ..selection.words import live_shares
from . import online_figures
from .online_tables import count_states, find_run, load_tables, write_tables
from .page import MISSING, fact_list, figure, filled, html_table, long_text, number
from .trackers import log_figures


REPORT_FILE = "report.html"
MOST_SUSPECTS_SHOWN = 20
_SAMPLES = {
    "live": ("Live at the last visit", "Those with the highest predicted learnability."),
    "retired": ("Retired", "Solved by all rollouts of their last visits; those seen last."),
    "parked": ("Parked", "Solved by no rollout of their last visits; those seen last."),
    "new": ("Never visited", "At random."),
    "unscored": ("Unscored", "No reward that decides success, or no token in the loss; those seen last."),
}
_STATES = {
    "new": "never visited",
    "live": "some rollouts of the last visit succeeded, others failed",
    "resting": "all rollouts of the last visit succeeded, or none did: eight such rollouts double the rest",
    "retired": "the last sixteen rollouts or more succeeded: eight more double the rest, up to 64 times",
    "parked": "the last sixteen rollouts or more failed: eight more double the rest, up to 64 times",
    "unscored": "the last visit had no reward that decides success, or no token in the loss: each doubles the rest",
}


def write_online_report(schedule, host, directory: Path) -> Path:
    """
    Writes the tables and the page of an online run as it is now. The texts of some prompts are read, whatever the size
    of the pool. At the end of training the figures go to the trackers, too.

    Args:
        schedule ([`OnlineSchedule`]): after its first observation.
        host ([`Host`]): the trainer.
        directory (`Path`): `OUTPUT_DIR/learnalign`.

    Returns:
        `Path`: the HTML file.
    """
    write_tables(schedule, host, directory)
    target, drawings = _write_page(directory)
    if host.trainer.control.should_training_stop:
        log_figures(host.trainer, drawings)
    return target


def rewrite_online_report(path: str | os.PathLike) -> Path | None:
    """
    Writes the page again from the files of a run.

    Args:
        path: the `output_dir` of a run, or its `learnalign` directory.

    Returns:
        `Path`: the HTML file; `None` if `path` holds no online run, or a selection that was made later.

    Raises:
        `ValueError`: a file is missing or damaged.
    """
    directory = find_run(Path(path))
    return None if directory is None else _write_page(directory)[0]


def _write_page(directory):
    prompts, history, suspects, run = load_tables(directory)
    drawings = online_figures.drawings(prompts, history, run)
    page = filled("online_template.html", _parts(prompts, history, suspects, run, drawings))
    target = directory / REPORT_FILE
    write_atomically(target, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return target, drawings


def _parts(prompts, history, suspects, run, drawings) -> dict[str, str]:
    step = f"{run['step']:,} of {run['max_steps']:,}"
    return {
        "title": f"LearnAlign online, step {step}",
        "subtitle": html.escape(
            f"{run['model']}, {run['pool']:,} prompts, written {run['made'][:16].replace('T', ' ')} UTC"
        ),
        "skip": "figures",
        "skip_to": "the figures",
        "scripts": "",
        "step": step,
        "intro": _intro(run, step),
        "facts": fact_list(_facts(prompts, history, run)),
        "figures": "\n".join(figure(one, one.png(), one.png(dark=True)) for one in drawings),
        "periods": _periods(run),
        "states": _states(prompts, run),
        "suspects": _suspects(suspects, run),
        "samples": _samples(run),
        "settings": _settings(run),
    }


def _intro(run, step) -> str:
    return (
        "This page shows which prompts an online run trained on, and why. From the rewards of training so far, the "
        "schedule predicts which prompts some rollouts will solve and others will not. Only such <em>live</em> groups "
        "have a gradient. One prompt in twenty is drawn uniformly from the whole pool; they measure how good "
        "the policy and the prediction are. The figures show live groups, success and prediction over "
        "the run. The tables show when prompts were chosen and when not, which prompts come less often because they "
        "are always or never solved, and which may have a wrong answer or wrong grading. The page shows the state at "
        f"step {step}. It is written with each checkpoint and at the end of training, and does not refresh by itself."
    )


def _facts(prompts, history, run) -> dict[str, str]:
    chosen, uniform, draws = live_shares(lambda name: history[name].to_numpy(zero_copy_only=False))
    states = count_states(prompts)
    visited = prompts.num_rows - states.get("new", 0)
    return {
        "pool": f"{prompts.num_rows:,}",
        "visited": f"{visited:,}",
        "never visited": f"{states.get('new', 0):,}",
        "live, chosen": f"{chosen:.0%}" if np.isfinite(chosen) else MISSING,
        f"live, {draws:,.0f} uniform draws": f"{uniform:.0%}" if np.isfinite(uniform) else MISSING,
        "scaled reward of the pool" if run["graded"] else "success of the pool": number(run["pool_success"], 2),
        "skill": number(run["skill"], 2),
        "headroom": f"{run['headroom']:.2f} x",
        "draws now": "chosen" if run["choosing"] else "uniform",
        "retired": f"{states.get('retired', 0):,}",
        "parked": f"{states.get('parked', 0):,}",
        "unscored": f"{states.get('unscored', 0):,}",
        "suspects": f"{run['suspects']:,}",
    }


def _periods(run) -> str:
    rows = [
        [
            f"{one['first']:,} to {one['last']:,}",
            "chosen" if one["choosing"] else "drawn uniformly",
            f"{one['skill']:.2f}",
            f"{one['headroom']:.2f}",
            html.escape(one["why"] or "the prediction is good enough, and choosing is expected to help"),
        ]
        for one in run["periods"]
    ]
    columns = ["groups", "prompts", "skill", "headroom", "why"]
    caption = "Skill and headroom at the end of each period; the last 20 periods at most."
    return html_table("When prompts were chosen", columns, rows, (), caption, ("why",))


def _states(prompts, run) -> str:
    counts = count_states(prompts)
    rows = [
        [name, f"{counts.get(name, 0):,}", f"{counts.get(name, 0) / prompts.num_rows:.1%}", meaning]
        for name, meaning in _STATES.items()
    ]
    columns = ["state", "prompts", "share", "meaning"]
    table = html_table("States of the prompts", columns, rows, words=("state", "meaning"))
    lines = [
        f"{int(visits):,} later visits of {kind} prompts, after which {int(changed):,} ({changed / visits:.0%}) "
        f"{outcome}."
        if visits
        else f"No {kind} prompt was visited again."
        for kind, outcome, (visits, changed) in zip(
            ("retired", "parked"),
            ("were not solved by all rollouts any more", "were solved by some rollouts"),
            run["revisits"],
            strict=True,
        )
    ]
    return table + f"<p>{' '.join(lines)}</p>"


def _suspects(suspects, run) -> str:
    explanation = (
        "<p>Prompts that no rollout solved, although success was predicted. Their answer may be wrong, or the reward "
        "function may not accept the right one; others are only harder than predicted. The chance is the predicted "
        "probability that all their rollouts fail.</p>"
    )
    if not run.get("skilled", True):
        explanation += (
            f"<p>The prediction is hardly better than the mean success of the pool (skill {run['skill']:.2f}), so "
            "these are prompts that failed more often than that mean lets expect, whatever they are like.</p>"
        )
    if not suspects.num_rows:
        none = "There are none." if run.get("tried", True) else "None are listed before the prediction was tried."
        none = "With graded rewards suspects are not searched for." if run["graded"] else none
        return explanation + f"<p>{none}</p>"
    answers = [
        name for name in suspects.column_names if name not in ("index", "prompt", "completion", "visits", "chance")
    ]
    shown = suspects.slice(0, MOST_SUSPECTS_SHOWN).to_pylist()
    columns = ["index", "visits", "chance", "prompt", *answers, "a completion"]
    rows = [
        [
            str(one["index"]),
            str(one["visits"]),
            f"{one['chance']:.2g}",
            *(long_text(one[name] or "") for name in ("prompt", *answers, "completion")),
        ]
        for one in shown
    ]
    caption = (
        f"The most suspicious {len(shown)} of {run['suspects']:,}; suspects.parquet has "
        f"{'all' if run['suspects'] == suspects.num_rows else 'more'}."
        if len(shown) < suspects.num_rows
        else "The most suspicious first."
    )
    return explanation + html_table("Suspects", columns, rows, ("prompt", *answers, "a completion"), caption)


def _samples(run) -> str:
    columns = ["index", "visits", "own success", "predicted", "learnability", "last draw", "prompt"]
    blocks = []
    for state, (title, caption) in _SAMPLES.items():
        rows = [
            [
                str(one["index"]),
                f"{one['visits']:,}",
                number(one["success_rate"], 2),
                number(one["predicted_success"], 2),
                number(one["utility"], 3),
                MISSING if one["last_draw"] < 0 else f"{one['last_draw']:,}",
                long_text(one["prompt"]),
            ]
            for one in run["samples"][state]
        ]
        table = html_table(title, columns, rows, ("prompt",), caption) if rows else "<p>There are none.</p>"
        blocks.append(f"<h3>{title}</h3>{table}")
    return "\n".join(blocks)


def _settings(run) -> str:
    plan = "".join(f"<li>{html.escape(line[:1].upper() + line[1:])}</li>" for line in run["plan"])
    text = html.escape(json.dumps(run["settings"], indent=2))
    return (
        f"<p>The plan of the run:</p><ul>{plan}</ul><details open><summary>Settings and "
        f"versions</summary><pre>{text}</pre></details><p>Choosing prompts changes the objective: prompts with a "
        "success rate near one half come more often than in the pool, and nothing here corrects that.</p>"
    )
