"""
Writes docs/evidence_alignment.md and its figure from benchmarks/results/online.json (page.py collects its runs),
chat.json (chat_results.py --collect) and taps.json, so that no number of a table is typed.

    python benchmarks/online/alignment_page.py [--check]

The words of the page are in evidence_alignment.md.in. A criterion of benchmarks/criteria.md whose runs are not there
yet is said to be open.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

import matplotlib


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "chat")]
import chat_results
import coin_results
import results
from coin_results import on_chance, worth
from pages import ROOT, fill, interval, points, publish, table
from questions import GUESSED, POOLS
from results import ARMS, area_gains, end, gains, of, paired


matplotlib.use("Agg")
import matplotlib.pyplot as plt


PAGE = ROOT / "docs" / "evidence_alignment.md"
FIGURE = ROOT / "docs" / "figures" / "alignment.png"
TAPS = ROOT / "benchmarks" / "results" / "taps.json"
OURS, TODAY, RANDOM = "learnalign online", "online", "uniform"
SEEDS = {"coins": range(200, 205), "hard": range(1, 6), "short": range(2, 5), "guessed": range(2, 5)}
OTHERS = "tenth-coins", "alike-coins", "labels", "large-coins", "skills"
RUNS = [run for run in results.load() if run["seed"] in SEEDS.get(run["pool"], (200, 201))]
CHAT = {
    pool: {arm: {seed: run for seed, run in runs.items() if seed in SEEDS[pool]} for arm, runs in arms.items()}
    for pool, arms in chat_results.load([]).items()
}
CHAT = {pool: {arm: runs for arm, runs in arms.items() if runs} for pool, arms in CHAT.items() if any(arms.values())}
UNBOUND = "learnalign-online-without-kinds"  # on the chat model
BEFORE = "learnalign online without kinds"  # the same on the tiny policy
OPEN = "not measured yet"
FRONT = ROOT / "README.md", ROOT / "docs" / "index.md"
FRONT_FIGURE = ROOT / "docs" / "figures" / "chat.png"
MARKS = "<!-- written by benchmarks/online/alignment_page.py -->\n", "<!-- end -->\n"
STYLES = {  # as in figure.py
    RANDOM: ("#000000", "o", "random prompts"),
    TODAY: ("#D55E00", "*", "learnability alone"),
    OURS: ("#0072B2", "D", "LearnAlign online"),
    BEFORE: ("#56B4E9", "s", "LearnAlign online, before kinds counted"),
}
CHAT_ARMS = {"random": RANDOM, "online": TODAY, "learnalign-online": OURS}


def bounds(values) -> tuple[float, float]:
    """Of the mean; of two values the values themselves."""
    return interval(values) or (min(values), max(values))


def criteria() -> list[tuple[str, str, str, bool | None]]:
    """The pool, what was asked, what was measured, and whether it holds; `None` where it is open."""
    found = _coins() + _chat("short") + _chat("guessed") + _hard()
    for pool in OTHERS:
        found += _other(pool)
    return found + _target() + _cost()


def whole(pool, pairs, rows):
    """The rows of a pool, open as long as seeds of it are missing."""
    seeds = len(SEEDS.get(pool, (200, 201)))
    if len(pairs) >= seeds:
        return rows
    return [(name, asked, f"{text} ({len(pairs)} of {seeds} seeds)", None) for name, asked, text, _ in rows]


def _coins():
    pairs, today = paired(RUNS, "coins", OURS), paired(RUNS, "coins", OURS, TODAY)
    asked = [
        "rollouts on coins <= .25",
        "live groups that are no coins >= 1.5 x random's",
        "mean success over the run above random's",
        "and above today's online",
    ]
    if not pairs or not today:
        return [("coins", text, OPEN, None) for text in asked]
    own, more = fmean(on_chance(run) for run, _ in pairs), fmean(worth(run) / worth(other) for run, other in pairs)
    over = [area_gains(pairs), area_gains(today)]
    measured = [
        (f"{own:.3f}", own <= 0.25),
        (f"{more:.2f} x", more >= 1.5),
        *((f"{points(part)} points", bounds(part)[0] > 0) for part in over),
    ]
    return whole("coins", pairs, [("coins", text, *pair) for text, pair in zip(asked, measured, strict=True)])


def _chat(pool):
    arms = CHAT.get(pool, {})
    asked = ["random's final success after <= 60 %", "above random at the end", "no kind more than .1 below random"]
    asked += ["rollouts on guesses <= the pool's"] if pool == "guessed" else []
    if not arms.get("learnalign-online") or not chat_results.pairs(arms, "learnalign-online"):
        return [(pool, text, OPEN, None) for text in asked]
    pairs = chat_results.pairs(arms, "learnalign-online")
    goal = fmean(chat_results.means(other)[-1] for _, other in pairs)
    curve = [fmean(part) for part in zip(*(chat_results.means(run) for run, _ in pairs), strict=True)]
    steps = [look["step"] / pairs[0][0]["steps"] for look in pairs[0][0]["looks"]]
    first = next((step for step, rate in zip(steps, curve, strict=True) if rate >= goal), None)
    ends = chat_results.gains(arms, "learnalign-online")
    kinds = {
        kind: fmean(chat_results.by_kind(run)[kind] - chat_results.by_kind(other)[kind] for run, other in pairs)
        for kind in chat_results.by_kind(pairs[0][0])
    }
    worst = min(kinds, key=kinds.get)
    measured = [
        ("never" if first is None else f"{100 * first:.0f} %", first is not None and first <= 0.6),
        (points(ends, ".3f"), fmean(ends) > 0),
        (f"`{worst}`: {kinds[worst]:+.2f}", kinds[worst] >= -0.1),
    ]
    if pool == "guessed":
        share = fmean(chat_results.on_guesses(run) for run, _ in pairs)
        pool_share = sum(POOLS[pool][kind] for kind in GUESSED) / sum(POOLS[pool].values())
        measured.append((f"{share:.2f}, of the pool {pool_share:.2f}", share <= pool_share))
    return whole(pool, pairs, [(pool, text, *pair) for text, pair in zip(asked, measured, strict=True)])


def _hard():
    asked = "not below today's online at the end", "not below it over the run"
    pairs = paired(RUNS, "hard", OURS, TODAY)
    if not pairs:
        return [("hard", text, OPEN, None) for text in asked]
    found = [
        ("hard", text, f"{points(part)} points", bounds(part)[1] >= 0)
        for text, part in zip(asked, (gains(pairs), area_gains(pairs)), strict=True)
    ]
    return whole("hard", pairs, found)


def _other(pool):
    pairs = paired(RUNS, pool, OURS)
    asked = ["not below random at the end", "not below it over the run"]
    asked += ["rollouts on coins <= the pool's share"] if pool != "skills" else []
    if not pairs:
        return [(pool, text, OPEN, None) for text in asked]
    rows = [(part, bounds(part)[1] >= 0) for part in (gains(pairs), area_gains(pairs))]
    measured = [(f"{points(part)} points", good) for part, good in rows]
    if pool != "skills":
        own, theirs = fmean(on_chance(run) for run, _ in pairs), fmean(on_chance(other) for _, other in pairs)
        measured.append((f"{own:.3f}, random prompts {theirs:.3f}", own <= theirs))
    return whole(pool, pairs, [(pool, text, *pair) for text, pair in zip(asked, measured, strict=True)])


def _target():
    asked = "twice the pool's share of the target", "a gain on the target over random"
    pairs = paired(RUNS, "skills-target", "target online")
    if not pairs:
        return [("skills-target", text, OPEN, None) for text in asked]
    times = fmean(run["target_share"] / other["target_share"] for run, other in pairs)
    found = gains(pairs)
    return [
        ("skills-target", asked[0], f"{times:.1f} x", times >= 2),
        ("skills-target", asked[1], f"{points(found)} points", bounds(found)[0] > 0),
    ]


def _cost():
    if not TAPS.is_file():
        return [("a step with taps", "time and FLOPs <= 1.03 x", OPEN, None)]
    return [
        (
            f"a step with taps, {name}",
            "time and FLOPs <= 1.03 x",
            f"{found['time']:.3f} x, {found['flops']:.3f} x",
            max(found["time"], found["flops"]) <= 1.03,
        )
        for name, found in json.loads(TAPS.read_text(encoding="utf-8"))["cases"].items()
    ]


def verdicts() -> str:
    """A row for each criterion."""
    words = {True: "holds", False: "**missed**", None: "open"}
    return table("pool | asked | measured | ", [[*row[:3], words[row[3]]] for row in criteria()])


def outcome() -> str:
    """The first sentence of the page, and of the front pages."""
    pairs, today = paired(RUNS, "coins", OURS), paired(RUNS, "coins", OURS, TODAY)
    if not pairs or not today:
        return f"LearnAlign online as it is now was {OPEN} on new seeds."
    shares = [fmean(on_chance(run) for run in of(RUNS, "coins", arm)) for arm in (OURS, RANDOM, TODAY)]
    return (
        f"On a pool a third of which is decided by chance, LearnAlign online ends {points(gains(pairs))} points "
        f"above random prompts and {points(gains(today))} above learnability alone, at equal rollouts ({len(pairs)} "
        f"seeds, a policy of 0.8 M parameters). It spends {shares[0]:.2f} of the rollouts on chance; random prompts "
        f"{shares[1]:.2f}, learnability alone {shares[2]:.2f}."
    )


def score() -> str:
    """How many criteria hold."""
    found = [row[3] for row in criteria()]
    text = f"{found.count(True)} of {len(found)} criteria hold, {found.count(False)} are missed"
    return f"{text}, and {found.count(None)} are not measured on all seeds yet" if None in found else text


def front(folder: str) -> str:
    """The figure, the table and the caution of the front pages, whose links begin with `folder`."""
    pairs = _chat_pairs("short")[0]
    kinds = {
        kind: [fmean(chat_results.by_kind(run[place])[kind] for run in pairs) for place in (0, 1)]
        for kind in (chat_results.by_kind(pairs[0][0]) if pairs else ())
    }
    worst = min(kinds, key=lambda kind: kinds[kind][0] - kinds[kind][1], default=None)
    rows = [
        [
            "above .7, several kinds of task; a chat model (the figure)",
            '`schedule="online"`',
            *_chat_ends("short"),
        ],
        ["the same, and a quarter of the questions can only be guessed", "the same", *_chat_ends("guessed")],
        ["above .7, one kind of task; a toy", "the same", *_ends("hard")],
        ["any, and a third of the answers graded by chance; a toy", "the same", *_ends("coins")],
        ["below .7, one kind of task, and all can be learnt; a toy", "nothing: stock TRL", *_clean()],
    ]
    worse = (
        f"; on the chat model the worst is `{worst}`, {kinds[worst][0]:.2f} where random prompts have "
        f"{kinds[worst][1]:.2f}"
        if pairs
        else ""
    )
    return "\n\n".join(
        [
            f"![Success on questions held out: random prompts, LearnAlign online]({folder}figures/chat.png)",
            table("`frac_reward_zero_std` in your log | Set | success at the end, random prompts | chosen", rows),
            "At equal rollouts. The chat model is SmolLM2-135M-Instruct on short questions of nine kinds, mostly too "
            "hard; the toy a policy of 0.8 M parameters on equations. Nothing was run on a GPU yet. "
            f"**What can get worse:** a kind of prompts may fall behind{worse}. Where a toy could "
            "learn all prompts, or many skills, [nothing was gained]"
            f"({folder}online.md#when-to-use-it). [The evidence]({folder}evidence_alignment.md): {score()}.",
        ]
    )


def _ends(pool):
    other = RANDOM if pool == "coins" else TODAY
    random = f"{fmean(map(end, of(results.load(), pool, RANDOM))):.2f}"
    for arm, words in ((OURS, ""), (BEFORE, ", before kinds counted")):
        pairs = paired(RUNS, pool, arm, other)
        if pairs:
            return [random, f"{fmean(end(run) for run, _ in pairs):.2f} ({_seeds(len(pairs))}{words})"]
    return [random, OPEN]


def _clean():
    pairs = paired(results.load(), "clean", TODAY)
    ends = [f"{fmean(end(pair[place]) for pair in pairs):.2f}" for place in (1, 0)]
    return [ends[0], f"{ends[1]} (learnability alone, {_seeds(len(pairs))})"]


def _chat_pairs(pool) -> tuple[list, str, str]:
    """Runs of LearnAlign online with those of random prompts; the arm, and what is to be said of it."""
    pairs = chat_results.pairs(CHAT.get(pool, {}), "learnalign-online")
    if pairs:
        return pairs, "learnalign-online", ""
    arms = chat_results.load([]).get(pool, {})
    return chat_results.pairs(arms, UNBOUND), UNBOUND, ", before kinds counted"


def _chat_ends(pool):
    pairs, _, words = _chat_pairs(pool)
    if not pairs:
        return ["", OPEN]
    chosen, random = (fmean(chat_results.means(run[place])[-1] for run in pairs) for place in (0, 1))
    return [f"{random:.2f}", f"{chosen:.2f} ({_seeds(len(pairs))}{words})"]


def _seeds(number):
    return {1: "one seed", 2: "two seeds"}.get(number, f"{number} seeds")


def coin_tables() -> str:
    """The tables of each pool of coins that has runs of ours."""
    parts = []
    for pool in ("coins", *OTHERS):
        if of(RUNS, pool, OURS) or of(RUNS, pool, BEFORE):
            runs = [run for run in RUNS if "quarters" in run]
            parts += [f"### `{pool}`", coin_results.arms(runs, pool), coin_results.curves(runs, pool)]
            if pool == "coins":
                parts.append(coin_results.by_quarter(runs, pool))
    return "\n\n".join(parts)


def hard() -> str:
    """The hard pool."""
    rows = []
    for arm in (RANDOM, TODAY, OURS, BEFORE):
        runs = of(RUNS, "hard", arm)
        pairs = {other: paired(RUNS, "hard", arm, other) if arm != other else [] for other in (RANDOM, TODAY)}
        if runs:
            rows.append(
                [
                    ARMS[arm],
                    str(len(runs)),
                    f"{100 * fmean(run['live_share'] for run in runs):.1f}",
                    f"{100 * fmean(map(end, runs)):.1f}",
                    *(points(gains(pair)) if pair else "" for pair in pairs.values()),
                    *(points(area_gains(pair)) if pair else "" for pair in pairs.values()),
                ]
            )
    return table(
        "prompts chosen by | seeds | live groups, % | success at the end, % | over random | over learnability alone | "
        "mean over the run, over random | over learnability alone",
        rows,
    )


def chat(pool) -> str:
    """The tables of a pool of the chat model."""
    arms = CHAT.get(pool)
    if not arms:
        return f"{OPEN[0].upper()}{OPEN[1:]}."
    parts = [
        chat_results.table_of_success(arms),
        "Success by kind at the end:",
        chat_results.table_of_kinds(arms),
        "Share of the rollouts in the second half of the run, and in brackets how many of these groups were live:",
        chat_results.table_of_shares(arms, pool),
        chat_results.table_of_steps(arms),
    ]
    return "\n\n".join(parts)


def before() -> str:
    """The runs of the chat model after which kinds began to count."""
    arms = chat_results.load([])["guessed"]
    kept = {arm: {seed: run for seed, run in arms.get(arm, {}).items() if seed == 1} for arm in ("random", UNBOUND)}
    return "\n\n".join([chat_results.table_of_success(kept), chat_results.table_of_shares(kept, "guessed")])


def draw() -> None:
    """Success held out on the chat model; success and the share of coins on the pool of coins."""
    figure, panels = plt.subplots(1, 2 + len(CHAT), figsize=(1 + 4.2 * (2 + len(CHAT)), 4), squeeze=False)
    for axes, (pool, arms) in zip(panels[0], CHAT.items(), strict=False):
        for arm, style in CHAT_ARMS.items():
            runs = [*arms.get(arm, {}).values()]
            if runs:
                steps = [look["step"] for look in runs[0]["looks"]]
                _line(axes, steps, [chat_results.means(run) for run in runs], style)
        axes.set_title(f"SmolLM2-135M, pool `{pool}`", fontsize=10)
        axes.set_xlabel("steps of 64 rollouts")
    success, share = panels[0][-2:]
    for arm in STYLES:
        runs = of(RUNS, "coins", arm)
        if runs:
            looks = [run["looks"] for run in runs]
            rollouts = [fmean(look["rollouts"] for look in part) / 1000 for part in zip(*looks, strict=True)]
            _line(success, rollouts, [[look["sampled"] for look in part] for part in looks], arm)
            groups = [run["quarters"]["groups"] for run in runs]
            _line(
                share, [1, 2, 3, 4], [[part[coin_results.CHANCE] / sum(part) for part in run] for run in groups], arm
            )
    success.set_title("tiny policy, a third coins", fontsize=10)
    success.set_xlabel("rollouts, thousands")
    share.set_title("the same: share of the rollouts on coins", fontsize=10)
    share.set_xlabel("quarter of the run")
    share.set_ylim(bottom=0)
    share.set_xticks([1, 2, 3, 4])
    panels[0][0].set_ylabel("success on what is held out")
    for axes in panels[0]:
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=120, metadata={"Software": None})
    plt.close(figure)


def draw_front() -> None:
    """Success on the questions held out against rollouts, on the chat model."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    pairs, _, words = _chat_pairs("short")
    for place, arm in ((1, RANDOM), (0, OURS)):
        runs = [pair[place] for pair in pairs]
        rollouts = [look["step"] * 64 for look in runs[0]["looks"]]
        _line(axes, rollouts, [chat_results.means(run) for run in runs], arm, words if place == 0 else "")
    axes.set_xlabel("rollouts")
    axes.set_ylabel("success on questions held out")
    axes.set_title("SmolLM2-135M-Instruct, short questions of nine kinds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(FRONT_FIGURE, dpi=120, metadata={"Software": None})
    plt.close(figure)


def _line(axes, places, values, arm, more=""):
    colour, marker, name = STYLES[arm]
    label = f"{name}{more}, {len(values)} seed{'s' if len(values) > 1 else ''}"
    parts = [*zip(*values, strict=True)]
    axes.plot(places, [fmean(part) for part in parts], color=colour, marker=marker, label=label)
    axes.fill_between(places, [*map(min, parts)], [*map(max, parts)], color=colour, alpha=0.12, linewidth=0)


def names() -> dict:
    """What the template may say."""
    return {
        "verdicts": verdicts,
        "score": score,
        "outcome": outcome,
        "coins": coin_tables,
        "hard": hard,
        "short": lambda: chat("short"),
        "guessed": lambda: chat("guessed"),
        "before": before,
    }


def main():
    template = (HERE / "evidence_alignment.md.in").read_text(encoding="utf-8")
    pages = {PAGE: fill(template, names())}
    for path in FRONT:
        before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        text = fill(front("docs/" if path.name == "README.md" else ""), {})
        pages[path] = f"{before}{MARKS[0]}\n{text}\n\n{MARKS[1]}{after}"
    publish(pages, "benchmarks/online/alignment_page.py", lambda: (draw(), draw_front()))


if __name__ == "__main__":
    main()
