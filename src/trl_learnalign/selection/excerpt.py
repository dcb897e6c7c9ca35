"""The part of a selection that people are shown: both ends of its ranking, a sample of a large pool, and the texts."""

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset

from ..data.prompts import prompt_text
from ..data.reading import columns_read, read_prompts, read_rows
from ..ground.peers import Peers
from ..host import Host


if TYPE_CHECKING:
    import pandas

    from ..measures.rollouts import Rollouts
    from .result import Selection

MOST_ROWS = 20_000  # on a page; a larger pool is shown by a sample of this size
MOST_CHARACTERS = 2000  # of a prompt
MOST_TEXT = 10_000_000  # characters of all prompts on a page


def ranking_ends(selection: "Selection", num: int = 10) -> tuple[list[int], list[int]]:
    """
    Return the dataset indices of the `num` highest-ranked and of the `num` lowest-ranked prompts that may be chosen
    (none twice).
    """
    ranked = selection.eligible()
    return ranked[:num].tolist(), ranked[num:][-num:].tolist()


def sample_quotas() -> tuple[int, int]:
    """
    Sample quotas: at most this many chosen prompts, and this many from each end of the ranking; the rest is random.
    """
    return MOST_ROWS // 2, MOST_ROWS // 8


def shown_rows(selection: "Selection") -> list[int]:
    """
    Return the dataset indices of the whole pool or, if it is larger than `MOST_ROWS`, of a sample: the chosen prompts
    up to a limit, the highest- and the lowest-ranked that may be chosen, and a random part of the others. The same at
    every call.
    """
    indices = selection.scores["index"].to_numpy()
    if len(indices) <= MOST_ROWS:
        return indices.tolist()
    chosen, end = sample_quotas()
    ranked = selection.eligible()
    certain = np.unique(
        np.concatenate([selection.indices[:chosen], ranked[:end], ranked[max(0, len(ranked) - end) :]])
    )
    others = indices[~np.isin(indices, certain)]
    drawn = np.argsort(np.random.default_rng(0).random(len(others)))[: MOST_ROWS - len(certain)]
    return np.concatenate([certain, others[drawn]]).astype(int).tolist()


def scores_of(selection: "Selection", indices: list[int]) -> "pandas.DataFrame":
    """Return the scores of these dataset indices, best first."""
    wanted = pc.is_in(selection.scores["index"], value_set=pa.array(indices, pa.int64()))
    return selection.scores.filter(wanted).to_pandas().sort_values("rank")


# Texts -------------------------------------------------------------------------------------------------------------


def characters_each(num_prompts: int) -> int:
    """Return how many characters of each prompt a page with `num_prompts` of them has room for."""
    return min(MOST_CHARACTERS, MOST_TEXT // max(1, num_prompts))


def shortened(text: str, most: int | None = None) -> str:
    """Keep the first `most` characters of a text (`MOST_CHARACTERS` by default), with a mark where it goes on."""
    most = MOST_CHARACTERS if most is None else most
    return text if len(text) <= most else text[:most] + "\u2026"


def prompt_texts(dataset: Dataset, indices: list[int], supplied: dict[int, str] | None = None) -> list[str]:
    """
    Read prompts as text, shortened. Rows without a prompt, which an environment supplies, are shown by the prompt in
    `supplied`, by dataset index, or by their columns.
    """
    if "prompt" in columns_read(dataset):
        return [shortened(prompt_text(prompt)) for prompt in read_prompts(dataset, indices)]
    supplied, rows = supplied or {}, zip(indices, read_rows(dataset, indices), strict=True)
    return [shortened(supplied.get(index) or _columns_text(row)) for index, row in rows]


def _columns_text(row):
    return "\n".join(f"{name}: {value}" for name, value in row.items())


def texts_table(
    host: Host, dataset: Dataset, selection: "Selection", own: "Rollouts | None", peers: Peers
) -> pa.Table | None:
    """
    Collect the prompts that a report shows, with a completion of the highest- and the lowest-ranked learnable ones.
    All processes must call this.

    Args:
        own ([`Rollouts`] or `None`): the rollouts of this process, if anything was rolled out.

    Returns:
        `pyarrow.Table` with a row per prompt: `index`, `prompt`, `completion` and `reward`. `None` on all but the
        main process.
    """
    ends = {index for indices in ranking_ends(selection) for index in indices}
    indices = sorted(ends.union(shown_rows(selection)))
    named = "prompt" in columns_read(dataset)
    found = ({}, {}) if own is None else _rolled_out(host, own, ends, [] if named else indices)
    gathered = zip(*peers.gather(found), strict=True)
    completions, supplied = (dict(itertools.chain(*(part.items() for part in parts))) for parts in gathered)
    if peers.rank != 0:
        return None
    none = (None, None)
    return pa.table(
        {
            "index": indices,
            "prompt": prompt_texts(dataset, indices, supplied),
            "completion": pa.array([completions.get(index, none)[0] for index in indices], pa.string()),
            "reward": pa.array([completions.get(index, none)[1] for index in indices], pa.float64()),
        }
    )


def _rolled_out(host, own, ends, without_prompt):
    """Return by row the first completion of `ends` with its total reward, and the prompt of `without_prompt`."""
    completions = {row: _first_completion(host, own.group(row)) for row in ends if row in own}
    return completions, {row: host.text(own.group(row).prompt_ids[0]) for row in without_prompt if row in own}


def _first_completion(host, group):
    reward = host.total(torch.tensor(group.rewards[0], dtype=torch.float64))
    return host.text(group.completion_ids[0]), reward.nan_to_num(0.0).item()
