"""What real_rows.py found, in words and tables for a page."""

import harness
from pages import columns, table


REAL = harness.read(harness.RESULTS / "real_rows.json")


def told() -> str:
    """What features and kinds tell of rows of GSM8K and MATH."""
    names = {"source": "GSM8K or MATH", "type": "MATH's subject", "level": "MATH's level"}
    labels = {
        "of a prompt": names.get,
        "the most common one, %": lambda name: f"{100 * REAL['features'][name]['most_common']:.0f}",
        "told by its features, %": lambda name: f"{100 * REAL['features'][name]['right']:.0f}",
        "by its kind, %": lambda name: f"{100 * REAL['features'][name]['of_kinds']:.0f}",
        "by a shuffled kind, %": lambda name: f"{100 * REAL['features'][name]['of_shuffled_kinds']:.0f}",
    }
    return columns(labels, names)


def kinds() -> str:
    """How many kinds there are, and how large they are."""
    sizes = REAL["features"]["sizes"]
    return f"{len(sizes)} kinds of {min(sizes)} to {max(sizes)}"


def groups() -> str:
    """What became of the first groups, and what is said of them."""
    draws = REAL["draws"]
    parts = [
        f"of {found['groups']} groups of {name} {found['live']} are live ({100 * found['success_rate']:.1f} % of the "
        "rollouts are right)"
        for name, found in draws.items()
        if name in ("GSM8K", "MATH")
    ]
    chose = "chooses from then on" if draws["schedule"]["choosing"] else "goes on with random prompts"
    lengths = " and ".join(f"{draws[name]['completion_length_mean']:.1f}" for name in ("GSM8K", "MATH"))
    said = " ".join(draws["schedule"]["said"]) or "nothing"
    return (
        f"The first {REAL['conditions']['draws']} random prompts of an online run, 8 rollouts each: "
        f"{', '.join(parts)}. The schedule {chose} (skill {draws['schedule']['skill']:.2f}), and warns of: {said}. A "
        f"selection of these prompts warns: {' '.join(draws['said'])} Nothing tells that completions are cut off, and "
        f"nearly all are: of {REAL['conditions']['tokens']} tokens they have {lengths} on average, so this is not "
        "what the model could do."
    )


def filters() -> str:
    """How many rows filters leave, those on columns and one on what was measured."""
    counts = "; ".join(f"`{text}` leaves {number:,}" for text, number in REAL["where"].items())
    said = REAL["draws"]["filter_said"][0].split(": ")[0]
    chosen = " and ".join(f"{number} of {name}" for name, number in REAL["draws"]["filtered"].items())
    return (
        f"Of {REAL['rows']:,} rows of MATH {counts}. `{REAL['draws']['filter']['where']}`, with "
        f"`quota_column='source'`, chooses {chosen} of the rows above, without new rollouts. "
        f"It warns: {said}, and says why."
    )


def quotas() -> str:
    """What quotas make of MATH."""
    rows = [
        [f"`{found['column']}`", found["quota"], ", ".join(f"{name} {n}" for name, n in found["counts"].items())]
        for found in REAL["quotas"]
    ]
    return table("`quota_column` | `quota` | of 500 prompts", rows)


def refused() -> str:
    """Settings that are refused on MATH, with the first sentence of the error."""
    rows = [
        [", ".join(f"`{name}={value!r}`" for name, value in settings.items()), text.split(". ")[0].removesuffix(".")]
        for settings, text in REAL["refused"]
    ]
    return table("set | answer, its first sentence", rows)
