"""Chunks of a schedule, in the order in which TRL's trainers read their batches."""

import math
from collections.abc import Iterator

from torch.utils.data import Sampler

from .config import LearnAlignConfig
from .run.layout import STREAM_FIELDS, Layout, to_train_longer
from .schedules import SCHEDULES, Schedule


STATE_VERSION = 2


class LearnAlignSampler(Sampler[int]):
    r"""
    Sampler that trains on the prompts that its schedule chooses: with `schedule="staged"`, the default, random ones
    during the warm-up and the selected ones afterwards; with `schedule="online"` those with the highest
    learnability, predicted from the rewards of training.

    Pass it to [`LearnAlignGRPOTrainer`] as `train_sampler`, or to [`LearnAlignCallback`]; either binds it to the
    trainer. One sampler serves one trainer. A run is a stream of chunks:

        chunk       0                         1                 chunk_prompts = 2, group_size = 3, repeats = 2
        prompts     a b                       c d
        the stream  a a a b b b a a a b b b   c c c d d d ...   each prompt `group_size` times, all `repeats` times

    Args:
        config ([`LearnAlignConfig`], *optional*): defaults to the paper's settings for GSM8K.
        schedule ([`Schedule`], *optional*): your own schedule, in place of the one that `config.schedule` names.
    """

    def __init__(self, config: LearnAlignConfig | None = None, schedule: Schedule | None = None):
        self.config = config if config is not None else LearnAlignConfig()
        if not isinstance(self.config, LearnAlignConfig):
            raise TypeError(f"`config` must be a LearnAlignConfig, but is a {type(self.config).__name__}.")
        self.schedule = schedule if schedule is not None else SCHEDULES[self.config.schedule](self.config)
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"`schedule` must be a Schedule, but is a {type(self.schedule).__name__}.")
        self.layout: Layout | None = None
        self.epoch = 0
        self.cursor = 0
        self._drawn: dict[int, list[int]] = {}  # the last chunks, as they were drawn

    def bind(self, layout: Layout) -> None:
        """
        Ties the sampler to a trainer. Called by the trainer or the callback, not by users.

        Raises:
            `ValueError`: the sampler serves another trainer already.
        """
        if self.layout is not None:
            raise ValueError(
                "This LearnAlignSampler already belongs to a trainer, and its state would be shared by both. Make a "
                "new LearnAlignSampler for each trainer."
            )
        self.layout = layout
        self.schedule.bind(layout)
        self.reset()

    def reset(self) -> None:
        """Begins a new run."""
        self.epoch = self.cursor = 0
        self._drawn = {}
        self.schedule.start()

    def chunk(self, i: int) -> list[int]:
        """
        Dataset rows of the prompts of chunk `i`, of length `chunk_prompts`.

        Raises:
            `ValueError`: the schedule gave another number of rows, or one that the dataset does not have.
        """
        rows, layout = [int(row) for row in self.schedule.prompts(i)], self._bound()
        name = type(self.schedule).__name__
        if len(rows) != layout.chunk_prompts:
            raise ValueError(
                f"{name}.prompts({i}) returned {len(rows)} rows, but a chunk has {layout.chunk_prompts}. Return "
                "`layout.chunk_prompts` rows for every chunk."
            )
        outside = [row for row in rows if not 0 <= row < layout.pool_size]
        if outside:
            raise ValueError(
                f"{name}.prompts({i}) returned row {outside[0]}, but the training dataset has {layout.pool_size} "
                "rows, counted from 0. Return rows that it has."
            )
        return rows

    def drawn(self, i: int) -> list[int]:
        """The rows of chunk `i` as they were drawn, if it is one of the last, else as the schedule has them."""
        return self._drawn[i] if i in self._drawn else self.chunk(i)

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields epoch `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self._bound().epoch_chunks
        # Those whose rewards are still to come: of the step under way and of what is read ahead
        kept = 1 + math.ceil((self.layout.accumulation + self.layout.read_ahead) / self.layout.repeats)
        for i in range(first, first + self.layout.epoch_chunks):
            self.cursor = i + 1
            prompts = self._drawn[i] = self.chunk(i)
            self._drawn = {number: rows for number, rows in self._drawn.items() if i - kept < number <= i}
            for _ in range(self.layout.repeats):
                for index in prompts:
                    for _ in range(self.layout.group_size):
                        yield index

    def __len__(self) -> int:
        layout = self._bound()
        return layout.epoch_chunks * layout.repeats * layout.chunk_prompts * layout.group_size

    def _bound(self) -> Layout:
        if self.layout is None:
            raise RuntimeError(
                "This LearnAlignSampler belongs to no trainer yet. Pass it to LearnAlignGRPOTrainer as "
                "`train_sampler`, or call `trainer.add_callback(LearnAlignCallback(trainer, sampler))` on a trainer "
                "that exists already."
            )
        return self.layout

    def state_dict(self) -> dict:
        """The layout, and the state of the schedule: values for JSON, and NumPy arrays."""
        layout = {name: getattr(self._bound(), name) for name in STREAM_FIELDS}
        state = self.schedule.state_dict()
        return {
            "state_version": STATE_VERSION,
            "layout": layout,
            "schedule": type(self.schedule).__name__,
            "state": state,
        }

    def schedule_state(self, saved: dict) -> dict:
        """
        The state of the schedule in what [`~LearnAlignSampler.state_dict`] returned.

        Raises:
            `ValueError`: the state is damaged, or was made for another stream (other data, batch size, number of
                processes, seed or schedule), which would train on other prompts.
        """
        layout = self._bound()
        try:
            version, was = saved["state_version"], saved["layout"]
            if version == 1:  # of 0.1, which had one schedule
                name, state = "StagedSchedule", {"log": saved["log"]}
            else:
                name, state = saved["schedule"], saved["state"]
            changed = layout.differences(was)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The sampler state in the checkpoint is damaged: {error!r}.") from error
        if version not in (1, STATE_VERSION):
            raise ValueError(f"The sampler state has version {version!r}, but this package reads {STATE_VERSION}.")
        if name != type(self.schedule).__name__:
            raise ValueError(
                f"The checkpoint was written with the schedule {_called(name)}, but this sampler has "
                f"{_called(type(self.schedule).__name__)}. Resume with the same `schedule`, or start a new run from "
                "the weights of this one."
            )
        if changed:
            raise ValueError(
                "The checkpoint was written for another stream of prompts: "
                + "; ".join(changed)
                + f". {_fixed(layout, was)}{to_train_longer(layout, was.get('epochs'))}Resume with the "
                "settings, the data and the number of processes of the first run (or keep "
                "`per_device_train_batch_size` x processes, `steps_per_generation` and `gradient_accumulation_steps` "
                "the same), or start a new run."
            )
        return state

    def load_state_dict(self, saved: dict) -> None:
        """
        Restores the schedule. Raises a `ValueError` as [`~LearnAlignSampler.schedule_state`] and the schedule do.
        """
        self.schedule.load_state_dict(self.schedule_state(saved))
        self._drawn = {}


def _called(schedule: str) -> str:
    """A schedule by its class, and as `LearnAlignConfig` calls it."""
    names = [name for name, kind in SCHEDULES.items() if kind.__name__ == schedule]
    return f"{schedule} (`schedule={names[0]!r}`)" if names else schedule


def _fixed(layout, was) -> str:
    """Why numbers of prompts cannot change, if one did."""
    names = [name for name in ("num_prompts", "warmup_prompts") if was.get(name) != getattr(layout, name)]
    return f"The length of an epoch follows from {' and '.join(f'`{name}`' for name in names)}. " if names else ""
