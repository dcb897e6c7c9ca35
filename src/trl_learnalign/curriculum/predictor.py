"""Success of prompts, seen or not, predicted from features of the prompt and from the rewards of training so far."""

import numpy as np
import torch


RIDGE = 3.0  # precision of the Gaussian prior of a weight; features have standard deviation 1 at most
GROUP_WEIGHT = 3.0  # rollouts that a group counts for: those of one prompt are alike
HALF_LIFE = 50.0  # chunks after which an observation counts half, here and of a prompt itself, as the policy moves on
WINDOW = 4096  # observations that are kept
NEWTON_STEPS = 3  # from the weights of the chunk before
CONCENTRATIONS = 0.5, 50.0  # least and greatest


class SuccessPredictor:
    r"""
    The prior of the success rate p_i of prompt i: Beta(kappa q_i, kappa (1 - q_i)) with q_i = sigmoid(w . x_i).

    w is fitted by ridge-regularised logistic regression to the latest `WINDOW` observations, which fade with their
    age. kappa is found by the method of moments from how far observed success rates are from the q that was predicted
    for them before:

        rho = sum (y - q)^2 - q (1 - q) / n  /  sum q (1 - q) (1 - 1 / n),    kappa = 1 / rho - 1

    Graded rewards vary less within a group than successes do: with `noise` v in units of q (1 - q)

        rho = sum (y - q)^2 - v q (1 - q) / n  /  sum q (1 - q)

    Args:
        features (`np.ndarray` of shape `(N, D)`): x, float16 or float32, with a column of ones.
    """

    def __init__(self, features: np.ndarray):
        self.features = features
        self.weights = np.zeros(features.shape[1])
        self.concentration = 2.0
        self._rows = np.zeros(0, np.int32)
        self._chunks = np.zeros(0, np.int32)
        self._successes = np.zeros(0, np.float32)
        self._trials = np.zeros(0, np.float32)
        self._predicted = np.zeros(0, np.float32)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """q of these rows, of shape `(n,)`, float64."""
        return _sigmoid(self.features[rows].astype(np.float64) @ self.weights)

    def observe(
        self, chunk: int, rows: np.ndarray, successes: np.ndarray, trials: np.ndarray, noise: float | None = None
    ) -> None:
        """
        Learns that these rows had `successes` of `trials` in a chunk, all of shape `(n,)`; rows without a trial are
        left out. `noise`: of graded rewards the variance within groups, in units of q (1 - q).
        """
        known = trials > 0
        rows, successes, trials = rows[known], successes[known], trials[known]
        new = rows, np.full(len(rows), chunk), successes, trials, self.predict(rows)
        names = "_rows", "_chunks", "_successes", "_trials", "_predicted"
        for name, values in zip(names, new, strict=True):
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, values.astype(old.dtype)])[-WINDOW:])
        if len(self._rows):
            self._fit(chunk, noise)

    def _fit(self, now, noise=None):
        x = self.features[self._rows].astype(np.float64)
        age = 0.5 ** ((now - self._chunks) / HALF_LIFE)
        y = (self._successes / self._trials).astype(np.float64)
        counts = age * np.minimum(self._trials, GROUP_WEIGHT)
        precision = np.full(x.shape[1], RIDGE)
        for _ in range(NEWTON_STEPS):
            q = _sigmoid(x @ self.weights)
            gradient = x.T @ (counts * (y - q)) - precision * self.weights
            hessian = (x * (counts * q * (1 - q))[:, None]).T @ x + np.diag(precision)
            step = np.linalg.solve(hessian, gradient)
            self.weights = self.weights + step * min(1.0, 4.0 / max(np.abs(x @ step).max(), 1e-9))
        # The last digits may differ between processes, whose choices must not
        self.weights = np.round(self.weights, 9)
        self._fit_concentration(age, y, noise)

    def _fit_concentration(self, age, y, noise):
        q, n = self._predicted.astype(np.float64), self._trials.astype(np.float64)
        spread = q * (1 - q)
        within, most = (spread / n, spread * (1 - 1 / n)) if noise is None else (noise * spread / n, spread)
        rho = (age * ((y - q) ** 2 - within)).sum() / max((age * most).sum(), 1e-9)
        least, greatest = CONCENTRATIONS
        self.concentration = round(float(np.clip(1 / np.clip(rho, 1e-3, 1) - 1, least, greatest)), 9)

    def state_dict(self) -> dict:
        """Observations, weights and concentration."""
        return {
            "weights": self.weights,
            "concentration": self.concentration,
            "rows": self._rows,
            "chunks": self._chunks,
            "successes": self._successes,
            "trials": self._trials,
            "predicted": self._predicted,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned. Raises a `ValueError` if it is of other features."""
        if state["weights"].shape != self.weights.shape:
            raise ValueError(f"{len(state['weights'])} features, but there are {len(self.weights)} now")
        self.weights, self.concentration = state["weights"], float(state["concentration"])
        for name in ("rows", "chunks", "successes", "trials", "predicted"):
            setattr(self, f"_{name}", state[name])


def _sigmoid(logits):
    return 1 / (1 + np.exp(-np.clip(logits, -30, 30)))


def expected_learnability(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """E[p (1 - p)] for p ~ Beta(a, b)."""
    return a * b / ((a + b) * (a + b + 1))


def all_fail(a: np.ndarray, b: np.ndarray, trials: "np.ndarray | float") -> np.ndarray:
    """Probability that `trials` rollouts all fail, for p ~ Beta(a, b): B(a, b + n) / B(a, b)."""
    return np.exp(_log_gamma(b + trials) - _log_gamma(b) + _log_gamma(a + b) - _log_gamma(a + b + trials))


def _log_gamma(x):
    return torch.lgamma(torch.from_numpy(np.asarray(x, dtype=np.float64))).numpy()
