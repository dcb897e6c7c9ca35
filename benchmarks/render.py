"""
Writes docs/results.md from results.md.in and results/*.json.

    python benchmarks/render.py [--check]
"""

from statistics import fmean, median_high

from harness import ROOT, read
from measures import NAMES
from pages import fill, publish, table


HERE = ROOT / "benchmarks"
GRADIENTS = "method | time | FLOPs | peak memory | numbers per prompt | error of cosines"
LOSSES = (
    "ranking | dapo instead of grpo: Spearman | overlap of the top quarters "
    "| other rollouts: Spearman | overlap of the top quarters"
)


def with_texts(found):
    """The results, versions as a text."""
    if isinstance(found, dict):
        found = {name: with_texts(value) for name, value in found.items()}
        if "versions" in found:
            found["versions"] = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return [with_texts(value) for value in found] if isinstance(found, list) else found


RESULTS = {file.stem: with_texts(read(file)) for file in (HERE / "results").glob("*.json")}


def arms() -> str:
    rows = [["nothing", f"{RESULTS['demo_arms']['before']:.3f}", ""]]
    for arm, values in RESULTS["demo_arms"]["summary"].items():
        gap = "" if arm == "random" else f"{values['over_random']:+.3f} +- {values['standard_error']:.3f}"
        rows.append([NAMES[arm], f"{values['success']:.3f}", gap])
    return table("trained on | held-out success | over random prompts", rows)


def runs(arm) -> list[dict]:
    return [run for run in RESULTS["demo_arms"]["runs"] if run["arm"] == arm]


def phases() -> str:
    seconds = {
        name: median_high(run["phases"][name] for run in runs("learnalign"))
        for name in ("rollouts", "gradients", "scores")
    }
    base, digits = seconds["rollouts"], {"rollouts": (1, 0), "gradients": (1, 2), "scores": (2, 3)}
    rows = [[name, f"{one:.{digits[name][0]}f}", f"{one / base:.{digits[name][1]}f}"] for name, one in seconds.items()]
    return table("phase of a selection | median seconds | relative to the rollouts", rows)


def learnable() -> float:
    return median_high(run["learnable"] / RESULTS["demo_arms"]["conditions"]["pool"] for run in runs("learnalign"))


def lengths() -> str:
    rows = []
    for arm in ("learnability", "alignment", "learnalign"):
        chosen, pool = (fmean(run[f"{of}_length"] for run in runs(arm)) for of in ("chosen", "pool"))
        rows.append([NAMES[arm], f"{chosen:.2f} tokens", f"{pool:.2f}"])
    return table("score | mean completion length, chosen prompts | whole pool", rows)


def gradients(results) -> str:
    ways = results["ways"] | {f"{name}, gradient checkpointing": row for name, row in results["checkpointed"].items()}
    rows = [["a plain backward, which gives no per-prompt gradients", "1", "1", "1", "", ""]]
    for name, row in ways.items():
        error = f"{row['cosine_error']:.1g}" if row["cosine_error"] > 1e-6 else "< 1e-6"
        ratios = (f"{row['time']:.2f}", f"{row['flops']:.3f}", f"{row['memory']:.2f}")
        rows.append([name, *ratios, f"{row['features']:,}", error])
    return table(GRADIENTS, rows)


def gradients_cpu_table() -> str:
    return gradients(RESULTS["gradients_cpu"])


def sketch() -> str:
    return "; ".join(f"{int(dim):,}: {ratio:.2f}" for dim, ratio in RESULTS["gradients_cpu"]["sketch"].items())


def unequal() -> str:
    rows = [
        [name, f"{row['time']:.2f}", f"{row['memory']:.2f}"] for name, row in RESULTS["unequal_cpu"]["ways"].items()
    ]
    return table("rows of a microbatch | time relative to a plain backward | peak memory", rows)


def of_eight() -> int:
    return RESULTS["unequal_cpu"]["conditions"]["rows"] // 8


def gpu() -> str:
    results = RESULTS.get("gradients_cuda")
    if results is None:
        return (
            "Not measured on a GPU yet. `python benchmarks/gradients.py --peers --device cuda --shape qwen2.5-1.5b` "
            "does this."
        )
    plain = results["plain"]
    share = plain["share_of_peak_flops"]
    took = f"A prompt takes {plain['milliseconds_per_prompt']:.0f} ms, its rollouts' forward and backward included"
    peak = f", {100 * share:.0f} % of the card's peak" if share else ""
    return f"{gradients(results)}\n\n{took}{peak}."


def faults() -> str:
    counts = RESULTS["robustness"]
    rows, killed = [], {name.split(": ")[1] for name in counts if name.startswith("kills")}
    for moment in sorted(killed):
        rows.append([f"killed: {moment}", *(str(counts.get(f"kills of {number}: {moment}", 0)) for number in (1, 2))])
    rows.append(["killed, in all", *(str(sum(int(row[number]) for row in rows)) for number in (1, 2))])
    rows.append(["an error on one process", "", str(counts["failures on one of two processes"])])
    return table("fault | on one process | on two processes", rows)


def nonsense() -> str:
    counts = {name.split(": ")[1]: n for name, n in RESULTS["robustness"].items() if name.startswith("nonsense")}
    return ", ".join(f"{number} {name}" for name, number in counts.items())


def choices() -> str:
    pools = RESULTS["choosing"]["pools"]
    texts = {"choose": "choose a chunk", "observe": "learn from its rewards", "log": "compute the log values"}
    rows = [[text, *(f"{pool[f'{name}_ms']:.1f} ms" for pool in pools)] for name, text in texts.items()]
    return table(["", *(f"{pool['prompts']:,} prompts" for pool in pools)], rows)


def projections() -> str:
    rows = []
    for row in RESULTS["projection"]["rows"]:
        name = f"{row['dim']:,}" + (" (default)" if row["dim"] == RESULTS["projection"]["default"] else "")
        rows.append([name, f"{row['spearman']:.4f}", f"{100 * row['top_quarter']:.0f} %"])
    return table("`projection_dim` | Spearman with the exact score | overlap of the top quarters", rows)


def losses() -> str:
    rows = []
    for row in RESULTS["loss_types"]["rows"]:
        found = [row["loss"], row["rollouts"]]
        rows.append(
            [NAMES[row["score"]], *(f"{one['spearman']:.3f} | {100 * one['top_quarter']:.0f} %" for one in found)]
        )
    return table(LOSSES, rows)


def directions() -> str:
    rows = [
        [row["case"], f"{row['spearman']:.2f}", f"{100 * row['same_chosen']:.0f} %", f"{row['mean_alignment']:.3f}"]
        for row in RESULTS["less"]["rows"]
    ]
    return table("gradients of the pool | Spearman with plain | the same chosen | mean alignment", rows)


def both_learnable() -> str:
    loss, other = (RESULTS["loss_types"]["rows"][0][key]["learnable"] for key in ("loss", "rollouts"))
    return f"{loss} of them learnable ({other} in both draws)"


def lifts() -> str:
    return ", ".join(f"{run['before']:.3f} to {run['after']:.3f}" for run in RESULTS["tiny_policy"]["grpo"]["runs"])


def main():
    results = fill((HERE / "results.md.in").read_text(encoding="utf-8"), RESULTS | globals())
    publish({ROOT / "docs" / "results.md": results}, "benchmarks/render.py")


if __name__ == "__main__":
    main()
