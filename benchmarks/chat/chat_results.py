"""
What the runs of a real chat model came to.

    python benchmarks/chat/chat_results.py [--runs DIR ...] [--alone] [--unfinished] [--collect]

prints, for each pool, what each arm reached on the questions held out, with differences to random prompts (paired by
seed; 95 % intervals by Student's t from three pairs on), where its rollouts went, and what its steps were like, from
the finished runs of run.py in these folders, and those that are kept in benchmarks/results/chat.json, unless --alone
is given; with --unfinished from those that are under way, too, as far as they have come. With --collect finished runs
are added to that file.
"""

import json
import sys
from pathlib import Path
from statistics import fmean


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import numpy as np
from pages import columns, table
from questions import GUESSED, KINDS, POOLS, SHARES
from results import costs, end, gains, merged, of, over, rates


FILE = harness.RESULTS / "chat.json"
GROUP = 8
ARMS = {
    "random": "random prompts",
    "refill": "refill (DAPO)",
    "online": "online, learnability alone",
    "learnalign-online": "LearnAlign online",
    "learnalign-online-without-quick-fit": "LearnAlign online, success fitted once",
    "learnalign-online-without-kinds": "LearnAlign online, kinds do not count",
    "online-in-proportion": "learnability alone, in proportion",
    "learnalign-online-on-top": "LearnAlign online, the best alone",
}


def read(folder: Path) -> dict:
    """Read a run of run.py: looks, and of each half of the steps the groups and the live groups of each kind."""
    looks, steps = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("looks", "steps")
    )
    halves: dict = {"groups": [], "live": []}
    for half in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        kinds = np.array([kind for step in half for kind in step["kinds"]], int)
        live = np.array([0 < number < GROUP for step in half for number in step["successes"]], bool)
        halves["groups"].append(np.bincount(kinds, minlength=len(KINDS)).tolist())
        halves["live"].append(np.bincount(kinds[live], minlength=len(KINDS)).tolist())
    found = {"looks": looks, "steps": len(steps), "halves": halves}
    found["update_norm"] = round(fmean(step["update_norm"] for step in steps), 4)
    for name in ("seconds", "tokens"):
        if all(name in step for step in steps):  # runs of before lack the tokens
            found[name] = round(sum(step[name] for step in steps))
    conditions = harness.read(folder / "done.json")
    if conditions is not None:
        logged = conditions.pop("logged")
        found["grad_norm"] = round(fmean(value for value in logged["grad_norm"] if value is not None), 4)
        found["entropy"] = round(fmean(logged["entropy"][-10:]), 4)
        found["conditions"] = conditions
    return found


def load(folders=(), unfinished=False, kept=True) -> list[dict]:
    """Read the runs in these folders, and those that are `kept` and not there: by pool, arm and seed."""
    more = []
    for folder in sorted(one for runs in folders for one in runs.glob("*/*-*")):
        steps, pool = folder / "steps.jsonl", folder.parent.name
        if steps.is_file() and steps.stat().st_size and pool in POOLS:
            arm, seed = folder.name.rsplit("-", 1)
            run = {"pool": pool, "arm": arm, "seed": int(seed)} | read(folder)
            if unfinished or "conditions" in run:
                more.append(run)
    return merged(harness.read(FILE, {"runs": []})["runs"] if kept else [], more, POOLS, ARMS)


def by_kind(run) -> dict[str, float]:
    """Return success on the questions held out of each kind, at the last look."""
    return {kind: rate for kind, rate in run["looks"][-1].items() if kind in KINDS}


def over_run(run) -> float:
    """Return mean success over all looks but the first."""
    return fmean(rates(run)[1:])


def on_guesses(run) -> float:
    """Return the share of the rollouts that went to questions that can only be guessed."""
    groups = np.sum(run["halves"]["groups"], axis=0)
    return float(groups[[KINDS.index(kind) for kind in GUESSED]].sum() / groups.sum())


def counts(runs, name) -> np.ndarray:
    """Return the groups, or the live ones, of each kind in each half of these runs, shape (2, kinds)."""
    total = np.zeros((2, len(KINDS)), int)
    for run in runs:
        kept = np.array(run["halves"][name])
        total[:, : kept.shape[1]] += kept  # of the kinds that there were then
    return total


def tables(runs, pool) -> list[str]:
    """
    Return four tables of a pool, a row for each arm, means over the seeds: success at each look, success by kind at
    the end, the share of each kind of the rollouts in the second half (and how many groups were live), and what steps
    were like.
    """
    arms = [*dict.fromkeys(run["arm"] for run in runs if run["pool"] == pool)]
    own = {arm: of(runs, pool, arm) for arm in arms}
    looks = max((run["looks"] for runs in own.values() for run in runs), key=len)

    def step(arm, place):
        found = [*zip(*map(rates, own[arm]), strict=False)][place : place + 1]
        return f"{fmean(found[0]):.3f}" if found else ""

    def mean(arm, name):
        values = [run[name] for run in own[arm] if name in run]
        return f"{fmean(values):.2f}" if values else ""

    def live(arm, half):
        return f"{counts(own[arm], 'live')[half].sum() / counts(own[arm], 'groups')[half].sum():.2f}"

    def in_kind(arm, kind):
        groups, live = (counts(own[arm], name)[1] for name in ("groups", "live"))
        return f"{groups[kind] / groups.sum():.2f} ({live[kind] / groups[kind]:.2f})" if groups[kind] else "0.00"

    def more(arm, value):
        return over(runs, pool, arm, "random", lambda both: gains(both, 1, value), ".3f")

    names = {"prompts chosen by": lambda arm: ARMS.get(arm, arm)}
    success = names | {"seeds": lambda arm: ", ".join(str(run["seed"]) for run in own[arm])}
    success |= {f"step {look['step']}": lambda arm, n=n: step(arm, n) for n, look in enumerate(looks)}
    success["over random at the end"] = lambda arm: more(arm, end)
    success["mean over the run"] = lambda arm: more(arm, over_run)
    success |= costs(own.get)
    kinds = names | {
        kind: lambda arm, kind=kind: f"{fmean(by_kind(run)[kind] for run in own[arm]):.2f}"
        for kind in by_kind(own[arms[0]][0])
    }
    total, learnt = sum(POOLS[pool].values()), [k for k, kind in enumerate(KINDS) if kind in SHARES]
    shares = [["the pool", *(f"{number / total:.2f}" for number in POOLS[pool].values())]]
    shares += [[ARMS.get(arm, arm), *(in_kind(arm, KINDS.index(kind)) for kind in POOLS[pool])] for arm in arms]
    steps = names | {
        "live groups, first half": lambda arm: live(arm, 0),
        "second half": lambda arm: live(arm, 1),
        "rollouts on guesses": lambda arm: f"{fmean(map(on_guesses, own[arm])):.2f}",
        "live and no guess": lambda arm: "{:.2f}".format(
            counts(own[arm], "live")[:, learnt].sum() / counts(own[arm], "groups").sum()
        ),
        "norm of an update": lambda arm: mean(arm, "update_norm"),
        "of a gradient": lambda arm: mean(arm, "grad_norm"),
        "entropy at the end, nats a token": lambda arm: mean(arm, "entropy"),
        "KL to the start, nats a token": lambda arm: f"{fmean(end(run, 'kl') for run in own[arm]):.2f}",
    }
    first, second, last = (columns(labels, arms) for labels in (success, kinds, steps))
    return [first, second, table(["prompts chosen by", *POOLS[pool]], shares), last]


def main():
    options = harness.options(__doc__, runs=[Path("runs/chat")], unfinished=False, alone=False, collect=False)
    found = load(options.runs, options.unfinished, kept=not options.alone)
    heads = "success on questions held out", "success by kind at the last look"
    heads += "share of the rollouts in the second half (live)", "steps"
    for pool in dict.fromkeys(run["pool"] for run in found):
        print(f"## {pool}\n")
        for head, text in zip(heads, tables(found, pool), strict=True):
            print(f"{head}\n\n{text}\n")
    if options.collect:
        harness.write(FILE, {"runs": [run for run in found if "conditions" in run]})


if __name__ == "__main__":
    main()
