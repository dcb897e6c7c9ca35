"""The file of the features of prompts, in the directory of a run and in each of its checkpoints."""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..ground.disk import make_directory, write_atomically


@dataclass(frozen=True)
class PromptFeatures:
    """
    The features of some prompts.

    Attributes:
        values (`np.ndarray` of shape `(n, k)`, float16): columns of mean 0, in the order of the variance that they
            explain. The first has standard deviation 1, column j has (u_j / u_1)^(1/4), where u are the variances of
            the components: a ridge then shrinks late components more than the first, but less than their size alone
            would have it.
        rows (`np.ndarray` of shape `(n,)`, int32): of the dataset, increasing.
        made_from (`dict`): what they depend on, for JSON.
        key (`str`): digest of it. A resumed run asks for the features that it began with.
    """

    values: np.ndarray
    rows: np.ndarray
    made_from: dict
    key: str

    @property
    def file(self) -> str:
        """Name of the file, another for each key: a second run in the same directory leaves the first's."""
        return file_name(self.key)

    def spread(self, total: int) -> np.ndarray:
        """Return features by dataset row, of shape `(total, k)`: 0, which is the mean, where nothing is known."""
        if len(self.rows) == total:
            return self.values
        found = np.zeros((total, self.values.shape[1]), dtype=np.float16)
        found[self.rows] = self.values
        return found

    def content(self) -> bytes:
        """Return the content of the file, the same on every process."""
        checks = {"crc32": _checksum(self.values, self.rows), "key": self.key, "made_from": self.made_from}
        # One entry, since safetensors writes several in any order
        about = {"learnalign": json.dumps(checks, sort_keys=True)}
        return save({"features": np.ascontiguousarray(self.values), "rows": self.rows}, about)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.content()).hexdigest()

    def write(self, directory: Path, source: Path | None = None) -> None:
        """
        Write the file into a directory; as a link to that in the directory `source`, if it can be had.

        Raises:
            `OSError`: the file cannot be written.
        """

        def fill(temporary):
            try:
                os.link(source / self.file, temporary)
                if hashlib.sha256(temporary.read_bytes()).hexdigest() == self.sha256:
                    return
                temporary.unlink()  # of another run with this key, or damaged
            except (OSError, TypeError):  # not there, a file system without links, or no source
                pass
            temporary.write_bytes(self.content())

        make_directory(directory)
        for leftover in directory.glob(f".{self.file}.*.tmp"):
            leftover.unlink(missing_ok=True)
        write_atomically(directory / self.file, fill)


def file_name(key: str) -> str:
    """Return the name of the file of the features with this key."""
    return f"prompt_features-{key[:16]}.safetensors"


def read_features(directory: Path, key: str) -> PromptFeatures | None:
    """Return the features with this key; `None` where there is no file of them, or a damaged one."""
    try:
        with safe_open(directory / file_name(key), "numpy") as file:
            about = json.loads(file.metadata()["learnalign"])
            values, rows = file.get_tensor("features"), file.get_tensor("rows")
        whole = about["crc32"] == _checksum(values, rows) and about["key"] == key
        return PromptFeatures(values, rows, about["made_from"], key) if whole else None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _checksum(values, rows):
    return zlib.crc32(rows.tobytes(), zlib.crc32(values.tobytes()))
