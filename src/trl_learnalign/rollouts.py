"""Rollouts from a GRPOTrainer, whose state does not change."""

import copy
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from transformers import set_seed
from trl import GRPOTrainer

from .config import LearnAlignConfig
from .generation import check_images, check_vllm, random_state, set_random_state
from .gradients import UnseenParametersError, check_parameters, dropout_off, turn_dropout_off, unseen_message
from .measures.columns import check_columns
from .names import check_names
from .objective import check_loss
from .pool import load_target
from .progress import ProgressLines
from .projection import stable_hash
from .prompts import check_duplicates, check_prompts
from .rewards import check_success_reward, guarded, source_of


@dataclass
class Group:
    """
    The rollouts of one prompt.

    Attributes:
        index (`int`): row of the training dataset.
        prompt_ids (`list[np.ndarray]`): of each of G completions the tokens that it continues, int32. One array where
            they are equal; an environment or a `rollout_func` may begin every rollout differently.
        completion_ids (`list[np.ndarray]`): tokens of each of G completions, int32.
        loss_masks (`list[np.ndarray]`): 1 for a completion token that the policy is trained on, else 0 (tool results,
            truncated completions under `mask_truncated_completions`), int8.
        completions (`list`): G completions as the reward functions got them, text or messages, images replaced by text.
        rewards (`np.ndarray` of shape `(G, F)`): of F reward functions, float32; NaN where one gave none.
    """

    index: int
    prompt_ids: list[np.ndarray]
    completion_ids: list[np.ndarray]
    loss_masks: list[np.ndarray]
    completions: list
    rewards: np.ndarray


def check_trainer(trainer: GRPOTrainer, config: LearnAlignConfig) -> None:
    """
    Raises an error for all settings of a trainer with which a selection would fail or be wrong.

    Raises:
        `TypeError`: not a GRPOTrainer.
        `RuntimeError`: a version of TRL that lacks what is used here.
        `ValueError`: processes that are not connected, a streaming dataset, an environment that owns the data,
            no column `prompt`, an unknown or missing reward name, vLLM set up so that TRL mixes completions up; and where
            gradients are wanted: an unknown loss, a multimodal dataset, sharded weights without an adapter.
        [`UnseenParametersError`]: trainable tensors whose gradients would be missed.
    """
    if not isinstance(trainer, GRPOTrainer):
        raise TypeError(f"LearnAlign works on a trl.GRPOTrainer, but got a {type(trainer).__name__}.")
    check_names(trainer)
    launched, seen = int(os.environ.get("WORLD_SIZE", 1)), trainer.accelerator.num_processes
    if launched != seen:
        raise ValueError(
            f"The launcher started {launched} processes, but the trainer sees {seen}: each would train by itself and write "
            "to the same files. On a machine without a GPU set `use_cpu=True` in GRPOConfig."
        )
    dataset = trainer.train_dataset
    check_dataset(dataset, needs_prompt=getattr(trainer, "environment_factories", None) is None)
    if _is_placeholder(dataset):
        raise ValueError(
            "The environment of this trainer supplies the prompts itself, so there are no dataset rows to select. Pass "
            "a `train_dataset` with the prompts to choose from."
        )
    own_rollouts = getattr(trainer, "rollout_func", None) is not None
    if not own_rollouts:  # which may need no prompt
        check_prompts(dataset)
    # With an environment or a `rollout_func` equal prompts may be different tasks
    equal_tasks = not own_rollouts and not getattr(trainer, "environment_factories", None)
    check_duplicates(dataset, config.deduplicate, warn=equal_tasks and trainer.accelerator.is_main_process)
    if config.num_prompts > len(dataset):
        warnings.warn(
            f"`num_prompts` is {config.num_prompts}, but the training dataset has {len(dataset)} rows: every learnable "
            "prompt will be selected.",
            stacklevel=3,
        )
    check_columns(dataset, config)
    load_target(dataset, config)
    if not config.measures:
        return
    check_success_reward(list(trainer.reward_func_names), config.success_reward, config.learnability)
    check_vllm(trainer)
    if "gradients" not in config.measures:
        return
    check_loss(trainer)
    if {"image", "images"} & set(dataset.column_names):
        raise ValueError(
            "The training dataset has images, and gradients of multimodal prompts are not supported. Use "
            "`score='learnability'`, which takes no gradients."
        )
    if is_sharded(trainer) and not has_adapter(trainer):
        raise ValueError(
            "Full fine-tuning with FSDP or DeepSpeed is not supported: the probe would see only shards of the "
            "weights. Train a LoRA adapter (`peft_config`), or use `score='learnability'`, which takes no gradients."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "target_parameters", None):  # their A and B are multiplied without their layers' forward
            raise UnseenParametersError(unseen_message([f"target_parameters={adapter.target_parameters}"]))
    check_parameters(model, probe=not has_adapter(trainer))


def check_dataset(dataset, needs_prompt: bool = True) -> None:
    """
    Raises a `ValueError` for a dataset whose rows cannot be picked by number, that has none, or that has no column `prompt`
    although no environment supplies the prompts.
    """
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The training dataset has the type {type(dataset).__name__}, which can be read only once and in order, but a "
            "selection picks rows. Load it without streaming, or select from `Dataset.from_list(list(stream.take(n)))`."
        )
    if len(dataset) == 0:
        raise ValueError("The training dataset is empty, so there is nothing to select.")
    if needs_prompt and "prompt" not in dataset.column_names:
        raise ValueError(
            f"The training dataset has no column `prompt`. Its columns are: {', '.join(dataset.column_names)}. Rename the one "
            "that holds the prompts with `dataset.rename_column`, or name it with `--prompt_column` on the command line."
        )


def _is_placeholder(dataset):
    """GRPOTrainer makes such a dataset when it is given none and an environment supplies the prompts."""
    empty = [{"role": "user", "content": ""}]
    return dataset.column_names == ["prompt"] and all(prompt == empty for prompt in dataset[:10]["prompt"])


def visible_columns(trainer: GRPOTrainer, dataset: Dataset | None = None) -> Dataset:
    """The dataset, by default the training dataset, with the columns that the trainer's dataloader would leave in it."""
    dataset = trainer.train_dataset if dataset is None else dataset
    return trainer._remove_unused_columns(dataset, description="selection")


def first_completion(trainer: GRPOTrainer, group: Group) -> tuple[str, float]:
    """Of a group, the first completion as text and its total reward."""
    text = trainer._tokenizer.decode(group.completion_ids[0], skip_special_tokens=True)
    rewards = torch.tensor(group.rewards[0], dtype=torch.float64) * trainer.reward_weights.cpu()
    return text, rewards.nansum().item()


def reward_provenance(trainer: GRPOTrainer) -> dict[str, str]:
    """Name and source of every reward function: what success was measured by."""
    return dict(zip(trainer.reward_func_names, map(source_of, trainer.reward_funcs), strict=True))


def generation_provenance(trainer: GRPOTrainer) -> dict:
    """The settings of the trainer that rollouts and gradients depend on."""
    settings = {name: getattr(trainer, name, None) for name in _SETTINGS}
    settings |= {name: getattr(trainer.args, name) for name in _ARGUMENTS}
    settings |= {"scale_rewards": trainer.scale_rewards, "reward_weights": trainer.reward_weights.tolist()}
    adapters = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {})
    settings["adapters"] = {name: [getattr(one, field, None) for field in _SCALING] for name, one in adapters.items()}
    factories = getattr(trainer, "environment_factories", None) or {}
    code = [*(getattr(trainer, "tools", None) or ()), *factories.values(), getattr(trainer, "rollout_func", None)]
    return settings | {"code": [source_of(part) for part in code if part is not None]}


_SCALING = ("peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern")  # of an adapter's weights
_SETTINGS = (
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "beta",
    "multi_objective_aggregation",
    "mask_truncated_completions",
    "max_tool_calling_iterations",
    "loss_type",
    "importance_sampling_level",
    "top_entropy_quantile",
    "epsilon_high",
)
_ARGUMENTS = ("bf16", "fp16", "generation_kwargs", "chat_template_kwargs", "use_bias_correction_kl", "delta")


def has_adapter(trainer: GRPOTrainer) -> bool:
    """Whether the policy is a PEFT model, whose gradients are those of its adapter."""
    return getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None) is not None


def is_sharded(trainer: GRPOTrainer) -> bool:
    """Whether a forward is a collective operation, because the weights are spread over the processes."""
    return trainer.is_fsdp_enabled or trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


def progress_bar(trainer: GRPOTrainer, phase: str, total: int, unit: str) -> tqdm | ProgressLines:
    """
    A bar on the main process. If the trainer shows none (`disable_tqdm`), or the output is neither a terminal nor a
    notebook, a few lines are printed instead.
    """
    hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    if not hidden and not issubclass(tqdm, tqdm_notebook):
        hidden = None  # for tqdm: where its output is no terminal
    title = f"LearnAlign {phase}"
    bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=hidden, leave=False)
    return ProgressLines(title, total, unit) if bar.disable and trainer.accelerator.is_main_process else bar


@contextmanager
def left_as_found(trainer: GRPOTrainer, num_rollouts: int) -> Iterator[None]:
    """
    Lets the trainer generate `num_rollouts` completions a prompt, with dropout off and no log-probabilities
    computed, and undoes on exit all that a generation changes: metrics, logs, counters, modes, random states.
    """
    numbers = trainer.num_generations, trainer.state.num_input_tokens_seen
    books = {name: getattr(trainer, name) for name in ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")}
    correction = trainer.vllm_importance_sampling_correction
    randomness = random_state()
    for name, book in books.items():
        setattr(trainer, name, copy.deepcopy(book))
    trainer.num_generations = num_rollouts
    trainer.vllm_importance_sampling_correction = False
    try:
        with dropout_off(trainer.model):
            yield
    finally:
        for name, book in books.items():
            setattr(trainer, name, book)
        trainer.num_generations, trainer.state.num_input_tokens_seen = numbers
        trainer.vllm_importance_sampling_correction = correction
        set_random_state(randomness)


def prompts_per_batch(trainer: GRPOTrainer, num_rollouts: int) -> int:
    """Prompts that a process generates for at once: as many rollouts as it does in training, whole groups, at least one."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    return max(1, rows // num_rollouts)


def generate_groups(
    trainer: GRPOTrainer, dataset: Dataset, indices: list[int], seed: int, gradients: bool = True
) -> list[Group]:
    """
    Rolls out this process's prompts through the trainer's own generation and reward functions. To be called inside
    [`left_as_found`], by all processes at once, each with its own `indices`, equally many.

    Args:
        trainer ([`GRPOTrainer`]): `num_generations` rollouts a prompt.
        dataset (`Dataset`): the training dataset with the columns that the trainer would see.
        indices (`list[int]`): rows of `dataset`.
        seed (`int`): of the generation; the same seed and indices give the same rollouts on any process. Processes that
            share a vLLM (see [`tensor_parallel_size`]) must pass the same; there the rollouts depend on the indices of
            all of these processes.
        gradients (`bool`): whether gradients will be taken of the rollouts.

    Raises:
        `ValueError`: a rollout has an image, and gradients are wanted.
    """
    # Before every batch: continuous batching leaves all modules in train mode, and so may a user's own rollout function
    turn_dropout_off(trainer.model)
    set_seed(seed % 2**32)
    size = trainer.num_generations
    inputs = [copy.deepcopy(dataset[index]) for index in indices for _ in range(size)]
    seen = {}
    calculate_rewards = trainer._calculate_rewards

    def record(inputs, prompts, completions, completion_ids_list):
        # Reward functions that draw random numbers: the prompts' own, not those that the completions were sampled with
        set_seed(stable_hash("rewards", seed, indices) % 2**32)
        rewards = calculate_rewards(inputs, prompts, completions, completion_ids_list)
        seen.update(completions=completions, completion_ids=completion_ids_list, rewards=rewards)
        return rewards

    # The instance's own attributes, if any, are put back: `del` alone would lose a user's patch
    own = {name: vars(trainer)[name] for name in _PATCHED if name in vars(trainer)}
    trainer._calculate_rewards = record
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (None, None, None)
    reward_funcs = trainer.reward_funcs
    try:
        with guarded(reward_funcs, trainer.reward_func_names) as trainer.reward_funcs:
            output = trainer._generate_and_score_completions(inputs)
    finally:
        trainer.reward_funcs = reward_funcs
        for name in _PATCHED:
            delattr(trainer, name)
        vars(trainer).update(own)
    if gradients:
        check_images(output)
    start = trainer.accelerator.process_index * len(inputs)
    rewards = seen["rewards"][start : start + len(inputs)].float().cpu()
    rewards = rewards.masked_fill(~rewards.isfinite(), torch.nan).numpy()
    loss_mask = output["completion_mask"]
    if "tool_mask" in output:
        loss_mask = loss_mask * output["tool_mask"]
    loss_mask = loss_mask.to("cpu", torch.int8).numpy()
    prompt_ids, prompt_mask = (
        output["prompt_ids"].to("cpu", torch.int32).numpy(),
        output["prompt_mask"].cpu().bool().numpy(),
    )
    groups = []
    for i, index in enumerate(indices):
        rows = range(i * size, (i + 1) * size)
        completion_ids = [np.asarray(seen["completion_ids"][row], dtype=np.int32) for row in rows]
        groups.append(
            Group(
                index=index,
                prompt_ids=shared([prompt_ids[row][prompt_mask[row]] for row in rows]),
                completion_ids=completion_ids,
                loss_masks=[loss_mask[row, : len(ids)].copy() for row, ids in zip(rows, completion_ids, strict=True)],
                completions=[_plain(seen["completions"][row]) for row in rows],
                rewards=rewards[rows.start : rows.stop],
            )
        )
    return groups


def _plain(completion):
    """A completion that can be written as JSON: messages may hold images, as answers of tools."""
    return json.loads(json.dumps(completion, default=lambda value: f"[{type(value).__name__}]"))


def shared(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Of equal arrays one, so many times."""
    first = arrays[0]
    return [first] * len(arrays) if all(np.array_equal(first, other) for other in arrays[1:]) else arrays


_PATCHED = ("_calculate_rewards", "_get_per_token_logps_and_entropies")
