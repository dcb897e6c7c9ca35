"""Finished batches of an unfinished selection, so that a killed one goes on where it stopped."""

import json
import logging
import shutil
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .disk import make_directory, remove_leftovers, write_atomically, write_json, write_parquet
from .groups import Group


logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_GROUPS_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("prompt_ids", pa.list_(pa.list_(pa.int32()))),  # one where all rollouts have the same
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("loss_masks", pa.list_(pa.list_(pa.int8()))),
        ("completions", pa.list_(pa.string())),
        ("rewards", pa.list_(pa.list_(pa.float32()))),
        ("penalties", pa.list_(pa.float32())),
    ]
)


class Journal:
    """
    A directory of finished batches of rollouts and of gradient features. A file that is damaged, or was made for other
    prompts or settings, is ignored.

    Args:
        path (`Path`): the directory; made if it does not exist.
        key (`str`): a hash of everything that the batches depend on. A journal with another key is discarded with a warning.
        is_main (`bool`): whether this process may delete and create the directory, one of each disk; the others wait for it
            outside.
    """

    def __init__(self, path: Path, key: str, is_main: bool):
        self.path = path
        self.key = key
        self.resumed = False  # whether finished rollouts were found
        if is_main:
            if path.exists() and self._saved_key() != key:
                logger.warning(
                    f"'{path}' was made from other weights, data, rewards or settings, so it is discarded and the "
                    "selection starts again."
                )
                shutil.rmtree(path, ignore_errors=True)  # each file has the key as well
            remove_leftovers(path)
            if self._saved_key() != key:
                make_directory(path)
                write_json(path / _MANIFEST, {"key": key})

    def _saved_key(self):
        try:
            return json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # Rollouts ---------------------------------------------------------------------------------------------------

    def load_groups(self, indices: list[int], shape: tuple[int, int]) -> list[Group] | None:
        """The groups of the prompts `indices`, rewards of `shape` (G, F) each; `None` if they were not finished."""
        try:
            table = pq.read_table(self._groups_file(indices), page_checksum_verification=True)
            if (
                not table.schema.equals(_GROUPS_SCHEMA)
                or (table.schema.metadata or {}).get(b"key") != self.key.encode()
            ):
                return None
            groups = _groups(table)
        except (OSError, ValueError, pa.ArrowException):
            return None
        if [group.index for group in groups] != indices or any(group.rewards.shape != shape for group in groups):
            return None
        self.resumed = True
        return groups

    def save_groups(self, groups: list[Group]) -> None:
        """Records a finished batch of rollouts."""
        rows = [
            {
                **vars(group),
                "prompt_ids": group.prompt_ids[:1] if _one(group.prompt_ids) else group.prompt_ids,
                "completions": [json.dumps(completion) for completion in group.completions],
                "rewards": list(group.rewards),
            }
            for group in groups
        ]
        table = pa.Table.from_pylist(rows, schema=_GROUPS_SCHEMA).replace_schema_metadata({"key": self.key})
        write_parquet(self._groups_file([group.index for group in groups]), table)

    def _groups_file(self, indices):
        return self.path / f"rollouts-{indices[0]:09d}-{indices[-1]:09d}.parquet"

    # Gradient features ------------------------------------------------------------------------------------------

    def load_features(self, name: str, shape: tuple[int, int], verify: bool = True) -> torch.Tensor | None:
        """
        Features recorded under `name`, of `shape` (k, d), float32, mapped from the file; `None` if there are none.
        `verify=False` leaves out the checksum.
        """
        try:
            with safe_open(self._features_file(name), "pt") as file:
                made_for = file.metadata() or {}
                features = file.get_tensor("features")
        except (OSError, SafetensorError):
            return None
        if made_for.get("key") != self.key or made_for.get("name") != name:
            return None
        if features.shape != shape or features.dtype != torch.float32:
            return None
        if verify and made_for.get("crc32") != _crc32(features):
            return None
        return features

    def save_features(self, name: str, features: torch.Tensor) -> None:
        """Records features of shape `(k, d)`, float32, under a name that stands for the prompts and what was computed."""
        features = features.contiguous()
        made_for = {"key": self.key, "name": name, "crc32": _crc32(features)}
        write_atomically(
            self._features_file(name), lambda temporary: save_file({"features": features}, temporary, made_for)
        )

    def remove_features(self, name: str) -> None:
        """Deletes what is recorded under `name`."""
        self._features_file(name).unlink(missing_ok=True)

    def _features_file(self, name):
        return self.path / f"features-{name}.safetensors"


def _crc32(features):
    return str(zlib.crc32(features.numpy()))


def _one(arrays):
    """Whether all are the same object."""
    return all(array is arrays[0] for array in arrays)


def _each(arrays, number):
    return arrays * number if len(arrays) == 1 else arrays


def _groups(table) -> list[Group]:
    columns = {name: table[name].combine_chunks() for name in table.column_names}

    def arrays(name, row):
        return [scalar.values.to_numpy() for scalar in columns[name][row].values]

    return [
        Group(
            index=columns["index"][row].as_py(),
            prompt_ids=_each(arrays("prompt_ids", row), len(columns["completion_ids"][row])),
            completion_ids=arrays("completion_ids", row),
            loss_masks=arrays("loss_masks", row),
            completions=[json.loads(text) for text in columns["completions"][row].as_py()],
            rewards=np.stack(arrays("rewards", row)),
            penalties=columns["penalties"][row].values.to_numpy(),
        )
        for row in range(table.num_rows)
    ]
