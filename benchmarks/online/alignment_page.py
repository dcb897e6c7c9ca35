"""
Writes docs/evidence_alignment.md and its figure from benchmarks/results/online.json (page.py collects its runs),
chat.json (chat_results.py --collect), taps.json and real_rows.json, so that no number of a table is typed.

    python benchmarks/online/alignment_page.py [--check]

The words of the page are in evidence_alignment.md.in. A criterion of benchmarks/criteria.md whose runs are not there
yet is said to be open.
"""

import sys
from pathlib import Path
from statistics import fmean


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "chat")]

import chat_results
import coin_results
import drawing
import harness
import real_results
import results
from chat_results import by_kind, on_guesses
from coin_results import on_chance, worth
from drawing import FIGURES, plt
from harness import RESULTS, ROOT
from pages import between, bounds, columns, fill, points, publish, table
from questions import GUESSED, POOLS
from results import ARMS, area_gains, costs, end, gains, of, over, paired, rates, took


PAGE = ROOT / "docs" / "evidence_alignment.md"
FRONT = ROOT / "README.md", ROOT / "docs" / "index.md"
OURS, TODAY, RANDOM = "learnalign online", "online", "uniform"
SEEDS = {"coins": range(200, 205), "hard": range(1, 6), "short": range(2, 5), "guessed": range(2, 5)}
OTHERS = "tenth-coins", "alike-coins", "labels", "large-coins", "skills"
CHAT_OURS = "learnalign-online"  # on the chat model
UNBOUND = "learnalign-online-without-kinds"
BEFORE = "learnalign online without kinds"  # the same on the tiny policy
OPEN = "not measured yet"
ALL, ALL_CHAT = results.load(), chat_results.load()
RUNS, CHAT = ([run for run in runs if run["seed"] in SEEDS.get(run["pool"], (200, 201))] for runs in (ALL, ALL_CHAT))
STYLES = {
    RANDOM: ("#000000", "o", "random prompts"),
    TODAY: ("#D55E00", "*", "learnability alone"),
    OURS: ("#0072B2", "D", "LearnAlign online"),
    BEFORE: ("#56B4E9", "s", "LearnAlign online, before kinds counted"),
}
CHAT_ARMS = {"random": RANDOM, "online": TODAY, CHAT_OURS: OURS}


def means(both, value) -> list[float]:
    """The mean of a value over the runs, and over those they are paired with."""
    return [fmean(map(value, runs)) for runs in zip(*both, strict=True)]


def criteria() -> list[tuple[str, str, str, bool | None]]:
    """The pool, what was asked, what was measured, and whether it holds; `None` where it is open."""
    found = [*_coins(), *_chat("short"), *_chat("guessed"), *_hard()]
    return found + [row for pool in OTHERS for row in _other(pool)] + _target() + _cost()


def asked(pool, both, *rows):
    """Rows of `(text, measure)`, where `measure()` returns what was measured, and whether it holds."""
    if not both:
        return [(pool, text, OPEN, None) for text, _ in rows]
    found, seeds = [(pool, text, *measure()) for text, measure in rows], len(SEEDS.get(pool, (200, 201)))
    if len(both) >= seeds:
        return found
    return [(*row[:2], f"{row[2]} ({len(both)} of {seeds} seeds)", None) for row in found]


def above_0(values):
    return f"{points(values)} points", bounds(values)[0] > 0


def not_below_0(values):
    return f"{points(values)} points", bounds(values)[1] >= 0


def _coins():
    both, today = paired(RUNS, "coins", OURS), paired(RUNS, "coins", OURS, TODAY)

    def share():
        own = means(both, on_chance)[0]
        return f"{own:.3f}", own <= 0.25

    def live():
        more = fmean(worth(run) / worth(other) for run, other in both)
        return f"{more:.2f} x", more >= 1.5

    return asked(
        "coins",
        both if today else [],
        ("rollouts on coins <= .25", share),
        ("live groups that are no coins >= 1.5 x random's", live),
        ("mean success over the run above random's", lambda: above_0(area_gains(both))),
        ("and above today's online", lambda: above_0(area_gains(today))),
    )


def _chat(pool):
    both = paired(CHAT, pool, CHAT_OURS, "random")

    def early():
        goal = means(both, end)[1]
        curve = [fmean(part) for part in zip(*(rates(run) for run, _ in both), strict=True)]
        steps = [look["step"] / both[0][0]["steps"] for look in both[0][0]["looks"]]
        first = next((step for step, rate in zip(steps, curve, strict=True) if rate >= goal), None)
        return "never" if first is None else f"{100 * first:.0f} %", first is not None and first <= 0.6

    def above():
        ends = gains(both, 1)
        return points(ends, ".3f"), fmean(ends) > 0

    def worst():
        kind, least = worst_kind(both)
        return f"`{kind}`: {least:+.2f}", least >= -0.1

    def guesses():
        share, of_pool = means(both, on_guesses)[0], sum(POOLS[pool].get(kind, 0) for kind in GUESSED)
        of_pool /= sum(POOLS[pool].values())
        return f"{share:.2f}, of the pool {of_pool:.2f}", share <= of_pool

    rows = [("random's final success after <= 60 %", early), ("above random at the end", above)]
    rows.append(("no kind more than .1 below random", worst))
    return asked(pool, both, *rows, *([("rollouts on guesses <= the pool's", guesses)] if pool == "guessed" else []))


def worst_kind(both):
    """The kind of question that has the least mean difference, and that."""
    kinds = {kind: fmean(by_kind(a)[kind] - by_kind(b)[kind] for a, b in both) for kind in by_kind(both[0][0])}
    return min(kinds.items(), key=lambda item: item[1])


def _hard():
    both = paired(RUNS, "hard", OURS, TODAY)
    texts = {"not below today's online at the end": gains, "not below it over the run": area_gains}
    return asked("hard", both, *not_below(both, texts))


def not_below(both, texts):
    return [(text, lambda found=found: not_below_0(found(both))) for text, found in texts.items()]


def _other(pool):
    both = paired(RUNS, pool, OURS)

    def coins():
        own, theirs = means(both, on_chance)
        return f"{own:.3f}, random prompts {theirs:.3f}", own <= theirs

    rows = not_below(both, {"not below random at the end": gains, "not below it over the run": area_gains})
    return asked(pool, both, *rows, *([("rollouts on coins <= the pool's share", coins)] if pool != "skills" else []))


def _target():
    both = paired(RUNS, "skills-target", "target online")

    def share():
        times = fmean(run["target_share"] / other["target_share"] for run, other in both)
        return f"{times:.1f} x", times >= 2

    gain = "a gain on the target over random", lambda: above_0(gains(both))
    return asked("skills-target", both, ("twice the pool's share of the target", share), gain)


def _cost():
    cases, text = harness.read(RESULTS / "taps.json", {"cases": {}})["cases"], "time and FLOPs <= 1.03 x"
    return [
        (f"a step with taps, {name}", text, f"{time:.3f} x, {flops:.3f} x", max(time, flops) <= 1.03)
        for name, time, flops in ((name, found["time"], found["flops"]) for name, found in cases.items())
    ] or [("a step with taps", text, OPEN, None)]


def verdicts() -> str:
    """A row for each criterion."""
    words = {True: "yes", False: "**no**", None: "open"}
    return table("pool | must hold | measured | held", [[*row[:3], words[row[3]]] for row in criteria()])


def outcome() -> str:
    """The first sentence of the page, and of the front pages."""
    both, today = paired(RUNS, "coins", OURS), paired(RUNS, "coins", OURS, TODAY)
    shares = [fmean(map(on_chance, of(RUNS, "coins", arm))) for arm in (OURS, RANDOM, TODAY)]
    return (
        f"On a pool a third of which is decided by chance, LearnAlign online ends {points(gains(both))} points "
        f"above random prompts and {points(gains(today))} above learnability alone, at equal rollouts ({len(both)} "
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
    pairs = {pool: paired(CHAT, pool, CHAT_OURS, "random") for pool in ("short", "guessed")}
    _, pool, kind = min((worst_kind(both)[1], pool, worst_kind(both)[0]) for pool, both in pairs.items())
    own, random = means(pairs[pool], lambda run: by_kind(run)[kind])
    worse = f"on the chat model the worst is `{kind}`, {own:.2f} where random prompts have {random:.2f}"
    one = min((pair for both in pairs.values() for pair in both), key=lambda pair: worst_kind([pair])[1])
    kind = worst_kind([one])[0]
    worse += ", and of single runs `{}`, {:.2f} and {:.2f}".format(kind, *(by_kind(run)[kind] for run in one))
    cases = {
        "above .7, several kinds of task; a chat model (the figure)": '`schedule="online"`',
        "the same, and a quarter of the questions can only be guessed": "the same",
        "above .7, one kind of task; a toy": "the same",
        "any, and a third of the answers graded by chance; a toy": "the same",
        "below .7, one kind of task, and all can be learnt; a toy": "nothing: stock TRL",
    }
    ends = [_ends(CHAT, pool, CHAT_OURS, "random") for pool in pairs]
    ends += [_ends(RUNS, pool, OURS, RANDOM) for pool in ("hard", "coins")]
    ends.append(_ends(ALL, "clean", TODAY, RANDOM, "learnability alone, "))
    rows = [[*case, *found] for case, found in zip(cases.items(), ends, strict=True)]
    return "\n\n".join(
        [
            f"![Success on questions held out: random prompts, LearnAlign online]({folder}figures/chat.png)",
            table("`frac_reward_zero_std` in your log | Set | success at the end, random prompts | chosen", rows),
            "At equal rollouts. The chat model is SmolLM2-135M-Instruct on short questions of nine kinds, mostly too "
            "hard; the toy a policy of 0.8 M parameters on equations. Nothing was run on a GPU yet. "
            f"**What can get worse:** a kind of prompts may fall behind; {worse}. Where a toy could "
            "learn all prompts, or many skills, [nothing was gained]"
            f"({folder}online.md#when-to-use-it). [The evidence]({folder}evidence_alignment.md): {score()}.",
        ]
    )


def _seeds(number):
    return {1: "one seed", 2: "two seeds"}.get(number, f"{number} seeds")


def _ends(runs, pool, arm, other, words=""):
    """What random prompts and an arm came to, of the seeds that both have."""
    chosen, theirs = means(both := paired(runs, pool, arm, other), end)
    return [f"{theirs:.2f}", f"{chosen:.2f} ({words}{_seeds(len(both))})"]


def coins() -> str:
    """The tables of each pool of coins that has runs of ours."""
    parts, runs = [], [run for run in RUNS if "quarters" in run]
    for pool in ("coins", *OTHERS):
        if of(RUNS, pool, OURS) or of(RUNS, pool, BEFORE):
            parts += [f"### `{pool}`", coin_results.arms(runs, pool), coin_results.curves(runs, pool)]
            if pool == "coins":
                parts.append(coin_results.by_quarter(runs, pool))
    return "\n\n".join(parts)


def hard() -> str:
    """The hard pool."""
    runs = {arm: found for arm in (RANDOM, TODAY, OURS, BEFORE) if (found := of(RUNS, "hard", arm))}

    labels = {
        "prompts chosen by": ARMS.get,
        "seeds": lambda arm: len(runs[arm]),
        "live groups, %": lambda arm: f"{100 * fmean(run['live_share'] for run in runs[arm]):.1f}",
        "success at the end, %": lambda arm: f"{100 * fmean(map(end, runs[arm])):.1f}",
        "over random": lambda arm: over(RUNS, "hard", arm),
        "over learnability alone": lambda arm: over(RUNS, "hard", arm, TODAY),
        "mean over the run, over random": lambda arm: over(RUNS, "hard", arm, RANDOM, area_gains),
        "over learnability alone ": lambda arm: over(RUNS, "hard", arm, TODAY, area_gains),
    }
    return columns(labels | costs(runs.get), runs)


def same_work() -> str:
    """Seconds of runs of the chat model with random prompts, equally many rollouts each."""
    return took(of(ALL_CHAT, "short", "random"))


def chat(pool) -> str:
    """The tables of a pool of the chat model."""
    success, kinds, shares, steps = chat_results.tables(CHAT, pool)
    text = "Share of the rollouts in the second half of the run, and in brackets how many of these groups were live:"
    return "\n\n".join([success, "Success by kind at the end:", kinds, text, shares, steps])


def before() -> str:
    """The runs of the chat model after which kinds began to count."""
    kept = [run for run in ALL_CHAT if run["seed"] == 1 and run["arm"] in ("random", UNBOUND)]
    return "\n\n".join(chat_results.tables(kept, "guessed")[::2])


def draw() -> None:
    """Success held out on the chat model; success and the share of coins on the pool of coins."""
    pools = [pool for pool in POOLS if any(run["pool"] == pool for run in CHAT)]
    drawn, panels = plt.subplots(2, 2, figsize=(9.4, 7.4))
    for axes, pool in zip(panels[0], pools, strict=False):
        seeds = {run["seed"] for run in of(CHAT, pool, CHAT_OURS)}  # of random prompts the same
        for arm, style in CHAT_ARMS.items():
            if looks := [run["looks"] for run in of(CHAT, pool, arm) if run["seed"] in seeds]:
                drawing.curves(axes, looks, "step", 1, STYLES[style])
        axes.set_title(f"SmolLM2-135M, pool `{pool}`", fontsize=10)
        drawing.finish(axes, "steps of 64 rollouts")
    success, share = panels[1]
    for arm, style in STYLES.items():
        if runs := of(RUNS, "coins", arm):
            drawing.curves(success, [run["looks"] for run in runs], "rollouts", 1e-3, style)
            groups = [run["quarters"]["groups"] for run in runs]
            shares = [[part[coin_results.CHANCE] / sum(part) for part in run] for run in groups]
            drawing.line(share, [1, 2, 3, 4], shares, style)
    success.set_title("tiny policy, a third coins", fontsize=10)
    drawing.finish(success, "rollouts, thousands")
    share.set_title("the same: share of the rollouts on coins", fontsize=10)
    drawing.finish(share, "quarter of the run", xticks=[1, 2, 3, 4])
    share.set_ylim(bottom=0)
    for axes in (*panels[0], success):
        axes.set_ylabel("success on what is held out")
        axes.legend(fontsize=8)
    drawing.save(drawn, FIGURES / "alignment.png")


def draw_front() -> None:
    """Success on the questions held out against rollouts, on the chat model."""
    drawn, axes = plt.subplots(figsize=(6.4, 3.6))
    chosen, random = zip(*paired(CHAT, "short", CHAT_OURS, "random"), strict=True)
    for arm, runs in ((RANDOM, random), (OURS, chosen)):
        drawing.curves(axes, [run["looks"] for run in runs], "step", 64, STYLES[arm])
    drawing.finish(axes, "rollouts", "success on questions held out")
    axes.set_title("SmolLM2-135M-Instruct, short questions of nine kinds", fontsize=10)
    axes.legend()
    drawing.save(drawn, FIGURES / "chat.png")


def main():
    template = (HERE / "evidence_alignment.md.in").read_text(encoding="utf-8")
    names = vars(real_results) | globals() | {pool: lambda pool=pool: chat(pool) for pool in POOLS}
    pages = {PAGE: fill(template, names)}
    for path in FRONT:
        text = fill(front("docs/" if path.name == "README.md" else ""), {})
        pages[path] = between(path, "benchmarks/online/alignment_page.py", text)
    publish(pages, "benchmarks/online/alignment_page.py", lambda: (draw(), draw_front()))


if __name__ == "__main__":
    main()
