"""Chunks of a schedule, in the order in which TRL's trainers read their batches."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from .config import LearnAlignConfig
from .run.layout import Layout
from .schedules import SCHEDULES, Schedule
from .schedules.stream import MakesSchedule, Stream


class LearnAlignSampler(Sampler[int]):
    r"""
    Sampler that trains on the prompts that its schedule chooses: with `schedule="staged"`, the default, random ones
    during the warm-up and the selected ones afterwards; with `schedule="online"` those with the highest
    learnability, predicted from the rewards of training.

    Pass the sampler to [`LearnAlignGRPOTrainer`] as `train_sampler`, or to [`LearnAlignCallback`]; either binds it to
    the trainer. One sampler serves one trainer. A run is a stream of chunks:

        chunk       0                         1                 chunk_prompts = 2, group_size = 3, repeats = 2
        prompts     a b                       c d
        the stream  a a a b b b a a a b b b   c c c d d d ...   each prompt `group_size` times, all `repeats` times

    Args:
        config ([`LearnAlignConfig`], *optional*): defaults to the paper's settings for GSM8K.
        schedule (`type` or `Callable`, *optional*): your own class of schedules, in place of the one that
            `config.schedule` names; or a function that is called with a [`Run`] and returns a [`Schedule`].

    Raises:
        `TypeError`: `config` is no [`LearnAlignConfig`], or `schedule` is a schedule and not its class.
    """

    def __init__(self, config: LearnAlignConfig | None = None, schedule: MakesSchedule | None = None):
        self.config = config if config is not None else LearnAlignConfig()
        if not isinstance(self.config, LearnAlignConfig):
            raise TypeError(f"`config` must be a LearnAlignConfig, but is a {type(self.config).__name__}.")
        if isinstance(schedule, Schedule):
            raise TypeError(
                f"`schedule` is a {type(schedule).__name__}, but every run makes a schedule of its own. Pass the "
                f"class, `schedule={type(schedule).__name__}`, or a function of a Run that returns one."
            )
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"`schedule` must be a class of schedules, or a function that returns one, but is "
                f"a {type(schedule).__name__}."
            )
        self.makes_schedule: MakesSchedule = schedule if schedule is not None else SCHEDULES[self.config.schedule]
        self.epoch = 0
        self._stream: Stream | None = None

    def bind(self, stream: Stream) -> None:
        """
        Tie the sampler to a trainer. Called by the trainer or the callback, not by users.

        Raises:
            `ValueError`: the sampler serves another trainer already.
        """
        if self._stream is not None:
            raise ValueError(
                "This LearnAlignSampler already belongs to a trainer, and its state would be shared by both. Make a "
                "new LearnAlignSampler for each trainer."
            )
        self._stream = stream

    def begin(self, stream: Stream) -> None:
        """Begin another run of the same trainer."""
        self._stream, self.epoch = stream, 0

    @property
    def stream(self) -> Stream:
        """The draws of the run."""
        if self._stream is None:
            raise RuntimeError(
                "This LearnAlignSampler belongs to no trainer yet. Pass it to LearnAlignGRPOTrainer as "
                "`train_sampler`, or call `trainer.add_callback(LearnAlignCallback(trainer, sampler))` on a trainer "
                "that exists already."
            )
        return self._stream

    @property
    def schedule(self) -> Schedule:
        """The schedule of the run."""
        return self.stream.schedule

    @property
    def layout(self) -> Layout:
        """The layout of the run."""
        return self.stream.layout

    def chunk(self, i: int) -> list[int]:
        """Return the dataset rows of the prompts of chunk `i`, of length `chunk_prompts`; see [`Stream.chunk`]."""
        return self.stream.chunk(i)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the next iteration yields."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        layout = self.layout
        first = self.epoch * layout.epoch_chunks
        for i in range(first, first + layout.epoch_chunks):
            prompts = self.chunk(i)
            for _ in range(layout.repeats):
                for index in prompts:
                    for _ in range(layout.group_size):
                        yield index

    def __len__(self) -> int:
        layout = self.layout
        return layout.epoch_chunks * layout.repeats * layout.chunk_prompts * layout.group_size


def check_sampler(train_sampler: object) -> None:
    """Raise a `TypeError` unless this is a [`LearnAlignSampler`]."""
    if not isinstance(train_sampler, LearnAlignSampler):
        raise TypeError(f"`train_sampler` must be a LearnAlignSampler, but is a {type(train_sampler).__name__}.")
