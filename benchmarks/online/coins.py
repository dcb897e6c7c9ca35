"""
Pools a part of which is decided by chance, whatever is trained: prompts that the learnability of a group praises most
and on which nothing can be learnt.

`coins` is a third coins: prompts in a form of their own, of which every rollout is rewarded at one half, whatever it
says, as by a flaky grader. `tenth-coins` has a tenth. The coins of `alike-coins` look like equations: the same forms
with other digits. `large-coins` is equations and coins alone. In place of coins `labels` has questions that are
answered by an odd or an even number, and the right one of these was drawn once for each prompt: a guess is right at
one half, and only repetition teaches more.
"""

import random
import re
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from equations import equations_reward
from hard_pool import COIN, EQUATION, HARD, TRIVIAL, bracketed, hard_pool


CHANCE = COIN  # the kind of coins and of labels
KINDS = {EQUATION: "equations", HARD: "too hard", TRIVIAL: "trivial", CHANCE: "coins"}
LABELS = "odd", "even"


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each kind, and how those of chance are written."""

    others: dict[int, int]
    chance: int
    alike: bool = False
    labels: bool = False


_THIRD = {EQUATION: 1000, HARD: 1067, TRIVIAL: 600}
POOLS = {
    "coins": Sizes(_THIRD, 1333),
    "tenth-coins": Sizes({EQUATION: 1350, HARD: 1440, TRIVIAL: 810}, 400),
    "alike-coins": Sizes(_THIRD, 1333, alike=True),
    "labels": Sizes(_THIRD, 1333, labels=True),
    "large-coins": Sizes({EQUATION: 5000, HARD: 0, TRIVIAL: 0}, 2500),
}


def coin_pool(name: str, equations: Dataset, seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """
    The rows of the pool `name`, a key of `POOLS` (columns `prompt`, `answer`), and the kind of each, one of `KINDS`.
    In random order, equal for equal `seed`.
    """
    sizes, rng = POOLS[name], random.Random(seed + 1)
    pool = hard_pool(equations, seed, sizes.others)
    rows = list(zip(pool["prompt"], pool["answer"], pool["kind"], strict=True))
    seen, forms = set(pool["prompt"]), list(equations["prompt"])
    while len(rows) < len(pool) + sizes.chance:
        prompt = other_digits(rng.choice(forms), rng) if sizes.alike else bracketed(rng)
        if prompt not in seen:
            seen.add(prompt)
            rows.append((prompt, rng.choice(LABELS) if sizes.labels else "0", CHANCE))
    rng.shuffle(rows)
    prompts, answers, kinds = zip(*rows, strict=True)
    return Dataset.from_dict({"prompt": prompts, "answer": answers}), np.array(kinds, np.int8)


def other_digits(prompt: str, rng: random.Random) -> str:
    """The prompt with other digits in place of all but zeros: `53/7;91+60=` of `48/2;24+30=`."""
    return re.sub("[1-9]", lambda _: rng.choice("123456789"), prompt)


def chance_reward(completions, answer, **kwargs) -> list[float]:
    """As `equations_reward`; where the answer is one of `LABELS`, 1.0 if the completion ends in such a digit."""
    labels = np.isin(answer, LABELS)
    numbers = equations_reward(completions, np.where(labels, "0", answer).tolist())
    return [
        float(text.strip()[-1:] in set("13579" if right == "odd" else "02468")) if label else number
        for text, right, label, number in zip(completions, answer, labels, numbers, strict=True)
    ]
