"""The undocumented names of TRL's trainers that this package uses. A later version of TRL may not have them."""

import trl
from transformers import Trainer


TRIED = "1.8 to 1.16"  # versions of TRL that the tests run with: the oldest and the newest
COMMON = (
    # Methods that are called, wrapped or replaced
    "_calculate_rewards",
    "_generate_and_score_completions",
    "_get_output_dir",
    "_get_per_token_logps_and_entropies",
    "_get_train_sampler",
    "_load_optimizer_and_scheduler",
    "_remove_unused_columns",
    "_save_checkpoint",
    "_tokenize_prompts",
    # What a generation changes, and is put back
    "_logs",
    "_metrics",
    "_pending_extra_logs",
    "_pending_metrics",
    "_tag_names",
    "_tokenizer",
    # Settings, as the trainer has read them
    "beta",
    "epsilon_high",
    "max_completion_length",
    "num_generations",
    "num_iterations",
    "ref_model",
    "reward_func_names",
    "reward_funcs",
    "reward_processing_classes",
    "reward_weights",
    "shuffle_dataset",
    "use_vllm",
)
GRPO = (
    "_multi_environment",
    "importance_sampling_level",
    "loss_type",
    "multi_objective_aggregation",
    "scale_rewards",
    "tools",
    "top_entropy_quantile",
    "vllm_importance_sampling_correction",
)
RLOO = ("normalize_advantages", "reward_clip_range")
WITH_VLLM = ("_last_loaded_step", "vllm_mode", "vllm_tensor_parallel_size")


def check_names(trainer: Trainer, names: tuple[str, ...]) -> None:
    """
    Raises:
        `RuntimeError`: the trainer lacks one of these names, so this version of TRL is not one that can be used.
    """
    names += WITH_VLLM if getattr(trainer, "use_vllm", False) else ()
    gone = [name for name in names if not hasattr(trainer, name)]
    if gone:
        raise RuntimeError(
            f"{type(trainer).__name__} has no {', '.join(f'`{name}`' for name in gone)}, which LearnAlign needs and "
            f"TRL {TRIED} has; {trl.__version__} is installed. Install one of those versions, or a newer "
            "trl-learnalign."
        )
