"""A trial of the reward functions on a made-up completion, so that mistakes come before anything that takes long."""

import logging
import traceback
from typing import TYPE_CHECKING

from torch import nn
from trl.data_utils import is_conversational

from ..data.reading import columns_read, read_rows
from . import generation, rewards
from .names import GENERATES


if TYPE_CHECKING:
    from .roles import Generates

logger = logging.getLogger(__name__)

COMPLETION = "A made-up completion."


def try_rewards(host: "Generates", row: int) -> None:
    """
    Call the trainer's reward functions, but for reward models, as training does, on one group of made-up completions
    of a row of the dataset. No rewards are kept, and metrics, logs and random states stay as they are. All processes
    must call this. Does nothing with an environment, tools or a `rollout_func`, which make more than a completion, nor
    for a trainer that does not generate outside of training.

    An exception that may come from what the completion says is a warning.

    Raises:
        [`RewardError`]: a function cannot be called, or what it returns is no list of a number for each completion.
    """
    trainer = host.trainer
    more = host.environments or host.rollout_func is not None or getattr(trainer, "tools", None)
    if more or "prompt" not in columns_read(host.dataset) or not host.plays(GENERATES):
        return
    rows = read_rows(host.visible(), [row] * min(host.group_size, host.rows_at_once))
    message = [{"role": "assistant", "content": COMPLETION}]
    completions = [list(message) if is_conversational(row) else COMPLETION for row in rows]
    ids = [list(trainer._tokenizer.encode(COMPLETION)) for _ in rows]
    failures: list[tuple[str, Exception]] = []
    named = zip(trainer.reward_funcs, trainer.reward_func_names, strict=True)
    stand_ins = [
        _no_rewards if isinstance(function, nn.Module) else rewards.guard(function, name, failures)
        for function, name in named
    ]
    with (
        generation.left_as_found(host, host.group_size),
        generation.replaced(trainer, reward_funcs=stand_ins),
    ):
        try:  # TRL's own way to call them, with a gather in which all processes meet
            trainer._calculate_rewards(rows, [one["prompt"] for one in rows], completions, ids)
        except Exception as error:  # of a subclass, which needs what a generation leaves behind
            logger.warning(f"The reward functions could not be tried before training ({error!r}). Training goes on.")
    for name, failure in failures:
        what = f"{type(failure).__name__}: {failure}{rewards.place_of(failure)}"
        if _is_sure(failure):
            raise rewards.RewardError(
                f"The reward function `{name}` failed on a made-up completion of row {row}, before training: {what}. "
                "It must return a list with a number for every completion (or None, where one cannot be scored). "
                "Correct it and run again."
            ) from failure
        if host.accelerator.is_main_process:
            logger.warning(
                f"The reward function `{name}` raised {what}, when it was tried with the completion '{COMPLETION}'. A "
                "completion of training for which it does the same ends the run; return None where one cannot be "
                "scored."
            )


def _no_rewards(completions, **kwargs):
    return [0.0] * len(completions)


def _is_sure(error) -> bool:
    """
    Tell if a function fails whatever the completion says: it returned no rewards, cannot be called with the columns
    that there are, lacks a name or a module, or takes messages for text. An error that depends on the text, as
    of a search that finds nothing in it, is not sure.
    """
    _, *frames = traceback.extract_tb(error.__traceback__)  # the first is the stand-in's
    in_call = not frames or frames[0].filename == rewards.__file__  # not inside of the function
    return in_call or isinstance(error, NameError | ImportError) or "'list'" in str(error)
