"""Features of prompts, for the online schedule: a row of numbers for each row of the dataset."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import Dataset

from ..data.columns import (
    candidate_rows,
    check_condition,
    check_flags,
    check_groups,
    check_named,
    check_numbers,
    dataset_columns,
)
from ..data.order import RandomOrder
from ..data.prompts import equal_prompts, prompt_lengths
from ..data.reading import columns_read
from ..measures.feature_file import PromptFeatures
from ..measures.hidden_states import features_of_the_run, hidden_states, reason_against


logger = logging.getLogger(__name__)

MOST_GROUPS = 256
PER_VISIT = 20  # prompts that are looked at for each that a run trains on
LEAST_PART = 4096
NO_VALUE = "no value"  # of `group_column`


def check_online(dataset: Dataset, config) -> None:
    """
    Check the settings of the online schedule against the columns of a dataset.

    Raises:
        `ValueError`: `group_column`, `pass_rate_column` or `target_column` name a column that there is not or that
            does not fit; or `where` needs more than columns of the dataset.
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
    if (name := config.target_column) is not None:
        check_flags(dataset, "target_column", name)
    if config.where is not None:
        check_condition(dataset, config.where)


def eligible_rows(dataset: Dataset, config) -> np.ndarray:
    """
    Return the rows that may be trained on, int32: those that `where` holds for, and with `deduplicate` the first of
    equal prompts.
    """
    rows = np.asarray(candidate_rows(dataset, config), dtype=np.int32)
    if config.deduplicate:
        first = equal_prompts(dataset)[rows]
        rows = rows[np.sort(np.unique(first, return_index=True)[1])]
    return rows


def column_features(dataset: Dataset, config) -> np.ndarray:
    """
    Return features that need no policy, of shape `(N, D)`, float16: a constant, the logarithm of the prompt's length
    in characters (where there is a prompt), an indicator of each group, the logit of the pass rate. Length and logit
    have mean 0 and variance 1.
    """
    columns = [np.ones(len(dataset), np.float16)]
    if "prompt" in columns_read(dataset):
        columns.append(_standard(np.log1p(prompt_lengths(dataset))))
    if config.group_column is not None:
        codes, names = pd.factorize(_column(dataset, config.group_column), use_na_sentinel=False)
        columns += [(codes == code).astype(np.float16) for code in range(len(names))] if len(names) > 1 else []
    if config.pass_rate_column is not None:
        rates = _column(dataset, config.pass_rate_column).astype(float)
        rates = rates.fillna(rates.mean()).clip(0.02, 0.98)
        columns.append(_standard(np.log((rates / (1 - rates)).to_numpy())))
    return np.stack(columns, axis=1)


def kinds_by_column(dataset: Dataset, config) -> tuple[np.ndarray | None, list[str] | None]:
    """
    Return for each row the number of its value of `group_column`, of shape `(N,)`, int16, and the values as texts, by
    number. `None` for both without such a column.
    """
    if config.group_column is None:
        return None, None
    codes, names = pd.factorize(_column(dataset, config.group_column), use_na_sentinel=False)
    return codes.astype(np.int16), [NO_VALUE if pd.isna(name) else str(name) for name in names]


def rates_beforehand(dataset: Dataset, config) -> np.ndarray | None:
    """
    Return the success rates of `pass_rate_column`, of shape `(N,)`, NaN where there is none; `None` without a column.
    """
    if config.pass_rate_column is None:
        return None
    return _column(dataset, config.pass_rate_column).to_numpy(dtype=np.float32, na_value=np.nan)


def target_rows(dataset: Dataset, config, pool: np.ndarray) -> np.ndarray | None:
    """
    Return which rows `target_column` marks, of shape `(N,)`, bool; `None` without one.

    Raises:
        `ValueError`: these are none of the rows that may be trained on, or all.
    """
    if config.target_column is None:
        return None
    mask = _column(dataset, config.target_column).to_numpy(dtype=bool)
    number = int(mask[pool].sum())
    if not number:
        raise ValueError(
            f"`target_column` is {config.target_column!r}, which is True for no row that may be trained on (of "
            f"{len(pool):,}). Mark the rows that the policy should become good at, or correct `where`."
        )
    if number == len(pool):
        raise ValueError(
            f"`target_column` is {config.target_column!r}, which is True for all {number:,} rows that may be trained "
            "on, so there is nothing to choose between. Mark some of them, or use `score='learnalign'`, whose target "
            "is the whole pool."
        )
    return mask


def _column(dataset, name) -> pd.Series:
    return dataset_columns(dataset, range(len(dataset)), [name])[name]


def _standard(values):
    return ((values - values.mean()) / max(values.std(), 1e-9)).astype(np.float16)


def known_beforehand(host, config) -> list[str]:
    """Name what success is predicted from before a prompt was seen."""
    names = ["length"] * ("prompt" in columns_read(host.dataset))
    names += [name for name in (config.group_column, config.pass_rate_column) if name]
    return names + ["hidden states"] * (_reason(host, config) is None)


def _reason(host, config):
    return reason_against(host) if config.prompt_features else "`prompt_features=False`"


def hidden_features(host, config, layout, pool, peers, key: str | None = None) -> PromptFeatures | None:
    """
    Return the hidden states of the prompts, equal on all processes; `None` where there are none.

    A pool much larger than what the run can visit is looked at in part: the first prompts in the order of uniform
    draws, `PER_VISIT` times as many as the run trains on, at least `LEAST_PART`.

    Args:
        host ([`Host`]): of the trainer.
        config ([`LearnAlignConfig`]): says whether.
        layout ([`Layout`]): of the run.
        pool (`np.ndarray` of shape `(n,)`): rows that may be trained on.
        peers ([`Peers`]): an open context.
        key (`str`, *optional*): of those that a resumed run began with.

    Raises:
        [`RewardError`]: a reward function fails on a made-up completion, which is tried before a long forward.
    """
    directory, reason = Path(host.args.output_dir) / "learnalign", _reason(host, config)
    if reason is not None:
        if config.prompt_features and host.accelerator.is_main_process:
            logger.warning(f"Success is predicted without hidden states of the prompts, as {reason}.")
        return None
    if key is not None:
        return features_of_the_run(host, directory, peers, key)
    rows = part_of(pool, layout, host.max_steps)
    return hidden_states(host, directory, peers, rows, lambda: host.try_rewards(int(pool[0])))


def part_of(pool: np.ndarray, layout, max_steps: int) -> np.ndarray:
    """Return the rows of the pool that are looked at before a run of so many steps; see [`hidden_features`]."""
    number = max(PER_VISIT * math.ceil(layout.prompts_trained(max_steps)), LEAST_PART)
    if number >= len(pool):
        return pool
    order = RandomOrder(len(pool), layout.seed)
    return np.sort(pool[[order[place] for place in range(number)]])


def whole_features(
    dataset: Dataset, config, hidden: PromptFeatures | None
) -> tuple[np.ndarray, PromptFeatures | None]:
    """
    Join column features and hidden states to features of every row of the dataset, of shape `(N, D)`, float16. The
    hidden states that are returned are views of them.
    """
    columns = column_features(dataset, config)
    if hidden is None:
        return columns, None
    features = np.concatenate([columns, hidden.spread(len(columns))], axis=1)
    if len(hidden.rows) == len(columns):
        hidden = replace(hidden, values=features[:, columns.shape[1] :])
    return features, hidden
