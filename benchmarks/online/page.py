"""
Collects the runs of run.py, and writes docs/evidence_online.md, its figure, and the table of docs/online.md from
them, so that no number of a table is typed.

    python benchmarks/online/page.py [--runs DIR ...] [--check]

--runs: folders of finished runs, which are added to benchmarks/results/online.json. The words of the page are in
evidence_online.md.in, those of the table in front.md.in.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import results
from figure import ONE, draw
from pages import ROOT, fill, interval, points, publish, table
from results import ARMS, area_gains, end, gains, of, paired, share
from skills import LEVELS, TARGET, TASKS


PAGE = ROOT / "docs" / "evidence_online.md"
FIGURE = ROOT / "docs" / "figures" / "online.png"
TARGET_FIGURE = ROOT / "docs" / "figures" / "online_target.png"
FRONT = (ROOT / "docs" / "online.md",)
MARKS = "<!-- written by benchmarks/online/page.py -->\n", "<!-- end -->\n"
TUNING = ROOT / "benchmarks" / "results" / "online_tuning.json"
ALIGNMENT = ROOT / "benchmarks" / "results" / "online_alignment.json"
RUNS = results.load()
BLIND = "uniform", "learnability", "filter", "online"  # which do not know the target
RIVALS = "mopps", "beta mean", "greso", "pools"
DIRT = {
    "hard-wrong": "wrong answers, 10 %",
    "hard-wrong-30": "wrong answers, 30 %",
    "hard-copies": "near-duplicates, 20 %",
    "hard-noisy": "rewards, 5 % false positives",
}
SHARES = {
    "hard-10": "800 equations, 6,600 too hard, 600 trivial",
    "hard": "the hard pool",
    "hard-50": "4,800 equations, 2,000 too hard, 1,200 trivial",
    "clean": "all equations, after a warm-up",
    "live": "equations that are live at the start",
    "hard-small": "the small pool",
    "mastered": "2,000 equations, 6,000 trivial",
    "skills": "many skills",
}
ABLATIONS = {  # and what each is compared with
    "online without features": "online",
    "online without fading": "online",
    "online without longer rests": "online",
    "online with reviews": "online",
    "online with reviews without fading": "online with reviews",
}
NAMES = SHARES | DIRT | {"skills-target": "the target"}
GOALS = [  # live groups against uniform (None: no goal), rollouts to uniform's end
    ("hard", 2.5, 1 / 3, "the hard pool"),
    ("hard-10", None, 1 / 3, "a tenth live"),
    ("hard-small", None, 1 / 3, "the small pool"),
    ("skills", None, 1 / 3, "many skills"),
    ("clean", 1.2, 1 / 1.5, "all equations, after a warm-up"),
]
REFILL_GOAL = 0.35  # of refill's rollouts, to its final success


def percent(values) -> str:
    """The mean of shares."""
    return f"{100 * fmean(values):.1f}"


def needed(found) -> str:
    """A share of rollouts."""
    return "never" if found is None else f"{100 * found:.0f} %"


def tokens(run) -> float:
    """That a run generated, those of a selection among them."""
    return run["rollouts"] * run["completion_length"]


def of_target(run) -> float:
    """The share of training that was of the tasks that the test asks for."""
    names = [task.name for task in TASKS]
    return sum(sum(run["kinds"][LEVELS * place :][:LEVELS]) for place in map(names.index, TARGET)) / sum(run["kinds"])


def arms(pool) -> str:
    """A row for each arm."""
    rows = []
    for arm, name in ARMS.items():
        runs, pairs = of(RUNS, pool, arm), paired(RUNS, pool, arm)
        if not runs:
            continue
        rows.append(
            [
                name,
                str(len(runs)),
                percent(run["live_share"] for run in runs),
                percent(end(run) for run in runs),
                "" if arm == "uniform" else points(gains(pairs)),
                "" if arm == "uniform" else points(area_gains(pairs)),
                needed(share(pairs)).removesuffix(" %"),
                percent(end(run, "pass@8") for run in runs),
                f"{fmean(run['distinct'] for run in runs):,.0f}",
                f"{fmean(end(run, 'length') for run in runs):.1f}",
                percent(tokens(run) / tokens(other) for run, other in pairs) if pairs else "",
                *([percent(map(of_target, runs))] if pool == "skills-target" else []),
            ]
        )
    return table(
        "prompts chosen by | seeds | live groups of training, % | success at the end, % | over random prompts, "
        "points | the same, mean over the run | rollouts to the end of random prompts, % | pass@8, % | "
        "distinct prompts of training | length, tokens | tokens generated, % of random prompts'"
        + (" | of the target, %" if pool == "skills-target" else ""),
        rows,
    )


def tables() -> dict[str, str]:
    """The table of each pool, by its name with underscores."""
    return {pool.replace("-", "_"): arms(pool) for pool in results.POOLS if of(RUNS, pool, "uniform")}


def dirt() -> str:
    """Who trains on wrong labels, and how many suspects have one."""
    rows = []
    for pool, name in DIRT.items():
        for run, uniform in paired(RUNS, pool, "online"):
            found = run.get("suspects", {})
            dirty = pool != "hard-noisy"  # where every prompt is
            rows.append(
                [
                    f"{name}, seed {run['seed']}",
                    f"{8 * run['wrong']:,} ({8 * uniform['wrong']:,})" if dirty else "",
                    f"{100 * end(run):.1f} ({100 * end(uniform):.1f})",
                    ", ".join(f"{right} of the first {first}" for first, right in found.items())
                    if "wrong" in pool
                    else "",
                ]
            )
    return table(
        "pool | rollouts on such prompts, online (random prompts) | success at the end, %, online (random prompts) | "
        "suspects that are wrong",
        rows,
    )


def by_share() -> str:
    """What choosing online brings, by how much of a pool is live."""
    rows = []
    for pool, name in SHARES.items():
        pairs = paired(RUNS, pool, "online")
        if pairs:
            rows.append(
                [
                    name,
                    str(len(pairs)),
                    percent(other["live_share"] for _, other in pairs),
                    times_live(pool),
                    points(gains(pairs)),
                    points(area_gains(pairs)),
                    needed(share(pairs)),
                ]
            )
    return table(
        "pool | seeds | live groups of random prompts, % | of online, times as many | success at the end, points "
        "over random prompts | the same, mean over the run | rollouts to their end",
        rows,
    )


def ablations() -> str:
    """What online loses or gains without a part, or with one more."""
    rows = []
    for arm, other in ABLATIONS.items():
        for pool in results.POOLS:
            pairs = paired(RUNS, pool, arm, other)
            if pairs:
                labels = [ARMS[arm], ARMS[other], NAMES[pool]]
                row = [*labels, str(len(pairs)), points(gains(pairs)), points(area_gains(pairs))]
                parts = [f"{fmean(part['distinct'] for part in runs):,.0f}" for runs in zip(*pairs, strict=True)]
                rows.append(
                    [*row, *(percent(run["live_share"] for run in runs) for runs in zip(*pairs, strict=True)), *parts]
                )
    return table(
        "prompts chosen by | compared with | pool | seeds | success at the end, points over the other | the same, "
        "mean over the run | live groups, % | of the other, % | distinct prompts | of the other",
        rows,
    )


def skill_differences(arm="online", pool="skills") -> list[float]:
    """Of every skill the points by which an arm ends above uniform draws, means over seeds."""
    differences = [
        [100 * (a - b) for a, b in zip(run["looks"][-1]["tasks"], other["looks"][-1]["tasks"], strict=True)]
        for run, other in paired(RUNS, pool, arm)
    ]
    return [fmean(part) for part in zip(*differences, strict=True)]


def by_skill() -> str:
    """Where each skill begins and ends, means over seeds."""
    known = [arm for arm in ("uniform", "online", "online with groups") if of(RUNS, "skills", arm)]
    rows = []
    for place, task in enumerate(TASKS):
        found = [run["looks"][0] for run in of(RUNS, "skills", "uniform")]
        parts = [found] + [[run["looks"][-1] for run in of(RUNS, "skills", arm)] for arm in known]
        rows.append([task.name, *(percent(look["tasks"][place] for look in part) for part in parts)])
    return table(" | ".join(["skill", "at the start, %", *(ARMS[arm] for arm in known)]), rows)


def bars() -> str:
    """The goals that were set before, and whether they are met."""
    rows = []
    for pool, factor, most, name in GOALS:
        pairs = paired(RUNS, pool, "online")
        ratio = fmean(run["live_share"] / uniform["live_share"] for run, uniform in pairs)
        taken, gained = share(pairs), gains(pairs)
        upper = (interval(gained) or (0, fmean(gained)))[1]  # not below by more than the interval
        met = factor is None or ratio >= factor, taken is not None and taken <= most, upper >= 0
        texts = (
            f"{'' if factor is None else f'>= {factor} x: '}{ratio:.2f}",
            f"<= {100 * most:.0f} %: {needed(taken)}",
            f"not below: {points(gained)} points",
        )
        met = [("met" if good else "missed") for good in met]
        if factor is None:
            met[0] = "no goal"
        rows.append([name, str(len(pairs)), *(f"{text} ({word})" for text, word in zip(texts, met, strict=True))])
    return table(
        "pool | seeds | live groups against random prompts | rollouts to their end | success at the end", rows
    )


def gain(pool) -> str:
    """For the table."""
    return f"{points(gains(paired(RUNS, pool, 'online')))} points"


def times_live(pool) -> str:
    """How many times as many live groups."""
    return f"{fmean(run['live_share'] / other['live_share'] for run, other in paired(RUNS, pool, 'online')):.1f}"


def more_bars() -> str:
    """The goals of other kinds."""
    live, wrong = paired(RUNS, "live", "online"), paired(RUNS, "hard-wrong", "online")
    paid = fmean(run["wrong"] / other["wrong"] for run, other in wrong)
    found = [(right, int(number)) for number, right in (list(run["suspects"].items())[-1] for run, _ in wrong)]
    right = ", ".join(f"{good} of {number}" for good, number in found)
    close = all(abs(gained) <= 1 for gained in gains(live))
    refill = share(paired(RUNS, "hard", "online", "refill"))
    ahead = {arm: gains(paired(RUNS, "skills-target", "target", arm)) for arm in BLIND}
    first = all((interval(found) or (min(found), 0))[0] > 0 for found in ahead.values())
    rows = [
        ["every prompt live", "the same success", f"{points(gains(live))} points", close],
        ["", "uniform draws", uniform_live(), all(_same(*pair) for pair in live)],
        [
            "the hard pool",
            f"refill's success after {100 * REFILL_GOAL:.0f} % of its rollouts",
            needed(refill),
            refill is not None and refill <= REFILL_GOAL,
        ],
        ["a tenth of the labels wrong", "no more rollouts on them", f"{paid:.2f} x", paid <= 1],
        [
            "",
            "half of the 800 wrong labels are suspects",
            f"suspects that are wrong: {right}",
            all(good >= 400 for good, _ in found),
        ],
        [
            "a target",
            "selection by the target ahead of every other, with intervals above 0",
            "; ".join(f"{points(found)} points over {ARMS[arm]}" for arm, found in ahead.items()),
            first,
        ],
    ]
    rows = [[*texts, "met" if good else "missed"] for *texts, good in rows]
    return table("pool | goal | measured | ", rows)


def more_verdicts() -> str:
    """What came of the ways that were named before the runs on the other testbeds."""
    few, half = (gains(paired(RUNS, pool, "online")) for pool in ("hard-10", "hard-50"))
    dirty = {name: gains(paired(RUNS, pool, "online")) for pool, name in DIRT.items() if paired(RUNS, pool, "online")}
    small = min((_over(arm, "hard-small") for arm in RIVALS if of(RUNS, "hard-small", arm)), key=_worst)
    skills, differences = gains(paired(RUNS, "skills", "online")), skill_differences()
    worst = min(differences)
    lines = [
        (
            min(few) <= 0 or fmean(half) < 0,
            f"{points(few)} points with a tenth of the prompts live, {points(half)} points with half of them",
        ),
        (small[0], f"{small[1]}. Over random prompts: {points(gains(paired(RUNS, 'hard-small', 'online')))} points"),
        (
            any(fmean(found) < 0 for found in dirty.values()),
            "; ".join(f"{name}: {points(found)} points" for name, found in dirty.items()),
        ),
        (
            fmean(skills) < 0 or worst <= -10,
            f"{points(skills)} points; `{TASKS[differences.index(worst)].name}`, the skill that compares worst, ends "
            f"{-worst:.1f} points below random prompts",
        ),
        min(
            (_over(arm, "skills-target", "target") for arm in BLIND),
            key=_worst,
        ),
    ]
    return _answers(lines, 6)


def _same(run, uniform) -> bool:
    """Whether a run was the uniform one: it never chose."""
    return run["distinct"] == uniform["distinct"] and end(run) == end(uniform)


def uniform_live() -> str:
    """Of the runs on prompts that are all live."""
    pairs = paired(RUNS, "live", "online")
    return f"{sum(_same(*pair) for pair in pairs)} of {len(pairs)} runs never chose"


def verdicts() -> str:
    """What came of each of the five ways in which it could have been shown not to be worth having."""
    hard, clean = gains(paired(RUNS, "hard", "online")), gains(paired(RUNS, "clean", "online"))
    low, taken = (interval(hard) or (min(hard), 0))[0], share(paired(RUNS, "hard", "online"))
    lines = [
        (
            low <= 0 or taken is None or taken > 2 / 3,
            f"{points(hard)} points over random prompts, whose final success takes {needed(taken)} of the rollouts",
        ),
        _over("refill"),
        (fmean(clean) < 0, f"{points(clean)} points"),
        min((_over(arm) for arm in RIVALS if paired(RUNS, "hard", "online", arm)), key=_worst),
        _over("online without features"),
    ]
    return _answers(lines, 1)


def _worst(answer):
    """Arms that one does not end above come first, then those with the least difference."""
    return not answer[0], answer[2]


def _answers(lines, first) -> str:
    """A numbered list of answers, from (so, text, ...)."""
    return "\n".join(
        f"{number}. **{'Failed' if so else 'Passed'}**: {text}." for number, (so, text, *_) in enumerate(lines, first)
    )


def _over(arm, pool="hard", one="online"):
    """Whether an arm does not end above another one on a pool, what is said of it, and the mean difference."""
    found = gains(paired(RUNS, pool, one, arm))
    around = interval(found)
    so = (around[0] if around else min(found)) <= 0
    return (
        so,
        f"{ARMS[one]} ends {points(found)} points above {ARMS[arm]} "
        f"({len(found)} {'seeds' if len(found) > 1 else 'seed'})",
        fmean(found),
    )


def outcome() -> str:
    """The first sentence of the page."""
    hard = paired(RUNS, "hard", "online")
    clean, skills, small = (points(gains(paired(RUNS, pool, "online"))) for pool in ("clean", "skills", "hard-small"))
    return (
        f"On a pool of which a quarter can be learnt, prompts chosen online end {points(gains(hard))} points above "
        f"random ones after equally many rollouts, with {times_live('hard')} times as many live groups, and are where "
        f"these end after {needed(share(hard))} of the rollouts. On clean equations, of which nearly half are live, "
        f"it is {clean} points, on many skills {skills} and on a small pool {small}: there choosing does not pay."
    )


def tuning() -> str:
    """What was tried on the first two seeds."""
    rows = [
        [
            run["what"],
            f"{run['pool']}, {'seeds' if len(run['seeds']) > 1 else 'seed'} {' and '.join(map(str, run['seeds']))}",
            *(", ".join(f"{100 * value:.1f}" for value in run[name]) for name in ("live", "end")),
            ", ".join(f"{value:,}" for value in run["distinct"]),
        ]
        for run in json.loads(TUNING.read_text(encoding="utf-8"))["runs"]
    ]
    return table(
        "after a visit a prompt rests for | pool | live groups, % | success at the end, % | distinct prompts", rows
    )


def alignment() -> str:
    """How much of the alignments of other prompts features explain."""
    rows = [
        [
            name,
            f"{found['learnable']:,}",
            *(f"{value:.2f}" for value in [*found["explained"].values(), found["other_seed"]]),
        ]
        for name, found in json.loads(ALIGNMENT.read_text(encoding="utf-8")).items()
    ]
    return table(
        "policy | learnable prompts | from 300 | from 1,000 | from 3,000 | correlation between two seeds", rows
    )


def names() -> dict:
    """What the templates may say."""
    pools = {pool.replace("-", "_"): pool for pool in results.POOLS if paired(RUNS, pool, "online")}
    return {
        "outcome": outcome,
        "verdicts": verdicts,
        "more_verdicts": more_verdicts,
        "by_share": by_share,
        "ablations": ablations,
        "by_skill": by_skill,
        "bars": bars,
        "more_bars": more_bars,
        "dirt": dirt,
        "tuning": tuning,
        "alignment": alignment,
        "uniform_live": uniform_live,
        "table": tables(),
        "gain": {name: gain(pool) for name, pool in pools.items()},
        "share": {name: needed(share(paired(RUNS, pool, "online"))) for name, pool in pools.items()},
        "times_live": {name: times_live(pool) for name, pool in pools.items()},
    }


def front(path, known) -> str:
    """The page with its table as the results have it."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    template = (HERE / "front.md.in").read_text(encoding="utf-8")
    return before + MARKS[0] + "\n" + fill(template, known) + "\n" + MARKS[1] + after


def figures():
    """Of the hard pools, and of the target."""
    draw(RUNS, FIGURE)
    draw(RUNS, TARGET_FIGURE, ONE)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, default=[])
    parser.add_argument("--check", action="store_true", help="only whether the pages are what the results say")
    arguments = parser.parse_args()
    if arguments.runs:
        results.collect(arguments.runs)
        RUNS[:] = results.load()
    known = names()
    pages = {PAGE: fill((HERE / "evidence_online.md.in").read_text(encoding="utf-8"), known)}
    pages |= {path: front(path, known) for path in FRONT}
    publish(pages, "benchmarks/online/page.py", after=figures)


if __name__ == "__main__":
    main()
