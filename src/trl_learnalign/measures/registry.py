"""The measures that there are, and what several of them cost together."""

from collections.abc import Iterable

from .alignments import GradientMeasure
from .base import PRICES, Measure
from .columns import Columns
from .hidden_states import HiddenStates
from .likelihood import Likelihood
from .rollouts import RolloutMeasure
from .target import TargetGradients, TargetRollouts


MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        # The target first: it is small, and where nothing can be learnt from it no gradients are needed
        TargetRollouts(),
        TargetGradients(),
        RolloutMeasure(),
        GradientMeasure(),
        HiddenStates(),
        Likelihood(),
        Columns(),
    )
}


def needed(names: Iterable[str]) -> list[Measure]:
    """
    Return the measures with these names and all that they require, each after those that it requires.

    Raises:
        `ValueError`: there is no measure of such a name.
    """
    found: dict[str, Measure] = {}

    def add(name):
        if name not in MEASURES:
            raise ValueError(
                f"A score requires the measure {name!r} (`score_measures`), but what can be measured is: "
                f"{', '.join(MEASURES)}. Correct the name."
            )
        for other in MEASURES[name].requires:
            add(other)
        found.setdefault(name, MEASURES[name])

    wanted = set(names)
    for name in (*(name for name in MEASURES if name in wanted), *sorted(wanted - MEASURES.keys())):
        add(name)
    return list(found.values())


def prices(names: Iterable[str]) -> list[str]:
    """Return the prices of measures and of all that they require, the cheapest first, each once, without `"none"`."""
    paid = {measure.price for measure in needed(names)}
    return [price for price in PRICES[1:] if price in paid]


def spending(names: Iterable[str], pool: int, target: int, num_rollouts: int) -> str:
    """
    Say what measures take of the prompts of a pool and of a target; empty where nothing is generated or computed.
    """
    paid, texts = prices(names), []
    if "rollouts" in paid:
        prompts = f"{pool:,} prompts" + f" and {target:,} of the target" * bool(target)
        texts.append(f"{prompts} x {num_rollouts} rollouts = {(pool + target) * num_rollouts:,}")
    if "forward" in paid:
        texts.append("a forward over each" if texts else f"{pool:,} prompts, a forward over each")
    return ", and ".join(texts)
