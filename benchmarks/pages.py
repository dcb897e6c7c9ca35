"""
Pages of the documentation from templates, whose `{{...}}` stand for numbers of results, so that nobody types one.

`{{million.prompts:,}}` is `million["prompts"]`, formatted; `{{arms}}`, a function of that name, is called. Before the
format `%` stands for percent, `M` and `G` for millions and billions, `Aa` for a capital letter.
"""

import re
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
_UNITS = {"%": 100, "M": 1e-6, "G": 1e-9}


def table(head, rows) -> str:
    """Of texts, in Markdown. A head is the labels with ` | ` between them, or a list."""
    head = head.split(" | ") if isinstance(head, str) else head
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


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

    return re.sub(r"\{\{([^{}]+)\}\}", value, template)


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
