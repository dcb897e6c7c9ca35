"""The gradients of the chunk that is trained on, summed over the processes, for a schedule and for a checkpoint."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast, gather_object, reduce

from ..curriculum.events import Draw, Gradient
from .base import LearnsFromGradients
from .stream import Stream


if TYPE_CHECKING:
    from ..ground.peers import Peers
    from ..host import Host


class ChunkGradients:
    """
    Gives a schedule the gradients that training takes of the groups of a chunk, before it is given the rewards of the
    next chunk.

        generation of chunk k    rewards of k    training on k    generation of k+1    gradients of k    rewards of k+1
                                                        ^ a checkpoint holds the sums so far

    A group is given when all its rows have come. Where a chunk is generated again, after a resume inside of it, groups
    that had come whole are given, and all come once more.

    Args:
        host ([`Host`]): the trainer.
        stream ([`Stream`]): of the run that begins, with the sums of the checkpoint that it was resumed from, if any.
        schedule ([`LearnsFromGradients`]): of this stream.
        dim (`int`): length of a sketch.

    Raises:
        `ValueError`: the sums in the checkpoint are of another length.
    """

    def __init__(self, host: "Host", stream: Stream, schedule: LearnsFromGradients, dim: int):
        self.host, self.stream, self.schedule, self.dim = host, stream, schedule, dim
        self._tap = host.tap_gradients(dim, stream.layout.seed)
        saved = stream.gradients
        self._draws: list[Draw | None] = []  # by place in the chunk; none where its gradient is not wanted
        if saved is not None:
            pairs = zip(saved["numbers"].tolist(), saved["rows"].tolist(), strict=True)
            self._draws = [None if number < 0 else Draw(number, row) for number, row in pairs]
            if saved["sums"].shape[1] != dim:
                raise ValueError(
                    f"The checkpoint holds sketches of gradients of length {saved['sums'].shape[1]}, but this run "
                    f"makes them {dim} long. Resume with the settings of the first run."
                )
            self._keep(saved["sums"], saved["came"])

    def end(self) -> None:
        """Leave the trainer as it was."""
        self._tap.undo()

    def begin(self, draws: Sequence[Draw | None]) -> None:
        """Begin with the draws of a chunk, whose rewards are known and which is trained on next."""
        self._draws = list(draws)
        self._keep(np.zeros((len(draws), self.dim), np.float32), np.zeros(len(draws), np.int64))
        self._tap.begin(len(draws))

    def replace(self, place: int, draw: Draw | None) -> None:
        """Note that another group takes a place of the chunk that was begun."""
        self._draws[place] = draw

    def hand_over(self) -> bool:
        """
        Give the gradients of the chunk before to the schedule; or the reason why there are none, if training has shown
        one. Called on all processes, which then are told the same.

        Returns:
            whether there will be more.
        """
        failures = [failure for failure in gather_object([self._tap.failure]) if failure is not None]
        if failures:
            self.stream.gradients = None
            self.end()
            self.schedule.no_gradients(failures[0])
            return False
        if self._draws:
            sums, came = self._over_all()
            whole = (came == self.stream.layout.group_size) & np.isfinite(sums).all(1)
            gradients = [
                Gradient(draw.number, draw.row, sums[place])
                for place, draw in enumerate(self._draws)
                if whole[place] and draw is not None
            ]
            self._draws, self.stream.gradients = [], None
            self.schedule.observe_gradients(gradients)
        return True

    def agree(self, peers: "Peers") -> None:
        """Put the sums so far into the stream, for a checkpoint. Called on all processes."""
        if not self._draws:
            return
        peers.wait()
        sums, came = self._over_all()
        self._keep(sums, came)  # as a run has them that is resumed from this checkpoint
        known = [(-1, 0) if draw is None else (draw.number, draw.row) for draw in self._draws]
        numbers, rows = np.array(known, np.int64).T
        self.stream.gradients = {"numbers": numbers, "rows": rows, "sums": sums, "came": came}

    def _keep(self, sums, came):
        """Let the main process have the sums of all processes."""
        is_main = self.host.accelerator.is_main_process
        self._sums, self._counts = (sums, came) if is_main else (np.zeros_like(sums), np.zeros_like(came))

    def _over_all(self) -> tuple[np.ndarray, np.ndarray]:
        """Sum over the processes what they have added. Return the same on all."""
        sums, counts = self._sums, self._counts
        if self._tap.begun:  # else a run that was resumed, before its first generation
            more, rows = self._tap.take()
            sums, counts = sums + more, counts + rows
        if self.host.accelerator.num_processes == 1:
            return sums, counts
        device = self.host.accelerator.device
        tensors = [torch.from_numpy(part).to(device) for part in (sums, counts)]
        # After the sum the main process's own, as nothing says that all have the same last digits
        tensors = [broadcast(reduce(part, "sum")) for part in tensors]
        found, numbers = (part.cpu().numpy() for part in tensors)
        return found, numbers
