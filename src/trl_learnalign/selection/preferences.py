"""Pairs of a better and a worse rollout, for preference learning."""

import json
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from datasets import Dataset

from ..data.reading import read_prompts


_COLUMNS = ("index", "completion", "advantage")


def preference_pairs(dataset: Dataset, rollouts: str | os.PathLike, rows: Sequence[int] | None = None) -> Dataset:
    """
    Pair the best with the worst rollout of each group in a directory of kept rollouts, for preference learning such as
    TRL's DPOTrainer (arXiv 2405.00451, where a tree search makes the rollouts). Groups whose rollouts are tied are
    left out.

    Args:
        dataset (`Dataset`): the training dataset of the run.
        rollouts (`str` or `PathLike`): `OUTPUT_DIR/_learnalign/rollouts/training` of an online run, or `.../step-...`
            of a selection, see `LearnAlignConfig(save_rollouts=True)`. On several machines, with the files of all.
        rows (`Sequence[int]`, *optional*): rows of the dataset to make pairs of, in this order; for a selection. By
            default all groups, in the order of the run.

    Returns:
        `Dataset`: `index`, `prompt`, `chosen`, `rejected` (text, or messages as the prompt has them) and `margin`, the
        difference of their advantages.

    Raises:
        `ValueError`: there are no rollouts, not those of all `rows`, or those of rows that the dataset does not have.
    """
    files = sorted(Path(rollouts).glob("rollouts*.parquet"))
    if not files:
        raise ValueError(
            f"'{rollouts}' has no file of rollouts. Pass the directory OUTPUT_DIR/_learnalign/rollouts/step-... of a "
            "selection, or .../training of an online run, that was made with `save_rollouts=True`."
        )
    found = [pair for _, parts in groupby(files, _generation) for pair in _pairs([*parts])]
    if rows is not None:
        groups = {pair[0]: pair for pair in found}
        missing = [row for row in rows if row not in groups]
        if missing:
            raise ValueError(
                f"'{rollouts}' has no rollouts of {len(missing):,} of {len(rows):,} chosen prompts, such as row "
                f"{missing[0]}. Pass the directory of this selection, with the files of all processes."
            )
        found = [groups[row] for row in rows]
    outside = [pair[0] for pair in found if pair[0] >= len(dataset)]
    if outside:
        raise ValueError(
            f"'{rollouts}' has rollouts of row {outside[0]}, but the dataset has {len(dataset)} rows. Pass the "
            "dataset that the run was trained on."
        )
    pairs: dict[str, list] = {"index": [], "prompt": [], "chosen": [], "rejected": [], "margin": []}
    live = [one for one in found if one[-1] > 0]
    for (index, *texts, margin), prompt in zip(live, read_prompts(dataset, [one[0] for one in live]), strict=True):
        better, worse = texts if isinstance(prompt, str) else map(json.loads, texts)
        for name, value in zip(pairs, (index, prompt, better, worse, margin), strict=True):
            pairs[name].append(value)
    return Dataset.from_dict(pairs)


def _generation(file: Path) -> str:
    """Name what a file is a part of: a generation of training, whose groups may be on several processes, or all."""
    return file.stem.split("-")[1] if "draw" in pq.read_schema(file).names else ""


def _pairs(files: list[Path]) -> list[tuple[int, str, str, float]]:
    """Return of each group its row, the best and the worst completion, and the difference of their advantages."""
    group = "draw" if "draw" in pq.read_schema(files[0]).names else "index"
    kept = pd.concat([pd.read_parquet(file, columns=list({*_COLUMNS, group})) for file in files])
    pairs = []
    for _, one in kept.dropna(subset="advantage").groupby(group):
        best, worst = one.iloc[one["advantage"].argmax()], one.iloc[one["advantage"].argmin()]
        margin = float(best["advantage"] - worst["advantage"])
        pairs.append((int(best["index"]), best["completion"], worst["completion"], margin))
    return pairs
