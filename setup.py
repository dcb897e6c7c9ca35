"""The description that a package index shows: README.md, made for readers there. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup


def description(readme: str) -> str:
    """
    Turn links to files beside README.md, which lead nowhere on an index, into plain text, drop their images, and
    install from the index.
    """
    readme = readme.replace("In a clone of this repository, with Python", "With Python")
    readme = re.sub(r"^pip install \.$", "pip install trl-learnalign", readme, flags=re.MULTILINE)
    readme = re.sub(r"!\[[^]]*\]\((?!https?:)[^)]*\)\n*", "", readme)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#)[^)]*\)", r"\1", readme)


setup(
    long_description=description(Path(__file__).with_name("README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
)
