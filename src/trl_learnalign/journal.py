"""Finished batches of a selection under way, so that a killed one goes on where it stopped."""

import json
import logging
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .rollouts import Group
from .selection import write_atomically, write_json, write_parquet


logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_GROUPS_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.list_(pa.int32()))),
        ("loss_masks", pa.list_(pa.list_(pa.int8()))),
        ("completions", pa.list_(pa.string())),
        ("rewards", pa.list_(pa.list_(pa.float32()))),
    ]
)


class Journal:
    """
    A directory of finished batches of rollouts and of gradient features.

    Args:
        path (`Path`): the directory; made if it does not exist.
        key (`str`): stands for all that the batches depend on. A journal with another key is discarded with a warning.
        is_main (`bool`): whether this process may delete and create the directory; the others wait for it outside.
    """

    def __init__(self, path: Path, key: str, is_main: bool):
        self.path = path
        self.key = key
        self.resumed = False  # whether finished rollouts were found
        if is_main:
            if path.exists() and self._saved_key() != key:
                logger.warning(
                    f"'{path}' was made from other weights, data, rewards or settings, so it is discarded and the "
                    "selection starts anew."
                )
                shutil.rmtree(path)
            if not path.exists():
                path.mkdir(parents=True)
                write_json(path / _MANIFEST, {"key": key})

    def _saved_key(self):
        try:
            return json.loads((self.path / _MANIFEST).read_text(encoding="utf-8"))["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def load_groups(self, batch: int) -> list[Group] | None:
        """The groups of a batch of rollouts, or `None` if it was not finished."""
        try:
            table = pq.read_table(self._groups_file(batch))
            if not table.schema.equals(_GROUPS_SCHEMA):
                return None
        except (OSError, pa.ArrowException):
            return None
        self.resumed = True
        columns = {name: table[name].combine_chunks() for name in table.column_names}

        def arrays(name, row):
            return [scalar.values.to_numpy() for scalar in columns[name][row].values]

        return [
            Group(
                index=columns["index"][row].as_py(),
                prompt_ids=columns["prompt_ids"][row].values.to_numpy(),
                completion_ids=arrays("completion_ids", row),
                loss_masks=arrays("loss_masks", row),
                completions=[json.loads(text) for text in columns["completions"][row].as_py()],
                rewards=np.stack(arrays("rewards", row)),
            )
            for row in range(table.num_rows)
        ]

    def save_groups(self, batch: int, groups: list[Group]) -> None:
        """Records a finished batch of rollouts."""
        rows = [
            {
                **vars(group),
                "completions": [json.dumps(completion) for completion in group.completions],
                "rewards": list(group.rewards),
            }
            for group in groups
        ]
        write_parquet(self._groups_file(batch), pa.Table.from_pylist(rows, schema=_GROUPS_SCHEMA))

    def _groups_file(self, batch):
        return self.path / f"rollouts-{batch:06d}.parquet"

    def features(self, wanted: Collection[int]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Recorded features of the `wanted` dataset indices: for every file the indices and a `(k, d)` tensor."""
        for file in sorted(self.path.glob("features-*.safetensors")):
            try:
                tensors = load_file(file)
            except (OSError, SafetensorError):
                continue
            indices = tensors["indices"].tolist()
            rows = [row for row, index in enumerate(indices) if index in wanted]
            if len(rows) == len(indices):
                yield indices, tensors["features"]
            elif rows:
                yield [indices[row] for row in rows], tensors["features"][rows]

    def save_features(self, indices: list[int], features: torch.Tensor) -> None:
        """Records finished features, of shape `(k, d)`."""
        tensors = {"indices": torch.tensor(indices), "features": features}
        file = self.path / f"features-{indices[0]:09d}.safetensors"
        write_atomically(file, lambda temporary: save_file(tensors, temporary))

    def remove(self) -> None:
        """Deletes the journal of a selection that is finished."""
        shutil.rmtree(self.path, ignore_errors=True)
