"""Kinds of prompts: where the rollouts went, and what became of the success of each kind."""

import numpy as np

from .batch import Batch


WINDOW = 16  # uniform draws of a kind that its success is the mean of, at first and now
HALF_LIFE = 200  # draws after which a group counts half in what is of late
EARLIER = 256, 768  # draws between which a group is from earlier
_WIDTH, _BINS = 64, 16  # draws of a bin, and bins that are kept: more than EARLIER
_PRIOR = 0.25  # squared deviation that is added to those of a mean: equal values are not certain
_FALL, _SURE = 0.1, 2.5  # of success that is lost: at least so much, and so many standard errors
_CLEAR = 3.0  # standard errors ...
_ALIGNED = 0.1  # ... that an alignment must be above this: groups that are compared with the same direction err alike
_MASTERED = 0.95  # success from which on there is nothing to rise to
_TWICE = 2.0  # times its share in the pool that a kind may take of the rollouts
_NOTICEABLE = 64  # groups of a kind that are noticeable
_MANY, _MANY_SHARE = 8, 0.01  # inconsistent rollouts of a kind that are too many
_TOTALS = ("groups", "rollouts", "live", "scored", "rates", "inconsistent")
_LATE = ("rollouts", "weights", "squared_weights", "rates", "squares")


class Kinds:
    """
    Counts, for each of K kinds of prompts, groups, live groups and success. Sums do not depend on the order in which
    groups come; success on uniform draws is of the latest that came. All values have the shape `(K,)`; NaN where
    nothing is known.

    Args:
        labels (`np.ndarray` of shape `(N,)`): the kind of each prompt, from 0; -1 for a prompt of no kind, whose
            groups are not counted.
        pool (`np.ndarray` of shape `(n,)`): rows that may be drawn.
        size (`int`, *optional*): N, to compare with.

    Attributes:
        labels (`np.ndarray` of shape `(N,)`): int16.
        sizes (`np.ndarray` of shape `(K,)`): prompts of the pool, int64.
        uniform (`np.ndarray` of shape `(K,)`): uniform draws with an outcome so far, int64.

    Raises:
        `ValueError`: the labels are no whole numbers, one for each prompt.
    """

    NAMES = ("totals", "late", "bins", "bin_of", "uniform", "first", "latest", "best", "alignments")

    def __init__(self, labels: np.ndarray, pool: np.ndarray, size: int | None = None):
        labels = np.asarray(labels)
        size = len(labels) if size is None else size
        fits = labels.shape == (size,) and labels.dtype.kind in "iu"
        if not fits or labels.min() < -1 or not 0 <= labels.max() < 2**15:
            raise ValueError(
                f"`kinds` have the shape {labels.shape} and the type {labels.dtype}, but must be a number from 0 to "
                f"32767 for each of {size} prompts, -1 for no kind. Number the kinds, or leave `kinds` out."
            )
        self.labels = labels.astype(np.int16)
        number = int(labels.max()) + 1
        self.sizes = np.bincount(self.labels[pool][self.labels[pool] >= 0], minlength=number)
        self.totals = np.zeros((number, len(_TOTALS)))
        self.newest = -1  # the last draw of which a group came
        self.late = np.zeros((number, len(_LATE)))
        self.bins = np.zeros((_BINS, number, 3))  # groups with an outcome, sums of their success and of its square
        self.bin_of = np.full(_BINS, -1, np.int64)
        self.uniform = np.zeros(number, np.int64)
        self.first = np.full((number, WINDOW), np.nan, np.float32)
        self.latest = np.full((number, WINDOW), np.nan, np.float32)
        self.best = np.full((number, 2), np.nan)  # the best mean of WINDOW uniform draws so far, its error
        self.alignments = np.zeros((number, 3))  # values, their sum, the sum of their squares

    def __len__(self) -> int:
        return len(self.sizes)

    # Learning ---------------------------------------------------------------------------------------------------

    def observe(self, batch: Batch) -> None:
        """Count groups."""
        known = self.labels[batch.drawn.rows] >= 0
        order = np.argsort(batch.drawn.numbers, kind="stable")
        batch = batch[order[known[order]]]
        if not len(batch.drawn):
            return
        kinds, numbers, scored = self.labels[batch.drawn.rows], batch.drawn.numbers, batch.scored
        rates = np.nan_to_num(batch.rates)
        counts = [np.ones(len(kinds)), batch.sizes, batch.live, scored, rates, batch.inconsistent]
        np.add.at(self.totals, kinds, np.stack(counts, axis=1))
        self._observe_late(kinds, numbers, batch.sizes, scored, rates)
        self._observe_bins(kinds[scored], numbers[scored] // _WIDTH, rates[scored])
        uniform = batch.drawn.uniform & scored
        for kind, rate in zip(kinds[uniform].tolist(), rates[uniform].tolist(), strict=True):
            self._observe_uniform(kind, rate)

    def _observe_late(self, kinds, numbers, sizes, scored, rates):
        newest = max(self.newest, int(numbers.max()))
        fade = 0.5 ** ((newest - self.newest) / HALF_LIFE)
        self.late *= [fade, fade, fade**2, fade, fade]
        weights = 0.5 ** ((newest - numbers) / HALF_LIFE)
        own = weights * scored
        np.add.at(self.late, kinds, np.stack([weights * sizes, own, own**2, own * rates, own * rates**2], axis=1))
        self.newest = newest

    def _observe_bins(self, kinds, bins, rates):
        for one in np.unique(bins).tolist():
            place, here = one % _BINS, bins == one
            if self.bin_of[place] < one:
                self.bin_of[place], self.bins[place] = one, 0.0
            if self.bin_of[place] == one:  # else it comes too late
                values = np.stack([np.ones(here.sum()), rates[here], rates[here] ** 2], axis=1)
                np.add.at(self.bins[place], kinds[here], values)

    def _observe_uniform(self, kind, rate):
        number = int(self.uniform[kind])
        self.uniform[kind] += 1
        if number < WINDOW:
            self.first[kind, number] = rate
        self.latest[kind, number % WINDOW] = rate
        if (number + 1) % WINDOW == 0:
            mean, error = _means(self.latest[[kind]], np.ones((1, WINDOW), bool))
            if not mean[0] <= self.best[kind, 0]:
                self.best[kind] = mean[0], error[0]

    def observe_alignment(self, rows: np.ndarray, values: np.ndarray) -> None:
        """
        Count alignments of groups.

        Args:
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
            values (`np.ndarray` of shape `(n,)`): their alignments; NaN is none.
        """
        kinds = self.labels[rows]
        known = np.isfinite(values) & (kinds >= 0)
        own = np.asarray(values, dtype=np.float64)[known]
        np.add.at(self.alignments, kinds[known], np.stack([np.ones(len(own)), own, own**2], axis=1))

    # What is known ----------------------------------------------------------------------------------------------

    def total(self, name: str) -> np.ndarray:
        """
        Return a sum over the groups so far: `groups`, `rollouts`, `live` groups, `scored` groups (those with an
        outcome), `rates` (their success), `inconsistent` rollouts, see [`Batch`].
        """
        return self.totals[:, _TOTALS.index(name)]

    @property
    def shares(self) -> np.ndarray:
        """Share of the prompts of the pool."""
        return self.sizes / max(self.sizes.sum(), 1)

    @property
    def late_shares(self) -> np.ndarray:
        """Share of the rollouts of late; each counts half after `HALF_LIFE` more draws."""
        rollouts = self.late[:, 0]
        return np.divide(rollouts, rollouts.sum(), out=np.full(len(self), np.nan), where=rollouts.sum() > 0)

    @property
    def windows(self) -> np.ndarray:
        """Uniform draws that success at first and now are each the mean of: never the same ones."""
        return np.minimum(self.uniform // 2, WINDOW)

    def success_first(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean success of the first uniform draws, and its standard error."""
        return _means(self.first, np.arange(WINDOW) < self.windows[:, None])

    def success_now(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean success of the latest uniform draws, and its standard error."""
        ages = (self.uniform[:, None] - 1 - np.arange(WINDOW)) % WINDOW
        return _means(self.latest, ages < self.windows[:, None])

    def success_late(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean success of all groups of late, and its standard error."""
        _, weights, squared, rates, squares = self.late.T
        return moments(weights, rates, squares, squared)

    def success_earlier(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean success of all groups of earlier, see `EARLIER`, and its standard error."""
        ages = self.newest - self.bin_of * _WIDTH
        earlier = (self.bin_of >= 0) & (ages >= EARLIER[0]) & (ages < EARLIER[1])
        return moments(*self.bins[earlier].sum(0).T)

    def alignment(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean alignment of the groups so far, and its standard error."""
        number, sums, squares = self.alignments.T
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = sums / number
            error = np.sqrt(np.maximum(squares / number - mean**2, 0) / (number - 1))
        return mean, np.where(number > 1, error, np.nan)

    def lost(self) -> np.ndarray:
        """
        Tell whether success on uniform draws fell clearly below its best, bool. The best of several means is too good
        by chance, which is taken into account.
        """
        now, error = self.success_now()
        best, error_of_best = self.best.T
        by_chance = error_of_best * np.sqrt(2 * np.log(np.maximum(self.uniform // WINDOW, 1)))
        least = np.maximum(_FALL, _SURE * np.hypot(error, error_of_best) + by_chance)
        return (self.uniform >= 2 * WINDOW) & (best - now > least)

    def stays(self) -> np.ndarray:
        """
        Tell whether success on uniform draws, of which enough are known, has not risen by more than its error, and
        not all succeed, bool.
        """
        (first, error), (now, error_now) = self.success_first(), self.success_now()
        enough = self.windows >= WINDOW // 2
        return enough & (now - first <= np.hypot(error, error_now)) & (now < _MASTERED)

    def is_noise(self) -> np.ndarray:
        """Tell whether success stays, and alignment, where it is known, is not clear, bool."""
        mean, error = self.alignment()
        known = self.alignments[:, 0] >= WINDOW
        return self.stays() & ~(known & (mean > _ALIGNED + _CLEAR * error))

    def greedy(self) -> np.ndarray:
        """
        Tell whether a kind takes twice its share in the pool of the rollouts of late, or half of what was left, and
        does not rise, bool.
        """
        most = np.minimum(_TWICE * self.shares, (1 + self.shares) / 2)
        groups = self.total("groups") >= _NOTICEABLE
        return groups & (self.late_shares >= most) & (self.shares < 1) & self.stays()

    @property
    def inconsistent_share(self) -> np.ndarray:
        """Share of the rollouts whose completion another one of its group has as well, with another outcome."""
        return self.total("inconsistent") / np.maximum(self.total("rollouts"), 1)

    def is_inconsistent(self) -> np.ndarray:
        """Tell whether enough rollouts are inconsistent that the grader must be flaky, bool."""
        return (self.total("inconsistent") >= _MANY) & (self.inconsistent_share >= _MANY_SHARE)

    # Keeping ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Return the sums; not the labels, of which only the number of each is kept."""
        return {name: getattr(self, name) for name in self.NAMES} | {"newest": self.newest, "sizes": self.sizes}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises a `ValueError` if it is of other kinds."""
        if not np.array_equal(state["sizes"], self.sizes):
            raise ValueError(f"kinds have {state['sizes'].tolist()} prompts, the dataset has {self.sizes.tolist()}")
        for name in self.NAMES:
            now = getattr(self, name)
            if state[name].shape != now.shape or state[name].dtype != now.dtype:
                raise ValueError(f"{name} has the shape {state[name].shape}")
            setattr(self, name, state[name].copy())
        self.newest = int(state["newest"])


def _means(values, known):
    """Return means of those values between 0 and 1 in each row that are `known`, and their standard errors."""
    own = np.where(known, values, 0.0).astype(np.float64)
    return moments(known.sum(1), own.sum(1), (own**2).sum(1))


def moments(weights, sums, squares, squared_weights=None):
    """Return means, and their standard errors, from sums with weights."""
    squared_weights = weights if squared_weights is None else squared_weights
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / weights
        variance = np.maximum(squares - weights * mean**2, 0) + _PRIOR
        return mean, np.sqrt(variance * squared_weights) / weights**1.5
