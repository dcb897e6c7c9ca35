"""Methods of a trainer that are wrapped to hear of its events, of rewards above all."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import Trainer

from ..ground.user_code import is_ours
from .generation import SELECTING, mask_of_loss
from .names import RolloutTrainer
from .rewards import RewardError, guarded


Undo = Callable[[], None]
RewardObserver = Callable[[int, list[dict], list, np.ndarray, np.ndarray, list], None]
RowCheck = Callable[[int, list[dict]], int]
Compose = Callable[[int, Callable[[list[dict]], dict], list[dict]], dict]


class RewardTap:
    """
    Reports the rewards of training: calls `observer(batch_in_run, inputs, completions, rewards, trained, tokens)`
    after every generation for training, on every process; not in an evaluation, nor in a selection. A batch is what
    one backward takes; a chunk is generated for at once and makes several.

    - `batch_in_run` (`int`): training batches before this one in the whole run, also those before the checkpoint that
      it was resumed from. After a resume inside a chunk the rest of that chunk is generated again, with the number of
      its first batch left.
    - `inputs` (`list[dict]`): the rows of this process, in the order of their rewards, with their prompts as they were
      drawn: with TRL 1.8 an environment writes what it adds into the prompts themselves.
    - `completions` (`list`): the completions of these rows, as the reward functions got them.
    - `rewards` (`np.ndarray` of shape `(rows of all processes, F)`, float64): in the order of the chunk; NaN where a
      reward function gave none, or an infinite one.
    - `trained` (`np.ndarray` of shape `(rows of all processes,)`, bool): in the same order; tells if a token of the
      completion is in the loss. A truncated completion has none under `mask_truncated_completions`.
    - `tokens` (`list`): the tokens of `completions`.

    `compose(batch_in_run, generate, inputs)` may call `generate` for several lists of rows, each of which is reported,
    and makes one batch of the results.

    `check(batch_in_run, inputs)` comes before a report, and returns a digest (a number below 2**63) of what must be
    the same on all processes. A reward function that fails, or returns no numbers, a failure of `check` and digests
    that differ end all processes with an error, none of which is left waiting for the others:

    - [`RewardError`]: a reward function failed.
    - `RuntimeError`: the digests differ, or another process failed.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer, which reports from now on.
        generation_method (`str`): its method that makes a training batch of rows, see [`Generates`].
        observer (`Callable`): as above.
        check (`Callable`, *optional*): as above.
        compose (`Callable`, *optional*): as above; by default `generate(inputs)`.
    """

    def __init__(
        self,
        trainer: RolloutTrainer,
        generation_method: str,
        observer: RewardObserver,
        check: RowCheck | None = None,
        compose: Compose | None = None,
    ):
        self.trainer, self.observer, self.check, self.compose = trainer, observer, check, compose
        self._counter = _BatchCounter(trainer)
        self._under_way: _Generation | None = None  # the generation for training that is under way
        methods = {"training_step": self._train, generation_method: self._generate, "_calculate_rewards": self._reward}
        self._undos = [wrap(trainer, name, around) for name, around in methods.items()]

    def undo(self) -> None:
        """End the reports."""
        for one in self._undos:
            one()

    def _train(self, inner, *args, **kwargs):
        self._counter.count()
        return inner(*args, **kwargs)

    def _generate(self, inner, inputs, *args, **kwargs):
        # Asked before the generation, as some ways to generate leave the model in another mode
        batch = self._counter.batches_before() if for_training(self.trainer) else None

        def generate(rows):
            return self._once(partial(inner, rows, *args, **kwargs), batch, rows)

        return generate(inputs) if batch is None or self.compose is None else self.compose(batch, generate, inputs)

    def _once(self, inner, batch, inputs):
        trainer, before = self.trainer, self._under_way
        self._under_way = None if batch is None else _Generation(batch, inputs)
        try:
            if self._under_way is None:
                return inner()
            output = failure = None
            functions = trainer.reward_funcs
            try:
                with guarded(functions, trainer.reward_func_names) as trainer.reward_funcs:
                    output = inner()
            except RewardError as error:  # the generation itself has ended
                failure = error
            finally:
                trainer.reward_funcs = functions
            self._tell(self._under_way, output, failure)
            return output
        finally:
            self._under_way = before

    def _reward(self, inner, inputs, prompts, completions, completion_ids_list):
        rewards = inner(inputs, prompts, completions, completion_ids_list)
        if self._under_way is not None:
            self._under_way.note(inputs, completions, rewards, completion_ids_list)
        return rewards

    def _tell(self, generation, output, failure):
        """Report a generation, once all processes are known to have come through it alike."""
        digest, trained = 0, np.zeros(0, bool)
        rows = generation.rewarded[0][0] if generation.rewarded else None
        try:
            if failure is None:
                trained = (mask_of_loss(output).sum(1) > 0).cpu().numpy()
                if rows is not None and len(trained) != len(rows):  # a subclass returns others than were rewarded
                    trained = np.ones(len(rows), bool)
                digest = self.check(generation.batch, rows) if self.check is not None and rows is not None else 0
        except Exception as error:
            failure = error
        trained = _agreed(self.trainer, failure, digest, trained)
        for *one, tokens in generation.rewarded:
            self.observer(generation.batch, *one, trained, tokens)


class _Generation:
    """
    A generation for training that is under way.

    Attributes:
        batch: training batches before it in the whole run.
        rewarded: rows, completions, rewards and tokens of each call of the reward functions.
    """

    def __init__(self, batch: int, inputs: list[dict]):
        self.batch = batch
        self.rewarded: list[tuple[list[dict], list, np.ndarray, list]] = []
        # By the identity of a row, as some versions of TRL change the prompt in it
        self._drawn = {id(row): copy.deepcopy(row["prompt"]) for row in inputs if "prompt" in row}

    def note(self, inputs: list[dict], completions: list, rewards: torch.Tensor, tokens: list) -> None:
        """Keep the rewards of rows, with the prompts that were drawn."""
        rows = [row | {"prompt": self._drawn[id(row)]} if id(row) in self._drawn else row for row in inputs]
        found = rewards.detach().cpu().double()
        self.rewarded.append((rows, completions, found.masked_fill(~found.isfinite(), torch.nan).numpy(), tokens))


def choose_passes(trainer: RolloutTrainer, passes_of: Callable[[int], tuple[int, int]]) -> Undo:
    """
    Choose how often a trainer passes over each batch that it generates, its `num_iterations`, while it trains.

    Args:
        trainer ([`~transformers.Trainer`]): the trainer.
        passes_of (`Callable`): is called with the number of a training batch in the run, before it is trained on.
            Returns the passes over what was generated for it, and the batches of these that came before. 0 of them:
            the trainer generates anew.

    Returns:
        a function that ends it.
    """
    counter = _BatchCounter(trainer)

    def train(inner, *args, **kwargs):
        counter.count()
        before = trainer.num_iterations
        # `_prepare_inputs` generates where `_step` is a multiple of `steps_per_generation * num_iterations`
        trainer.num_iterations, trainer._step = passes_of(counter.batches_before())
        try:
            return inner(*args, **kwargs)
        finally:
            trainer.num_iterations = before

    return wrap(trainer, "training_step", train)


def _agreed(trainer, failure: Exception | None, digest: int, trained: np.ndarray) -> np.ndarray:
    """
    Gather `trained` of all processes, in their order. One collective, which processes with a `failure` enter as well.

    Raises:
        the `failure`; or `RuntimeError`: another process failed, or came to another digest.
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
            f"Process {', '.join(map(str, failed))} failed in a generation for training, so this process ends. "
            "The output of that process has the cause."
        )
    if len(found[:, 1].unique()) > 1:
        raise RuntimeError(
            "The processes have drawn different prompts and would train on them. Their processors or libraries may "
            f"round differently (digests: {', '.join(f'{one:015x}'[:8] for one in found[:, 1].tolist())}). Resume "
            "from the last checkpoint on equal machines."
        )
    # A generation of fewer rows than a batch is padded above
    return found[:, 2 : 2 + len(trained)].bool().flatten().numpy() if accelerator.num_processes > 1 else trained


def for_training(trainer: RolloutTrainer) -> bool:
    """Tell if a generation that begins now is for training: not for an evaluation, nor for a selection."""
    return trainer.is_in_train and trainer.model.training and trainer not in SELECTING


def wrap(trainer: Trainer, name: str, around: Callable) -> Undo:
    """
    Let calls of a method of this trainer go to `around(inner, ...)` from now on, with `inner` the method as it was:
    that of the class, or what the user has put in its place.

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

    wrapper.__wrapped__ = inner  # type: ignore[attr-defined]  # as functools does
    setattr(trainer, name, wrapper)
    return undo


def own_function(owner: Trainer | type, name: str) -> Any:
    """Return the function of a method of a trainer or a class, under what [`wrap`] put around; `None` without one."""
    method: Any = getattr(owner, name, None)
    while is_ours(method) and hasattr(method, "__wrapped__"):
        method = method.__wrapped__
    of = getattr(method, "__self__", None)
    return getattr(method, "__func__", method) if of is owner or isinstance(of, type) else method


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
