"""Reward functions tried on a made-up completion, so that their mistakes come before anything that takes long."""

import logging
import traceback

from torch import nn
from trl.data_utils import is_conversational

from ..reading import columns_read, read_rows
from ..rewards import RewardError, checked, is_async, place_of
from . import generation


logger = logging.getLogger(__name__)

COMPLETION = "A made-up completion."
# What is wrong whatever the completion says: an argument or a column that there is not, a list taken for text
_SURE = (TypeError, AttributeError, NameError, ImportError, KeyError)


def try_rewards(host) -> None:
    """
    Calls the trainer's reward functions, but for reward models, as training does, on one group of made-up completions
    of the first row. No rewards are kept, and metrics, logs and random states stay as they are. All processes must
    call this. Does nothing with an environment, tools or a `rollout_func`, which make more than a completion.

    An exception that may come from what the completion says is a warning.

    Raises:
        [`RewardError`]: a function cannot be called, or what it returns is no list of a number for each completion.
    """
    trainer = host.trainer
    more = host.environments or host.rollout_func is not None or getattr(trainer, "tools", None)
    if more or "prompt" not in columns_read(host.dataset):
        return
    rows = read_rows(host.visible(), [0] * min(host.group_size, host.rows_at_once))
    message = [{"role": "assistant", "content": COMPLETION}]
    completions = [list(message) if is_conversational(row) else COMPLETION for row in rows]
    ids = [list(trainer._tokenizer.encode(COMPLETION)) for _ in rows]
    failures, functions = [], trainer.reward_funcs
    named = zip(functions, trainer.reward_func_names, strict=True)
    with generation.left_as_found(trainer, host.group_size):
        trainer.reward_funcs = [_stand_in(function, name, failures) for function, name in named]
        try:  # TRL's own way to call them, with a gather in which all processes meet
            trainer._calculate_rewards(rows, [row["prompt"] for row in rows], completions, ids)
        finally:
            trainer.reward_funcs = functions
    for name, error, sure in failures:
        what = f"{type(error).__name__}: {error}{place_of(error)}"
        if sure:
            raise RewardError(
                f"The reward function `{name}` failed on a made-up completion of row 0, before training: {what}. It "
                "must return a list with a number for every completion (or None, where one cannot be scored). Correct "
                "it and run again."
            ) from error
        if host.accelerator.is_main_process:
            logger.warning(
                f"The reward function `{name}` raised {what}, when it was tried with the completion '{COMPLETION}'. A "
                "completion of training for which it does the same ends the run; return None where one cannot be "
                "scored."
            )


def _stand_in(function, name, failures):
    """Notes what fails and gives 0, so that every process reaches the end."""
    if isinstance(function, nn.Module):
        return lambda completions, **kwargs: [0.0] * len(completions)

    def noted(error, sure, number):
        failures.append((name, error, sure))
        return [0.0] * number

    def judged(rewards, number):
        try:
            checked(rewards, number)
        except (TypeError, ValueError) as error:
            return noted(error, True, number)
        return [0.0] * number

    if is_async(function):

        async def stand_in(**kwargs):
            try:
                rewards = await function(**kwargs)
            except Exception as error:
                return noted(error, _is_sure(error), len(kwargs["completions"]))
            return judged(rewards, len(kwargs["completions"]))

    else:

        def stand_in(**kwargs):
            try:
                rewards = function(**kwargs)
            except Exception as error:
                return noted(error, _is_sure(error), len(kwargs["completions"]))
            return judged(rewards, len(kwargs["completions"]))

    return stand_in


def _is_sure(error) -> bool:
    """Not a search that found nothing in the completion, nor a part of it looked up or evaluated."""
    if isinstance(error, KeyError):
        return str(error.args[0] if error.args else "") not in COMPLETION
    *_, last = traceback.extract_tb(error.__traceback__)
    return isinstance(error, _SURE) and "NoneType" not in str(error) and not last.filename.startswith("<")
