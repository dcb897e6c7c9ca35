"""
Prompts of many skills: fourteen tasks of reasoning-gym (generators made by others for such experiments), at four
levels of difficulty, written as short texts that a character model can read.

reasoning-gym makes the questions and knows the answers; a reward is 1 where
the completion is the answer to the letter.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import reasoning_gym
from datasets import Dataset


CHARACTERS = "0123456789+-*/().;=,:?" + "abcdefghijklmnopqrstuvwxyz"
LEVELS = 4
LONGEST = 60, 24  # characters of a prompt and of an answer


@dataclass(frozen=True)
class Task:
    """
    How a task of reasoning-gym is written. `text` makes the prompt's body from the metadata of an example, and
    `answer` its answer, by default that of the example; None leaves the example out. `levels` are the settings of the
    generator.
    """

    name: str
    letter: str  # which the prompt begins with
    text: Callable
    levels: tuple[dict, ...]
    answer: Callable = lambda example: example["answer"]


def _squeezed(text) -> str:
    return re.sub(r"\s", "", str(text))


def _expression(example):
    return _squeezed(example["metadata"]["expression"])


def _fraction(example):
    data = example["metadata"]
    return f"{data['numerator']}/{data['denominator']}"


def _equation(example):
    text = _squeezed(re.sub("[a-z]", "x", example["metadata"]["equation"]))
    return text if "x" in text else None  # every number would solve it


def _complex(example):
    first, second = example["metadata"]["num1"], example["metadata"]["num2"]
    return f"({_imaginary(*first)}){example['metadata']['operation']}({_imaginary(*second)})"


def _imaginary(real, imaginary):
    return f"{real:g}{imaginary:+g}i"


def _conversion(example):
    data = example["metadata"]
    return f"{data['source_repr']}:{data['source_base']}:{data['target_base']}"


def _numbers(values):
    return ",".join(f"{float(value):g}" for value in values)


def _sums(*sizes):
    return tuple(
        {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits} for terms, digits in sizes
    )


def _between(least, most, *bounds, **more):
    return tuple({least: low, most: high, **more} for low, high in bounds)


TASKS = (
    Task("chain_sum", "a", _expression, _sums((2, 1), (2, 2), (3, 3), (5, 4))),
    Task("products", "b", _expression, _sums((2, 1), (3, 1), (2, 2), (2, 4))),
    Task(
        "gcd",
        "c",
        lambda example: _numbers(example["metadata"]["numbers"]),
        _between("min_value", "max_value", (2, 24), (25, 60), (61, 300), (301, 5000)),
    ),
    Task(
        "lcm",
        "d",
        lambda example: _numbers(example["metadata"]["numbers"]),
        _between("min_value", "max_value", (2, 15), (16, 30), (31, 100), (101, 900)),
    ),
    Task(
        "count_bits",
        "e",
        lambda example: str(example["metadata"]["number"]),
        _between("min_n", "max_n", (1, 255), (256, 1023), (1024, 9999), (10**6, 10**8)),
    ),
    Task(
        "simple_equations",
        "f",
        _equation,
        tuple(
            {"min_terms": terms, "max_terms": terms, "min_value": 1, "max_value": most}
            for terms, most in ((2, 9), (2, 30), (3, 50), (5, 200))
        ),
    ),
    Task(
        "number_sequence",
        "g",
        lambda example: ",".join(map(str, example["metadata"]["sequence"][:-1])) + ",?",
        tuple(
            {"min_terms": 4, "max_terms": 4, "min_value": -most, "max_value": most, "max_complexity": complexity}
            for most, complexity in ((9, 1), (40, 1), (40, 2), (99, 3))
        ),
    ),
    Task(
        "spell_backward",
        "h",
        lambda example: example["metadata"]["word"],
        _between("min_word_len", "max_word_len", (3, 4), (5, 5), (6, 7), (9, 10)),
    ),
    Task(
        "fraction_simplification",
        "i",
        _fraction,
        tuple(
            {"min_value": 1, "max_value": most, "min_factor": 2, "max_factor": factor, "styles": ("plain",)}
            for most, factor in ((9, 5), (15, 9), (60, 20), (900, 90))
        ),
    ),
    Task(
        "prime_factorization",
        "j",
        lambda example: str(example["metadata"]["number"]),
        _between("min_value", "max_value", (2, 200), (201, 500), (501, 3000), (3001, 90000)),
        lambda example: "*".join(map(str, example["metadata"]["factors"])),
    ),
    Task(
        "decimal_chain_sum",
        "k",
        _expression,
        tuple(
            {**sizes, "min_decimal_places": places, "max_decimal_places": places}
            for sizes, places in zip(_sums((2, 1), (2, 2), (3, 2), (4, 4)), (1, 1, 2, 3), strict=True)
        ),
    ),
    Task(
        "complex_arithmetic",
        "l",
        _complex,
        tuple(
            {f"{end}_{part}": sign * most for part in ("real", "imag") for end, sign in (("min", -1), ("max", 1))}
            | {"operations": operations, "operations_weights": [1 / len(operations)] * len(operations)}
            for most, operations in ((5, ["+", "-"]), (20, ["+", "-"]), (9, ["*"]), (90, ["*"]))
        ),
        lambda example: _imaginary(*example["metadata"]["result"]),
    ),
    Task(
        "base_conversion",
        "m",
        _conversion,
        tuple(
            {"min_base": 2, "max_base": base, "min_value": 0, "max_value": most}
            for base, most in ((4, 30), (9, 60), (12, 400), (16, 9000))
        ),
    ),
    Task(
        "number_sorting",
        "n",
        lambda example: f"{_numbers(example['metadata']['original_numbers'])}:{example['metadata']['direction'][:1]}",
        tuple(
            {
                "min_numbers": number,
                "max_numbers": number,
                "min_decimals": 0,
                "max_decimals": 0,
                "min_value": 0,
                "max_value": most,
            }
            for number, most in ((3, 9), (4, 20), (5, 99), (6, 999))
        ),
        lambda example: _numbers(example["metadata"]["sorted_numbers"]),
    ),
)


def examples(task: Task, level: int, seed: int):
    """Yields different (prompt, answer) pairs of a task and level, at most 100,000 tries."""
    tries = 100_000
    for example in reasoning_gym.create_dataset(task.name, size=tries, seed=seed, **task.levels[level]):
        text, answer = task.text(example), _squeezed(task.answer(example))
        if text is None or len(text) > LONGEST[0] or not 0 < len(answer) <= LONGEST[1]:
            continue
        if set(text + answer) <= set(CHARACTERS):
            yield f"{task.letter}{text}=", answer


# The tasks of the target testbed's test, a fifth of its pool: all have something to be learnt at the start
TARGET = "gcd", "simple_equations", "count_bits"
SPLITS = {"skills": (40, 16, None), "skills-target": (20, 40, TARGET)}


@cache
def split(name: str, seed: int = 1) -> tuple[Dataset, Dataset, Dataset]:
    """
    The pool, the test and the target set of a testbed, a key of `SPLITS`: for every task and level so many prompts of
    the pool, and so many each of the test and the target set (of the tasks that are named). No prompt is in two of
    them. Columns `prompt`, `answer`, `task` (its number), `level`.
    """
    parts = [], [], []
    pool, test, tasks = SPLITS[name]
    for number, task in enumerate(TASKS):
        sizes = pool, *(2 * [test] if tasks is None or task.name in tasks else [0, 0])
        seen = set()  # of the easier levels
        for level in range(LEVELS):
            found = {}
            for prompt, answer in examples(task, level, seed + level):
                if prompt not in seen:
                    found[prompt] = answer
                if len(found) == sum(sizes):
                    break
            else:
                raise ValueError(f"{task.name}, level {level}: only {len(found)} different prompts, not {sum(sizes)}")
            seen |= set(found)
            rows = [(prompt, answer, number, level) for prompt, answer in found.items()]
            random.Random(seed).shuffle(rows)
            for part, size in zip(parts, sizes, strict=True):
                part += rows[:size]
                del rows[:size]
    for part in parts:
        random.Random(seed + 1).shuffle(part)
    names = "prompt", "answer", "task", "level"
    return tuple(Dataset.from_dict(dict(zip(names, zip(*part, strict=True), strict=True))) for part in parts)


def exact_reward(completions, answer, **kwargs) -> list[float]:
    """1.0 where the completion is the answer to the letter."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]
