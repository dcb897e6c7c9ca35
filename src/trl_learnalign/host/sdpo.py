"""The host of SDPOTrainer, which is experimental in TRL; imported only where there is a trainer of that class."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer.utils import selective_log_softmax

from ..scores import maths as scoring
from . import generation
from .generation import NoLogps
from .groups import Row
from .names import SDPO
from .objective import arguments_of, check_loss, divisor, of_completions, policy, scale_of_tokens
from .trl import ARGUMENTS, SETTINGS, Host


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


class SDPOHost(Host):
    """
    [`~trl.experimental.sdpo.SDPOTrainer`]: a policy loss with GRPO's advantages by group, a self-distillation loss, or
    a mixture, by `distillation_weight`.

    The self-distillation loss of a rollout depends on the other rollouts of its group: its teacher is shown one that
    succeeded. It has no gradient by rollout, so gradients are taken of the policy loss alone.
    """

    names = SDPO
    tried = "1.16"
    settings = ("scale_rewards",)  # as the trainer has read it; all else is in its arguments
    arguments = (*ARGUMENTS, *SETTINGS, "max_prompt_length", "loss_type", "distillation_weight")
    generation_method = "_prepare_training_batch"
    logps_method = "_compute_rollout_logps"
    books = ("_metrics", "_diagnostic_counters")
    loss_methods = ("compute_loss", "_compute_policy_loss", "_forward_logits")

    @contextmanager
    def left_as_found(self, num_rollouts: int | None) -> Iterator[None]:
        # The trainer tells its callbacks of every generation, which are to hear of those for training alone
        silent = {"_dispatch_self_distillation_callback": lambda *args, **kwargs: None}
        with super().left_as_found(num_rollouts), generation.replaced(self.trainer, **silent):
            yield

    def stand_in(self, gradients: bool) -> NoLogps:
        return _None()

    def tokenize(self, prompts: list) -> list[list[int]]:
        return self.trainer._tokenize_prompts(prompts)

    def advantages(self, rewards: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        return scoring.advantages(rewards, self.trainer.reward_weights.cpu(), self.trainer.scale_rewards)

    def check_loss(self) -> None:
        weight = self.args.distillation_weight
        if weight != 0:
            raise ValueError(
                f"`distillation_weight` is {weight}, and the self-distillation loss has no gradient by rollout: the "
                "teacher is shown the other rollouts of the group. Use `score='learnability'` or `schedule='online'`, "
                "which take no gradients, or `distillation_weight=0.0`, the policy loss alone."
            )
        check_loss(self.trainer, loss_type=LOSS_TYPES)

    def scale_alone(self, tokens: float) -> float:
        return scale_of_tokens(self.trainer, tokens)

    def objective(self, rows: list[Row]) -> torch.Tensor:
        r"""
        Return  sum_rows  weight A / N  sum_t log pi_theta(token t)  over the tokens t that the loss mask keeps, with N
        as in [`~trl_learnalign.host.objective.policy_objective`]: the gradient of the policy loss where every ratio
        pi_theta / pi_old is 1. SDPOTrainer has no KL term.
        """
        trainer = self.trainer
        arguments = input_ids, _, keep = arguments_of(trainer, rows)
        mask = of_completions(arguments, rows, [row.loss_mask for row in rows])
        factors = torch.tensor([row.weight * row.advantage for row in rows], device=mask.device)[:, None]
        logits = trainer._forward_logits(policy(trainer), *arguments)
        logps = selective_log_softmax(logits, input_ids[:, -keep:]).float()
        return (factors / divisor(trainer, mask) * logps * mask).sum()


class _None(NoLogps):
    """Stands in with `None`, which SDPOTrainer accepts in place of a tensor."""

    def __call__(self, *args, **kwargs):
        return None
