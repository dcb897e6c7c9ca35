"""
Pools of prompts on which choosing online is tried: those that were not filtered by difficulty, and some where nothing
can be won.

`hard` is 2,000 equations of GSM8K, 4,800 chains far too hard for the tiny policy, and 1,200 trivial ones; `hard-10`
and `hard-50` have fewer and more equations, `hard-small` a twentieth of all, and `mastered` is mostly trivial. `clean`
is all equations; `live` those whose success rate under the first policy is well inside (0, 1). `hard-wrong` and
`clean-wrong` have a wrong answer in every tenth row, `hard-wrong-30` in three of ten. In `hard-copies` a fifth of the
rows are copies of others with two operands exchanged, and of `hard-noisy` a failed rollout is rewarded now and then.
`skills` and `skills-target` are those of skills.py, for a policy of their own.

A part of `COINS` is decided by chance, whatever is trained: prompts that the learnability of a group praises most and
on which nothing can be learnt. `coins` is a third coins: prompts in a form of their own, of which every rollout is
rewarded at one half, whatever it says, as by a flaky grader. `tenth-coins` has a tenth. The coins of `alike-coins`
look like equations: the same forms with other digits. `large-coins` is equations and coins alone. In place of coins
`labels` has questions that are answered by an odd or an even number, and the right one of these was drawn once for
each prompt: a guess is right at one half, and only repetition teaches more.
"""

import os
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import numpy as np
from datasets import Dataset
from equations import equations_reward
from hard_pool import COIN, EQUATION, HARD, SIZES, TRIVIAL, bracketed, hard_pool
from policies import POLICY, load_policy, read_equations, successes
from train_tiny_policy import corrupt


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
COINS = {
    "coins": Sizes(_THIRD, 1333),
    "tenth-coins": Sizes({EQUATION: 1350, HARD: 1440, TRIVIAL: 810}, 400),
    "alike-coins": Sizes(_THIRD, 1333, alike=True),
    "labels": Sizes(_THIRD, 1333, labels=True),
    "large-coins": Sizes({EQUATION: 5000, HARD: 0, TRIVIAL: 0}, 2500),
}
# Of the prompts 13, 30, 52 and 30 % are live at first, fewer once the trivial ones are mastered
MIXED = {
    "hard-10": {EQUATION: 800, HARD: 6600, TRIVIAL: 600},
    "hard": SIZES,
    "hard-50": {EQUATION: 4800, HARD: 2000, TRIVIAL: 1200},
    "hard-small": {EQUATION: 100, HARD: 240, TRIVIAL: 60},
    "mastered": {EQUATION: 2000, HARD: 0, TRIVIAL: 6000},
}
WRONG_SHARES = {"hard-wrong": 0.1, "hard-wrong-30": 0.3, "clean-wrong": 0.1}
SKILLS = "skills", "skills-target"
POOLS = (*MIXED, "clean", "live", *WRONG_SHARES, "hard-copies", "hard-noisy", *SKILLS, *COINS)
COPIES = 0.2  # of the rows of `hard-copies`
FALSE_POSITIVES = 0.05  # of the failed rollouts of `hard-noisy`
LIVE_BETWEEN = (0.3, 0.7)  # success rates of the pool `live`, of `LIVE_SAMPLES` rollouts
LIVE_SAMPLES = 16
MAX_COMPLETION = 56  # characters, each a token; the longest of an equation has 53
TARGET_PROMPTS = 64


@dataclass(frozen=True)
class Pool:
    """
    `rows` is what a trainer gets (`prompt`, `answer`; of skills `task`). `kind` and `wrong` tell what each row is,
    for the evaluation only; the trainer does not get them.
    """

    rows: Dataset
    kind: np.ndarray  # (N,) of KINDS, or of skills the task times four plus the level
    wrong: np.ndarray  # (N,) of booleans: the answer is not the right one, or the prompt is a copy
    false_positives: float = 0.0  # share of the failed rollouts that are rewarded
    target: np.ndarray | None = None  # (N,) of booleans: rows of the kind that the test asks for, where it is a part
    coins: np.ndarray | None = None  # (N,) of booleans: every rollout is rewarded at one half, whatever it says


@dataclass(frozen=True)
class Task:
    """What all runs on a pool have in common: where they start, what is rewarded, and what they are judged by."""

    policy: Path
    reward: Callable
    test: Dataset
    target: Dataset | None = None
    max_completion: int = MAX_COMPLETION


def make_pool(name: str, dataset_path: Path | None, seed: int = 0, cache: Path | None = None) -> Pool:
    """
    The pool `name`, equal for equal `seed`; those of skills are the same for every seed. `live` needs rollouts of all
    equations, kept in the folder `cache`.
    """
    if name in SKILLS:
        from skills import LEVELS, SPLITS, TASKS, split

        rows, tested = split(name)[0], SPLITS[name][2]
        kinds = LEVELS * np.array(rows["task"], np.int8) + np.array(rows["level"], np.int8)
        target = None if tested is None else np.isin(rows["task"], [TASKS.index(t) for t in TASKS if t.name in tested])
        return Pool(rows.remove_columns("level"), kinds, np.zeros(len(rows), bool), target=target)
    equations = read_equations(dataset_path)[0]
    if name in COINS:
        rows, kinds = coin_pool(name, equations, seed)
        none = np.zeros(len(rows), bool)
        return Pool(rows, kinds, none, coins=none if COINS[name].labels else kinds == CHANCE)
    mixed = name if name in MIXED else "hard" if name.startswith("hard") else None
    if mixed is not None:
        rows = hard_pool(equations, seed, MIXED[mixed])
        pool = Pool(rows.remove_columns("kind"), np.array(rows["kind"], np.int8), np.zeros(len(rows), bool))
    else:
        pool = _all(equations)
    if name == "live":
        rates = first_successes(equations, LIVE_SAMPLES, cache, f"equations-{dataset_path is None}") / LIVE_SAMPLES
        rows = np.flatnonzero((rates >= LIVE_BETWEEN[0]) & (rates <= LIVE_BETWEEN[1]))
        pool = Pool(pool.rows.select(rows), pool.kind[rows], pool.wrong[rows])
    if name == "hard-copies":
        return _with_copies(pool, seed)
    if name == "hard-noisy":
        return replace(pool, false_positives=FALSE_POSITIVES)
    return _mislabelled(pool, WRONG_SHARES[name], seed) if name in WRONG_SHARES else pool


def make_task(name: str, dataset_path: Path | None, folder: Path) -> Task:
    """What the runs on the pool `name` have in common. `folder` holds the policy of skills_policy.py."""
    if name not in SKILLS:
        reward = chance_reward if name in COINS else equations_reward
        return Task(POLICY, reward, read_equations(dataset_path)[1])
    from skills import exact_reward, split

    policy = folder / "skills-policy"
    if not (policy / "config.json").is_file():
        sys.exit(
            f"'{policy}' has no policy. `python benchmarks/online/skills_policy.py --output_dir {policy}` trains it."
        )
    _, test, target = split(name)
    return Task(policy, exact_reward, test, target.select(range(min(TARGET_PROMPTS, len(target)))), max_completion=28)


def _all(equations: Dataset) -> Pool:
    rows = equations.select_columns(["prompt", "answer"])
    return Pool(rows, np.full(len(rows), EQUATION, np.int8), np.zeros(len(rows), bool))


def _with_copies(pool: Pool, seed: int) -> Pool:
    """A fifth of the rows become near-duplicates of others: `48+24` of `24+48`."""
    rng = random.Random(seed + 1)
    prompts, answers = list(pool.rows["prompt"]), list(pool.rows["answer"])
    kind, copies = pool.kind.copy(), np.zeros(len(prompts), bool)
    rows = rng.sample(range(len(prompts)), len(prompts))
    number = round(COPIES * len(prompts))
    originals = [row for row in rows[number:] if exchanged(prompts[row]) != prompts[row]][:number]
    for copy, row in zip(rows[:number], originals, strict=True):
        prompts[copy], answers[copy], kind[copy] = exchanged(prompts[row]), answers[row], kind[row]
        copies[copy] = True
    return Pool(Dataset.from_dict({"prompt": prompts, "answer": answers}), kind, copies)


def exchanged(prompt: str) -> str:
    """The prompt with the operands of its first sum or product of two numbers exchanged, if it has one."""
    return re.sub(r"(?<![^;])([\d.]+)([+*])([\d.]+)(?=[;=])", r"\3\2\1", prompt, count=1)


def _mislabelled(pool: Pool, share: float, seed: int) -> Pool:
    rng = random.Random(seed + 1)
    wrong = np.zeros(len(pool.rows), bool)
    wrong[rng.sample(range(len(wrong)), round(share * len(wrong)))] = True
    answers = [_wrong(row["answer"], rng) if bad else row["answer"] for row, bad in zip(pool.rows, wrong, strict=True)]
    rows = Dataset.from_dict({"prompt": pool.rows["prompt"], "answer": answers})
    return Pool(rows, pool.kind, wrong)


def _wrong(answer: str, rng: random.Random) -> str:
    """Another number, of the kind that the policy writes by mistake."""
    sign, digits = ("-", answer[1:]) if answer.startswith("-") else ("", answer)
    while True:
        other = sign + corrupt(digits, rng)
        if Decimal(other) != Decimal(answer):  # 1.5 is no wrong answer for 1.50
            return other


def first_successes(rows: Dataset, samples: int, cache: Path | None, name: str) -> np.ndarray:
    """Successes under the first policy, shape (N,), read from `cache` where it holds them."""
    file = None if cache is None else cache / f"{name}-{len(rows)}x{samples}.npy"
    if file is not None and file.is_file():
        return np.load(file)
    counts = successes(*load_policy(), rows, samples)[0].sum(1).astype(np.int16)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{os.getpid()}-{file.name}")
        np.save(temporary, counts)
        temporary.replace(file)
    return counts


def coin_pool(name: str, equations: Dataset, seed: int = 0) -> tuple[Dataset, np.ndarray]:
    """
    The rows of the pool `name`, a key of `COINS` (columns `prompt`, `answer`), and the kind of each, one of `KINDS`.
    In random order, equal for equal `seed`.
    """
    sizes, rng = COINS[name], random.Random(seed + 1)
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
