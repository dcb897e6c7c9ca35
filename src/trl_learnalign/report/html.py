"""HTML that both pages share: the frame, tables, figures and texts, all of them safe to show."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from ..ground.disk import write_bytes
from ..selection.figures import Drawing


REPORT_FILE = "report.html"
MISSING = "\u2013"
TEXT, WORDS = "text", "words"  # kinds of columns: texts of prompts or completions, and words of this package
_SHOWN_CHARACTERS, _SHOWN_LINES = 240, 5  # of a text that is not opened; also in prompts.html


def write_page(
    directory: Path, facts: dict[str, str], sections: Sequence[tuple[str, str, str]], title: str, **parts: str
) -> Path:
    """
    Write `report.html` into a directory.

    Args:
        directory (`Path`): where it goes.
        facts (`dict[str, str]`): numbers by name, plain text.
        sections: an id, a heading and HTML for each.
        title (`str`): plain text.
        parts: HTML for the other names in page.html: `subtitle`; `skip`, the id of the section that the first link
            leads to, for keyboards; `intro` and `notes` above and below the facts; `footer`; and `scripts`, an
            addition to the content security policy, which by default allows no script.

    Returns:
        `Path`: the file.
    """
    headings = {name: heading for name, heading, _ in sections}
    parts = {"intro": "", "notes": "", "scripts": "", "skip_to": headings[parts["skip"]]} | parts
    parts |= {
        "title": html.escape(title),
        "style": _resource("page.css"),
        "facts": "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()),
        "sections": "\n".join(f'<h2 id="{name}">{heading}</h2>\n{text}' for name, heading, text in sections),
    }
    target = directory / REPORT_FILE
    write_bytes(target, filled("page.html", parts).encode())
    return target


def filled(template: str, parts: dict[str, str]) -> str:
    """Replace each `{{name}}` in a template, a file beside this module, by HTML."""
    first, *pieces = _resource(template).split("{{")
    found = [first]  # in one pass, so that braces in a prompt stay what they are
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        found += [parts[name], rest]
    return "".join(found)


def _resource(name):
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def figures(drawings: Iterable[Drawing], folder: Path | None = None) -> str:
    """Draw figures for light and dark pages, and embed them. Those for light pages are also written into `folder`."""
    found = []
    for drawing in drawings:
        light, dark, words = drawing.png(), drawing.png(dark=True), html.escape(drawing.words)
        if folder is not None:
            write_bytes(folder / f"{drawing.name}.png", light)
        found.append(
            f'<figure><picture><source srcset="{_source(dark)}" media="(prefers-color-scheme: dark)">'
            f'<img src="{_source(light)}" alt="{words}"></picture>'
            f"<figcaption>{html.escape(drawing.caption)} {words}</figcaption></figure>"
        )
    return '<div class="figures">\n{}\n</div>'.format("\n".join(found)) if found else ""


def _source(png):
    return "data:image/png;base64," + base64.b64encode(png).decode()


def table(name: str, columns: dict[str, str], rows: Iterable[Sequence], caption: str = "") -> str:
    """
    Lay out a table. On a narrow page each cell shows its column's label.

    Args:
        name (`str`): for screen readers.
        columns (`dict[str, str]`): by label `TEXT`, `WORDS`, or the format of its numbers, such as `".2f"`.
        rows: plain values, a sequence for each row.
        caption (`str`): above the table.
    """
    classes = [f" class={kind}" if kind in (TEXT, WORDS) else "" for kind in columns.values()]
    head = "".join(f"<th scope=col{kind}>{label}</th>" for label, kind in zip(columns, classes, strict=True))
    lines = (
        "".join(
            f'<td{of_class} data-label="{label}">{_cell(value, kind)}</td>'
            for (label, kind), of_class, value in zip(columns.items(), classes, row, strict=True)
        )
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    caption = caption and f"<caption>{caption}</caption>"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(value, kind):
    if kind == TEXT:
        return long_text(value or "")
    return html.escape(value if kind == WORDS else formatted(value, kind))


def formatted(value: float | str | None, form: str) -> str:
    """Format a number; NaN and `None` become a dash."""
    return MISSING if value is None or value != value else format(value, form)


def long_text(text: str) -> str:
    """Show the beginning of a text, and the whole once it is opened. `longText` in prompts.html does the same."""
    start = "\n".join(text[:_SHOWN_CHARACTERS].split("\n")[:_SHOWN_LINES])
    if start == text:
        return html.escape(text)
    return (
        f"<details class=long><summary><span>{html.escape(start)}\u2026</span></summary>"
        f"<div>{html.escape(text)}</div></details>"
    )


def settings(summary: str, values: dict) -> str:
    """Show settings as JSON that can be folded away."""
    text = html.escape(json.dumps(values, indent=2))
    return f"<details open><summary>{summary}</summary><pre>{text}</pre></details>"
