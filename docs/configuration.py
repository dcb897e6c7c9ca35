"""
Writes the table of configuration.md from the docstring of LearnAlignConfig; with `--check`, fails if it is not there.

    python docs/configuration.py [--check]
"""

import re
import sys
from dataclasses import fields
from pathlib import Path

from trl_learnalign import LearnAlignConfig
from trl_learnalign.ground.knobs import explanations


PAGE = Path(__file__).with_name("configuration.md")


def table() -> str:
    texts, lines = explanations(LearnAlignConfig), ["| field | default | meaning |", "| --- | --- | --- |"]
    for one in fields(LearnAlignConfig):
        default = f'"{one.default}"' if isinstance(one.default, str) else one.default
        lines.append(f"| `{one.name}` | `{default}` | {texts[one.name].replace('|', '&#124;')} |")
    return "\n".join(lines)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = re.split(r"(?<=<!-- fields).*?-->\n", page, flags=re.S, maxsplit=1)
    new = f"{before}, written by docs/configuration.py -->\n\n{table()}\n\n<!-- end{rest.partition('<!-- end')[2]}"
    if "--check" in sys.argv:
        sys.exit(
            None if new == page else "docs/configuration.md is not as the docstring says. Run docs/configuration.py."
        )
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
