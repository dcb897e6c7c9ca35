"""The rollouts of training, kept on disk: a file of each generation and process, as those of a selection."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch

from ..curriculum.events import Draw
from ..ground.disk import make_directory, rollouts_of, write_parquet
from ..measures.shards import ROLLOUTS_SCHEMA


if TYPE_CHECKING:
    from ..host import Host

# Beside what those of a selection have: the number of the draw, the same for a group, and the optimizer steps before
_SCHEMA = pa.schema([*ROLLOUTS_SCHEMA, ("draw", pa.int64()), ("step", pa.int64())])


class KeptRollouts:
    """
    Files `_learnalign/rollouts/training/rollouts-{batch}.parquet`, named by the training batches before, so that a
    step that a resumed run does again writes the same file again. Nothing but the generation under way is in memory.

    Args:
        host ([`Host`]): the trainer.
    """

    def __init__(self, host: "Host"):
        self.host = host
        self._latest = -1, 0  # the batch of the latest generation, and how many there were for it before
        self.directory = rollouts_of(Path(host.args.output_dir) / "learnalign" / "training")

    def begin(self, batches: int) -> None:
        """
        Delete the rollouts of batches that are still to come, in a run that has trained on `batches`: those of a run
        that was killed, or of another one. Called on all processes; all wait before the first writes.
        """
        if self.host.accelerator.is_local_main_process:
            for file in self.directory.glob("rollouts-*.parquet"):
                if int(file.stem.split("-")[1]) >= batches:
                    file.unlink(missing_ok=True)

    def keep(
        self, size: int, draws: list[Draw], batch: int, completions: list, completion_ids: list, rewards: np.ndarray
    ) -> None:
        """
        Write this process's rollouts of a generation.

        Args:
            size (`int`): rollouts of a group.
            draws (`list[Draw]`): that were generated for.
            batch (`int`): training batches before it. Of several generations for one the later are refills.
            completions, completion_ids (`list`): n of this process, the first as the reward functions got them.
            rewards (`np.ndarray` of shape `(rows of all processes, F)`): NaN where a reward function gave none.

        Raises:
            `OSError`: the disk is full, or the directory cannot be written to.
        """
        accelerator, n = self.host.accelerator, len(completions)
        grouped = torch.from_numpy(rewards.reshape(len(draws), size, -1))
        advantages = self.host.advantages(grouped, torch.zeros(grouped.shape[:2])).flatten().tolist()
        rank, world = accelerator.process_index, accelerator.num_processes
        own = range(rank * n, (rank + 1) * n)
        self._latest = batch, self._latest[1] + 1 if self._latest[0] == batch else 0
        columns = {
            "index": [draws[place // size].row for place in own],
            "completion_ids": [np.asarray(ids, np.int32) for ids in completion_ids],
            "completion": [one if isinstance(one, str) else json.dumps(one, default=_named) for one in completions],
            "rewards": list(rewards[own.start : own.stop].astype(np.float32)),
            "advantage": advantages[own.start : own.stop],
            "draw": [draws[place // size].number for place in own],
            "step": [self.host.trainer.state.global_step] * n,
        }
        part = f"-refill-{self._latest[1]}" * (self._latest[1] > 0)
        part += "" if world == 1 else f"-{rank:05d}-of-{world:05d}"
        make_directory(self.directory)
        write_parquet(self.directory / f"rollouts-{batch:08d}{part}.parquet", pa.table(columns, schema=_SCHEMA))


def _named(value) -> str:
    """Stand for an image in a message, as in the rollouts of a selection."""
    return f"[{type(value).__name__}]"
