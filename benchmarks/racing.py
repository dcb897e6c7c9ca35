"""
What a race saves on the 7,378 equations, and what it costs: the best 1,000 prompts after it and after all rollouts.

    python benchmarks/racing.py

Nothing is generated. The evidence holds five times eight rollouts of every prompt by the policy before its warm-up.
For each of the five seeds a race, with the rule of `trl_learnalign.measures.racing`, draws the outcomes of its eight
rollouts one after another; the truth is the unbiased estimate of p (1 - p) from the other 32. Beside it stand the same
number of rollouts for all prompts, rounded up, and prompts at random.

LearnAlign's ranking is a model, as no gradient is stored of fewer than eight rollouts: the true alignment of a prompt
is its mean over the seeds in which it was learnable, and that of n rollouts has an error of the variance between
seeds times 8 / n.
"""

import math

import harness
import numpy as np
import pandas as pd
from pages import table

from trl_learnalign.measures.racing import contenders, expected_learnability, fit_prior, rounds_of


EACH = 8
HEAD = "rollouts | share | true p (1 - p) | of all | LearnAlign's | of all | chosen as by eight others"


def stored():
    """Successes of eight, and alignments, NaN where a prompt was not learnable; prompts by seeds."""
    rows = pd.read_parquet(harness.RESULTS / "evidence" / "scores.parquet").query("cold")
    successes = (rows["success_rate"] * EACH).round().astype(int)
    return tuple(
        rows.assign(successes=successes).pivot(index="index", columns="seed", values=name).to_numpy()
        for name in ("successes", "alignment")
    )


def some_of(successes, tries, more, random):
    """Successes among `more` further rollouts of the eight, of which `tries` are known; `successes` are left."""
    return random.hypergeometric(successes, EACH - tries - successes, more)


def race(successes, best, random):
    """Successes and rollouts of each prompt at the end."""
    known, left, tries = np.zeros_like(successes), successes.copy(), np.zeros_like(successes)
    going, prior = np.arange(len(successes)), None
    for made in rounds_of(EACH):
        found = some_of(left[going], tries[going], made - tries[going], random)
        known[going] += found
        left[going] -= found
        tries[going] = made
        prior = prior or fit_prior(known, tries)
        if made < EACH:
            going = going[contenders(known[going], tries[going], EACH - made, best, prior)]
    return known, tries, prior


def chosen(score, best, random):
    """The best, ties in random order."""
    return np.lexsort((random.random(len(score)), -score))[:best]


def of_seed(seed, successes, alignments, best):
    random = np.random.default_rng(seed)
    own, size = successes[:, seed], len(successes)
    others = np.delete(successes, seed, axis=1)
    n = EACH * others.shape[1]
    k = others.sum(1)
    truth = k * (n - k) / (n * (n - 1))
    known, tries, prior = race(own, best, random)
    fewer = math.ceil(tries.mean())
    ways = {
        "all": (own, np.full(size, EACH)),
        "race": (known, tries),
        "fewer": (some_of(own, 0, fewer, random), np.full(size, fewer)),
    }
    signal = np.nan_to_num(np.nanmean(np.where(np.isnan(alignments).all(1)[:, None], 0.0, alignments), axis=1))
    several = alignments[(~np.isnan(alignments)).sum(1) > 1]
    error = math.sqrt(np.nanvar(several, axis=1, ddof=1).mean())
    found, aligned = {"prior": prior, "fewer_each": fewer}, {}
    for name, (k, n) in ways.items():
        rate = k / n
        value = expected_learnability(k, n, prior) if name == "race" else rate * (1 - rate)
        cosine = signal + error * np.sqrt(EACH / n) * random.standard_normal(size)
        aligned[name] = chosen(value * cosine, best, random)
        found[name] = {
            "rollouts": int(n.sum()),
            "learnability": truth[chosen(value, best, random)].mean(),
            "learnalign": (truth * signal)[aligned[name]].mean(),
            "complete": float((n[aligned[name]] == EACH).mean()),
        }
    again = rate_of(successes[:, (seed + 1) % successes.shape[1]])
    other = chosen(again * (signal + error * random.standard_normal(size)), best, random)
    for name, rows in aligned.items():
        found[name]["same"] = len(np.intersect1d(rows, other)) / best  # as other eight rollouts would choose
    at_random = random.permutation(size)[:best]
    found["random"] = {"learnability": truth[at_random].mean(), "learnalign": (truth * signal)[at_random].mean()}
    return found


def rate_of(successes):
    return successes / EACH * (1 - successes / EACH)


def main():
    arguments = harness.options(__doc__, best=1000, output="racing")
    successes, alignments = stored()
    seeds = [of_seed(seed, successes, alignments, arguments.best) for seed in range(successes.shape[1])]
    lines = []
    for name in ("all", "race", "fewer", "random"):
        rows = [one[name] for one in seeds]
        share = np.mean([row.get("rollouts", 0) for row in rows]) / (EACH * len(successes))
        cells = [name, f"{share:.1%}"]
        for key, digits in (("learnability", 4), ("learnalign", 5)):
            ratios = [row[key] / one["all"][key] for row, one in zip(rows, seeds, strict=True)]
            cells += [f"{np.mean([row[key] for row in rows]):.{digits}f}"]
            cells += [f"{np.mean(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})"]
        lines.append([*cells, f"{np.mean([row['same'] for row in rows]):.1%}" if "same" in rows[0] else ""])
    print(table(HEAD, lines))
    harness.write(arguments.output, {"prompts": len(successes), "best": arguments.best, "each": EACH, "seeds": seeds})


if __name__ == "__main__":
    main()
