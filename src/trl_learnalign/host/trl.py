"""A trainer of TRL, as measures, scores and schedules see it: what all hosts have in common."""

from datasets import Dataset

from ..config import LearnAlignConfig
from . import identities
from .checks import check_trainer
from .roles import Differentiates, Generates, Trains
from .weights import weights_digest


# What rollouts and gradients depend on with every trainer: attributes of it, and fields of its `args`
SETTINGS = (
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "beta",
    "mask_truncated_completions",
)
ARGUMENTS = (
    *("bf16", "fp16", "cast_lm_head_to_fp32", "generation_kwargs", "cache_implementation"),
    *("use_transformers_paged", "use_transformers_continuous_batching"),
    *("vllm_structured_outputs_regex", "vllm_model_impl", "vllm_max_model_length"),
)


class Host(Generates, Differentiates, Trains):
    """
    A trainer as the rest of the package sees it. A subclass has the `names` of each role that the trainer plays and
    its `advantages`, and `objective` if gradients can be taken. [`~trl_learnalign.host.register_host`] makes it known.

    Attributes:
        settings (`tuple[str, ...]`): attributes that rollouts and gradients depend on.
        arguments (`tuple[str, ...]`): fields of `args` that they depend on.
        is_asynchronous (`bool`): whether the trainer generates in another process while it trains.
    """

    is_asynchronous = False
    settings: tuple[str, ...] = SETTINGS
    arguments: tuple[str, ...] = ARGUMENTS

    def check(self, config: LearnAlignConfig) -> None:
        """
        Raise an error for settings of the trainer with which no prompts can be chosen:
        [`~trl_learnalign.host.checks.check_trainer`].
        """
        check_trainer(self, config)

    def identity(self) -> dict:
        """
        Return what rollouts and gradients depend on besides the weights, the data and LearnAlign's own settings, for
        JSON: [`~trl_learnalign.host.identities.identity`].
        """
        return identities.identity(self)

    def base_identity(self) -> dict:
        """Identify the base model and the reference policy: [`~trl_learnalign.host.identities.base_identity`]."""
        return identities.base_identity(self)

    def prompt_identity(self, dataset: Dataset | None = None) -> dict:
        """Identify what makes tokens of rows: [`~trl_learnalign.host.identities.prompt_identity`]."""
        return identities.prompt_identity(self, dataset)

    def look_at_functions(self) -> None:
        """
        Look at the user's functions before they are called, and at weights that training will shard. To be called
        whenever the user may have changed a function since [`note_functions`]; not between calls of training.
        """
        identities.look_at_functions(self)
        if self.is_sharded:
            self.base_identity()

    def note_functions(self) -> None:
        """Note that selections or training have called the user's functions, which may keep a state."""
        identities.note_functions(self)

    def unidentified(self) -> list[str]:
        """Describe functions that cannot be identified: [`~trl_learnalign.host.identities.unidentified`]."""
        return identities.unidentified(self)

    def weights_digest(self) -> str:
        """Return a digest of the trainable weights: [`~trl_learnalign.host.weights.weights_digest`]."""
        return weights_digest(self.trainer)
