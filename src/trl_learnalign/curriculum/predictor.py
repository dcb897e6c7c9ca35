"""Success of prompts, seen or not, predicted from features of the prompt and from the rewards of training so far."""

import math

import numpy as np

from .prior import spread
from .settings import OnlineSettings


_NEWTON_STEPS = 8  # at most; from the weights before, three are usually enough
_CONVERGED = 1e-3  # greatest change of a logit; the steps converge quadratically
_COLUMNS = {"numbers": np.int64, "rows": np.int32, "clock": np.float64} | dict.fromkeys(
    ("successes", "trials", "predicted"), np.float32
)


class SuccessPredictor:
    r"""
    The prior of the success rate p_i of prompt i: Beta(kappa q_i, kappa (1 - q_i)) with q_i = sigmoid(w . x_i).

    w is fitted by ridge-regularised logistic regression to the latest `window` groups, which fade with their age. The
    ridge draws it to 0 or, where success rates are known beforehand, to the w that fits these. A policy may change far
    sooner than so many weights can be learnt anew. So with `quick_speed` there is a second fit, in which groups fade
    so many times as fast, and whose ridge, `quick_ridge`, draws it to the first: what changed of late, and no more.
    kappa is found by the method of moments from how far observed success rates are from the q that was predicted when
    the prompts were drawn:

        rho = sum (y - q)^2 - q (1 - q) / n  /  sum q (1 - q) (1 - 1 / n),    kappa = 1 / rho - 1

    Graded rewards vary less within a group than successes do: with `noise` v in units of q (1 - q)

        rho = sum (y - q)^2 - v q (1 - q) / n  /  sum q (1 - q)

    Groups are kept in the order of their draws, and fitted when a prediction is next asked for, so neither the order
    that they come in nor the number of calls changes what is learnt.

    Args:
        features (`np.ndarray` of shape `(N, D)`): x, float16 or float32, with a column of ones.
        settings ([`OnlineSettings`]): ridge, window, half-life.
        rates (`np.ndarray` of shape `(N,)`, *optional*): success rates that are known beforehand, NaN where not.
    """

    def __init__(self, features: np.ndarray, settings: OnlineSettings, rates: np.ndarray | None = None):
        self.features, self.settings = features, settings
        self._centre = np.zeros(features.shape[1])  # of the Gaussian prior of the weights
        if rates is not None:
            rows = spread(np.flatnonzero(np.isfinite(rates)), settings.window)
            counts = np.full(len(rows), settings.group_weight)
            x, y = features[rows].astype(np.float64), rates[rows].astype(np.float64)
            self._centre = self._fitted(x, y, counts, self._centre, self._centre, settings.ridge)
        self.slow_weights, self.weights = self._centre.copy(), self._centre.copy()
        self.noise: float | None = None
        self._concentration = 2.0
        self._stale = False
        self._groups = {name: np.zeros(0, kind) for name, kind in _COLUMNS.items()}

    def predict(self, rows: np.ndarray, slow: bool = False) -> np.ndarray:
        """Return q of these rows, by the slow fit alone or not, of shape `(n,)`, float64."""
        self._refresh()
        return _sigmoid(self.features[rows].astype(np.float64) @ (self.slow_weights if slow else self.weights))

    @property
    def concentration(self) -> float:
        """The strength kappa of the prior, in rollouts."""
        self._refresh()
        return self._concentration

    def observe(
        self,
        numbers: np.ndarray,
        rows: np.ndarray,
        clock: np.ndarray,
        successes: np.ndarray,
        trials: np.ndarray,
        predicted: np.ndarray,
    ) -> None:
        """
        Learn that these rows had `successes` of `trials`. Rows without a trial are left out. All arguments have the
        shape `(n,)`.

        Args:
            numbers (`np.ndarray`): of the draws.
            rows (`np.ndarray`): of the dataset.
            clock (`np.ndarray`): half-lives of the policy until each draw.
            successes, trials (`np.ndarray`): of the rollouts.
            predicted (`np.ndarray`): q when the prompt was drawn; NaN before anything had been observed, when it was
                no prediction.
        """
        known = trials > 0
        if not known.any():
            return
        new = dict(zip(_COLUMNS, (numbers, rows, clock, successes, trials, predicted), strict=True))
        joined = {
            name: np.concatenate([self._groups[name], values[known].astype(_COLUMNS[name])])
            for name, values in new.items()
        }
        latest = np.argsort(joined["numbers"], kind="stable")[-self.settings.window :]
        self._groups = {name: values[latest] for name, values in joined.items()}
        self._stale = True

    def _refresh(self):
        if self._stale:
            self._stale = False
            self._fit()

    def _fit(self):
        groups, settings = self._groups, self.settings
        x = self.features[groups["rows"]].astype(np.float64)
        age = 0.5 ** (groups["clock"].max() - groups["clock"])
        y = (groups["successes"] / groups["trials"]).astype(np.float64)
        counts = np.minimum(groups["trials"], settings.group_weight)
        self.slow_weights = self._fitted(x, y, age * counts, self.slow_weights, self._centre, settings.ridge)
        self.weights = self.slow_weights
        if settings.quick_speed:
            quick = age**settings.quick_speed * counts
            self.weights = self._fitted(x, y, quick, self.slow_weights, self.slow_weights, settings.quick_ridge)
        self._fit_concentration(age, y)

    def _fitted(self, x, y, counts, weights, centre, ridge):
        """Return the weights that fit y, from `weights` on, with a ridge that draws them to `centre`."""
        for _ in range(_NEWTON_STEPS):
            q = _sigmoid(x @ weights)
            gradient = x.T @ (counts * (y - q)) - ridge * (weights - centre)
            hessian = (x * (counts * q * (1 - q))[:, None]).T @ x + ridge * np.eye(x.shape[1])
            step = np.linalg.solve(hessian, gradient)
            change = float(np.abs(x @ step).max())
            weights = weights + step * min(1.0, 4.0 / max(change, 1e-9))
            if change < _CONVERGED:
                break
        return np.round(weights, 9)  # the last digits may differ between processes, whose choices must not

    def _fit_concentration(self, age, y):
        groups, settings = self._groups, self.settings
        known = np.isfinite(groups["predicted"])
        if not known.any():
            return
        age, y = age[known], y[known]
        q, n = groups["predicted"][known].astype(np.float64), groups["trials"][known].astype(np.float64)
        spread = q * (1 - q)
        within, most = (spread / n, spread * (1 - 1 / n)) if self.noise is None else (self.noise * spread / n, spread)
        rho = (age * ((y - q) ** 2 - within)).sum() / max((age * most).sum(), 1e-9)
        kappa = np.clip(1 / np.clip(rho, 1e-3, 1) - 1, settings.least_concentration, settings.greatest_concentration)
        self._concentration = round(float(kappa), 9)

    def state_dict(self) -> dict:
        """Return groups, weights and concentration."""
        return {
            "weights": self.weights,
            "slow_weights": self.slow_weights,
            "concentration": self._concentration,
            "stale": self._stale,
            "noise": self.noise,
            **self._groups,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises a `ValueError` if it is of other features."""
        for name in ("weights", "slow_weights"):
            if state[name].shape != self.weights.shape:
                raise ValueError(f"{len(state[name])} features, but there are {len(self.weights)} now")
        self._groups = {name: state[name].astype(kind) for name, kind in _COLUMNS.items()}
        self.weights, self.slow_weights = state["weights"].copy(), state["slow_weights"].copy()
        self._concentration = float(state["concentration"])
        self._stale, self.noise = bool(state["stale"]), state["noise"]


def _sigmoid(logits):
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def expected_learnability(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return E[p (1 - p)] for p ~ Beta(a, b)."""
    return a * b / ((a + b) * (a + b + 1))


def expected_deviation(a: np.ndarray, b: np.ndarray, group_size: int) -> np.ndarray:
    """Return E[sqrt(k / G (1 - k / G))] for k successes of G rollouts, p ~ Beta(a, b): 0 where a group is dead."""
    steps = np.arange(group_size)
    chance = np.prod([(b + i) / (a + b + i) for i in steps], axis=0)  # that all fail
    expected = np.zeros(np.shape(a))
    for k in range(1, group_size):
        chance = chance * (group_size - k + 1) / k * (a + k - 1) / (b + group_size - k)
        expected = expected + chance * math.sqrt(k * (group_size - k)) / group_size
    return expected


def all_fail(a: np.ndarray, b: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Return the probability that `trials` rollouts all fail, for p ~ Beta(a, b): B(a, b + n) / B(a, b)."""
    return np.exp(_log_gamma(b + trials) - _log_gamma(b) + _log_gamma(a + b) - _log_gamma(a + b + trials))


def _log_gamma(x):
    return np.array([math.lgamma(value) for value in np.asarray(x, dtype=np.float64).ravel()]).reshape(np.shape(x))


def checked_features(features: np.ndarray) -> np.ndarray:
    """
    Return features of prompts.

    Raises:
        `ValueError`: they are no row of finite numbers for each prompt.
    """
    features = np.asarray(features)
    if features.ndim != 2 or not len(features):
        raise ValueError(
            f"`features` have the shape {features.shape}, but a row of numbers for each prompt is needed. Pass "
            "`np.ones((number_of_prompts, 1))` if nothing is known of the prompts."
        )
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
        raise ValueError(f"`features` of row {row} are not finite. Replace NaN by 0, the mean of a column.")
    return features
