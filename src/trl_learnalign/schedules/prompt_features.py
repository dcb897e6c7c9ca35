"""What the online schedule knows of a prompt before it was seen: a row of numbers for each row of the dataset."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from ..columns import candidate_rows, check_condition, check_groups, check_named, check_numbers, dataset_columns
from ..measures.hidden_states import hidden_states, reason_against
from ..prompts import equal_prompts, prompt_text


logger = logging.getLogger(__name__)

MOST_GROUPS = 256


def check_online(dataset: Dataset, config) -> None:
    """
    Raises:
        `ValueError`: `group_column` or `pass_rate_column` name a column that there is not or that does not fit; or
            `where` needs more than columns of the dataset.
    """
    if (name := config.pass_rate_column) is not None:
        check_named(dataset, "pass_rate_column", name, (name,))
        check_numbers(dataset, "pass_rate_column", name, name)
        rates = _column(dataset, config.pass_rate_column).astype(float)
        outside = rates[(rates < 0) | (rates > 1)]
        if len(outside):
            raise ValueError(
                f"`pass_rate_column` is {config.pass_rate_column!r}, but success rates are between 0 and 1, and row "
                f"{outside.index[0]} has {outside.iloc[0]:g}. Divide it, or leave the column out."
            )
        if rates.isna().all():
            raise ValueError(
                f"`pass_rate_column` is {config.pass_rate_column!r}, but that column has no value. Leave it out."
            )
    if config.group_column is not None:
        check_groups(dataset, "group_column", config.group_column, MOST_GROUPS)
    if config.where is not None:
        check_condition(dataset, config.where)


def eligible_rows(dataset: Dataset, config) -> np.ndarray:
    """
    The rows that may be trained on: those that `where` holds for, and with `deduplicate` the first of equal prompts,
    int32.
    """
    rows = np.asarray(candidate_rows(dataset, config), dtype=np.int32)
    if config.deduplicate:
        first = np.asarray(equal_prompts(dataset))[rows]
        rows = rows[np.sort(np.unique(first, return_index=True)[1])]
    return rows


def column_features(dataset: Dataset, config) -> np.ndarray:
    """
    Features that need no policy, of shape `(N, D)`, float16: a constant, the logarithm of the prompt's length in
    characters (where there is a prompt), an indicator of each group, the logit of the pass rate. Length and logit
    have mean 0 and variance 1.
    """
    columns = [np.ones(len(dataset), np.float16)]
    if "prompt" in dataset.column_names:
        columns.append(_standard(np.log1p(_lengths(dataset))))
    if config.group_column is not None:
        codes, names = pd.factorize(_column(dataset, config.group_column), use_na_sentinel=False)
        columns += [(codes == code).astype(np.float16) for code in range(len(names))] if len(names) > 1 else []
    if config.pass_rate_column is not None:
        rates = _column(dataset, config.pass_rate_column).astype(float)
        rates = rates.fillna(rates.mean()).clip(0.02, 0.98)
        columns.append(_standard(np.log(rates / (1 - rates)).to_numpy()))
    return np.stack(columns, axis=1)


def _lengths(dataset):
    lengths = []
    for batch in dataset.select_columns(["prompt"]).iter(batch_size=1000):
        lengths += [len(prompt_text(prompt)) for prompt in batch["prompt"]]
    return np.array(lengths, dtype=float)


def _column(dataset, name) -> pd.Series:
    return dataset_columns(dataset, range(len(dataset)), [name])[name]


def _standard(values):
    return ((values - values.mean()) / max(values.std(), 1e-9)).astype(np.float16)


def prompt_features(host, config, peers, key: str | None = None) -> tuple[np.ndarray, str | None]:
    """
    Features of every row of the training dataset, equal on all processes, and the key of the hidden states among them.

    Args:
        host ([`Host`]): of the trainer.
        config ([`LearnAlignConfig`]): says which features.
        peers ([`Peers`]): an open context.
        key (`str`, *optional*): of the hidden states that a resumed run began with.

    Returns:
        `np.ndarray` of shape `(N, D)`, float16, and the key; `None` without hidden states.
    """
    columns = column_features(host.dataset, config)
    reason = reason_against(host) if config.prompt_features else "`prompt_features=False`"
    if reason is not None:
        if config.prompt_features and host.accelerator.is_main_process:
            logger.warning(f"Success is predicted without hidden states of the prompts, as {reason}.")
        return columns, None
    found = hidden_states(host, Path(host.args.output_dir) / "learnalign", peers, key)
    return np.concatenate([columns, found.values], axis=1), found.key
