"""The number of prompts that a prompt is like, by its hidden states or by its gradient."""

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch

from ..choice.candidates import left_of
from ..data.columns import candidate_rows
from ..ground.progress import progress_bar
from ..host import Host
from ..scores.density import densities, width
from .alignments import GradientAlignments
from .base import Context, Finding, Measure


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


logger = logging.getLogger(__name__)

_AT_ONCE = 1024  # prompts between two signs of progress
_SKETCH = 512  # numbers of a gradient's direction: squared distances are within a few per cent


class Density(Measure):
    """The density of each prompt among the hidden states of all, see [`~trl_learnalign.scores.density.densities`]."""

    name = "density"
    requires: tuple[str, ...] = ("hidden_states",)
    columns: tuple[str, ...] = ("density",)
    price = "none"  # beyond what it requires

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """Raise a `ValueError` for a pool of one prompt, which is like no other."""
        pool = left_of(config, len(candidate_rows(host.dataset, config)))
        if pool < 2:
            raise ValueError(
                f"A density needs at least two prompts, but the pool has {pool}. Leave `diversity` out, and use "
                "another score than a density; or correct `where` or `candidate_prompts`."
            )

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Compare every prompt with every other one; each process takes a part of them."""
        table = cast(pd.DataFrame, context.found["hidden_states"].table)
        return self.finding(context, table.index, torch.tensor(table.to_numpy(np.float32)), table.index)

    def finding(self, context: Context, rows: Any, points: torch.Tensor, index: pd.Index) -> Finding:
        """
        Return the densities of points `(n, d)` of n rows, as a table of all rows of `index`, NaN for those without.
        """
        started, accelerator = time.perf_counter(), context.host.accelerator
        world, h, parts = accelerator.num_processes, width(points), [np.empty(0)]
        points = points.to(accelerator.device)
        with progress_bar(context.host, "densities", len(points), "prompts") as bar:
            for part in torch.arange(accelerator.process_index, len(points), world).split(_AT_ONCE):
                parts.append(densities(points, h, part).numpy())
                context.peers.check()
                bar.update(world * len(part))
        found = np.empty(len(points))
        for rank, own in enumerate(context.peers.gather(np.concatenate(parts))):
            found[rank::world] = own
        if len(found) > 1 and found.min() > len(found) * (1 - 1e-6) and accelerator.is_main_process:
            logger.warning(
                f"All {len(found)} prompts have the same {self.requires[0].replace('_', ' ')}, so their density says "
                "nothing. Leave `diversity` out, or use another score."
            )
        context.clock(self.name.replace("_", " "), started)
        return Finding(pd.DataFrame({self.columns[0]: pd.Series(found, index=rows).reindex(index)}, index=index))

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """Return densities from 1 to 3."""
        return Finding(pd.DataFrame({self.columns[0]: 1.0 + np.arange(len(table)) % 3}, index=table.index))


class GradientDensity(Density):
    """The density of each learnable prompt among the directions of the gradients of all of them."""

    name = "gradient_density"
    requires = ("gradients",)
    columns = ("gradient_density",)

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Compare every learnable prompt with every other one; each process takes a part of them."""
        alignments = cast(GradientAlignments, context.found["gradients"])
        found, points = alignments.sketches(_SKETCH)
        return self.finding(context, found, points, cast(pd.DataFrame, alignments.table).index)
