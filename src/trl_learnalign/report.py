"""`report.html`: why each prompt was chosen, in one file that needs no network, and its figures as PNG."""

import base64
import html
import io
import json
import math
import os
from importlib import resources
from pathlib import Path

import pyarrow.parquet as pq

from . import figures
from .disk import make_directory, write_atomically
from .selection import MOST_ROWS, TEXTS_FILE, load_run


REPORT_FILE = "report.html"
_COLUMNS = [
    # (key, label, digits, whether the first click puts the highest first)
    ("rank", "rank", 0, False),
    ("selected", "chosen", None, True),
    ("prompt", "prompt", None, False),
    ("success_rate", "success rate", 3, True),
    ("learnability", "learnability", 4, True),
    ("alignment", "alignment", 3, True),
    ("score", "score", 5, True),
    ("completion_length_mean", "length", 1, True),
    ("gradient_norm", "gradient norm", 4, True),
    ("index", "index", 0, False),
]
_MISSING = "\u2013"


def write_report(path: str | os.PathLike, until: int | None = None) -> Path:
    """
    Writes `report.html` and `figures/*.png` about the selections of a run.

    Args:
        path: the `output_dir` of a run, its `learnalign` directory, or the directory of one selection. With a run's, the
            report is about its last selection and how it differs from those before; it is left in `learnalign/`.
        until: leave out selections made after this optimizer step, which an earlier run left there.

    Returns:
        `Path`: the HTML file.

    Raises:
        `FileNotFoundError`: no finished selection is there.
        `ValueError`: one of them is damaged.
    """
    run = load_run(path, until)
    steps, selections = list(run), list(run.values())
    directory = Path(path) if steps[0] == Path(path) else steps[0].parent
    drawings = figures.drawings(selections)
    folder = directory / "figures"
    make_directory(folder)
    embedded = {}
    for drawing in drawings:
        light, dark = _png(drawing.figure()), _png(drawing.figure(dark=True))
        write_atomically(folder / f"{drawing.name}.png", lambda temporary, data=light: temporary.write_bytes(data))
        embedded[drawing.name] = light, dark
    page = _page(selections, _texts(steps[-1]), drawings, embedded)
    target = directory / REPORT_FILE
    write_atomically(target, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return target


def _texts(step: Path) -> dict[int, dict]:
    """By dataset index: `prompt`, and for the best and the last also `completion` and `reward`."""
    if not (step / TEXTS_FILE).is_file():
        return {}
    return {row["index"]: row for row in pq.read_table(step / TEXTS_FILE).to_pylist()}


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


# The page ----------------------------------------------------------------------------------------------------------


def _page(selections, texts, drawings, embedded) -> str:
    selection = selections[-1]
    provenance = selection.provenance
    table = selection.scores.to_pandas().sort_values("rank")
    shown = table if len(table) <= MOST_ROWS else table.iloc[[*range(MOST_ROWS // 2), *range(-MOST_ROWS // 2, 0)]]
    parts = {
        "title": f"LearnAlign: {len(selection.indices):,} of {len(table):,} prompts",
        "subtitle": f"{provenance['model']}, optimizer step {provenance['global_step']}, "
        f"ranked by {provenance['config']['score']}",
        "shown": f"{len(shown):,} prompts."
        if len(shown) == len(table)
        else f"The best and the last {MOST_ROWS // 2:,} of {len(table):,} prompts; scores.parquet has all.",
    }
    parts = {name: html.escape(text) for name, text in parts.items()}
    parts |= {
        "facts": _facts(selection),
        "notes": _notes(selection),
        "figures": "\n".join(_figure(drawing, *embedded[drawing.name]) for drawing in drawings)
        or "<p>The prompts were chosen at random: nothing was measured.</p>",
        "stages": _stages(selections),
        "extremes": _extremes(selection, table, texts),
        "provenance": _provenance(provenance),
        "data": _data(shown, texts),
    }
    page = resources.files(__package__).joinpath("report_template.html").read_text(encoding="utf-8")
    pieces = page.split("{{")
    filled = [pieces[0]]  # in one pass, so that braces in a prompt stay what they are
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        filled += [parts[name], rest]
    return "".join(filled)


def _facts(selection) -> str:
    pool_rate, chosen_rate = selection.mean_success_rates()
    seconds = sum(selection.provenance["seconds"].values())
    facts = {"pool": f"{selection.scores.num_rows:,}", "chosen": f"{len(selection.indices):,}"}
    if not math.isnan(pool_rate):
        facts["learnable"] = f"{selection.num_learnable():,}"
        facts["success rate, pool"] = f"{pool_rate:.2f}"
        facts["success rate, chosen"] = _number(chosen_rate, 2)
        facts["time"] = f"{seconds:,.0f} s"
    return "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())


def _notes(selection) -> str:
    notes = []
    wanted = selection.provenance["config"]["num_prompts"]
    if len(selection.indices) < min(wanted, selection.scores.num_rows):
        notes.append(f"Only {len(selection.indices):,} prompts are learnable, fewer than the {wanted:,} asked for.")
    if selection.provenance["unscorable"]:
        notes.append(f"{len(selection.provenance['unscorable']):,} prompts were left out: no rollout could be scored.")
    return "".join(f"<p>{html.escape(note)}</p>" for note in notes)


def _figure(drawing, light, dark) -> str:
    def source(data):
        return "data:image/png;base64," + base64.b64encode(data).decode()

    words = html.escape(drawing.words)
    return (
        f'<figure><picture><source srcset="{source(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{source(light)}" alt="{words}"></picture>'
        f"<figcaption>{html.escape(drawing.caption)} {words}</figcaption></figure>"
    )


def _stages(selections) -> str:
    if len(selections) < 2:
        return ""
    rows = []
    for selection, kept in zip(selections, figures.overlaps(selections), strict=True):
        pool_rate, chosen_rate = selection.mean_success_rates()
        cells = [
            f"{selection.provenance['global_step']:,}",
            f"{len(selection.indices):,}",
            f"{selection.num_learnable():,}",
            _number(pool_rate, 3),
            _number(chosen_rate, 3),
            _MISSING if kept is None else f"{kept:.0%}",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    names = ("step", "chosen", "learnable", "success rate, pool", "success rate, chosen", "chosen before, too")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    return (
        '<h2 id="stages">Selections of this run</h2><div class="wide"><table><caption>Oldest first.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _extremes(selection, table, texts) -> str:
    """The ten best of the ranking and the ten last that are learnable, with a completion each."""
    if not texts:
        return "<p>The texts of the prompts were not kept.</p>"
    best, last = selection.extremes()
    rows_of = table.set_index("index")
    blocks = []
    for title, indices in (("The best", best), ("The last", last)):
        if not indices:
            continue
        lines = []
        for row in rows_of.loc[indices].itertuples():
            text = texts.get(row.Index, {})
            numbers = (row.rank, row.success_rate, row.alignment, row.score)
            cells = "".join(
                f"<td>{_number(value, digits)}</td>" for value, digits in zip(numbers, (0, 3, 3, 5), strict=True)
            )
            completion = text.get("completion")
            reward = "" if text.get("reward") is None else f"<br>reward {text['reward']:.3g}"
            lines.append(
                f"<tr>{cells}<td class=text>{html.escape(text.get('prompt') or '')}</td>"
                f"<td class=text>{'' if completion is None else html.escape(completion) + reward}</td></tr>"
            )
        head = "".join(f'<th scope="col">{name}</th>' for name in ("rank", "success rate", "alignment", "score"))
        head += '<th scope="col" class="text">prompt</th><th scope="col" class="text">one of its completions</th>'
        blocks.append(
            f'<h3>{title}</h3><div class="wide" tabindex="0" role="region" aria-label="{title} of the learnable prompts">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
        )
    return "\n".join(blocks)


def _number(value, digits) -> str:
    return _MISSING if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _provenance(provenance) -> str:
    text = json.dumps({name: value for name, value in provenance.items() if name != "unscorable"}, indent=2)
    return f"<details open><summary>Settings, versions and costs</summary><pre>{html.escape(text)}</pre></details>"


def _data(table, texts) -> str:
    """The rows of the table as JSON that is safe inside a script element."""
    columns = [
        {"key": key, "label": label, "digits": digits, "first": "high" if high else "low", "text": key == "prompt"}
        for key, label, digits, high in _COLUMNS
        if key == "prompt" or key in ("rank", "selected", "index") or table[key].notna().any()
    ]
    values = []
    for column in columns:
        if column["key"] == "prompt":
            values.append([texts.get(index, {}).get("prompt") for index in table["index"]])
        else:
            cells = table[column["key"]].tolist()
            values.append([None if cell is None or cell != cell else _short(cell) for cell in cells])
    document = {"columns": columns, "rows": list(zip(*values, strict=True))}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value
