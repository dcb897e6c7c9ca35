"""
Trains the policy that the runs on many skills start from, a character model from scratch.

    python benchmarks/online/skills_policy.py [--output_dir runs/online/skills-policy]

Half an hour on one core; a policy that is there already is left as it is.

First it practises the easier levels with right answers. Then, for a short while, with answers many of which are wrong:
half of these by a slip that is the same for all answers of a task (of two pairs of tasks it is the same slip), half by
a character at random. Tasks differ in how many are wrong; some are right throughout. So at the start some skills are
mastered, others succeed now and then and have something to unlearn, and the harder levels are out of reach. Prompts of
the pool and of the test may be among those that are practised: a skill that was practised is what training is to bring
back.
"""

import json
import random
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from harness import options
from policies import successes
from skills import CHARACTERS, LEVELS, TASKS, exact_reward, examples, split
from train_tiny_policy import build_model, build_tokenizer, fit, save


PRACTICE = (4, 3, 1, 0)  # how often each level comes
KEPT = 20_000  # different examples of a task and level to practise with
# How many of the practised answers of a task are wrong in the second phase, of others none; more at higher levels
WRONG = {"gcd": 0.6, "count_bits": 0.5, "simple_equations": 0.6, "number_sequence": 0.5, "base_conversion": 0.5}
WRONG |= {"prime_factorization": 0.5, "decimal_chain_sum": 0.4, "complex_arithmetic": 0.5}
WRONG["fraction_simplification"] = 0.6
MORE = 0.15  # wrong answers for each level
CLASSES = "0123456789", "abcdefghijklmnopqrstuvwxyz"


def spoilt(answer: str, number: int, rng: random.Random) -> str:
    """The answer with a wrong character: by the slip of the task `number`, or somewhere at random."""
    places = [place for place, char in enumerate(answer) if char.isalnum()]
    slip = rng.random() < 0.5
    place = places[-1] if slip else rng.choice(places)
    chars = next(chars for chars in CLASSES if answer[place] in chars)
    step = 1 + number % 8 if slip else rng.randrange(1, len(chars))
    return answer[:place] + chars[(chars.index(answer[place]) + step) % len(chars)] + answer[place + 1 :]


def practice_rows(seed: int, kept: int) -> dict[tuple[int, int], list]:
    """Of every task and practised level different (prompt, answer) pairs."""
    rows = {}
    for number, task in enumerate(TASKS):
        for level in range(LEVELS):
            if PRACTICE[level]:
                found = {}
                for tried, (prompt, answer) in enumerate(examples(task, level, seed + 100 + level)):
                    found[prompt] = answer
                    if len(found) == kept or tried == 2 * kept:
                        break
                rows[number, level] = list(found.items())
    return rows


def batches(rows, tokenizer, size, wrong, rng, count=50):
    """`count` batches of token ids and labels, prompts of like length together; the loss is on answers only."""
    cells = [(number, level) for number, level in rows]
    drawn = []
    for number, level in rng.choices(cells, [PRACTICE[level] for _, level in cells], k=size * count):
        prompt, answer = rng.choice(rows[number, level])
        share = wrong and WRONG.get(TASKS[number].name)
        if share and rng.random() < share + MORE * level:
            answer = spoilt(answer, number, rng)
        ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
        drawn.append((ids, len(prompt)))
    drawn.sort(key=lambda row: len(row[0]))
    parts = [drawn[first : first + size] for first in range(0, len(drawn), size)]
    rng.shuffle(parts)
    for part in parts:
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in part])
        labels = torch.tensor([[-100] * begin + ids[begin:] + [-100] * (width - len(ids)) for ids, begin in part])
        yield ids, labels


def train(model, tokenizer, rows, steps, rate, wrong, size, seed):
    rng = random.Random(seed)

    def after_step(step, loss, seconds):
        if step % 250 == 0:
            print(f"step {step}, loss {loss.item():.3f}, {seconds:.0f} s", flush=True)

    fit(model, lambda: batches(rows, tokenizer, size, wrong, rng), steps, rate, after_step)


def print_start(model, tokenizer, rows):
    rates = torch.tensor(successes(model, tokenizer, rows, 8, exact_reward)[0]).mean(1)
    tasks, levels = torch.tensor(rows["task"]), torch.tensor(rows["level"])

    def shares(rates):
        return [round(float(part.float().mean()), 3) for part in (rates, rates == 1, (rates > 0) & (rates < 1))]

    print("success, always, live:", *shares(rates))
    for number, task in enumerate(TASKS):
        print(task.name, *(shares(rates[(tasks == number) & (levels == level)]) for level in range(LEVELS)))


def main():
    sizes = {"batch_size": 128, "steps": 5000, "rate": 3e-3, "wrong_steps": 300, "wrong_rate": 1e-3, "seed": 0}
    arguments = options(__doc__, output_dir=Path("runs/online/skills-policy"), **sizes)
    if (arguments.output_dir / "config.json").is_file():
        return print(f"'{arguments.output_dir}' has a policy already.")
    torch.manual_seed(arguments.seed)
    tokenizer = build_tokenizer(CHARACTERS)
    rows = practice_rows(arguments.seed, KEPT)
    sizes = {f"{TASKS[number].name} {level}": len(found) for (number, level), found in rows.items()}
    print("different examples:", json.dumps(sizes), flush=True)
    model, size, seed = build_model(tokenizer, 128, 4), arguments.batch_size, arguments.seed
    train(model, tokenizer, rows, arguments.steps, arguments.rate, False, size, seed)
    torch.manual_seed(seed)
    train(model, tokenizer, rows, arguments.wrong_steps, arguments.wrong_rate, True, size, seed + 1)
    save(model, tokenizer, arguments.output_dir)
    print_start(model, tokenizer, split("skills")[1])


if __name__ == "__main__":
    main()
