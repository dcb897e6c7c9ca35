"""The prompts as text, for the report."""

import itertools

import pyarrow as pa
import torch

from ..data.prompts import prompt_text
from ..data.reading import columns_read, read_prompts, read_rows
from .samples import extremes, shortened, shown


def texts_table(host, dataset, selection, own, peers) -> pa.Table | None:
    """
    The prompts that a report shows, with a completion of the highest- and the lowest-ranked learnable ones; `None` on
    all but the main process.

    Args:
        own ([`Rollouts`] or `None`): this process's.

    Rows without a prompt, which an environment supplies, are shown by the prompt of their first rollout, or, where
    nothing was rolled out, by their columns.
    """
    ends = {index for indices in extremes(selection) for index in indices}
    listed = ends.union(shown(selection))
    named = "prompt" in columns_read(dataset)
    rolled_out = [row for row in sorted(listed) if own is not None and row in own]
    completions = {row: _first_completion(host, own.group(row)) for row in rolled_out if row in ends}
    supplied = {} if named else {row: host.text(own.group(row).prompt_ids[0]) for row in rolled_out}
    gathered = zip(*peers.gather((completions, supplied)), strict=True)
    completions, supplied = (dict(itertools.chain(*(part.items() for part in parts))) for parts in gathered)
    if peers.rank != 0:
        return None
    indices = sorted(listed)
    if named:
        texts = [prompt_text(prompt) for prompt in read_prompts(dataset, indices)]
    else:
        rows = zip(indices, read_rows(dataset, indices), strict=True)
        texts = [supplied.get(index) or columns_text(row) for index, row in rows]
    texts = [shortened(text) for text in texts]
    none = (None, None)
    return pa.table(
        {
            "index": indices,
            "prompt": texts,
            "completion": pa.array([completions.get(index, none)[0] for index in indices], pa.string()),
            "reward": pa.array([completions.get(index, none)[1] for index in indices], pa.float64()),
        }
    )


def _first_completion(host, group) -> tuple[str, float]:
    """Of a group, the first completion as text and its total reward."""
    reward = host.total(torch.tensor(group.rewards[0], dtype=torch.float64))
    return host.text(group.completion_ids[0]), reward.nan_to_num(0.0).item()


def columns_text(row: dict) -> str:
    """A row without a prompt as text."""
    return "\n".join(f"{name}: {value}" for name, value in row.items())
