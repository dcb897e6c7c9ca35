"""How TRL generates, as far as a selection depends on it: processes that share a vLLM, images, random numbers."""

import random

import numpy as np
import torch
import trl
from packaging.version import Version
from trl import GRPOTrainer


_IMAGES = {"pixel_values", "num_images"}  # what TRL's batches hold where any rollout has one


def tensor_parallel_size(trainer: GRPOTrainer) -> int:
    """
    Number of neighbouring processes that share one vLLM. Each samples the completions of all their prompts and keeps its
    own, so they must draw the same random numbers.
    """
    return trainer.vllm_tensor_parallel_size if _is_colocated(trainer) else 1


def deal(batches: list[list[int]], first: int, rank: int, sharing: int) -> tuple[list[int], list[int], bool]:
    """
    What a process does in the round that begins with batch `first`: its batch, the batch whose seed it takes, and whether
    that is its own work. A process without a batch repeats another's, since all must generate equally often. `sharing`
    processes generate together, and so with the same seed. A batch has the same neighbours, and the same seed, on any
    number of processes:

        sharing 2, 4 processes    round 0           round 1
        process                   0   1 | 2   3     0   1 | 2   3
        batch of 7                0   1 | 2   3     4   5 | 6   6 again
        seed of batch             0   0 | 2   2     4   4 | 6   6
    """
    own, lead = first + rank, first + rank - rank % sharing
    seed_of = batches[lead if lead < len(batches) else first]
    return (batches[own], seed_of, True) if own < len(batches) else (seed_of, seed_of, False)


def check_vllm(trainer: GRPOTrainer) -> None:
    """
    Raises:
        `ValueError`: vLLM is set up so that TRL's completions are those of other prompts or of another policy.
    """
    if tensor_parallel_size(trainer) > 1 and trainer.tools:
        raise ValueError(
            f"`vllm_tensor_parallel_size` is {trainer.vllm_tensor_parallel_size}, which TRL cannot combine with tools: once "
            "the processes that share a vLLM have different numbers of calls to answer, they wait for each other or get each "
            "other's completions. Use `vllm_tensor_parallel_size=1`."
        )
    sleeps = _is_colocated(trainer) and trainer.args.vllm_enable_sleep_mode
    if sleeps and Version(trl.__version__) < Version("1.10"):
        raise ValueError(
            f"`vllm_enable_sleep_mode=True` with TRL {trl.__version__} generates with the weights that vLLM reads from the "
            "disk, not with those being trained (huggingface/trl#5312). Upgrade to TRL 1.10 or later, or switch it off."
        )


def _is_colocated(trainer):
    return trainer.use_vllm and trainer.vllm_mode == "colocate"


def check_images(output: dict) -> None:
    """
    Raises:
        `ValueError`: a batch that TRL generated has images, so that its tokens alone are not the policy's input.
    """
    if not _IMAGES.isdisjoint(output):
        raise ValueError(
            "The rollouts have images (from an environment or a tool), and gradients of multimodal prompts are not "
            "supported. Use `score='learnability'`, which takes no gradients."
        )


def random_state() -> tuple:
    """Of all generators that [`~transformers.set_seed`] seeds."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple) -> None:
    """Puts back what [`random_state`] returned."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state_all(state[3])
