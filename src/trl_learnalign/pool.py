"""Every prompt of a pool: rewards, learnability, score; and the choice that follows."""

from dataclasses import dataclass

import pyarrow as pa
import torch

from . import scoring
from .config import LearnAlignConfig
from .selection import SCORES_SCHEMA


@dataclass
class Pool:
    """The scorable prompts, by dataset index, with n groups of G rollouts."""

    indices: torch.Tensor  # (n,), sorted
    deciding: torch.Tensor  # (n, G), the reward that decides success
    success_rate: torch.Tensor  # (n,)
    learnability: torch.Tensor  # (n,)
    advantages: torch.Tensor  # (n, G)
    lengths: torch.Tensor  # (n, G), tokens
    unscorable: list[int]  # indices of the prompts left out

    def __post_init__(self):
        self.score = self.learnability
        self.alignment = torch.full_like(self.learnability, torch.nan)  # not computed
        self.gradient_norm = torch.full_like(self.learnability, torch.nan)

    @classmethod
    def of_rewards(cls, indices, rewards, lengths, config: LearnAlignConfig, trainer) -> "Pool":
        """
        Args:
            indices (`torch.Tensor` of shape `(n,)`): dataset indices in any order.
            rewards (`torch.Tensor` of shape `(n, G, F)`): NaN where a reward function gave none.
            lengths (`torch.Tensor` of shape `(n, G)`): tokens of the completions.
            config ([`LearnAlignConfig`]): says what success and learnability are.
            trainer ([`~trl.GRPOTrainer`]): says how rewards become advantages.
        """
        order = indices.argsort()
        indices, rewards, lengths = indices[order], rewards[order], lengths[order].double()
        weights = trainer.reward_weights.cpu()
        if config.success_reward is not None:
            deciding = rewards[:, :, trainer.reward_func_names.index(config.success_reward)]
        elif rewards.shape[2] == 1:
            deciding = rewards[:, :, 0]
        else:  # `learnability="variance"` of the total reward
            deciding = (rewards * weights).nansum(2).masked_fill(rewards.isnan().all(2), torch.nan)
        scorable = ~deciding.isnan().all(1)
        success_rate = scoring.success_rates(deciding, config.success_threshold)
        if config.learnability == "variance":
            learnability = scoring.reward_variance(deciding)
        else:
            learnability = scoring.learnability(success_rate)
        advantages = scoring.advantages(rewards, weights, trainer.scale_rewards, trainer.multi_objective_aggregation)
        columns = (indices, deciding, success_rate, learnability, advantages, lengths)
        return cls(*(column[scorable] for column in columns), unscorable=indices[~scorable].tolist())

    def reward_range(self) -> list[float] | None:
        """The least and the greatest of the rewards that decide success; `None` without a scorable prompt."""
        known = self.deciding[~self.deciding.isnan()]
        return [known.min().item(), known.max().item()] if known.numel() else None

    def set_scores(self, indices, scores, alignments, norms) -> None:
        """Scores, alignments and gradient norms of the prompts `indices`; the others score 0."""
        places = torch.searchsorted(self.indices, indices)
        self.score = torch.zeros_like(self.learnability)
        for column, values in zip(
            (self.score, self.alignment, self.gradient_norm), (scores, alignments, norms), strict=True
        ):
            column[places] = values

    def choose(self, num: int, seed: int) -> tuple[list[int], pa.Table]:
        """
        The dataset indices of the `num` best, best first, and the table of all scores. A prompt with V = 0 is never chosen, not
        even when there are fewer than `num` others; one with V > 0 may be chosen with a negative score. `seed` decides ties.
        """
        order = torch.tensor(scoring.ranking(self.score, self.learnability, seed), dtype=torch.int64)
        chosen = order[: min(num, int((self.learnability > 0).sum()))]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        mean = self.deciding.double().nanmean(1)
        columns = {
            "index": self.indices,
            "success_rate": self.success_rate,
            "learnability": self.learnability,
            "alignment": self.alignment,
            "score": self.score,
            "rank": rank,
            "selected": rank < len(chosen),
            "reward_mean": mean,
            "reward_std": (self.deciding.double() - mean[:, None]).square().nanmean(1).sqrt(),
            "completion_length_mean": self.lengths.mean(1),
            "gradient_norm": self.gradient_norm,
        }
        arrays = [pa.array(columns[field.name].numpy(), field.type, from_pandas=True) for field in SCORES_SCHEMA]
        return self.indices[chosen].tolist(), pa.Table.from_arrays(arrays, schema=SCORES_SCHEMA)


def draw_pool(num_rows: int, candidates: int | None, seed: int) -> list[int]:
    """The rows to score: all, or a random part of that size; sorted."""
    if candidates is None or candidates >= num_rows:
        return list(range(num_rows))
    return sorted(torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:candidates].tolist())


def random_choice(pool: list[int], num: int, seed: int) -> tuple[list[int], pa.Table]:
    """`num` rows of the pool at random, and the table of scores, in which all but the ranks is null."""
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed)).tolist()
    ranks = torch.empty(len(pool), dtype=torch.int64)
    ranks[order] = torch.arange(len(pool))
    columns = {name: [None] * len(pool) for name in SCORES_SCHEMA.names}
    columns |= {"index": pool, "rank": ranks.tolist(), "selected": (ranks < num).tolist()}
    return [pool[j] for j in order[:num]], pa.Table.from_pydict(columns, schema=SCORES_SCHEMA)
