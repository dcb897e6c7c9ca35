"""
Functions of the user's as they were when they were first seen: calls change a cache, a counter, a list of completions,
and the function is the same. What is changed while nobody calls it was changed by hand, and makes another of it.
"""

import uuid
import weakref
from dataclasses import dataclass
from types import MethodType

from .objects import examine


@dataclass
class Seen:
    """
    Attributes:
        parts (`list`): references to the function, or to the object and the function of a method.
        digest (`str`): what it was.
        unknown (`list[str]`): what it held then that cannot be identified, see
            [`~trl_learnalign.identity.objects.examine`].
        last (`str`): what it was after the last calls.
    """

    parts: list
    digest: str
    unknown: list[str]
    last: str


_SEEN: dict[tuple[int, ...], Seen] = {}


def look(function) -> Seen:
    """To be called when calls are about to begin: what was changed since the last ones ended was changed by hand."""
    now, unknown = examine(function)
    found = _find(function)
    if found is None or found.last != now or found.unknown:
        for key in [key for key, one in _SEEN.items() if any(part() is None for part in one.parts)]:
            del _SEEN[key]
        digest = uuid.uuid4().hex if unknown else now
        parts = _parts(function)
        found = _SEEN[tuple(map(id, parts))] = Seen([_reference(part) for part in parts], digest, unknown, now)
    return found


def seen(function) -> Seen:
    """The function as it was when it was looked at, which may be now."""
    return _find(function) or look(function)


def note(function) -> None:
    """To be called when calls have ended: what they changed is no part of what the function is."""
    found = _find(function)
    if found is not None:
        found.last, _ = examine(function)


def _parts(function):
    """A method is made anew each time that it is named."""
    return (function.__self__, function.__func__) if isinstance(function, MethodType) else (function,)


def _find(function):
    parts = _parts(function)
    found = _SEEN.get(tuple(map(id, parts)))
    same = found is not None and all(known() is part for known, part in zip(found.parts, parts, strict=True))
    return found if same else None


def _reference(part):
    try:
        return weakref.ref(part)
    except TypeError:  # such as a dict
        return lambda: part
