"""Gradient features of a process's learnable prompts, computed in microbatches, kept or computed again."""

from collections.abc import Iterator

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer

from . import rollouts
from .gradients import PromptGradients
from .journal import Journal
from .rollouts import Row
from .scoring import add_unit_features


# Exact gradients are kept in memory if those of every process fit, else computed twice
EXACT_BYTES = 2 << 30
# Prompts whose rows are sorted by length together
WINDOW = 64

Batch = tuple[list[int], torch.Tensor]


class FeatureSource:
    """
    Iterates over `(dataset indices, features)` of this process's prompts, in batches of a few, features of shape
    `(k, d)` in float32. Sketches are read back from the journal, so that memory does not grow with the pool.

    Args:
        trainer ([`~trl.GRPOTrainer`]): inside [`left_as_found`].
        dim (`int` or `None`): length of a feature; `None`: exact gradients.
        seed (`int`): of the projection.
        tasks (`dict[int, list[Row]]`): the rows that make each prompt's gradient.
        journal ([`Journal`]): keeps the sketches of finished prompts.
        max_tokens (`int` or `None`): most tokens of a microbatch, padding included; `None`: the trainer's
            `per_device_train_batch_size` times the longest rollout.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        dim: int | None,
        seed: int,
        tasks: dict[int, list[Row]],
        journal: Journal,
        max_tokens: int | None = None,
    ):
        self.trainer = trainer
        self.tasks = tasks
        self.journal = journal
        self.exact = dim is None
        # As many tokens as a training step of the longest rollouts has
        longest = max((len(row) for rows in tasks.values() for row in rows), default=0)
        self.max_tokens = max_tokens or trainer.args.per_device_train_batch_size * longest
        self.engine = PromptGradients(rollouts.policy(trainer), dim, seed, probe=not rollouts.has_adapter(trainer))
        most = max(gather_object([len(tasks)]))
        self.twice = self.exact and most * self.engine.feature_dim * 4 > EXACT_BYTES
        self.kept: list[Batch] = []
        # Exact gradients too large to be kept are made one prompt at a time, so that only a few are in memory
        self.microbatches = pack(tasks, self.max_tokens, 1 if self.twice else WINDOW)

    def num_tokens(self) -> tuple[int, int]:
        """Tokens of the rows of this process's prompts: their own, and with the padding of the microbatches."""
        rows = [rows for _, rows in self.microbatches]
        own = sum(len(row) for microbatch in rows for row in microbatch)
        return own, sum(len(microbatch) * max(map(len, microbatch)) for microbatch in rows)

    def weighted_sum(self, weights: torch.Tensor) -> torch.Tensor:
        """
        sum_j w_j phi_j / |phi_j| over the prompts of all processes, of shape `(d,)`, float64; w by dataset index.
        """
        total = torch.zeros(self.engine.feature_dim, dtype=torch.float64)
        for indices, features in self._computed():
            add_unit_features(total, features, weights[indices])
            if self.exact and not self.twice:
                self.kept.append((indices, features))
        accelerator = self.trainer.accelerator
        return accelerator.reduce(total.to(accelerator.device), "sum").cpu()

    def __iter__(self) -> Iterator[Batch]:
        if self.twice:
            yield from self._computed()
        elif self.exact:
            yield from self.kept
        else:
            yield from self._without_rows()
            yield from self.journal.features(self.tasks.keys())

    def _without_rows(self):
        """V > 0, but no token that the policy is trained on."""
        empty = [index for index, rows in self.tasks.items() if not rows]
        if empty:
            yield empty, torch.zeros(len(empty), self.engine.feature_dim)

    def _computed(self):
        """Every prompt once, in the order of completion; the parts of a group in several microbatches are added."""
        yield from self._without_rows()
        done = set()
        if not self.exact:
            for indices, features in self.journal.features(self.tasks.keys()):
                done.update(indices)
                yield indices, features
        # What is in a microbatch does not depend on what is done already, so neither does a feature's last bit
        microbatches = [(counts, rows) for counts, rows in self.microbatches if not counts.keys() <= done]
        remaining = {index: len(rows) for index, rows in self.tasks.items()}
        partial = {}
        with self.engine, rollouts.progress_bar(self.trainer, "gradients", len(microbatches), "batches") as bar:
            for counts, rows in microbatches:
                parts = self._collect(list(counts.values()), rows).cpu()
                finished = {}
                for (index, count), part in zip(counts.items(), parts, strict=True):
                    if index in done:
                        continue
                    remaining[index] -= count
                    if index in partial:
                        part = partial.pop(index).add_(part)
                    if remaining[index]:
                        partial[index] = part
                    else:
                        finished[index] = part
                if finished:
                    indices, features = list(finished), list(finished.values())
                    features = features[0][None] if len(features) == 1 else torch.stack(features)
                    if not self.exact:
                        self.journal.save_features(indices, features)
                    yield indices, features
                bar.update()
            if rollouts.is_sharded(self.trainer):  # a forward takes all processes, so all run equally many
                for _ in range(max(gather_object([len(microbatches)])) - len(microbatches)):
                    self._collect([1], [self._filler()])

    def _collect(self, counts, rows):
        return self.engine.collect(counts, max(map(len, rows)), lambda: rollouts.policy_objective(self.trainer, rows))

    def _filler(self):
        """A row of weight 0."""
        token = self.trainer.processing_class.eos_token_id
        return Row([token], [token], [1], 0.0, 0.0)


def pack(tasks: dict[int, list[Row]], max_tokens: int, window: int = WINDOW) -> list[tuple[dict[int, int], list[Row]]]:
    """
    Microbatches of rows of nearly equal length, each of at most `max_tokens` tokens with its padding (or of one row).

    Prompts are taken window by window, by length, and the rows of a window are sorted by length: a group is spread over
    microbatches of its window only, so that few groups are under way at a time.

    Args:
        tasks (`dict[int, list[Row]]`): the rows of each prompt.
        max_tokens (`int`): number of rows times the length of the longest.
        window (`int`, *optional*): prompts whose rows are sorted together.

    Returns:
        `list`: for every microbatch, how many rows each prompt has in it, and the rows, those of a prompt together.
    """
    order = sorted((index for index in tasks if tasks[index]), key=lambda index: (sum(map(len, tasks[index])), index))
    microbatches = []
    for start in range(0, len(order), window):
        queue = [(index, row) for index in order[start : start + window] for row in tasks[index]]
        queue.sort(key=lambda entry: len(entry[1]))
        while queue:
            # From the long end, where the last row tells the padding
            size = min(len(queue), max(1, max_tokens // len(queue[-1][1])))
            batch = sorted(queue[-size:], key=lambda entry: entry[0])
            del queue[-size:]
            counts: dict[int, int] = {}
            for index, _ in batch:
                counts[index] = counts.get(index, 0) + 1
            microbatches.append((counts, [row for _, row in batch]))
    return microbatches
