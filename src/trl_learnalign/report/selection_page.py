"""`report.html`: why each prompt was chosen, in one file that needs no network, and its figures as PNG."""

import html
import json
import math
import os
from pathlib import Path

import pyarrow.parquet as pq

from ..ground.disk import make_directory, write_atomically
from ..scores.builtin import is_random
from ..selection import figures
from ..selection.result import TEXTS_FILE
from ..selection.samples import extremes, most_characters, rows_of, shares, shortened, shown
from ..selection.stages import load_last
from ..selection.warnings import selection_warning
from ..selection.words import OUTCOME_LABELS, how, instead
from .page import MISSING, fact_list, figure, filled, html_table, long_text, number


REPORT_FILE = "report.html"
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
_TEXTS = ("prompt", "one of its completions")


def write_report(path: str | os.PathLike, until: int | None = None) -> Path:
    """
    Writes `report.html` and `figures/*.png` about the selections of a run.

    Args:
        path: the `output_dir` of a run, its `learnalign` directory, or the directory of one selection. With a run's,
            the report is about its last selection and how it differs from those before; it is written to
            `learnalign/`.
        until: leave out selections made after this optimizer step, which are of an earlier run.

    Returns:
        `Path`: the HTML file.

    Raises:
        `FileNotFoundError`: no finished selection is there.
        `ValueError`: one of them is damaged.
    """
    selection, stages = load_last(path, until)
    step = stages[-1].path
    directory = step if step == Path(path) else step.parent
    drawings = figures.drawings(selection, stages)
    folder = directory / "figures"
    make_directory(folder)
    embedded = {}
    for drawing in drawings:
        light, dark = drawing.png(), drawing.png(dark=True)
        write_atomically(folder / f"{drawing.name}.png", lambda temporary, data=light: temporary.write_bytes(data))
        embedded[drawing.name] = light, dark
    page = _page(selection, stages, _texts(step), drawings, embedded)
    target = directory / REPORT_FILE
    write_atomically(target, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return target


def _texts(step: Path) -> dict[int, dict]:
    """By dataset index: `prompt`, and for the highest- and the lowest-ranked also `completion` and `reward`."""
    if not (step / TEXTS_FILE).is_file():
        return {}
    return {row["index"]: row for row in pq.read_table(step / TEXTS_FILE).to_pylist()}


# The page ----------------------------------------------------------------------------------------------------------


def _page(selection, stages, texts, drawings, embedded) -> str:
    provenance = selection.provenance
    random = is_random(provenance["config"]["score"])
    table = rows_of(selection, shown(selection))
    characters = most_characters(len(table))
    parts = {
        "title": f"LearnAlign: {len(selection.indices):,} of {selection.num_pool():,} prompts",
        "subtitle": f"{provenance['model']}, optimizer step {provenance['global_step']}, "
        + f"{'chosen' if random else 'ranked'} {how(selection)}",
        "shown": _shown(selection, len(table)),
        "cut": f"Those of more than {characters:,} characters are cut and end with \u201c\u2026\u201d."
        if any(len(text["prompt"]) > characters for text in texts.values())
        else "",
        "why": "Some of the prompts" if random else "The highest- and the lowest-ranked prompts that may be chosen",
    }
    parts = {name: html.escape(text) for name, text in parts.items()}
    rolled_out = "rollouts" in selection.measures
    nothing = (
        "Nothing could be measured." if rolled_out else f"Prompts were chosen {how(selection)}, without rollouts."
    )
    filters = {"all": "all prompts", "chosen": "chosen"}
    filters |= (
        {"rest": "learnable, not chosen", "unlearnable": "not learnable"} if rolled_out else {"rest": "not chosen"}
    )
    parts |= {
        "skip": "prompts",
        "skip_to": "all prompts",
        "scripts": "; script-src 'unsafe-inline'",
        "facts": _facts(selection),
        "notes": _notes(selection),
        "figures": "\n".join(figure(drawing, *embedded[drawing.name]) for drawing in drawings) or f"<p>{nothing}</p>",
        "stages": _stages(stages),
        "extremes": _extremes(selection, texts),
        "filters": "".join(f'<option value="{name}">{label}</option>' for name, label in filters.items()),
        "provenance": _provenance(provenance),
        "data": _data(table, texts, selection, characters),
    }
    return filled("report_template.html", parts)


def _shown(selection, num_rows) -> str:
    """Which prompts the page holds."""
    if num_rows == selection.scores.num_rows:
        return f"{num_rows:,} prompts."
    (most, end), chosen = shares(), len(selection.indices)
    first = f"first {most:,} of the {chosen:,}" if chosen > most else f"{chosen:,}"
    return (
        f"A sample of {num_rows:,} of {selection.scores.num_rows:,} prompts: the {first} chosen, the {end:,} highest- "
        f"and the {end:,} lowest-ranked that may be chosen, and a random part of the others. scores.parquet has all."
    )


def _facts(selection) -> str:
    seconds = sum(selection.provenance["seconds"].values())
    outcomes = selection.outcomes()
    facts = {"pool": f"{selection.num_pool():,}", "chosen": f"{len(selection.indices):,}"}
    if selection.provenance["unscorable"]:
        facts["unscorable"] = f"{len(selection.provenance['unscorable']):,}"
    if outcomes:
        facts["learnable"] = f"{selection.num_learnable():,}"
    for name, (pool, chosen) in outcomes.items():
        means = (("pool", pool), ("chosen", chosen))
        facts |= {f"{OUTCOME_LABELS[name]}, {of}": f"{mean:.2f}" for of, mean in means if not math.isnan(mean)}
    if selection.provenance["seconds"]:
        facts["time"] = f"{seconds:,.0f} s"
    return fact_list(facts)


def _notes(selection) -> str:
    notes = []
    unscorable = len(selection.provenance["unscorable"])
    if "reward_std" in selection.outcomes():
        notes.append(
            "Rewards are graded, so prompts have no success rate here. The reward std of a prompt is the standard "
            "deviation of the rewards of its rollouts; its square, scaled to the range of all rewards, is the "
            "prompt's learnability."
        )
    if unscorable and selection.scores.num_rows:
        notes.append(
            f"{unscorable:,} prompts were left out: none of their rollouts got a reward that is a finite number."
        )
    if other := instead(selection):
        notes.append(f"Prompts were chosen{other}.")
    if (warning := selection_warning(selection)) is not None:
        notes.append(warning)
    return "".join(f"<p>{html.escape(note)}</p>" for note in notes)


def _stages(stages) -> str:
    if len(stages) < 2:
        return ""
    outcomes = list(stages[-1].outcomes)
    rows = []
    for stage, kept in zip(stages, figures.overlaps(stages), strict=True):
        counts = (stage.provenance["global_step"], len(stage.indices), stage.num_learnable)
        means = [number(mean, 3) for name in outcomes for mean in stage.outcomes[name]]
        rows.append([*(f"{count:,}" for count in counts), *means, MISSING if kept is None else f"{kept:.0%}"])
    labels = [f"{OUTCOME_LABELS[name]}, {of}" for name in outcomes for of in ("pool", "chosen")]
    columns = ["step", "chosen", "learnable", *labels, "also chosen before"]
    title = "Selections of this run"
    return f'<h2 id="stages">{title}</h2>' + html_table(title, columns, rows, (), "Oldest first.")


def _extremes(selection, texts) -> str:
    """
    The ten highest-ranked and the ten lowest-ranked that are learnable, with a completion each; of a random order, its
    two ends.
    """
    ends = extremes(selection)
    if not ends[0]:
        return "<p>There are no such prompts.</p>"
    if not texts:
        return "<p>The texts of the prompts were not kept.</p>"
    random = is_random(selection.provenance["config"]["score"])
    table = rows_of(selection, [*ends[0], *ends[1]])
    columns = {"rank": ("rank", 0)}
    columns |= {
        key: (label, digits)
        for key, label, digits, _ in _columns(selection, table)
        if key in ("success_rate", "reward_mean", "reward_std", "alignment", "score")
    }
    by_index = table.set_index("index")
    blocks = []
    titles = (
        ("First of the random order", "Last of the random order") if random else ("Highest-ranked", "Lowest-ranked")
    )
    for title, indices in zip(titles, ends, strict=True):
        if not indices:
            continue
        rows = []
        for index in indices:
            text = texts.get(index, {})
            row = [number(by_index.loc[index, key], digits) for key, (_, digits) in columns.items()]
            row.append(long_text(text.get("prompt") or ""))
            if not random:
                reward = "" if text.get("reward") is None else f"<div class=reward>reward {text['reward']:.3g}</div>"
                row.append(long_text(text.get("completion") or "") + reward)
            rows.append(row)
        names = [*(label for label, _ in columns.values()), *_TEXTS[: 1 if random else 2]]
        blocks.append(f"<h3>{title}</h3>" + html_table(title, names, rows, _TEXTS))
    return "\n".join(blocks)


def _provenance(provenance) -> str:
    text = json.dumps({name: value for name, value in provenance.items() if name != "unscorable"}, indent=2)
    return f"<details open><summary>Settings, versions and costs</summary><pre>{html.escape(text)}</pre></details>"


def _columns(selection, table) -> list[tuple]:
    """Those of `_COLUMNS` that say something about the selection."""
    unfit = {"success_rate", "reward_mean", "reward_std"} - selection.outcomes().keys()
    always = ("rank", "selected", "prompt", "index")
    known = {column[0] for column in _COLUMNS} | {"eligible", "quota_group"}
    more = [(name, name.replace("_", " "), 4, True) for name in table if name not in known]
    return [
        column
        for column in (*_COLUMNS[:-1], *more, _COLUMNS[-1])
        if column[0] in always or (column[0] not in unfit and table[column[0]].notna().any())
    ]


def _data(table, texts, selection, characters) -> str:
    """The rows of the table as JSON that is safe inside a script element."""
    columns = [
        {"key": key, "label": label, "digits": digits, "first": "high" if high else "low", "text": key == "prompt"}
        for key, label, digits, high in _columns(selection, table)
    ]
    values = []
    for column in columns:
        if column["key"] == "prompt":
            prompts = (texts[index]["prompt"] if index in texts else None for index in table["index"])
            values.append([text if text is None else shortened(text, characters) for text in prompts])
        else:
            cells = table[column["key"]].tolist()
            values.append([None if cell is None or cell != cell else _short(cell) for cell in cells])
    document = {"columns": columns, "rows": list(zip(*values, strict=True))}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value
