"""The gradients of a selection's prompts, aligned with the mean of all or with a target."""

import logging
import time

import numpy as np
import pandas as pd
import torch

from . import scoring
from .features import FeatureSource
from .groups import Group, Row
from .pool import Pool


logger = logging.getLogger(__name__)


class GradientAlignments:
    """
    Implements [`Alignments`] on all processes of a selection.

    Args:
        run ([`SelectionRun`]): the selection, inside [`Host.left_as_found`].
        own (`list[Group]`): this process's rollouts of the pool.
        pool ([`Pool`]): what all rollouts found out.
    """

    def __init__(self, run, own: list[Group], pool: Pool):
        self.run, self.own, self.pool = run, own, pool
        self.config, self.host, self.peers = run.config, run.host, run.peers

    def __call__(self, weights: pd.Series) -> pd.DataFrame:
        """See [`Alignments`]."""
        started = time.perf_counter()
        source = self._source(self.own, self.pool, self.run.journal)
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
        source = self._source(self.own, self.pool, self.run.journal)
        source.compute()
        self.run.clock("gradients", started)
        started = time.perf_counter()
        columns = self._gathered(scoring.largest_cosines(source, directions))
        self.run.clock("scores", started)
        self._count_cost(source)
        return self._by_prompt(columns, ("alignment", "gradient_norm"))

    def _directions(self) -> torch.Tensor:
        """g_s of each subtask s that has a learnable prompt, of shape `(S, d)`, float64."""
        run, target = self.run, self.run.target
        started = time.perf_counter()
        journal = run.open_journal(run.journal.path / "target")
        dataset = self.host.visible(target)
        own = run.roll_out(dataset, list(range(len(target))), journal, "target rollouts")
        found = run.gather_rewards(own)
        run.clock("target rollouts", started)
        started = time.perf_counter()
        source = self._source(own, found, journal)
        names = ["all"] * len(target) if self.config.target_column is None else target[self.config.target_column]
        learnable = found.indices[found.learnability > 0].tolist()
        directions, without = [], []
        for name in sorted(set(names), key=str):
            members = [index for index in learnable if names[index] == name]
            if not members:
                without.append(str(name))
                continue
            weights = torch.zeros(len(target), dtype=torch.float64)
            weights[members] = 1 / len(members)
            directions.append(self._sum(source, weights))
        run.clock("target gradients", started)
        run.provenance["target"] = {"num_rows": len(target), "learnable": len(learnable), "without": without}
        if not directions:
            raise RuntimeError(
                f"No prompt of `target_dataset` is learnable: all {len(target)} were always or never solved, so the target has no "
                "gradient. Warm up longer, use more `num_rollouts`, or other target prompts."
            )
        if without and run.accelerator.is_main_process:
            logger.warning(
                f"These subtasks of the target are left out: {', '.join(without)}. None of their prompts is learnable, so they have no "
                "gradient. Warm up longer, use more `num_rollouts`, or other target prompts."
            )
        return torch.stack(directions)

    def _source(self, own, pool, journal) -> FeatureSource:
        position = {index: i for i, index in enumerate(pool.indices.tolist())}
        tasks = {}
        for group in own:
            i = position.get(group.index)
            if i is not None and pool.learnability[i] > 0:
                tasks[group.index] = self._rows(group, pool.advantages[i], pool.deciding[i])
        dim, budget = self.config.projection_dim, self.config.max_tokens_per_batch
        return FeatureSource(self.host, dim, self.run.seed, tasks, journal, budget, self.peers)

    def _sum(self, source, weights):
        """The weighted sum over the prompts of all processes."""
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
                f"The gradient features of {missing} prompts could not be read back from '{self.run.journal.path}'. Check the "
                "disk and run again: the features that are still there are reused."
            )
        return columns

    def _by_prompt(self, columns, names):
        indices, *values = (column.numpy() for column in columns)
        return pd.DataFrame(dict(zip(names, values, strict=True)), index=indices).reindex(self.pool.table().index)

    def _count_cost(self, source):
        """The cost of gradients and scores relative to the rollouts, and an estimate of the least that it can be."""
        rolled_out = sum(len(ids) for group in self.own for ids in (*group.prompt_ids, *group.completion_ids))
        counts = np.sum(self.peers.gather((rolled_out, *source.num_tokens())), axis=0).tolist()
        cost = dict(zip(("rollout_tokens", "gradient_tokens", "computed_tokens"), counts, strict=True))
        # Forward and backward through a LoRA cost two forwards; the reference policy of the KL term one more
        passes = 3 if self.host.runs_reference else 2
        cost["floor"] = passes * cost["gradient_tokens"] / cost["rollout_tokens"]
        if not self.run.journal.resumed:  # else the rollouts' time is not known
            spent = self.run.seconds["gradients"] + self.run.seconds["scores"]
            cost["of_rollouts"] = spent / max(self.run.seconds["rollouts"], 1e-3)
        self.run.provenance["cost"] = cost

    def _rows(self, group, advantages, deciding) -> list[Row]:
        """The rollouts of a group that carry a gradient."""
        chosen = range(len(group.completion_ids))
        if self.config.gradient_rollouts == "one_correct":
            successes = (deciding >= self.config.success_threshold).nonzero().flatten().tolist()
            chosen = [successes[0] if successes else int(deciding.nan_to_num(-torch.inf).argmax())]
        rollouts = zip(group.prompt_ids, group.completion_ids, group.loss_masks, advantages.tolist(), strict=True)
        return [
            Row(prompt_ids, completion_ids, loss_mask, advantage, 1 / len(chosen))
            for g, (prompt_ids, completion_ids, loss_mask, advantage) in enumerate(rollouts)
            if g in chosen and any(loss_mask) and (advantage != 0 or self.host.counts_without_advantage)
        ]
