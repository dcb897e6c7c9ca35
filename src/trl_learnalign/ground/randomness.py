"""States of random generators, which are put back as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


# Kinds of devices that [`~transformers.set_seed`] seeds. A torch has modules for those it was built with
_DEVICES = ("cuda", "mps", "mlu", "musa", "npu", "hpu", "xpu")


def random_state() -> tuple:
    """Return the states of all generators that [`~transformers.set_seed`] seeds."""
    devices = {name: _get(module) for name, module in _available()}
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), devices


def set_random_state(state: tuple) -> None:
    """Put back the states that [`random_state`] returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    for name, of_device in state[3].items():
        module = getattr(torch, name)
        (module.set_rng_state_all if hasattr(module, "set_rng_state_all") else module.set_rng_state)(of_device)


@contextmanager
def repeatable() -> Iterator[None]:
    """
    Seed all generators, so that a user's transform draws the same numbers each time and on every process. Afterwards
    all generators are as they were.
    """
    state = random_state()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        yield
    finally:
        set_random_state(state)


def _available() -> list[tuple]:
    """List the kinds of devices of this machine, with their modules."""
    modules = {name: getattr(torch, name, None) for name in _DEVICES}
    return [(name, module) for name, module in modules.items() if _is_available(name, module)]


def _is_available(name, module):
    if name == "mps":  # has no such function in older versions
        return torch.backends.mps.is_available()
    return module is not None and module.is_available()


def _get(module):
    return module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else module.get_rng_state()
