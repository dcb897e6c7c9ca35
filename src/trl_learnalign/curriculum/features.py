"""Features of prompts, from anything that is known of them."""

import numpy as np


COMPONENTS = 64  # of a prompt, less where there are fewer dimensions
SAMPLE = 2048  # prompts that the components are found with
MOST_VALUES = 256
_FLAT = 1e-4  # of the largest: a dimension that varies less is as good as constant


def make_features(*parts: np.ndarray, components: int = COMPONENTS) -> np.ndarray:
    """
    Make the features that [`OnlineCurriculum`] predicts success from, of anything that is known of the prompts before
    they are trained on: embeddings, lengths, where they come from, a pass rate.

    ```python
    features = make_features(embeddings, np.log(lengths), sources)
    ```

    Args:
        *parts (`np.ndarray`): each of shape `(N, d)`, such as embeddings, of which the `components` principal
            components are taken, as of hidden states in a trainer of TRL; or of shape `(N,)`: numbers, which get mean
            0 and standard deviation 1, or texts, each value of which gets a column of its own.
        components (`int`, *optional*, defaults to 64): of each matrix.

    Returns:
        `np.ndarray` of shape `(N, D)`, float16, a constant first.

    Raises:
        `ValueError`: there is no part, or parts of different lengths, or a number that is not finite, or texts with
            more than 256 values.
    """
    arrays = [np.asarray(part) for part in parts]
    lengths = [len(array) if array.ndim in (1, 2) else None for array in arrays]
    if not arrays or None in lengths or len(set(lengths)) > 1 or not lengths[0]:
        raise ValueError(
            f"`make_features` got parts of the shapes {[array.shape for array in arrays]}, but needs at least one, "
            "and in all of them a row, a number or a text for each prompt."
        )
    columns = [np.ones((len(arrays[0]), 1))]
    for place, array in enumerate(arrays):
        if array.dtype.kind in "OUS":
            columns.append(_indicators(array, place))
            continue
        values = array.astype(np.float64)
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0][0])
            raise ValueError(
                f"Part {place} of `make_features` is not finite in row {row}. Replace missing numbers by the mean of "
                "the others."
            )
        values = values.reshape(len(values), -1)
        sample = np.random.Generator(np.random.Philox(0)).permutation(len(values))[:SAMPLE]
        columns.append(project(values, *principal(values[np.sort(sample)], components)))
    return np.concatenate(columns, axis=1).astype(np.float16)


def _indicators(texts, place):
    if texts.ndim != 1:
        raise ValueError(f"Part {place} of `make_features` is a table of texts. Pass each of its columns as a part.")
    values, codes = np.unique(texts.astype(str), return_inverse=True)
    if len(values) > MOST_VALUES:
        raise ValueError(
            f"Part {place} of `make_features` has {len(values):,} different texts, of which each would be a column. "
            f"Pass {MOST_VALUES} or fewer, or embeddings of the texts."
        )
    return (
        (codes[:, None] == np.arange(len(values))).astype(np.float64) if len(values) > 1 else np.zeros((len(codes), 0))
    )


def principal(states: np.ndarray, most: int = COMPONENTS) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the mean of n sampled prompts, of shape `(d,)`, and the matrix `(d, k)` that makes components of the
    differences from it, scaled: the first has standard deviation 1, column j has (u_j / u_1)^(1/4), where u are the
    variances of the components. Computed in float64. A component gets the sign that makes its largest entry positive.

    Args:
        states (`np.ndarray` of shape `(n, d)`): of the sample.
        most (`int`, *optional*, defaults to 64): components.
    """
    states = states.astype(np.float64)
    mean, spread = states.mean(0), states.std(0)
    scale = np.where(spread > _FLAT * max(spread.max(), np.finfo(np.float64).tiny), spread, np.inf)
    standard = (states - mean) / scale
    n, d = standard.shape
    if d <= n:
        variances, directions = np.linalg.eigh(standard.T @ standard / n)
    else:  # the same directions, of a smaller matrix
        variances, left = np.linalg.eigh(standard @ standard.T / n)
        directions = standard.T @ left / np.sqrt(np.maximum(n * variances, np.finfo(np.float64).tiny))
    kept = np.argsort(-variances, kind="stable")[: min(most, n - 1, d)]
    kept = kept[variances[kept] > _FLAT * variances[kept].max(initial=0)]
    directions = directions[:, kept]
    if len(kept):
        directions *= np.sign(directions[np.abs(directions).argmax(0), np.arange(len(kept))])
    size = (variances[kept] * variances[kept].max(initial=0)) ** 0.25
    return mean, directions / scale[:, None] / size


def project(states: np.ndarray, mean: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Return the components of states `(n, d)`, of shape `(n, k)`, float16."""
    values = (states.astype(np.float64) - mean) @ matrix
    limit = np.finfo(np.float16).max
    return values.clip(-limit, limit).astype(np.float16)
