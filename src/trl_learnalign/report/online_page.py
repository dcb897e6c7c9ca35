"""`report.html` of an online run: what was chosen, why, and with what result, in one file that needs no network."""

import html
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

from ..curriculum import OnlineCurriculum
from ..selection.words import live_shares
from . import online_figures
from .html import TEXT, WORDS, figures, formatted, settings, table, write_page
from .online_kinds import kinds_section
from .online_state import read_state, versions
from .online_tables import count_states, find_run, load_tables, write_tables
from .trackers import log_figures


MOST_SUSPECTS_SHOWN = 20
_SAMPLES = {
    "live": ("Live at the last visit", "The prompts with the highest expected utility."),
    "retired": ("Retired", "Solved by all rollouts of their last visits; the latest first."),
    "parked": ("Parked", "Solved by no rollout of their last visits; the latest first."),
    "new": ("Never visited", "At random."),
    "unscored": ("Unscored", "No reward that decides success, or no token in the loss; the latest first."),
}
_STATES = {
    "new": "never visited",
    "live": "some rollouts of the last visit succeeded, others failed",
    "resting": "all rollouts of the last visit succeeded, or none did: {doubling} such rollouts double the rest",
    "retired": "the last {streak} rollouts or more succeeded: {doubling} more double the rest, up to {most} times",
    "parked": "the last {streak} rollouts or more failed: {doubling} more double the rest, up to {most} times",
    "unscored": "the last visit had no reward that decides success, or no token in the loss: each doubles the rest",
}


def write_online_report(schedule, host, directory: Path, log: bool = False) -> Path:
    """
    Write the tables and the page of an online run as it is now. The texts of some prompts are read, whatever the size
    of the pool.

    Args:
        schedule ([`OnlineSchedule`]): after its first observation.
        host ([`Host`]): the trainer.
        directory (`Path`): `OUTPUT_DIR/learnalign`.
        log (`bool`): log the figures to the trackers as well.

    Returns:
        `Path`: the HTML file.
    """
    state, model = host.trainer.state, host.trainer.model.config
    found = read_state(schedule, host.max_steps)
    found["run"]["settings"]["num_processes"] = host.accelerator.num_processes
    found["run"] |= {"step": state.global_step, "max_steps": host.max_steps}
    found["run"]["model"] = model._name_or_path or model.model_type
    write_tables(found, host.dataset, directory)
    target, drawings = _write_page(directory)
    if log:
        log_figures(host.trainer, drawings)
    return target


def write_curriculum_report(
    curriculum: OnlineCurriculum,
    directory: str | os.PathLike,
    prompts: Dataset | Sequence[str],
    *,
    kind_names: list[str] | None = None,
    name: str = "a policy",
    max_steps: int | None = None,
) -> Path:
    """
    Write the tables and the page of a curriculum of a training loop of one's own.

    Args:
        curriculum ([`OnlineCurriculum`]): after its first observation.
        directory (`str` or `PathLike`): is made.
        prompts ([`~datasets.Dataset`] or `Sequence[str]`): texts, by row; a dataset has them in its column `prompt`,
            and answers are shown as well.
        kind_names (`list[str]`, *optional*): names of the kinds, where `kinds` were given.
        name (`str`, *optional*): of the policy.
        max_steps (`int`, *optional*): optimizer steps of the run, where they are known.

    Returns:
        `Path`: the HTML file.

    Raises:
        `ValueError`: nothing was observed yet; prompts of another number.
    """
    if not curriculum.history.observed:
        raise ValueError("The curriculum has observed no group yet, so there is nothing to report.")
    dataset = prompts if isinstance(prompts, Dataset) else Dataset.from_dict({"prompt": list(prompts)})
    if len(dataset) != len(curriculum.features):
        raise ValueError(
            f"{len(dataset):,} prompts were given, but the curriculum has {len(curriculum.features):,} rows. Pass the "
            "text of every row, also of those that may not be trained on."
        )
    found = curriculum.report(kind_names)
    found["run"] |= {
        "step": curriculum.steps,
        "max_steps": max_steps,
        "model": name,
        "plan": [],
        "settings": {"config": {}, "curriculum": asdict(curriculum.settings), "versions": versions()},
    }
    write_tables(found, dataset, Path(directory))
    return _write_page(Path(directory))[0]


def rewrite_online_report(path: str | os.PathLike) -> Path | None:
    """
    Write the page again from the files of a run.

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
    prompts, history, suspects, noise, run = load_tables(directory)
    config = run["settings"]["config"]
    drawings = online_figures.drawings(prompts, history, run)
    step = f"{run['step']:,} of {run['max_steps']:,}" if run["max_steps"] else f"{run['step']:,}"
    target = write_page(
        directory,
        title=f"LearnAlign online, step {step}",
        subtitle=html.escape(
            f"{run['model']}, {run['pool']:,} prompts, written {run['made'][:16].replace('T', ' ')} UTC"
        ),
        intro=_intro(step, run),
        facts=_facts(prompts, history, noise, run),
        sections=[
            ("figures", "How the run went", figures(drawings)),
            (
                "kinds",
                "Where the rollouts went",
                kinds_section(run["kinds"], config.get("group_column"), run["graded"]),
            ),
            ("periods", "When prompts were chosen", _periods(run)),
            ("states", "Retired and parked prompts", _states(prompts, run)),
            ("suspects", "Suspects", _suspects(suspects, run)),
            ("noise", "Rewards that may be noise", _noise(noise, run)),
            ("samples", "Some of the prompts", _samples(run)),
            ("settings", "How it was made", _settings(run)),
        ],
        footer=f"trl-learnalign. Written at step {step}; this page does not refresh by itself.",
        skip="figures",
    )
    return target, drawings


def _intro(step, run) -> str:
    uniform, aim = run["settings"]["curriculum"]["uniform"], _aim(run.get("target"))
    return (
        "<p>This page shows which prompts an online run trained on, and why. From the rewards of training so far, the "
        "schedule predicts which prompts some rollouts will solve and others will not. Only such <em>live</em> groups "
        f"have a gradient. A few prompts ({uniform:.0%}) are drawn uniformly from the whole pool; these measure how "
        f"good the policy and the prediction are.{aim} The figures show live groups, success and prediction over "
        "the run. The tables show where the rollouts went, when prompts were chosen and when not, which prompts come "
        "less often because they are always or never solved, and which may have a wrong answer or wrong grading. The "
        f"page shows the state at step {step}. It is written with each checkpoint and at the end of training, and "
        "does not refresh by itself.</p>"
    )


def _facts(prompts, history, noise, run) -> dict[str, str]:
    chosen, uniform, draws = live_shares(lambda name: history[name].to_numpy(zero_copy_only=False))
    states = count_states(prompts)
    return {
        "pool": f"{prompts.num_rows:,}",
        "visited": f"{prompts.num_rows - states.get('new', 0):,}",
        "never visited": f"{states.get('new', 0):,}",
        "live, chosen": formatted(chosen, ".0%"),
        f"live, {draws:,.0f} uniform draws": formatted(uniform, ".0%"),
        "scaled reward of the pool" if run["graded"] else "success of the pool": formatted(run["pool_success"], ".2f"),
        "skill": formatted(run["skill"], ".2f"),
        "headroom": f"{run['headroom']:.2f} x",
        "draws now": "chosen" if run["choosing"] else "uniform",
        **{state: f"{states.get(state, 0):,}" for state in ("retired", "parked", "unscored")},
        "suspects": f"{run['suspects']:,}",
        "may be noise": f"{noise.num_rows:,}",
        **_target(run.get("target")),
    }


def _aim(target) -> str:
    if target is None:
        return ""
    return (
        f" Prompts are chosen for a target of {target['rows']:,} rows, by the alignment of their gradients with those "
        "of the target; random rows of it come as well."
    )


def _target(target) -> dict[str, str]:
    if target is None:
        return {}
    return {
        "target": f"{target['rows']:,} ({target['share']:.0%} of the pool)",
        "groups of the target": formatted(target["drawn"], ".0%"),
        "success of the target": formatted(target["success"], ".2f"),
    }


def _periods(run) -> str:
    rows = [
        (
            f"{one['first']:,} to {one['last']:,}",
            "chosen" if one["choosing"] else "drawn uniformly",
            one["skill"],
            one["headroom"],
            one["why"] or "the prediction is good enough, and choosing is expected to help",
        )
        for one in run["periods"]
    ]
    columns = {"groups": "", "prompts": "", "skill": ".2f", "headroom": ".2f", "why": WORDS}
    caption = "Skill and headroom at the end of each period; the last 20 periods at most."
    return table("When prompts were chosen", columns, rows, caption)


def _states(prompts, run) -> str:
    counts, chosen_by = count_states(prompts), run["settings"]["curriculum"]
    doubling, longest = chosen_by["doubling"], chosen_by["longest_rest"]
    numbers = {"doubling": doubling, "streak": chosen_by["retired_after"] * doubling, "most": 2**longest}
    rows = [
        (name, counts.get(name, 0), counts.get(name, 0) / prompts.num_rows, meaning.format(**numbers))
        for name, meaning in _STATES.items()
    ]
    columns = {"state": WORDS, "prompts": ",", "share": ".1%", "meaning": WORDS}
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
    return table("States of the prompts", columns, rows) + f"<p>{' '.join(lines)}</p>"


def _suspects(suspects, run) -> str:
    explanation = (
        "<p>Prompts that no rollout solved, although success was predicted. Their answer may be wrong, or the reward "
        "function may not accept the right one; others are only harder than predicted. The chance is the predicted "
        "probability that all their rollouts fail.</p>"
    )
    if not run["skilled"]:
        explanation += (
            f"<p>The prediction is hardly better than the mean success of the pool (skill {run['skill']:.2f}), so "
            "these are prompts that failed more often than that mean lets expect, whatever they are like.</p>"
        )
    if not suspects.num_rows:
        none = "There are none." if run["tried"] else "None are listed before the prediction was tried."
        none = "With graded rewards suspects are not searched for." if run["graded"] else none
        return explanation + f"<p>{none}</p>"
    shown = min(MOST_SUSPECTS_SHOWN, suspects.num_rows)
    caption = (
        f"The most suspicious {shown} of {run['suspects']:,}; suspects.parquet has "
        f"{'all' if run['suspects'] == suspects.num_rows else 'more'}."
        if shown < suspects.num_rows
        else "The most suspicious first."
    )
    return explanation + _suspects_table("Suspects", suspects, caption)


def _suspects_table(name, suspects, caption) -> str:
    # All other columns are texts: the prompt, the answers that the dataset has, and the completion
    forms = {"index": "d", "visits": "d", "chance": ".2g", "success_rate": ".2f"}
    labels = {"completion": "most frequent completion", "success_rate": "own success"}
    names = sorted(suspects.column_names, key=lambda one: [*forms, one].index(one))
    columns = {labels.get(one, one): forms.get(one, TEXT) for one in names}
    shown = suspects.slice(0, MOST_SUSPECTS_SHOWN).to_pylist()
    return table(name, columns, ([one[label] for label in names] for one in shown), caption)


def _noise(noise, run) -> str:
    chosen_by = run["settings"]["curriculum"]
    least, width = chosen_by["noise_visits"], chosen_by["noise_width"]
    explanation = (
        f"<p>Prompts that were visited {least} times or more, of whose rollouts {0.5 - width:.0%} to "
        f"{0.5 + width:.0%} succeed, in a kind whose success does not rise on uniform draws and whose gradients have "
        "no clear alignment, where that is measured. Their rewards may be chance: a question that can only be "
        "guessed, an answer drawn at random, a grader that is flaky. Others are only slow to learn. Compare the most "
        "frequent completion with the answer.</p>"
    )
    if not noise.num_rows:
        none = "With graded rewards they are not searched for." if run["graded"] else "There are none."
        return f"{explanation}<p>{none}</p>"
    shown = min(MOST_SUSPECTS_SHOWN, noise.num_rows)
    caption = f"The {shown} that were visited most, of {noise.num_rows:,} in noise.parquet."
    return explanation + _suspects_table("Rewards that may be noise", noise, caption)


def _samples(run) -> str:
    columns = {
        "index": ("index", "d"),
        "visits": ("visits", ","),
        "success_rate": ("own success", ".2f"),
        "predicted_success": ("predicted", ".2f"),
        "utility": ("utility", ".3f"),
        "last_draw": ("last draw", ","),
        "prompt": ("prompt", TEXT),
    }
    blocks = []
    for state, (title, caption) in _SAMPLES.items():
        rows = [
            [None if name == "last_draw" and one[name] < 0 else one[name] for name in columns]
            for one in run["samples"][state]
        ]
        found = table(title, dict(columns.values()), rows, caption) if rows else "<p>There are none.</p>"
        blocks.append(f"<h3>{title}</h3>{found}")
    return "\n".join(blocks)


def _settings(run) -> str:
    plan = "".join(f"<li>{html.escape(line[:1].upper() + line[1:])}</li>" for line in run["plan"])
    plan = f"<p>The plan of the run:</p><ul>{plan}</ul>" if plan else ""
    return (
        f"{plan}{settings('Settings and versions', run['settings'])}"
        "<p>Choosing prompts changes the objective: prompts with a success rate near one half come more often than in "
        "the pool, and nothing here corrects that.</p>"
    )
