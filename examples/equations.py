"""The equations of GSM8K: a task small enough to train on a CPU in minutes, with the difficulty spread of GSM8K.

Every GSM8K solution carries calculator annotations such as `<<48/2=24>>`. The prompt is their left sides, joined by
`;` and ended by `=` (`48/2;48+24=`), the completion is their results (`24;72`), and only the last result is graded.
"""

import json
import random
import re
from decimal import Decimal

from datasets import Dataset


_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_EXPRESSION = re.compile(r"[-+*/().\d]*\d[-+*/().\d]*")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")


def _row(steps: list[tuple[str, str]]) -> dict[str, str]:
    return {
        "prompt": ";".join(left for left, _ in steps) + "=",
        "answer": steps[-1][1],
        "solution": ";".join(result for _, result in steps),
    }


def _annotated_steps(solution: str) -> list[tuple[str, str]] | None:
    """The (left side, result) pairs of a GSM8K solution, or None where one does not parse or none is there."""
    steps = []
    for annotation in _ANNOTATION.findall(solution):
        left, _, result = annotation.replace(" ", "").replace(",", "").partition("=")
        if not _EXPRESSION.fullmatch(left) or not _EXPRESSION.fullmatch(result):
            return None
        steps.append((left, result))
    # Only the last result is graded, so only it must be a number (one test row has 3/4=3/4 on the way).
    return steps if steps and _NUMBER.fullmatch(steps[-1][1]) else None


def load_gsm8k_equations(path: str) -> tuple[Dataset, int]:
    """
    Reads a GSM8K JSON-lines file. Returns the usable rows and how many were dropped because they have no annotations.
    """
    with open(path, encoding="utf-8") as file:
        parsed = [_annotated_steps(json.loads(line)["answer"]) for line in file if line.strip()]
    rows = [_row(steps) for steps in parsed if steps is not None]
    return Dataset.from_list(rows), len(parsed) - len(rows)


def equations_reward(completions: list, answer: list[str], **kwargs) -> list[float]:
    """1.0 where the last result of the completion equals the answer as a number, else 0.0."""
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        last = text.rsplit(";", 1)[-1].strip()
        # Decimal and a strict pattern, so that 1.50 equals 1.5 and neither "nan" nor "1e3" passes for a number.
        rewards.append(float(bool(_NUMBER.fullmatch(last)) and Decimal(last) == Decimal(expected)))
    return rewards


# The step shapes with how often they come, on the way and as the last step, and how often a chain has 1 to 8 steps.
_SHAPES = ("mul", "add", "sub", "div", "add3", "percent", "fraction", "muldiv", "add4", "sub3", "bare", "paren")
_WEIGHTS = (27, 17, 17, 14.5, 4.5, 5.2, 3.0, 2.0, 1.5, 1.1, 0.6, 1.4)
_LAST_WEIGHTS = (13, 16, 30, 18, 4.5, 3.5, 1.5, 1.0, 1.0, 1.8, 1.2, 1.4)
_NUM_STEPS = (0.055, 0.295, 0.29, 0.193, 0.106, 0.039, 0.017, 0.005)
_DIVISORS = (2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 50, 60, 100)


class _Term:
    """A number and the way it is written, since GSM8K writes one value in several ways (.5, 0.5, 0.50)."""

    __slots__ = ("text", "value")

    def __init__(self, value: float, text: str | None = None):
        self.value = value
        self.text = text if text is not None else _plain(value)


def _plain(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _is_round(value: float, places: int = 2) -> bool:
    scaled = value * 10**places
    return abs(scaled - round(scaled)) < 1e-6


class _ChainWriter:
    """Writes one chain, with the step shapes that are common among GSM8K's annotations."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.results: list[_Term] = []
        self.unused: list[_Term] = []
        self.givens: list[_Term] = []

    def write(self) -> list[tuple[str, str]]:
        num_steps = self.rng.choices(range(1, 9), _NUM_STEPS)[0]
        steps = []
        while len(steps) < num_steps:
            left, value = self._step(last=len(steps) == num_steps - 1)
            # A result that GSM8K would not show (negative, endless decimals, too long) is drawn again.
            if not _is_round(value) or not 0 < value < 2e6 or self.rng.random() > self._keep(value):
                continue
            result = _Term(round(value, 2))
            if not _is_round(value, 0) and self.rng.random() < 0.3:
                result.text = f"{value:.2f}"  # money: 4.50
            steps.append((left, result.text))
            used = re.split(r"[-+*/()]", left)
            self.unused = [term for term in self.unused if term.text not in used] + [result]
            self.results.append(result)
        return steps

    @staticmethod
    def _keep(value: float) -> float:
        """How often a result is kept: results of GSM8K have few digits that are not zeros."""
        digits = len(_plain(value).replace(".", "").strip("0"))
        return (1.0, 1.0, 1.0, 0.55, 0.25, 0.12, 0.08)[min(digits, 6)]

    def _given(self, small: bool = False) -> _Term:
        """A number of the story: mostly small, often round, now and then with decimals, sometimes seen before."""
        rng, kind = self.rng, self.rng.random()
        if self.givens and kind < 0.25:
            return rng.choice(self.givens)
        kind = rng.random()
        if small or kind < 0.52:
            term = _Term(rng.choice((2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 8, 9, 10, 10, 12, rng.randint(2, 20))))
        elif kind < 0.74:
            term = _Term(rng.randint(1, 100))
        elif kind < 0.84:
            term = _Term(rng.randint(1, 20) * 5)
        elif kind < 0.90:
            term = _Term(rng.randint(1, 20) * 10 ** rng.randint(1, 3))
        elif kind < 0.945:
            term = _Term(rng.randint(100, 1500))
        elif kind < 0.97:
            term = _Term(rng.randint(1, 30) + rng.choice((0.5, 0.5, 0.25, 0.75)))
        else:
            term = _Term(rng.randint(11, 1999) / 100)
            if rng.random() < 0.5:
                term.text = f"{term.value:.2f}"
        self.givens.append(term)
        return term

    def _operand(self, small: bool = False) -> _Term:
        """Mostly an earlier result, the newest unused first, as a solution that leads somewhere does."""
        if self.unused and self.rng.random() < 0.72:
            return self.unused[-1] if self.rng.random() < 0.75 else self.rng.choice(self.unused)
        if self.results and self.rng.random() < 0.15:
            return self.rng.choice(self.results)
        return self._given(small)

    def _divisor(self, term: _Term) -> _Term:
        """Something that divides the term without a rest, or leaves a half or a quarter."""
        fits = [d for d in _DIVISORS if _is_round(term.value / d, 0) and d <= term.value]
        if fits and self.rng.random() < 0.93:
            return _Term(self.rng.choice(fits))
        return _Term(self.rng.choice((2, 4, 5, 8, 10, 60, 100)))

    def _step(self, last: bool) -> tuple[str, float]:
        rng = self.rng
        shape = rng.choices(_SHAPES, _LAST_WEIGHTS if last else _WEIGHTS)[0]
        # Solutions often end by combining the results that were not used yet.
        if last and 2 <= len(self.unused) <= 6 and rng.random() < 0.25:
            terms = list(self.unused)
            if rng.random() < 0.25:
                terms.append(self._given())
            return "+".join(t.text for t in terms), sum(t.value for t in terms)
        if shape in ("add", "add3", "add4"):
            count = {"add": 2, "add3": 3, "add4": rng.choice((4, 4, 4, 5))}[shape]
            terms = [self._operand()]
            terms += [self._given() if rng.random() < 0.6 else self._operand() for _ in range(count - 1)]
            rng.shuffle(terms)
            return "+".join(t.text for t in terms), sum(t.value for t in terms)
        if shape in ("sub", "sub3"):
            terms = [self._operand() if i == 0 or rng.random() < 0.35 else self._given() for i in range(3)]
            terms = terms[: 2 if shape == "sub" else 3]
            terms.sort(key=lambda t: -t.value)
            return "-".join(t.text for t in terms), terms[0].value - sum(t.value for t in terms[1:])
        if shape == "div":
            return self._division()
        if shape == "percent":
            return self._percent()
        if shape == "bare":
            term = self._given()
            return term.text, term.value
        if shape in ("fraction", "muldiv"):
            whole = self._operand()
            below = self._divisor(whole)
            above = 1 if rng.random() < 0.6 else rng.randint(1, max(1, int(below.value) - 1))
            value = whole.value * above / below.value
            patterns = ("{a}/{b}*{w}", "{a}/{b}*{w}", "({a}/{b})*{w}", "{w}*({a}/{b})", "{w}*{a}/{b}")
            if shape == "muldiv":
                above, patterns = self._given(small=True).value, ("{w}*{a}/{b}",)
                value = whole.value * above / below.value
            return rng.choice(patterns).format(a=_plain(above), b=below.text, w=whole.text), value
        if shape == "paren":
            a, b, c = self._operand(), self._given(), self._given(small=True)
            choice = rng.randrange(5)
            if choice == 0:
                return f"{c.text}*({a.text}+{b.text})", c.value * (a.value + b.value)
            if choice == 1:
                return f"{a.text}-({b.text}+{c.text})", a.value - b.value - c.value
            if choice == 2:
                return f"({a.text}+{b.text})/{c.text}", (a.value + b.value) / c.value
            if choice == 3:
                return f"{a.text}*{c.text}+{b.text}", a.value * c.value + b.value
            return f"({a.text}*{c.text})-{b.text}", a.value * c.value - b.value
        a, b = self._operand(), self._given(small=rng.random() < 0.7)
        if rng.random() < 0.06:
            c = self._given(small=True)
            return f"{a.text}*{b.text}*{c.text}", a.value * b.value * c.value
        a, b = (a, b) if rng.random() < 0.55 else (b, a)
        return f"{a.text}*{b.text}", a.value * b.value

    def _division(self) -> tuple[str, float]:
        rng = self.rng
        if self.unused and rng.random() < 0.72:
            above = self.unused[-1] if rng.random() < 0.7 else rng.choice(self.unused)
            below = rng.choice(self.results) if rng.random() < 0.15 else self._divisor(above)
        else:
            below, quotient = self._given(small=rng.random() < 0.8), self._given(small=rng.random() < 0.4)
            above = _Term(below.value * quotient.value)
        return f"{above.text}/{below.text}", above.value / below.value if below.value else -1.0

    def _percent(self) -> tuple[str, float]:
        rng = self.rng
        whole = self._operand()
        percent = rng.choice((10, 20, 25, 30, 40, 50, 60, 75, 80, 5, 15, rng.randint(1, 99)))
        value = whole.value * percent / 100
        part = _plain(percent / 100)
        short = part.removeprefix("0")
        patterns = ["{w}*{s}", "{w}*{s}", "{w}*{p}", "{p}*{w}", "{s}*{w}", "{n}/100*{w}", "({n}/100)*{w}"]
        patterns += ["{w}*{n}/100", "{w}*({n}/100)"]
        weights = [4, 4, 6, 4, 1, 2, 0.4, 1.5, 0.7]
        return rng.choices(patterns, weights)[0].format(w=whole.text, p=part, s=short, n=percent), value


def random_chain(rng: random.Random) -> list[tuple[str, str]]:
    """One made-up chain as (left side, result) pairs."""
    return _ChainWriter(rng).write()


def generate_chains(num: int, seed: int) -> Dataset:
    """The same kind of task without GSM8K, for machines that lack it."""
    rng = random.Random(seed)
    return Dataset.from_list([_row(random_chain(rng)) for _ in range(num)])
