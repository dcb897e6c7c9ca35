"""The gradients of a selection's prompts, aligned with the mean of all or with a target."""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch

from ..curriculum.rewards import is_success
from ..data.reading import columns_read
from ..gradients.adam import Moments
from ..gradients.engine import check_parameters
from ..gradients.layers import UnseenParametersError, unseen_message
from ..gradients.sketch import Sketch
from ..ground.store import Log
from ..host import Host
from ..host.groups import Row
from ..scores import maths as scoring
from ..scores.influence import DAMPING, influences, second_moment_times, solve
from .base import Context, Finding, Measure
from .gradients import GradientFeatures
from .policies import check_policies, is_adam, made_at, policies
from .rollouts import RolledOut, RolloutMeasure


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from .target import Directions

logger = logging.getLogger(__name__)

_LARGE_RESIDUAL = 1e-3  # above which influences are said to be inexact
# Settings that decide which rollouts make a gradient, and the length of a feature
KEY_OF_GRADIENTS = ("gradient_rollouts", "projection_dim", "success_threshold", "success_reward", "learnability")


class GradientMeasure(Measure):
    """
    The gradients of the learnable prompts. The result implements [`Alignments`]: only a score knows what to align them
    with, so they are computed when it asks.
    """

    name = "gradients"
    requires = ("rollouts",)
    columns = ("alignment", "gradient_norm")
    price = "gradients"

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """
        Raise a `ValueError` for an unknown loss, images, and sharded weights without an adapter; and an
        [`UnseenParametersError`] for trainable tensors whose gradients would be missed.
        """
        host.check_gradients()
        check_policies(host, config, now=False)
        if {"image", "images"} & set(columns_read(host.dataset)):
            raise ValueError(
                "The training dataset has images, and gradients of multimodal prompts are not supported. Use "
                "`score='learnability'`, which takes no gradients."
            )
        if host.is_sharded and not host.has_adapter:
            raise ValueError(
                "Full fine-tuning with FSDP or DeepSpeed is not supported: the probe would see only shards of the "
                "weights. Train a LoRA adapter (`peft_config`), or use `score='learnability'`, which takes no "
                "gradients."
            )
        for adapter in getattr(host.model, "peft_config", {}).values():
            if getattr(adapter, "target_parameters", None):  # their A and B are multiplied without a layer's forward
                raise UnseenParametersError(unseen_message([f"target_parameters={adapter.target_parameters}"]))
        check_parameters(host.model, probe=not host.has_adapter)

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return what rollouts and features depend on."""
        config = context.config.to_dict()
        features = {f"`{name}`": config[name] for name in KEY_OF_GRADIENTS}
        made = made_at(context.host, context.config, is_adam(context.config))
        return {**RolloutMeasure().key(context, rows), **features, **made}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Return the [`Alignments`], with nothing computed yet."""
        return GradientAlignments(context, log)

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """Return alignments that differ from prompt to prompt."""
        return _MadeUpAlignments(table)


class _MadeUpAlignments(Finding):
    """A stand-in for gradients, see [`~trl_learnalign.scores.builtin.Alignments`]."""

    def __init__(self, table: pd.DataFrame):
        super().__init__(table[[]])
        self.learnability = table["learnability"]

    def __call__(self, weights: pd.Series) -> pd.DataFrame:
        aligned = self.target()
        return aligned.assign(score=(weights * aligned["alignment"]).fillna(0.0))

    def influence(self) -> pd.DataFrame:
        return self(self.learnability)

    def target(self) -> pd.DataFrame:
        places = np.arange(len(self.learnability))
        known = self.learnability.to_numpy() > 0
        columns = {"alignment": np.cos(places), "gradient_norm": 1 + places % 7}
        return pd.DataFrame(
            {name: np.where(known, values, np.nan) for name, values in columns.items()}, index=self.learnability.index
        )


class GradientAlignments(Finding):
    """
    An implementation of [`Alignments`] on all processes of a selection.

    Args:
        context ([`Context`]): with what the rollouts found out, and the directions of a target, if there is one.
        log ([`Log`]): keeps the features.
    """

    def __init__(self, context: Context, log: Log):
        self.context, self.log = context, log
        self.rolled_out = cast(RolledOut, context.found["rollouts"])
        super().__init__(self.rolled_out.pool.table()[[]])
        self.spent = 0.0  # seconds on gradients, by whatever asked for them before

    def features(self) -> GradientFeatures:
        """Compute the features, so that they can be read more than once. All processes must call this."""
        started = time.perf_counter() - self.spent
        source = features_of(self.context, self.rolled_out, self.log)
        source.compute()
        self.spent = self.context.clock("gradients", started)
        return source

    def __call__(self, weights: pd.Series) -> pd.DataFrame:
        """Align every learnable prompt with the weighted mean of all, see [`Alignments`]."""
        context, started = self.context, time.perf_counter() - self.spent
        source = features_of(context, self.rolled_out, self.log)
        by_row = torch.zeros(len(context.dataset), dtype=torch.float64)
        by_row[weights.index.tolist()] = torch.tensor(weights.to_numpy(dtype=float))
        total = sum_over_processes(context, source, by_row)
        spent = context.clock("gradients", started)
        started = time.perf_counter()
        columns = self._gathered(scoring.scores_of_batches(source, by_row, total / len(self.rolled_out.pool.rows)))
        self._count_cost(source, spent + context.clock("scores", started))
        table = self._by_prompt(columns, ("score", "alignment", "gradient_norm"))
        return table.assign(score=table["score"].fillna(0.0))

    def target(self) -> pd.DataFrame:
        """
        Align every learnable prompt with the target, see [`Alignments`]: max_s sum_c eta_c cos(phi_i, g_s) / sum_c
        eta_c over checkpoints c, with the gradients of each at its weights.
        """
        context, started, reading = self.context, time.perf_counter() - self.spent, 0.0
        directions = cast("Directions", context.found["target-gradients"]).directions
        found, cosines, norms = policies(context.host, context.config), torch.zeros(1), torch.zeros(1)
        for policy, of_policy in zip(found, directions, strict=True):
            moments = policy.moments() if is_adam(context.config) else None
            with policy.loaded():
                source = features_of(context, self.rolled_out, policy.log(self.log), moments)
                source.compute()
                begun = time.perf_counter()
                rows, *values = scoring.cosines_of_batches(source, of_policy)
                reading += time.perf_counter() - begun
            cosines, norms = (total + policy.share * own for total, own in zip((cosines, norms), values, strict=True))
        spent = context.clock("gradients", started + reading) + context.clock("scores", time.perf_counter() - reading)
        columns = self._gathered((rows, cosines.max(1).values, norms))
        self._count_cost(source, spent, len(found))
        return self._by_prompt(columns, ("alignment", "gradient_norm"))

    def influence(self) -> pd.DataFrame:
        """Find the influence of every learnable prompt, see [`Alignments`], by reading the features many times."""
        context, source, started = self.context, self.features(), time.perf_counter()
        rows, target = self.rolled_out.learnable, context.found.get("target-gradients")
        if target is None:
            by_row = torch.zeros(1, len(context.dataset), dtype=torch.float64)
            by_row[0, rows] = 1 / max(1, len(rows))
            means = sum_over_processes(context, source, by_row, unit=False)
        else:
            means = cast("Directions", target).means()
        squares = sum(scoring.feature_norms(features).square().sum().item() for _, features in source.stored())
        total = sum(context.peers.gather(squares)) / max(1, len(rows))
        damping = DAMPING * total / max(1, min(len(rows), means.shape[1]))

        def times(vectors):
            own = second_moment_times(source.stored(), vectors)
            return summed(context, own) / max(1, len(rows)) + damping * vectors

        solved, iterations, residual = solve(times, means, context.peers.broadcast)
        columns = self._gathered(influences(source, solved, means))
        about = {"damping": damping, "iterations": iterations, "residual": residual}
        context.note({"influence": about})
        if residual > _LARGE_RESIDUAL and context.host.accelerator.is_main_process:
            logger.warning(
                f"The influences are not exact: after {iterations} iterations of conjugate gradients the residual is "
                f"{residual:.1g} of the target. Use a smaller `projection_dim`, or `candidate_prompts`."
            )
        self._count_cost(source, self.spent + context.clock("scores", started))
        table = self._by_prompt(columns, ("score", "alignment", "gradient_norm"))
        return table.assign(score=table["score"].fillna(0.0))

    def sketches(self, dim: int) -> tuple[np.ndarray, torch.Tensor]:
        """
        Return the rows of all n learnable prompts, increasing, and their features as directions of length 1, sketched
        to at most `dim` numbers: of shape `(n, dim)`, float32. All processes must call this.
        """
        source = self.features()
        length = source.engine.feature_dim
        sketch = Sketch({"feature": length}, dim, self.context.seed) if length > dim else None
        rows, parts = [], [torch.zeros(0, min(length, dim))]
        for indices, features in source.stored():
            unit = torch.nn.functional.normalize(features, dim=1)
            if sketch is not None:
                part = torch.zeros(len(unit), dim)
                sketch.add_(part, "feature", slice(None), unit)
                unit = part
            rows += indices
            parts.append(unit)
        found, points = self._gathered((torch.tensor(rows, dtype=torch.int64), torch.cat(parts)))
        self._count_cost(source, self.spent)
        order = found.argsort()
        return found[order].numpy(), points[order]

    def _gathered(self, columns):
        """Return the columns of all processes. All prompts must be there."""
        columns = tuple(torch.cat(parts) for parts in zip(*self.context.peers.gather(columns), strict=True))
        missing = len(self.rolled_out.learnable) - len(columns[0])
        if missing:  # the same on every process, so all raise
            raise RuntimeError(
                f"The gradient features of {missing} prompts could not be read back from "
                f"'{self.log.path.parent}'. Check the disk and run again: the features that are still there are "
                "reused."
            )
        return columns

    def _by_prompt(self, columns, names):
        rows, *values = (column.numpy() for column in columns)
        index = self.rolled_out.pool.table().index
        return pd.DataFrame(dict(zip(names, values, strict=True)), index=rows).reindex(index)

    def _count_cost(self, source, spent, times=1):
        """Note the cost of gradients and scores relative to the rollouts, and an estimate of the least possible."""
        host, own = self.context.host, self.rolled_out.own
        rolled_out = int(own.lengths.sum(dtype=np.int64) + own.prompt_lengths.sum(dtype=np.int64))
        counts = np.sum(self.context.peers.gather((rolled_out, *source.num_tokens())), axis=0).tolist()
        counts = counts[0], times * counts[1], times * counts[2]
        cost = dict(zip(("rollout_tokens", "gradient_tokens", "computed_tokens"), counts, strict=True))
        # Forward and backward through a LoRA cost two forwards; the reference policy of the KL term one more
        forwards = 3 if host.runs_reference else 2
        cost["floor"] = forwards * cost["gradient_tokens"] / cost["rollout_tokens"]
        if not own.found:  # else the rollouts' time is not known
            cost["of_rollouts"] = spent / max(self.rolled_out.seconds, 1e-3)
        self.context.note({"cost": cost})


def features_of(
    context: Context, rolled_out: RolledOut, log: Log, moments: Mapping[str, Moments] | None = None
) -> GradientFeatures:
    """
    Return the gradient features of this process's learnable prompts, which are computed when they are used; with
    Adam's state, those of its steps.
    """
    host, config, own, pool = context.host, context.config, rolled_out.own, rolled_out.pool
    learnable = {row: i for i, row in enumerate(pool.rows.tolist()) if row in own and pool.learnability[i] > 0}
    chosen = {row: _chosen(context, own, row, pool.advantages[i], pool.deciding[i]) for row, i in learnable.items()}
    lengths = {}
    for row in own.rows.tolist():  # in the order of the batches
        if row in learnable:
            place = own.place(row)
            lengths[row] = (own.prompt_lengths[place] + own.lengths[place])[chosen[row]]

    def rollouts(row):
        group, advantages = own.group(row), pool.advantages[learnable[row]].tolist()
        # The mean is over all rollouts that the configuration chooses and a race made, also those without a gradient
        every = config.gradient_rollouts == "all"
        weight = 1 / (own.made[own.place(row)] if every else 1)
        if moments is not None:  # a step is not in proportion to the gradient
            trained = own.trained[own.place(row)]
            weight *= host.scale_alone(float((trained if every else trained[chosen[row]]).mean()))
        return [
            Row(group.prompt_ids[g], group.completion_ids[g], group.loss_masks[g], advantages[g], weight)
            for g in chosen[row].tolist()
        ]

    dim, budget = config.projection_dim, config.max_tokens_per_batch
    return GradientFeatures(host, dim, context.seed, lengths, rollouts, log, budget, context.peers, moments)


def _chosen(context, own, row, advantages, deciding):
    """Return which rollouts of a group carry a gradient."""
    chosen = np.arange(len(advantages), dtype=np.uint8 if len(advantages) < 256 else np.int32)
    if context.config.gradient_rollouts == "one_correct":
        successes = is_success(deciding, context.config.success_threshold).nonzero().flatten().tolist()
        first = successes[0] if successes else int(deciding.nan_to_num(-torch.inf).argmax())
        chosen = chosen[first : first + 1]
    counts = own.trained[own.place(row)] > 0
    if not context.host.counts_without_advantage:
        counts &= advantages.numpy() != 0
    return chosen[counts[chosen]]


def sum_over_processes(
    context: Context, source: GradientFeatures, weights: torch.Tensor, unit: bool = True
) -> torch.Tensor:
    """Return what [`GradientFeatures.weighted_sum`] does, over the prompts of all processes."""
    return summed(context, source.weighted_sum(weights, unit))


def summed(context: Context, total: torch.Tensor) -> torch.Tensor:
    """Return the sum of the tensors of all processes."""
    context.peers.wait()
    accelerator = context.host.accelerator
    if accelerator.num_processes > 1:  # float64, which not every single device has
        total = accelerator.reduce(total.to(accelerator.device), "sum").cpu()
    return total
