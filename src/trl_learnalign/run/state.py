"""The arrays of a nested state in a file of a checkpoint, beside its values."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..ground.disk import digest, write_bytes


STATE_FILE = "learnalign_state.safetensors"


def write_arrays(directory: Path, arrays: dict[str, np.ndarray], is_writer: bool) -> dict | None:
    """
    Write the arrays into a checkpoint, where there are any. Return what trainer_state.json is to say of them: the
    name of the file and its SHA-256.
    """
    if not arrays:
        return None
    content = save(dict(sorted(arrays.items())))
    if is_writer:
        for leftover in directory.glob(f".{STATE_FILE}.*.tmp"):  # of a run killed in this very checkpoint
            leftover.unlink(missing_ok=True)
        write_bytes(directory / STATE_FILE, content)
    return {"file": STATE_FILE, "sha256": hashlib.sha256(content).hexdigest()}


def read_arrays(directory: Path, entry: dict | None) -> dict[str, np.ndarray]:
    """
    Read the arrays that [`write_arrays`] wrote, by its entry.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    if entry is None:
        return {}
    return read_checked(directory / STATE_FILE, entry, load)


def read_checked(path: Path, entry: dict, decode: Callable[[bytes], dict]) -> dict:
    """
    Decode a file of a checkpoint, whose SHA-256 an entry has.

    Raises:
        `ValueError`: the file is missing or damaged.
    """
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError("it does not agree with its checksum")
        return decode(content)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(
            f"'{path}', the state of the schedule in this checkpoint, cannot be used: {error}. Resume from an earlier "
            "checkpoint."
        ) from error


def decided(values: dict, arrays: dict[str, np.ndarray]) -> str:
    """
    Digest what a schedule has decided: all but floating-point numbers, whose last digits may differ between
    processors.
    """
    decided = {name: array for name, array in sorted(arrays.items()) if array.dtype.kind != "f"}
    digests = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in decided.items()}
    return digest([_without_floats(values), digests])


def _without_floats(value):
    if isinstance(value, dict):
        return {name: _without_floats(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(part) for part in value]
    return None if isinstance(value, float) else value
