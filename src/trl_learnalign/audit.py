"""Readable tables: every rollout, and the prompts as text."""

import itertools
import json

import pyarrow as pa
import torch

from .prompts import prompt_text
from .samples import extremes, shortened, shown


_ROLLOUTS_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("completion_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("rewards", pa.list_(pa.float32())),
        ("advantage", pa.float64()),
    ]
)


def rollouts_table(own, pool, peers) -> pa.Table:
    """A row per rollout of all processes, by dataset index: what `rollouts.parquet` holds."""
    position = {index: i for i, index in enumerate(pool.indices.tolist())}
    rows = []
    for group in own:
        i = position.get(group.index)
        for g, ids in enumerate(group.completion_ids):
            completion = group.completions[g]
            rows.append(
                {
                    "index": group.index,
                    "completion_ids": ids,
                    "completion": completion if isinstance(completion, str) else json.dumps(completion),
                    "rewards": group.rewards[g],
                    "advantage": None if i is None else float(pool.advantages[i, g]),
                }
            )
    rows = sorted(itertools.chain(*peers.gather(rows)), key=lambda row: row["index"])
    return pa.Table.from_pylist(rows, schema=_ROLLOUTS_SCHEMA)


def texts_table(host, dataset, selection, own, peers) -> pa.Table | None:
    """
    The prompts that a report shows, with a completion of the highest- and the lowest-ranked learnable ones; `None` on
    all but the main process.

    Rows without a prompt, which an environment supplies, are shown by the prompt of their first rollout, or, where
    nothing was rolled out, by their columns.
    """
    ends = {index for indices in extremes(selection) for index in indices}
    listed = ends.union(shown(selection))
    named = "prompt" in dataset.column_names
    completions = {group.index: _first_completion(host, group) for group in own if group.index in ends}
    supplied = {} if named else {group.index: host.text(group.prompt_ids[0]) for group in own if group.index in listed}
    gathered = zip(*peers.gather((completions, supplied)), strict=True)
    completions, supplied = (dict(itertools.chain(*(part.items() for part in parts))) for parts in gathered)
    if peers.rank != 0:
        return None
    indices = sorted(listed)
    rows = dataset.select(indices)
    if named:
        texts = [prompt_text(prompt) for prompt in rows["prompt"]]
    else:
        texts = [supplied.get(index) or _columns_text(row) for index, row in zip(indices, rows, strict=True)]
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


def _columns_text(row) -> str:
    return "\n".join(f"{name}: {value}" for name, value in row.items())
