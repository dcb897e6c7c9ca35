"""
What the policy's hidden states say about prompts before any of them is rolled out: one forward over the pool, of which
a few principal components a prompt are kept.
"""

import inspect
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..disk import digest, make_directory, write_atomically
from ..host import Host
from ..peers import Peers
from ..progress import progress_bar
from ..selection import dataset_fingerprint


FILE = "prompt_features.safetensors"
COMPONENTS = 64  # of a prompt, less where the hidden states of the pool have fewer dimensions
SAMPLE = 2048  # prompts that the components are found with
WINDOW = 1024  # prompts that a process tokenises at once, and sorts by length
MOST_TOKENS = 4096  # of a forward: more would not make it faster, and the states of all layers are in memory
_FORMAT = 1
_FLAT = 1e-4  # of the largest: a dimension that varies less is as good as constant


@dataclass(frozen=True)
class PromptFeatures:
    """
    Attributes:
        values (`np.ndarray` of shape `(N, k)`, float16): by row of the dataset; columns of mean 0, in the order of the
            variance that they explain. The first has standard deviation 1, column j has (u_j / u_1)^(1/4), where u are
            the variances of the components: a ridge then shrinks late components more than the first, but less than
            their size alone would have it.
        key (`str`): digest of all that they were made from. A resumed run asks for those it began with.
    """

    values: np.ndarray
    key: str


def reason_against(host: Host) -> str | None:
    """Why the prompts of this trainer have no hidden states that could be computed beforehand; `None` if they have."""
    if host.rollout_func is not None:
        return "a `rollout_func` may change the prompts"
    if host.environments:
        return "an environment adds to the prompts"
    if "prompt" not in host.dataset.column_names:
        return "the training dataset has no column `prompt`"
    if {"image", "images"} & set(host.dataset.column_names):
        return "the training dataset has images"
    return None


def hidden_states(host: Host, directory: Path, peers: Peers, key: str | None = None) -> PromptFeatures:
    """
    Features of every prompt of the training dataset, equal on all processes; those of `directory` if they were made
    from the same dataset and weights in the same way. The policy does not change. All processes must call this, if
    [`reason_against`] returned `None`.

    Of a prompt's hidden states the mean over its tokens is taken, after half of the layers. Each dimension is
    standardised, since in large models a few are a thousand times greater than the others; the principal components
    are found over a random sample of at most 2,048 prompts. Every prompt goes through the policy once. Prompts of like
    length go together, as many tokens as a training step holds.

    Args:
        host ([`Host`]): of the trainer.
        directory (`Path`): of the run's files, where `prompt_features.safetensors` is read and written.
        peers ([`Peers`]): an open context.
        key (`str`, *optional*): of the features that a resumed run began with. Its weights have changed since, so they
            are read and not made again.

    Raises:
        `ValueError`: with a `key`, the directory has no features, or others.
        `OSError`: they cannot be written.
    """
    path = Path(directory) / FILE
    found = _read(path) if host.accelerator.is_main_process else None
    if key is not None:
        return _of_the_run(peers.broadcast(found), key, path)
    peers.wait()  # before the collective operations of sharded weights
    made_from = {
        "format": _FORMAT,
        "dataset": dataset_fingerprint(host.dataset),
        "model": host.base_identity(),
        "prompts": host.prompt_identity(),
        "weights": host.weights_digest(),
        "sizes": [COMPONENTS, SAMPLE, WINDOW, tokens_at_once(host)],
    }
    key = peers.broadcast(digest(made_from))
    found = peers.broadcast(found if found is not None and found.key == key else None)
    if found is not None:
        return found
    features = PromptFeatures(_compute(host, peers), key)
    if host.accelerator.is_main_process:
        make_directory(path.parent)
        check = str(zlib.crc32(features.values.tobytes()))
        metadata = {"key": key, "crc32": check, "made_from": json.dumps(made_from)}
        write_atomically(path, lambda temporary: save_file({"features": features.values}, temporary, metadata))
    peers.wait()
    return features


def _of_the_run(found, key, path):
    if found is None or found.key != key:
        state = "holds no features of prompts" if found is None else "holds features of another run"
        raise ValueError(
            f"'{path}' {state}, but the run that is resumed chose its prompts by features that cannot be computed "
            "again, since its weights have changed. Put that file back, or start a new run from these weights."
        )
    return found


def _read(path) -> PromptFeatures | None:
    """None where there is no file, or a damaged one."""
    try:
        with safe_open(path, "numpy") as file:
            metadata, values = file.metadata(), file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    whole = metadata.get("crc32") == str(zlib.crc32(values.tobytes()))
    return PromptFeatures(values, metadata.get("key", "")) if whole else None


# Forwards ----------------------------------------------------------------------------------------------------------


def tokens_at_once(host: Host) -> int:
    """
    Of one forward, padding included: as many as the completions of a training step may have, which fit in memory.
    """
    return min(host.args.per_device_train_batch_size * (host.args.max_completion_length or MOST_TOKENS), MOST_TOKENS)


def _compute(host, peers) -> np.ndarray:
    """(N, k), float16."""
    total = len(host.dataset)
    sample = np.random.Generator(np.random.Philox(0)).permutation(total)[:SAMPLE]
    sample.sort()
    rest = np.setdiff1d(np.arange(total), sample)
    with _ready(host.policy), progress_bar(host, "hidden states", total, "prompts") as bar:
        rows, states = _gathered(_forwards(host, peers, bar, sample, lambda states: states), peers)
        basis = peers.broadcast(_principal(states[np.argsort(rows)]) if host.accelerator.is_main_process else None)
        features = np.empty((total, basis[-1].shape[1]), dtype=np.float16)
        features[rows] = _project(states, *basis)
        if len(rest):
            rows, values = _gathered(_forwards(host, peers, bar, rest, lambda states: _project(states, *basis)), peers)
            features[rows] = values
    return peers.broadcast(features)  # the last bit of a product may differ from machine to machine


def _gathered(parts, peers):
    """The rows and their values, of all processes."""
    parts = list(parts)
    own = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else None
    everyone = [part for part in peers.gather(own) if part is not None]
    return tuple(np.concatenate(column) for column in zip(*everyone, strict=True))


@contextmanager
def _ready(policy: nn.Module) -> Iterator[None]:
    """Dropout off and no activations recomputed, as in evaluation; all modes as they were on exit."""
    modes = [(module, module.training) for module in policy.modules()]
    policy.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _forwards(host, peers, bar, rows, keep) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """
    Of this process's part of the rows, batch by batch: the rows and `keep` of their hidden states. The batches do not
    depend on the number of processes: window w goes to process w % world. A forward of sharded weights takes all
    processes, so in every round of windows all run equally many.
    """
    world, rank = host.accelerator.num_processes, host.accelerator.process_index
    dataset = host.dataset.select_columns(["prompt"])
    windows = [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]
    for first in range(0, len(windows), world):
        batches = []
        if first + rank < len(windows):
            window = windows[first + rank]
            ids = host.prompt_ids([{"prompt": prompt} for prompt in dataset[window]["prompt"]])
            batches = [
                (window[places], [ids[place] for place in places]) for places in _pack(ids, tokens_at_once(host))
            ]
        most = max(peers.gather(len(batches)))
        for batch_rows, ids in batches:
            yield batch_rows, keep(_states(host, ids))
        if host.is_sharded:
            for _ in range(most - len(batches)):
                _states(host, [[host.model.config.eos_token_id or 0]])
        bar.update(sum(map(len, windows[first : first + world])))


def _pack(ids: list[list[int]], tokens: int) -> list[list[int]]:
    """
    Places of prompts in batches of at most so many tokens with padding, longest first; a longer prompt has one for
    itself.
    """
    order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
    batches, start = [], 0
    while start < len(order):
        number = max(1, tokens // max(1, len(ids[order[start]])))
        batches.append(order[start : start + number])
        start += number
    return batches


def _states(host, ids: list[list[int]]) -> np.ndarray:
    """
    Of n prompts the mean hidden state after half of the layers, shape `(n, hidden size)`, float32. In halves where
    memory is full, unless the weights are sharded, so that others take part in each forward.

    Raises:
        `MemoryError`: not even one prompt fits, or the weights are sharded.
    """
    try:
        return _forward(host, ids)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        if len(ids) == 1 or host.is_sharded:
            tokens = sum(map(len, ids))
            raise MemoryError(
                f"One forward over {len(ids)} prompts of {tokens:,} tokens does not fit into the memory ({error}). "
                "Set `prompt_features=False`, or leave out the longest prompts."
            ) from error
    # Outside of the handler, whose traceback keeps the tensors of the failed attempt
    clear_device_cache(garbage_collection=True)
    half = len(ids) // 2
    return np.concatenate([_states(host, part) for part in (ids[:half], ids[half:])])


def _forward(host, ids):
    device = host.accelerator.device
    lengths = torch.tensor([len(prompt) for prompt in ids], device=device)
    # Padded on the right, where causal attention keeps it out whatever a model makes of the mask
    input_ids = pad_sequence([torch.tensor(prompt) for prompt in ids], batch_first=True).to(device)
    mask = torch.arange(input_ids.shape[1], device=device) < lengths[:, None]
    model = host.model.get_base_model() if hasattr(host.model, "get_base_model") else host.model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with host.accelerator.autocast():
        states = host.policy(
            input_ids=input_ids, attention_mask=mask.long(), output_hidden_states=True, use_cache=False, **last
        ).hidden_states
    half = states[len(states) // 2].float()  # the first of them are the embeddings
    means = ((half * mask[:, :, None]).sum(1) / lengths[:, None]).cpu().numpy()
    if not np.isfinite(means).all():
        raise ValueError(
            "The policy's hidden states of a prompt are NaN or infinite, so success cannot be predicted from them. "
            "Set `prompt_features=False`, or train in a precision in which they are finite."
        )
    return means


# Principal components ----------------------------------------------------------------------------------------------


def _principal(states: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Of n sampled prompts: the mean of shape `(d,)`, and the matrix `(d, k)` that makes components of what differs from
    it, scaled as [`PromptFeatures`] says. Computed in float64. Of the two signs that a component could have it gets
    the one that makes its largest entry positive.
    """
    states = states.astype(np.float64)
    mean, spread = states.mean(0), states.std(0)
    scale = np.where(spread > _FLAT * max(spread.max(), np.finfo(np.float64).tiny), spread, np.inf)
    standard = (states - mean) / scale
    n, d = standard.shape
    if d <= n:
        variances, directions = np.linalg.eigh(standard.T @ standard / n)
    else:  # the same directions, of a smaller matrix
        variances, left = np.linalg.eigh(standard @ standard.T / n)
        directions = standard.T @ left / np.sqrt(np.maximum(n * variances, np.finfo(np.float64).tiny))
    kept = np.argsort(-variances, kind="stable")[: min(COMPONENTS, n - 1, d)]
    kept = kept[variances[kept] > _FLAT * variances[kept].max(initial=0)]
    directions = directions[:, kept]
    if len(kept):
        directions *= np.sign(directions[np.abs(directions).argmax(0), np.arange(len(kept))])
    size = (variances[kept] * variances[kept].max(initial=0)) ** 0.25
    return mean, directions / scale[:, None] / size


def _project(states: np.ndarray, mean: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    values = (states.astype(np.float64) - mean) @ matrix
    limit = np.finfo(np.float16).max
    return values.clip(-limit, limit).astype(np.float16)
