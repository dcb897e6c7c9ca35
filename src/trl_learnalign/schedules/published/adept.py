"""ADEPT (arXiv 2501.12620): a bandit over the number of passes that training makes over each generated batch."""

import numpy as np

from .base import Published


class ADEPT(Published):
    """
    Takes prompts in random order, and for each chunk of them chooses how often training passes over its rollouts
    (TRL's `num_iterations`), one of `passes`: each once, then that with the greatest upper confidence bound, the mean
    of its last `window` returns plus `exploration` sqrt(ln N / n), N chunks in all and n of this number of passes,
    both counted from 1. A return is the share of successes in the next chunk, whose rollouts are the first of the
    policy that the passes made. (The authors' code takes the return of the chunk itself, begins all means at 0, and
    has 5 for `exploration` on Procgen, whose returns go to 10 and more.)

    TRL reads a chunk's rows once for each pass, so a chunk with three passes is drawn three times, and generated for
    once. A run has as many optimizer steps as with one pass, and trains on fewer prompts.

    Raises:
        `ValueError`: `num_iterations` is set, or an optimizer step would mix chunks.
    """

    passes, exploration, window = (3, 2, 1), 0.5, 10
    under_way = (0, 0)  # what `passes_of` returned last

    def fit(self, host):
        layout, per_chunk = super().fit(host), host.args.steps_per_generation
        if host.args.num_iterations != 1:
            raise ValueError(
                f"`num_iterations` is {host.args.num_iterations}, but `schedule={self.run.config.schedule!r}` chooses "
                "it for each batch. Leave it at 1."
            )
        if per_chunk % layout.accumulation:
            raise ValueError(
                f"`steps_per_generation` ({per_chunk}) is no multiple of `gradient_accumulation_steps` "
                f"({layout.accumulation}), so an optimizer step would mix passes over several generated batches, "
                f"whose number `schedule={self.run.config.schedule!r}` chooses. Leave `steps_per_generation` out."
            )
        self.batches = layout.repeats  # of a pass over a chunk
        return layout

    def prepare(self, host, state, peers):
        host.choose_passes(self.passes_of)

    def load_state_dict(self, state):
        self.arrays["runs"] = np.zeros((len(state["array_runs"]), 2), np.int64)  # as many as were in flight
        super().load_state_dict(state)

    def begin(self, size):
        arms = len(self.passes)
        self.arrays = {
            "position": np.zeros(2, np.int64),  # in the endless random order; passes left of the chunk drawn last
            "chosen": np.zeros(arms, np.int64),  # how often each was
            "returns": np.full((arms, self.window), np.nan),  # the newest last
            # First chunk and arm of those in flight, of the one that is trained on, and of the one before it
            "runs": np.array([[0, -1]], np.int64),
        }

    def pick(self, n, random):
        position, left = self.arrays["position"].tolist()
        if not left:
            arm = int(np.argmax(self.values(random)))
            self.arrays["chosen"][arm] += 1
            self.arrays["runs"] = np.concatenate([self.arrays["runs"], [[self.drawn // n, arm]]])
            position, left = position + n, self.passes[arm]
        self.arrays["position"][:] = position, left - 1
        return [self.order[place] for place in range(position - n, position)]

    def values(self, random: np.random.Generator) -> np.ndarray:
        """Return the number that each of `passes` is chosen by."""
        number, returns = self.arrays["chosen"] + 1, self.arrays["returns"]
        mean = np.nansum(returns, axis=1) / np.maximum((~np.isnan(returns)).sum(1), 1)
        bounds = mean + self.exploration * np.sqrt(np.log(self.arrays["chosen"].sum() + 1) / number)
        return np.where(number > 1, bounds, np.inf)

    def passes_of(self, batch: int) -> tuple[int, int]:
        """Return the passes over the chunk of a batch that is trained on now, and the batches of it before this."""
        chunk, runs = batch // self.batches, self.arrays["runs"]
        place = int(np.flatnonzero((runs[:, 0] <= chunk) & (runs[:, 1] >= 0))[-1])
        self.arrays["runs"] = runs[max(place - 1, 0) :]
        first, arm = runs[place].tolist()
        self.under_way = self.passes[arm], batch - first * self.batches
        return self.under_way

    def learn(self, places, successes, advantages):
        arm, again = int(self.arrays["runs"][0, 1]), self.under_way[1] > 0  # of the chunk before; cut by a checkpoint
        if arm >= 0 and not again and not np.isnan(successes).all():
            self.reward(arm, float(np.nanmean(successes)))

    def metrics(self):
        return super().metrics() | {"passes": self.under_way[0]}

    def reward(self, arm: int, value: float) -> None:
        """Learn a return of an arm."""
        last = self.arrays["returns"][arm]
        last[:] = [*last[1:], value]


class ADEPTThompson(ADEPT):
    """
    Chooses by Gaussian Thompson sampling: a draw for each number of passes from a normal distribution that begins with
    mean 0 and deviation 1, and takes in, for each return of these passes, the mean of the last `window` returns of
    all.
    """

    def begin(self, size):
        super().begin(size)
        arms = len(self.passes)
        self.arrays |= {
            "returns": np.full((1, self.window), np.nan),
            "number": np.zeros(arms, np.int64),
            "mean": np.zeros(arms),
            "deviation": np.ones(arms),
        }

    def values(self, random):
        return random.normal(self.arrays["mean"], np.maximum(self.arrays["deviation"], 1e-6))

    def reward(self, arm, value):
        super().reward(0, value)
        found = float(np.nanmean(self.arrays["returns"]))
        number, mean, deviation = (self.arrays[name] for name in ("number", "mean", "deviation"))
        number[arm] += 1
        before, mean[arm] = mean[arm], mean[arm] + (found - mean[arm]) / number[arm]
        if number[arm] > 1:
            squares = deviation[arm] ** 2 * (number[arm] - 1) + (found - before) * (found - mean[arm])
            deviation[arm] = np.sqrt(squares / number[arm])
