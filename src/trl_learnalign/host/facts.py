"""Facts about a trainer that every role of a host needs: its parts, its model, its prompts and its rewards."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch import nn
from transformers import Trainer

from ..config import LearnAlignConfig
from . import generation
from .memory import Halving
from .names import ALWAYS, TRIED, Names, RolloutTrainer, check_role
from .objective import policy
from .rewards import success_names


class Facts(ABC):
    """
    Facts about a trainer.

    Args:
        trainer ([`~transformers.Trainer`]): of the kind that the host is for.

    Attributes:
        trainer: as it was passed, with the attributes that `names` lists.
        served (`type`): the class that the host is registered for: the trainer's or one that it inherits from.
        halving ([`Halving`]): how many rollouts fit into the memory at once.
        resumed_from (`Path`, *optional*): the checkpoint that the run was resumed from.
        names (`dict[str, tuple[str, ...]]`): undocumented names of the trainer that are used here, by role, see
            [`~trl_learnalign.host.names.ROLES`].
        tried (`str`): versions of TRL that have these names.
    """

    names: Names
    tried = TRIED

    def __init__(self, trainer: Trainer):
        self.trainer = cast(RolloutTrainer, trainer)
        self.served: type = type(trainer)
        self.require(ALWAYS)
        self.halving = Halving()
        self.resumed_from: Path | None = None

    def require(self, role: str) -> None:
        """
        Raise an error if the trainer cannot play a role.

        Raises:
            `ValueError`: the host does not play the role.
            `RuntimeError`: a version of TRL that lacks what is used here.
        """
        check_role(self.trainer, self.names, role, self.tried)

    def plays(self, role: str) -> bool:
        """Tell if [`require`] would pass."""
        try:
            self.require(role)
        except (ValueError, RuntimeError):
            return False
        return True

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
        Return the dataset, by default the training dataset, with the columns that the trainer's dataloader would leave
        in it.
        """
        dataset = self.dataset if dataset is None else dataset
        return self.trainer._remove_unused_columns(dataset, description="selection")

    @property
    def group_size(self) -> int:
        """Completions that the trainer generates for a prompt."""
        return self.trainer.num_generations

    @contextmanager
    def groups_of(self, size: int) -> Iterator[None]:
        """Let the trainer generate `size` completions for a prompt while the context is open."""
        with generation.replaced(self.trainer, num_generations=size):
            yield

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
        return self.args.vllm_tensor_parallel_size if generation.is_colocated(self.trainer) else 1

    @property
    def is_sharded(self) -> bool:
        """Tell if a forward is a collective operation, because the weights are spread over the processes."""
        return self.trainer.is_fsdp_enabled or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def has_adapter(self) -> bool:
        """Tell if the policy is a PEFT model, whose gradients are those of its adapter."""
        return getattr(self.model, "peft_config", None) is not None

    @property
    def max_steps(self) -> int:
        """Optimizer steps of the run, as far as they are known when it begins."""
        return self.trainer.state.max_steps

    # Prompts ----------------------------------------------------------------------------------------------------

    @property
    def environments(self) -> dict | None:
        """The user's factories of environments by name, `None` without; they add to a prompt when they begin."""
        return getattr(self.trainer, "environment_factories", None)

    @property
    def rollout_func(self) -> Callable | None:
        """A function of the user's that makes of prompts what it likes, completions included."""
        return getattr(self.trainer, "rollout_func", None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, where the processing class is one or has one."""
        return self.trainer._tokenizer

    def text(self, ids: list[int]) -> str:
        """Return tokens as text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def prompt_ids(self, rows: list[dict]) -> list[list[int]]:
        """
        Return the prompt tokens of rows of the dataset, as training makes them: with the chat template, and the tools
        in it. An environment adds more when it begins, a `rollout_func` makes what it likes of a prompt, and images
        have no tokens here.

        Raises:
            `ValueError`: the rows have no prompt, which an environment supplies.
        """
        if not all("prompt" in row for row in rows):
            raise ValueError(
                "There are no prompt tokens before the environment begins: the training dataset has no column "
                "`prompt`. Give it one, or do not use features of the prompts."
            )
        return [list(ids) for ids in self.tokenize([row["prompt"] for row in rows])]

    def tokenize(self, prompts: list) -> list[list[int]]:
        """Return the tokens of prompts, text or messages, as the trainer makes them."""
        return self.trainer._tokenize_prompts(prompts)[0]

    def text_ids(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts that go on where others end, without special tokens."""
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    # Rewards ----------------------------------------------------------------------------------------------------

    @property
    def reward_names(self) -> list[str]:
        """Names of the reward functions, in their order."""
        return list(self.trainer.reward_func_names)

    @property
    def has_reward_model(self) -> bool:
        """Tell if a reward function is a model, which scores all rollouts that were generated at once."""
        return any(isinstance(function, nn.Module) for function in self.trainer.reward_funcs)

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        """Sum rewards of shape `(..., F)` over the functions, weighted; NaN where none gave one."""
        weights = self.trainer.reward_weights.cpu()
        return (rewards * weights).nansum(-1).masked_fill(rewards.isnan().all(-1), torch.nan)

    def deciding(self, rewards: torch.Tensor, config: LearnAlignConfig) -> torch.Tensor:
        """
        Return the reward that decides success, of shape `(n, G)`, from rewards of shape `(n, G, F)`. If
        `success_reward` names several functions, the first that gave the rollout a reward decides.
        """
        if config.success_reward is None:
            return rewards[:, :, 0] if rewards.shape[2] == 1 else self.total(rewards)
        first, *others = (
            rewards[:, :, self.reward_names.index(name)] for name in success_names(config.success_reward)
        )
        for other in others:
            first = first.where(~first.isnan(), other)
        return first

    @abstractmethod
    def advantages(self, rewards: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        """
        Return the advantages of the rollouts of a pool, as the trainer computes them, with the pool in place of the
        batch.

        Args:
            rewards (`torch.Tensor` of shape `(n, G, F)`): NaN where a function gave none.
            penalties (`torch.Tensor` of shape `(n, G)`): see [`RolloutGroup`].

        Returns:
            `torch.Tensor` of shape `(n, G)`, float64; 0 for a rollout that no reward function scored.
        """
