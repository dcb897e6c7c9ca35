"""Success rates of prompts that were measured before a run, by another policy or at another time."""

import zlib

import numpy as np


_LEAST, _MOST = 0.02, 0.98  # a few rollouts that all fail do not make success impossible


def known_rates(prior: np.ndarray | None, pool: np.ndarray, size: int) -> np.ndarray | None:
    """
    Return success rates that are known beforehand, float32, at a distance from 0 and 1, of shape `(size,)`; NaN
    outside the pool and where none is known. `None` if there are none.

    Args:
        prior (`np.ndarray` of shape `(size,)`, *optional*): success rates, NaN where unknown.
        pool (`np.ndarray` of shape `(n,)`): rows that may be drawn.
        size (`int`): number of rows.

    Raises:
        `ValueError`: rates have another shape, or are not between 0 and 1.
    """
    if prior is None:
        return None
    prior = np.asarray(prior, dtype=np.float32)
    if prior.shape != (size,):
        raise ValueError(
            f"`prior` has the shape {prior.shape}, but there are {size} prompts. Pass a success rate for each, NaN "
            "where it is unknown."
        )
    wrong = np.flatnonzero((prior < 0) | (prior > 1))
    if len(wrong):
        raise ValueError(
            f"`prior` of row {wrong[0]} is {prior[wrong[0]]:g}, but success rates are between 0 and 1. Divide it, or "
            "put NaN where it is unknown."
        )
    rates = np.full(size, np.nan, np.float32)
    rates[pool] = np.clip(prior[pool], _LEAST, _MOST)
    return rates if np.isfinite(rates).any() else None


def mean_rate(rates: np.ndarray | None) -> float | None:
    """Return the mean of the rates that are known; `None` of none."""
    return None if rates is None else float(np.nanmean(rates, dtype=np.float64))


def digest(rates: np.ndarray | None) -> int | None:
    """Return a number that tells these rates from others; `None` of none."""
    return None if rates is None else zlib.crc32(rates.tobytes())


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Return at most so many of the rows, at even distances."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
