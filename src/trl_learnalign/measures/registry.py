"""The measures that there are, and what several of them cost together."""

from collections.abc import Iterable

from .alignments import GradientMeasure
from .base import PRICES, Measure
from .columns import Columns
from .contract import check_apart, check_measure
from .density import Density, GradientDensity
from .hidden_states import HiddenStates
from .likelihood import Likelihood, LikelihoodAlone
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
        GradientDensity(),
        HiddenStates(),
        Density(),
        Likelihood(),
        LikelihoodAlone(),
        Columns(),
    )
}
_OWNERS = {column: measure.name for measure in MEASURES.values() for column in measure.columns}


def needed(names: Iterable[str]) -> list[Measure]:
    """
    Return the measures with these names and all that they require, each after those that it requires.

    Raises:
        `ValueError`: there is no measure of such a name, measures require each other in a circle, two have the same
            column, or an entry of `MEASURES` is wrong.
    """
    found: dict[str, Measure] = {}

    def add(name, *above):
        if name in above:
            raise ValueError(
                f"The measures {' > '.join([*above[above.index(name) :], name])} require each other in a circle, so "
                "none can be the first. Correct their `requires`."
            )
        if name not in MEASURES:
            raise ValueError(
                f"A score requires the measure {name!r} (`score_measures`), but what can be measured is: "
                f"{', '.join(MEASURES)}. Correct the name."
            )
        check_measure(name, MEASURES[name])
        for other in MEASURES[name].requires:
            add(other, *above, name)
        found.setdefault(name, MEASURES[name])

    wanted = set(names)
    for name in (*(name for name in MEASURES if name in wanted), *sorted(wanted - MEASURES.keys())):
        add(name)
    check_apart(found.values(), _OWNERS)
    return list(found.values())


def prices(names: Iterable[str]) -> list[str]:
    """Return the prices of measures and of all that they require, the cheapest first, each once, without `"none"`."""
    paid = {measure.price for measure in needed(names)}
    return [price for price in PRICES[1:] if price in paid]


def spending(names: Iterable[str], pool: int, target: int, num_rollouts: int) -> str:
    """
    Say what measures take of the prompts of a pool and of a target; empty where nothing is generated or computed.
    Gradients of rollouts are not named: they are of those prompts alone that turn out to be learnable.
    """
    measures = needed(names)
    paid = {one.price for one in measures if one.price != "gradients" or not _of_rollouts(one)}
    prompts = f"{pool:,} prompts" + f" and {target:,} of the target" * bool(target)
    if "rollouts" in paid:
        prompts += f" x {num_rollouts} rollouts = {(pool + target) * num_rollouts:,}"
    over_each = ", and ".join(text for price, text in _OVER_EACH.items() if price in paid)
    if "rollouts" in paid:
        return f"{prompts}, and {over_each}" if over_each else prompts
    return f"{prompts}, {over_each}" if over_each else ""


_OVER_EACH = {"forward": "a forward over each", "gradients": "a forward and a backward over each"}


def _of_rollouts(measure: Measure) -> bool:
    return any(other.price == "rollouts" for other in needed(measure.requires))
