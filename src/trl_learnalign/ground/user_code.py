"""Python files of the user, told apart from installed packages."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import site
import sys
import sysconfig
import traceback
import uuid
from pathlib import Path
from types import ModuleType

from .hashing import stable_hash


def load_file(file: str, what: str) -> ModuleType:
    """
    Run a file as a module of its own, whatever modules of that name there are.

    Args:
        file (`str`): the file, which exists.
        what (`str`): the purpose it was named for, for messages, such as `"reward function 'rewards.py:correct'"`.

    Raises:
        `ValueError`: the file is no Python file, or its code failed.
    """
    name = f"_trl_learnalign_{Path(file).stem}_{stable_hash(str(Path(file).resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:  # not named .py
        raise ValueError(f"The file '{file}' of the {what} is no Python file. Let its name end with `.py`.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickles, dataclasses and `inspect` look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        place = last_line(error, str(spec.origin))
        raise ValueError(
            f"The file of the {what} failed{f' in line {place}' if place else ''}: "
            f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}."
        ) from error
    return module


_OURS = __name__.partition(".")[0]  # a library even where it is installed in editable mode


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    found = [paths["purelib"], paths["platlib"], *site.getsitepackages(), site.getusersitepackages()]
    return tuple(str(Path(one).resolve()) for one in found)


def is_ours(code) -> bool:
    """Tell whether a function or a class is part of this package."""
    return str(getattr(code, "__module__", "")).partition(".")[0] == _OURS


@functools.cache
def is_library(name: str) -> bool:
    """Tell whether a module is of Python or of an installed package, and so known by its version."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top == _OURS:
        return top != "__main__"
    if top == "__main__" or not top:
        return False
    try:
        spec = getattr(sys.modules.get(top), "__spec__", None) or importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or ())] if spec is not None else []
    return any(str(Path(place).resolve()).startswith(_installed()) for place in places if place)


@functools.cache
def version_of(name: str) -> str:
    """Return the version of Python or of the installed package that a module is part of; `""` for a user's module."""
    top = name.partition(".")[0]
    if not is_library(name):
        return ""
    if top in sys.stdlib_module_names:
        return sys.version.partition(" ")[0]
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__version__", ""))


def file_of(name: str) -> str:
    """Hash the file of a compiled module. A module without one gets another digest each time."""
    try:
        return hashlib.sha256(Path(str(sys.modules[name].__file__)).read_bytes()).hexdigest()
    except (OSError, KeyError, AttributeError):
        return uuid.uuid4().hex


def last_line(error: BaseException, file: str) -> int | None:
    """Find the number of the line of `file` that an error comes from; `None` if it comes from elsewhere."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def partial_arguments(function: functools.partial) -> str:
    """Format the arguments that a partial fixes, as in a call."""
    named = [f"{name}={plain(value)}" for name, value in sorted(function.keywords.items())]
    return f"({', '.join([*map(plain, function.args), *named])})"


def plain(value) -> str:
    """Format a number, a text or lists of them as Python prints them, and anything else as its type."""
    return repr(value) if _is_plain(value) else f"{type(value).__module__}.{type(value).__qualname__}"


def _is_plain(value):
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
