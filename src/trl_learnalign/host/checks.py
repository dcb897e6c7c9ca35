"""Errors for settings of a trainer, raised before anything is generated."""

import os
from typing import TYPE_CHECKING

import trl
from packaging.version import Version

from ..config import LearnAlignConfig
from ..data.prompts import check_dataset, check_duplicates, check_prompts, warn_of_answers
from ..data.reading import read_prompts
from .generation import is_colocated


if TYPE_CHECKING:
    from .trl import Host


def check_trainer(host: "Host", config: LearnAlignConfig) -> None:
    """
    Raise an error for all settings of a trainer with which no prompts can be chosen.

    Raises:
        `ValueError`: processes that are not connected, a streaming dataset, an environment that owns the data, no
            column `prompt`; messages, but a tokenizer without a chat template.
    """
    trainer = host.trainer
    launched, seen = int(os.environ.get("WORLD_SIZE", 1)), trainer.accelerator.num_processes
    if launched != seen:
        raise ValueError(
            f"The launcher started {launched} processes, but the trainer sees {seen}: each would train by itself and "
            f"write to the same files. On a machine without a GPU set `use_cpu=True` in {type(trainer.args).__name__}."
        )
    dataset = host.dataset
    check_dataset(dataset, needs_prompt=host.environments is None)
    if _is_placeholder(dataset):
        raise ValueError(
            "The environment of this trainer supplies the prompts itself, so there are no dataset rows to select. "
            "Pass a `train_dataset` with the prompts to choose from."
        )
    own_rollouts = host.rollout_func is not None
    if not own_rollouts:  # which may need no prompt
        check_prompts(dataset)
        _check_template(trainer)
        if trainer.accelerator.is_main_process:
            warn_of_answers(dataset)
    # With an environment or a `rollout_func` equal prompts may be different tasks
    equal_tasks = not own_rollouts and not host.environments
    check_duplicates(dataset, config.deduplicate, warn=equal_tasks and trainer.accelerator.is_main_process)


def _check_template(trainer):
    processor, dataset = trainer.processing_class, trainer.train_dataset
    if "prompt" not in dataset.column_names or not isinstance(dataset[0]["prompt"], list):
        return
    templates = [getattr(part, "chat_template", None) for part in (processor, trainer)]
    if not any(templates):
        name = getattr(getattr(processor, "tokenizer", processor), "name_or_path", "")
        raise ValueError(
            f"The prompts are messages, but the tokenizer of the policy ('{name}') has no chat template to make text "
            "of them, as those of base models. Use a model with one, set `tokenizer.chat_template` before the trainer "
            "is made (or save such a tokenizer with the model), or give the prompts as text."
        )


def _is_placeholder(dataset):
    """Tell if GRPOTrainer made the dataset, as it does when it is given none and an environment has the prompts."""
    if dataset.column_names != ["prompt"]:
        return False
    empty = [{"role": "user", "content": ""}]
    return all(prompt == empty for prompt in read_prompts(dataset, range(min(10, len(dataset)))))


def check_vllm(host: "Host") -> None:
    """
    Raise an error if vLLM and TRL would mix completions up.

    Raises:
        `ValueError`: vLLM is set up so that TRL's completions are those of other prompts or of another policy.
    """
    trainer = host.trainer
    if host.sharing > 1 and getattr(trainer, "tools", None):
        raise ValueError(
            f"`vllm_tensor_parallel_size` is {trainer.args.vllm_tensor_parallel_size}, which TRL cannot combine with "
            "tools: once the processes that share a vLLM have different numbers of calls to answer, they wait for "
            "each other or get each other's completions. Use `vllm_tensor_parallel_size=1`."
        )
    sleeps = is_colocated(trainer) and trainer.args.vllm_enable_sleep_mode
    if sleeps and Version(trl.__version__) < Version("1.10"):
        raise ValueError(
            f"`vllm_enable_sleep_mode=True` with TRL {trl.__version__} generates with the weights that vLLM reads "
            "from the disk, not with those being trained (huggingface/trl#5312). Upgrade to TRL 1.10 or later, or "
            "switch it off."
        )
