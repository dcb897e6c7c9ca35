"""The gradients of a selection's prompts, aligned with the mean of all or with a target."""

import logging
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ..choice.table import Pool
from ..data.columns import dataset_columns
from ..ground.store import Log
from ..host.groups import Row
from ..scores import maths as scoring
from .gradients import GradientFeatures
from .rollouts import Rollouts, roll_out


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """
    The rollouts of a target.

    Attributes:
        own ([`Rollouts`]): this process's.
        found ([`Pool`]): what all rollouts found out.
        learnable (`list[int]`): rows of the target with V > 0.
    """

    own: Rollouts
    found: Pool
    learnable: list[int]


def roll_out_target(run) -> Target:
    """
    Rolls out the prompts of a selection's target. All processes must call this.

    Args:
        run ([`SelectionRun`]): the selection, inside [`Host.left_as_found`].
    """
    dataset, rows = run.host.visible(run.target), list(range(len(run.target)))
    own = roll_out(run, dataset, rows, run.open_log("target-rollouts"), "target rollouts")
    found = run.gather_rewards(own)
    return Target(own, found, found.indices[found.learnability > 0].tolist())


class GradientAlignments:
    """
    Implements [`Alignments`] on all processes of a selection.

    Args:
        run ([`SelectionRun`]): the selection, inside [`Host.left_as_found`].
        own ([`Rollouts`]): this process's, of the pool.
        pool ([`Pool`]): what all rollouts found out.
        target ([`Target`], *optional*): with a learnable prompt, where the score needs one.
    """

    def __init__(self, run, own: Rollouts, pool: Pool, target: Target | None = None):
        self.run, self.own, self.pool, self._target = run, own, pool, target
        self.config, self.host, self.peers = run.config, run.host, run.peers

    def __call__(self, weights: pd.Series) -> pd.DataFrame:
        """See [`Alignments`]."""
        started = time.perf_counter()
        source = self._source(self.own, self.pool, self.run.open_log("gradients"))
        by_row = torch.zeros(len(self.run.dataset), dtype=torch.float64)
        by_row[weights.index.tolist()] = torch.tensor(weights.to_numpy(dtype=float))
        total = self._sum(source, by_row)
        self.run.clock("gradients", started)
        started = time.perf_counter()
        columns = self._gathered(scoring.scores_of_batches(source, by_row, total / len(self.pool.indices)))
        self.run.clock("scores", started)
        self._count_cost(source)
        table = self._by_prompt(columns, ("score", "alignment", "gradient_norm"))
        return table.assign(score=table["score"].fillna(0.0))

    def target(self) -> pd.DataFrame:
        """See [`Alignments`]."""
        directions = self._directions()
        started = time.perf_counter()
        source = self._source(self.own, self.pool, self.run.open_log("gradients"))
        source.compute()
        self.run.clock("gradients", started)
        started = time.perf_counter()
        columns = self._gathered(scoring.largest_cosines(source, directions))
        self.run.clock("scores", started)
        self._count_cost(source)
        return self._by_prompt(columns, ("alignment", "gradient_norm"))

    def _directions(self) -> torch.Tensor:
        """g_s of each subtask s that has a learnable prompt, of shape `(S, d)`, float64."""
        run, rows, target = self.run, self.run.target, self._target
        started = time.perf_counter()
        source = self._source(target.own, target.found, run.open_log("target-gradients"))
        names = ["all"] * len(rows)
        if self.config.target_column is not None:
            column = dataset_columns(rows, range(len(rows)), [self.config.target_column])[self.config.target_column]
            names = [None if missing else name for name, missing in zip(column, column.isna(), strict=True)]
        weights, without = [], []
        for name in sorted(set(names), key=str):
            members = [index for index in target.learnable if names[index] == name]
            if not members:
                without.append(str(name))
                continue
            weights.append(torch.zeros(len(rows), dtype=torch.float64))
            weights[-1][members] = 1 / len(members)
        directions = self._sum(source, torch.stack(weights))
        run.clock("target gradients", started)
        run.provenance["target"]["without"] = without
        if without and run.accelerator.is_main_process:
            logger.warning(
                f"These subtasks of the target are left out: {', '.join(without)}. None of their prompts is "
                "learnable, so they have no gradient. In a new run warm up longer, use more `num_rollouts`, or other "
                "target prompts. A run that is resumed with `reselect_every` tries them again."
            )
        return directions

    def _source(self, own: Rollouts, pool: Pool, log: Log) -> GradientFeatures:
        learnable = {
            index: i for i, index in enumerate(pool.indices.tolist()) if index in own and pool.learnability[i] > 0
        }
        chosen = {
            index: self._chosen(own, index, pool.advantages[i], pool.deciding[i]) for index, i in learnable.items()
        }
        lengths = {}
        for index in own.rows.tolist():  # in the order of the batches
            if index in learnable:
                place = own.place(index)
                lengths[index] = (own.prompt_lengths[place] + own.lengths[place])[chosen[index]]

        def rows(index):
            group, advantages = own.group(index), pool.advantages[learnable[index]].tolist()
            # The mean is over all rollouts that the configuration chooses, also over those that have no gradient
            weight = 1 / (len(advantages) if self.config.gradient_rollouts == "all" else 1)
            return [
                Row(group.prompt_ids[g], group.completion_ids[g], group.loss_masks[g], advantages[g], weight)
                for g in chosen[index].tolist()
            ]

        dim, budget = self.config.projection_dim, self.config.max_tokens_per_batch
        return GradientFeatures(self.host, dim, self.run.seed, lengths, rows, log, budget, self.peers)

    def _chosen(self, own, index, advantages, deciding):
        """Which rollouts of a group carry a gradient."""
        chosen = np.arange(len(advantages), dtype=np.uint8 if len(advantages) < 256 else np.int32)
        if self.config.gradient_rollouts == "one_correct":
            successes = scoring.is_success(deciding, self.config.success_threshold).nonzero().flatten().tolist()
            first = successes[0] if successes else int(deciding.nan_to_num(-torch.inf).argmax())
            chosen = chosen[first : first + 1]
        counts = own.trained[own.place(index)] > 0
        if not self.host.counts_without_advantage:
            counts &= advantages.numpy() != 0
        return chosen[counts[chosen]]

    def _sum(self, source, weights):
        """See [`GradientFeatures.weighted_sum`], over the prompts of all processes."""
        total = source.weighted_sum(weights)
        self.peers.wait()
        accelerator = self.run.accelerator
        if accelerator.num_processes > 1:  # float64, which not every single device has
            total = accelerator.reduce(total.to(accelerator.device), "sum").cpu()
        return total

    def _gathered(self, columns):
        """The columns of all processes. All prompts must be there."""
        columns = tuple(torch.cat(parts) for parts in zip(*self.peers.gather(columns), strict=True))
        missing = int((self.pool.learnability > 0).sum()) - len(columns[0])
        if missing:  # the same on every process, so all raise
            raise RuntimeError(
                f"The gradient features of {missing} prompts could not be read back from "
                f"'{self.run.path_of_measures}'. Check the disk and run again: the features that are still there are "
                "reused."
            )
        return columns

    def _by_prompt(self, columns, names):
        indices, *values = (column.numpy() for column in columns)
        return pd.DataFrame(dict(zip(names, values, strict=True)), index=indices).reindex(self.pool.table().index)

    def _count_cost(self, source):
        """The cost of gradients and scores relative to the rollouts, and an estimate of the least that it can be."""
        rolled_out = int(self.own.lengths.sum(dtype=np.int64) + self.own.prompt_lengths.sum(dtype=np.int64))
        counts = np.sum(self.peers.gather((rolled_out, *source.num_tokens())), axis=0).tolist()
        cost = dict(zip(("rollout_tokens", "gradient_tokens", "computed_tokens"), counts, strict=True))
        # Forward and backward through a LoRA cost two forwards; the reference policy of the KL term one more
        forwards = 3 if self.host.runs_reference else 2
        cost["floor"] = forwards * cost["gradient_tokens"] / cost["rollout_tokens"]
        if not self.own.found:  # else the rollouts' time is not known
            spent = self.run.seconds["gradients"] + self.run.seconds["scores"]
            cost["of_rollouts"] = spent / max(self.run.seconds["rollouts"], 1e-3)
        self.run.provenance["cost"] = cost
