"""Fields of a configuration: explained once, in the docstring of its class, and checked by their types."""

import inspect
import re
import sys
from dataclasses import Field, fields
from types import MappingProxyType
from typing import get_args


def explanations(kind: type) -> dict[str, str]:
    """The explanation of each field of a dataclass, on one line, from its docstring."""
    found = re.findall(r"^    (\w+) \(.*\):\n((?:     +.*\n?)+)", inspect.getdoc(kind), re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def explain(kind: type) -> type:
    """
    Makes the explanations the help of a command line, where a % is special. All other metadata goes to argparse, too.
    """
    texts = explanations(kind)
    for one in fields(kind):
        one.metadata = MappingProxyType({**one.metadata, "help": texts[one.name].replace("%", "%%")})
    return kind


def check(one: Field, annotation, value, least: dict) -> None:
    """
    Args:
        one (`Field`): of a dataclass.
        annotation: its type; a TrlParser overwrites that of the field.
        value: to be checked.
        least (`dict[str, tuple[int, str]]`): of each integer field the least value, and what to do instead.

    Raises:
        `ValueError`: the value is not of that type or in its range.
    """
    name, kinds = one.name, get_args(annotation) or (annotation,)
    if isinstance(value, kinds[1:]):  # None
        return
    if choices := one.metadata.get("choices"):
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
    elif str in kinds and not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, but is {value!r}. Use None for none.")
    elif bool in kinds and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, but is {value!r}.")
    elif int in kinds:
        lowest, remedy = least[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"`{name}` must be an integer, but is {value!r}. {remedy}")
        if value < lowest:
            raise ValueError(f"`{name}` is {value}, but must be at least {lowest}. {remedy}")
    elif float in kinds:
        # An integer too large for a float is not finite either
        known = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not known or not abs(value) <= sys.float_info.max:
            raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")
