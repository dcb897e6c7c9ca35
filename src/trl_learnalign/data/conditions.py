"""Conditions on the columns of a table, written as text, that say which prompts may be chosen."""

import ast
import operator
import re
from decimal import Decimal

import numpy as np
import pandas as pd
from pandas.api import types


_COMPARISONS = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_MOST_NESTED = 50
# A text in quotes, which is left alone, or a name in backquotes
_QUOTED = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|`([^`]+)`""", re.DOTALL)
_STAND_IN = "_quoted_name_{}_"  # takes the place of a name in backquotes, which Python need not accept
_TRUTH = "True or False"
_ONE = {"numbers": "a number", "texts": "a text"}
# Kinds that `infer_dtype` finds in a column of Python objects
_KINDS = {
    "string": "texts",
    "boolean": _TRUTH,
    "date": "dates",
    "datetime": "dates",
    "datetime64": "dates",
    "empty": None,
    **dict.fromkeys(("integer", "floating", "mixed-integer-float", "decimal"), "numbers"),
}


class Condition:
    """
    A condition on the columns of a table, such as `completion_length_mean < 800 and source != 'forum'`: comparisons of
    columns with numbers, texts, `True`, `False` or other columns; `in` and `not in` lists of them; columns of `True`
    and `False` by themselves; `and`, `or`, `not`, parentheses. A field of a nested column is named `extra.level`, and
    a name that Python would not take, such as `problem-type` or `class`, is put in backquotes. A date is compared with
    a text such as `'2026-01-31'`. A comparison with a missing value is false; `is None` and `is not None` ask for
    missing values. The text is parsed and never run as code.

    Args:
        text (`str`): the condition.

    Raises:
        `ValueError`: the text is not of that form.
    """

    def __init__(self, text: str):
        self.text = text
        self._quoted: dict[str, str] = {}
        try:
            self._tree = ast.parse(_QUOTED.sub(self._stand_in, text.strip()), mode="eval").body
            self._check(self._tree, 0)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.args[0] if isinstance(error, SyntaxError | ValueError) else "it is nested too deeply"
            raise ValueError(
                f"`where` is {_short(text)!r}, which cannot be read ({_short(self._named(str(reason)))}). Compare "
                "columns with numbers or texts, and join comparisons by and, or, not: `completion_length_mean < 800 "
                "and source != 'forum'`. A field is named `extra.level`; a name such as problem-type or class is put "
                "in backquotes."
            ) from error

    @property
    def columns(self) -> set[str]:
        """Columns that the condition looks at; fields of nested ones with a dot, as `extra.level`."""
        found: set[str] = set()
        todo: list[ast.AST] = [self._tree]
        while todo:
            node = todo.pop()
            name = self._name(node)
            if name is None:
                todo.extend(ast.iter_child_nodes(node))
            else:
                found.add(name)
        return found

    def __call__(self, table: pd.DataFrame) -> np.ndarray:
        """
        Tell for each of n rows of a table whether the condition holds, bool, of shape `(n,)`.

        Raises:
            `ValueError`: a column is compared with values of another kind.
        """
        return self._holds(self._tree, table)

    # Reading ----------------------------------------------------------------------------------------------------

    def _stand_in(self, found):
        if found[1] is None:
            return found[0]
        name = _STAND_IN.format(len(self._quoted))
        self._quoted[name] = found[1]
        return name

    def _named(self, text):
        """Put the names that were in backquotes back into a text."""
        for name, quoted in self._quoted.items():
            text = text.replace(name, f"`{quoted}`")
        return text

    def _shown(self, node):
        return self._named(ast.unparse(node))

    def _name(self, node) -> str | None:
        """Return the column that a node names; `None` if it names none."""
        match node:
            case ast.Name(id=name):
                return self._quoted.get(name, name)
            case ast.Attribute(value=value, attr=field):
                root = self._name(value)
                return None if root is None else f"{root}.{self._quoted.get(field, field)}"
        return None

    def _check(self, node, depth):
        if depth > _MOST_NESTED:
            raise RecursionError
        match node:
            case ast.BoolOp():
                for value in node.values:
                    self._check(value, depth + 1)
            case ast.UnaryOp(op=ast.Not()):
                self._check(node.operand, depth + 1)
            case ast.Compare():
                for left, kind, right in _pairs(node):
                    if isinstance(kind, ast.Is | ast.IsNot):
                        if not _is_none(right):
                            raise ValueError("`is` and `is not` need None, as in `answer is not None`")
                    elif isinstance(kind, ast.In | ast.NotIn):
                        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
                            raise ValueError("`in` needs a list such as ['a', 'b']")
                        for item in right.elts:
                            self._literal(item)
                    elif type(kind) in _COMPARISONS:
                        self._operand(right)
                    else:
                        raise ValueError(f"{self._shown(node)} uses a comparison that is not supported")
                    self._operand(left)
                    if not (self._name(left) or self._name(right)):
                        raise ValueError(f"{self._shown(node)} compares values without a column")
            case ast.Name() | ast.Attribute():
                self._operand(node)
            case _:
                raise ValueError(f"{self._shown(node)} is not a comparison")

    def _operand(self, node):
        if self._name(node) is None:
            self._literal(node)

    def _literal(self, node):
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError) as error:
            more = ", and nothing is calculated" if isinstance(node, ast.BinOp | ast.Call) else ""
            raise ValueError(f"{self._shown(node)} is neither a column nor a number or a text{more}") from error
        if value is None:
            raise ValueError("None is compared by `is None` and `is not None`")
        if not isinstance(value, str | int | float):
            raise ValueError(f"{self._shown(node)} is neither a number nor a text")
        return value

    # Looking at a table -----------------------------------------------------------------------------------------

    def _holds(self, node, table):
        match node:
            case ast.BoolOp():
                parts = [self._holds(value, table) for value in node.values]
                return (np.logical_and if isinstance(node.op, ast.And) else np.logical_or).reduce(parts)
            case ast.UnaryOp():
                return ~self._holds(node.operand, table)
            case ast.Compare():
                return np.logical_and.reduce([self._compare(*pair, table) for pair in _pairs(node)])
        values, kind = self._side(node, table)
        if kind not in (None, _TRUTH):
            raise ValueError(
                f"`where` is {self.text!r}, but the column `{self._name(node)}` holds {kind}, and only one of True "
                "and False is a condition by itself. Compare it with a value."
            )
        return values.notna().to_numpy() & (values == True).to_numpy(dtype=bool)  # noqa: E712

    def _side(self, node, table):
        """Return a column or a literal of one side, and its kind: `None` for a column without a value."""
        name = self._name(node)
        if name is None:
            value = self._literal(node)
            return value, _TRUTH if isinstance(value, bool) else "texts" if isinstance(value, str) else "numbers"
        kind = kind_of(table[name])
        if kind not in (None, "numbers", "texts", "dates", _TRUTH):
            raise ValueError(
                f"`where` is {self.text!r}, but the column `{name}` holds {kind}, which cannot be compared. Name a "
                "column, or a field such as `extra.level`, of numbers, of texts, or of True and False."
            )
        return (pd.to_datetime(table[name]) if kind == "dates" else table[name]), kind

    def _compare(self, left, comparison, right, table):
        if isinstance(comparison, ast.Is | ast.IsNot):
            there = table[self._name(left)].notna().to_numpy(dtype=bool)
            return there if isinstance(comparison, ast.IsNot) else ~there
        inside = isinstance(comparison, ast.In | ast.NotIn)
        sides = [left, *right.elts] if inside else [left, right]
        found = [self._side(side, table) for side in sides]
        for side, one in zip(sides[1:], found[1:], strict=True):
            self._check_kinds(left, found[0], side, one)
        columns = [value for value, _ in found if isinstance(value, pd.Series)]
        known = np.logical_and.reduce([np.ones(len(table), dtype=bool), *(column.notna() for column in columns)])
        values = [value[known] if isinstance(value, pd.Series) else value for value, _ in found]
        for dates in [value for value, (_, kind) in zip(values, found, strict=True) if kind == "dates"][:1]:
            values = [self._date(value, dates) if isinstance(value, str) else value for value in values]
        if found[0][1] == "numbers":
            values = _with_decimals(values)
        if not inside:
            result = _COMPARISONS[type(comparison)](*values)
        elif found[0][1] == "texts":
            result = values[0].isin(values[1:])
        else:  # as `==`: `isin` compares numbers of single precision with more digits than they have
            result = np.logical_or.reduce(
                [np.zeros(known.sum(), dtype=bool), *(values[0] == one for one in values[1:])]
            )
        if isinstance(comparison, ast.NotIn):
            result = ~np.asarray(result, dtype=bool)
        holds = np.zeros(len(table), dtype=bool)
        holds[known] = np.broadcast_to(np.asarray(result, dtype=bool), known.sum())
        return holds

    def _check_kinds(self, left, first, right, second):
        (value, kind), (other, its_kind) = first, second
        if kind is None or its_kind is None or kind == its_kind:
            return
        if {kind, its_kind} == {"dates", "texts"} and isinstance(other if kind == "dates" else value, str):
            return
        raise ValueError(
            f"`where` is {self.text!r}, but its sides cannot be compared: {self._about(left, kind)}, and "
            f"{self._about(right, its_kind)}. Compare numbers with numbers, texts with texts ('3' is a text, 3 a "
            "number), and columns of True and False with True or False."
        )

    def _about(self, node, kind):
        name = self._name(node)
        if name is None:
            return f"{self._shown(node)} is {_ONE.get(kind, kind)}"
        return f"the column `{name}` holds {kind}"

    def _date(self, text, dates):
        """Convert a text to a date that can be compared with those of a column."""
        try:
            date = pd.Timestamp(text)
        except ValueError:
            date = pd.NaT
        if date is pd.NaT:
            raise ValueError(
                f"`where` is {self.text!r}, which compares dates with {text!r}. Write a date as '2026-01-31'."
            )
        zone = dates.dt.tz
        return date.tz_convert(zone) if date.tz is not None and zone is not None else date.tz_localize(zone)


def kind_of(column: pd.Series) -> str | None:
    """
    Name the kind of a column's values: `"numbers"`, `"texts"`, `"True or False"`, `"dates"`, or other words if they
    cannot be compared; `None` if it has no value.
    """
    kind = column.dtype
    if types.is_bool_dtype(kind):
        return _TRUTH
    if types.is_numeric_dtype(kind):
        return "numbers"
    if types.is_datetime64_any_dtype(kind):
        return "dates"
    found = types.infer_dtype(column, skipna=True)
    if found in _KINDS:
        return _KINDS[found]
    if found.startswith("mixed"):
        plain = column.dropna().map(lambda value: isinstance(value, str | int | float)).all()
        return "values of several kinds" if plain else "nested values"
    return f"values of the kind {found}"


def _with_decimals(values):
    """Convert the sides of a comparison of numbers: beside a column of decimals, 0.1 is exactly a tenth."""
    columns = [value for value in values if isinstance(value, pd.Series)]
    if not any(column.dtype == object and types.infer_dtype(column) == "decimal" for column in columns):
        return values
    if any(types.is_float_dtype(column.dtype) for column in columns):
        return [value.astype("float64") if isinstance(value, pd.Series) else value for value in values]
    return [Decimal(repr(value)) if isinstance(value, float) else value for value in values]


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def _pairs(node):
    return zip([node.left, *node.comparators], node.ops, node.comparators, strict=False)


def _short(text):
    return text if len(text) <= 200 else f"{text[:200]}..."
