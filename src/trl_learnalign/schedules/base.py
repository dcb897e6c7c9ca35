"""The base class of schedules, which decide which prompt is trained on when."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..run.layout import Layout


if TYPE_CHECKING:
    from ..config import LearnAlignConfig
    from ..ground.peers import Peers


class Schedule:
    """
    Decides which prompt is trained on when. Your own schedule overrides [`~Schedule.prompts`], and other methods if
    it needs them:

    ```python
    class EveryOther(Schedule):
        def prompts(self, chunk):
            n = self.layout.chunk_prompts
            return [2 * i % self.layout.pool_size for i in range(chunk * n, (chunk + 1) * n)]

    sampler = LearnAlignSampler(config, schedule=EveryOther(config))
    ```

    Every process has one, and calls it with the same values in the same order. It must come to the same results on all
    of them, so random numbers come from a generator with a fixed seed.

    Args:
        config ([`LearnAlignConfig`]): the configuration of the sampler.
    """

    selects = False  # whether selections are made for it

    def __init__(self, config: "LearnAlignConfig"):
        self.config = config
        self.layout: Layout | None = None

    def prompts_per_epoch(self, pool_size: int, chunk_prompts: int) -> tuple[int, int]:
        """
        Prompts of an epoch, and random prompts before the first one. By default all whole chunks of the pool, and
        none.
        """
        return max(pool_size // chunk_prompts, 1) * chunk_prompts, 0

    def check(self, host) -> None:
        """Raises an error for a trainer that the schedule cannot serve; called when the trainer is built."""

    def check_length(self, max_steps: int) -> None:
        """Raises an error if a run of so many optimizer steps is too short."""

    def bind(self, layout: Layout) -> None:
        """Ties the schedule to a run. `start` follows."""
        self.layout = layout

    def prepare(self, host, state: dict | None, peers: "Peers") -> None:
        """
        Called once when training begins, on all processes, inside the context of `peers`.

        Args:
            host ([`Host`]): the trainer, as far as a schedule may see it.
            state (`dict`, *optional*): what `state_dict` returned, where a run is resumed; `None` for a new run.
            peers ([`Peers`]): the other processes.
        """
        if state is None:
            self.start()
        else:
            self.load_state_dict(state)

    def look(self, host, peers: "Peers") -> None:
        """
        Called once when a new run begins, on all processes, inside the context of `peers`, after `prepare` and after
        the plan was printed: what takes long.
        """

    def start(self) -> None:
        """A new run begins: forgets all."""

    def prompts(self, chunk: int) -> Sequence[int]:
        """
        Dataset rows of the prompts of a chunk, `layout.chunk_prompts` of them. Chunks are asked for in their order;
        where a run is resumed, those of the epoch that were drawn before are asked for again, and must be the same.
        """
        raise NotImplementedError  # the one thing that every schedule has

    def due(self, step: int, max_steps: int, drawn: int) -> bool:
        """
        Whether a selection is due.

        Args:
            step (`int`): the optimizer step that just ended; 0 before the first.
            max_steps (`int`): optimizer steps of the run.
            drawn (`int`): chunks that the dataloader has drawn.
        """
        return False

    def accept(self, start: int, indices: Sequence[int]) -> None:
        """
        Takes the result of a selection that was due.

        Args:
            start (`int`): the first chunk that it can take effect with.
            indices (`Sequence[int]`): the chosen dataset rows, best first; empty if no prompt is learnable.
        """

    def masked(self, chunk: int, masked: np.ndarray) -> None:
        """
        Receives, before the rewards of a chunk, which of its rollouts have no token in the loss, as truncated ones
        under `mask_truncated_completions`. Called only where there are some.

        Args:
            chunk (`int`): the chunk.
            masked (`np.ndarray` of shape `(n, G)`): bool.
        """

    def observe(self, chunk: int, rewards: np.ndarray) -> dict[int, int] | None:
        """
        Receives the rewards of training. A chunk may be observed twice, where a resumed run generates it
        again.

        Args:
            chunk (`int`): the chunk.
            rewards (`np.ndarray` of shape `(n, G, F)`): of its n prompts, G rollouts each, by F reward functions; NaN
                where one gave none.

        Returns:
            dataset rows whose first completion `remember` is to be given, with their place in the chunk; nothing by
            default.
        """

    def remember(self, completions: dict[int, str]) -> None:
        """Takes the completions that `observe` asked for, by dataset row."""

    @property
    def stage(self) -> int:
        """Selections so far."""
        return 0

    @property
    def in_use_from(self) -> int | None:
        """The chunk from which on the last selection is trained on; `None` where random prompts are."""
        return None

    def plan(self, step: int, max_steps: int, due: bool) -> list[str]:
        """
        The plan of the run in a few lines, printed at its start.

        Args:
            step (`int`): the optimizer step that a resumed run goes on after; 0 for a new run.
            max_steps (`int`): optimizer steps of the run.
            due (`bool`): whether a selection is made before the next step.
        """
        return [f"steps {step + 1} to {max_steps} train on the prompts that {type(self).__name__} chooses."]

    def warning(self, max_steps: int) -> str | None:
        """What a new run of so many steps should be warned of."""
        return None

    def estimate(self, step: int, since: int, seconds: float) -> str | None:
        """A line about the selection after a step, with `seconds` that training took since step `since`."""
        return None

    def report(self, host, directory: Path) -> None:
        """
        Writes its report into a directory, whenever a checkpoint was saved and at the end. Called on all processes.
        """

    def summary(self) -> list[str]:
        """What a model card says of the run, a sentence each. Nothing by default: it names the selections."""
        return []

    def metrics(self) -> dict[str, float]:
        """Values for the log after each chunk that was observed."""
        return {}

    def state_dict(self) -> dict:
        """The state for a checkpoint: values for JSON, and NumPy arrays."""
        return {}

    def write_files(self, directory: Path, is_writer: bool) -> dict[str, str]:
        """
        Writes what the state needs beside it into a checkpoint, if `is_writer`. Called on all processes.

        Returns:
            the SHA-256 of each file by its name, the same on all processes. A checkpoint without one of them, or with
            another, is not complete.
        """
        return {}

    def load_state_dict(self, state: dict) -> None:
        """
        Restores what [`~Schedule.state_dict`] returned.

        Raises:
            `ValueError`: it is damaged or of another run.
        """
