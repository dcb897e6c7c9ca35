"""The table of where the rollouts of an online run went, by kind of prompt, and what to be warned of."""

import html

from .html import MISSING, TEXT, formatted, table


MOST_SHOWN = 30
_LONGEST = 60  # characters of a prompt that stands for its kind


def kinds_section(kinds: list[dict], column: str | None, graded: bool) -> str:
    """
    Lay out the table **Where the rollouts went**, with warnings above it.

    Args:
        kinds (`list[dict]`): as of [`read_kinds`], with texts in place of the rows of `examples`.
        column (`str`, *optional*): `group_column`; `None` where kinds are clusters.
        graded (`bool`): whether rewards are graded.
    """
    what = (
        f"the values of the column <code>{html.escape(column)}</code>"
        if column
        else "clusters of prompts that are alike to the policy, or of like length. Each is shown by its most typical "
        "prompts"
    )
    texts = [text for one in kinds for text in warnings_of(one)]
    found = "".join(f"<p><strong>Warning:</strong> {html.escape(text)}</p>" for text in texts)
    kinds = [one for one in kinds if one["prompts"]]
    shown = sorted(kinds, key=lambda one: -one["rollouts"])[:MOST_SHOWN]
    success = "reward" if graded else "success"
    columns = {
        "kind": TEXT,
        "of the pool": ".1%",
        "of the rollouts": ".1%",
        "of late": ".1%",
        "of live groups": ".1%",
        f"{success} at first": "",
        f"{success} now": "",
        "uniform draws": ",",
        "alignment": "",
        "inconsistent": ",",
    }
    rows = [
        (
            "\n".join([_label(one), *map(_short, one["examples"])]),
            *(one[name] for name in ("share", "rollouts", "late", "live")),
            *(_with_error(one[name], ".2f") for name in ("first", "now")),
            one["uniform"],
            _with_error(one["alignment"], ".3f"),
            one["inconsistent"],
        )
        for one in shown
    ]
    caption = (
        f"Most rollouts first{f', the first {len(shown)} of {len(kinds):,}' if len(shown) < len(kinds) else ''}. Of "
        "late: a rollout counts half after 200 more draws."
    )
    return (
        f"<p>Kinds are {what}. {success.capitalize()} is the mean of the first and of the latest uniform draws of a "
        "kind, 16 of each at most, with its standard error: chosen prompts would tell of the choice. Alignment is "
        "that of the gradients of its groups with what is wanted, where it is measured. Inconsistent are rollouts "
        "whose completion another one of their group has as well, with another reward. Held back are kinds whose "
        "latest groups did not succeed more often than predicted.</p>"
        f"{found}{table('Where the rollouts went', columns, rows, caption)}"
    )


def _label(one):
    held = " (held back)" if one.get("idle") else ""
    return f"{one['name']}{held}{':' if one['examples'] else ''}"


def warnings_of(one: dict) -> list[str]:
    """Return sentences for the warnings of a kind, see [`read_kinds`], whose examples are texts or left out."""
    return [_SENTENCES[name](one) for name in one["warnings"]]


def _name(one):
    return f"{one['name']} (such as {_short(one['examples'][0])!r})" if one["examples"] else f"{one['name']!r}"


def _greedy(one):
    return (
        f"{one['late']:.0%} of the rollouts of late went to prompts of {_name(one)}, which are {one['share']:.0%} of "
        f"the pool, but their success does not rise: {_with_error(one['first'], '.2f')} on their first "
        f"{one['window']} uniform draws, {_with_error(one['now'], '.2f')} on the latest. If they cannot be learnt "
        "(guesses, or a grader that is random), leave them out with `where`."
    )


def _lost(one):
    return (
        f"Success on prompts of {_name(one)} is being lost: {_with_error(one['now'], '.2f')} on the latest "
        f"{one['window']} uniform draws, {one['best']:.2f} at its best. {one['late']:.0%} of the rollouts of late "
        f"went to them, {one['share']:.0%} of the pool. If an evaluation agrees, resume from an earlier checkpoint "
        "with a lower learning rate."
    )


def _inconsistent(one):
    return (
        f"The same completion got different rewards: {one['inconsistent']:,} rollouts "
        f"({one['inconsistent_share']:.1%}) of prompts of {_name(one)} say what another rollout of their group says, "
        "with another reward. See whether the reward function is random, depends on time or fails now and then."
    )


_SENTENCES = {"greedy": _greedy, "lost": _lost, "inconsistent": _inconsistent}


def _with_error(pair, form):
    value, error = pair
    return MISSING if value is None else formatted(value, form) + ("" if error is None else f" \u00b1 {error:{form}}")


def _short(text):
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else line[:_LONGEST] + "\u2026"
