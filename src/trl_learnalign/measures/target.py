"""The prompts of a target: their rollouts, and the mean gradient of each subtask."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import pandas as pd
import torch
from datasets import Dataset

from ..data.columns import dataset_columns
from ..data.rows import dataset_fingerprint
from .alignments import KEY_OF_GRADIENTS, features_of, sum_over_processes
from .base import Context, Finding, Measure
from .policies import made_at, policies
from .rollouts import RolledOut, gather_rewards, made_from, prompts_at_once, roll_out


logger = logging.getLogger(__name__)


class Directions(Finding):
    """
    The gradients to align with.

    Attributes:
        directions (`torch.Tensor` of shape `(C, S, d)`): g_s of each subtask s that has a learnable prompt, float64,
            at each of the [`policies`].
        means (`Callable`): returns the same of the trainer's policy, of shape `(S, d)`, with the features as they are,
            the mean of phi_j. All processes call it.
    """

    def __init__(self, directions: torch.Tensor, means: Callable[[], torch.Tensor]):
        super().__init__(None)
        self.directions, self.means = directions, means


class TargetMeasure(Measure):
    """A measure of the target alone."""

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """Return nothing about the prompts of the pool."""
        return Finding(None)


class TargetRollouts(TargetMeasure):
    """Rollouts of `target_dataset`, made as those of the pool. Without a learnable one V alone ranks."""

    name = "target-rollouts"
    price = "rollouts"

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return what generation and rewards depend on, and the rows of the target."""
        transform = context.host.prompt_identity(context.target)["transform"]
        target = [dataset_fingerprint(context.target), transform]
        return {**made_from(context, len(rows)), "rows of the target": target}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Roll out every prompt of the target."""
        target, started = cast(Dataset, context.target), time.perf_counter()
        size = len(target)
        at_once = prompts_at_once(context.host, context.config, context.num_rollouts, len(rows))
        dataset = context.host.visible(target)
        own = roll_out(context, dataset, range(size), log, at_once, "target rollouts")
        pool = gather_rewards(context, own)
        found = RolledOut(own, pool)
        found.table = None
        context.clock("target rollouts", started)
        about = {"num_rows": size, "learnable": len(found.learnable), "without": []}
        if not found.learnable:
            found.instead = about["instead"] = "learnability"
            found.reason = "no prompt of `target_dataset` is learnable"
            if context.host.accelerator.is_main_process:
                logger.warning(
                    f"No prompt of `target_dataset` is learnable: all {size} were always or never solved, or could "
                    "not be scored, so the target has no gradient, and this selection is made by `learnability` "
                    "instead. For the next one resume with `reselect_every`, and with more `num_rollouts` or other "
                    "target prompts; or warm up longer in a new run."
                )
        context.note({"target": about})
        return found


class TargetGradients(TargetMeasure):
    """
    g_s of each subtask s: the mean of phi_j / |phi_j| over its learnable prompts j (LESS, arXiv 2402.04333, section
    4.2), at each of the [`policies`]. The rollouts and their advantages are those of the trainer's policy throughout,
    data that are fixed, in place of the examples of LESS: at a checkpoint the gradient of a rollout is that of its
    log-likelihood times its advantage, without a correction for another policy having drawn it.
    """

    name = "target-gradients"
    requires = ("target-rollouts",)
    price = "gradients"

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return what rollouts and features depend on."""
        config = context.config.to_dict()
        rolled_out = TargetRollouts().key(context, rows)
        made = made_at(context.host, context.config, adam=False)
        return {**rolled_out, **{f"`{name}`": config[name] for name in KEY_OF_GRADIENTS}, **made}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Sum up the gradients of each subtask."""
        target, started = cast(Dataset, context.target), time.perf_counter()
        found = cast(RolledOut, context.found["target-rollouts"])
        names: list[str | None] = ["all"] * len(target)
        if (name := context.config.target_column) is not None:
            column = dataset_columns(target, range(len(target)), [name])[name]
            names = [None if missing else value for value, missing in zip(column, column.isna(), strict=True)]
        weights, without = [], []
        for name in sorted(set(names), key=str):
            members = [row for row in found.learnable if names[row] == name]
            if not members:
                without.append(str(name))
                continue
            weights.append(torch.zeros(len(target), dtype=torch.float64))
            weights[-1][members] = 1 / len(members)
        stacked = torch.stack(weights)
        directions: list[torch.Tensor] = []
        about: dict[str, Any] = {"num_rows": len(target), "learnable": len(found.learnable), "without": without}
        for policy in policies(context.host, context.config):
            with policy.loaded():
                source = features_of(context, found, policy.log(log))
                directions.append(sum_over_processes(context, source, stacked))
            if policy.checkpoint is not None:
                about.setdefault("checkpoints", {})[str(policy.checkpoint)] = policy.share
        context.clock("target gradients", started)
        context.note({"target": about})
        if without and context.host.accelerator.is_main_process:
            logger.warning(
                f"These subtasks of the target are left out: {', '.join(without)}. None of their prompts is "
                "learnable, so they have no gradient. In a new run warm up longer, use more `num_rollouts`, or other "
                "target prompts. A run that is resumed with `reselect_every` tries them again."
            )
        return Directions(torch.stack(directions), lambda: sum_over_processes(context, source, stacked, unit=False))
