"""The rewards of a pool's rollouts, and what follows from them: success, learnability, advantages."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from ..curriculum.rewards import doubtful_threshold, has_gradient, is_success
from ..data.columns import row_index
from ..host import Host
from ..scores import maths as scoring
from .racing import expected_learnability


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


@dataclass
class Pool:
    """The prompts that could be scored by their rollouts: n groups of G."""

    rows: torch.Tensor  # (n,), of the dataset, increasing
    deciding: torch.Tensor  # (n, G), the reward that decides success
    success_rate: torch.Tensor  # (n,)
    learnability: torch.Tensor  # (n,)
    advantages: torch.Tensor  # (n, G)
    lengths: torch.Tensor  # (n,), mean tokens of the completions
    unscorable: list[int]  # rows of the prompts left out
    scored_elsewhere: int  # how many of these have rewards that do not decide success
    masked: float  # share of the rollouts without a token in the loss
    without_gradient: int  # prompts whose rewards differ, but not those of rollouts in the loss
    doubt: tuple[float, float, float] | None  # of the threshold, see `doubtful_threshold`

    @classmethod
    def of_rewards(
        cls,
        config: "LearnAlignConfig",
        host: Host,
        rows: torch.Tensor,
        rewards: torch.Tensor,
        penalties: torch.Tensor,
        lengths: torch.Tensor,
        trained: torch.Tensor,
        made: torch.Tensor,
    ) -> "Pool":
        """
        Compute success, learnability and advantages.

        Args:
            config ([`LearnAlignConfig`]): says what success and learnability are.
            host ([`Host`]): says how rewards become advantages.
            rows (`torch.Tensor` of shape `(n,)`): of the dataset, in any order.
            rewards (`torch.Tensor` of shape `(n, G, F)`): NaN where a reward function gave none.
            penalties (`torch.Tensor` of shape `(n, G)`): see [`RolloutGroup`].
            lengths (`torch.Tensor` of shape `(n, G)`): tokens of the completions.
            trained (`torch.Tensor` of shape `(n, G)`): how many of these are in the loss. What has no gradient is not
                learnable.
            made (`torch.Tensor` of shape `(n,)`): how many of the G rollouts were made, the first ones.
        """
        order = rows.argsort()
        rows, rewards, penalties, lengths, trained, made = (
            part[order] for part in (rows, rewards, penalties, lengths.double(), trained, made)
        )
        there = torch.arange(rewards.shape[1]) < made[:, None]
        deciding = host.deciding(rewards, config)
        scorable = ~deciding.isnan().all(1)
        success_rate = scoring.success_rates(deciding, config.success_threshold)
        graded = config.learnability == "variance"
        learnability = scoring.reward_variance(deciding) if graded else scoring.learnability(success_rate)
        advantages = host.advantages(rewards, penalties)
        without_gradient = (learnability > 0) & ~has_gradient(advantages, trained > 0)
        learnability = learnability.masked_fill(without_gradient, 0.0)
        deciding = deciding[scorable]
        return cls(
            rows=rows[scorable],
            deciding=deciding,
            success_rate=success_rate[scorable],
            learnability=learnability[scorable],
            advantages=advantages[scorable],
            lengths=(lengths.sum(1) / made)[scorable],
            unscorable=rows[~scorable].tolist(),
            scored_elsewhere=int((~scorable & ~rewards.isnan().all(2).all(1)).sum()),
            masked=(trained == 0)[there].double().mean().item(),
            without_gradient=int(without_gradient.sum()),
            doubt=None if graded else doubtful_threshold(deciding.numpy(), config.success_threshold),
        )

    def expect(self, prior: tuple[float, float], threshold: float) -> None:
        """
        Make the learnability of each prompt that has some the expected one, see [`expected_learnability`], so that few
        rollouts do not count as many.
        """
        deciding = self.deciding.numpy()
        successes, tries = is_success(deciding, threshold).sum(1), (~np.isnan(deciding)).sum(1)
        expected = torch.from_numpy(expected_learnability(successes, tries, prior))
        self.learnability = torch.where(self.learnability > 0, expected, 0.0)

    def provenance(self) -> dict:
        """Return what a selection notes of the rollouts of its pool."""
        known = self.deciding[~self.deciding.isnan()].numpy()
        return {
            "unscorable": self.unscorable,
            "scored_elsewhere": self.scored_elsewhere,
            "masked": self.masked,
            "without_gradient": self.without_gradient,
            "doubt": self.doubt,
            "reward_range": [known.min().item(), known.max().item()] if len(known) else None,
        }

    def table(self) -> pd.DataFrame:
        """
        Return what the rollouts found out, a row per scorable prompt by dataset row: the columns of `scores.parquet`
        but for the score.
        """
        mean = self.deciding.double().nanmean(1)
        columns = {
            "success_rate": self.success_rate,
            "learnability": self.learnability,
            "reward_mean": mean,
            "reward_std": (self.deciding.double() - mean[:, None]).square().nanmean(1).sqrt(),
            "completion_length_mean": self.lengths,
        }
        arrays = {name: values.numpy() for name, values in columns.items()}
        return pd.DataFrame(arrays, index=row_index(self.rows.numpy()))
