"""Python files of the user's."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from .projection import stable_hash
from .rewards import last_line


def load_file(file: str, what: str) -> ModuleType:
    """
    Runs a file as a module of its own, whatever modules of that name there are.

    Args:
        file (`str`): the file, which exists.
        what (`str`): what it was named for, for messages, such as `"reward function 'rewards.py:correct'"`.

    Raises:
        `ValueError`: it failed.
    """
    name = f"_trl_learnalign_{Path(file).stem}_{stable_hash(str(Path(file).resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickles, dataclasses and `inspect` look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        place = last_line(error, spec.origin)
        raise ValueError(
            f"The file of the {what} failed{f' in line {place}' if place else ''}: "
            f"{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}."
        ) from error
    return module
