"""
Short questions of nine kinds, and two kinds that can only be guessed; and the pool of gym_pool.py.

A pool is what users have: most questions are too hard for the model at first, a few kinds are within reach, and one
step leads to the next (sums of one digit, of two, of three). The kinds that are guessed have answers that nothing in
the question tells.
"""

import re

import gym_pool
import numpy as np
import pandas as pd


SHARES = {  # questions of 2,000
    "sum 1": 150,
    "product 1": 100,
    "largest": 150,
    "sum 2": 300,
    "difference": 200,
    "story": 100,
    "next": 200,
    "sum 3": 400,
    "product 2": 400,
}
GUESSED = {"prime": 333, "ticket": 334}  # a quarter of 2,667
POOLS = {
    "short": SHARES,
    "guessed": SHARES | GUESSED,
    "gym": {kind: number for kind, (number, _) in gym_pool.KINDS.items()},
}
KINDS = (*SHARES, *GUESSED, *gym_pool.KINDS)
HELD_OUT = 16  # questions of each kind that can be learnt in a short run: all of `SHARES` but the last

_THINGS = "apples", "books", "coins", "marbles", "pens", "shells", "stamps", "cards"
_NAMES = "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Hugo"


def _question(kind: str, r: np.random.Generator) -> tuple[str, str, tuple]:
    """Return a question of a kind, its answer, and what it is about: equal for all wordings of the same."""

    def numbers(low, high, n=2):
        return [int(number) for number in r.integers(low, high, n)]

    def one_of(*wordings):
        return wordings[r.integers(len(wordings))]

    if kind in ("sum 1", "sum 2", "sum 3"):
        a, b = numbers(*{"1": (1, 10), "2": (10, 100), "3": (100, 1000)}[kind[-1]])
        return one_of(f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?"), str(a + b), (a, b)
    if kind in ("product 1", "product 2"):
        (a,), (b,) = numbers(*{"1": (2, 10), "2": (11, 100)}[kind[-1]], 1), numbers(*(2, 10), 1)
        b = b if kind == "product 1" else numbers(11, 1000, 1)[0]
        return one_of(f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"{a} * {b} = ?"), str(a * b), (a, b)
    if kind == "largest":
        a, b, c = (int(number) for number in r.choice(np.arange(1, 100), 3, replace=False))
        return f"Which number is the largest: {a}, {b} or {c}?", str(max(a, b, c)), (a, b, c)
    if kind == "difference":
        a, b = sorted(numbers(10, 100), reverse=True)
        return one_of(f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"{a} - {b} = ?"), str(a - b), (a, b)
    if kind == "story":
        name, thing, (a, b) = _NAMES[r.integers(8)], _THINGS[r.integers(8)], numbers(2, 10)
        return f"{name} has {a} {thing} and gets {b} more. How many {thing} now?", str(a + b), (name, thing, a, b)
    if kind == "next":
        (a,), (step,) = numbers(1, 30, 1), numbers(2, 10, 1)
        row = ", ".join(str(a + i * step) for i in range(4))
        return f"Which number comes next: {row}?", str(a + 4 * step), (a, step)
    (n,) = numbers(1000, 100_000, 1)
    if kind == "prime":
        n = _number(n, bool(r.integers(2)))  # half of them are
        return f"Is {n} prime? Answer yes or no.", "yes" if _is_prime(n) else "no", (n,)
    return f"Is lottery ticket number {n} a winner? Answer yes or no.", one_of("yes", "no"), (n,)


def _is_prime(n: int) -> bool:
    return all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _number(n: int, prime: bool) -> int:
    """Return the next number that is prime, or that is not though its last digit does not tell."""
    while n % 2 == 0 or n % 5 == 0 or _is_prime(n) != prime:
        n += 1
    return n


def _draw(kind: str, number: int, r: np.random.Generator, without: set) -> list[dict]:
    """Return different questions of a kind; none about what is in `without`."""
    rows: dict[str, dict] = {}
    for _ in range(100 * number):
        text, answer, about = _question(kind, r)
        if about not in without and text not in rows:
            rows[text] = gym_pool.row(text, answer, kind)
        if len(rows) == number:
            return list(rows.values())
    raise ValueError(f"There are no {number} different questions of the kind {kind!r}.")


def held_out(name: str = "short") -> pd.DataFrame:
    """Return questions that no pool has, not in other words either: the same for all seeds."""
    return pd.DataFrame(gym_pool.held_out()) if name == "gym" else _held_out()[0]


def _held_out():
    r, rows, without = np.random.default_rng(2**20), [], {}
    for kind in [*SHARES][:-1]:
        about = {}
        while len(about) < HELD_OUT:
            text, answer, topic = _question(kind, r)
            about.setdefault(topic, (text, answer))
        without[kind] = set(about)
        rows += [gym_pool.row(*one, kind) for one in about.values()]
    return pd.DataFrame(rows), without


def pool(name: str, seed: int) -> pd.DataFrame:
    """Return the questions of a pool: `prompt` (messages), `answer`, `kind`, in random order."""
    if name == "gym":
        return pd.DataFrame(gym_pool.pool(seed))
    r, (_, without) = np.random.default_rng(seed), _held_out()
    rows = [row for kind, number in POOLS[name].items() for row in _draw(kind, number, r, without.get(kind, set()))]
    return pd.DataFrame([rows[i] for i in r.permutation(len(rows))])


def is_right(text: str, answer: str, name: str = "short") -> bool:
    """Tell if the last number of a text, or its first yes or no, is the answer."""
    if name == "gym":
        return gym_pool.is_right(text, answer)
    if answer in ("yes", "no"):
        found = re.findall(r"\b(yes|no)\b", text.lower())
        return bool(found) and found[0] == answer
    found = re.findall(r"\d+", text.replace(",", ""))
    return bool(found) and found[-1] == answer
