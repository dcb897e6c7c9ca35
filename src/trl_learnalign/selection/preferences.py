"""Pairs of a better and a worse rollout, for preference learning."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from datasets import Dataset

from ..data.reading import read_prompts


COLUMNS = ["index", "completion", "advantage"]


def preference_pairs(rows: Sequence[int], chosen: Dataset, rollouts: str | os.PathLike) -> Dataset:
    """Pair rollouts of chosen prompts, by their rows in the whole dataset: see [`Selection.preference_pairs`]."""
    files = sorted(Path(rollouts).glob("rollouts*.parquet"))
    if not files:
        raise ValueError(
            f"'{rollouts}' has no file of rollouts. Pass the directory OUTPUT_DIR/_learnalign/rollouts/step-... of a "
            "selection that was made with `save_rollouts=True`."
        )
    kept = pd.concat([pd.read_parquet(file, columns=COLUMNS) for file in files])
    found: dict[str, list] = {"index": [], "prompt": [], "chosen": [], "rejected": [], "margin": []}
    groups = dict(iter(kept.groupby("index")))
    missing = [row for row in rows if row not in groups]
    if missing:
        raise ValueError(
            f"'{rollouts}' has no rollouts of {len(missing):,} of {len(rows):,} chosen prompts, such as row "
            f"{missing[0]}. Pass the directory of this selection, with the files of all processes."
        )
    for row, prompt in zip(rows, read_prompts(chosen, range(len(chosen))), strict=True):
        group = groups[row]
        best, worst = group["advantage"].argmax(), group["advantage"].argmin()
        margin = float(group["advantage"].iloc[best] - group["advantage"].iloc[worst])
        if margin > 0:
            better, worse = (_completion(group["completion"].iloc[place], prompt) for place in (best, worst))
            values = (row, prompt, better, worse, margin)
            for name, value in zip(found, values, strict=True):
                found[name].append(value)
    return Dataset.from_dict(found)


def _completion(text, prompt):
    return text if isinstance(prompt, str) else json.loads(text)
