"""Guards around reward functions: one that fails is a clear error on all processes, and none waits for ever."""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import nn

from ..ground.user_code import last_line


class RewardError(RuntimeError):
    """A reward function failed."""


@contextmanager
def guarded(functions: list, names: list[str]):
    """
    Yield wrappers of reward functions that give a reward of 0 if the function raises, returns something else than
    numbers (or `None`), or the wrong number of them, so that the collectives that follow find every process there. On
    exit the first failure is raised. Reward models are left as they are.

    Raises:
        [`RewardError`]: with the function's own exception as its cause.
    """
    failures: list[tuple[str, Exception]] = []
    yield [guard(function, name, failures) for function, name in zip(functions, names, strict=True)]
    if failures:
        name, error = failures[0]
        raise RewardError(
            f"The reward function `{name}` failed: {type(error).__name__}: {error}{place_of(error)}. It "
            "must return a number (or None, where a completion cannot be scored) for every completion. Correct it and "
            "run again."
        ) from error


def place_of(error: BaseException) -> str:
    """Name the line of the user's file that raised an error of a guarded function; empty for an error raised here."""
    _, *frames = traceback.extract_tb(error.__traceback__)  # the first is the wrapper's
    if not frames or frames[0].filename == __file__:
        return ""
    return f" ({frames[0].filename}, line {last_line(error, frames[0].filename)})"


def success_names(success_reward: str | list[str]) -> list[str]:
    """Return the names in the setting `success_reward`, in their order."""
    return [success_reward] if isinstance(success_reward, str) else list(success_reward)


def check_success_reward(names: list[str], success_reward: str | list[str] | None, learnability: str) -> None:
    """
    Raise an error for a setting `success_reward` that does not go with the reward functions.

    Raises:
        `ValueError`: it is not clear which of the reward functions `names` decides success.
    """
    if success_reward is None:
        if len(names) > 1 and learnability == "success_rate":
            raise ValueError(
                f"The trainer has several reward functions ({', '.join(names)}), and LearnAlign must know which one "
                "decides success. Set `success_reward` to one of these names, or to several if each scores the rows "
                "of its own task; or use `learnability='variance'`, which takes the total reward."
            )
        return
    wanted = success_names(success_reward)
    for name in wanted:
        times = "not" if name not in names else "more than once" if names.count(name) > 1 else None
        if times is not None:
            raise ValueError(
                f"`success_reward` is {success_reward!r}, but {name!r} is {times} among the trainer's reward "
                f"functions: {', '.join(names)}. Correct the name."
            )
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"`success_reward` is {success_reward!r}, which names a function twice. Name it once.")


def guard(function: Callable, name: str, failures: list) -> Callable:
    """
    Make a stand-in for a reward function that returns zeros where the function fails, and adds its name and the error
    to `failures`. In all else it is the function: its attributes, and whatever way it is called in (where that is not
    TRL's, an error is raised). A reward model is returned as it is.
    """
    if isinstance(function, nn.Module):
        return function
    guarded = _Guarded(function, name, failures)
    if not is_async(function):
        return guarded

    async def stand_in(*args, **kwargs):  # a function, as some versions of TRL do not know other coroutines
        try:
            return checked(await function(*args, **kwargs), _number(kwargs))
        except Exception as error:
            return guarded.failed(error, _number(kwargs))

    return functools.update_wrapper(stand_in, function)


class _Guarded:
    def __init__(self, function, name, failures):
        self._function, self._name, self._failures = function, name, failures

    def __getattr__(self, name):
        return getattr(self._function, name)

    def __call__(self, *args, **kwargs):
        try:
            return checked(self._function(*args, **kwargs), _number(kwargs))
        except Exception as error:
            return self.failed(error, _number(kwargs))

    def failed(self, error, number):
        if number is None:
            raise error
        self._failures.append((self._name, error))
        return [0.0] * number  # for None TRL would warn, with a whole row


def _number(kwargs) -> int | None:
    """Return the number of completions; `None` where the function is called in another way than by TRL."""
    return len(kwargs["completions"]) if "completions" in kwargs else None


def is_async(function) -> bool:
    """Tell if calling `function` gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def checked(rewards, number: int | None) -> list[float]:
    """
    Make a list of numbers of what a reward function returned for a number of completions, or any number.

    Raises:
        `TypeError`, `ValueError`: the rewards are no list of numbers, or one of another length.
    """
    is_scalar = getattr(rewards, "ndim", None) == 0  # a tensor without dimensions has the methods of an iterable
    if isinstance(rewards, str | bytes | dict) or not isinstance(rewards, Iterable) or is_scalar:
        raise TypeError(
            f"it returned {_shortened(rewards)}, a {type(rewards).__name__}, in place of a list of rewards"
        )
    rewards = list(rewards)
    for place, reward in enumerate(rewards):
        if isinstance(reward, str | bytes | dict):
            raise TypeError(f"reward {place} is {_shortened(reward)}, a {type(reward).__name__}, not a number")
    if number is not None and len(rewards) != number:
        raise ValueError(f"it returned {len(rewards)} rewards for {number} completions")
    return [torch.nan if reward is None else float(reward) for reward in rewards]


def _shortened(value) -> str:
    return repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
