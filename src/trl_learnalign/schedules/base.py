"""The contract of schedules, which decide which prompt is trained on when."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..curriculum.events import Gradient, Group
from ..run.layout import Layout


if TYPE_CHECKING:
    from datasets import Dataset

    from ..config import LearnAlignConfig
    from ..ground.peers import Peers
    from ..host import Host


@dataclass(frozen=True)
class Run:
    """
    A run that begins, as its schedule is told of it.

    Attributes:
        pool_size (`int`): rows of the training dataset.
        prompts_at_once (`int`): prompts that the trainer generates for at once: `choose` is asked for so many, and
            for fewer where groups are refilled or replayed.
        group_size (`int`): rollouts of each prompt, the trainer's `num_generations`.
        seed (`int`): the trainer's `seed`.
        config ([`LearnAlignConfig`]): the configuration of the sampler.
        dataset ([`~datasets.Dataset`]): the training dataset.
    """

    pool_size: int
    prompts_at_once: int
    group_size: int
    seed: int
    config: "LearnAlignConfig"
    dataset: "Dataset"


class Schedule:
    """
    Decides which prompt is trained on when. A schedule of your own overrides [`~Schedule.choose`], and of the four
    other names those that it needs:

    ```python
    class EveryOther(Schedule):
        def __init__(self, run):
            self.run, self.drawn = run, 0

        def choose(self, n):
            first, self.drawn = self.drawn, self.drawn + n
            return [2 * i % self.run.pool_size for i in range(first, self.drawn)]

        def state_dict(self):
            return {"drawn": self.drawn}

        def load_state_dict(self, state):
            self.drawn = state["drawn"]

    sampler = LearnAlignSampler(config, schedule=EveryOther)
    ```

    - **A run has a schedule of its own.** The class, or a function that returns a schedule, is called with a [`Run`]
      for every run: for the first when the trainer is built, so that an error comes before training.
    - **A draw is asked for once**, in order, and has a number, counted from 0 over the whole run: the first
      `choose(4)` makes the draws 0 to 3. The dataloader reads ahead, so some draws are always in flight: asked for,
      and not yet observed.
    - **A group is observed when its rewards are known**: in any order, twice, or never. It has the number of its draw.
    - **A checkpoint holds the schedule's state as of its last draw**, and beside it the numbers and rows of the draws
      in flight. A resumed run loads the state into a new schedule. Its dataloader asks for the drawn chunks of the
      epoch again, but the schedule does not notice: draws in flight are answered from the checkpoint, those that were
      trained on are skipped, and `choose` is asked for the first one that no run has drawn. So a schedule has nothing
      to derive anew. Groups in flight are observed after the resume. A chunk that the checkpoint cut in two is
      generated again and observed a second time, under the same numbers.
    - **Every process has one**, and calls it with the same values in the same order. All must come to the same
      results, so random numbers come from a generator with a fixed seed.

    No other attribute of a schedule is looked up, so a schedule may have any. Schedules that want more of the trainer
    also derive from [`Selects`], [`Describes`], [`Prepares`], [`Ticks`] or [`LearnsFromGradients`].

    Args:
        run ([`Run`]): the run that begins.
    """

    def __init__(self, run: Run):
        self.run = run

    def choose(self, n: int) -> Sequence[int]:
        """
        Choose the next prompts.

        Args:
            n (`int`): how many.

        Returns:
            n rows of the dataset, counted from 0.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `choose(n)`, which every schedule needs.")

    def observe(self, groups: Sequence[Group]) -> None:
        """Learn from finished groups, which come in any order. A group with a known number must change nothing."""

    def metrics(self) -> dict[str, float]:
        """Return values for the log, after groups were observed."""
        return {}

    def state_dict(self) -> dict:
        """Return the state for a checkpoint: values for JSON, and NumPy arrays."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """
        Restore what [`~Schedule.state_dict`] returned.

        Raises:
            `ValueError`: the state is damaged or of another run.
        """


class Selects:
    """A schedule that selections are made for. Chunks are `prompts_at_once` draws each, counted from 0."""

    def due(self, step: int, max_steps: int, drawn: int) -> bool:
        """
        Tell whether a selection is due.

        Args:
            step (`int`): the optimizer step that just ended; 0 before the first.
            max_steps (`int`): optimizer steps of the run.
            drawn (`int`): chunks that were drawn.
        """
        raise NotImplementedError

    def accept(self, start: int, indices: Sequence[int]) -> None:
        """
        Take the result of a selection that was due.

        Args:
            start (`int`): the first chunk that the selection can take effect with: none of it was drawn.
            indices (`Sequence[int]`): the chosen dataset rows, best first; empty if no prompt is learnable.
        """
        raise NotImplementedError

    @property
    def stage(self) -> int:
        """Selections so far."""
        raise NotImplementedError

    @property
    def in_use_from(self) -> int | None:
        """The chunk from which on the last selection is trained on; `None` where random prompts are."""
        raise NotImplementedError


class Ticks:
    """A schedule that counts optimizer steps, as what it knows of the policy fades with them."""

    def tick(self, steps: int) -> None:
        """Note that so many optimizer steps were taken since the last call."""
        raise NotImplementedError


class LearnsFromGradients:
    """
    A schedule that learns from the gradients which training takes, at no backward more. The groups of a chunk are
    observed when their rewards are known; their gradients follow when the chunk was trained on, before the groups of
    the next chunk are observed.

    Attributes:
        gradient_dim (`int`, *optional*): length of the sketches of gradients; `None` where none are wanted. Read once,
            when training begins and after a state was loaded.
    """

    gradient_dim: int | None

    def observe_gradients(self, gradients: list[Gradient]) -> None:
        """
        Learn from the gradients of groups. Groups whose rollouts were not all trained on are left out; one with a
        known number must change nothing.
        """
        raise NotImplementedError

    def no_gradients(self, reason: str) -> None:
        """
        Note that there will be no gradients: called once, when training begins, or with the second chunk where only
        training shows it.
        """
        raise NotImplementedError


class Describes:
    """
    A schedule with something to say to people: on the terminal, in a report, in a model card.

    Attributes:
        compares (`bool`): whether groups shall tell which of their completions are equal, see `Group.alike`.
    """

    compares: bool = False

    def plan(self, step: int, max_steps: int, due: bool) -> list[str]:
        """
        Return the plan of the run in a few lines, which are printed at its start.

        Args:
            step (`int`): the optimizer step that a resumed run goes on after; 0 for a new run.
            max_steps (`int`): optimizer steps of the run.
            due (`bool`): whether a selection is made before the next step.
        """
        return []

    def warning(self, max_steps: int) -> str | None:
        """Return a warning about a new run of so many steps, if there is one."""
        return None

    def estimate(self, step: int, since: int, seconds: float) -> str | None:
        """Return a line about the selection after a step; training took `seconds` since step `since`."""
        return None

    def wanted(self, groups: Sequence[Group]) -> Sequence[int]:
        """
        Return those rows of groups that were just observed of which a completion is wanted for the report: the most
        frequent one where completions are compared, else the first. The main process decides for all.
        """
        return []

    def remember(self, completions: dict[int, str]) -> None:
        """Keep the completions that were `wanted`, by dataset row."""

    def report(self, host: "Host", directory: Path) -> Path | None:
        """
        Write a report into a directory. Called on all processes, of which the main one writes.

        Returns:
            the file, or `None` where there is nothing to report yet.
        """
        return None

    def summary(self) -> list[str]:
        """Return sentences about the run for a model card; none where the card names the selections instead."""
        return []


class Prepares:
    """A schedule that looks at the trainer before it begins, or keeps files beside its state."""

    def fit(self, host: "Host") -> Layout:
        """
        Check that the schedule can serve a trainer, and return the layout of its run. Called after the schedule was
        made.

        Raises:
            `ValueError`: the trainer or its dataset does not fit.
        """
        return whole_pool(host)

    def check_length(self, max_steps: int) -> None:
        """
        Check the length of a new run.

        Raises:
            `ValueError`: so many optimizer steps are too few.
        """

    def prepare(self, host: "Host", state: dict | None, peers: "Peers") -> None:
        """
        Get ready when training begins, before the state is loaded. Called on all processes.

        Args:
            host ([`Host`]): the trainer, as far as a schedule may see it.
            state (`dict`, *optional*): what `load_state_dict` will get where a run is resumed; `None` for a new run.
            peers ([`Peers`]): the other processes; an open context.
        """

    def look(self, host: "Host", peers: "Peers") -> None:
        """Do what takes long, once for a new run, after its plan was printed. Called on all processes."""

    def write_files(self, directory: Path, is_writer: bool) -> dict[str, str]:
        """
        Write what the state needs beside it into a checkpoint, if `is_writer`. Called on all processes.

        Returns:
            the SHA-256 of each file by its name, the same on all processes. A checkpoint without one of them, or with
            another, is not complete.
        """
        return {}


def whole_pool(host: "Host", pool_size: int | None = None) -> Layout:
    """Return a layout without a warm-up, whose epochs have the whole chunks of the pool, by default of all rows."""
    read = host.layout()
    size, chunk = pool_size or read["pool_size"], read["chunk_prompts"]
    return Layout(**read, num_prompts=max(size // chunk, 1) * chunk, warmup_prompts=0)
