"""HTML that both pages share: the frame, tables, figures and texts, all of them safe to show."""

import base64
import html
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from ..ground.disk import write_atomically
from ..selection.figures import Drawing


REPORT_FILE = "report.html"
MISSING = "\u2013"
TEXT, WORDS = "text", "words"  # kinds of columns: texts of prompts or completions, and words of this package
_SHOWN_CHARACTERS, _SHOWN_LINES = 240, 5  # of a text that is not opened; also in prompts.html


def write_page(
    directory: Path,
    *,
    title: str,
    subtitle: str,
    facts: dict[str, str],
    figures: tuple[str, str],
    sections: Sequence[tuple[str, str, str]],
    footer: str,
    skip: tuple[str, str],
    intro: str = "",
    notes: str = "",
    scripts: str = "",
) -> Path:
    """
    Write `report.html` into a directory.

    Args:
        directory (`Path`): where it goes.
        title, subtitle (`str`): plain text.
        facts (`dict[str, str]`): numbers by name, plain text.
        figures (`tuple[str, str]`): their heading, and HTML.
        sections: an id, a heading and HTML for each section below the figures.
        footer (`str`): HTML.
        skip (`tuple[str, str]`): the id that the first link leads to, for keyboards, and its name.
        intro, notes (`str`): HTML above and below the facts.
        scripts (`str`): an addition to the content security policy, which by default allows no script.

    Returns:
        `Path`: the file.
    """
    parts = {
        "title": html.escape(title),
        "subtitle": html.escape(subtitle),
        "style": _resource("page.css"),
        "scripts": scripts,
        "skip": skip[0],
        "skip_to": skip[1],
        "intro": intro,
        "facts": "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items()),
        "notes": notes,
        "figures_title": figures[0],
        "figures": figures[1],
        "sections": "\n".join(f'<h2 id="{name}">{heading}</h2>\n{text}' for name, heading, text in sections),
        "footer": footer,
    }
    page, target = filled("page.html", parts), directory / REPORT_FILE
    write_atomically(target, lambda temporary: temporary.write_text(page, encoding="utf-8"))
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


def figure(drawing: Drawing, light: bytes, dark: bytes) -> str:
    """Embed a drawing, with its PNG files for light and dark pages."""

    def source(data):
        return "data:image/png;base64," + base64.b64encode(data).decode()

    words = html.escape(drawing.words)
    return (
        f'<figure><picture><source srcset="{source(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{source(light)}" alt="{words}"></picture>'
        f"<figcaption>{html.escape(drawing.caption)} {words}</figcaption></figure>"
    )


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
