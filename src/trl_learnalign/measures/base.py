"""The contract of a measure: something to be found out about prompts, at a price."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd


if TYPE_CHECKING:
    from datasets import Dataset

    from ..config import LearnAlignConfig
    from ..ground.peers import Peers
    from ..ground.store import Log
    from ..host import Host
    from ..scores.builtin import Score

# Prices of a measure for each prompt, the cheapest first: nothing, a forward of the policy, generation with rewards,
# a backward. Plan and dry run tell users by it what a selection takes, whatever the measures are called
PRICES = ("none", "forward", "rollouts", "gradients")


@dataclass(frozen=True)
class Context:
    """
    The surroundings of a measure, equal on all processes but for `host` and `peers`.

    Attributes:
        host ([`Host`]): the trainer, inside [`Host.left_as_found`] while a measure runs.
        peers ([`Peers`]): the processes, an open context.
        config ([`LearnAlignConfig`]): of the selection.
        score ([`Score`]): that is going to rank the prompts.
        seed (`int`): of everything random.
        step (`int`): optimizer steps that the policy was trained for.
        dataset (`Dataset`): the training dataset, with the columns that the trainer would see.
        open_log (`Callable[[str], Log]`): opens the log of a measure by its name.
        clock (`Callable[[str, float], float]`): notes how long a phase took, by its name and the moment of its start,
            and returns the seconds. A measure with a price that never calls it is timed as one phase of its name.
        note (`Callable[[dict], None]`): adds to the provenance of the selection.
        prices (`Sequence[str]`): of all measures that the score of the configuration requires.
        target (`Dataset`, *optional*): prompts of the kind to improve on.
        found (`Mapping[str, Finding]`): what the measures before this one found out, by their names.
    """

    host: "Host"
    peers: "Peers"
    config: "LearnAlignConfig"
    score: "Score"
    seed: int
    step: int
    dataset: "Dataset"
    open_log: "Callable[[str], Log]"
    clock: Callable[[str, float], float]
    note: Callable[[dict], None]
    prices: Sequence[str] = ()
    target: "Dataset | None" = None
    found: "Mapping[str, Finding]" = field(default_factory=dict)

    @property
    def num_rollouts(self) -> int:
        """Rollouts of a prompt."""
        return self.config.num_rollouts or self.host.group_size

    @cached_property
    def identity(self) -> dict:
        """Everything that rollouts and gradients depend on besides weights, data and settings."""
        return self.host.identity()


@dataclass
class Finding:
    """
    A measure's result, equal on all processes as far as the table goes.

    Attributes:
        table (`pandas.DataFrame`, *optional*): a row for each prompt that could be measured, by dataset row. Rows that
            are missing here are left out of the selection. `None` says nothing about the prompts to choose from.
        instead (`str`, *optional*): name of the score to rank by, where the score that was asked for cannot use this
            result. What only that score needed is not measured then, nor anything that it did not need.
        reason (`str`, *optional*): why, as a clause for people, such as "no prompt of the target is learnable".
    """

    table: pd.DataFrame | None
    instead: str | None = None
    reason: str | None = None


class Measure:
    """
    Something that can be found out about prompts. To add one, write a subclass, put an instance into
    [`~trl_learnalign.measures.registry.MEASURES`], and name it in the `requires` of a [`Score`].

    Attributes:
        name (`str`): by which scores and other measures require it; also the name of its log.
        requires (`tuple[str, ...]`): names of the measures that run before it.
        columns (`tuple[str, ...]`): columns of its table that are kept in `scores.parquet`, and that `where` may
            name. They hold numbers, unless [`made_up`] returns something else.
        price (`str`): one of `PRICES`. A measure whose price is `"none"` has no log; one whose price is `"forward"`
            lets the trainer generate nothing.
        forwards (`int`): where the price is `"forward"`, how many the measure takes over each prompt.
    """

    name: str
    requires: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    price: str = "forward"
    forwards: int = 1

    def check(self, host: "Host", config: "LearnAlignConfig") -> None:
        """Raise a `ValueError` for what the measure cannot work with, before anything is measured."""

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """
        Return what the result depends on besides the weights, the base model, the way prompts become tokens, and the
        dataset: values for JSON, by names that people understand. Equal keys mean equal results, which are reused.
        What stands for `rows` is named `"pool"`.
        """
        return {"pool": hashlib.sha256(np.array(rows, np.int64).tobytes()).hexdigest()}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """
        Measure prompts. All processes must call this, and get the same table.

        Args:
            context ([`Context`]): the surroundings.
            rows (`Sequence[int]`): of the dataset, increasing.
            log ([`Log`], *optional*): keeps what is finished, so that a killed run goes on. `None` at no price.
        """
        raise NotImplementedError

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """
        Return a result of the right form without measuring anything, to try a score with.

        Args:
            table (`pandas.DataFrame`): made-up results of the measures before this one, by dataset row.
            num_rollouts (`int`): of a prompt.
            longest (`int`): most tokens of a completion.
        """
        values = (1 + np.arange(len(table))) / (1 + len(table))
        return Finding(pd.DataFrame(dict.fromkeys(self.columns, values), index=table.index))
