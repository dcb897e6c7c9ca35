"""Gradient features of a process's learnable prompts, computed in microbatches, stored or computed again."""

import collections
import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from .gradients import PromptGradients, turn_dropout_off
from .groups import Row
from .host import Host
from .journal import Journal
from .peers import Peers
from .progress import progress_bar
from .projection import stable_hash
from .scoring import add_unit_features, feature_norms


logger = logging.getLogger(__name__)

# Exact gradients are stored in the journal if those of each process take at most this, else computed twice
EXACT_BYTES = 2 << 30
# Prompts whose rows are sorted by length together
WINDOW = 64

Batch = tuple[list[int], torch.Tensor]


class FeatureSource:
    """
    Iterates over `(dataset indices, features)` of this process's prompts, in batches of a few, features of shape
    `(k, d)` in float32. Sketches are read back from the journal, so that memory does not grow with the pool.

    Args:
        host ([`Host`]): inside [`Host.left_as_found`].
        dim (`int` or `None`): length of a feature; `None`: exact gradients.
        seed (`int`): of the projection.
        tasks (`dict[int, list[Row]]`): the rows that make each prompt's gradient.
        journal ([`Journal`]): keeps the sketches of finished prompts.
        max_tokens (`int` or `None`): most tokens of a microbatch, padding included; `None`: the trainer's
            `per_device_train_batch_size` times the longest rollout.
        peers ([`Peers`], *optional*): a failure of one of them ends this pass.
    """

    def __init__(
        self,
        host: Host,
        dim: int | None,
        seed: int,
        tasks: dict[int, list[Row]],
        journal: Journal,
        max_tokens: int | None = None,
        peers: Peers | None = None,
    ):
        self.peers = peers if peers is not None else Peers(host.accelerator)
        self.host = host
        self.tasks = tasks
        self.journal = journal
        # As many tokens as a training step of the longest rollouts has
        longest = max((len(row) for rows in tasks.values() for row in rows), default=0)
        self.max_tokens = max_tokens or host.args.per_device_train_batch_size * longest
        self.engine = PromptGradients(host.policy, dim, seed, probe=not host.has_adapter)
        most = max(self.peers.gather(len(tasks)))
        self.twice = dim is None and most * self.engine.feature_dim * 4 > EXACT_BYTES
        self.too_many = math.inf  # tokens of the smallest microbatch that did not fit into the memory
        # Exact gradients too large to be kept are made one prompt at a time, so that only a few are in memory
        self.windows = pack(tasks, self.max_tokens, 1 if self.twice else WINDOW)

    def num_tokens(self) -> tuple[int, int]:
        """Tokens of the rows of this process's prompts: their own, and with the padding of the microbatches."""
        rows = [rows for window in self.windows for _, rows in window.microbatches]
        own = sum(len(row) for microbatch in rows for row in microbatch)
        return own, sum(len(microbatch) * max(map(len, microbatch)) for microbatch in rows)

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """
        sum_j w_j phi_j / |phi_j| over the prompts of this process, of shape `(d,)`, float64; w by dataset index.
        """
        total = torch.zeros(self.engine.feature_dim, dtype=torch.float64)
        for indices, features in self._computed():
            add_unit_features(total, features, weights[indices])
            del features  # may be as large as the LoRA
        return total

    def compute(self) -> None:
        """Computes the features of all prompts, so that they can be read. All processes must call this."""
        if not self.twice:
            for _ in self._computed():
                pass

    def __iter__(self) -> Iterator[Batch]:
        if self.twice:
            yield from self._computed()
            return
        yield from self._without_rows()
        with progress_bar(self.host, "scores", len(self.windows), "batches") as bar:
            for window in self.windows:
                features = self.journal.load_features(window.name, self._shape(window.indices), verify=False)
                if features is not None:
                    yield window.indices, features
                self.peers.check()
                bar.update()

    def _without_rows(self):
        """V > 0, but no token that the policy is trained on."""
        empty = [index for index, rows in self.tasks.items() if not rows]
        if empty:
            yield empty, torch.zeros(self._shape(empty))

    def _shape(self, indices):
        return len(indices), self.engine.feature_dim

    def _computed(self):
        """Every prompt once, window by window, in an order that does not depend on what was in the journal."""
        yield from self._without_rows()
        if self.host.entropy_share < 1:
            self._mark_high_entropies()
        number = sum(len(window.microbatches) for window in self.windows)
        # If a forward needs all processes, all must run equally many. They agree on the number before the first
        rounds = max(self.peers.gather(self._missing())) if self.host.is_sharded else 0
        collected = 0
        with self.engine, progress_bar(self.host, "gradients", number, "batches") as bar:
            for window in self.windows:
                features = None if self.twice else self.journal.load_features(window.name, self._shape(window.indices))
                if features is None:
                    features = torch.zeros(self._shape(window.indices))
                    places = {index: place for place, index in enumerate(window.indices)}
                    for n, (counts, rows) in enumerate(window.microbatches):
                        name = f"{window.name}-{n:04d}"
                        part = None if self.twice else self.journal.load_features(name, self._shape(counts))
                        if part is None:
                            part = self._finite(self._collect(list(counts.values()), rows).cpu(), counts)
                            collected += 1
                            if not self.twice and len(window.microbatches) > 1:
                                self.journal.save_features(name, part)
                        for index, feature in zip(counts, part, strict=True):
                            features[places[index]] += feature
                        del part, feature
                        self.peers.check()
                        bar.update()
                    if not self.twice:
                        self.journal.save_features(window.name, features)
                        for n in range(len(window.microbatches)):
                            self.journal.remove_features(f"{window.name}-{n:04d}")
                else:
                    bar.update(len(window.microbatches))
                yield window.indices, features
                del features
            for _ in range(rounds - collected):
                self._collect([1], [self.host.filler()])

    def _mark_high_entropies(self):
        """Marks the rows of windows to be computed, before all gradients: a sharded forward needs all processes at once."""
        windows = [window for window in self.windows if self._unmarked(window)]
        number = sum(len(window.microbatches) for window in windows)
        rounds = max(self.peers.gather(number)) if self.host.is_sharded else 0
        with progress_bar(self.host, "entropies", number, "batches") as bar:
            for window in windows:
                entropies = {}
                for _, rows in window.microbatches:
                    entropies |= zip(map(id, rows), self._entropies(rows), strict=True)
                    self.peers.check()
                    bar.update()
                for index in window.indices:
                    rows = self.tasks[index]
                    own = [entropies[id(row)] for row in rows]
                    self.host.mark_high_entropies(rows, own)
        for _ in range(rounds - number):
            self._entropies([self.host.filler()])

    def _unmarked(self, window):
        if self.tasks[window.indices[0]][0].entropy_mask is not None:
            return False
        return self.twice or self.journal.load_features(window.name, self._shape(window.indices)) is None

    def _entropies(self, rows):
        """The entropies of each row's tokens; computed in halves if memory is full."""
        self._meet()
        turn_dropout_off(self.host.model)  # some ways to generate turn it on
        try:
            return self.host.entropies(rows)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            if len(rows) == 1 or self.host.is_sharded:
                raise self._too_large(rows, error) from error
        clear_device_cache(garbage_collection=True)
        half = len(rows) // 2
        return self._entropies(rows[:half]) + self._entropies(rows[half:])

    def _missing(self):
        """Microbatches that are not in the journal."""
        if self.twice:
            return sum(len(window.microbatches) for window in self.windows)
        return sum(
            self.journal.load_features(f"{window.name}-{n:04d}", self._shape(counts)) is None
            for window in self.windows
            if self.journal.load_features(window.name, self._shape(window.indices)) is None
            for n, (counts, _) in enumerate(window.microbatches)
        )

    def _finite(self, part, counts):
        finite = feature_norms(part).isfinite().tolist()
        if not all(finite):
            wrong = [index for index, whole in zip(counts, finite, strict=True) if not whole]
            raise FloatingPointError(
                f"The gradients of the training prompts {wrong[:10]} are not finite, so no prompt could be scored. The "
                "policy has probably diverged: lower the learning rate, or train in bfloat16 or float32 instead of "
                "float16."
            )
        return part

    def _collect(self, counts, rows):
        """The gradients of a microbatch; computed in halves if memory is full."""
        tokens = len(rows) * max(map(len, rows))
        if len(rows) == 1 or tokens < self.too_many:
            try:
                return self._collect_at_once(counts, rows)
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(rows) == 1 or self.host.is_sharded:
                    raise self._too_large(rows, error) from error
                self.too_many = tokens
            # Outside of the handler, whose traceback keeps the tensors of the failed attempt
            logger.warning(
                f"A microbatch of {tokens} tokens does not fit into the memory, so the gradients are taken in halves. "
                f"Set `max_tokens_per_batch` below {tokens} to avoid the retry."
            )
            clear_device_cache(garbage_collection=True)
        half = len(rows) // 2
        parts = torch.zeros(self._shape(counts))
        for first, last in ((0, half), (half, len(rows))):
            # how many rows of each prompt lie between `first` and `last`
            ends = list(itertools.accumulate(counts))
            inside = [min(end, last) - max(end - count, first) for end, count in zip(ends, counts, strict=True)]
            places = [place for place, count in enumerate(inside) if count > 0]
            parts[places] += self._collect([inside[place] for place in places], rows[first:last]).cpu()
        return parts

    def _too_large(self, rows, error):
        return MemoryError(
            f"The gradient of {len(rows)} rollouts of {max(map(len, rows))} tokens does not fit into the memory ({error}). "
            "Turn on `gradient_checkpointing`, lower `max_completion_length` or `max_tokens_per_batch`, or use "
            "`score='learnability'`, which takes no gradients."
        )

    def _meet(self):
        """Where a forward takes all processes, none begins one that another, which has failed, will not join."""
        if self.host.is_sharded:
            self.peers.wait()

    def _collect_at_once(self, counts, rows):
        self._meet()
        turn_dropout_off(self.host.model)
        return self.engine.collect(counts, max(map(len, rows)), lambda: self.host.objective(rows))


@dataclass
class Window:
    """Prompts whose rows are sorted by length together, and the microbatches that this makes."""

    indices: list[int]
    microbatches: list[tuple[dict[int, int], list[Row]]]  # how many rows each prompt has in it; those of one together
    name: str  # stands for the prompts, their rows' lengths and the token budget


def pack(tasks: dict[int, list[Row]], max_tokens: int, size: int = WINDOW) -> list[Window]:
    """
    Microbatches of rows of nearly equal length, each of at most `max_tokens` tokens with its padding (or of one row).

    Prompts are taken window by window, by length, and the rows of a window are sorted by length: a group is spread over
    microbatches of its window only, so that few groups are under way at a time.

    Args:
        tasks (`dict[int, list[Row]]`): the rows of each prompt; prompts without rows are left out.
        max_tokens (`int`): number of rows times the length of the longest.
        size (`int`, *optional*): prompts of a window.
    """
    order = sorted((index for index in tasks if tasks[index]), key=lambda index: (sum(map(len, tasks[index])), index))
    windows = []
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        queue = [(index, row) for index in indices for row in tasks[index]]
        queue.sort(key=lambda entry: len(entry[1]))
        microbatches = []
        while queue:
            # From the long end, where the last row tells the padding
            count = min(len(queue), max(1, max_tokens // len(queue[-1][1])))
            numbers = collections.Counter(index for index, _ in queue[-count:])
            # Prompts with equally many rows are neighbours: their gradients are computed at once
            batch = sorted(queue[-count:], key=lambda entry: (numbers[entry[0]], entry[0]))
            del queue[-count:]
            counts = {index: numbers[index] for index, _ in batch}
            microbatches.append((counts, [row for _, row in batch]))
        lengths = [(index, [len(row) for row in tasks[index]]) for index in indices]
        windows.append(Window(indices, microbatches, f"{stable_hash(max_tokens, lengths):016x}"))
    return windows
