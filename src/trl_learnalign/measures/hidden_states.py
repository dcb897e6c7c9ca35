"""
What the policy's hidden states say about prompts before any of them is rolled out: one forward over the pool, of which
a few principal components a prompt are kept.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..data.reading import columns_read, read_prompts
from ..data.rows import dataset_fingerprint
from ..gradients.modes import as_in_evaluation
from ..ground.disk import digest, scratch
from ..ground.peers import Peers
from ..ground.progress import progress_bar
from ..ground.store import Log, open_log
from ..host import Host
from .feature_file import PromptFeatures, file_name, read_features
from .half_forward import HalfForward, tokens_at_once


COMPONENTS = 64  # of a prompt, less where the hidden states of the pool have fewer dimensions
SAMPLE = 2048  # prompts that the components are found with
WINDOW = 1024  # prompts that a process tokenises at once, sorts by length, and keeps on disk when they are done
_FORMAT = 2
_FLAT = 1e-4  # of the largest: a dimension that varies less is as good as constant
_PADDED = 1.03  # most tokens of a batch with its padding, over those without
_COUNTED = 256  # prompts whose tokens are counted for the plan
_BASIS = 1 << 40  # name of the record of the components, behind all windows


def reason_against(host: Host) -> str | None:
    """Why the prompts of this trainer have no hidden states that could be computed beforehand; `None` if they have."""
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


def hidden_states(
    host: Host,
    directory: Path,
    peers: Peers,
    rows: np.ndarray | None = None,
    before: Callable[[], None] = lambda: None,
) -> PromptFeatures:
    """
    Features of prompts of the training dataset, equal on all processes; those of `directory` if they were made from
    the same rows and weights in the same way. The policy does not change. All processes must call this, if
    [`reason_against`] returned `None`.

    Of a prompt's hidden states the mean over its tokens is taken, after half of the layers. Each dimension is
    standardised, since in large models a few are a thousand times greater than the others; the principal components
    are found over a random sample of at most 2,048 prompts. Every prompt goes through half of the policy once, see
    [`HalfForward`]. Prompts of like length go together. What is done is on disk, so that a killed run goes on.

    Args:
        host ([`Host`]): of the trainer.
        directory (`Path`): of the run's files, where the features are kept by their key.
        peers ([`Peers`]): an open context.
        rows (`np.ndarray` of shape `(n,)`, int32, *optional*): the rows, increasing; all by default.
        before (`Callable`): called on all processes before the first forward, if there is one to be made.

    Raises:
        `OSError`: they cannot be written.
    """
    directory = Path(directory)
    rows = np.arange(len(host.dataset), dtype=np.int32) if rows is None else rows
    peers.wait()  # before the collective operations of sharded weights
    made_from = {
        "format": _FORMAT,
        "dataset": dataset_fingerprint(host.dataset),
        "model": host.base_identity(),
        "prompts": host.prompt_identity(),
        "weights": host.weights_digest(),
        "sizes": [COMPONENTS, SAMPLE, WINDOW, tokens_at_once(host)],
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
    }
    key = peers.broadcast(digest(made_from))
    found = peers.broadcast(read_features(directory, key) if host.accelerator.is_main_process else None)
    if found is not None:
        return found
    forward = HalfForward(host)
    if host.accelerator.is_main_process:
        print(f"LearnAlign plan: {_what_it_takes(host, rows, forward)}", flush=True)
    before()
    log = open_log(scratch(directory) / "hidden_states", key, host.accelerator, peers)
    try:
        values = _compute(host, peers, rows, forward, log)
    finally:
        log.close()
    features = PromptFeatures(values, rows, peers.broadcast(made_from), key)
    if host.accelerator.is_main_process:
        features.write(directory)
    peers.wait()
    if host.accelerator.is_local_main_process:
        shutil.rmtree(log.path, ignore_errors=True)
    return features


def features_of_the_run(host: Host, directory: Path, peers: Peers, key: str) -> PromptFeatures:
    """
    The features that a resumed run began with, from the checkpoint, else from `directory`, where they are kept for the
    checkpoints to come. The weights have changed since, so they are read and not made again.

    Raises:
        `ValueError`: neither has them.
    """
    directory, found = Path(directory), None
    if host.accelerator.is_main_process:
        places = [place for place in (host.resumed_from, directory) if place is not None]
        found = next((one for place in places if (one := read_features(place, key)) is not None), None)
        if found is not None and read_features(directory, key) is None:
            found.write(directory, host.resumed_from)
    found = peers.broadcast(found)
    if found is None:
        raise ValueError(
            f"'{file_name(key)}', the features by which the resumed run chose its prompts, is missing or damaged in "
            f"'{host.resumed_from}' and in '{directory}', and cannot be computed again, since the weights have "
            "changed. Put that file back, resume from another checkpoint, or start a new run from these weights."
        )
    return found


def _what_it_takes(host, rows, forward) -> str:
    """Tokens and operations of the forward, from some of the prompts."""
    picked = np.random.Generator(np.random.Philox(1)).permutation(rows)[:_COUNTED]
    lengths = [len(ids) for ids in _prompt_ids(host, picked)]
    tokens = np.mean(lengths) * len(rows)
    of_pool = "" if len(rows) == len(host.dataset) else f" of {len(host.dataset):,}"
    flops = "" if host.is_sharded else f", about {2 * forward.parameters * tokens:.1e} FLOPs"
    return f"first a forward over {len(rows):,}{of_pool} prompts, about {tokens:,.0f} tokens{flops}."


# Forwards ----------------------------------------------------------------------------------------------------------


def _compute(host, peers, rows, forward, log) -> np.ndarray:
    """(n, k), float16."""
    sampled = np.random.Generator(np.random.Philox(0)).permutation(len(rows))[:SAMPLE]
    sampled.sort()
    rest = np.setdiff1d(np.arange(len(rows)), sampled)
    first, then = _windows(rows[sampled]), _windows(rows[rest])
    with (
        as_in_evaluation(host.policy),
        torch.no_grad(),
        progress_bar(host, "hidden states", len(rows), "prompts") as bar,
    ):
        states = _measured(host, peers, bar, log, forward, first, 0, lambda states: states, np.float32, -1)
        basis = peers.broadcast(_basis(log, states) if host.accelerator.is_main_process else None)
        features = np.empty((len(rows), basis[-1].shape[1]), dtype=np.float16)
        features[sampled] = _project(states, *basis)
        if then:
            project = lambda states: _project(states, *basis)  # noqa: E731
            features[rest] = _measured(
                host, peers, bar, log, forward, then, len(first), project, np.float16, features.shape[1]
            )
    return peers.broadcast(features)  # the last bit of a product may differ from machine to machine


def _windows(rows):
    return [rows[start : start + WINDOW] for start in range(0, len(rows), WINDOW)]


def _basis(log, states):
    """Of a killed run the one that its rows were projected with."""
    found = log.read(_BASIS)
    if found is None:
        mean, matrix = _principal(states)
        log.append([(_BASIS, np.concatenate([mean[:, None], matrix], axis=1))])
        return mean, matrix
    both = np.frombuffer(found).reshape(states.shape[1], -1)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1:])


def _measured(host, peers, bar, log: Log, forward, windows, first, keep, kind, width) -> np.ndarray:
    """
    `keep` of the hidden states of all windows, one after another, on every process. Windows that are in the log are
    read; the others go round, one for each process. A forward of sharded weights takes all processes, so in every
    round all run equally many. The batches do not depend on the number of processes.
    """
    world, rank = host.accelerator.num_processes, host.accelerator.process_index
    known = {place: log.read(first + place) for place in range(len(windows))}
    holders = {}
    for other, places in enumerate(peers.gather([place for place, content in known.items() if content is not None])):
        for place in places:
            holders.setdefault(place, other)
    values = {
        place: np.frombuffer(known[place], kind).reshape(len(windows[place]), width)
        for place, holder in holders.items()
        if holder == rank
    }
    del known
    bar.update(sum(len(windows[place]) for place in holders))
    left = [place for place in range(len(windows)) if place not in holders]
    for start in range(0, len(left), world):
        batches, ids = [], []
        if start + rank < len(left):
            place = left[start + rank]
            ids = _prompt_ids(host, windows[place])
            batches = _pack(ids, forward.tokens)
        most = max(peers.gather(len(batches)))
        parts = [forward([ids[number] for number in batch]) for batch in batches]
        if host.is_sharded:
            for _ in range(most - len(batches)):
                forward([list(host.filler().prompt_ids)])
        if batches:
            states = np.empty((len(ids), parts[0].shape[1]), np.float32)
            states[np.concatenate(batches)] = np.concatenate(parts)
            values[place] = keep(states)
            log.append([(first + place, values[place])])
        bar.update(sum(len(windows[place]) for place in left[start : start + world]))
    found = {place: array for part in peers.gather(values) for place, array in part.items()}
    return np.concatenate([found[place] for place in range(len(windows))])


def _prompt_ids(host, rows):
    return host.prompt_ids([{"prompt": prompt} for prompt in read_prompts(host.dataset, rows)])


def _pack(ids: list[list[int]], tokens: int) -> list[list[int]]:
    """
    Places of prompts in batches of at most so many tokens, hardly any of them padding, longest first; a longer prompt
    has one for itself.
    """
    batches, longest, held = [], 0, 0
    for place in sorted(range(len(ids)), key=lambda place: -len(ids[place])):
        length = max(1, len(ids[place]))
        padded = longest * (len(batches[-1]) + 1) if batches else 0
        if not batches or padded > tokens or padded > _PADDED * (held + length):
            batches.append([])
            longest, held = length, 0
        batches[-1].append(place)
        held += length
    return batches


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
