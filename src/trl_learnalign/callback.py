"""When to select, what a checkpoint stores about it, and what is logged."""

import logging
import math
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback

from . import plan, trackers
from .config import FREE_ON_RESUME
from .disk import DirectoryLock, digest, make_directory, write_atomically
from .host import find_host
from .layout import Layout
from .peers import Peers
from .sampler import LearnAlignSampler
from .selection import Selection, dataset_fingerprint
from .selector import select_at_stage


logger = logging.getLogger(__name__)

# Key of the state in `TrainerState.stateful_callbacks`, and so in `trainer_state.json`: state and step are written
# together, so every checkpoint has both. It must not be the name of a callback class, else Trainer would try to
# build a callback from it.
STATE_KEY = "learnalign"


class LearnAlignCallback(TrainerCallback):
    r"""
    Makes a trainer already built train on the prompts that LearnAlign selects.

    ```python
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config)))
    ```

    A selection is due after the optimizer step that ends the warm-up, and again after every `reselect_every` passes.
    The dataloader has then drawn some batches already, so the new prompts start with the next undrawn chunk. If the
    trainer saves checkpoints, one is saved first: a run killed in a selection resumes into the same selection.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): the trainer. Its `_get_train_sampler` is replaced.
        sampler ([`LearnAlignSampler`]): a sampler of no other trainer.

    Raises:
        `ValueError`: the sampler has a trainer already, or see [`select_prompts`].
    """

    def __init__(self, trainer: Trainer, sampler: LearnAlignSampler):
        if not isinstance(sampler, LearnAlignSampler):
            raise TypeError(f"`sampler` must be a LearnAlignSampler, but is a {type(sampler).__name__}.")
        self.host = find_host(trainer)
        self.host.check(sampler.config)
        self.config = sampler.config
        if self.config.after_warmup == "restart" and self.host.is_sharded:
            raise ValueError(
                "`after_warmup='restart'` is not supported with FSDP or DeepSpeed, which keep weights of their own. Use "
                "`after_warmup='continue'`."
            )
        sampler.bind(_layout(self.host, sampler.config))
        self._fingerprint = dataset_fingerprint(trainer.train_dataset)
        self.trainer = trainer
        self.sampler = sampler
        self.selections: list[Selection] = []
        self._pending = None  # the start chunk of a selection that is due
        self._lock = None
        self.host.replace_sampler(self._train_sampler)
        self.host.add_tag("learnalign")

    def _train_sampler(self, dataset=None):
        size = len(self.trainer.train_dataset if dataset is None else dataset)
        if size != self.sampler.layout.pool_size:
            raise ValueError(
                f"The training dataset has {size} rows, but had {self.sampler.layout.pool_size} when the "
                "LearnAlignSampler was given to the trainer. Set the dataset first."
            )
        return self.sampler

    def on_train_begin(self, args, state, control, **kwargs):
        self._pending = None
        with Peers(self.trainer.accelerator) as peers:
            if self.trainer.accelerator.is_main_process and self._lock is None:
                self._lock = DirectoryLock(self._directory())
            if state.global_step > 0:
                self._resume(args, state)
            else:
                self._check_warmup(state)
                self.sampler.reset()
                if self.config.warmup_prompts == 0:
                    self._pending = 0
                elif self.config.after_warmup == "restart":
                    self._save_initial_weights()
            peers.wait()
        self._record(state)
        self._say_plan(state)
        self._since = state.global_step, time.perf_counter()
        if self._pending is not None:
            self._select(state)

    def _say_plan(self, state):
        if not self.trainer.accelerator.is_main_process:
            return
        layout, due = self.sampler.layout, self._pending is not None
        lines = plan.plan_lines(
            layout, self.config, state.max_steps, state.global_step, self.sampler.schedule.log, due
        )
        print("\n".join(lines), flush=True)
        warning = plan.warmup_warning(layout, state.max_steps)
        if warning is not None and state.global_step == 0:
            logger.warning(warning)

    def _say_estimate(self, state):
        if self.trainer.accelerator.is_main_process and self.config.score != "random":
            since, then = self._since
            seconds = time.perf_counter() - then
            line = plan.estimate_line(self.sampler.layout, self.config, state.global_step, since, seconds)
            print(line, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.unlock()

    def with_zero_variance(self, logs: dict[str, float]) -> dict[str, float]:
        """`logs` with the mean share of groups of selected prompts that have no gradient, if `logs` are of training."""
        share = self._zero_variance() if self.sampler.schedule.log and self.sampler.schedule.log[-1].indices else None
        return logs if share is None or "loss" not in logs else logs | {"learnalign/zero_variance_after": share}

    def _zero_variance(self):
        """Mean share of groups without a gradient since the last selection took effect, or since the start."""
        history = self.trainer.state.log_history
        return trackers.zero_variance(history, self.sampler.layout, self.sampler.schedule.log[-1].start_chunk)

    def unlock(self) -> None:
        """Lets other runs use the output directory."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def on_epoch_begin(self, args, state, control, **kwargs):
        # Accelerate's `set_epoch` does not reach the sampler of a resumed epoch
        self.sampler.set_epoch(state.global_step // self.sampler.layout.epoch_steps)

    def on_step_end(self, args, state, control, **kwargs):
        if self._pending is None and self._is_due(state):
            self._pending = self.sampler.cursor
            self._record(state)
            if args.save_strategy == "no":
                self._select(state)
            else:
                control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self._pending is not None:
            self._select(state)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._pending is not None:  # another callback cancelled the checkpoint
            self._select(state)

    def _is_due(self, state):
        layout, last = self.sampler.layout, self.sampler.schedule.log[-1]
        if len(self.sampler.schedule.log) == 1:
            target = layout.warmup_chunks
        elif self.config.reselect_every is not None:
            prompts = self.config.reselect_every * (len(last.indices) or layout.num_prompts)
            target = last.start_chunk + max(1, math.ceil(prompts / layout.chunk_prompts))
        else:
            return False
        used = self.sampler.cursor * layout.repeats < layout.batches_trained(state.max_steps)
        return used and layout.chunks_trained(state.global_step) >= target

    def _check_warmup(self, state):
        layout = self.sampler.layout
        if layout.warmup_prompts == 0:
            return
        if layout.warmup_end * layout.repeats >= layout.batches_trained(state.max_steps):
            prompts = layout.batches_trained(state.max_steps) / layout.repeats * layout.chunk_prompts
            raise ValueError(
                f"The warm-up of {layout.warmup_prompts} prompts takes {layout.warmup_end * layout.chunk_prompts} with "
                f"what the dataloader reads ahead, but the whole run of {state.max_steps} steps holds {prompts:.0f}: "
                "nothing would be left for the selection. Lower `warmup_prompts` or raise `max_steps` (or "
                "`num_train_epochs`)."
            )

    def _select(self, state):
        start, self._pending = self._pending, None
        self._say_estimate(state)
        first = len(self.sampler.schedule.log) == 1
        selection = select_at_stage(self.trainer, self.config, len(self.sampler.schedule.log) - 1)
        if first and start > 0 and self.config.after_warmup == "restart":
            self._restart()
        if self.trainer.accelerator.is_main_process and not selection.indices:
            logger.warning("Training goes on with random prompts, as no prompt was chosen.")
        before = self._zero_variance()
        self.sampler.append(start, selection.indices)
        self.selections.append(selection)
        self._record(state)
        # Not `self.trainer.log`, which flushes the metrics of the training batches gathered so far. A log event resets
        # `should_log`, which the step that just ended may have set for its own values
        due = self.trainer.control.should_log
        if self.trainer.accelerator.is_main_process:
            trackers.log_media(self.trainer, selection)
        values = trackers.log_values(selection, start * self.sampler.layout.chunk_prompts)
        Trainer.log(self.trainer, values if before is None else values | {"learnalign/zero_variance_before": before})
        self.trainer.control.should_log = due
        self._since = state.global_step, time.perf_counter()

    # What a checkpoint holds ------------------------------------------------------------------------------------

    def _record(self, state):
        content = {
            "sampler": self.sampler.state_dict(),
            "pending": self._pending,
            "dataset_fingerprint": self._fingerprint,
            "num_processes": self.trainer.accelerator.num_processes,
            "config": self.config.to_dict(),
        }
        state.stateful_callbacks[STATE_KEY] = content | {"sha256": digest(content)}

    def _resume(self, args, state):
        if args.ignore_data_skip:
            raise ValueError(
                "`ignore_data_skip=True` starts the epoch over, so the resumed run would train on other prompts than the "
                "first. Leave it out: skipping data generates nothing."
            )
        saved = state.stateful_callbacks.get(STATE_KEY)
        if not isinstance(saved, dict):
            raise ValueError(
                f"The checkpoint of step {state.global_step} holds no LearnAlign state, so it was written by a run "
                "without LearnAlign. Resume without the sampler, or start a new run from its weights."
            )
        content = {name: value for name, value in saved.items() if name != "sha256"}
        if saved.get("sha256") != digest(content) or not {"sampler", "pending", "dataset_fingerprint"} <= saved.keys():
            raise ValueError(
                f"The LearnAlign state in the checkpoint of step {state.global_step} is damaged: it does not agree with its "
                "checksum. Resume from an earlier checkpoint."
            )
        self.sampler.load_state_dict(saved["sampler"])
        if saved["dataset_fingerprint"] != self._fingerprint:
            raise ValueError(
                "The training dataset has other rows, or the same in another order, than when the checkpoint was written, "
                "so its selection would name the wrong prompts. Resume with the same dataset, or start a new run."
            )
        self._check_config(saved.get("config", self.config.to_dict()))  # version 0.1.0 did not record it
        self._pending = saved["pending"]

    def _check_config(self, saved):
        changes = {
            name: f"`{name}` was {was!r} and is {now!r}"
            for name, (was, now) in self.config.changes(saved).items()
            if name not in ("num_prompts", "warmup_prompts")  # the sampler compares them
        }
        refused = [text for name, text in changes.items() if name not in FREE_ON_RESUME]
        if refused:
            raise ValueError(
                f"The LearnAlignConfig is not that of the checkpoint: {'; '.join(refused)}. The selections so far were made with "
                "the old values. Resume with these, or start a new run in another `output_dir` (with the weights of this one, "
                f"if you like). On resuming, only {', '.join(f'`{name}`' for name in FREE_ON_RESUME)} may change."
            )
        if "reselect_every" in changes and self.trainer.accelerator.is_main_process:
            logger.warning(f"{changes['reselect_every']}: the selections to come follow the new value.")

    # Going back to the start ------------------------------------------------------------------------------------

    def _directory(self):
        return Path(self.trainer.args.output_dir) / "learnalign"

    def _initial_file(self):
        return self._directory() / "initial.safetensors"

    def _trainable(self):
        return {name: parameter for name, parameter in self.host.model.named_parameters() if parameter.requires_grad}

    def _save_initial_weights(self):
        if self.trainer.optimizer.optimizer.state:
            raise ValueError(
                "`after_warmup='restart'` starts over with a fresh optimizer, but the optimizer given to the trainer "
                "has a state already. Pass a fresh one, or use `after_warmup='continue'`."
            )
        if self.trainer.accelerator.is_main_process:
            make_directory(self._directory())
            tensors = {name: parameter.detach().cpu().contiguous() for name, parameter in self._trainable().items()}
            write_atomically(self._initial_file(), lambda temporary: save_file(tensors, temporary))

    def _restart(self):
        """The weights and the (empty) optimizer state of the first step. The learning rate goes on by its schedule."""
        saved = {}
        with Peers(self.trainer.accelerator) as peers:
            if self.trainer.accelerator.is_main_process:
                if not self._initial_file().is_file():
                    raise FileNotFoundError(
                        f"'{self._initial_file()}' is missing, which holds the weights that `after_warmup='restart'` goes "
                        "back to. Put it back, or start a new run."
                    )
                saved = load_file(self._initial_file())
            peers.wait()
        with torch.no_grad():
            for name, parameter in self._trainable().items():
                if saved:
                    parameter.copy_(saved[name])
                broadcast(parameter.data)
        self.trainer.optimizer.optimizer.state.clear()
        self.host.weights_were_set()


def _layout(host, config) -> Layout:
    read = host.layout()
    prompts = min(config.num_prompts, read["pool_size"])
    return Layout(**read, num_prompts=prompts, warmup_prompts=config.warmup_prompts)
