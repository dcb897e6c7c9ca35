"""The rewards of training, handed to a schedule as groups, and their gradients."""

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from ..curriculum.batch import most_frequent
from ..curriculum.events import Draw
from ..curriculum.rewards import has_gradient
from ..data.prompts import prompt_text
from ..data.reading import has_transform, read_rows
from .gradients import ChunkGradients
from .kept import KeptRollouts
from .refills import Refills
from .stream import Stream


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..ground.peers import Peers
    from ..host import Host


class GroupTap:
    """
    Turns the chunks that a trainer reports into groups, and shows them to the schedule.

    Args:
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of its sampler. With `save_rollouts` the rollouts of training are kept on disk,
            unless selections are made.

    Attributes:
        stream ([`Stream`]): of the run under way.
        live (`np.ndarray` of shape `(n,)`, *optional*): groups of the last generation that have a gradient, bool.
            `None` if its rewards were not those of its draws.
    """

    stream: Stream

    def __init__(self, host: "Host", config: "LearnAlignConfig"):
        self.host, self.keeps = host, config.save_rollouts
        self._kept = KeptRollouts(host)
        self.live: np.ndarray | None = None
        self._gradients: ChunkGradients | None = None
        self._refills = Refills(host, config)
        self._draws: list[Draw] = []  # of the generation under way
        self._begins = True  # whether that is the first of its chunk
        host.on_rewards(self.observe, self.check_rows, self.compose)

    def begin(self, step: int) -> None:
        """
        Begin to watch the gradients of training, if the schedule learns from them; it is told where there are none.
        Called when training begins, after the schedule's state was loaded, at optimizer step `step`.
        """
        self.end()
        self.host.forget_rollouts()
        if self.stream.selects is None:
            self._kept.begin(self.stream.layout.batches_trained(step))
        learns = self.stream.learns
        dim = None if learns is None else learns.gradient_dim
        if learns is None or dim is None:
            self.stream.gradients = None
            return
        reason = self.host.gradients_obstacle()
        if reason is None:
            self._gradients = ChunkGradients(self.host, self.stream, learns, dim)
        else:
            self.stream.gradients = None
            learns.no_gradients(reason)

    def end(self) -> None:
        """Watch the gradients of training no more."""
        if self._gradients is not None:
            self._gradients.end()
        self._gradients = None

    def before_checkpoint(self, peers: "Peers") -> None:
        """Put the gradients so far into the stream, for a checkpoint. Called on all processes."""
        if self._gradients is not None:
            self._gradients.agree(peers)

    def observe(
        self,
        batch: int,
        inputs: list[dict],
        completions: list,
        rewards: np.ndarray,
        trained: np.ndarray,
        tokens: list,
    ) -> None:
        """Show a generation to the schedule; see [`~trl_learnalign.host.taps.RewardTap`] for the arguments."""
        schedule, draws = self.stream.schedule, self._draws
        if self._begins and self._gradients is not None and not self._gradients.hand_over():
            self._gradients = None
        masked = ~trained if len(trained) == len(rewards) and not trained.all() else None
        alike = self._alike(completions, len(rewards)) if self.stream.describes.compares else None
        groups = self.stream.groups(draws, rewards, masked, alike)
        self.live = self._with_gradient(groups)
        schedule.observe(groups)
        if self._begins and self._gradients is not None:
            replayed = [None] * (self.stream.layout.chunk_prompts - len(draws))
            self._gradients.begin([*draws, *replayed])
        self._complete(groups, completions, len(inputs))
        if self.keeps and self.stream.selects is None:
            self._kept.keep(self.stream.layout.group_size, draws, batch, completions, tokens, rewards)
        if not self._begins:
            return
        for name, value in schedule.metrics().items():
            if np.isfinite(value):
                self.host.log_metric(f"learnalign/{name}", float(value))

    def _with_gradient(self, groups) -> np.ndarray:
        """Tell which groups have a gradient, by the trainer's own advantages."""
        rewards = torch.from_numpy(np.stack([group.rewards for group in groups]))
        advantages = self.host.advantages(rewards, torch.zeros(rewards.shape[:2])).numpy()
        trained = [np.ones(len(group.rewards), bool) if group.masked is None else ~group.masked for group in groups]
        return has_gradient(advantages, np.stack(trained))

    def compose(self, batch: int, generate: Callable[[list[dict]], dict], inputs: list[dict]) -> dict:
        """Generate for a chunk, once or more often; see [`~trl_learnalign.host.taps.RewardTap`]."""

        def generate_for(draws, rows=None):
            self._draws, self.live = draws, None
            found = generate(self.host.inputs_of([draw.row for draw in draws]) if rows is None else rows)
            self._begins = False
            return found

        self._begins = True
        return self._refills(self, batch // self.stream.layout.repeats, generate_for, inputs)

    def moved(self, place: int, draw: Draw) -> None:
        """Note that the group of another draw takes a place of the chunk."""
        if self._gradients is not None:
            self._gradients.replace(place, draw)

    def _alike(self, completions, rollouts):
        """Return for each completion of all processes a number, the same for equal ones; `None` if one is missing."""
        found = gather_object([_number(completion) for completion in completions])
        return np.array(found, np.int64) if len(found) == rollouts else None

    def _complete(self, groups, completions, own_rows):
        """Give the schedule the completions that it wants to show."""
        # The main process decides what is asked for: the others may have rounded otherwise
        wanted = broadcast_object_list([[int(row) for row in self.stream.describes.wanted(groups)]])[0]
        if not wanted:
            return
        size = self.stream.layout.group_size
        places = {
            group.row: place * size + most_frequent(group.alike)
            for place, group in enumerate(groups)
            if group.row in wanted
        }
        start = self.host.accelerator.process_index * own_rows  # of its rollouts; it may split a group
        own = {row: prompt_text(completions[at]) for row, at in own_rollouts(places, start, own_rows).items()}
        self.stream.describes.remember({row: text for part in gather_object([own]) for row, text in part.items()})

    def check_rows(self, batch: int, inputs: list[dict]) -> int:
        """
        Return a digest of the chunk's rows, to be compared between the processes.

        Raises:
            `RuntimeError`: the rewards are those of other prompts than the schedule chose.
        """
        layout = self.stream.layout
        chunk = batch // layout.repeats
        rows = [draw.row for draw in self._draws]
        start = self.host.accelerator.process_index * len(inputs)
        self._check_row(chunk, rows[start // layout.group_size], inputs[0])
        content = np.array([chunk, *rows], np.int64).tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest())

    def _check_row(self, chunk, row, found):
        if has_transform(self.host.dataset):  # which may make another prompt of the row each time
            return
        (expected,) = read_rows(self.host.dataset, [row])
        if "prompt" in expected and np.any(found["prompt"] != expected["prompt"]):
            raise RuntimeError(
                f"Training generated for another prompt than row {row}, which the schedule had chosen for chunk "
                f"{chunk}, so its rewards would be credited to the wrong prompts. Something between dataset and "
                "trainer changes the order of rows: use TRL's own dataloader."
            )


def own_rollouts(places: dict[int, int], start: int, number: int) -> dict[int, int]:
    """
    Find, among rollouts of a chunk, those of this process.

    Args:
        places (`dict[int, int]`): by row the place of a rollout in the chunk.
        start (`int`): the first rollout of this process; a group may be on several processes.
        number (`int`): its rollouts.

    Returns:
        by row the place of the rollout among those of this process.
    """
    return {row: place - start for row, place in places.items() if 0 <= place - start < number}


def _number(completion) -> int:
    text = completion if isinstance(completion, str) else repr(completion)  # with calls of tools, if there are any
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=7).digest())
