"""
A pool that was not filtered by difficulty, of prompts for the tiny policy: some equations that it can learn, many
chains that are far too hard for it, some trivial sums, and, where asked for, prompts that are decided by chance.
"""

import random
from decimal import Decimal

from datasets import Dataset
from equations import random_chain


EQUATION, HARD, TRIVIAL = KINDS = (0, 1, 2)
COIN = 3
SIZES = {EQUATION: 2000, HARD: 4800, TRIVIAL: 1200}
MAX_PROMPT = 96  # characters, each a token; the longest equation of GSM8K has 88


def hard_pool(equations: Dataset, seed: int = 0, sizes: dict[int, int] = SIZES) -> Dataset:
    """
    So many prompts of each kind, in random order, equal for equal `seed`. The equations are drawn from `equations`,
    with its columns `prompt` and `answer`; the column `kind` has one of `KINDS`, or `COIN`.
    """
    rng = random.Random(seed)
    taken = rng.sample(range(len(equations)), sizes[EQUATION])
    rows = [(equations[i]["prompt"], equations[i]["answer"], EQUATION) for i in taken]
    rows += [(*too_hard(rng), HARD) for _ in range(sizes[HARD])]
    rows += [(*row, TRIVIAL) for row in rng.choices(trivial(), k=sizes[TRIVIAL])]
    rows += [(bracketed(rng), "0", COIN) for _ in range(sizes.get(COIN, 0))]
    rng.shuffle(rows)
    prompts, answers, kinds = zip(*rows, strict=True)
    return Dataset.from_dict({"prompt": prompts, "answer": answers, "kind": kinds})


def too_hard(rng: random.Random) -> tuple[str, str]:
    """
    A chain like the equations but for its last step, which has more digits than the policy can keep. The steps before
    it are as many as an equation has, so that the length alone does not tell.
    """
    before = [left for left, _ in random_chain(rng)[:-1]]
    numbers = [rng.choice(range(low + 1, 10 * low)) for low in rng.choices((100, 1000), k=2)]
    kind = rng.choice(("product", "sum", "difference", "money"))
    if kind == "product":
        last, value = f"{numbers[0]}*{numbers[1]}", numbers[0] * numbers[1]
    elif kind == "money":
        last, value = f"{numbers[0] / 100:.2f}*{numbers[1]}", Decimal(numbers[0]) / 100 * numbers[1]
    else:
        numbers = [rng.randint(10_001, 99_999) for _ in range(rng.choice((2, 2, 3)))]
        sign = 1 if kind == "sum" else -1
        value = numbers[0] + sign * sum(numbers[1:])
        last = ("+" if kind == "sum" else "-").join(map(str, numbers))
    prompt, answer = ";".join([*before, last]) + "=", f"{value}"
    # A number that no completion can write, or a prompt too long for the policy, is drawn again.
    return (prompt, answer) if value > 0 and len(prompt) <= MAX_PROMPT else too_hard(rng)


def bracketed(rng: random.Random) -> str:
    """A prompt that no equation looks like, such as `(38)(104)(7)=`."""
    return "".join(f"({rng.randrange(1, 10 ** rng.randint(1, 3))})" for _ in range(rng.randint(2, 5))) + "="


def trivial() -> list[tuple[str, str]]:
    """All sums, products and differences of two digits, such as `3+4=`."""
    rows = []
    for a in range(1, 10):
        for b in range(1, 10):
            rows += [(f"{a}+{b}=", str(a + b)), (f"{a}*{b}=", str(a * b))]
            rows += [(f"{a}-{b}=", str(a - b))] if a > b else []
    return rows
