"""`report.html` of a selection: why each prompt was chosen, in one file that needs no network; and its figures."""

import html
import json
import math
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from ..ground.disk import make_directory
from ..selection.excerpt import characters_each, ranking_ends, sample_quotas, scores_of, shortened, shown_rows
from ..selection.figures import drawings, overlaps
from ..selection.result import TEXTS_FILE, Selection
from ..selection.stages import load_last
from ..selection.warnings import pool_warnings, selection_warning
from ..selection.words import OUTCOME_LABELS, UNMEASURED, at_random, chosen_by, replaced_score
from .html import TEXT, figures, filled, settings, table, write_page


_COLUMNS = [
    # (key, label, digits, whether the first click puts the highest first)
    ("rank", "rank", 0, False),
    ("selected", "chosen", None, True),
    ("prompt", "prompt", None, False),
    ("success_rate", "success rate", 3, True),
    ("reward_mean", "mean reward", 3, True),
    ("reward_std", "reward std", 3, True),
    ("learnability", "learnability", 4, True),
    ("alignment", "alignment", 3, True),
    ("score", "score", 5, True),
    ("completion_length_mean", "length", 1, True),
    ("gradient_norm", "gradient norm", 4, True),
    ("index", "index", 0, False),
]
_MOST_DIGITS = 12
_DEFAULT_DIGITS = 4  # of columns of measures that the page knows nothing of
_AT_THE_ENDS = ("rank", "success_rate", "reward_mean", "reward_std", "alignment", "score")


def write_report(path: str | os.PathLike, until: int | None = None, passes: np.ndarray | None = None) -> Path:
    """
    Write `report.html` and `figures/*.png` about the selections of a run.

    Args:
        path: the `output_dir` of a run, its `learnalign` directory, or the directory of one selection. With a run's,
            the report is about its last selection and how it differs from those before; it is written to
            `learnalign/`.
        until: leave out selections made after this optimizer step, which are of an earlier run.
        passes: over the selections, where solved prompts were left out: [`~trl_learnalign.schedules.reviews.Reviews`].

    Returns:
        `Path`: the HTML file.

    Raises:
        `FileNotFoundError`: no finished selection is there.
        `ValueError`: one of them is damaged.
    """
    selection, stages = load_last(path, until)
    step = stages[-1].path
    directory = step if step == Path(path) else step.parent
    provenance, texts, random = selection.provenance, _texts(step), at_random(selection)
    ends = "Some of the prompts" if random else "The highest- and the lowest-ranked prompts that may be chosen"
    made = {name: value for name, value in provenance.items() if name != "unscorable"}
    subtitle = f"{provenance['model']}, optimizer step {provenance['global_step']}, "
    subtitle += f"{'chosen' if random else 'ranked'} {chosen_by(selection)}"
    return write_page(
        directory,
        title=f"LearnAlign: {len(selection.indices):,} of {selection.num_pool():,} prompts",
        subtitle=html.escape(subtitle),
        facts=_facts(selection),
        notes=_notes(selection),
        sections=[
            ("figures", "Pool and chosen prompts", _figures(selection, stages, directory / "figures")),
            *_candidates(provenance.get("candidates")),
            *([("stages", "Selections of this run", _stages(stages))] if len(stages) > 1 else ()),
            *([("passes", "Passes over them", _passes(passes))] if passes is not None and len(passes) else ()),
            ("why", ends, _ends(selection, texts)),
            ("prompts", "All prompts", _prompts(selection, texts)),
            ("provenance", "How it was made", settings("Settings, versions and costs", made)),
        ],
        footer="trl-learnalign, after Li et al., <cite>LearnAlign</cite>, arXiv 2506.11480.",
        skip="prompts",
        scripts="; script-src 'unsafe-inline'",
    )


def _figures(selection, stages, folder: Path) -> str:
    """Write the figures as files, and return them as HTML."""
    make_directory(folder)
    if found := figures(drawings(selection, stages), folder):
        return found
    if "rollouts" in selection.measures:
        return "<p>Nothing could be measured.</p>"
    without = ", without rollouts" * (not selection.measures)
    return f"<p>Prompts were chosen {html.escape(chosen_by(selection))}{without}.</p>"


def _texts(step: Path) -> dict[int, dict]:
    """Read by dataset index `prompt`, and for the highest- and the lowest-ranked also `completion` and `reward`."""
    if not (step / TEXTS_FILE).is_file():
        return {}
    return {row["index"]: row for row in pq.read_table(step / TEXTS_FILE).to_pylist()}


def _facts(selection) -> dict[str, str]:
    outcomes = selection.outcomes()
    facts = {"pool": f"{selection.num_pool():,}", "chosen": f"{len(selection.indices):,}"}
    if selection.provenance["unscorable"]:
        name = "unscorable" if "rollouts" in selection.measures else UNMEASURED
        facts[name] = f"{len(selection.provenance['unscorable']):,}"
    if outcomes:
        facts["learnable"] = f"{selection.num_learnable():,}"
    for name, (pool, chosen) in outcomes.items():
        means = (("pool", pool), ("chosen", chosen))
        facts |= {f"{OUTCOME_LABELS[name]}, {of}": f"{mean:.2f}" for of, mean in means if not math.isnan(mean)}
    if seconds := sum(selection.provenance["seconds"].values()):
        facts["time"] = f"{seconds:,.0f} s"
    return facts


def _notes(selection) -> str:
    notes = []
    if "reward_std" in selection.outcomes():
        notes.append(
            "Rewards are graded, so prompts have no success rate here. The reward std of a prompt is the standard "
            "deviation of the rewards of its rollouts; its square, scaled to the range of all rewards, is the "
            "prompt's learnability."
        )
    if other := replaced_score(selection):
        notes.append(f"Prompts were chosen{other}.")
    notes += filter(None, (selection_warning(selection), *pool_warnings(selection)))
    return "".join(f"<p>{html.escape(note)}</p>" for note in notes)


def _candidates(stages) -> list[tuple[str, str, str]]:
    if not stages:
        return []
    columns = {"score": TEXT, "price of a prompt": TEXT, "prompts": ",", "kept": ",", "seconds": ".1f"}
    rows = [tuple(one[name] for name in ("score", "price", "prompts", "kept", "seconds")) for one in stages]
    found = table("Candidates", columns, rows, "Each score chose from the prompts that the one before had left.")
    return [("candidates", "Candidates", found)]


def _stages(stages) -> str:
    outcomes, unknown = list(stages[-1].outcomes), (math.nan, math.nan)
    columns = dict.fromkeys(("step", "chosen", *["learnable"] * bool(outcomes)), ",")
    columns |= {f"{OUTCOME_LABELS[name]}, {of}": ".3f" for name in outcomes for of in ("pool", "chosen")}
    rows = [
        (
            *(stage.provenance["global_step"], len(stage.indices), *[stage.num_learnable] * bool(outcomes)),
            *(mean for name in outcomes for mean in stage.outcomes.get(name, unknown)),
            kept,
        )
        for stage, kept in zip(stages, overlaps(stages), strict=True)
    ]
    return table("Selections of this run", columns | {"also chosen before": ".0%"}, rows, "Oldest first.")


def _passes(passes) -> str:
    columns = dict.fromkeys(("selection", "pass", "prompts", "solved", "forgotten"), ",")
    caption = "Solved: by all rollouts of the last visit, at the end of the pass. Forgotten: before, and no more."
    return table("Passes", columns, ((stage, number + 1, *rest) for stage, number, *rest in passes.tolist()), caption)


def _ends(selection, texts) -> str:
    """Show the ten highest- and the ten lowest-ranked with a completion each, or both ends of a random order."""
    ends = ranking_ends(selection)
    if not ends[0]:
        return "<p>There are no such prompts.</p>"
    if not texts:
        return "<p>The texts of the prompts were not kept.</p>"
    random = at_random(selection)
    scores = scores_of(selection, [*ends[0], *ends[1]])
    shown = {*_AT_THE_ENDS, *_of_other_measures(scores)}
    known = [column[:3] for column in _columns(selection, scores) if column[0] in shown]
    numbers = {key: (label, digits) for key, label, digits in known if digits is not None}
    columns = {label: f".{digits}f" for label, digits in numbers.values()} | {"prompt": TEXT}
    rolled_out = any(texts[index]["completion"] is not None for index in scores["index"] if index in texts)
    kept = ["prompt", "completion", "reward"] if rolled_out else ["prompt"]
    columns |= {"one of its completions": TEXT, "its reward": ".3g"} if rolled_out else {}
    titles = ("First of the random order", "Last of the random order")
    titles = titles if random else ("Highest-ranked", "Lowest-ranked")
    by_index, none, blocks = scores.set_index("index"), dict.fromkeys(kept), []
    for title, indices in zip(titles, ends, strict=True):
        rows = [
            (*(by_index.loc[index, key] for key in numbers), *(texts.get(index, none)[name] for name in kept))
            for index in indices
        ]
        blocks += [f"<h3>{title}</h3>" + table(title, columns, rows)] * bool(rows)
    return "\n".join(blocks)


def _columns(selection: Selection, scores) -> list[tuple]:
    """Keep those of `_COLUMNS` that say something about the selection."""
    unfit = {"success_rate", "reward_mean", "reward_std"} - selection.outcomes().keys()
    always = ("rank", "selected", "prompt", "index")
    kinds = {name: pd.api.types.is_numeric_dtype(scores[name]) for name in _of_other_measures(scores)}
    more = [(name, name.replace("_", " "), _DEFAULT_DIGITS if kind else None, True) for name, kind in kinds.items()]
    telling = {"score", *(column[0] for column in more)}  # their values may be of any size
    return [
        (key, label, _digits(scores[key], digits) if key in telling else digits, high)
        for key, label, digits, high in (*_COLUMNS[:-1], *more, _COLUMNS[-1])
        if key in always or (key not in unfit and scores[key].notna().any())
    ]


def _of_other_measures(scores) -> list[str]:
    known = {column[0] for column in _COLUMNS} | {"eligible", "quota_group"}
    return [name for name in scores if name not in known]


def _digits(values, least: int | None) -> int | None:
    """Return how many digits after the point tell values apart: three of the largest difference."""
    known = [] if least is None else values.dropna().astype(float)
    spread = max(known) - min(known) if len(known) else 0.0
    return max(least or 0, min(_MOST_DIGITS, 2 - math.floor(math.log10(spread)))) if 0 < spread < math.inf else least


# The table of all prompts, which a script lays out -----------------------------------------------------------------


def _prompts(selection, texts) -> str:
    scores = scores_of(selection, shown_rows(selection))
    characters = characters_each(len(scores))
    cut = any(len(text["prompt"]) > characters for text in texts.values())
    filters = {"all": "all prompts", "chosen": "chosen"}
    filters |= (
        {"rest": "learnable, not chosen", "unlearnable": "not learnable"}
        if "rollouts" in selection.measures
        else {"rest": "not chosen"}
    )
    parts = {
        "shown": _shown(selection, len(scores)),
        "cut": f"Texts over {characters:,} characters are cut and end with \u201c\u2026\u201d." if cut else "",
        "filters": "".join(f'<option value="{name}">{label}</option>' for name, label in filters.items()),
        "data": _data(scores, texts, selection, characters),
    }
    return filled("prompts.html", parts)


def _shown(selection, num_rows) -> str:
    """Say which prompts the page holds."""
    if num_rows == selection.scores.num_rows:
        return f"{num_rows:,} prompts."
    (most, end), chosen = sample_quotas(), len(selection.indices)
    first = f"first {most:,} of the {chosen:,}" if chosen > most else f"{chosen:,}"
    return (
        f"A sample of {num_rows:,} of {selection.scores.num_rows:,} prompts: the {first} chosen, the {end:,} highest- "
        f"and the {end:,} lowest-ranked that may be chosen, and a random part of the others. scores.parquet has all."
    )


def _data(scores, texts, selection, characters) -> str:
    """Write the rows of the table as JSON that is safe inside a script element."""
    columns = [
        {"key": key, "label": label, "digits": digits, "first": "high" if high else "low", "text": key == "prompt"}
        for key, label, digits, high in _columns(selection, scores)
    ]
    values = []
    for column in columns:
        if column["key"] == "prompt":
            prompts = (texts[index]["prompt"] if index in texts else None for index in scores["index"])
            values.append([text if text is None else shortened(text, characters) for text in prompts])
        else:
            cells, digits = scores[column["key"]].tolist(), column["digits"]
            values.append([None if cell is None or cell != cell else _short(cell, digits) for cell in cells])
    document = {"columns": columns, "rows": list(zip(*values, strict=True))}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    # No tag can end the element, and no line separator can end a line of the script
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(value, digits):
    kept = 6 if (digits or 0) <= 5 else digits + 2
    return float(f"{value:.{kept}g}") if isinstance(value, float) else value
