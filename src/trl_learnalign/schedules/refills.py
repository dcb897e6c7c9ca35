"""Batches of training of several sources: dead groups are refilled (DAPO), a share is replayed (DOTS)."""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from ..curriculum.events import Draw
from .base import Schedule, Selects
from .replay import Kept


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..host import Host
    from .tap import GroupTap

logger = logging.getLogger(__name__)
Generate = Callable[..., dict]


class Refills:
    """
    Makes the batch that a chunk is trained on:

    - Groups without a gradient are replaced (DAPO, arXiv 2503.14476): for as many prompts as there are such groups the
      trainer generates at once, again at most `max_refills` times a chunk. Groups with a gradient take the places of
      those without, in their order.
    - The last `replay_share` of a chunk is not generated; groups of the [`ReplayBuffer`] take its place. As long as
      the buffer has too few, prompts are drawn for the others.

    All groups that are generated are observed by the schedule, each once; replayed ones are not.

    Args:
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of its sampler.
    """

    def __init__(self, host: "Host", config: "LearnAlignConfig"):
        self.host, self.most = host, config.max_refills
        self._told = False

    def __call__(self, tap: "GroupTap", chunk: int, generate: Generate, inputs: list[dict]) -> dict:
        """
        Return the batch to train on. Called on all processes, which all generate equally often.

        Args:
            tap ([`GroupTap`]): knows which groups of the last generation are live, and is told of those that move.
            chunk (`int`): the chunk.
            generate (`Callable`): generates for draws; reads their rows itself where it is given none.
            inputs (`list[dict]`): rows of this process, as the dataloader has read them.
        """
        stream, host = tap.stream, self.host
        draws, size = stream.draws(chunk), stream.layout.chunk_prompts
        if stream.replay is None and not self.most:
            return generate(draws, inputs)
        own: list[dict] | None = inputs
        again = [] if stream.replay is None else stream.replay.draw(size - stream.fresh, chunk)
        again = again[: len(again) // self._step * self._step]
        if stream.replay is not None:
            missing = size - len(again) - len(draws)
            draws, own = draws + (stream.draw(missing) if missing else []), None
        with nullcontext() if stream.replay is None else host.with_logps():
            parts = [(generate(draws, own), dict(enumerate(range(len(draws)))))]
            live = [(parts[0][0], draws, tap.live)]
            dead = [] if tap.live is None else np.flatnonzero(~tap.live).tolist()
            for _ in range(self.most):
                if not dead:
                    break
                more = stream.draw(-(-len(dead) // self._step) * self._step)
                batch = generate(more)
                live.append((batch, more, tap.live))
                found = [] if tap.live is None else np.flatnonzero(tap.live).tolist()
                places = dict(zip(found, dead, strict=False))  # the first of each
                dead = dead[len(places) :]
                for group, place in places.items():
                    tap.moved(place, more[group])
                    del parts[0][1][place]
                parts.append((batch, places))
        self._log(sum(len(part) for _, part, _ in live), len(draws), len(dead), again, chunk)
        others = {len(draws) + place: group.rows for place, group in enumerate(again)}
        plain = len(parts[0][1]) == size
        batch = parts[0][0] if plain else host.assemble(parts, size, others)
        if stream.replay is not None:
            stream.replay.add([group for part in live for group in self._kept(*part, chunk)])
        return batch

    @property
    def _step(self) -> int:
        """The least number of groups whose rollouts all processes share equally."""
        processes = self.host.accelerator.num_processes
        return processes // math.gcd(processes, self.host.group_size)

    def _kept(self, batch: dict, draws: list[Draw], live: np.ndarray | None, chunk: int) -> list[Kept]:
        """Return the live groups of a generation. Called on all processes."""
        rows, size = self.host.gathered(batch), self.host.group_size
        places = [] if live is None else np.flatnonzero(live).tolist()
        return [Kept(draws[one].number, chunk, rows[one * size : (one + 1) * size]) for one in places]

    def _log(self, generated: int, first: int, dead: int, again: list[Kept], chunk: int) -> None:
        values: dict[str, float] = {"rollouts": generated * self.host.group_size, "dead_groups": dead}
        if self.most:
            values["refills"] = generated - first
        if again:
            values |= {"replayed": len(again), "replay_age": float(np.mean([chunk - one.chunk for one in again]))}
        for name, value in values.items():
            self.host.log_metric(f"learnalign/{name}", value)
        if dead and self.most and not self._told and self.host.accelerator.is_main_process:
            logger.warning(
                f"After {self.most} more generation{'s' * (self.most > 1)} (`max_refills`), {dead} of {first} groups "
                "of a chunk still have no gradient. Training goes on with them; `learnalign/dead_groups` in the log "
                "counts them. Raise `max_refills`, or leave out prompts that are always or never solved."
            )
        self._told |= dead > 0


def replayed_groups(groups: int, share: float) -> int:
    """
    Return how many groups of a chunk are replayed.

    Raises:
        `ValueError`: none, or all.
    """
    found = round(groups * share)
    if share and not 0 < found < groups:
        raise ValueError(
            f"`replay_share` is {share}, which is {found} of the {groups} prompts that the trainer generates for at "
            "once. Set it so that some are replayed and some are not, or generate for more prompts at once."
        )
    return found


def check_refills(host: "Host", schedule: Schedule, config: "LearnAlignConfig") -> None:
    """
    Raise a `ValueError` where batches cannot be put together of several sources, or the schedule's prompts come in an
    order of their own.
    """
    if not (config.max_refills or config.replay_share):
        return
    name = "max_refills" if config.max_refills else "replay_share"
    setting = f"`{name}` is {getattr(config, name)}"
    if not host.composes:
        raise ValueError(
            f"{setting}, but the batches of a {type(host.trainer).__name__} are not put together of several "
            "generations. Leave it out, or train with GRPOTrainer or RLOOTrainer."
        )
    if isinstance(schedule, Selects):
        raise ValueError(
            f"{setting}, but {type(schedule).__name__} trains on selected prompts pass by pass, and neither draws "
            "others nor leaves some out. Leave it out, or set `schedule='online'`."
        )
