"""Reports events of a running training: its rewards, and that a checkpoint is being written."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..ground.peers import Peers
from .generation import SELECTING
from .rewards import RewardError, guarded


Undo = Callable[[], None]
RewardObserver = Callable[[int, list[dict], list, np.ndarray, np.ndarray], None]
RowCheck = Callable[[int, list[dict]], int]
CheckpointWriter = Callable[[Path, bool, Peers], None]


def observe_rewards(trainer: Trainer, observer: RewardObserver, check: RowCheck | None = None) -> Undo:
    """
    Calls `observer(batch_in_run, inputs, completions, rewards, trained)` after every generation for training, on every
    process; not of an evaluation, nor of a selection. A batch is what one backward takes; a chunk is generated for at
    once and makes several.

    - `batch_in_run` (`int`): training batches before this one in the whole run, also those before the checkpoint that
      it was resumed from. After a resume inside a chunk the rest of that chunk is generated again, with the number of
      its first batch left.
    - `inputs` (`list[dict]`): the rows of this process, in the order of their rewards, with their prompts as they were
      drawn: with TRL 1.8 an environment writes what it adds into the prompts themselves.
    - `completions` (`list`): of these rows, as the reward functions got them.
    - `rewards` (`np.ndarray` of shape `(rows of all processes, F)`, float64): in the order of the chunk; NaN where a
      reward function gave none, or an infinite one.
    - `trained` (`np.ndarray` of shape `(rows of all processes,)`, bool): in the same order; whether a token of the
      completion is in the loss. None is of a truncated completion under `mask_truncated_completions`.

    `check(batch_in_run, inputs)` comes before, and returns a digest (a number below 2**63) of what must be the same on
    all processes. A reward function that fails, or returns no numbers, a failure of `check` and digests that differ
    end all processes with an error, none of which is left waiting for the others.

    Raises:
        [`RewardError`]: a reward function failed.
        `RuntimeError`: the digests differ, or another process failed.

    Returns:
        a function that ends it.
    """
    counter = _BatchCounter(trainer)
    batch, prompts_drawn = None, {}  # of the generation under way, if it is for training; prompts by `id` of their row
    seen = []  # rows, completions and rewards of that generation

    def train(inner, *args, **kwargs):
        counter.count()
        return inner(*args, **kwargs)

    def generate(inner, inputs, *args, **kwargs):
        nonlocal batch, prompts_drawn, seen
        # Asked before the generation, as some ways to generate leave the model in another mode
        training = trainer.is_in_train and trainer.model.training and trainer not in SELECTING
        before, batch, prompts_drawn, seen = (batch, prompts_drawn, seen), None, {}, []
        if training:
            batch = counter.batches_before()
            prompts_drawn = {id(row): copy.deepcopy(row["prompt"]) for row in inputs if "prompt" in row}
        try:
            if not training:
                return inner(inputs, *args, **kwargs)
            output = failure = None
            functions = trainer.reward_funcs
            try:
                with guarded(functions, trainer.reward_func_names) as trainer.reward_funcs:
                    output = inner(inputs, *args, **kwargs)
            except RewardError as error:  # the generation itself has ended
                failure = error
            finally:
                trainer.reward_funcs = functions
            tell(output, failure)
            return output
        finally:
            batch, prompts_drawn, seen = before

    def tell(output, failure):
        """Of one generation, once all processes are known to have come through it alike."""
        digest, trained = 0, np.zeros(0, bool)
        try:
            if failure is None:
                trained = _in_loss(output)
                if seen and len(trained) != len(seen[0][0]):  # a subclass returns others than were rewarded
                    trained = np.ones(len(seen[0][0]), bool)
                digest = check(batch, seen[0][0]) if check is not None and seen else 0
        except Exception as error:
            failure = error
        trained = _agreed(trainer, failure, digest, trained)
        for rows, completions, rewards in seen:
            observer(batch, rows, completions, rewards, trained)

    def reward(inner, inputs, prompts, completions, *args, **kwargs):
        rewards = inner(inputs, prompts, completions, *args, **kwargs)
        if batch is not None:
            found = rewards.detach().cpu().double()
            rows = [row | {"prompt": prompts_drawn[id(row)]} if id(row) in prompts_drawn else row for row in inputs]
            seen.append((rows, completions, found.masked_fill(~found.isfinite(), torch.nan).numpy()))
        return rewards

    methods = {"training_step": train, "_generate_and_score_completions": generate, "_calculate_rewards": reward}
    undos = [wrap(trainer, name, around) for name, around in methods.items()]

    def undo():
        for one in undos:
            one()

    return undo


def _in_loss(output: dict) -> np.ndarray:
    """Whether a token of each completion of a generation is in the loss, of shape `(rows,)`."""
    mask = output["completion_mask"]
    if "tool_mask" in output:
        mask = mask * output["tool_mask"]
    return (mask.sum(1) > 0).cpu().numpy()


def _agreed(trainer, failure: Exception | None, digest: int, trained: np.ndarray) -> np.ndarray:
    """
    `trained` of all processes, in their order. One collective, which all processes enter, those with a `failure`, too.

    Raises:
        the `failure`; or `RuntimeError`: one of another process, or other digests there.
    """
    accelerator = trainer.accelerator
    if accelerator.num_processes > 1:
        rows = [1] * (trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation)
        rows[: len(trained)] = trained.tolist()
        own = torch.tensor([failure is not None, digest, *rows], dtype=torch.int64)
        found = accelerator.gather(own[None].to(accelerator.device)).cpu()
    else:
        found = torch.tensor([[failure is not None, digest]])
    if failure is not None:
        raise failure
    failed = found[:, 0].nonzero().flatten().tolist()
    if failed:
        raise RuntimeError(
            f"Process {', '.join(map(str, failed))} failed in a generation for training, so this process ends, too. "
            "Its own output has the cause."
        )
    if len(found[:, 1].unique()) > 1:
        raise RuntimeError(
            "The processes have drawn different prompts and would train on them. Their processors or libraries may "
            f"round differently (digests: {', '.join(f'{one:015x}'[:8] for one in found[:, 1].tolist())}). Resume "
            "from the last checkpoint on equal machines."
        )
    return found[:, 2:].bool().flatten().numpy() if accelerator.num_processes > 1 else trained


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
