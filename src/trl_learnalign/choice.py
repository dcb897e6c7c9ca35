"""Which of the ranked prompts are chosen: conditions, quotas, the best ones or a random draw."""

import ast
import operator
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch


QUOTAS = ("proportional", "equal")
TAKES = ("top", "proportional")

_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class Condition:
    """
    A condition on the columns of a table, such as `completion_length_mean < 800 and source != 'forum'`: comparisons of
    columns with numbers, texts, `True`, `False` or other columns; `in` and `not in` lists of them; `and`, `or`, `not`,
    parentheses. It is parsed and never run as code. A comparison with a missing value is false.

    Args:
        text (`str`): the condition.

    Raises:
        `ValueError`: it is not of that form.
    """

    def __init__(self, text: str):
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
            self._check(self._tree)
        except (SyntaxError, ValueError) as error:
            reason = error.args[0] if error.args else error
            raise ValueError(
                f"`where` is {text!r}, which cannot be read ({reason}). Compare columns with numbers or texts, and "
                "join comparisons by and, or, not: `completion_length_mean < 800 and source != 'forum'`."
            ) from error

    @property
    def columns(self) -> set[str]:
        """The columns that it looks at."""
        return {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}

    def __call__(self, table: pd.DataFrame) -> pd.Series:
        """For each row of a table whether the condition holds."""
        return self._holds(self._tree, table)

    def _check(self, node):
        match node:
            case ast.BoolOp():
                for value in node.values:
                    self._check(value)
            case ast.UnaryOp(op=ast.Not()):
                self._check(node.operand)
            case ast.Compare():
                for left, kind, right in self._pairs(node):
                    if isinstance(kind, ast.In | ast.NotIn):
                        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
                            raise ValueError("`in` needs a list such as ['a', 'b']")
                        for item in right.elts:
                            self._literal(item)
                    elif type(kind) in _COMPARISONS:
                        self._operand(right)
                    else:
                        raise ValueError(f"{ast.unparse(node)} uses a comparison that is not supported")
                    self._operand(left)
            case _:
                raise ValueError(f"{ast.unparse(node)} is not a comparison")

    @staticmethod
    def _pairs(node):
        return zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)

    def _operand(self, node):
        if not isinstance(node, ast.Name):
            self._literal(node)

    @staticmethod
    def _literal(node):
        value = ast.literal_eval(node)
        if not isinstance(value, str | int | float):
            raise ValueError(f"{ast.unparse(node)} is neither a number nor a text")
        return value

    def _value(self, node, table):
        return table[node.id] if isinstance(node, ast.Name) else self._literal(node)

    def _holds(self, node, table):
        match node:
            case ast.BoolOp():
                parts = [self._holds(value, table) for value in node.values]
                join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
                return join.reduce(parts)
            case ast.UnaryOp():
                return ~self._holds(node.operand, table)
        holds = np.ones(len(table), dtype=bool)
        for left, kind, right in self._pairs(node):
            holds &= self._compare(left, kind, right, table)
        return holds

    def _compare(self, left, kind, right, table):
        value = self._value(left, table)
        known = self._known(left, table) & self._known(right, table)
        if isinstance(kind, ast.In | ast.NotIn):
            inside = pd.Series(value, index=table.index).isin([self._literal(item) for item in right.elts]).to_numpy()
            return known & (inside if isinstance(kind, ast.In) else ~inside)
        try:
            result = _COMPARISONS[type(kind)](value, self._value(right, table))
        except TypeError as error:
            raise ValueError(
                f"`where` is {self.text!r}, but its sides cannot be compared ({error}). Compare numbers with numbers "
                "and texts with texts."
            ) from error
        return known & np.broadcast_to(np.asarray(result, dtype=bool), len(table))

    @staticmethod
    def _known(node, table):
        return table[node.id].notna().to_numpy() if isinstance(node, ast.Name) else np.ones(len(table), dtype=bool)


def choose(
    ranking: Sequence[int],
    eligible: np.ndarray,
    num: int,
    groups: np.ndarray | None = None,
    quota: str = "proportional",
) -> np.ndarray:
    """
    Positions of the chosen prompts, best first.

    Args:
        ranking (`Sequence[int]`): all n positions, best first.
        eligible (`np.ndarray` of shape `(n,)`): whether a prompt may be chosen, bool.
        num (`int`): how many at most.
        groups (`np.ndarray` of shape `(n,)`, *optional*): the group of each prompt. Each group gets its quota; what a
            group without enough eligible prompts leaves over goes to the others.
        quota (`str`): `"proportional"` to a group's share of the n prompts, or `"equal"`.
    """
    order = np.asarray(ranking, dtype=np.int64)
    order = order[eligible[order]]
    if groups is None:
        return order[:num]
    names, places = np.unique(groups, return_inverse=True)
    available = np.bincount(places[order], minlength=len(names))
    shares = np.bincount(places, minlength=len(names)) if quota == "proportional" else np.ones(len(names))
    left = apportion(num, shares.astype(float), available)
    chosen = []
    for position in order.tolist():
        group = places[position]
        if left[group] > 0:
            left[group] -= 1
            chosen.append(position)
    return np.array(chosen, dtype=np.int64)


def apportion(num: int, shares: np.ndarray, available: np.ndarray) -> np.ndarray:
    """
    Whole numbers in proportion to `shares` that sum to `num` (or to all that is available) and do not exceed
    `available`, by largest remainders; ties to the earlier entry.
    """
    given = np.zeros(len(shares), dtype=np.int64)
    num = min(num, int(available.sum()))
    while (rest := num - int(given.sum())) > 0:
        weights = np.where(given < available, shares, 0.0)
        exact = rest * weights / weights.sum()
        more = np.minimum(np.floor(exact).astype(np.int64), available - given)
        if (more == np.floor(exact)).all():  # nothing is left over by a group without enough
            first = np.argsort(np.where(given + more < available, more - exact, np.inf), kind="stable")
            more[first[: min(rest - more.sum(), int((given + more < available).sum()))]] += 1
        given += more
    return given


def draw_order(scores: np.ndarray, seed: int) -> np.ndarray:
    """
    All n positions in the order of a draw without replacement in proportion to their scores (Efraimidis and Spirakis,
    2006). Positions whose score is not above 0 come last.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(len(scores), generator=generator, dtype=torch.float64).clamp_min(1e-300).log().numpy()
    positive = scores > 0
    keys = np.where(positive, noise / np.where(positive, scores, 1.0), -np.inf)
    return np.lexsort((noise, -keys))
