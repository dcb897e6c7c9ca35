"""Rollouts and token log-probabilities from a GRPOTrainer, which is left as it was found."""

import copy
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook
from transformers import set_seed
from trl import GRPOTrainer
from trl.trainer.utils import use_adapter

from .config import LearnAlignConfig
from .gradients import UnseenParametersError, check_parameters, dropout_off, unseen_message
from .names import check_names
from .rewards import guarded, source_of


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
        completions (`list`): G completions as the reward functions got them, text or messages.
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
    Raises an error for everything about a trainer that would make a selection fail or mean something else.

    Raises:
        `TypeError`: not a GRPOTrainer.
        `RuntimeError`: a version of TRL that lacks what is used here.
        `ValueError`: processes that do not know of each other, a streaming dataset, an environment that owns the data,
            an unknown or missing reward name; and where gradients are wanted: a multimodal dataset, sharded weights
            without an adapter.
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
    check_dataset(dataset)
    if _is_placeholder(dataset):
        raise ValueError(
            "The environment of this trainer supplies the prompts itself, so there are no dataset rows to select. Pass "
            "a `train_dataset` with the prompts to choose from."
        )
    if config.num_prompts > len(dataset):
        warnings.warn(
            f"`num_prompts` is {config.num_prompts}, but the training dataset has {len(dataset)} rows: every learnable "
            "prompt will be selected.",
            stacklevel=3,
        )
    if config.score == "random":
        return
    names = list(trainer.reward_func_names)
    if config.success_reward is None:
        if len(names) > 1 and config.learnability == "success_rate":
            raise ValueError(
                f"The trainer has several reward functions ({', '.join(names)}), and LearnAlign must know which one "
                "decides success. Set `success_reward` to one of these names."
            )
    elif names.count(config.success_reward) != 1:
        times = "not" if config.success_reward not in names else "more than once"
        raise ValueError(
            f"`success_reward` is {config.success_reward!r}, which is {times} among the trainer's reward functions: "
            f"{', '.join(names)}."
        )
    if config.score == "learnability":
        return
    if {"image", "images"} & set(dataset.column_names):
        raise ValueError(
            "The training dataset has images, and gradients of multimodal prompts are not supported. Use "
            "`score='learnability'`, which takes no gradients."
        )
    if is_sharded(trainer) and not has_adapter(trainer):
        raise ValueError(
            "Full fine-tuning with FSDP or DeepSpeed is not supported: the probe that stands for the weights would meet "
            "shards of them. Train a LoRA adapter (`peft_config`), or use `score='learnability'`, which takes no gradients."
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "target_parameters", None):  # their A and B are multiplied without their layers' forward
            raise UnseenParametersError(unseen_message([f"target_parameters={adapter.target_parameters}"]))
    check_parameters(model, probe=not has_adapter(trainer))


def check_dataset(dataset) -> None:
    """Raises a `ValueError` for a dataset whose rows cannot be picked by number, or that has none."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"The training dataset is a {type(dataset).__name__}, which can be read only once and in order, but a "
            "selection picks rows. Load it without streaming, or select from `Dataset.from_list(list(stream.take(n)))`."
        )
    if len(dataset) == 0:
        raise ValueError("The training dataset is empty, so there is nothing to select.")


def _is_placeholder(dataset):
    """GRPOTrainer makes such a dataset when it is given none and an environment supplies the prompts."""
    empty = [{"role": "user", "content": ""}]
    return dataset.column_names == ["prompt"] and all(prompt == empty for prompt in dataset[:10]["prompt"])


def visible_columns(trainer: GRPOTrainer) -> Dataset:
    """The training dataset with the columns that the trainer's dataloader would leave in it."""
    return trainer._remove_unused_columns(trainer.train_dataset, description="selection")


def prompt_text(prompt) -> str:
    """A prompt for people to read: text as it is, messages one after another, and whatever else there may be as Python has it."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return str(prompt)
    texts = [_content_text(message.get("content")) for message in prompt]
    if len(prompt) == 1:
        return texts[0]
    return "\n".join(f"{message.get('role')}: {text}" for message, text in zip(prompt, texts, strict=True))


def _content_text(content) -> str:
    """Of a message: text, or the parts of a multimodal one, or nothing."""
    if not isinstance(content, list):
        return "" if content is None else str(content)
    return " ".join(
        part.get("text") or f"[{part.get('type')}]" if isinstance(part, dict) else str(part) for part in content
    )


def first_completion(trainer: GRPOTrainer, group: Group) -> tuple[str, float]:
    """Of a group, the first completion as text and its total reward."""
    text = trainer.processing_class.decode(group.completion_ids[0], skip_special_tokens=True)
    rewards = torch.tensor(group.rewards[0], dtype=torch.float64) * trainer.reward_weights.cpu()
    return text, rewards.nansum().item()


def reward_provenance(trainer: GRPOTrainer) -> dict[str, str]:
    """Name and source of every reward function: what success was measured by."""
    return dict(zip(trainer.reward_func_names, map(source_of, trainer.reward_funcs), strict=True))


def generation_provenance(trainer: GRPOTrainer) -> dict:
    """The settings of the trainer that rollouts and gradients depend on."""
    settings = {name: getattr(trainer, name, None) for name in _SETTINGS}
    settings |= {name: getattr(trainer.args, name) for name in ("generation_kwargs", "chat_template_kwargs")}
    settings |= {"scale_rewards": trainer.scale_rewards, "reward_weights": trainer.reward_weights.tolist()}
    factories = getattr(trainer, "environment_factories", None) or {}
    code = [*(getattr(trainer, "tools", None) or ()), *factories.values(), getattr(trainer, "rollout_func", None)]
    return settings | {"code": [source_of(part) for part in code if part is not None]}


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
)


def has_adapter(trainer: GRPOTrainer) -> bool:
    """Whether the policy is a PEFT model, whose gradients are those of its adapter."""
    return getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", None) is not None


def is_sharded(trainer: GRPOTrainer) -> bool:
    """Whether a forward is a collective operation, because the weights are spread over the processes."""
    return trainer.is_fsdp_enabled or trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


def policy(trainer: GRPOTrainer) -> torch.nn.Module:
    """
    The policy to run. It is wrapped only under FSDP, where the wrapper has part of the weights: DDP's and DeepSpeed's would
    reduce gradients after every backward. DeepSpeed's ZeRO-3 gathers its weights in hooks of the layers themselves.
    """
    return trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model


def progress_bar(trainer: GRPOTrainer, phase: str, total: int, unit: str) -> tqdm:
    """A bar on the main process, quiet where the trainer's own are and in logs that are neither terminals nor notebooks."""
    hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    if not hidden and not issubclass(tqdm, tqdm_notebook):
        hidden = None  # for tqdm: where its output is no terminal
    return tqdm(total=total, desc=f"LearnAlign {phase}", unit=f" {unit}", disable=hidden, leave=False)


@contextmanager
def left_as_found(trainer: GRPOTrainer, num_rollouts: int) -> Iterator[None]:
    """
    Lets the trainer generate `num_rollouts` completions a prompt, with dropout off and no log-probabilities computed
    on the side, and undoes on exit all that a generation changes: metrics, logs, counters, modes, random states.
    """
    numbers = trainer.num_generations, trainer.state.num_input_tokens_seen
    books = {name: getattr(trainer, name) for name in ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics")}
    correction = trainer.vllm_importance_sampling_correction
    randomness = _random_state()
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
        _set_random_state(randomness)


def _random_state():
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state):
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])


def prompts_per_batch(trainer: GRPOTrainer, num_rollouts: int) -> int:
    """Prompts that a process generates for at once: as many rollouts as it does in training, whole groups, at least one."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.steps_per_generation
    return max(1, rows // num_rollouts)


def generate_groups(trainer: GRPOTrainer, dataset: Dataset, indices: list[int], seed: int) -> list[Group]:
    """
    Rolls out this process's prompts through the trainer's own generation and reward functions. To be called inside
    [`left_as_found`], by all processes at once, each with its own `indices`, equally many.

    Args:
        trainer ([`GRPOTrainer`]): `num_generations` rollouts a prompt.
        dataset (`Dataset`): the training dataset with the columns that the trainer would see.
        indices (`list[int]`): rows of `dataset`.
        seed (`int`): of the generation; the same seed and indices give the same rollouts on any process.
    """
    set_seed(seed % 2**32)
    size = trainer.num_generations
    inputs = [copy.deepcopy(dataset[index]) for index in indices for _ in range(size)]
    seen = {}
    calculate_rewards = trainer._calculate_rewards

    def record(inputs, prompts, completions, completion_ids_list):
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
                completions=[seen["completions"][row] for row in rows],
                rewards=rewards[rows.start : rows.stop],
            )
        )
    return groups


def shared(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Of equal arrays one, so many times."""
    first = arrays[0]
    return [first] * len(arrays) if all(np.array_equal(first, other) for other in arrays[1:]) else arrays


_PATCHED = ("_calculate_rewards", "_get_per_token_logps_and_entropies")


@dataclass
class Row:
    """One rollout as it enters a gradient: its tokens, its loss mask, its advantage, its weight in the group mean."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    loss_mask: np.ndarray
    advantage: float
    weight: float

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion_ids)


def policy_objective(trainer: GRPOTrainer, rows: list[Row]) -> torch.Tensor:
    r"""
    The scalar whose gradient is the GRPO policy gradient of Eq. 7, summed over `rows`:

        sum_rows  weight  mean_t  (A + beta (pi_ref / pi_theta - 1))  log pi_theta(token t)

    the factor before the logarithm held constant, the mean taken over the tokens that the loss mask keeps.
    """
    device = trainer.accelerator.device
    ids = [torch.from_numpy(np.concatenate([row.prompt_ids, row.completion_ids])).long() for row in rows]
    masks = [torch.from_numpy(np.pad(row.loss_mask, (len(row.prompt_ids), 0))) for row in rows]
    # Padded on the right as a whole: prompts and completions padded apart, as in training, make more padding
    input_ids = pad_sequence(ids, True, trainer._tokenizer.pad_token_id).to(device)
    attention_mask = pad_sequence([torch.ones_like(row) for row in ids], True, 0).to(device)
    keep = input_ids.shape[1] - min(len(row.prompt_ids) for row in rows)
    loss_mask = pad_sequence(masks, True, 0).to(device)[:, -keep:]
    arguments = input_ids, attention_mask, keep

    coefficient = torch.tensor([row.advantage for row in rows], device=device)[:, None]
    reference = None
    if trainer.beta != 0.0:
        with torch.no_grad():
            reference = _reference_logps(trainer, arguments)
    logps = trainer._get_per_token_logps_and_entropies(policy(trainer), *arguments)[0].float()
    if reference is not None:
        coefficient = coefficient + trainer.beta * (torch.exp(reference - logps.detach()) - 1)
    weight = torch.tensor([row.weight for row in rows], device=device)
    tokens = loss_mask.sum(1).clamp(min=1)
    return ((coefficient * logps * loss_mask).sum(1) * weight / tokens).sum()


def _reference_logps(trainer, arguments):
    """Log-probabilities under pi_ref, found where GRPOTrainer finds it."""
    if trainer.ref_model is not None:
        return trainer._get_per_token_logps_and_entropies(trainer.ref_model, *arguments)[0].float()
    model = trainer.accelerator.unwrap_model(trainer.model)
    with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
        return trainer._get_per_token_logps_and_entropies(policy(trainer), *arguments)[0].float()
