"""The stream: a trainer's chunks as the draws and groups of a schedule, in one place, and across a resume."""

import math
import operator
from collections.abc import Callable

import numpy as np

from ..config import LearnAlignConfig
from ..curriculum.events import Draw, Group
from ..run.layout import STREAM_FIELDS, Layout, to_train_longer
from . import SCHEDULES
from .base import Describes, LearnsFromGradients, Prepares, Run, Schedule, Selects
from .refills import check_refills, replayed_groups
from .replay import ReplayBuffer


STATE_VERSION = 4
MakesSchedule = Callable[[Run], Schedule]


def open_stream(make: MakesSchedule, host, config: LearnAlignConfig, before: Schedule | None = None) -> "Stream":
    """
    Make a schedule for a run of a trainer.

    Args:
        make (`Callable`): is called with a [`Run`].
        host ([`Host`]): the trainer.
        config ([`LearnAlignConfig`]): of the sampler.
        before ([`Schedule`], *optional*): schedule of the run before.

    Raises:
        `TypeError`: no [`Schedule`] was made.
        `ValueError`: the schedule cannot serve the trainer, or is that of the run before; or see [`check_refills`].
    """
    read = host.layout()
    run = Run(read["pool_size"], read["chunk_prompts"], read["group_size"], read["seed"], config, host.dataset)
    schedule = make(run)
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"`schedule` made a {type(schedule).__name__}, but must make a Schedule. Derive your class from "
            "`trl_learnalign.Schedule`."
        )
    if schedule is before:
        raise ValueError(
            f"`schedule` made the {type(schedule).__name__} of the run before once more, which knows another run. "
            "Make a new one whenever it is called."
        )
    check_refills(host, schedule, config)
    prepares = schedule if isinstance(schedule, Prepares) else Prepares()
    layout = prepares.fit(host)
    replayed = replayed_groups(layout.chunk_prompts, config.replay_share)
    return Stream(schedule, layout, ReplayBuffer(config.replay_groups, run.seed) if replayed else None, replayed)


class Stream:
    """
    The draws of one run. A trainer asks for chunks, `layout.chunk_prompts` prompts each. Draws are numbered as the
    schedule makes them: where nothing is drawn in between, draw `number` is prompt `number % chunk_prompts` of chunk
    `number // chunk_prompts`.

        chunk          0   1   2   3   4   5   6   7
        trained on     x   x   x                       a checkpoint is saved here
        drawn          x   x   x   x   x               chunks 3 and 4 are in flight: read ahead, or not yet done
        after a resume the dataloader begins with the epoch and asks for
                       0   1   2                       which are skipped: a placeholder will do
                                   3   4               from the record in the checkpoint
                                           5   6   7   `schedule.choose`, once each

    Args:
        schedule ([`Schedule`]): made for this run.
        layout ([`Layout`]): of the run.
        replay ([`ReplayBuffer`], *optional*): groups that may be trained on again.
        replayed (`int`, *optional*, defaults to 0): prompts of a chunk that are not drawn, as replayed groups take
            their places.

    Attributes:
        fresh (`int`): prompts that are drawn for a chunk when the dataloader asks for it.
        drawn (`int`): chunks that the schedule was asked for, in this run and those that it resumes.
        selects ([`Selects`], *optional*): the schedule, if selections are made for it.
        learns ([`LearnsFromGradients`], *optional*): the schedule, if it learns from gradients.
        describes ([`Describes`]): the schedule, if it has something to say, else what says nothing.
        prepares ([`Prepares`]): the schedule, if it looks at the trainer, else what does not.
        gradients (`dict`, *optional*): sums of the gradients of the chunk that is trained on, as the last checkpoint
            holds them, see [`~trl_learnalign.schedules.gradients.ChunkGradients`].
    """

    def __init__(self, schedule: Schedule, layout: Layout, replay: ReplayBuffer | None = None, replayed: int = 0):
        self.schedule, self.layout, self.replay = schedule, layout, replay
        self.fresh = layout.chunk_prompts - replayed
        self.selects = schedule if isinstance(schedule, Selects) else None
        self.learns = schedule if isinstance(schedule, LearnsFromGradients) else None
        self.describes = schedule if isinstance(schedule, Describes) else Describes()
        self.prepares = schedule if isinstance(schedule, Prepares) else Prepares()
        self.drawn = 0
        self.gradients: dict | None = None
        self._record: dict[int, list[Draw]] = {}  # by chunk: those in flight, and some before
        self._next = 0  # number of the next draw

    @property
    def stage(self) -> int:
        """Selections so far."""
        return 0 if self.selects is None else self.selects.stage

    # Draws ------------------------------------------------------------------------------------------------------

    def chunk(self, i: int) -> list[int]:
        """
        Draw chunk `i`, and those before it that were not drawn yet. Return its dataset rows, of length
        `chunk_prompts`.

        Raises:
            `ValueError`: the schedule gave another number of rows, or one that the dataset does not have.
        """
        layout = self.layout
        while self.drawn <= i:
            self._record[self.drawn] = self.draw(self.fresh)
            self.drawn += 1
        # The step under way and what is read ahead: the rewards are still to come, or are to come again after a resume
        kept = 1 + math.ceil((layout.accumulation + layout.read_ahead) / layout.repeats)
        self._record = {number: draws for number, draws in self._record.items() if number > i - kept}
        return self.rows(i)

    def rows(self, i: int) -> list[int]:
        """
        Return the rows of a chunk that was drawn; placeholders for one that was trained on long ago, and in the places
        of groups that are replayed.
        """
        rows = [draw.row for draw in self.draws(i)]
        return rows + rows[:1] * (self.layout.chunk_prompts - len(rows))

    def draws(self, i: int) -> list[Draw]:
        """Return the draws of a chunk; placeholders for one that is in flight no more."""
        n = self.fresh
        return self._record.get(i) or [Draw(i * n + place, 0) for place in range(n)]

    def draw(self, n: int) -> list[Draw]:
        """
        Draw `n` prompts now, whether for a chunk or in place of groups of it.

        Raises:
            `TypeError`, `ValueError`: see [`chunk`].
        """
        rows, first = self._chosen(n), self._next
        self._next += n
        return [Draw(first + place, row) for place, row in enumerate(rows)]

    def _chosen(self, n):
        name, found = type(self.schedule).__name__, self.schedule.choose(n)
        try:
            rows = [_row(row) for row in found]
        except TypeError as error:
            raise TypeError(
                f"{name}.choose({n}) must return {n} rows of the dataset as whole numbers, but: {error}."
            ) from error
        if len(rows) != n:
            raise ValueError(
                f"{name}.choose({n}) returned {len(rows)} rows, but {n} were asked for. Return one for each prompt."
            )
        outside = [row for row in rows if not 0 <= row < self.layout.pool_size]
        if outside:
            raise ValueError(
                f"{name}.choose({n}) returned row {outside[0]}, but the training dataset has {self.layout.pool_size} "
                "rows, counted from 0. Return rows that it has."
            )
        return rows

    # Groups -----------------------------------------------------------------------------------------------------

    def groups(
        self,
        draws: list[Draw],
        rewards: np.ndarray,
        masked: np.ndarray | None = None,
        alike: np.ndarray | None = None,
    ) -> list[Group]:
        """
        Return the groups of draws that were generated for at once.

        Args:
            draws (`list[Draw]`): n of them.
            rewards (`np.ndarray` of shape `(n * G, F)`): of their rollouts in their order.
            masked (`np.ndarray` of shape `(n * G,)`, *optional*): rollouts without a token in the loss.
            alike (`np.ndarray` of shape `(n * G,)`, *optional*): numbers of their completions.

        Raises:
            `RuntimeError`: there are other rewards than of these rollouts.
        """
        n, size = len(draws), self.layout.group_size
        if len(rewards) != n * size:
            raise RuntimeError(
                f"Rewards of {len(rewards)} rollouts came for {n} prompts with {size} each, so they cannot be "
                "credited to their prompts. `_calculate_rewards` of a trainer of your own must return a row for every "
                "rollout that it generated for these prompts, gathered from all processes."
            )
        parts = rewards.reshape(n, size, -1)
        none = [None] * n
        without = none if masked is None else masked.reshape(n, size)
        texts = none if alike is None else alike.reshape(n, size)
        return [
            Group(draw.number, draw.row, parts[place], without[place], alike=texts[place])
            for place, draw in enumerate(draws)
        ]

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Return the layout, the draws in flight and the state of the schedule: values for JSON, and NumPy arrays."""
        draws = [[(draw.number, draw.row) for draw in part] for part in self._record.values()]
        numbers, rows = np.moveaxis(np.array(draws, np.int64).reshape(-1, self.fresh, 2), 2, 0)
        parts = {"gradients": self.gradients, "replay": None if self.replay is None else self.replay.state_dict()}
        return {
            "state_version": STATE_VERSION,
            "layout": {name: getattr(self.layout, name) for name in STREAM_FIELDS},
            "schedule": type(self.schedule).__name__,
            "drawn": self.drawn,
            "next": self._next,
            "in_flight": {"chunks": np.array([*self._record], np.int64), "numbers": numbers, "rows": rows},
            "state": self.schedule.state_dict(),
        } | {name: part for name, part in parts.items() if part is not None}

    def load_state_dict(self, saved: dict) -> dict:
        """
        Restore the draws. Return the state of the schedule, which is not loaded yet.

        Raises:
            `ValueError`: the state is damaged, or was made for another stream (other data, batch size, number of
                processes, seed or schedule), which would train on other prompts.
        """
        try:
            version, was = saved["state_version"], saved["layout"]
            if version != STATE_VERSION:
                raise ValueError(
                    f"The sampler state has version {version!r}, but this package reads {STATE_VERSION}. Resume with "
                    "the version of trl-learnalign that the run began with, or start a new run."
                )
            name, state, drawn = saved["schedule"], saved["state"], saved["drawn"]
            flying = saved["in_flight"]
            chunks, numbers, rows = (flying[name].tolist() for name in ("chunks", "numbers", "rows"))
            after = saved["next"]
            changed = self.layout.differences(was)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"The sampler state in the checkpoint is damaged: {error!r}.") from error
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
                + f". {_fixed(self.layout, was)}{to_train_longer(self.layout, was.get('epochs'))}Resume with the "
                "settings, the data and the number of processes of the first run (or keep "
                "`per_device_train_batch_size` x processes, `steps_per_generation` and `gradient_accumulation_steps` "
                "the same), or start a new run."
            )
        self._check(drawn, chunks, rows)
        # More were drawn than the chunks hold where groups were refilled
        alike = list(map(len, rows)) == list(map(len, numbers))
        if not alike or type(after) is not int or after < drawn * self.fresh:
            raise ValueError(
                f"The sampler state in the checkpoint is damaged: {after!r} prompts were drawn for {drawn} chunks. "
                "Resume from an earlier checkpoint."
            )
        self.gradients = saved.get("gradients")
        self.drawn, self._next = drawn, after
        self._check_gradients(self.gradients)
        if self.replay is not None:
            self.replay.load_state_dict(saved.get("replay", {}), self.layout.group_size)
        draws = [list(map(Draw, *both)) for both in zip(numbers, rows, strict=True)]
        self._record = dict(zip(chunks, draws, strict=True))
        return state

    def _check(self, drawn, chunks, rows):
        """Raise an error unless the record is one of this stream."""
        n, size = self.fresh, self.layout.pool_size
        whole = type(drawn) is int and len(chunks) == len(rows) and all(len(row) == n for row in rows)
        if not whole or chunks != list(range(drawn - len(chunks), drawn)) or (drawn and not chunks):
            raise ValueError(
                f"The sampler state in the checkpoint is damaged: of {drawn!r} chunks, {chunks[:10]} are in flight, "
                f"with {len(rows)} x {len(rows[0]) if rows else 0} rows."
            )
        outside = [row for part in rows for row in part if type(row) is not int or not 0 <= row < size]
        if outside:
            raise ValueError(
                f"The sampler state in the checkpoint names row {outside[0]}, but the training dataset has {size} "
                "rows."
            )

    def _check_gradients(self, saved):
        """Raise an error unless these are sums of gradients of a chunk of this stream."""
        n, layout = self.layout.chunk_prompts, self.layout
        if saved is None:
            return
        try:
            numbers, rows, came, sums = (saved[name] for name in ("numbers", "rows", "came", "sums"))
            fits = numbers.shape == rows.shape == came.shape == (n,) and (numbers < self._next).all()
            fits = fits and sums.dtype == np.float32 and sums.ndim == 2 and len(sums) == n
            whole = fits and ((rows >= 0) & (rows < layout.pool_size)).all()
            whole = whole and ((came >= 0) & (came <= layout.group_size)).all()
        except (KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise ValueError(
                "The sampler state in the checkpoint is damaged: its sums of gradients are not those of a chunk of "
                f"{n} groups of {layout.group_size}. Resume from an earlier checkpoint."
            )


def _row(row) -> int:
    if isinstance(row, bool | np.bool_):  # which would count as row 0 or 1
        raise TypeError(f"{row!r} is no row")
    return operator.index(row)


def _called(schedule: str) -> str:
    """Name a schedule by its class, and as `LearnAlignConfig` calls it."""
    names = [name for name, kind in SCHEDULES.items() if kind.__name__ == schedule]
    return f"{schedule} (`schedule={names[0]!r}`)" if names else schedule


def _fixed(layout, was) -> str:
    """Explain why numbers of prompts cannot change, if one did."""
    names = [name for name in ("num_prompts", "warmup_prompts") if was.get(name) != getattr(layout, name)]
    return f"The length of an epoch follows from {' and '.join(f'`{name}`' for name in names)}. " if names else ""
