"""The code of a function, as its instructions say it: its place in a file does not matter."""

import dis
import functools
from dataclasses import dataclass, field
from types import CodeType


_NAMES = ("LOAD_GLOBAL", "LOAD_NAME")


@dataclass
class Code:
    """
    The instructions of a code and the names it uses. A code may have others inside, as of a nested function; names
    include theirs.

    Attributes:
        steps (`list`): instructions in their order, each followed by its argument: a text, a constant, or the steps of
            a code inside.
        globals (`dict[str, None]`): names looked up in the module.
        attributes (`dict[str, None]`): names looked up in objects.
        imports (`dict[tuple[int, str], None]`): modules imported, with the level of a relative import.
    """

    steps: list = field(default_factory=list)
    globals: dict[str, None] = field(default_factory=dict)
    attributes: dict[str, None] = field(default_factory=dict)
    imports: dict[tuple[int, str], None] = field(default_factory=dict)


@functools.lru_cache(4096)
def read_code(code: CodeType) -> Code:
    """
    Read a code and those inside it. Texts that are never loaded, such as docstrings, lines and files are left out.
    """
    found = Code(steps=[[code.co_flags & ~_DOCSTRING, *_signature(code)]])
    found.steps.append(getattr(code, "co_exceptiontable", b""))
    steps = list(dis.get_instructions(code))
    for place, step in enumerate(steps):
        kind, value = step.opname, step.argval
        if _is_line_number(steps, place):
            continue
        inner = isinstance(value, CodeType)
        found.steps += [kind, value if kind in _CONSTANTS else str(value)]
        if kind in _NAMES:
            found.globals[value] = None
        elif kind in ("LOAD_ATTR", "LOAD_METHOD", "IMPORT_FROM", "LOAD_SUPER_ATTR"):
            found.attributes[value] = None
        elif kind == "IMPORT_NAME":
            level = steps[place - 2].argval if place > 1 else 0
            found.imports[level if isinstance(level, int) else 0, value] = None
        if inner:
            deeper = read_code(value)
            found.steps[-1] = deeper.steps
            found.globals |= deeper.globals
            found.attributes |= deeper.attributes
            found.imports |= deeper.imports
    return found


def _signature(code):
    named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, list(code.co_varnames[:named])


def _is_line_number(steps, place):
    """Recognise the steps by which Python 3.13 and later write the first line of a class into the class."""
    near = steps[place : place + 2]
    return any(step.opname == "STORE_NAME" and step.argval == "__firstlineno__" for step in near)


_DOCSTRING = 0x4000000  # a flag of Python 3.14
_CONSTANTS = ("LOAD_CONST", "RETURN_CONST", "LOAD_SMALL_INT", "KW_NAMES")
