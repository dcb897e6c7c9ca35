"""A forward of the policy over many prompts, in batches that fit, shared between the processes and kept on disk."""

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..data.reading import columns_read, read_prompts
from ..gradients.modes import as_in_evaluation
from ..ground.memory import in_halves
from ..ground.peers import Peers
from ..ground.progress import progress_bar
from ..ground.store import Log
from ..host import Host
from .packing import fill


MOST_TOKENS = 16_384  # of a forward at first, padding included; half as many whenever memory is full
MOST_SHARDED = 4096  # where the states of all layers are in memory
_PADDED = 1.03  # most tokens of a batch with its padding, over those without


def reason_against(host: Host) -> str | None:
    """Return why the prompts of this trainer cannot be known before rollouts; `None` if they can."""
    if host.rollout_func is not None:
        return "a `rollout_func` may change the prompts"
    if host.environments:
        return "an environment adds to the prompts"
    columns = columns_read(host.dataset)
    if "prompt" not in columns:
        return "the training dataset has no column `prompt`"
    if {"image", "images"} & set(columns):
        return "the training dataset has images"
    return None


def prompt_ids(host: Host, rows: Sequence[int]) -> list[list[int]]:
    """Return the tokens of prompts, as training makes them."""
    return host.prompt_ids([{"prompt": prompt} for prompt in read_prompts(host.dataset, rows)])


def most_tokens(config: PreTrainedConfig) -> float:
    """Return the longest context of a model, by its configuration; infinity where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def chat_text(tokenizer: Any, messages: list[dict]) -> str:
    """Return messages as one text, up to where the model answers: at once, where the chat template lets it think."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


def tokens_at_once(host: Host) -> int:
    """
    Return the tokens of a forward at first, padding included. With sharded weights, where there is no second attempt,
    as many as the completions of a training step may have, which fit in memory.
    """
    if not host.is_sharded:
        return MOST_TOKENS
    completions = host.args.per_device_train_batch_size * (host.args.max_completion_length or MOST_SHARDED)
    return min(completions, MOST_SHARDED)


class Forward:
    """
    A forward over sequences, which gives a row of numbers for each. To be run inside of [`evaluating`].

    Args:
        host ([`Host`]): of the trainer.
        tokens (`int`): most tokens at once, padding included.

    Attributes:
        tokens (`int`): as it was passed. Fewer once they did not fit.
        remedy (`str`): what to do if not even one sequence fits.
    """

    remedy = "Leave out the longest prompts (`where`)."

    def __init__(self, host: Host, tokens: int):
        self.host, self.tokens = host, tokens

    def __call__(self, sequences: Sequence) -> np.ndarray:
        """
        Return an array of shape `(n, width)` for n sequences with a length each. Computed in halves where memory is
        full, unless the weights are sharded, so that others take part in each forward.

        Raises:
            `MemoryError`: not even one sequence fits, or the weights are sharded.
        """
        return in_halves(
            sequences,
            self.run,
            lambda first, second: np.concatenate([first, second]),
            self._too_large,
            fits=lambda part: _padded(part) <= self.tokens,
            whole=self.host.is_sharded,
            failed=self._failed,
        )

    def run(self, sequences: Sequence) -> np.ndarray:
        """Return the rows of numbers of all sequences at once."""
        raise NotImplementedError

    def filler(self):
        """Return the shortest sequence, for a process that only takes part in the forwards of others."""
        return list(self.host.filler().prompt_ids)

    def _failed(self, sequences):
        self.tokens = min(self.tokens, _padded(sequences)) // 2

    def _too_large(self, sequences, error):
        return MemoryError(
            f"One forward over {len(sequences)} prompts of {sum(map(len, sequences)):,} tokens does not fit into the "
            f"memory ({error}). {self.remedy}"
        )


def _padded(sequences):
    return len(sequences) * max(map(len, sequences))


@contextmanager
def evaluating(host: Host, phase: str, total: int):
    """Put the policy into eval mode, without gradients, and show a progress bar of `total` prompts meanwhile."""
    with as_in_evaluation(host.policy), torch.no_grad(), progress_bar(host, phase, total, "prompts") as bar:
        yield bar


def windows_of(rows: Sequence, size: int) -> list[Sequence]:
    """Cut rows into windows, which are read, sorted by length, and kept on disk together."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def in_rounds(
    host: Host,
    peers: Peers,
    bar,
    log: Log,
    forward: Forward,
    read: Callable[[Sequence[int]], list],
    windows: list[Sequence],
    kind: type,
    first: int = 0,
    keep: Callable[[np.ndarray], np.ndarray] = lambda values: values,
) -> np.ndarray:
    """
    Return `keep` of what a forward gives for all windows, one after another, on every process.

    Windows that are in the log are read; the others go round, one for each process. A forward of sharded weights takes
    all processes, so in every round all run equally many. The batches do not depend on the number of processes.

    Args:
        host ([`Host`]): of the trainer.
        peers ([`Peers`]): an open context.
        bar: counts prompts.
        log ([`Log`]): keeps finished windows.
        forward ([`Forward`]): inside of [`evaluating`].
        read (`Callable`): makes the sequences of some rows.
        windows (`list[Sequence]`): rows of the dataset, see [`windows_of`].
        kind (`type`): of the numbers that `keep` returns.
        first (`int`, *optional*): name of the first window in the log.
        keep (`Callable`, *optional*): makes of the values of a window, of shape `(n, width)`, those that are kept, of
            shape `(n, other width)`.
    """
    world, rank = host.accelerator.num_processes, host.accelerator.process_index
    known = {place: log.read(first + place) for place in range(len(windows))}
    holders: dict[int, int] = {}
    for other, places in enumerate(peers.gather([place for place, content in known.items() if content is not None])):
        for place in places:
            holders.setdefault(place, other)
    values: dict[int, np.ndarray] = {
        place: np.frombuffer(content, kind).reshape(len(windows[place]), -1)
        for place, content in known.items()
        if content is not None and holders[place] == rank
    }
    del known
    bar.update(sum(len(windows[place]) for place in holders))
    left = [place for place in range(len(windows)) if place not in holders]
    for start in range(0, len(left), world):
        batches, sequences = [], []
        if start + rank < len(left):
            place = left[start + rank]
            sequences = read(windows[place])
            batches = fill([len(one) for one in sequences], forward.tokens, _PADDED)
        most = max(peers.gather(len(batches)))
        parts = [forward([sequences[number] for number in batch]) for batch in batches]
        if host.is_sharded:
            for _ in range(most - len(batches)):
                forward([forward.filler()])
        if batches:
            found = np.empty((len(sequences), parts[0].shape[1]), parts[0].dtype)
            found[np.concatenate(batches)] = np.concatenate(parts)
            values[place] = keep(found)
            log.append([(first + place, values[place])])
        bar.update(sum(len(windows[place]) for place in left[start : start + world]))
    whole = {place: array for part in peers.gather(values) for place, array in part.items()}
    return np.concatenate([whole[place] for place in range(len(windows))])
