"""TRL's asynchronous trainer with a `train_sampler`: its prompts chosen online, in any order of the groups."""

import logging
from collections.abc import Sequence
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import TrainerCallback

from .curriculum.events import Draw, Group
from .curriculum.feed import FINISHED, Ledger, Replica
from .ground.disk import DirectoryLock
from .ground.peers import Peers
from .host import check_kind, find_host
from .run.trains import TrainsOnPrompts
from .run.uploads import warn_of_uploads
from .sampler import LearnAlignSampler, check_sampler
from .schedules import OnlineSchedule
from .schedules.announcer import Announcer
from .schedules.async_checkpoint import AsyncCheckpoint
from .schedules.stream import open_stream


if TYPE_CHECKING:
    from .host.async_grpo import AsyncGRPOHost

logger = logging.getLogger(__name__)

NO_GRADIENTS = "the asynchronous trainer packs the rows of several groups into one sequence"


class LearnAlignAsyncMixin(TrainsOnPrompts):
    r"""
    Gives TRL's AsyncGRPOTrainer (or a subclass of yours) the argument `train_sampler`:

    ```python
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    class MyTrainer(LearnAlignAsyncMixin, AsyncGRPOTrainer): ...

    trainer = MyTrainer(..., train_sampler=LearnAlignSampler(LearnAlignConfig(schedule="online")))
    ```

    Every prompt is chosen when the rollout worker has room for it, and every group counts when its rewards are known,
    in any order. Groups without a gradient are dropped before training gets them, unless `drop_dead_groups=False`. A
    checkpoint holds the prompts whose groups were not trained on yet, and a resumed run generates these first.

    Args:
        train_sampler ([`LearnAlignSampler`], *optional*): with `schedule="online"`. Without a sampler the trainer does
            not change. All other arguments are passed to the trainer.

    Attributes:
        learnalign ([`AsyncHandle`]): the schedule of the run, and its report. `None` without a sampler.
    """

    learnalign: "AsyncHandle"
    _learnalign: "AsyncRun | None"

    def __init__(self, *args, train_sampler: LearnAlignSampler | None = None, **kwargs):
        if train_sampler is not None:
            check_sampler(train_sampler)
            check_kind(type(self), asynchronous=True)
        super().__init__(*args, **kwargs)
        self.learnalign = None  # type: ignore[assignment]  # who asks for it has given a sampler
        self._learnalign = None
        if train_sampler is not None:
            self._learnalign = AsyncRun(self, train_sampler)
            self.learnalign = AsyncHandle(self._learnalign)

    def training_step(self, *args, **kwargs):
        """Train on a microbatch as the trainer does, and note which groups it had."""
        output = super().training_step(*args, **kwargs)
        if self._learnalign is not None:
            self._learnalign.trained()
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the trainer does, with the values of the schedule."""
        if self._learnalign is not None and self.is_in_train:
            logs = self._learnalign.with_metrics(logs)
        super().log(logs, *args, **kwargs)


class AsyncHandle:
    """
    The prompts of an asynchronous trainer: `trainer.learnalign`. A rollout worker of your own (`rollout_worker=`) asks
    it for prompts and hands finished groups back, in the main process:

    ```python
    draw = trainer.learnalign.choose(1)[0]  # in the worker, when it has room for a prompt
    ...  # generate for `trainer.train_dataset[draw.row]`, with `group_id=draw.number` in every sample
    trainer.learnalign.observe(Group(draw.number, draw.row, rewards), samples=8)  # samples that it puts in the queue
    ```

    Args:
        run ([`AsyncRun`]): of the trainer.
    """

    def __init__(self, run: "AsyncRun"):
        self._run = run

    @property
    def schedule(self) -> OnlineSchedule:
        """The schedule of the run under way, or of the last one."""
        return self._run.schedule

    def choose(self, number: int) -> list[Draw]:
        """Choose the next prompts, for a rollout worker of your own; first those that a resumed run has left open."""
        return self._run.choose(number)

    def observe(self, group: Group, samples: int) -> None:
        """
        Learn from a finished group, for a rollout worker of your own.

        Args:
            group ([`Group`]): with the number of its draw.
            samples (`int`): rows that the worker puts into its queue for the group; 0 if it drops the group.
        """
        self._run.observe(group, samples)

    def report(self) -> Path | None:
        """Write the report about the run as it is now; return the HTML file, `None` where there is nothing yet."""
        return self._run.report()


class _Whole:
    """The schedule, as a [`Replica`] wants a curriculum."""

    def __init__(self, schedule: OnlineSchedule):
        self.schedule = schedule
        self.asks_for, self.remember = schedule.curriculum.asks_for, schedule.curriculum.remember
        self.tick = schedule.tick

    def choose(self, n: int) -> list[Draw]:
        first = self.schedule.curriculum.drawn
        return [Draw(first + place, row) for place, row in enumerate(self.schedule.choose(n))]

    def observe(self, groups: Sequence[Group]) -> None:
        self.schedule.observe(groups)


class AsyncRun(TrainerCallback):
    """
    The runs of an asynchronous trainer. The worker draws and learns in its own process; its events are done again
    here, on the main process, so that there is a state for checkpoints, the log and the report.

    Args:
        trainer: an AsyncGRPOTrainer.
        sampler ([`LearnAlignSampler`]): with `schedule="online"`.

    Raises:
        `ValueError`: another schedule than the online one, or a trainer with which no prompts can be chosen.
    """

    def __init__(self, trainer: Any, sampler: LearnAlignSampler):
        self.trainer, self.config = trainer, sampler.config
        self.host: AsyncGRPOHost = find_host(trainer)  # type: ignore[assignment]
        if self.config.schedule != "online":
            raise ValueError(
                f"`schedule={self.config.schedule!r}` cannot choose while {type(trainer).__name__} generates: its "
                "rollout worker never stops. Use `schedule='online'`; or select before training (`trl-learnalign "
                "select`), and train on the rows that the selection names."
            )
        if self.config.save_rollouts:
            raise ValueError(
                f"`save_rollouts` is True, but the completions of {type(trainer).__name__} stay with its rollout "
                "worker. Leave it out, or train with GRPOTrainer."
            )
        with Peers(trainer.accelerator) as peers:  # what one process alone finds wrong ends all
            self.host.share(peers)
            self.host.check(self.config)
            stream = open_stream(sampler.makes_schedule, self.host, self.config)
            self._check(stream.schedule)
            peers.wait()
        sampler.bind(stream)
        self.sampler, self.stream = sampler, stream
        self.announcer = Announcer(self.host, self.config, stream)
        self.is_main = trainer.accelerator.is_main_process
        self._checkpoint = AsyncCheckpoint(self.host, self.config)
        self.ledger = Ledger()
        self.queue = self.host.take_queue(self.ledger) if self.is_main else None
        self.replica: Replica | None = None
        self._waiting: list[Draw] = []  # of a resumed run, for a worker of the user's
        self._turn = RLock()  # a worker of the user's asks from a thread of its own
        self._began = False
        self._lock: DirectoryLock | None = None
        self._events: Any = None
        self.host.before_checkpoint(self._write)
        self.host.add_tag("learnalign")
        # Before TRL's own callbacks, which start the worker
        trainer.callback_handler.callbacks.insert(0, self)

    def _check(self, schedule):
        if not isinstance(schedule, OnlineSchedule):
            raise TypeError(
                f"`schedule` made a {type(schedule).__name__}, but the asynchronous trainer runs the online schedule "
                "alone. Leave `schedule` out, or derive your class from OnlineSchedule."
            )

    @property
    def schedule(self) -> OnlineSchedule:
        return self.stream.schedule  # type: ignore[return-value]  # checked

    # Training ---------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Look at the prompts, restore a resumed run, and tell the worker how to draw."""
        if self._began:
            raise RuntimeError(
                "This trainer has trained before, and its queue still holds samples of that run. Make a new trainer; "
                "with `resume_from_checkpoint` it goes on."
            )
        self._began = True
        self.warn_of_uploads()
        schedule = self.schedule
        with self.host.plain_attention(), Peers(self.trainer.accelerator) as peers:
            if self.is_main:
                self._lock = DirectoryLock(self.announcer.directory)
            saved = self._checkpoint.read(state) if state.global_step else None
            schedule.prepare(self.host, None if saved is None else saved["schedule"], peers)
            self.announcer.begin(self.announcer.plan(state.global_step, self.host.max_steps, False))
            if saved is None:
                schedule.look(self.host, peers)
            else:
                schedule.load_state_dict(saved["schedule"])
                self.ledger.load_state_dict(saved["ledger"])
            if schedule.gradient_dim is not None:
                schedule.no_gradients(NO_GRADIENTS)
            peers.wait()
        if self.is_main:
            self.replica = Replica(_Whole(schedule), self.ledger)
            self.host.resume_epochs(self.ledger.done)
            self._waiting = self.ledger.draws()
            if self.host.has_own_worker:
                self._hand_over()

    def _hand_over(self):
        from .host.async_grpo import Recipe

        self._events = self.host.worker._mp_ctx.Queue()
        steps = self.trainer.args.weight_sync_steps
        curriculum, drop = self.schedule.curriculum, self.config.drop_dead_groups
        curriculum.read_with(self.host.reader(self.config))
        self.host.hand_over(Recipe(curriculum, self._waiting, self._events, drop, steps))

    def warn_of_uploads(self, now: bool = False) -> None:
        """Warn of files with prompts that are uploaded; see [`warn_of_uploads`]."""
        warn_of_uploads(self.trainer, self.config, now, "online")

    def ended(self) -> None:
        """Note that training has ended, finished or not: other runs may use the output directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def choose(self, number: int) -> list[Draw]:
        with self._turn:
            draws, self._waiting = self._waiting[:number], self._waiting[number:]
            if len(draws) < number:
                new = self._begun.curriculum.choose(number - len(draws))
                self.ledger.chose((draw.number, draw.row) for draw in new)
                draws += new
            return draws

    def observe(self, group: Group, samples: int) -> None:
        with self._turn:
            self._begun.curriculum.observe([group])
            self.ledger.finished(group.number, samples)
            self._count(group, samples)

    @property
    def _begun(self) -> Replica:
        if self.replica is None:
            raise RuntimeError(
                "There is no schedule yet: it looks at the prompts when training begins, on the main process. Ask for "
                "prompts once the worker's `start` was called."
            )
        return self.replica

    def _count(self, group, samples):
        if not samples and self.queue is not None:
            self.queue.counted.add(group.number)  # an epoch is so many prompts, whether they were live or not

    def trained(self) -> None:
        """Note that a microbatch was trained on."""
        with self._turn:
            if self.queue is not None:
                self.queue.trained()

    def on_step_end(self, args, state, control, **kwargs):
        """Do what the worker did."""
        self._catch_up()
        if self._events is None and self.replica is not None:  # the worker's own ticks come with its events
            with self._turn:
                self.replica.curriculum.tick(1)

    def _catch_up(self, whole=False):
        if self._events is None or self.replica is None:
            return
        from .host.async_grpo import drained

        replica, ledger = self.replica, self.ledger

        def apply(event):
            replica.apply(event)
            if event[0] == FINISHED:
                self._count(*event[1])

        drained(self._events, apply, (lambda: ledger.is_behind) if whole else (lambda: False))

    def on_save(self, args, state, control, **kwargs):
        """Write the report with every checkpoint."""
        with self._turn:
            self.announcer.report()

    def on_train_end(self, args, state, control, **kwargs):
        """Do what the worker did until the end, and write the report."""
        self._catch_up()
        self.announcer.report()
        self.announcer.end()

    def with_metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """Return `logs` with the values of the schedule, if they are of training."""
        if "loss" not in logs or not self.is_main:
            return logs
        self._catch_up()
        with self._turn:
            found = self.schedule.metrics().items()
            return logs | {f"learnalign/{name}": value for name, value in found if np.isfinite(value)}

    def report(self) -> Path | None:
        self._catch_up()
        with self._turn:
            return self.announcer.write_report()

    # Checkpoints ------------------------------------------------------------------------------------------------

    def _write(self, directory: Path, is_writer: bool, peers: Peers) -> None:
        """Write the state into a checkpoint; what was not trained on is generated again by a resumed run."""
        state = None
        if self.is_main:
            self._catch_up(whole=True)
            with self._turn:
                state = {"schedule": self.schedule.state_dict(), "ledger": self.ledger.state_dict()}
        files = self.schedule.write_files(directory, self.is_main)
        self._checkpoint.write(directory, peers, state, files)
