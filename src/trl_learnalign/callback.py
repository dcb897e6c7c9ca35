"""When to select, and what a run's checkpoints hold: the events of a training, and a handle on it."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from .ground.disk import DirectoryLock, initial_weights_of
from .ground.peers import Peers
from .host import check_kind, find_host
from .report import trackers
from .report.selecting import select_at_stage
from .run.restart import check_restart, restart, save_initial_weights
from .run.uploads import Files, warn_of_uploads
from .sampler import LearnAlignSampler
from .schedules import Describes, OnlineSchedule, Schedule
from .schedules.announcer import Announcer
from .schedules.base import Selects, Ticks
from .schedules.checkpoint import CheckpointState
from .schedules.stream import Stream, open_stream
from .schedules.tap import GroupTap
from .selection.checks import check_selection
from .selection.result import Selection
from .selection.run import forget_measures


logger = logging.getLogger(__name__)


class LearnAlignCallback(TrainerCallback):
    r"""
    Makes an existing trainer train on the prompts that a schedule chooses.

    ```python
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config)))
    ```

    With `schedule="staged"` a selection is due after the optimizer step that ends the warm-up, and again after every
    `reselect_every` passes. The dataloader has read some batches ahead by then, so the new prompts start with the
    next chunk. If the trainer saves checkpoints, one is saved first: a run killed in a selection resumes into the
    same selection.

    With `schedule="online"` there is no selection: the schedule receives the rewards of training and chooses each
    chunk.

    The trainer gets the attribute `learnalign`, a [`LearnAlignHandle`].

    Args:
        trainer (`Trainer`): any that a [`Host`] serves, such as [`~trl.GRPOTrainer`]. Its `_get_train_sampler` is
            replaced.
        sampler ([`LearnAlignSampler`]): a sampler that no other trainer uses.

    Attributes:
        selections (`list[Selection]`): those made since this process began, oldest first.
        pending (`int`, *optional*): the start chunk of a selection that is due and not yet made.

    Raises:
        `ValueError`: the sampler has a trainer already, or see [`select_prompts`].
    """

    def __init__(self, trainer: Trainer, sampler: LearnAlignSampler):
        if not isinstance(sampler, LearnAlignSampler):
            raise TypeError(f"`sampler` must be a LearnAlignSampler, but is a {type(sampler).__name__}.")
        self.trainer, self.sampler, self.config = trainer, sampler, sampler.config
        check_kind(type(trainer))
        self.host = find_host(trainer)
        with Peers(trainer.accelerator) as peers:  # what one process alone finds wrong ends all
            self.host.look_at_functions()
            self.host.check(self.config)
            make = sampler.makes_schedule
            known = isinstance(make, type) and issubclass(make, Selects)
            if known:  # before anything else is found wrong with the trainer
                check_selection(self.host, self.config)
            stream = open_stream(make, self.host, self.config)
            if stream.selects is not None and not known:
                check_selection(self.host, self.config)
            if self.config.after_warmup == "restart":
                check_restart(self.host)
            peers.wait()
        sampler.bind(stream)
        self.selections: list[Selection] = []
        self.pending: int | None = None
        self._lock: DirectoryLock | None = None
        self._checkpoints = CheckpointState(self.host, self.config, stream)
        self._tap = GroupTap(self.host, self.config)
        self._begin(stream)
        self._untouched = True  # no run has used this stream
        self.host.replace_sampler(self._train_sampler)
        self.host.before_checkpoint(self._write_state)
        self.host.add_tag("learnalign")
        with_handle: Any = trainer
        with_handle.learnalign = LearnAlignHandle(self)

    def _train_sampler(self, dataset=None):
        size = len(self.trainer.train_dataset if dataset is None else dataset)
        if size != self.sampler.layout.pool_size:
            raise ValueError(
                f"The training dataset has {size} rows, but had {self.sampler.layout.pool_size} when the "
                "LearnAlignSampler was given to the trainer. Set the dataset first."
            )
        return self.sampler

    def _write_state(self, directory: Path, is_writer: bool, peers: Peers) -> None:
        self._tap.before_checkpoint(peers)
        self._checkpoints.write(directory, is_writer, peers, self.pending)

    def _begin(self, stream: Stream) -> None:
        """Hand the draws of a run to all who work with them."""
        self.sampler.begin(stream)
        self._checkpoints.begin(stream)
        self._tap.stream = stream
        self.announcer = Announcer(self.host, self.config, stream)

    @property
    def schedule(self) -> Schedule:
        """The schedule of the run."""
        return self.sampler.schedule

    @property
    def selects(self) -> Selects | None:
        """The schedule, if selections are made for it."""
        return self.sampler.stream.selects

    def warn_of_uploads(self, now: bool = False) -> None:
        """Warn of files with prompts that are uploaded, by the schedule that runs; see [`warn_of_uploads`]."""
        kinds: dict[type, Files] = {OnlineSchedule: "online", Selects: "selections", Describes: "report"}
        files: Files = next((files for kind, files in kinds.items() if isinstance(self.schedule, kind)), "none")
        warn_of_uploads(self.trainer, self.config, now, files)

    # The events of a run ----------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self.pending = None
        self.host.look_at_functions()
        with Peers(self.trainer.accelerator) as peers:
            if self.trainer.accelerator.is_main_process and self._lock is None:
                self._lock = DirectoryLock(self.announcer.directory)
            if not self._untouched:  # of a run before, whose schedule this one must not know
                self._begin(open_stream(self.sampler.makes_schedule, self.host, self.config, self.schedule))
            self._untouched = False
            prepares, saved = self.sampler.stream.prepares, None
            if state.global_step > 0:
                saved, self.pending = self._checkpoints.read(state)
            else:
                prepares.check_length(state.max_steps)
            prepares.prepare(self.host, saved, peers)
            if saved is not None:
                self.schedule.load_state_dict(saved)
            elif self._due(0, state.max_steps):
                self.pending = 0
            elif self.config.after_warmup == "restart":
                save_initial_weights(self.host, self._initial_file())
            self.announce(state)
            if saved is None:
                prepares.look(self.host, peers)
            self._tap.begin(state.global_step)
            peers.wait()
        self.warn_of_uploads()
        self.announcer.count_from(state.global_step)
        if self.pending is not None:
            self.select(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate's `set_epoch` does not reach the sampler of a resumed epoch
        self.sampler.set_epoch(state.global_step // self.sampler.layout.epoch_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if isinstance(self.schedule, Ticks):
            self.schedule.tick(1)
        if control.should_training_stop:  # later the trackers may be closed
            self.announcer.report()
        if self.pending is None and self._due(state.global_step, state.max_steps):
            self.pending = self.sampler.stream.drawn
            if args.save_strategy != "no":
                control.should_save = True
            elif not control.should_training_stop:
                self.select(state)

    def on_save(self, args, state, control, **kwargs):
        self.announcer.report()
        if self.pending is None and self.selections:  # this checkpoint holds the last one
            forget_measures(self.host)
        if self.pending is not None and not control.should_training_stop:  # else the run that is resumed selects
            self.select(state)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.pending is not None:  # another callback cancelled the checkpoint
            self.select(state)

    def on_train_end(self, args, state, control, **kwargs):
        self.announcer.report()
        if self.pending is None and self.selections:
            forget_measures(self.host)
        self.announcer.end()
        self.ended()

    def ended(self) -> None:
        """Note that training has ended, finished or not: other runs may use the output directory."""
        self._tap.end()
        self.host.note_functions()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # For subclasses to override ----------------------------------------------------------------------------------

    def announce(self, state: TrainerState) -> None:
        """Print the plan when training begins, and warn of what is odd in a new run."""
        plan = self.announcer.plan(state.global_step, state.max_steps, self.pending is not None)
        warning = None if state.global_step else self.announcer.describes.warning(state.max_steps)
        self.announcer.begin(plan, warning)

    def select(self, state: TrainerState) -> None:
        """Make the selection that is `pending`, and hand it to the schedule."""
        start, self.pending = self.pending, None
        selects = self.selects
        assert start is not None and selects is not None  # else nothing is pending
        self.announcer.estimate(state.global_step)
        stage = selects.stage
        selection = select_at_stage(self.trainer, self.config, stage)
        if stage == 0 and start > 0 and self.config.after_warmup == "restart":
            restart(self.host, self._initial_file())
        if self.trainer.accelerator.is_main_process and not selection.indices:
            logger.warning("Training goes on with random prompts, as no prompt was chosen.")
        before = self._zero_variance(selects)
        selects.accept(start, selection.indices)
        self._checkpoints.selected(selection)
        self.selections.append(selection)
        self._log(selection, start, before)
        self.announcer.count_from(state.global_step)

    # Selections -------------------------------------------------------------------------------------------------

    def _due(self, step, max_steps) -> bool:
        return self.selects is not None and self.selects.due(step, max_steps, self.sampler.stream.drawn)

    def _log(self, selection: Selection, start: int, before: float | None) -> None:
        # Not `self.trainer.log`, which flushes the metrics of the training batches gathered so far. A log event resets
        # `should_log`, which the step that just ended may have set for its own values
        control: TrainerControl = self.trainer.control
        due = control.should_log
        if self.trainer.accelerator.is_main_process:
            trackers.log_media(self.trainer, selection)
        values = trackers.log_values(selection, start * self.sampler.layout.chunk_prompts)
        Trainer.log(self.trainer, values if before is None else values | {"learnalign/zero_variance_before": before})
        self.trainer.control.should_log = due

    def with_zero_variance(self, logs: dict[str, float]) -> dict[str, float]:
        """
        Return `logs` with the mean share of groups of selected prompts that have no gradient, if `logs` are of
        training.
        """
        selects = self.selects
        share = self._zero_variance(selects) if selects is not None and selects.in_use_from else None
        return logs if share is None or "loss" not in logs else logs | {"learnalign/zero_variance_after": share}

    def _zero_variance(self, selects: Selects) -> float | None:
        """Return the mean share of groups without a gradient since the last selection took effect, or the start."""
        history = self.trainer.state.log_history
        return trackers.zero_variance(history, self.sampler.layout, selects.in_use_from or 0)

    def _initial_file(self):
        return initial_weights_of(self.announcer.directory)


class LearnAlignHandle:
    """
    A trainer's prompts: `trainer.learnalign`.

    Args:
        callback ([`LearnAlignCallback`]): of the trainer.
    """

    def __init__(self, callback: LearnAlignCallback):
        self._callback = callback

    @property
    def schedule(self) -> Schedule:
        """The schedule of the run under way, or of the last one. Every run makes a new schedule."""
        return self._callback.schedule

    @property
    def selections(self) -> list[Selection]:
        """The selections made since this process began, oldest first."""
        return list(self._callback.selections)

    def report(self) -> Path | None:
        """
        Write the report about the run as it is now, whatever `write_report` says.

        Returns:
            `Path`, *optional*: the HTML file; `None` where there is nothing to report yet, and on other processes than
            the main one.
        """
        return self._callback.announcer.write_report()
