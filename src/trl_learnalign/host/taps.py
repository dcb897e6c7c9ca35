"""Reports events of a running training: its rewards, and that a checkpoint is being written."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..peers import Peers
from .generation import SELECTING


Undo = Callable[[], None]
RewardObserver = Callable[[int, list[dict], list, np.ndarray], None]
CheckpointWriter = Callable[[Path, bool, Peers], None]


def observe_rewards(trainer: Trainer, observer: RewardObserver) -> Undo:
    """
    Calls `observer(batch_in_run, inputs, completions, rewards)` after every generation for training, on every process;
    not of an evaluation, nor of a selection. A batch is what one backward takes; a chunk is generated for at once and
    makes several.

    - `batch_in_run` (`int`): training batches before this one in the whole run, also those before the checkpoint that
      it was resumed from. After a resume inside a chunk the rest of that chunk is generated again, with the number of
      its first batch left.
    - `inputs` (`list[dict]`): the rows of this process, in the order of their rewards, with their prompts as they were
      drawn: with TRL 1.8 an environment writes what it adds into the prompts themselves.
    - `completions` (`list`): of these rows, as the reward functions got them.
    - `rewards` (`np.ndarray` of shape `(rows of all processes, F)`, float64): in the order of the chunk; NaN where a
      reward function gave none, or an infinite one.

    Returns:
        a function that ends it.
    """
    counter = _BatchCounter(trainer)
    batch, prompts_drawn = None, {}  # of the generation under way, if it is for training; prompts by `id` of their row

    def train(inner, *args, **kwargs):
        counter.count()
        return inner(*args, **kwargs)

    def generate(inner, inputs, *args, **kwargs):
        nonlocal batch, prompts_drawn
        # Asked before the generation, as some ways to generate leave the model in another mode
        training = trainer.is_in_train and trainer.model.training and trainer not in SELECTING
        before, batch, prompts_drawn = (batch, prompts_drawn), None, {}
        if training:
            batch = counter.batches_before()
            prompts_drawn = {id(row): copy.deepcopy(row["prompt"]) for row in inputs if "prompt" in row}
        try:
            return inner(inputs, *args, **kwargs)
        finally:
            batch, prompts_drawn = before

    def reward(inner, inputs, prompts, completions, *args, **kwargs):
        rewards = inner(inputs, prompts, completions, *args, **kwargs)
        if batch is not None:
            seen = rewards.detach().cpu().double()
            rows = [row | {"prompt": prompts_drawn[id(row)]} if id(row) in prompts_drawn else row for row in inputs]
            observer(batch, rows, completions, seen.masked_fill(~seen.isfinite(), torch.nan).numpy())
        return rewards

    methods = {"training_step": train, "_generate_and_score_completions": generate, "_calculate_rewards": reward}
    undos = [wrap(trainer, name, around) for name, around in methods.items()]

    def undo():
        for one in undos:
            one()

    return undo


def write_before_checkpoints(trainer: Trainer, write: CheckpointWriter) -> Undo:
    """
    Calls `write(directory, is_writer, peers)` on every process whenever a checkpoint is saved, before anything else of
    it is written: `trainer_state.json` comes later, so it can hold a checksum of what was written. The directory
    exists; only processes with `is_writer` write what all have in common. An exception on one process ends all.

    Returns:
        a function that ends it.
    """

    def save(inner, model, trial, *args, **kwargs):
        number = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        directory = Path(trainer._get_output_dir(trial=trial), number)
        with Peers(trainer.accelerator) as peers:
            directory.mkdir(parents=True, exist_ok=True)
            write(directory, trainer.args.should_save, peers)
            peers.wait()
        return inner(model, trial, *args, **kwargs)

    return wrap(trainer, "_save_checkpoint", save)


def read_on_resume(trainer: Trainer, read: Callable[[Path], None]) -> Undo:
    """
    Calls `read(directory)` on every process when a run is resumed from the checkpoint in `directory`, before training
    begins.

    Returns:
        a function that ends it.
    """

    def load(inner, checkpoint, *args, **kwargs):
        if checkpoint is not None:
            read(Path(checkpoint))
        return inner(checkpoint, *args, **kwargs)

    return wrap(trainer, "_load_optimizer_and_scheduler", load)


def wrap(trainer: Trainer, name: str, around: Callable) -> Undo:
    """
    From now on calls of a method of this trainer go to `around(inner, ...)`, with `inner` the method as it was: that
    of the class, or what the user has put in its place.

    Returns:
        a function that undoes this. What was put around the method meanwhile stays.
    """
    patch, inner, active = vars(trainer).get(name), getattr(trainer, name), True

    def wrapper(*args, **kwargs):
        return around(inner, *args, **kwargs) if active else inner(*args, **kwargs)

    def undo():
        nonlocal active
        active = False
        if vars(trainer).get(name) is not wrapper:
            return
        if patch is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, patch)

    setattr(trainer, name, wrapper)
    return undo


class _BatchCounter:
    """
    Counts the batches of a run by its optimizer steps, which a checkpoint holds, and by the batches of the step under
    way. The trainer's own counter of batches begins at 0 after a resume.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._state = None  # a new one for each call of `train`
        self._step = self._within = 0

    def count(self):
        state = self.trainer.state
        if state is self._state and state.global_step == self._step:
            self._within += 1
        else:
            self._state, self._step, self._within = state, state.global_step, 0

    def batches_before(self) -> int:
        accumulation = self.trainer.args.gradient_accumulation_steps
        epoch = len(self.trainer.callback_handler.train_dataloader)
        # The last step of an epoch may have fewer batches
        epochs, steps = divmod(self._step, -(-epoch // accumulation))
        return epochs * epoch + min(steps * accumulation, epoch) + self._within
