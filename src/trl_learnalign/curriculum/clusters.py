"""Clusters of prompts that are alike, from their features: the same on every machine."""

import numpy as np


MOST_KINDS = 12
PROMPTS_PER_KIND = 32  # of a small pool: fewer kinds, of which something can be said
_SAMPLE = 16_384  # rows that the centres are found with
_BLOCK = 16_384  # rows that are assigned at once
_ROUNDS = 20
_STEPS = 256  # of a unit: features are rounded to whole numbers of them, which float64 adds up exactly in any order


def kinds_of(features: np.ndarray, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """
    Sort some prompts into clusters, at most 12, fewer where they are few.

    Args:
        features (`np.ndarray` of shape `(N, D)`): of all prompts.
        rows (`np.ndarray` of shape `(n,)`): those that are sorted.
        seed (`int`, *optional*, defaults to 0): see [`clusters`].

    Returns:
        `np.ndarray` of shape `(N,)`, int16: the cluster of each prompt, -1 for the others.
    """
    number = int(np.clip(len(rows) // PROMPTS_PER_KIND, 1, MOST_KINDS))
    found = np.full(len(features), -1, np.int16)
    found[rows] = clusters(features, number, seed, rows)
    return found


def clusters(features: np.ndarray, number: int, seed: int = 0, rows: np.ndarray | None = None) -> np.ndarray:
    """
    Sort rows into clusters by k-means, from k-means++. A column that is constant has no influence. The result is the
    same on every machine, whatever the order in which it adds.

    Args:
        features (`np.ndarray` of shape `(N, D)`): finite; columns of like size count alike.
        number (`int`): clusters at most: fewer where rows are equal.
        seed (`int`, *optional*, defaults to 0): of the random choices.
        rows (`np.ndarray` of shape `(n,)`, *optional*): those that are sorted, all by default.

    Returns:
        `np.ndarray` of shape `(n,)`, int16: the cluster of each of these rows, the largest is 0.
    """
    rows = np.arange(len(features)) if rows is None else rows
    size = len(rows)
    generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, size]))
    some = slice(None) if size <= _SAMPLE else np.sort(generator.choice(size, _SAMPLE, replace=False))
    sample = _whole(features[rows[some]])
    centres = _first_centres(sample, number, generator)
    labels = np.zeros(0)
    for _ in range(_ROUNDS):
        before, labels = labels, _nearest(sample, centres)
        if np.array_equal(labels, before):
            break
        centres = np.stack([np.rint(sample[labels == one].mean(0)) for one in np.unique(labels)])
    blocks = (_whole(features[rows[start : start + _BLOCK]]) for start in range(0, size, _BLOCK))
    found = np.concatenate([_nearest(block, centres) for block in blocks])
    counts = np.bincount(found, minlength=len(centres))
    places = np.empty(len(centres), np.int16)
    places[np.lexsort((np.arange(len(centres)), -counts))] = np.arange(len(centres))
    return places[found]


def nearest_rows(features: np.ndarray, labels: np.ndarray, rows: np.ndarray, number: int) -> dict[int, list[int]]:
    """
    Return for each cluster those of its rows that are nearest to its mean, nearest first, no two of equal features.

    Args:
        features (`np.ndarray` of shape `(N, D)`): as they were clustered.
        labels (`np.ndarray` of shape `(N,)`): clusters; negative for none.
        rows (`np.ndarray` of shape `(n,)`): that may be returned. Of more than 16,384 every so-manieth is looked at.
        number (`int`): rows of each cluster at most.
    """
    rows = rows[:: -(-len(rows) // _SAMPLE)]
    found = {}
    for kind in np.unique(labels[rows][labels[rows] >= 0]).tolist():
        own = rows[labels[rows] == kind]
        values = _whole(features[own])
        far = ((values - np.rint(values.mean(0))) ** 2).sum(1)
        _, first = np.unique(values, axis=0, return_index=True)  # of copies the first
        found[kind] = own[first[np.lexsort((own[first], far[first]))[:number]]].tolist()
    return found


def _whole(features):
    return np.rint(features.astype(np.float64) * _STEPS)


def _first_centres(sample, number, generator):
    """Choose rows far from each other: each at random, by the square of its distance to those before."""
    centres = [sample[generator.integers(len(sample))]]
    far = ((sample - centres[0]) ** 2).sum(1)
    while len(centres) < number and far.any():
        sums = np.cumsum(far)
        place = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
        centres.append(sample[min(place, len(sample) - 1)])
        far = np.minimum(far, ((sample - centres[-1]) ** 2).sum(1))
    return np.stack(centres)


def _nearest(values, centres):
    """Return the place of the centre that is nearest to each row, the first of equal ones."""
    return np.argmin((centres**2).sum(1) - 2 * (values @ centres.T), axis=1)
