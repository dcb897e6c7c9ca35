"""Rollouts that are kept, as a parquet file of each process."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..ground.disk import write_atomically
from .pool import Pool
from .rollouts import Rollouts


ROLLOUTS_SCHEMA = pa.schema(  # of kept rollouts, a row each
    [
        ("index", pa.int64()),
        ("completion_ids", pa.list_(pa.int32())),
        ("completion", pa.string()),
        ("rewards", pa.list_(pa.float32())),
        ("advantage", pa.float64()),
    ]
)
_SHARD_PROMPTS = 64  # of which the rollouts are in memory at once


def save_shard(path: Path, own: Rollouts, pool: Pool) -> None:
    """
    Write this process's rollouts to a parquet file, a row each, by dataset row.

    Args:
        path (`Path`): of the file.
        own ([`Rollouts`]): this process's.
        pool ([`Pool`]): has the advantages, by dataset row; none for prompts that could not be scored.
    """
    place = {row: i for i, row in enumerate(pool.rows.tolist())}
    rows = sorted(own.rows.tolist())

    def write(temporary):
        with pq.ParquetWriter(temporary, ROLLOUTS_SCHEMA, write_page_checksum=True) as writer:
            for start in range(0, len(rows), _SHARD_PROMPTS):
                groups = [own.group(row, completions=True) for row in rows[start : start + _SHARD_PROMPTS]]
                advantages = [pool.advantages[place[group.row]] if group.row in place else None for group in groups]
                lines = [line for pair in zip(groups, advantages, strict=True) for line in _lines(*pair)]
                writer.write_table(pa.Table.from_pylist(lines, schema=ROLLOUTS_SCHEMA))

    write_atomically(path, write)


def _lines(group, advantages):
    for g, ids in enumerate(group.completion_ids):
        completion = group.completions[g]
        yield {
            "index": group.row,
            "completion_ids": ids,
            "completion": completion if isinstance(completion, str) else json.dumps(completion),
            "rewards": group.rewards[g],
            "advantage": None if advantages is None else float(advantages[g]),
        }
