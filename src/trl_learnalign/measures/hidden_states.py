"""Hidden states of prompts, as a few principal components: one forward over the pool before any rollout."""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..curriculum.features import COMPONENTS, principal, project
from ..data.columns import row_index
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest, scratch
from ..ground.peers import Peers
from ..ground.store import open_log
from ..host import Host
from .base import Context, Finding, Measure
from .feature_file import PromptFeatures, file_name, read_features
from .forwards import evaluating, in_rounds, prompt_ids, reason_against, tokens_at_once, windows_of
from .half_forward import HalfForward


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


SAMPLE = 2048  # prompts that the components are found with
WINDOW = 1024  # prompts that a process tokenises at once, sorts by length, and keeps on disk when they are done
_FORMAT = 2
_COUNTED = 256  # prompts whose tokens are counted for the plan
_BASIS = 1 << 40  # name of the record of the components, behind all windows


class HiddenStates(Measure):
    """
    Principal components of the prompts' hidden states, the columns `hidden_0`, `hidden_1`, ... of the table, see
    [`hidden_states`]. They are not kept in `scores.parquet`.
    """

    name = "hidden_states"

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """Refuse prompts that are not known before their rollouts."""
        if (reason := reason_against(host)) is not None:
            raise ValueError(
                f"The score needs hidden states of the prompts, but {reason}. Use a score that needs rollouts alone, "
                "without `diversity='hidden_states'`."
            )

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return the sizes of the sample, of windows and of batches."""
        return {"sizes": _sizes(context.host), **super().key(context, rows)}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Run half of the policy over every prompt."""
        host, started = context.host, time.perf_counter()
        values = _compute(host, context.peers, np.array(rows, np.int32), HalfForward(host), log)
        log.close()
        context.clock("hidden states", started)
        return Finding(_table(values, rows))

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """Return components that differ from prompt to prompt."""
        places = np.arange(len(table))[:, None] + np.arange(COMPONENTS)
        return Finding(_table(np.cos(places), table.index))


def _table(values, rows):
    names = [f"hidden_{number}" for number in range(values.shape[1])]
    return pd.DataFrame(values.astype(np.float64), columns=names, index=row_index(rows))


def _sizes(host):
    return [COMPONENTS, SAMPLE, WINDOW, tokens_at_once(host)]


def hidden_states(
    host: Host,
    directory: Path,
    peers: Peers,
    rows: np.ndarray | None = None,
    before: Callable[[], None] = lambda: None,
) -> PromptFeatures:
    """
    Return features of prompts of the training dataset, equal on all processes; those of `directory` if they were made
    from the same rows and weights in the same way. The policy does not change. All processes must call this, if
    [`reason_against`] returned `None`.

    A prompt's features are the mean of its hidden states over its tokens, after half of the layers. Each dimension is
    standardised, since in large models a few are a thousand times greater than the others; the principal components
    are found over a random sample of at most 2,048 prompts. Every prompt goes through half of the policy once, see
    [`HalfForward`]. Prompts of like length go together. Finished batches are on disk, so that a killed run goes on.

    Args:
        host ([`Host`]): of the trainer.
        directory (`Path`): of the run's files, where the features are kept by their key.
        peers ([`Peers`]): an open context.
        rows (`np.ndarray` of shape `(n,)`, int32, *optional*): the rows, increasing; all by default.
        before (`Callable`): called on all processes before the first forward, if there is one to be made.

    Raises:
        `OSError`: the features cannot be written.
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
        "sizes": _sizes(host),
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
    Return the features that a resumed run began with, from the checkpoint, else from `directory`, where they are kept
    for the checkpoints to come. The weights have changed since, so the features are read and not made again.

    Raises:
        `ValueError`: neither place has the features.
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
    """Estimate tokens and operations of the forward from some of the prompts."""
    picked = np.random.Generator(np.random.Philox(1)).permutation(rows)[:_COUNTED]
    lengths = [len(ids) for ids in prompt_ids(host, picked.tolist())]
    tokens = np.mean(lengths) * len(rows)
    of_pool = "" if len(rows) == len(host.dataset) else f" of {len(host.dataset):,}"
    flops = "" if host.is_sharded else f", about {2 * forward.parameters * tokens:.1e} FLOPs"
    return f"first a forward over {len(rows):,}{of_pool} prompts, about {tokens:,.0f} tokens{flops}."


# Forwards ----------------------------------------------------------------------------------------------------------


def _compute(host, peers, rows, forward, log) -> np.ndarray:
    """Compute the components, of shape `(n, k)`, float16."""
    sampled = np.random.Generator(np.random.Philox(0)).permutation(len(rows))[:SAMPLE]
    sampled.sort()
    rest = np.setdiff1d(np.arange(len(rows)), sampled)
    first, then = windows_of(rows[sampled], WINDOW), windows_of(rows[rest], WINDOW)

    def read(part):
        return prompt_ids(host, part)

    with evaluating(host, "hidden states", len(rows)) as bar:
        states = in_rounds(host, peers, bar, log, forward, read, first, np.float32)
        basis = peers.broadcast(_basis(log, states) if host.accelerator.is_main_process else None)
        features = np.empty((len(rows), basis[-1].shape[1]), dtype=np.float16)
        features[sampled] = project(states, *basis)
        if then:
            features[rest] = in_rounds(
                *(host, peers, bar, log, forward, read, then, np.float16, len(first)),
                keep=lambda states: project(states, *basis),
            )
    return peers.broadcast(features)  # the last bit of a product may differ from machine to machine


def _basis(log, states):
    """Find the components; in a killed run those that its rows were projected with."""
    found = log.read(_BASIS)
    if found is None:
        mean, matrix = principal(states)
        log.append([(_BASIS, np.concatenate([mean[:, None], matrix], axis=1))])
        return mean, matrix
    both = np.frombuffer(found).reshape(states.shape[1], -1)
    return np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1:])
