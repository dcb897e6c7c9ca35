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


def _to_sort(example):
    return f"{_numbers('original_numbers')(example)}:{example['metadata']['direction'][:1]}"


def _sequence(example):
    return ",".join(map(str, example["metadata"]["sequence"][:-1])) + ",?"


def _field(name):
    return lambda example: str(example["metadata"][name])


def _numbers(name):
    return lambda example: ",".join(f"{float(value):g}" for value in example["metadata"][name])


def _levels(names, *values, **more):
    """The settings of each level, whose values stand in a tuple; names with `=` between them have the same value."""
    keys = [name.split("=") for name in names.split()]
    each = [[(key, value) for own, value in zip(keys, row, strict=True) for key in own] for row in values]
    return tuple(dict(pairs) | more for pairs in each)


_SUMS, _WITHIN = "min_terms=max_terms min_digits=max_digits", "min_value max_value"
_SIGNED, _COMPLEX = ["+", "-"], "min_real=min_imag max_real=max_imag operations operations_weights"
_LEVELS = {
    "chain_sum": _levels(_SUMS, (2, 1), (2, 2), (3, 3), (5, 4)),
    "products": _levels(_SUMS, (2, 1), (3, 1), (2, 2), (2, 4)),
    "gcd": _levels(_WITHIN, (2, 24), (25, 60), (61, 300), (301, 5000)),
    "lcm": _levels(_WITHIN, (2, 15), (16, 30), (31, 100), (101, 900)),
    "count_bits": _levels("min_n max_n", (1, 255), (256, 1023), (1024, 9999), (10**6, 10**8)),
    "simple_equations": _levels("min_terms=max_terms max_value", (2, 9), (2, 30), (3, 50), (5, 200), min_value=1),
    "number_sequence": _levels(
        f"{_WITHIN} max_complexity", (-9, 9, 1), (-40, 40, 1), (-40, 40, 2), (-99, 99, 3), min_terms=4, max_terms=4
    ),
    "spell_backward": _levels("min_word_len max_word_len", (3, 4), (5, 5), (6, 7), (9, 10)),
    "fraction_simplification": _levels(
        "max_value max_factor", (9, 5), (15, 9), (60, 20), (900, 90), min_value=1, min_factor=2, styles=("plain",)
    ),
    "prime_factorization": _levels(_WITHIN, (2, 200), (201, 500), (501, 3000), (3001, 90000)),
    "decimal_chain_sum": _levels(
        f"{_SUMS} min_decimal_places=max_decimal_places", (2, 1, 1), (2, 2, 1), (3, 2, 2), (4, 4, 3)
    ),
    "complex_arithmetic": _levels(
        _COMPLEX,
        *((-most, most, _SIGNED, [0.5, 0.5]) for most in (5, 20)),
        *((-most, most, ["*"], [1.0]) for most in (9, 90)),
    ),
    "base_conversion": _levels("max_base max_value", (4, 30), (9, 60), (12, 400), (16, 9000), min_base=2, min_value=0),
    "number_sorting": _levels(
        "min_numbers=max_numbers min_decimals=max_decimals=min_value max_value",
        *((3, 0, 9), (4, 0, 20), (5, 0, 99), (6, 0, 999)),
    ),
}
_TEXTS = {  # what the prompt says, and what its answer is where that is not the generator's
    "chain_sum": (_expression,),
    "products": (_expression,),
    "gcd": (_numbers("numbers"),),
    "lcm": (_numbers("numbers"),),
    "count_bits": (_field("number"),),
    "simple_equations": (_equation,),
    "number_sequence": (_sequence,),
    "spell_backward": (_field("word"),),
    "fraction_simplification": (_fraction,),
    "prime_factorization": (_field("number"), lambda example: "*".join(map(str, example["metadata"]["factors"]))),
    "decimal_chain_sum": (_expression,),
    "complex_arithmetic": (_complex, lambda example: _imaginary(*example["metadata"]["result"])),
    "base_conversion": (_conversion,),
    "number_sorting": (_to_sort, _numbers("sorted_numbers")),
}
TASKS = tuple(
    Task(name, chr(ord("a") + place), text, _LEVELS[name], *answer)
    for place, (name, (text, *answer)) in enumerate(_TEXTS.items())
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
