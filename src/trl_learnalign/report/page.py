"""Pieces of the HTML pages: templates, tables, figures and texts, all of them safe to show."""

import base64
import html
import math
from collections.abc import Collection, Iterable, Sequence
from importlib import resources


MISSING = "\u2013"
_SHOWN_CHARACTERS, _SHOWN_LINES = 240, 5  # of a text that is not opened; also in report_template.html


def filled(template: str, parts: dict[str, str]) -> str:
    """
    The head that all pages share, with their style, and after it a template of this package, with each `{{name}}`
    replaced.

    Args:
        template (`str`): the name of the file.
        parts (`dict[str, str]`): HTML by name. Of the head `title`, `subtitle`, `skip` (the id of what the first link
            leads to), `skip_to` (its name) and `scripts` (what the policy says of scripts; empty for none).
    """

    def read(name):
        return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")

    parts = parts | {"style": read("report_style.css")}
    first, *pieces = (read("page_head.html") + read(template)).split("{{")
    found = [first]  # in one pass, so that braces in a prompt stay what they are
    for piece in pieces:
        name, rest = piece.split("}}", 1)
        found += [parts[name], rest]
    return "".join(found)


def figure(drawing, light: bytes, dark: bytes) -> str:
    """HTML of a [`Drawing`], with its two PNG files in it."""

    def source(data):
        return "data:image/png;base64," + base64.b64encode(data).decode()

    words = html.escape(drawing.words)
    return (
        f'<figure><picture><source srcset="{source(dark)}" media="(prefers-color-scheme: dark)">'
        f'<img src="{source(light)}" alt="{words}"></picture>'
        f"<figcaption>{html.escape(drawing.caption)} {words}</figcaption></figure>"
    )


def fact_list(values: dict[str, str]) -> str:
    """HTML of a list of numbers by name."""
    return "\n".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in values.items())


def html_table(
    name: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    texts: Collection[str] = (),
    caption: str = "",
    words: Collection[str] = (),
) -> str:
    """
    HTML of a table. On a narrow page each cell shows its column's label.

    Args:
        name (`str`): for screen readers.
        columns (`Sequence[str]`): their labels.
        rows: of cells, which are HTML.
        texts (`Collection[str]`): labels of the columns that hold texts of prompts or completions, not numbers.
        caption (`str`): above the table.
        words (`Collection[str]`): labels of the columns that hold words of this package.
    """
    kinds = [" class=text" if column in texts else " class=words" if column in words else "" for column in columns]
    head = "".join(f"<th scope=col{kind}>{column}</th>" for column, kind in zip(columns, kinds, strict=True))
    lines = (
        "".join(
            f'<td{kind} data-label="{column}">{cell}</td>'
            for column, kind, cell in zip(columns, kinds, cells, strict=True)
        )
        for cells in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    caption = caption and f"<caption>{caption}</caption>"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{name}"><table>{caption}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def long_text(text: str) -> str:
    """
    HTML of a text, of which only the beginning is shown until it is opened. `longText` in report_template.html does
    the same.
    """
    start = "\n".join(text[:_SHOWN_CHARACTERS].split("\n")[:_SHOWN_LINES])
    if start == text:
        return html.escape(text)
    return (
        f"<details class=long><summary><span>{html.escape(start)}\u2026</span></summary>"
        f"<div>{html.escape(text)}</div></details>"
    )


def number(value: float | None, digits: int) -> str:
    """A number as text, or a dash for NaN and `None`."""
    return MISSING if value is None or math.isnan(value) else f"{value:.{digits}f}"
