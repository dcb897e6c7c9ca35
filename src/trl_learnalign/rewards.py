"""Reward functions that fail with a clear error, on all processes, instead of leaving the others in a collective."""

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn


class RewardError(RuntimeError):
    """A reward function failed in a selection."""


@contextmanager
def guarded(functions: list, names: list[str]):
    """
    Yields stand-ins for reward functions that give no reward where the function raises, returns something else than
    numbers (or `None`), or the wrong number of them, so that the collectives that follow find every process there. On
    exit the first failure is raised. Reward models are left as they are.

    Raises:
        [`RewardError`]: with the function's own exception as its cause.
    """
    failures = []
    yield [_guard(function, name, failures) for function, name in zip(functions, names, strict=True)]
    if failures:
        name, error = failures[0]
        raise RewardError(
            f"The reward function `{name}` failed in a selection: {type(error).__name__}: {error}. It must return a number "
            "(or None, where a completion cannot be scored) for every completion. Mend it and run again."
        ) from error


def _guard(function, name, failures) -> Callable:
    if isinstance(function, nn.Module):
        return function

    def failed(error, kwargs):
        failures.append((name, error))
        return [None] * len(kwargs["completions"])

    if is_async(function):

        async def stand_in(**kwargs):
            try:
                return _checked(await function(**kwargs), len(kwargs["completions"]))
            except Exception as error:
                return failed(error, kwargs)

    else:

        def stand_in(**kwargs):
            try:
                return _checked(function(**kwargs), len(kwargs["completions"]))
            except Exception as error:
                return failed(error, kwargs)

    return stand_in


def source_of(function) -> str:
    """
    What a function or an object of the user's is told by: its source, or that of its class; of a `functools.partial` the
    arguments, too. Not what an object holds, which may change with every call.
    """
    if isinstance(function, functools.partial):
        values = [*function.args, *sorted(function.keywords.items())]
        return f"{source_of(function.func)} {[value if _is_plain(value) else type(value) for value in values]}"
    for told in (function, type(function)):
        try:
            return inspect.getsource(told)
        except (OSError, TypeError):  # an object, a builtin, or defined where there is no source
            pass
    return type(function).__qualname__


def _is_plain(value):
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def is_async(function) -> bool:
    """Whether calling `function` gives a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _checked(rewards, number):
    rewards = [torch.nan if reward is None else float(reward) for reward in rewards]
    if len(rewards) != number:
        raise ValueError(f"it returned {len(rewards)} rewards for {number} completions")
    return rewards
