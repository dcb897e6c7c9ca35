"""
Collects the runs of run.py, and writes docs/evidence_online.md, its figure, and the table of docs/online.md from
them, so that no number of a table is typed.

    python benchmarks/online/page.py [--runs DIR ...] [--check]

--runs: folders of finished runs, which are added to benchmarks/results/online.json. The words of the page are in
evidence_online.md.in, those of the table in front.md.in.
"""

import sys
from functools import partial
from pathlib import Path
from statistics import fmean


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import harness
import results
from drawing import FIGURES, FRONT, ONE, draw_pools
from harness import RESULTS, ROOT
from pages import between, bounds, columns, fill, interval, points, publish, table
from results import ARMS, area_gains, costs, end, gains, of, share, tokens, took
from skills import LEVELS, TARGET, TASKS


PAGE, ONLINE = ROOT / "docs" / "evidence_online.md", ROOT / "docs" / "online.md"
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


def pairs(pool, arm="online", other="uniform") -> list:
    return results.paired(RUNS, pool, arm, other)


def percent(values) -> str:
    """The mean of shares."""
    return f"{100 * fmean(values):.1f}"


def live(runs) -> str:
    return percent(run["live_share"] for run in runs)


def distinct(runs) -> str:
    return f"{fmean(run['distinct'] for run in runs):,.0f}"


def needed(found) -> str:
    """A share of rollouts."""
    return "never" if found is None else f"{100 * found:.0f} %"


def of_target(run) -> float:
    """The share of training that was of the tasks that the test asks for."""
    names = [task.name for task in TASKS]
    return sum(sum(run["kinds"][LEVELS * place :][:LEVELS]) for place in map(names.index, TARGET)) / sum(run["kinds"])


def arms(pool) -> str:
    """A row for each arm."""
    runs = {arm: of(RUNS, pool, arm) for arm in ARMS}
    both = {arm: pairs(pool, arm) for arm in ARMS}

    labels = {
        "prompts chosen by": ARMS.get,
        "seeds": lambda arm: len(runs[arm]),
        "live groups of training, %": lambda arm: live(runs[arm]),
        "success at the end, %": lambda arm: percent(map(end, runs[arm])),
        "over random prompts, points": lambda arm: results.over(RUNS, pool, arm),
        "the same, mean over the run": lambda arm: results.over(RUNS, pool, arm, found=area_gains),
        "rollouts to the end of random prompts, %": lambda arm: needed(share(both[arm])).removesuffix(" %"),
        "pass@8, %": lambda arm: percent(end(run, "pass@8") for run in runs[arm]),
        "distinct prompts of training": lambda arm: distinct(runs[arm]),
        "length, tokens": lambda arm: f"{fmean(end(run, 'length') for run in runs[arm]):.1f}",
        "tokens generated, % of random prompts'": lambda arm: percent(tokens(a) / tokens(b) for a, b in both[arm]),
    }
    labels |= costs(runs.get)
    if pool == "skills-target":
        labels["of the target, %"] = lambda arm: percent(map(of_target, runs[arm]))
    return columns(labels, [arm for arm in ARMS if runs[arm]])


def dirt() -> str:
    """Who trains on wrong labels, and how many suspects have one."""

    def on_dirt(pool, run, other):  # in hard-noisy every prompt is dirty
        return "" if pool == "hard-noisy" else f"{8 * run['wrong']:,} ({8 * other['wrong']:,})"

    def suspects(run):
        return ", ".join(f"{right} of the first {first}" for first, right in run.get("suspects", {}).items())

    labels = {
        "pool": lambda row: f"{DIRT[row[0]]}, seed {row[1]['seed']}",
        "rollouts on such prompts, online (random prompts)": lambda row: on_dirt(*row),
        "success at the end, %, online (random prompts)": lambda row: "{:.1f} ({:.1f})".format(
            *(100 * end(run) for run in row[1:])
        ),
        "suspects that are wrong": lambda row: suspects(row[1]) if "wrong" in row[0] else "",
    }
    labels |= costs(lambda row: row[1:2], ", online") | costs(lambda row: row[2:], ", random prompts")
    return columns(labels, [(pool, *pair) for pool in DIRT for pair in pairs(pool)])


def by_share() -> str:
    """What choosing online brings, by how much of a pool is live."""
    labels = {
        "pool": SHARES.get,
        "seeds": lambda pool: len(pairs(pool)),
        "live groups of random prompts, %": lambda pool: live(other for _, other in pairs(pool)),
        "of online, times as many": lambda pool: times_live(pool),
        "success at the end, points over random prompts": lambda pool: points(gains(pairs(pool))),
        "the same, mean over the run": lambda pool: points(area_gains(pairs(pool))),
        "rollouts to their end": lambda pool: needed(share(pairs(pool))),
    }
    for place, whose in enumerate((", online", ", random prompts")):
        labels |= costs(lambda pool, place=place: [pair[place] for pair in pairs(pool)], whose)
    return columns(labels, [pool for pool in SHARES if pairs(pool)])


def ablations() -> str:
    """What online loses or gains without a part, or with one more."""
    cells = [(arm, other, pool) for arm, other in ABLATIONS.items() for pool in results.POOLS]
    rows = [(*cell, pairs(cell[2], *cell[:2])) for cell in cells if pairs(cell[2], *cell[:2])]
    labels = {
        "prompts chosen by": lambda row: ARMS[row[0]],
        "compared with": lambda row: ARMS[row[1]],
        "pool": lambda row: NAMES[row[2]],
        "seeds": lambda row: len(row[3]),
        "success at the end, points over the other": lambda row: points(gains(row[3])),
        "the same, mean over the run": lambda row: points(area_gains(row[3])),
        "live groups, %": lambda row: live(run for run, _ in row[3]),
        "of the other, %": lambda row: live(run for _, run in row[3]),
        "distinct prompts": lambda row: distinct(run for run, _ in row[3]),
        "of the other": lambda row: distinct(run for _, run in row[3]),
    }
    for place, whose in enumerate(("", ", of the other")):
        labels |= costs(lambda row, place=place: [pair[place] for pair in row[3]], whose)
    return columns(labels, rows)


def skill_differences() -> list[float]:
    """Of every skill the points by which online ends above uniform draws, means over seeds."""
    both = [[run["looks"][-1]["tasks"] for run in pair] for pair in pairs("skills")]
    return [
        fmean(part) for part in zip(*([100 * (a - b) for a, b in zip(*x, strict=True)] for x in both), strict=True)
    ]


def by_skill() -> str:
    """Where each skill begins and ends, means over seeds."""

    def success(arm, at, place):
        return percent(run["looks"][at]["tasks"][place] for run in of(RUNS, "skills", arm))

    labels = {"skill": lambda place: TASKS[place].name, "at the start, %": partial(success, "uniform", 0)}
    for arm in ("uniform", "online", "online with groups"):
        if of(RUNS, "skills", arm):
            labels[ARMS[arm]] = partial(success, arm, -1)
    return columns(labels, range(len(TASKS)))


def bars() -> str:
    """The goals that were set before, and whether they are met."""
    rows = []
    for pool, factor, most, name in GOALS:
        both = pairs(pool)
        ratio = fmean(run["live_share"] / uniform["live_share"] for run, uniform in both)
        taken, gained = share(both), gains(both)
        upper = (interval(gained) or (0, fmean(gained)))[1]  # not below by more than the interval
        goals = (
            (f"{'' if factor is None else f'>= {factor} x: '}{ratio:.2f}", factor is None or ratio >= factor),
            (f"<= {100 * most:.0f} %: {needed(taken)}", taken is not None and taken <= most),
            (f"not below: {points(gained)} points", upper >= 0),
        )
        words = ["met" if good else "missed" for _, good in goals]
        words[0] = "no goal" if factor is None else words[0]
        rows.append(
            [name, str(len(both)), *(f"{text} ({word})" for (text, _), word in zip(goals, words, strict=True))]
        )
    return table(
        "pool | seeds | live groups against random prompts | rollouts to their end | success at the end", rows
    )


def gain(pool, arm="online", other="uniform") -> str:
    return f"{points(gains(pairs(pool, arm, other)))} points"


def times_live(pool) -> str:
    """How many times as many live groups."""
    return f"{fmean(run['live_share'] / other['live_share'] for run, other in pairs(pool)):.1f}"


def more_bars() -> str:
    """The goals of other kinds."""
    wrong = pairs("hard-wrong")
    paid = fmean(run["wrong"] / other["wrong"] for run, other in wrong)
    found = [(right, int(number)) for number, right in (list(run["suspects"].items())[-1] for run, _ in wrong)]
    right = ", ".join(f"{good} of {number}" for good, number in found)
    refill, half = share(pairs("hard", "online", "refill")), "half of the 800 wrong labels are suspects"
    ahead = {arm: gains(pairs("skills-target", "target", arm)) for arm in BLIND}
    first = all(bounds(values)[0] > 0 for values in ahead.values())
    over = "; ".join(f"{points(values)} points over {ARMS[arm]}" for arm, values in ahead.items())
    close = all(abs(gained) <= 1 for gained in gains(pairs("live")))
    most, soon = f"{100 * REFILL_GOAL:.0f} %", refill is not None and refill <= REFILL_GOAL
    rows = [
        ["every prompt live", "the same success", gain("live"), close],
        ["", "uniform draws", uniform_live(), all(_same(*pair) for pair in pairs("live"))],
        ["the hard pool", f"refill's success after {most} of its rollouts", needed(refill), soon],
        ["a tenth of the labels wrong", "no more rollouts on them", f"{paid:.2f} x", paid <= 1],
        ["", half, f"suspects that are wrong: {right}", all(good >= 400 for good, _ in found)],
        ["a target", "selection by the target ahead of every other, with intervals above 0", over, first],
    ]
    return table("pool | goal | measured | ", [[*texts, "met" if good else "missed"] for *texts, good in rows])


def _same(run, uniform) -> bool:
    """Whether a run was the uniform one: it never chose."""
    return run["distinct"] == uniform["distinct"] and end(run) == end(uniform)


def uniform_live() -> str:
    """Of the runs on prompts that are all live."""
    return f"{sum(_same(*pair) for pair in pairs('live'))} of {len(pairs('live'))} runs never chose"


def verdicts() -> str:
    """What came of each of the five ways in which it could have been shown not to be worth having."""
    hard, taken = gains(pairs("hard")), share(pairs("hard"))
    low, rest = bounds(hard)[0], "over random prompts, whose final success takes"
    lines = [
        (low <= 0 or taken is None or taken > 2 / 3, f"{gain('hard')} {rest} {needed(taken)} of the rollouts"),
        _over("refill"),
        (fmean(gains(pairs("clean"))) < 0, gain("clean")),
        min((_over(arm) for arm in RIVALS if pairs("hard", "online", arm)), key=_worst),
        _over("online without features"),
    ]
    return _answers(lines, 1)


def more_verdicts() -> str:
    """What came of the ways that were named before the runs on the other testbeds."""
    few, half = gains(pairs("hard-10")), gains(pairs("hard-50"))
    dirty = {name: pool for pool, name in DIRT.items() if pairs(pool)}
    small = min((_over(arm, "hard-small") for arm in RIVALS if of(RUNS, "hard-small", arm)), key=_worst)
    skills, differences = gains(pairs("skills")), skill_differences()
    worst = min(differences)
    name = f"`{TASKS[differences.index(worst)].name}`, the skill that compares worst, ends {-worst:.1f} points"
    tenth = f"{gain('hard-10')} with a tenth of the prompts live, {gain('hard-50')} with half of them"
    wrong = "; ".join(f"{name}: {gain(pool)}" for name, pool in dirty.items())
    lines = [
        (min(few) <= 0 or fmean(half) < 0, tenth),
        (small[0], f"{small[1]}. Over random prompts: {gain('hard-small')}"),
        (any(fmean(gains(pairs(pool))) < 0 for pool in dirty.values()), wrong),
        (fmean(skills) < 0 or worst <= -10, f"{gain('skills')}; {name} below random prompts"),
        min((_over(arm, "skills-target", "target") for arm in BLIND), key=_worst),
    ]
    return _answers(lines, 6)


def _worst(answer):
    """Arms that one does not end above come first, then those with the least difference."""
    return not answer[0], answer[2]


def _answers(lines, first) -> str:
    """A numbered list of answers, from (so, text, ...)."""
    words = (f"**{'Failed' if so else 'Passed'}**: {text}." for so, text, *_ in lines)
    return "\n".join(f"{number}. {text}" for number, text in enumerate(words, first))


def _over(arm, pool="hard", one="online"):
    """Whether an arm does not end above another one on a pool, what is said of it, and the mean difference."""
    found = gains(pairs(pool, one, arm))
    seeds = f"({len(found)} {'seeds' if len(found) > 1 else 'seed'})"
    return bounds(found)[0] <= 0, f"{ARMS[one]} ends {points(found)} points above {ARMS[arm]} {seeds}", fmean(found)


def outcome() -> str:
    """The first sentence of the page."""
    clean, skills, small = (points(gains(pairs(pool))) for pool in ("clean", "skills", "hard-small"))
    return (
        f"On a pool of which a quarter can be learnt, prompts chosen online end {gain('hard')} above random ones "
        f"after equally many rollouts, with {times_live('hard')} times as many live groups, and are where these end "
        f"after {needed(share(pairs('hard')))} of the rollouts. On clean equations, of which nearly half are live, it "
        f"is {clean} points, on many skills {skills} and on a small pool {small}: there choosing does not pay."
    )


def tuning() -> str:
    """What was tried on the first two seeds."""

    def seeds(run):
        return f"{'seeds' if len(run['seeds']) > 1 else 'seed'} {' and '.join(map(str, run['seeds']))}"

    labels = {
        "after a visit a prompt rests for": lambda run: run["what"],
        "pool": lambda run: f"{run['pool']}, {seeds(run)}",
        "live groups, %": lambda run: ", ".join(f"{100 * value:.1f}" for value in run["live"]),
        "success at the end, %": lambda run: ", ".join(f"{100 * value:.1f}" for value in run["end"]),
        "distinct prompts": lambda run: ", ".join(f"{value:,}" for value in run["distinct"]),
    }
    return columns(labels, harness.read(RESULTS / "online_tuning.json")["runs"])


def alignment() -> str:
    """How much of the alignments of other prompts features explain."""
    rows = [
        [name, f"{found['learnable']:,}", *(f"{x:.2f}" for x in [*found["explained"].values(), found["other_seed"]])]
        for name, found in harness.read(RESULTS / "online_alignment.json").items()
    ]
    return table(
        "policy | learnable prompts | from 300 | from 1,000 | from 3,000 | correlation between two seeds", rows
    )


def same_work() -> str:
    """Seconds of runs with random prompts on the hard pool, equally many rollouts each."""
    return took(of(RUNS, "hard", "uniform"))


def names() -> dict:
    """What the templates may say."""
    each = {"table": arms, "gain": gain, "share": lambda pool: needed(share(pairs(pool))), "times_live": times_live}
    pools = {pool.replace("-", "_"): pool for pool in results.POOLS if of(RUNS, pool, "uniform") and pairs(pool)}
    return globals() | {name: {key: made(pool) for key, pool in pools.items()} for name, made in each.items()}


def draw():
    """Of the hard pools, and of the target."""
    draw_pools(RUNS, FIGURES / "online.png", FRONT)
    draw_pools(RUNS, FIGURES / "online_target.png", ONE)


def main():
    options = harness.options(__doc__, runs=[Path], check=(False, "only whether the pages are what results say"))
    if options.runs:
        results.collect(options.runs)
        RUNS[:] = results.load()
    known = names()
    front = fill((HERE / "front.md.in").read_text(encoding="utf-8"), known)
    pages = {PAGE: fill((HERE / "evidence_online.md.in").read_text(encoding="utf-8"), known)}
    pages[ONLINE] = between(ONLINE, "benchmarks/online/page.py", front)
    publish(pages, "benchmarks/online/page.py", after=draw)


if __name__ == "__main__":
    main()
