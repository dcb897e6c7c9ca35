"""Predicts how well prompts' gradients agree with those of all others, from those that training takes anyway."""

import math
from collections.abc import Sequence

import numpy as np

from .events import Gradient
from .flight import Flight
from .settings import OnlineSettings


_COLUMNS = {"numbers": np.int64, "rows": np.int32, "clock": np.float64} | dict.fromkeys(
    ("expected", "values", "products", "squares", "times"), np.float32
)
_LEAST_AGE = 1e-4  # a weight below would make the equations singular


class Alignment:
    r"""
    Predicts the alignment of each prompt's gradient with what the pool has in common.

    Let u_j be the gradient of group j, scaled to length 1, and w_j its weight, which fades; the w_j sum to 1. The
    direction is the one that all gradients agree on best, the ridge regression of 1 on the gradients:

        theta = (S + lambda / dim)^-1 m,    m = sum w_j u_j,    S = sum w_j u_j u_j'

    This is m, whitened: where gradients point both ways, as for questions that can only be guessed, S is great and
    theta is small. The alignment of group i is <u_i, theta> *without the groups of its own prompt* in theta, divided
    by the root mean square of all: 0 for a gradient that has nothing in common with others. Of a target, m is the sum
    over the groups of the target's prompts alone, chosen or not; alignments are unknown as long as there is none.

    One observation says little, since gradients are noisy, so what is used is shared over prompts. How much there is
    to agree on changes, and ends when it is learnt; which prompts agree changes little. So the alignment of group i
    is taken as mu f(x_i). mu is the mean of the pool (or of the target) at that time. f is the *relative* alignment
    of the prompt, whose mean is 1: a ridge regression on features of the prompt, in which a time when gradients had
    little in common counts little ([`~Alignment.relative`]). Whether it can be trusted is measured: f as it was before
    a group was drawn is compared with what was then observed ([`~Alignment.skill`]).

    theta is never formed. With K = <u_i, u_j>, all alignments are H c, H = K (w K + lambda / dim)^-1, c = w.

    Args:
        features (`np.ndarray` of shape `(N, D)`): see [`SuccessPredictor`].
        labels (`np.ndarray` of shape `(N,)`): the kind of each prompt, -1 for none. The groups of a kind count as much
            as its prompts would if drawn uniformly, so that what was chosen does not choose itself.
        pool (`np.ndarray` of shape `(n,)`): rows that may be drawn.
        settings ([`OnlineSettings`]): window, ridge, half-life.
        target (`np.ndarray` of shape `(N,)`, *optional*): rows that are the target, bool.

    Attributes:
        waiting ([`Flight`]): live groups whose gradient has not come yet, in the order of their draws.
        common (`float`): mean alignment of the pool, or of the target, as it is now, at least 0.
        trusted (`bool`): whether predictions have skill, so that they are used.
    """

    def __init__(
        self,
        features: np.ndarray,
        labels: np.ndarray,
        pool: np.ndarray,
        settings: OnlineSettings,
        target: np.ndarray | None = None,
    ):
        self.features, self.settings, self.target = features, settings, target
        number = int(labels.max(initial=0)) + 1
        self.labels = np.where(labels < 0, number, labels.astype(np.int32))  # those of no kind are one
        self.shares = np.bincount(self.labels[pool], minlength=number + 1) / len(pool)
        self.waiting = Flight.empty()
        self.weights, self.common = np.zeros(features.shape[1]), 0.0
        self.trusted = False
        self._groups = {name: np.zeros(0, kind) for name, kind in _COLUMNS.items()}
        self._sketches = np.zeros((0, 0), np.float16)  # of the latest groups, scaled to length 1
        self._products = np.zeros((0, 0))  # of these with each other, as they are needed for every fit
        self._most_sketches = min(settings.gradient_window, settings.window)
        # Faded sums, of alignments a and of (x, y), what was expected less the mean and a less the mean:
        self._sums = np.zeros(8)  # n, x, y, xx, yy, xy, a, aa
        self._late = np.zeros(3)  # n, a and expected a, of the latest
        self._fresh = 0  # groups since the last fit

    # Learning ---------------------------------------------------------------------------------------------------

    def wait_for(self, drawn: Flight) -> None:
        """Note live groups whose gradient is to come; the oldest are given up when there are too many."""
        both = self.waiting + drawn
        self.waiting = both[np.argsort(both.numbers, kind="stable")[-self.settings.window :]]

    def observe(self, gradients: Sequence[Gradient]) -> tuple[np.ndarray, np.ndarray]:
        """
        Learn gradients of groups that are waited for, in any order; one of length 0 says nothing. Any other gradient
        changes nothing.

        Returns:
            rows and alignments, `(n,)` each, of the groups whose alignment is known since this call.

        Raises:
            `ValueError`: a gradient names another row than its draw; or sketches have different lengths, or numbers
                that are not finite. Nothing was learnt then.
        """
        places = {number: place for place, number in enumerate(self.waiting.numbers.tolist())}
        new = {one.number: one for one in gradients if one.number in places}
        nothing = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if not new:
            return nothing
        drawn = self.waiting[np.array([places[number] for number in new])]
        sketches = self._checked(list(new.values()), drawn.rows.tolist())
        self.waiting = self.waiting[~np.isin(self.waiting.numbers, drawn.numbers)]
        greatest = np.abs(sketches).max(axis=1, initial=0)
        some = greatest > 0
        if not some.any():
            return nothing
        units = sketches[some] / greatest[some, None]  # whose squares neither overflow nor vanish
        units = (units / np.linalg.norm(units, axis=1)[:, None]).astype(np.float16)
        drawn = drawn[some]
        columns = (
            drawn.numbers,
            drawn.rows,
            drawn.clock,
            drawn.relative,
            np.full(len(drawn), np.nan),
            *np.zeros((3, len(drawn))),
        )
        joined = {
            name: np.concatenate([self._groups[name], values.astype(_COLUMNS[name])])
            for name, values in zip(_COLUMNS, columns, strict=True)
        }
        # The latest groups are the last rows of both. A gradient that comes too late for a sketch has no value, ever
        order = np.argsort(joined["numbers"], kind="stable")
        before = len(self._groups["numbers"]) - len(self._sketches)
        held = np.concatenate([self._sketches.reshape(-1, units.shape[1]), units])
        with_sketch = order[order >= before] - before
        kept = with_sketch[-self._most_sketches :]
        self._products = self._products_with(held, len(units))[np.ix_(kept, kept)]
        self._sketches = held[kept]
        latest = order[-self.settings.window :]
        self._groups = {name: values[latest] for name, values in joined.items()}
        self._fresh += int(some.sum())
        if self._fresh < self.settings.gradient_groups:
            return nothing
        return self._fit()

    def _products_with(self, held, number) -> np.ndarray:
        """Return the products of sketches, of which the last `number` are new."""
        new = products(held[-number:], held)
        found = np.empty((len(held), len(held)))
        found[:-number, :-number] = self._products
        found[-number:], found[:, -number:] = new, new.T
        return found

    def _checked(self, gradients, rows) -> np.ndarray:
        """Return the sketches."""
        dim = self._sketches.shape[1] or np.size(gradients[0].sketch)
        sketches = [np.asarray(one.sketch, dtype=np.float32) for one in gradients]
        for one, row, sketch in zip(gradients, rows, sketches, strict=True):
            if one.row != row:
                raise ValueError(
                    f"The gradient of group {one.number} has row {one.row}, but that draw asked for row {row}, so it "
                    "would count for the wrong prompt. Keep the number and the row of a draw together."
                )
            if sketch.shape != (dim,) or not np.isfinite(sketch).all():
                raise ValueError(
                    f"The sketch of group {one.number} has the shape {sketch.shape}, or is not finite, where {dim} "
                    "finite numbers are needed. Leave a group out whose gradient overflowed."
                )
        return np.stack(sketches)

    def _fit(self):
        count = len(self._sketches)
        window = {name: values[-count:] for name, values in self._groups.items()}
        age = self._age(window["clock"])
        weights = self._weights(window["rows"], age)
        shares = weights if self.target is None else weights * self.target[window["rows"]]
        if not shares.any():  # no group of the target has a gradient, so there is nothing to align with
            self.trusted = False
            return np.zeros(0, np.int32), np.zeros(0, np.float32)
        ridge = self.settings.whitening / self._sketches.shape[1]
        found = leave_one_out(self._products, weights, shares, window["rows"], ridge)
        scale = math.sqrt((weights * found**2).sum())
        self._fresh = 0
        if not scale > 1e-9:  # as long as all groups are of one prompt, or none is of the target
            return window["rows"][:0], np.zeros(0, np.float32)
        values = found / scale
        new = np.isnan(window["values"])
        self.common = round(max(float(shares @ values / shares.sum()), 0.0), 9)
        self._compare(window["expected"][new], values[new])
        self._remember(count, values)
        self._regress()
        return window["rows"][new], values[new].astype(np.float32)

    def _remember(self, count, values):
        """Let the sums of each group be means over all fits that it was in."""
        for name, now in (
            ("values", values),
            ("products", self.common * values),
            ("squares", np.full(count, self.common**2)),
        ):
            before, times = self._groups[name][-count:], self._groups["times"][-count:]
            self._groups[name][-count:] = np.where(times > 0, before + (now - before) / (times + 1), now)
        self._groups["times"][-count:] += 1

    def _age(self, clock, speed=1.0):
        return np.maximum(0.5 ** (speed * (clock.max() - clock)), _LEAST_AGE)

    def _weights(self, rows, age):
        """Weigh groups by age, and each kind as its share of the pool."""
        kinds = self.labels[rows]
        most = self.settings.most_kind_weight
        drawn = np.bincount(kinds, age, len(self.shares)) / age.sum()
        factor = np.divide(self.shares, drawn, out=np.ones(len(drawn)), where=drawn > 0)
        weights = age * np.clip(factor, 1 / most, most)[kinds]
        return weights / weights.sum()

    def _compare(self, relative, observed):
        """Compare what prompts were expected to differ by from the mean of now, which falls as the pool is learnt."""
        known, mu = np.isfinite(relative), self.common
        for f, a in zip(relative[known].tolist(), observed[known].tolist(), strict=True):
            x, y = mu * (f - 1), a - mu
            self._sums = self._sums * self.settings.skill_memory + [1, x, y, x * x, y * y, x * y, a, a * a]
            self._late = self._late * self.settings.judge_memory + [1, a, mu * f]
        settings, (n, *_, total, squares) = self.settings, self._sums
        if n >= settings.tried_gradients:
            skill, common = self.skill * math.sqrt(n), total / math.sqrt(squares) if squares else 0.0
            enough = min(skill, common) > settings.begin_trust
            self.trusted = bool(enough or (self.trusted and skill > settings.least_trust))

    @property
    def skill(self) -> float:
        """
        Correlation between what alignments were expected to differ by from their mean, as predicted before the draw,
        and what they did, over some 1,500 live groups; 0 before there are two.
        """
        n, x, y, xx, yy, xy, *_ = self._sums
        spread = (n * xx - x * x) * (n * yy - y * y)
        return float((n * xy - x * y) / math.sqrt(spread)) if spread > 1e-12 else 0.0

    @property
    def observed(self) -> float:
        """Mean alignment of some 200 live groups of late, in units of the spread of one; NaN before any."""
        return float(self._late[1] / self._late[0]) if self._late[0] else math.nan

    def _regress(self):
        """Fit the relative alignments: of sum w (a_i - mu f(x_i))^2, where mu was the mean when a_i was taken."""
        settings, known = self.settings, self._groups["times"] > 0
        groups = {name: values[known] for name, values in self._groups.items()}
        x = self.features[groups["rows"]].astype(np.float64)
        # Which prompts agree changes more slowly than in what they do
        age = self._age(groups["clock"], 1 / settings.slower_alignment)
        products, squares = groups["products"].astype(np.float64), groups["squares"].astype(np.float64)
        strength = max((age @ squares) / age.sum(), settings.least_common**2)
        precision = settings.alignment_ridge * strength * np.eye(x.shape[1])
        inner = (x * (age * squares)[:, None]).T @ x
        # The last digits may differ between processes, whose choices must not
        self.weights = np.round(np.linalg.solve(inner + precision, x.T @ (age * (products - squares))), 9)

    # What is known ----------------------------------------------------------------------------------------------

    def relative(self, rows: np.ndarray) -> np.ndarray:
        """Return the expected alignments of these rows over the mean, of shape `(n,)`; 1 before anything is learnt."""
        return 1 + self.features[rows].astype(np.float64) @ self.weights

    def expect(self, rows: np.ndarray) -> np.ndarray:
        """Return the relative alignments of these rows, of shape `(n,)`; NaN before anything was observed."""
        return self.relative(rows) if self.learnt else np.full(len(rows), np.nan)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Return the expected alignments of these rows, of shape `(n,)`; NaN before anything was observed."""
        return self.common * self.expect(rows)

    @property
    def learnt(self) -> bool:
        """True once an alignment was observed."""
        return bool((self._groups["times"] > 0).any())

    def factor(self, rows: np.ndarray) -> np.ndarray:
        """
        Return what the utilities of these rows are multiplied by, of shape `(n,)`: the relative alignment, within
        bounds; 1 as long as predictions have no skill.

        Args:
            rows (`np.ndarray` of shape `(n,)`): of the dataset.
        """
        if not self.trusted:
            return np.ones(len(rows))
        return np.clip(self.relative(rows), self.settings.least_factor, self.settings.most_factor)

    def latest(self) -> tuple[np.ndarray, np.ndarray]:
        """Return rows and alignments of the groups that have one, of shape `(n,)` each, in the order of the draws."""
        known = self._groups["times"] > 0
        return self._groups["rows"][known], self._groups["values"][known]

    def metrics(self) -> dict[str, float]:
        """Return values for a log."""
        expected = float(self._late[2] / self._late[0]) if self._late[0] else math.nan
        return {
            "alignment_observed": self.observed,
            "alignment_predicted": expected,
            "alignment_skill": self.skill if self._sums[0] else math.nan,
            "alignment_trusted": float(self.trusted),
        }

    def state_dict(self) -> dict:
        """Return groups, sketches, weights and sums: 4 KB a group of the window with sketches of 2,048 numbers."""
        return {
            **self._groups,
            "sketches": self._sketches,
            "waiting": self.waiting.state_dict(),
            "weights": self.weights,
            "common": self.common,
            "trusted": self.trusted,
            "sums": self._sums,
            "late": self._late,
            "fresh": self._fresh,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises a `ValueError` if it is damaged, or of other features."""
        if state["weights"].shape != self.weights.shape or state["sums"].shape != self._sums.shape:
            raise ValueError(f"{len(state['weights'])} features, but there are {len(self.weights)} now")
        groups = {name: state[name].astype(kind) for name, kind in _COLUMNS.items()}
        number, sketches = len(groups["numbers"]), state["sketches"].astype(np.float16)
        if {values.shape for values in groups.values()} != {(number,)} or number > self.settings.window:
            raise ValueError(f"groups with an alignment have the shapes {[v.shape for v in groups.values()]}")
        if sketches.ndim != 2 or len(sketches) != min(number, self._most_sketches) or not np.isfinite(sketches).all():
            raise ValueError(f"sketches of {number} groups have the shape {sketches.shape}, or are not finite")
        waiting, rows = Flight.from_state(state["waiting"]), groups["rows"]
        if (np.diff(groups["numbers"]) <= 0).any() or (np.diff(waiting.numbers) <= 0).any():
            raise ValueError("groups with an alignment are not in the order of their draws")
        if ((rows < 0) | (rows >= len(self.features))).any():
            raise ValueError(f"groups with an alignment are of rows up to {rows.max()}")
        self._groups, self._sketches, self.waiting = groups, sketches, waiting
        self._products = products(sketches, sketches)
        self.weights, self.common = state["weights"].copy(), float(state["common"])
        self.trusted, self._sums, self._fresh = bool(state["trusted"]), state["sums"].copy(), int(state["fresh"])
        self._late = state["late"].copy()


def products(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """
    Return the products of all pairs of rows of two matrices of float16. Products and sums of such numbers up to 1 are
    exact, whatever their order, and the same on every machine.
    """
    return first.astype(np.float64) @ second.astype(np.float64).T


def leave_one_out(
    inner: np.ndarray, weights: np.ndarray, shares: np.ndarray, rows: np.ndarray, ridge: float
) -> np.ndarray:
    r"""
    Return <u_i, (S + ridge)^-1 m> for every i, of shape `(n,)`, with the groups of the row of i left out of S and m.

    Leaving a block B out is Woodbury's identity: with a = H c, H = U (S + ridge)^-1 U',

        a_B without B = (I - H_BB W_B)^-1 (a_B - H_BB c_B)

    Args:
        inner (`np.ndarray` of shape `(n, n)`): products of the gradients, of length 1 each, with each other.
        weights (`np.ndarray` of shape `(n,)`): w, above 0, with sum 1.
        shares (`np.ndarray` of shape `(n,)`): c, the weights in m.
        rows (`np.ndarray` of shape `(n,)`): of the dataset.
        ridge (`float`): lambda / dim.
    """
    scale = np.sqrt(weights)
    scaled, one = scale[:, None] * inner * scale, np.eye(len(inner))
    rest = ridge * np.linalg.inv(scaled + ridge * one)
    hat = (one - rest) / scale[:, None] / scale
    own = np.diag(hat)
    full = hat @ shares
    found = (full - own * shares) / (1 - own * weights)
    unique, counts = np.unique(rows, return_counts=True)
    for row in unique[counts > 1]:
        block = np.flatnonzero(rows == row)
        part = hat[np.ix_(block, block)]
        left = np.eye(len(block)) - part * weights[block]
        found[block] = np.linalg.solve(left, full[block] - part @ shares[block])
    return found
