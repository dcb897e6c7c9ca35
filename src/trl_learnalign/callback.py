"""When to select, what the schedule is told, and what is logged."""

import hashlib
import logging
import time
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback

from .data.prompts import prompt_text
from .data.reading import has_transform, read_rows
from .ground.disk import DirectoryLock, initial_weights_of
from .ground.peers import Peers
from .host import find_host
from .report import trackers
from .run.layout import Layout
from .run.restart import check_restart, restart, save_initial_weights
from .run.state import CheckpointState
from .run.uploads import warn_of_uploads
from .sampler import LearnAlignSampler
from .selection.checks import check_selection
from .selection.result import Selection
from .selection.run import forget_measures, select_at_stage


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

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): the trainer. Its `_get_train_sampler` is replaced.
        sampler ([`LearnAlignSampler`]): a sampler that no other trainer uses.

    Raises:
        `ValueError`: the sampler has a trainer already, or see [`select_prompts`].
    """

    def __init__(self, trainer: Trainer, sampler: LearnAlignSampler):
        if not isinstance(sampler, LearnAlignSampler):
            raise TypeError(f"`sampler` must be a LearnAlignSampler, but is a {type(sampler).__name__}.")
        self.host = find_host(trainer)
        self.config, self.schedule = sampler.config, sampler.schedule
        with Peers(trainer.accelerator) as peers:  # what one process alone finds wrong ends all
            self.host.look_at_functions()
            self.host.check(self.config)
            if self.schedule.selects:
                check_selection(self.host, self.config)
            self.schedule.check(self.host)
            if self.config.after_warmup == "restart":
                check_restart(self.host)
            peers.wait()
        read = self.host.layout()
        prompts, warmup = self.schedule.prompts_per_epoch(read["pool_size"], read["chunk_prompts"])
        sampler.bind(Layout(**read, num_prompts=prompts, warmup_prompts=warmup))
        self.trainer = trainer
        self.sampler = sampler
        self.selections: list[Selection] = []
        self._pending = None  # the start chunk of a selection that is due
        self._lock = None
        self._checkpoints = CheckpointState(self.host, sampler)
        self.host.replace_sampler(self._train_sampler)
        self.host.on_rewards(self._observe, self._check_rows)
        self.host.before_checkpoint(lambda *where: self._checkpoints.write(*where, self._pending))
        self.host.add_tag("learnalign")

    def _train_sampler(self, dataset=None):
        size = len(self.trainer.train_dataset if dataset is None else dataset)
        if size != self.sampler.layout.pool_size:
            raise ValueError(
                f"The training dataset has {size} rows, but had {self.sampler.layout.pool_size} when the "
                "LearnAlignSampler was given to the trainer. Set the dataset first."
            )
        return self.sampler

    # The events of a run ----------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        self._pending = None
        self.host.look_at_functions()
        with Peers(self.trainer.accelerator) as peers:
            if self.trainer.accelerator.is_main_process and self._lock is None:
                self._lock = DirectoryLock(self._directory())
            saved = None
            if state.global_step > 0:
                saved, self._pending = self._checkpoints.read(state)
            else:
                self.sampler.reset()
                self._checkpoints.reset()
                self.schedule.check_length(state.max_steps)
            self.schedule.prepare(self.host, saved, peers)
            if saved is None:
                if self.schedule.due(0, state.max_steps, 0):
                    self._pending = 0
                elif self.config.after_warmup == "restart":
                    save_initial_weights(self.host, self._initial_file())
            self._say_plan(state)
            if saved is None:
                self.schedule.look(self.host, peers)
            peers.wait()
        warn_of_uploads(self.trainer, self.config)
        self._since = state.global_step, time.perf_counter()
        if self._pending is not None:
            self._select(state)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate's `set_epoch` does not reach the sampler of a resumed epoch
        self.sampler.set_epoch(state.global_step // self.sampler.layout.epoch_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_training_stop:  # later the trackers may be closed
            self._report()
        if self._pending is None and self.schedule.due(state.global_step, state.max_steps, self.sampler.cursor):
            self._pending = self.sampler.cursor
            if args.save_strategy != "no":
                control.should_save = True
            elif not control.should_training_stop:
                self._select(state)

    def on_save(self, args, state, control, **kwargs):
        self._report()
        if self._pending is None and self.selections:  # this checkpoint holds the last one
            forget_measures(self.host)
        if self._pending is not None and not control.should_training_stop:  # else the run that is resumed selects
            self._select(state)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._pending is not None:  # another callback cancelled the checkpoint
            self._select(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._report()
        if self._pending is None and self.selections:
            forget_measures(self.host)
        self._say_end()
        self.ended()

    def ended(self) -> None:
        """To be called when training has ended, finished or not."""
        self.host.note_functions()
        self.unlock()

    def unlock(self) -> None:
        """Lets other runs use the output directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # Selections -------------------------------------------------------------------------------------------------

    def _select(self, state):
        start, self._pending = self._pending, None
        self._say_estimate(state)
        stage = self.schedule.stage
        selection = select_at_stage(self.trainer, self.config, stage)
        if stage == 0 and start > 0 and self.config.after_warmup == "restart":
            restart(self.host, self._initial_file())
        if self.trainer.accelerator.is_main_process and not selection.indices:
            logger.warning("Training goes on with random prompts, as no prompt was chosen.")
        before = self._zero_variance()
        self.schedule.accept(start, selection.indices)
        self._checkpoints.selected(selection)
        self.selections.append(selection)
        # Not `self.trainer.log`, which flushes the metrics of the training batches gathered so far. A log event resets
        # `should_log`, which the step that just ended may have set for its own values
        due = self.trainer.control.should_log
        if self.trainer.accelerator.is_main_process:
            trackers.log_media(self.trainer, selection)
        values = trackers.log_values(selection, start * self.sampler.layout.chunk_prompts)
        Trainer.log(self.trainer, values if before is None else values | {"learnalign/zero_variance_before": before})
        self.trainer.control.should_log = due
        self._since = state.global_step, time.perf_counter()

    # The rewards of training ------------------------------------------------------------------------------------

    def _observe(self, batch, inputs, completions, rewards, trained):
        layout = self.sampler.layout
        chunk, groups = batch // layout.repeats, (layout.chunk_prompts, layout.group_size)
        if len(trained) == len(rewards) and not trained.all():
            self.schedule.masked(chunk, ~trained.reshape(groups))
        wanted = self.schedule.observe(chunk, rewards.reshape(*groups, -1))
        # The main process decides what is asked for: the others may have rounded otherwise
        if wanted := broadcast_object_list([wanted or {}])[0]:
            start = self.trainer.accelerator.process_index * len(inputs)  # of its rollouts; it may split a group
            firsts = first_rollouts(wanted, start, len(inputs), layout.group_size)
            own = {row: prompt_text(completions[at]) for row, at in firsts.items()}
            self.schedule.remember({row: text for part in gather_object([own]) for row, text in part.items()})
        for name, value in self.schedule.metrics().items():
            if np.isfinite(value):
                self.host.log_metric(f"learnalign/{name}", float(value))

    def _check_rows(self, batch, inputs) -> int:
        """
        A digest of the chunk's rows. Raises an error unless the rewards are those of the prompts that the schedule
        chose.
        """
        layout = self.sampler.layout
        chunk = batch // layout.repeats
        rows = self.sampler.drawn(chunk)
        start = self.trainer.accelerator.process_index * len(inputs)
        self._check_row(chunk, rows[start // layout.group_size], inputs[0])
        content = np.array([chunk, *rows], np.int64).tobytes()
        return int.from_bytes(hashlib.blake2b(content, digest_size=7).digest())

    def _check_row(self, chunk, row, found):
        """Not with a transform, which may make another prompt of the row each time."""
        if has_transform(self.host.dataset):
            return
        (expected,) = read_rows(self.host.dataset, [row])
        if "prompt" in expected and np.any(found["prompt"] != expected["prompt"]):
            raise RuntimeError(
                f"Training generated for another prompt than row {row}, which the schedule had chosen for chunk "
                f"{chunk}, so its rewards would be credited to the wrong prompts. Something between dataset and "
                "trainer changes the order of rows: use TRL's own dataloader."
            )

    # What is said and logged ------------------------------------------------------------------------------------

    def _say_end(self):
        if self.trainer.accelerator.is_main_process:
            lines, page = list(self.schedule.summary()), self._directory() / "report.html"
            if lines and page.is_file():
                lines.append(f"What was chosen and why: {page}")
            for line in lines:
                print(f"LearnAlign: {line}", flush=True)

    def _say_plan(self, state):
        if self.trainer.accelerator.is_main_process:
            for line in self.schedule.plan(state.global_step, state.max_steps, self._pending is not None):
                print(f"LearnAlign plan: {line}", flush=True)
            warning = self.schedule.warning(state.max_steps)
            if warning is not None and state.global_step == 0:
                logger.warning(warning)

    def _say_estimate(self, state):
        since, then = self._since
        line = self.schedule.estimate(state.global_step, since, time.perf_counter() - then)
        if line is not None and self.trainer.accelerator.is_main_process:
            print(line, flush=True)

    def with_zero_variance(self, logs: dict[str, float]) -> dict[str, float]:
        """
        `logs` with the mean share of groups of selected prompts that have no gradient, if `logs` are of training.
        """
        share = self._zero_variance() if self.schedule.in_use_from else None
        return logs if share is None or "loss" not in logs else logs | {"learnalign/zero_variance_after": share}

    def _zero_variance(self):
        """Mean share of groups without a gradient since the last selection took effect, or since the start."""
        history = self.trainer.state.log_history
        return trackers.zero_variance(history, self.sampler.layout, self.schedule.in_use_from or 0)

    def _report(self):
        """Writes the schedule's report. A failure to write it does not end the run."""
        if not self.config.write_report:
            return
        try:
            self.schedule.report(self.host, self._directory())
        except Exception as error:
            logger.warning(f"The report of the schedule could not be written ({error!r}). Training goes on.")

    def _directory(self):
        return Path(self.trainer.args.output_dir) / "learnalign"

    def _initial_file(self):
        return initial_weights_of(self._directory())


def first_rollouts(places: dict[int, int], start: int, number: int, group_size: int) -> dict[int, int]:
    """
    Of the groups at these places of a chunk those whose first rollout is among the `number` of this process, which
    begin at `start`; with its place among them. A group may be on several processes.
    """
    firsts = {row: place * group_size - start for row, place in places.items()}
    return {row: at for row, at in firsts.items() if 0 <= at < number}
