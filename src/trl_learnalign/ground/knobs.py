"""Fields of a configuration: explained once, in the docstring of its class, and checked by their types."""

import inspect
import re
import sys
from dataclasses import Field, fields
from types import MappingProxyType
from typing import Any, Literal, TypeVar, cast, get_args, get_origin


_Kind = TypeVar("_Kind", bound=type)


def explanations(kind: type) -> dict[str, str]:
    """Read the explanation of each field of a dataclass, on one line, from the docstring of the class."""
    found = re.findall(r"^    (\w+) \(.*\):\n((?:     +.*\n?)+)", inspect.getdoc(kind) or "", re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def explain(kind: _Kind) -> _Kind:
    """Make the explanations of a dataclass the help of a command line."""
    texts = explanations(kind)
    for one in fields(kind):
        # argparse formats a help text with %, and takes all other metadata as arguments of its own
        one.metadata = MappingProxyType({**one.metadata, "help": texts[one.name].replace("%", "%%")})
    return kind


def check(one: Field, annotation: Any, value: object, least: dict[str, tuple[int, str]]) -> None:
    """
    Check the value of a field of a dataclass.

    Args:
        one (`Field`): the field.
        annotation: the field's type. `one.type` may not be: a TrlParser overwrites it.
        value: to be checked.
        least (`dict[str, tuple[int, str]]`): the least value of each integer field, and what to do instead.

    Raises:
        `ValueError`: the value is not of that type or in its range.
    """
    name = one.name
    if value is not None:  # of a choice that may be `None`
        annotation = next((kind for kind in get_args(annotation) if get_origin(kind) is Literal), annotation)
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
        return
    kinds = get_args(annotation) or (annotation,)
    if isinstance(value, kinds[1:]):  # None
        return
    if str in kinds and not isinstance(value, str):
        raise ValueError(f"`{name}` must be a text, but is {value!r}. Use None for none.")
    if bool in kinds and not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, but is {value!r}.")
    if int in kinds:
        lowest, remedy = least[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"`{name}` must be an integer, but is {value!r}. {remedy}")
        if value < lowest:
            raise ValueError(f"`{name}` is {value}, but must be at least {lowest}. {remedy}")
    if float in kinds:
        # An integer too large for a float is not finite either
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not (known and abs(cast(float, value)) <= sys.float_info.max):
            raise ValueError(f"`{name}` must be a finite number, but is {value!r}.")
