"""
Pages of the documentation from templates, whose `{{...}}` stand for numbers of results, so that nobody types one.

`{{million.prompts:,}}` is `million["prompts"]`, formatted; `{{arms}}`, a function of that name, is called. Before the
format `%` stands for percent, `M` and `G` for millions and billions, `Aa` for a capital letter.
"""

import re
import sys
from pathlib import Path
from statistics import fmean, stdev

from harness import ROOT


_UNITS = {"%": 100, "M": 1e-6, "G": 1e-9}
_WIDTH = 118  # columns of prose
_STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # 97.5 % quantiles of t, by degrees of freedom


def table(head, rows) -> str:
    """Make a table of texts in Markdown. The head is a text with ` | ` between labels, or a list."""
    head = head.split(" | ") if isinstance(head, str) else head
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def columns(labels: dict, items) -> str:
    """Make a table with a column for each label, whose function returns the cell of an item."""
    return table(
        [label.strip() for label in labels], [[str(cell(item)) for cell in labels.values()] for item in items]
    )


def interval(values) -> tuple[float, float] | None:
    """Of the mean over seeds, 95 %, by Student's t; None of fewer than three."""
    if len(values) < 3:
        return None
    half = _STUDENT[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def bounds(values) -> tuple[float, float]:
    """That interval; of two values the values themselves."""
    return interval(values) or (min(values), max(values))


def points(values, form=".1f") -> str:
    """The mean of differences with its interval; the values themselves where there are too few for one."""
    around = interval(values)
    if around is None:
        return ", ".join(f"{value:+{form}}" for value in values)
    return f"{fmean(values):+{form}} [{around[0]:+{form}}, {around[1]:+{form}}]"


def fill(template: str, names: dict) -> str:
    """The template with each `{{...}}` replaced by what it stands for in `names`; a function is called once."""
    called = {}

    def value(match):
        path, _, form = match[1].partition(":")
        first, *steps = path.split(".")
        found = names[first]
        if callable(found):
            found = called[first] = called[first] if first in called else found()
        for step in steps:
            found = found[int(step) if isinstance(found, list) else step]
        if form == "Aa":
            return found[0].upper() + found[1:]
        if form[:1] in _UNITS:
            return format(found * _UNITS[form[0]], form[1:])
        return format(found, form)

    return wrapped(re.sub(r"\{\{([^{}]+)\}\}", value, template))


def wrapped(page: str) -> str:
    """The page with every paragraph and list item that has a line of more than 120 columns broken anew."""
    lines, paragraph, fenced = [], [], False

    def close():
        if any(len(line) > _WIDTH for line in paragraph):
            first = re.match(r"\s*(?:[-*+] +|\d+\. +)?", paragraph[0])[0]
            words = " ".join(line.strip() for line in paragraph).removeprefix(first.strip()).split()
            lines.append(first.rstrip("\n"))
            for word in words:
                # A line that begins so would be a list, a heading or a table
                marks = re.match(r"[-+*=]+$|[>#|]|\d+[.)]$", word)
                if len(lines[-1]) + 1 + len(word) > _WIDTH and not marks:
                    lines.append(" " * len(first) + word)
                else:
                    lines[-1] += word if lines[-1] == first else f" {word}"
        else:
            lines.extend(paragraph)
        paragraph.clear()

    for line in page.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if fenced or not line.strip() or line.lstrip().startswith(("```", "|", "#", "<!--")):
            close()
            lines.append(line)
        else:
            if re.match(r"\s*(?:[-*+]|\d+\.) ", line):
                close()
            paragraph.append(line)
    close()
    return "\n".join(lines)


def between(path: Path, script: str, text: str) -> str:
    """The page at `path` with a text where a script writes it."""
    mark, end = f"<!-- written by {script} -->\n", "<!-- end -->\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(mark)
    return f"{before}{mark}\n{text.rstrip()}\n\n{end}{rest.partition(end)[2]}"


def publish(pages: dict[Path, str], script: str, after=lambda: None) -> None:
    """
    Writes the pages that are not what they should be; with `--check` on the command line that is an error instead.
    """
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        if stale:
            names = ", ".join(path.name for path in stale)
            sys.exit(f"Not what the results say: {names}. Run {script}.")
        return
    after()
    for path in stale:
        path.write_text(pages[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")
