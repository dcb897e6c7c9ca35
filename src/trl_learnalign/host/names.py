"""
Undocumented names of TRL's trainers that each role of a host needs. A later version of TRL may not have them.

A host lists names by role, those that every role needs as `ALWAYS`. It plays no role that it lists no names for.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import trl
from transformers import PreTrainedModel, Trainer


if TYPE_CHECKING:
    from datasets import Dataset

TRIED = "1.8 to 1.16"  # versions of TRL that the tests run with: the oldest and the newest
ALWAYS, GENERATES, DIFFERENTIATES, TRAINS = "always", "generates", "differentiates", "trains"
Names = dict[str, tuple[str, ...]]


class Role(NamedTuple):
    """
    Part that a trainer plays.

    Attributes:
        purpose: completes "LearnAlign needs this to ...".
        without: a sentence that says what still works.
    """

    purpose: str
    without: str


ROLES = {
    ALWAYS: Role("serve the trainer", "No part of LearnAlign works without it."),
    GENERATES: Role(
        "generate rollouts outside of training",
        "Use `schedule='online'`, or a score that needs no rollouts, such as `score='random'`.",
    ),
    DIFFERENTIATES: Role(
        "take gradients of its loss", "Use `score='learnability'` or `schedule='online'`, which take no gradients."
    ),
    TRAINS: Role(
        "choose the prompts of its training", "Use `select_prompts`, and train on the rows that the selection names."
    ),
}

_ALWAYS = (
    "_remove_unused_columns",
    "_tokenize_prompts",
    "_tokenizer",
    "num_generations",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "reward_weights",
)
_GENERATES = (
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_get_per_token_logps_and_entropies",
    # What a generation changes, and is put back
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_pending_metrics",
)
_DIFFERENTIATES = ("_get_per_token_logps_and_entropies", "beta", "max_completion_length", "ref_model")
_TRAINS = (
    "_buffered_inputs",
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_metrics",
    "_step",
    "_tag_names",
    "num_iterations",
    "shuffle_dataset",
)
# Private names of transformers' Trainer
_OF_TRAINER = ("_get_output_dir", "_get_train_sampler", "_load_optimizer_and_scheduler", "_save_checkpoint")
WITH_VLLM = ("_last_loaded_step",)

GRPO: Names = {
    ALWAYS: (*_ALWAYS, "_multi_environment", "multi_objective_aggregation", "scale_rewards", "tools"),
    GENERATES: (*_GENERATES, "vllm_importance_sampling_correction"),
    DIFFERENTIATES: (
        *_DIFFERENTIATES,
        "epsilon_high",
        "importance_sampling_level",
        "loss_type",
        "top_entropy_quantile",
    ),
    TRAINS: (*_TRAINS, *_OF_TRAINER),
}
RLOO: Names = {
    ALWAYS: (*_ALWAYS, "normalize_advantages", "reward_clip_range"),
    GENERATES: (*_GENERATES, "beta"),
    DIFFERENTIATES: _DIFFERENTIATES,
    TRAINS: (*_TRAINS, *_OF_TRAINER),
}
SDPO: Names = {
    ALWAYS: (*_ALWAYS, "scale_rewards"),
    GENERATES: (
        "_calculate_rewards",
        "_compute_rollout_logps",
        "_diagnostic_counters",
        "_dispatch_self_distillation_callback",
        "_metrics",
        "_prepare_training_batch",
    ),
    DIFFERENTIATES: ("_forward_logits", "loss_type", "max_completion_length"),
    TRAINS: (
        "_buffered_inputs",
        "_calculate_rewards",
        "_metrics",
        "_prepare_training_batch",
        "_step",
        "_tag_names",
        "num_iterations",
        "shuffle_dataset",
        *_OF_TRAINER,
    ),
}

ASYNC_GRPO: Names = {
    ALWAYS: (
        *("_groups_before_resume", "_metrics", "_remove_unused_columns", "_trained_groups"),
        *("model_version", "rollout_queue", "rollout_worker"),
    ),
    TRAINS: ("_get_output_dir", "_load_optimizer_and_scheduler", "_save_checkpoint", "_tag_names"),
}


def check_role(trainer: Trainer, names: Names, role: str, tried: str = TRIED) -> None:
    """
    Raise an error if a trainer cannot play a role.

    Args:
        names: those that its host needs, by role.
        role: one of `ROLES`.
        tried: versions of TRL that are known to have these names.

    Raises:
        `ValueError`: the trainer's host does not play this role.
        `RuntimeError`: the trainer lacks one of the names, so this version of TRL is not one that can be used.
    """
    kind, part = type(trainer).__name__, ROLES[role]
    if role not in names:
        raise ValueError(
            f"The host of {kind} does not know how to {part.purpose}. {part.without} Or give the host the role "
            f"'{role}'."
        )
    needed = names[role] + (WITH_VLLM if role == GENERATES and getattr(trainer.args, "use_vllm", False) else ())
    gone = [name for name in needed if not hasattr(trainer, name)]
    if gone:
        raise RuntimeError(
            f"{kind} has no {', '.join(f'`{name}`' for name in gone)}, which LearnAlign needs to {part.purpose} and "
            f"TRL {tried} has; {trl.__version__} is installed. {part.without} Install one of those versions, or a "
            "newer trl-learnalign."
        )


if TYPE_CHECKING:

    class RolloutTrainer(Trainer):
        """
        A Trainer with the attributes that hosts use, for type checkers: no trainer of TRL inherits from it. A host
        uses an attribute only if its names list it or it is optional.
        """

        args: Any  # GRPOConfig, RLOOConfig and SDPOConfig share no base that has the fields in use
        model: PreTrainedModel
        model_wrapped: torch.nn.Module
        train_dataset: Dataset
        processing_class: Any
        beta: float
        epsilon_high: float
        importance_sampling_level: str
        loss_type: str
        max_completion_length: int | None
        multi_objective_aggregation: str
        normalize_advantages: bool
        num_generations: int
        num_iterations: int
        ref_model: torch.nn.Module | None
        reward_clip_range: tuple[float, float] | None
        reward_func_names: list[str]
        reward_funcs: list[Any]
        reward_processing_classes: list[Any]
        reward_weights: torch.Tensor
        scale_rewards: str
        shuffle_dataset: bool
        top_entropy_quantile: float
        _buffered_inputs: Any
        _calculate_rewards: Any
        _forward_logits: Any
        _get_per_token_logps_and_entropies: Any
        _last_loaded_step: int
        _metrics: dict[str, dict[str, list[float]]]
        _multi_environment: bool
        _step: int
        _tag_names: list[str]
        _tokenize_prompts: Any
        _tokenizer: Any

else:
    RolloutTrainer = Trainer
