"""Gradient features of a process's learnable prompts, computed in microbatches, stored or computed again."""

import collections
import logging
import math
import operator
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from ..gradients.adam import AdamDirections, Moments
from ..gradients.engine import PromptGradients
from ..gradients.modes import turn_dropout_off
from ..ground.memory import in_halves
from ..ground.peers import Peers
from ..ground.progress import progress_bar
from ..ground.store import Log
from ..host import Host
from ..host.groups import Row
from ..scores.maths import add_features, add_unit_features, feature_norms
from .packing import WINDOW, pack


logger = logging.getLogger(__name__)

# Exact gradients are kept if those of each process take at most this, else computed each time that they are needed
EXACT_BYTES = 2 << 30
ADAM_BYTES = 256 << 20  # of the exact gradients that are turned into Adam's steps together

Batch = tuple[list[int], torch.Tensor]


class GradientFeatures:
    """
    An iterable of `(dataset rows, features)` of this process's prompts, in batches of a few, features of shape `(k,
    d)` in float32. The features are read back from the log, and rows are read when their microbatch is computed, so
    that memory does not grow with the pool.

    Args:
        host ([`Host`]): inside [`Host.left_as_found`].
        dim (`int` or `None`): length of a feature; `None`: exact gradients.
        seed (`int`): of the projection.
        lengths (`Mapping[int, np.ndarray]`): tokens of the rows that make each prompt's gradient.
        rows (`Callable[[int], list[Row]]`): the rows of a prompt, as many as it has lengths.
        log ([`Log`]): keeps the features of finished windows of prompts.
        max_tokens (`int` or `None`): most tokens of a microbatch, padding included; `None`: the trainer's
            `per_device_train_batch_size` times the longest rollout.
        peers ([`Peers`], *optional*): a failure of one of them ends the computation.
        moments (`Mapping[str, Moments]`, *optional*): Adam's state. The features are those of its steps then, see
            [`AdamDirections`], which takes the whole gradient of a prompt before it is projected.
    """

    def __init__(
        self,
        host: Host,
        dim: int | None,
        seed: int,
        lengths: Mapping[int, np.ndarray],
        rows: Callable[[int], list[Row]],
        log: Log,
        max_tokens: int | None = None,
        peers: Peers | None = None,
        moments: Mapping[str, Moments] | None = None,
    ):
        self.peers = peers if peers is not None else Peers(host.accelerator)
        self.host = host
        self.lengths, self.rows = lengths, rows
        self.log = log if moments is None else log.inside("adam")
        self.parts = self.log.inside("parts")  # finished microbatches of a window under way
        # As many tokens as a training step of the longest rollouts has
        longest = max((int(own.max()) for own in lengths.values() if len(own)), default=0)
        self.max_tokens = max_tokens or host.args.per_device_train_batch_size * longest
        self.engine = PromptGradients(host.policy, dim if moments is None else None, seed, probe=not host.has_adapter)
        self.adam = None if moments is None else AdamDirections(self.engine.sizes, moments, dim, seed)
        self.feature_dim = self.engine.feature_dim if self.adam is None else self.adam.out_dim
        most, left_over = map(max, zip(*self.peers.gather((len(lengths), len(self.parts))), strict=True))
        self.kept = dim is not None or most * self.feature_dim * 4 <= EXACT_BYTES
        self.did_not_fit = math.inf  # tokens of the smallest microbatch that was too large for the memory
        self.entropy_masks: dict[int, list[np.ndarray]] = {}  # by prompt, a bit for each token of its rows
        # Exact gradients too large to be kept are made one prompt at a time, so that only a few are in memory
        together = WINDOW if self.kept else 1
        if self.adam is not None:
            together = max(1, min(together, ADAM_BYTES // (4 * self.engine.feature_dim)))
        self.windows = pack(lengths, self.max_tokens, together)
        if left_over:  # maybe by another number of processes, or in microbatches of another size
            names = {name for window in self.windows for name in window.parts()}
            self.parts.keep(set().union(*self.peers.gather(names)))

    def num_tokens(self) -> tuple[int, int]:
        """
        Count the tokens of the rows of this process's prompts: their own, and with the padding of the microbatches.
        """
        own = padded = 0
        for window in self.windows:
            for _, places in window.microbatches():
                sizes = [int(self.lengths[index][row]) for index, row in places]
                own, padded = own + sum(sizes), padded + len(sizes) * max(sizes)
        return own, padded

    def weighted_sum(self, weights: torch.Tensor, unit: bool = True) -> torch.Tensor:
        """
        Return sum_j w_j phi_j / |phi_j| over the prompts of this process, float64; w by dataset row.

        Args:
            weights (`torch.Tensor` of shape `(..., N)`): one or more w. All sums take one pass.
            unit (`bool`, *optional*): `False` leaves the features as they are, sum_j w_j phi_j.

        Returns:
            `torch.Tensor` of shape `(..., d)`.
        """
        total = torch.zeros(*weights.shape[:-1], self.feature_dim, dtype=torch.float64)
        sums = list(zip(total.view(-1, total.shape[-1]), weights.view(-1, weights.shape[-1]), strict=True))
        add = add_unit_features if unit else add_features
        for indices, features in self._computed():
            for one, own in sums:
                if own[indices].any():
                    add(one, features, own[indices])
            del features  # may be as large as the LoRA
        return total

    def compute(self) -> None:
        """Compute the features of all prompts, so that they can be read. All processes must call this."""
        if self.kept:
            for _ in self._computed():
                pass

    def __iter__(self) -> Iterator[Batch]:
        if not self.kept:
            yield from self._computed()
            return
        with progress_bar(self.host, "scores", len(self.windows), "batches") as bar:
            for batch in self.stored():
                yield batch
                bar.update()

    def stored(self) -> Iterator[Batch]:
        """Read the features that were computed and kept, for one of many passes: without a progress bar."""
        yield from self._without_rows()
        for window in self.windows:
            features = self._load(self.log, window.name, window.indices, verify=False)
            if features is not None:
                yield window.indices, features
            self.peers.check()

    def _without_rows(self):
        """Yield prompts with V > 0, but no token that the policy is trained on."""
        empty = [index for index, own in self.lengths.items() if not len(own)]
        if empty:
            yield empty, torch.zeros(self._shape(empty))

    def _shape(self, indices):
        return len(indices), self.feature_dim

    def _load(self, log, name, indices, verify=True):
        """
        Map what a log keeps of these prompts from its file; `None` if there is nothing, or features are not kept.
        """
        payload = log.map(name, verify) if self.kept else None
        k, d = self._shape(indices)
        if payload is None or len(payload) != 4 * k * d:
            return None
        return torch.frombuffer(payload, dtype=torch.float32).view(k, d)

    def _computed(self):
        """Yield every prompt once, window by window, in an order that does not depend on what was in the log."""
        yield from self._without_rows()
        missing = [window for window in self.windows if self._load(self.log, window.name, window.indices) is None]
        if self.host.entropy_share < 1:
            self._mark_high_entropies(missing)
        number = sum(len(window.microbatches()) for window in self.windows)
        # If a forward needs all processes, all must run equally many. They agree on the number before the first
        sharded = self.host.is_sharded
        rounds = max(self.peers.gather(sum(map(self._missing_parts, missing)))) if sharded else 0
        missing = set(map(id, missing))
        self.collected = 0
        with self.engine, progress_bar(self.host, "gradients", number, "batches") as bar:
            for window in self.windows:
                if id(window) in missing:
                    features = self._window(window, bar)
                else:
                    features = self._load(self.log, window.name, window.indices, verify=False)
                    bar.update(len(window.microbatches()))
                yield window.indices, features
                del features
            for _ in range(rounds - self.collected):
                self._collect([1], [self.host.filler()])

    def _window(self, window, bar):
        """Compute the features of a window, which are kept when all of its microbatches are done."""
        features = torch.zeros(len(window.indices), self.engine.feature_dim)
        places = {index: place for place, index in enumerate(window.indices)}
        microbatches = window.microbatches()
        rows = None
        for number, (counts, chosen) in enumerate(microbatches):
            part = self._load(self.parts, window.part(number), counts)
            if part is None:
                rows = rows if rows is not None else {index: self._marked_rows(index) for index in window.indices}
                batch = [rows[index][row] for index, row in chosen]
                part = self._finite(self._collect(list(counts.values()), batch).cpu(), counts)
                self.collected += 1
                if self.kept and self.adam is None and len(microbatches) > 1:
                    self.parts.append([(window.part(number), part.contiguous().numpy())], durable=False)
            for index, feature in zip(counts, part, strict=True):
                features[places[index]] += feature
            del part, feature
            self.peers.check()
            bar.update()
        if self.adam is not None:
            features = self.adam(features)
        if self.kept:
            self.log.append([(window.name, features.numpy())])
            self.parts.discard(window.parts())
        return features

    def _missing_parts(self, window):
        """Count the microbatches of a window that are to be computed."""
        return sum(
            self._load(self.parts, window.part(number), counts) is None
            for number, (counts, _) in enumerate(window.microbatches())
        )

    def _mark_high_entropies(self, missing):
        """Find the tokens of high entropy, before all gradients: a sharded forward needs all processes at once."""
        windows = [window for window in missing if window.indices[0] not in self.entropy_masks]
        number = sum(len(window.microbatches()) for window in windows)
        rounds = max(self.peers.gather(number)) if self.host.is_sharded else 0
        with progress_bar(self.host, "entropies", number, "batches") as bar:
            for window in windows:
                rows = {index: self.rows(index) for index in window.indices}
                entropies = {}
                for _, places in window.microbatches():
                    found = self._entropies([rows[index][row] for index, row in places])
                    entropies |= zip(places, found, strict=True)
                    self.peers.check()
                    bar.update()
                for index in window.indices:
                    own = [entropies[index, row] for row in range(len(rows[index]))]
                    self.host.mark_high_entropies(rows[index], own)
                    self.entropy_masks[index] = [np.packbits(row.entropy_mask) for row in rows[index]]
        for _ in range(rounds - number):
            self._entropies([self.host.filler()])

    def _marked_rows(self, index):
        """Return the rows of a prompt, with the tokens of high entropy if only these count."""
        rows = self.rows(index)
        for row, mask in zip(rows, self.entropy_masks.get(index, ()), strict=False):
            row.entropy_mask = np.unpackbits(mask, count=len(row.completion_ids)).view(np.int8)
        return rows

    def _entropies(self, rows):
        """Compute the entropies of each row's tokens; in halves if memory is full."""

        def run(rows):
            self._meet()
            turn_dropout_off(self.host.model)  # some ways to generate turn it on
            return self.host.entropies(rows)

        return in_halves(rows, run, operator.add, self._too_large, whole=self.host.is_sharded)

    def _finite(self, part, counts):
        finite = feature_norms(part).isfinite().tolist()
        if not all(finite):
            wrong = [index for index, whole in zip(counts, finite, strict=True) if not whole]
            raise FloatingPointError(
                f"The gradients of the training prompts {wrong[:10]} are not finite, so no prompt could be scored. "
                "The policy has probably diverged: lower the learning rate, or train in bfloat16 or float32 instead "
                "of float16."
            )
        return part

    def _collect(self, counts, rows):
        """Compute the gradients of a microbatch; in halves if memory is full."""
        # Each row with the place of its prompt, so that a half knows whose gradients it has
        owned = [(place, row) for place, row in zip(np.repeat(range(len(counts)), counts).tolist(), rows, strict=True)]

        def run(part):
            places, numbers = zip(*collections.Counter(place for place, _ in part).items(), strict=True)
            return list(places), self._collect_at_once(list(numbers), [row for _, row in part])

        def join(first, second):
            places = sorted({*first[0], *second[0]})
            total = torch.zeros(len(places), self.engine.feature_dim)
            for own, gradients in (first, second):
                total[[places.index(place) for place in own]] += gradients.cpu()
            return places, total

        def failed(part):
            self.did_not_fit = tokens = _padded(part)
            logger.warning(
                f"A microbatch of {tokens} tokens does not fit into the memory, so the gradients are taken in halves. "
                f"Set `max_tokens_per_batch` below {tokens} to avoid the retry."
            )

        return in_halves(
            owned,
            run,
            join,
            lambda part, error: self._too_large([row for _, row in part], error),
            fits=lambda part: _padded(part) < self.did_not_fit,
            whole=self.host.is_sharded,
            failed=failed,
        )[1]

    def _too_large(self, rows, error):
        return MemoryError(
            f"The gradient of {len(rows)} rollouts of {max(map(len, rows))} tokens does not fit into the memory "
            f"({error}). Turn on `gradient_checkpointing`, lower `max_completion_length` or `max_tokens_per_batch`, "
            "or use `score='learnability'`, which takes no gradients."
        )

    def _meet(self):
        """Wait for the others before a forward that needs all processes: none starts it after another has failed."""
        if self.host.is_sharded:
            self.peers.wait()

    def _collect_at_once(self, counts, rows):
        self._meet()
        turn_dropout_off(self.host.model)
        return self.engine.collect(counts, max(map(len, rows)), lambda: self.host.objective(rows))


def _padded(owned):
    return len(owned) * max(len(row) for _, row in owned)
