"""Nested states: copies of them, as values and arrays, as bytes."""

import io
import json
import zipfile

import numpy as np


_VALUES = "values"  # of `pack`: the name of what is no array


def copied(state: dict) -> dict:
    """Copy the arrays of a nested state, which later observations would change."""
    return {
        name: copied(value) if isinstance(value, dict) else value.copy() if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }


def split(state: dict) -> tuple[dict, dict[str, np.ndarray]]:
    """
    Split a nested state into values, and arrays by their place in it, such as `"sampler/state/indices"`.

    Raises:
        `TypeError`: the state holds what a checkpoint cannot: its place is named.
    """
    values: dict = {}
    arrays: dict[str, np.ndarray] = {}
    for name, value in state.items():
        if not isinstance(name, str) or "/" in name:
            raise TypeError(f"The key {name!r} of a state must be a text without '/', which separates keys of arrays.")
        if isinstance(value, dict):
            values[name], inner = split(value)
            arrays |= {f"{name}/{path}": array for path, array in inner.items()}
        elif isinstance(value, np.ndarray):
            if value.dtype.kind not in "biuf":
                raise TypeError(_unfit(name, f"an array of {value.dtype}"))
            arrays[name] = np.array(value, order="C")
        else:
            try:
                json.dumps(value)
            except TypeError as error:
                raise TypeError(_unfit(name, f"a {type(value).__name__} ({error})")) from error
            values[name] = value
    return values, arrays


def _unfit(name, what) -> str:
    return (
        f"`state_dict()[{name!r}]` is {what}, which a checkpoint cannot hold. Return numbers, texts, lists and dicts "
        "of Python's own, and NumPy arrays of numbers or bools."
    )


def join(values: dict, arrays: dict[str, np.ndarray]) -> dict:
    """Join what was [`split`]."""
    state = {name: join(value, {}) if isinstance(value, dict) else value for name, value in values.items()}
    for path, array in arrays.items():
        *outer, name = path.split("/")
        place = state
        for step in outer:
            place = place[step]
        place[name] = array
    return state


def pack(state: dict) -> bytes:
    """
    Return a nested state as bytes, without pickle: for a checkpoint that holds files or texts alone.

    Raises:
        `TypeError`: the state holds anything but numbers, texts, lists and dicts of Python's own, and NumPy arrays of
            numbers or bools.
    """
    values, arrays = split(state)
    content = io.BytesIO()
    whole = {_VALUES: np.frombuffer(json.dumps(values).encode(), np.uint8)}
    np.savez(content, **(whole | {f"/{place}": array for place, array in arrays.items()}))
    return content.getvalue()


def unpack(content: bytes) -> dict:
    """
    Return the state that [`pack`] made bytes of.

    Raises:
        `ValueError`: the bytes are damaged.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {name[1:]: file[name] for name in file.files if name != _VALUES}
            return join(json.loads(file[_VALUES].tobytes()), arrays)
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"The packed state is damaged: {error}. Resume from an earlier checkpoint.") from error
