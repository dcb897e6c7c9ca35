"""
Functions of the user as they were when they were first seen. Calls change a cache, a counter or a list of completions,
and the function stays the same. A change while nobody calls it was made by hand: then it is another function.
"""

import uuid
import weakref
from dataclasses import dataclass
from types import MethodType

from .objects import examine


@dataclass
class Seen:
    """
    A function as it was when it was first seen.

    Attributes:
        parts (`list`): references to the function, or to the object and the function of a method.
        digest (`str`): digest of the function then.
        unknown (`list[str]`): parts of it that cannot be identified, see
            [`~trl_learnalign.identity.objects.examine`].
        last (`str`): digest after the last calls.
    """

    parts: list
    digest: str
    unknown: list[str]
    last: str


_SEEN: dict[tuple[int, ...], Seen] = {}


def look(function) -> Seen:
    """Look at a function before calls begin: a change since the last calls ended was made by hand."""
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
    """Return the function as it was when it was first looked at, which may be now."""
    return _find(function) or look(function)


def note(function) -> None:
    """Look at a function after calls have ended: what they changed does not make another function of it."""
    found = _find(function)
    if found is not None:
        found.last, _ = examine(function)


def _parts(function):
    """Return the parts that last: a method is made anew each time that it is named."""
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
