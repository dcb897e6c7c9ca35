"""A trainer of TRL, as measures, scores and schedules see it: what GRPOTrainer and RLOOTrainer have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from ..config import LearnAlignConfig
from ..gradients.modes import dropout_off
from . import generation, identities, taps
from .checks import check_trainer
from .generation import NoLogps
from .groups import RolloutGroup, Row
from .memory import Halving
from .names import check_names
from .objective import policy
from .rewards import success_names
from .trial import try_rewards
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


class Host(ABC):
    """
    What a selection needs of a trainer.

    Args:
        trainer ([`~transformers.Trainer`]): of the kind that the host is for.

    Attributes:
        trainer: as it was passed.
        halving ([`Halving`]): how many rollouts fit into the memory at once.
        resumed_from (`Path`, *optional*): the checkpoint that the run was resumed from.
        names (`tuple[str, ...]`): undocumented names of the trainer that are used here.
        settings (`tuple[str, ...]`): attributes that rollouts and gradients depend on.
        arguments (`tuple[str, ...]`): fields of `args` that they depend on.
    """

    names: tuple[str, ...]
    settings: tuple[str, ...]
    arguments: tuple[str, ...]

    def __init__(self, trainer: Trainer):
        check_names(trainer, self.names)
        self.trainer = trainer
        self.halving = Halving()
        self.resumed_from: Path | None = None

    # What it is -------------------------------------------------------------------------------------------------

    @property
    def accelerator(self):
        return self.trainer.accelerator

    @property
    def args(self):
        """The trainer's TrainingArguments."""
        return self.trainer.args

    @property
    def model(self) -> nn.Module:
        """The policy, not wrapped."""
        return self.accelerator.unwrap_model(self.trainer.model)

    @property
    def policy(self) -> nn.Module:
        """The policy to run, see [`~trl_learnalign.host.objective.policy`]."""
        return policy(self.trainer)

    @property
    def dataset(self) -> Dataset:
        """The training dataset."""
        return self.trainer.train_dataset

    def visible(self, dataset: Dataset | None = None) -> Dataset:
        """
        The dataset, by default the training dataset, with the columns that the trainer's dataloader would leave in it.
        """
        dataset = self.dataset if dataset is None else dataset
        return self.trainer._remove_unused_columns(dataset, description="selection")

    @property
    def group_size(self) -> int:
        """Completions that the trainer generates for a prompt."""
        return self.trainer.num_generations

    @group_size.setter
    def group_size(self, size: int):
        self.trainer.num_generations = size

    @property
    def rows_at_once(self) -> int:
        """Completions that a process generates at once in training."""
        return self.args.per_device_train_batch_size * self.args.steps_per_generation

    @property
    def sharing(self) -> int:
        """
        Number of neighbouring processes that share one vLLM. Each samples the completions of all their prompts and
        keeps its own, so they must draw the same random numbers.
        """
        return self.trainer.vllm_tensor_parallel_size if generation.is_colocated(self.trainer) else 1

    @property
    def is_sharded(self) -> bool:
        """Whether a forward is a collective operation, because the weights are spread over the processes."""
        return self.trainer.is_fsdp_enabled or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def has_adapter(self) -> bool:
        """Whether the policy is a PEFT model, whose gradients are those of its adapter."""
        return getattr(self.model, "peft_config", None) is not None

    def identity(self) -> dict:
        """
        What rollouts and gradients depend on besides the weights, the data and LearnAlign's own settings, for JSON:
        see [`~trl_learnalign.host.identities.identity`].
        """
        return identities.identity(self)

    def base_identity(self) -> dict:
        """See [`~trl_learnalign.host.identities.base_identity`]."""
        return identities.base_identity(self)

    def prompt_identity(self, dataset: Dataset | None = None) -> dict:
        """See [`~trl_learnalign.host.identities.prompt_identity`]."""
        return identities.prompt_identity(self, dataset)

    def look_at_functions(self) -> None:
        """
        Looks at the user's functions before they are called, and at weights that training will shard. To be called
        whenever the user may have changed a function since [`note_functions`]; not between calls of training.
        """
        identities.look_at_functions(self)
        if self.is_sharded:
            self.base_identity()

    def note_functions(self) -> None:
        """To be called when selections or training have called the user's functions, which may keep a state."""
        identities.note_functions(self)

    def unidentified(self) -> list[str]:
        """See [`~trl_learnalign.host.identities.unidentified`]."""
        return identities.unidentified(self)

    def weights_digest(self) -> str:
        """See [`~trl_learnalign.host.weights.weights_digest`]."""
        return weights_digest(self.trainer)

    def check(self, config: LearnAlignConfig) -> None:
        """See [`~trl_learnalign.host.checks.check_trainer`]."""
        check_trainer(self, config)

    @abstractmethod
    def check_loss(self) -> None:
        """Raises a `ValueError` for a loss whose gradient [`objective`] does not know."""

    # Prompts and rollouts ---------------------------------------------------------------------------------------

    @property
    def environments(self) -> dict | None:
        """The user's factories of environments by name, `None` without; they add to a prompt when they begin."""
        return getattr(self.trainer, "environment_factories", None)

    @property
    def rollout_func(self) -> Callable | None:
        """A function of the user's that makes of prompts what it likes, completions included."""
        return getattr(self.trainer, "rollout_func", None)

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        return self.trainer._tokenizer.decode(ids, skip_special_tokens=True)

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts that go on where others end, without special tokens."""
        return self.trainer._tokenizer(texts, add_special_tokens=False)["input_ids"]

    def prompt_ids(self, rows: list[dict]) -> list[list[int]]:
        """
        The prompt tokens of rows of the dataset, as training makes them: with the chat template, and the tools in it.
        Not what an environment adds when it begins, nor what a `rollout_func` makes of a prompt; of images nothing.

        Raises:
            `ValueError`: the rows have no prompt, which an environment supplies.
        """
        if not all("prompt" in row for row in rows):
            raise ValueError(
                "There are no prompt tokens before the environment begins: the training dataset has no column "
                "`prompt`. Give it one, or do not use features of the prompts."
            )
        return [list(ids) for ids in self.trainer._tokenize_prompts([row["prompt"] for row in rows])[0]]

    @contextmanager
    def left_as_found(self, num_rollouts: int) -> Iterator[None]:
        """
        Lets the trainer generate `num_rollouts` completions a prompt, with dropout off and no log-probabilities
        computed, and undoes on exit all that a generation changes: metrics, logs, counters, modes, random states.
        """
        with generation.left_as_found(self.trainer, num_rollouts), dropout_off(self.trainer.model):
            yield

    def generate(self, dataset: Dataset, rows: list[int], seed: int, gradients: bool = True) -> list[RolloutGroup]:
        """See [`~trl_learnalign.host.generation.generate_groups`]."""
        return generation.generate_groups(self, dataset, rows, seed, gradients)

    @property
    def has_penalties(self) -> bool:
        """Whether [`RolloutGroup`] has penalties where gradients will be taken, and only there."""
        return False

    def stand_in(self, gradients: bool) -> NoLogps:
        """Takes the place of the log-probabilities that the trainer computes after generating."""
        return NoLogps()

    # Rewards ----------------------------------------------------------------------------------------------------

    @property
    def reward_names(self) -> list[str]:
        """Of the reward functions, in their order."""
        return list(self.trainer.reward_func_names)

    @property
    def has_reward_model(self) -> bool:
        """Whether a reward function is a model, which scores all rollouts that were generated at once."""
        return any(isinstance(function, nn.Module) for function in self.trainer.reward_funcs)

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        """Rewards of shape `(..., F)`, weighted and summed over the functions; NaN where none gave one."""
        weights = self.trainer.reward_weights.cpu()
        return (rewards * weights).nansum(-1).masked_fill(rewards.isnan().all(-1), torch.nan)

    def deciding(self, rewards: torch.Tensor, config: LearnAlignConfig) -> torch.Tensor:
        """
        Of rewards of shape `(n, G, F)` the one that decides success, of shape `(n, G)`: of several functions that
        `success_reward` names, the first that gave a reward for the rollout.
        """
        if config.success_reward is None:
            return rewards[:, :, 0] if rewards.shape[2] == 1 else self.total(rewards)
        first, *others = (
            rewards[:, :, self.reward_names.index(name)] for name in success_names(config.success_reward)
        )
        for other in others:
            first = first.where(~first.isnan(), other)
        return first

    def try_rewards(self, row: int) -> None:
        """See [`~trl_learnalign.host.trial.try_rewards`]."""
        try_rewards(self, row)

    @abstractmethod
    def advantages(self, rewards: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        """
        Advantages of the rollouts of a pool, as the trainer computes them, with the pool in place of the batch.

        Args:
            rewards (`torch.Tensor` of shape `(n, G, F)`): NaN where a function gave none.
            penalties (`torch.Tensor` of shape `(n, G)`): see [`RolloutGroup`].

        Returns:
            `torch.Tensor` of shape `(n, G)`, float64; 0 for a rollout that no reward function scored.
        """

    # Gradients --------------------------------------------------------------------------------------------------

    @abstractmethod
    def objective(self, rows: list[Row]) -> torch.Tensor:
        """
        The scalar whose gradient is that of the trainer's own loss, with the sign of an objective, summed over `rows`.
        """

    def filler(self) -> Row:
        """A row of weight 0. TRL makes sure that there is a padding token."""
        token = self.trainer._tokenizer.pad_token_id
        return Row([token], [token], [1], 0.0, 0.0)

    @property
    def runs_reference(self) -> bool:
        """Whether a gradient takes a forward of the reference policy."""
        return False

    @property
    def counts_without_advantage(self) -> bool:
        """
        Whether a row of advantage 0 matters to a gradient: by its KL term, or by entropies that others are compared
        with.
        """
        return self.runs_reference or self.entropy_share < 1

    @property
    def entropy_share(self) -> float:
        """
        Share of the tokens, those of the highest entropy, that the loss trains on. A host with less than 1 has the
        methods `entropies` and `mark_high_entropies`.
        """
        return 1.0

    # What training sees -----------------------------------------------------------------------------------------

    def layout(self) -> dict:
        """
        What the trainer's configuration says of the stream of prompts: the fields of [`Layout`] but for the config's.
        """
        args = self.args
        return {
            "pool_size": len(self.dataset),
            "chunk_prompts": args.generation_batch_size // self.group_size,
            "repeats": args.steps_per_generation * self.trainer.num_iterations,
            "group_size": self.group_size,
            "accumulation": args.gradient_accumulation_steps,
            "read_ahead": 1 + args.dataloader_num_workers * (args.dataloader_prefetch_factor or 2),
            "epochs": args.num_train_epochs,
            "shuffle": self.trainer.shuffle_dataset,
            "seed": args.seed,
        }

    def replace_sampler(self, make: Callable[[Dataset | None], Sampler]) -> None:
        """From now on `make(dataset)` makes the sampler of training; `None` stands for the training dataset."""
        self.trainer._get_train_sampler = make

    def on_rewards(self, observer: taps.RewardObserver, check: taps.RowCheck | None = None) -> taps.Undo:
        """See [`~trl_learnalign.host.taps.observe_rewards`]."""
        return taps.observe_rewards(self.trainer, observer, check)

    def before_checkpoint(self, write: taps.CheckpointWriter) -> taps.Undo:
        """See [`~trl_learnalign.host.taps.write_before_checkpoints`]."""
        return taps.write_before_checkpoints(self.trainer, write)

    def on_resume(self, read: Callable[[Path], None]) -> taps.Undo:
        """See [`~trl_learnalign.host.taps.read_on_resume`]."""
        return taps.read_on_resume(self.trainer, read)

    def log_metric(self, name: str, value: float) -> None:
        """Adds a value to those whose mean the next entry of the training's log shows."""
        self.trainer._metrics["train"][name].append(value)

    def add_tag(self, tag: str) -> None:
        """For the cards that the trainer and PEFT write."""
        self.trainer.model.add_model_tags(tag)
        self.trainer._tag_names = [*self.trainer._tag_names, tag]

    def weights_were_set(self) -> None:
        """To be called after the weights were changed by something else than a step: vLLM still holds the old ones."""
        if self.trainer.use_vllm:
            self.trainer._last_loaded_step = -1
