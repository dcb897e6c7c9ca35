"""The host of RLOOTrainer: its advantages, its loss, its penalty for leaving the reference policy."""

import torch

from ..scores import maths as scoring
from .generation import NoLogps
from .groups import Row
from .names import RLOO, RolloutTrainer
from .objective import arguments_of, of_completions, policy
from .trl import SETTINGS, Host


class RLOOHost(Host):
    """
    [`~trl.RLOOTrainer`]: advantages against the mean of the other rollouts, one ratio a completion, the KL term in the
    reward.
    """

    names = RLOO
    composes = True
    settings = (*SETTINGS, "normalize_advantages", "reward_clip_range", "_name")

    @property
    def has_penalties(self) -> bool:
        return self.trainer.beta != 0.0

    def stand_in(self, gradients: bool) -> NoLogps:
        if gradients and self.has_penalties:
            return _Recorder(self.trainer)
        return _Zeros()

    def advantages(self, rewards: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        trainer, weights = self.trainer, self.trainer.reward_weights.cpu()
        clip, normalize = trainer.reward_clip_range, trainer.normalize_advantages
        return scoring.advantages_leave_one_out(rewards, weights, penalties, clip, normalize)

    def objective(self, rows: list[Row]) -> torch.Tensor:
        r"""
        Return  sum_rows  weight A  sum_t log pi_theta(token t)  over the tokens t that the loss mask keeps. Its
        gradient is that of RLOOTrainer's loss where the ratio pi_theta / pi_old of every completion is 1, and so
        nothing is cut. The router's auxiliary loss, which does not depend on rewards, is left out.
        """
        arguments = arguments_of(self.trainer, rows)
        mask = of_completions(arguments, rows, [row.loss_mask for row in rows])
        factors = torch.tensor([row.weight * row.advantage for row in rows], device=mask.device)[:, None]
        logps = self.trainer._get_per_token_logps_and_entropies(policy(self.trainer), *arguments)[0].float()
        return (factors * logps * mask).sum()


class _Zeros(NoLogps):
    """Stands in with zeros, as RLOOTrainer sums up log-probabilities."""

    def __call__(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None


class _Recorder(NoLogps):
    """Computes log-probabilities, and keeps those of the policy and of the reference policy for the KL term."""

    def __init__(self, trainer: RolloutTrainer):
        self.beta, self._compute = trainer.beta, trainer._get_per_token_logps_and_entropies
        self._seen: list[torch.Tensor] = []  # of the policy, then of the reference policy

    def __call__(self, *args, **kwargs):
        found = self._compute(*args, **kwargs)
        self._seen.append(found[0])
        return found

    def penalties(self, output: dict) -> torch.Tensor:
        logps, reference = self._seen
        return self.beta * ((logps - reference) * output["completion_mask"]).sum(1)
