"""Random numbers, put back as they were."""

import random

import numpy as np
import torch


def random_state() -> tuple:
    """Of all generators that [`~transformers.set_seed`] seeds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Puts back what [`random_state`] returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])
