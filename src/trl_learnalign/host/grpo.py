"""The host of GRPOTrainer: its advantages, its loss, its environments."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..scores import maths as scoring
from . import objective
from .generation import replaced
from .groups import Row
from .names import GRPO
from .objective import LEVELS, LOSS_TYPES, scale_of_tokens
from .trl import ARGUMENTS, SETTINGS, Host


_ENVIRONMENTS = "_batch_environments"


class GRPOHost(Host):
    """[`~trl.GRPOTrainer`]: advantages by group, a loss by `loss_type`, the KL term in the loss."""

    names = GRPO
    composes = True
    settings = (
        *SETTINGS,
        "multi_objective_aggregation",
        "max_tool_calling_iterations",
        "loss_type",
        "importance_sampling_level",
        "top_entropy_quantile",
        "epsilon_high",
        "scale_rewards",
    )
    arguments = (*ARGUMENTS, "use_bias_correction_kl", "delta")

    @contextmanager
    def with_logps(self) -> Iterator[None]:
        # TRL leaves them out where `gradient_accumulation_steps % (steps_per_generation * num_iterations) == 0`: then
        # the policy of the loss is that of the generation, but not for rows that are replayed
        with replaced(self.trainer, num_iterations=self.args.gradient_accumulation_steps + 1):
            yield

    def check_loss(self) -> None:
        objective.check_loss(self.trainer, loss_type=LOSS_TYPES, importance_sampling_level=LEVELS)

    def prompt_ids(self, rows: list[dict]) -> list[list[int]]:
        trainer = self.trainer
        if self.environments is None:
            return super().prompt_ids(rows)
        # Each row's tools are those of its environment, which is told by what the last generation left here
        before = getattr(trainer, _ENVIRONMENTS, None)
        names = [row.get("environment") if trainer._multi_environment else None for row in rows]
        setattr(trainer, _ENVIRONMENTS, names)
        try:
            return super().prompt_ids(rows)
        finally:
            setattr(trainer, _ENVIRONMENTS, before)

    def advantages(self, rewards: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        trainer = self.trainer
        weights = trainer.reward_weights.cpu()
        return scoring.advantages(rewards, weights, trainer.scale_rewards, trainer.multi_objective_aggregation)

    def objective(self, rows: list[Row]) -> torch.Tensor:
        return objective.policy_objective(self.trainer, rows)

    def scale_alone(self, tokens: float) -> float:
        return scale_of_tokens(self.trainer, tokens)

    @property
    def runs_reference(self) -> bool:
        return self.trainer.beta != 0.0

    @property
    def entropy_share(self) -> float:
        return self.trainer.top_entropy_quantile

    def entropies(self, rows: list[Row]) -> list[torch.Tensor]:
        """
        Compute entropies in nats of the policy where it drew the completion tokens of each row, of shape `(tokens,)`,
        float32.
        """
        return objective.token_entropies(self.trainer, rows)

    def mark_high_entropies(self, rows: list[Row], entropies: list[torch.Tensor]) -> None:
        """Set the `entropy_mask` of the rows of a group."""
        objective.mark_high_entropies(rows, entropies, self.entropy_share)
