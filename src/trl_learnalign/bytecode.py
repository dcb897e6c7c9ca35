"""What the code of a function does, as far as it can be read from its instructions: not where it stands in a file."""

import dis
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType


# Methods of containers and counters that change them
_CHANGING = {
    *("append", "appendleft", "extend", "extendleft", "insert", "remove", "pop", "popleft", "popitem", "clear"),
    *("add", "discard", "update", "setdefault", "sort", "reverse", "subtract", "rotate", "__setitem__"),
}
_NAMES = ("LOAD_GLOBAL", "LOAD_NAME")
_MAKING = {"__init__", "__new__", "__post_init__", "__setstate__"}  # what these set is not a change
_STORES = ("GLOBAL", "DEREF", "ATTR", "NAME")
_LOADS = (*_NAMES, "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_ATTR")


@dataclass
class Code:
    """
    Attributes:
        steps (`list`): its instructions in their order, each followed by its argument: a text, a constant, or the
            steps of a code inside.
        globals (`dict[str, None]`): names that it looks up in its module, those of codes inside included.
        attributes (`dict[str, None]`): names that it looks up in objects.
        imports (`dict[tuple[int, str], None]`): modules that it imports, with the level of a relative import.
        changed (`set[str]`): variables and attributes that it sets, or whose containers it changes.
    """

    steps: list = field(default_factory=list)
    globals: dict[str, None] = field(default_factory=dict)
    attributes: dict[str, None] = field(default_factory=dict)
    imports: dict[tuple[int, str], None] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


@functools.lru_cache(4096)
def read_code(code: CodeType) -> Code:
    """
    Reads a code and those inside it. Texts that it never loads, such as docstrings, lines and files are no part of it.
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
            found.changed |= deeper.changed
    found.changed |= set(_changed(steps))
    return found


def changes(classes: list[type], codes: list[Code]) -> set[str]:
    """
    Names that change in an object while it is called, or while `codes` run, which call its methods.

    Args:
        classes (`list[type]`): of the object, in the order in which methods are looked up.
        codes (`list[Code]`): that call methods, by the names of their attributes.
    """
    methods = {name: value for kind in reversed(classes) for name, value in vars(kind).items()}
    methods = {name: read_code(one.__code__) for name, value in methods.items() if (one := _function_of(value))}
    methods = {name: code for name, code in methods.items() if name not in _MAKING}
    changed = set().union(*(code.changed for code in codes))
    called = {name for name in methods if name.startswith("__")}
    called |= methods.keys() & set().union(*(code.attributes for code in codes))
    seen = set()
    while called:
        seen |= called
        changed |= set().union(*(methods[name].changed for name in called))
        called = {one for name in called for one in methods[name].attributes if one in methods} - seen
    return changed


def _function_of(value):
    """Of an entry of a class the function, if it has one: of a method, or what reads a property."""
    value = getattr(value, "__func__", getattr(value, "fget", getattr(value, "func", value)))
    return value if isinstance(value, FunctionType) else None


def _signature(code):
    named = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, list(code.co_varnames[:named])


def _is_line_number(steps, place):
    """Python 3.13 and later write the first line of a class into it."""
    near = steps[place : place + 2]
    return any(step.opname == "STORE_NAME" and step.argval == "__firstlineno__" for step in near)


def _changed(steps) -> Iterator[str]:
    for place, step in enumerate(steps):
        action, _, target = step.opname.partition("_")
        if action in ("STORE", "DELETE") and target in _STORES:
            yield step.argval
        elif action in ("STORE", "DELETE") and target == "SUBSCR":
            yield from _owner(steps, _before_key(steps, place))
        elif step.opname in ("LOAD_METHOD", "LOAD_ATTR") and step.argval in _CHANGING:
            yield from _owner(steps, place - 1)


def _owner(steps, place) -> Iterator[str]:
    """The name of the variable or attribute that the instruction loads, or whose item it takes."""
    while 0 <= place and _takes_item(steps[place]):
        place = _before_key(steps, place)
    if 0 <= place and steps[place].opname in _LOADS:
        yield steps[place].argval


def _takes_item(step):
    return step.opname == "BINARY_SUBSCR" or (step.opname == "BINARY_OP" and step.argrepr == "[]")


def _before_key(steps, place):
    """The last instruction before the key that an instruction takes from the top of the stack."""
    if [step.opname for step in steps[max(place - 2, 0) : place]] == ["SWAP", "SWAP"]:  # `x[key] += ...`
        copies = [
            at for at in range(place - 2) if steps[at].opname == steps[at + 1].opname == "COPY" and at + 2 < place
        ]
        place = next((at for at in reversed(copies) if _takes_item(steps[at + 2])), 0)
    height = 0
    for at in range(place - 1, -1, -1):
        argument = steps[at].arg if steps[at].opcode >= dis.HAVE_ARGUMENT else None
        try:
            height += dis.stack_effect(steps[at].opcode, argument, jump=False)
        except ValueError:  # not an instruction of which that is known
            return -1
        if height >= 1:
            return at - 1
    return -1


_DOCSTRING = 0x4000000  # a flag of Python 3.14
_CONSTANTS = ("LOAD_CONST", "RETURN_CONST", "LOAD_SMALL_INT", "KW_NAMES")
