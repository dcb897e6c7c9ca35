"""
What others do with the rewards of training, as schedules of this package: one class a method, with the
constants of its authors' code. None of them makes a rollout of its own, but for `RefillingTrainer`.

- `BetaMean`, `MoPPS` (arXiv 2507.04632): a Beta posterior for each prompt; of 16 times as many random candidates those
  whose mean, or whose draw from the posterior, is nearest to one half.
- `GRESO` (2506.02177): epochs in random order; a prompt whose last visits had all rewards equal is skipped with a
  probability that grows with their number and is tuned to a target.
- `Pools` (prime-rl): drawn in proportion to a weight, which the last success rate decides: hard, normal, easy.
- `RefillingTrainer` (DAPO, 2503.14476): groups without a gradient are replaced by fresh ones, generated at once, a
  bounded number of times.
"""

import numpy as np
import torch
from torch.nn.functional import pad
from trl import GRPOTrainer

from trl_learnalign import Schedule


class _Baseline(Schedule):
    """Random numbers are those of the first draw of a call, so that every process has the same."""

    def __init__(self, run):
        super().__init__(run)
        self.size, self.drawn, self._flight = run.pool_size, 0, {}

    def generator(self, number):
        return np.random.Generator(np.random.Philox(key=[self.run.seed, number]))

    def choose(self, n):
        rows = np.asarray(self.pick(n, self.generator(self.drawn)))
        self._flight |= dict(enumerate(rows.tolist(), start=self.drawn))
        self.drawn += n
        return rows

    def observe(self, groups):
        new = [group for group in groups if self._flight.pop(group.number, None) is not None]
        if new:
            rewards = np.stack([group.rewards[:, 0] for group in new])
            successes = (rewards >= self.run.config.success_threshold).sum(1)
            self.learn(np.array([group.row for group in new]), successes)

    def pick(self, n, generator):
        """The rows of the next n prompts."""
        raise NotImplementedError

    def learn(self, rows, successes):
        """Learns how many of the `group_size` rollouts of each of these rows have succeeded."""


class BetaMean(_Baseline):
    """The posterior begins as Beta(1, 1) and forgets nothing, as in the authors' runs on MATH."""

    CANDIDATES = 16

    def __init__(self, run):
        super().__init__(run)
        self.a, self.b = np.ones(self.size), np.ones(self.size)

    def guess(self, rows, generator):
        return self.a[rows] / (self.a[rows] + self.b[rows])

    def pick(self, n, generator):
        rows = generator.choice(self.size, min(self.size, self.CANDIDATES * n), replace=False)
        far = np.abs(self.guess(rows, generator) - 0.5)
        return rows[np.lexsort((generator.random(len(rows)), far))[:n]]

    def learn(self, rows, successes):
        np.add.at(self.a, rows, successes)
        np.add.at(self.b, rows, self.run.group_size - successes)


class MoPPS(BetaMean):
    """Thompson draws in place of means."""

    def guess(self, rows, generator):
        return generator.beta(self.a[rows], self.b[rows])


DEAD_TARGETS = {"easy": 1 / 12, "hard": 1 / 6}  # of GRESO: shares of a chunk without a gradient


class GRESO(_Baseline):
    """
    `keep` is the factor by which each further visit without a gradient lowers the probability of drawing a prompt: one
    for always and one for never solved prompts.
    """

    LEAST, STEP, BOUNDS = 0.01, 0.01, (0.05, 0.95)

    def __init__(self, run):
        super().__init__(run)
        self.place, self.orders = 0, []
        self.keep = {"easy": 0.5, "hard": 0.5}
        self.streak = {kind: np.zeros(self.size, int) for kind in self.keep}

    def position(self, place):
        """The row at a place in the endless order."""
        epoch, offset = divmod(place, self.size)
        while len(self.orders) <= epoch:
            self.orders.append(self.generator(2**32 + len(self.orders)).permutation(self.size))
        return int(self.orders[epoch][offset])

    def pick(self, n, generator):
        rows = []
        while len(rows) < n:
            row = self.position(self.place)
            self.place += 1
            chances = [max(keep ** self.streak[kind][row], self.LEAST) for kind, keep in self.keep.items()]
            if generator.random() < min(chances):
                rows.append(row)
        return rows

    def learn(self, rows, successes):
        for kind, dead in (("easy", successes == self.run.group_size), ("hard", successes == 0)):
            streak = self.streak[kind]
            streak[rows] = np.where(dead, streak[rows] + 1, 0)
            step = self.STEP if dead.mean() < DEAD_TARGETS[kind] else -self.STEP
            self.keep[kind] = float(np.clip(self.keep[kind] + step, *self.BOUNDS))


class Pools(_Baseline):
    """Weights .2, 1 and .2 for last success rates up to .25, up to .75 and above; 1 for a prompt not seen yet."""

    def __init__(self, run):
        super().__init__(run)
        self.weights = np.ones(self.size)

    def pick(self, n, generator):
        return generator.choice(self.size, n, replace=False, p=self.weights / self.weights.sum())

    def learn(self, rows, successes):
        rates = successes / self.run.group_size
        self.weights[rows] = np.where((rates > 0.25) & (rates <= 0.75), 1.0, 0.2)


SCHEDULES = {"beta mean": BetaMean, "mopps": MoPPS, "greso": GRESO, "pools": Pools}


class RefillingTrainer(GRPOTrainer):
    """
    DAPO's refill: as long as fewer groups than a batch holds have a gradient, another batch of fresh prompts is rolled
    out, at most `MOST` times in a step. `fresh(n)` returns n rows of the dataset. For one process, a batch a step, and
    no images, tools, KL term or vLLM.
    """

    MOST = 8
    fresh = None

    def _generate_and_score_completions(self, inputs):
        size, groups, dead = self.num_generations, [], []
        wanted = len(inputs) // size
        for _ in range(1 + self.MOST):
            for group in self._groups(super()._generate_and_score_completions(inputs)):
                (groups if group["advantages"].any() else dead).append(group)
            if len(groups) >= wanted:
                break
            inputs = [row for row in self.fresh(wanted) for _ in range(size)]
        return self._joined((groups + dead)[:wanted])

    def _groups(self, output):
        """The tensors of each group, with the rows of a group together."""
        parts = {name: value.split(self.num_generations) for name, value in output.items() if value.dim()}
        return [dict(zip(parts, group, strict=True)) for group in zip(*parts.values(), strict=True)]

    def _joined(self, groups):
        output = {}
        for name in groups[0]:
            tensors, filling = [group[name] for group in groups], 0
            if tensors[0].dim() == 2:
                width = max(tensor.shape[1] for tensor in tensors)
                filling = self._tokenizer.pad_token_id if name.endswith("_ids") else 0
                left = name.startswith("prompt")  # which TRL pads on the left, and completions on the right
                tensors = [
                    pad(tensor, (gap, 0) if left else (0, gap), value=filling)
                    for tensor in tensors
                    for gap in [width - tensor.shape[1]]
                ]
            output[name] = torch.cat(tensors)
        return output | {"num_items_in_batch": output["completion_mask"].sum()}
