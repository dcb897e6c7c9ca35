"""The prompts of a selection that people are shown: both ends of its ranking, and of a large pool a sample."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


if TYPE_CHECKING:
    import pandas

    from .result import Selection

MOST_ROWS = 20_000  # on a page; a larger pool is shown by a sample of this size
MOST_CHARACTERS = 2000  # of a prompt
MOST_TEXT = 10_000_000  # characters of all prompts on a page


def most_characters(num_prompts: int) -> int:
    """Of each of `num_prompts` prompts on a page."""
    return min(MOST_CHARACTERS, MOST_TEXT // max(1, num_prompts))


def shortened(text: str, most: int | None = None) -> str:
    """The first `most` characters of a text (`MOST_CHARACTERS` by default), with a mark where it goes on."""
    most = MOST_CHARACTERS if most is None else most
    return text if len(text) <= most else text[:most] + "\u2026"


def extremes(selection: "Selection", num: int = 10) -> tuple[list[int], list[int]]:
    """
    Dataset indices of the `num` highest-ranked and of the `num` lowest-ranked that may be chosen (of none twice).
    """
    ranked = selection.eligible()
    return ranked[:num].tolist(), ranked[num:][-num:].tolist()


def shares() -> tuple[int, int]:
    """Of a sample: the most chosen prompts, and the prompts of each end of the ranking. A random part fills it up."""
    return MOST_ROWS // 2, MOST_ROWS // 8


def shown(selection: "Selection") -> list[int]:
    """
    Dataset indices of the whole pool or, if it is larger than `MOST_ROWS`, of a sample: the chosen prompts up to a
    limit, the highest- and the lowest-ranked that may be chosen, and a random part of the others. The same at every
    call.
    """
    indices = selection.scores["index"].to_numpy()
    if len(indices) <= MOST_ROWS:
        return indices.tolist()
    chosen, end = shares()
    ranked = selection.eligible()
    certain = np.unique(
        np.concatenate([selection.indices[:chosen], ranked[:end], ranked[max(0, len(ranked) - end) :]])
    )
    others = indices[~np.isin(indices, certain)]
    drawn = np.argsort(np.random.default_rng(0).random(len(others)))[: MOST_ROWS - len(certain)]
    return np.concatenate([certain, others[drawn]]).astype(int).tolist()


def rows_of(selection: "Selection", indices: list[int]) -> "pandas.DataFrame":
    """The rows of these dataset indices of the table of scores, best first."""
    wanted = pc.is_in(selection.scores["index"], value_set=pa.array(indices, pa.int64()))
    return selection.scores.filter(wanted).to_pandas().sort_values("rank")
