"""Groups without a gradient, replaced by newly drawn ones before training gets the batch: DAPO's dynamic sampling."""

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..curriculum.events import Draw
from .base import Schedule, Selects


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..host import Host
    from .tap import GroupTap

logger = logging.getLogger(__name__)


class Refills:
    """
    Replaces groups without a gradient (DAPO, arXiv 2503.14476): for as many prompts as there are such groups the
    trainer generates at once, again at most `max_refills` times a chunk. Groups with a gradient take the places of
    those without, in their order. All groups that were generated are observed by the schedule.

    Args:
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of its sampler.
    """

    def __init__(self, host: "Host", config: "LearnAlignConfig"):
        self.host, self.most = host, config.max_refills
        self._told = False

    def __call__(
        self, tap: "GroupTap", draws: list[Draw], batch: dict, generate: Callable[[list[Draw]], dict]
    ) -> dict:
        """
        Return the batch to train on. Called on all processes, which all generate equally often.

        Args:
            tap ([`GroupTap`]): knows which groups of the last generation are live, and is told of those that move.
            draws (`list[Draw]`): of the chunk.
            batch (`dict`): what was generated for them.
            generate (`Callable`): generates for other draws.
        """
        if not self.most or tap.live is None:
            return batch
        dead, rounds, number = np.flatnonzero(~tap.live).tolist(), 0, len(draws)
        kept = dict.fromkeys(range(number))
        parts = []
        while dead and rounds < self.most:
            more = tap.stream.draw(self._whole(len(dead)))
            fresh, rounds, number = generate(more), rounds + 1, number + len(more)
            found = [] if tap.live is None else np.flatnonzero(tap.live).tolist()
            places = dict(zip(found, dead, strict=False))  # the first of each
            dead = dead[len(places) :]
            for group, place in places.items():
                tap.moved(place, more[group])
                del kept[place]
            parts.append((fresh, places))
        self.host.log_metric("learnalign/refills", number - len(draws))
        self.host.log_metric("learnalign/rollouts", number * self.host.group_size)
        self.host.log_metric("learnalign/dead_groups", len(dead))
        self._warn(len(dead), len(draws))
        if len(kept) == len(draws):
            return batch
        return self.host.assemble([(batch, {place: place for place in kept}), *parts], len(draws))

    def _whole(self, groups: int) -> int:
        """Round a number of groups up to one whose rollouts all processes share equally."""
        processes = self.host.accelerator.num_processes
        step = processes // math.gcd(processes, self.host.group_size)
        return -(-groups // step) * step

    def _warn(self, dead, groups):
        if dead and not self._told and self.host.accelerator.is_main_process:
            logger.warning(
                f"After {self.most} more generation{'s' * (self.most > 1)} (`max_refills`), {dead} of {groups} groups "
                "of a chunk still have no gradient. Training goes on with them; `learnalign/dead_groups` in the log "
                "counts them. Raise `max_refills`, or leave out prompts that are always or never solved."
            )
        self._told |= dead > 0


def check_refills(host: "Host", schedule: "Schedule", config: "LearnAlignConfig") -> None:
    """
    Raise a `ValueError` where batches cannot be put together of several generations, or the schedule's prompts come in
    an order of their own.
    """
    if not config.max_refills:
        return
    setting = f"`max_refills` is {config.max_refills}"
    if not host.composes:
        raise ValueError(
            f"{setting}, but the batches of a {type(host.trainer).__name__} are not put together of several "
            "generations. Leave it out, or train with GRPOTrainer or RLOOTrainer."
        )
    if isinstance(schedule, Selects):
        raise ValueError(
            f"{setting}, but {type(schedule).__name__} trains on selected prompts pass by pass, and has no others "
            "for groups without a gradient. Leave it out, or set `schedule='online'`."
        )
