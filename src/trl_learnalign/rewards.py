"""Reward functions that fail with a clear error on all processes, so that none is left waiting in a collective."""

import dis
import functools
import inspect
import traceback
import types
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn


class RewardError(RuntimeError):
    """A reward function failed in a selection."""


@contextmanager
def guarded(functions: list, names: list[str]):
    """
    Yields wrappers of reward functions that give a reward of 0 if the function raises, returns something else than
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
            f"The reward function `{name}` failed in a selection: {type(error).__name__}: {error}{_place(error)}. It "
            "must return a number (or None, where a completion cannot be scored) for every completion. Correct it and "
            "run again."
        ) from error


def _place(error) -> str:
    """Where in the user's file an error was raised; nothing for one that was raised here."""
    _, *frames = traceback.extract_tb(error.__traceback__)  # the first is the wrapper's
    if not frames or frames[0].filename == __file__:
        return ""
    return f" ({frames[0].filename}, line {last_line(error, frames[0].filename)})"


def last_line(error: BaseException, file: str) -> int | None:
    """Number of the line of `file` that an error comes from; `None` if it does not come from there."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return lines[-1] if lines else None


def check_success_reward(names: list[str], success_reward: str | None, learnability: str) -> None:
    """
    Raises:
        `ValueError`: it is not clear which of the reward functions `names` decides success.
    """
    if success_reward is None:
        if len(names) > 1 and learnability == "success_rate":
            raise ValueError(
                f"The trainer has several reward functions ({', '.join(names)}), and LearnAlign must know which one "
                "decides success. Set `success_reward` to one of these names, or use `learnability='variance'`, which "
                "takes the total reward."
            )
    elif names.count(success_reward) != 1:
        times = "not" if success_reward not in names else "more than once"
        raise ValueError(
            f"`success_reward` is {success_reward!r}, which is {times} among the trainer's reward functions: "
            f"{', '.join(names)}."
        )


def _guard(function, name, failures) -> Callable:
    if isinstance(function, nn.Module):
        return function

    def failed(error, kwargs):
        failures.append((name, error))
        return [0.0] * len(kwargs["completions"])  # not used: TRL itself complains where all are None

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
    What identifies a function or an object of the user's: its source or that of its class, the arguments of a
    `functools.partial`, the name or path of a model, and the plain values among the defaults and the variables that a
    function was made with. Not the state of an object or of a list, nor variables that the function sets, which may
    change with every call.
    """
    if isinstance(function, functools.partial):
        return f"{source_of(function.func)} {partial_arguments(function)}"
    named = getattr(getattr(function, "config", None), "_name_or_path", "") if isinstance(function, nn.Module) else ""
    return " ".join([_source(function), named, *_made_with(function), *_made_with(inspect.unwrap(function))])


def _source(function):
    for told in (function, type(function)):
        try:
            return inspect.getsource(told)
        except (OSError, TypeError):  # an object, a builtin, or defined where there is no source
            pass
    return type(function).__qualname__


def _made_with(function):
    """The defaults of a function and the variables of its closure, as texts."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    rebound = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_DEREF"}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=False)
    found = {f"default {place}": value for place, value in enumerate(function.__defaults__ or ())}
    found |= function.__kwdefaults__ or {}
    found |= {name: cell.cell_contents for name, cell in cells if name not in rebound and cell != types.CellType()}
    return [f"{name}={_type_of(value) if isinstance(value, list) else plain(value)}" for name, value in found.items()]


def partial_arguments(function: functools.partial) -> str:
    """The arguments that a partial fixes, as in a call."""
    named = [f"{name}={plain(value)}" for name, value in sorted(function.keywords.items())]
    return f"({', '.join([*map(plain, function.args), *named])})"


def plain(value) -> str:
    """A number or a text, or some in lists, as Python prints it; of anything else the type."""
    return repr(value) if _is_plain(value) else _type_of(value)


def _type_of(value):
    return f"{type(value).__module__}.{type(value).__qualname__}"


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
