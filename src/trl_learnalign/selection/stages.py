"""The selections of one run. Only those that are new or have changed are read again."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..config import FREE_ON_RESUME
from .result import SCORES_FILE, SELECTION_FILE, Selection, find_selections


@dataclass(frozen=True)
class Stage:
    """
    A finished selection of a run, as far as it is kept in memory.

    Attributes:
        path (`Path`): its directory, as it was asked for.
        provenance (`dict`): see [`Selection`]; without the indices that it may list.
        indices (`numpy.ndarray` of shape `(num_chosen,)`): dataset rows, best first.
        outcomes (`dict[str, tuple[float, float]]`): see [`Selection.outcomes`].
        num_learnable (`int`): prompts with V > 0.
        summary (`str`): see [`Selection.summary`].
    """

    path: Path
    provenance: dict
    indices: np.ndarray
    outcomes: dict[str, tuple[float, float]]
    num_learnable: int
    summary: str

    @classmethod
    def of(cls, path: Path, selection: Selection) -> "Stage":
        """Keep what is needed of a selection that was read from `path`."""
        lists = ("unscorable", "duplicates")
        provenance = {name: value for name, value in selection.provenance.items() if name not in lists}
        indices = np.asarray(selection.indices, dtype=np.int64)
        outcomes, learnable = selection.outcomes(), selection.num_learnable()
        return cls(path, provenance, indices, outcomes, learnable, selection.summary())


# By directory: the state of its files when they were read, and what they said. A model card is written with each
# checkpoint, and a pool's scores can take seconds to read
_KNOWN: dict[Path, tuple[tuple, Stage]] = {}


def load_run(path: str | os.PathLike, until: int | None = None) -> list[Stage]:
    """
    Read the last selection that [`find_selections`] finds, and the earlier ones of the same run, oldest first: those
    of an earlier stage with the same configuration, seed and dataset. `until` leaves out selections after that
    optimizer step, which are of another run. A selection that this process has read before is read again only if one
    of its files has changed.

    Raises:
        `FileNotFoundError`: there is none.
        `ValueError`: one of them is damaged.
    """
    return _read(path, until)[0]


def load_last(path: str | os.PathLike, until: int | None = None) -> tuple[Selection, list[Stage]]:
    """Read the last selection whole, and the run that it belongs to, as [`load_run`] does; the run includes it."""
    stages, last_read = _read(path, until)
    if not stages:
        raise FileNotFoundError(f"'{path}' holds no finished selection up to optimizer step {until}.")
    last = stages[-1].path
    return last_read.get(last) or Selection.load(last), stages


def _read(path, until):
    """Return the stages, and by its path the selection that was read last, if any had to be read."""
    found, last_read = [], {}
    for directory in find_selections(path):
        key, files = directory.resolve(), _identity(directory)
        if key not in _KNOWN or _KNOWN[key][0] != files:
            last_read = {directory: Selection.load(directory)}
            _KNOWN[key] = files, Stage.of(directory, last_read[directory])
        found.append(replace(_KNOWN[key][1], path=directory))
    if until is not None:
        found = [stage for stage in found if stage.provenance.get("global_step", 0) <= until]
    return [stage for stage in found if _belongs(stage.provenance, found[-1].provenance)], last_read


def _identity(directory):
    states = [(directory / name).stat() for name in (SELECTION_FILE, SCORES_FILE) if (directory / name).is_file()]
    return tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)


def _belongs(provenance, last):
    """Return whether a selection is of the same run as the last one."""

    def origin(provenance):
        config = {name: value for name, value in provenance.get("config", {}).items() if name not in FREE_ON_RESUME}
        return config, provenance.get("seed"), provenance.get("dataset_fingerprint")

    earlier = provenance.get("stage", 0) < last.get("stage", 0)
    return provenance is last or (earlier and origin(provenance) == origin(last))
