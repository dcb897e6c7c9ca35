"""States for a checkpoint, apart from the arrays that later observations change."""

import numpy as np


def copied(state: dict) -> dict:
    """Copy the arrays of a nested state, which later observations would change."""
    return {
        name: copied(value) if isinstance(value, dict) else value.copy() if isinstance(value, np.ndarray) else value
        for name, value in state.items()
    }
