"""The measures that there are, and what several of them cost together."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..choice.candidates import left_of
from ..scores.builtin import manner
from .alignments import GradientMeasure
from .ask import Ask
from .base import PRICES, Measure
from .columns import Columns
from .contract import check_apart, check_measure
from .demonstration import Demonstration
from .density import Density, GradientDensity
from .hidden_states import HiddenStates
from .likelihood import Likelihood, LikelihoodAlone
from .rollouts import RolloutMeasure
from .target import TargetGradients, TargetRollouts


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


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
        Ask(),
        Demonstration(),
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


def spending(names: Iterable[str], pool: int, target: int, num_rollouts: int, racing: bool = False) -> str:
    """
    Say what measures take of the prompts of a pool and of a target; empty where nothing is generated or computed.
    Gradients of rollouts are not named: they are of those prompts alone that turn out to be learnable. In a race
    (`racing`) prompts of the pool have two rollouts at least.
    """
    measures = needed(names)
    paid = {one.price for one in measures if one.price != "gradients" or not _of_rollouts(one)}
    prompts = f"{pool:,} prompts" + f" and {target:,} of the target" * bool(target)
    if "rollouts" in paid:
        most = f"{(pool + target) * num_rollouts:,}"
        least = f"{2 * pool + target * num_rollouts:,}"
        race = f" x 2 to {num_rollouts} rollouts = {least} to {most}"
        prompts += race if racing else f" x {num_rollouts} rollouts = {most}"
    forwards = sum(one.forwards for one in measures if one.price == "forward")
    over = {"forward": "a forward", "gradients": "a forward and a backward"}
    over |= {"forward": f"{forwards} forwards"} if forwards > 1 else {}
    over_each = ", and ".join(f"{text} over each" for price, text in over.items() if price in paid)
    if "rollouts" in paid:
        return f"{prompts}, and {over_each}" if over_each else prompts
    return f"{prompts}, {over_each}" if over_each else ""


def cost(config: "LearnAlignConfig") -> int:
    """Return the place in `PRICES` of what a score takes of a prompt. Gradients count as the rollouts they are of."""
    paid = (PRICES.index(measure.price) for measure in needed(config.ranking().measures))
    return min(max(paid, default=0), PRICES.index("rollouts"))


def funnel(config: "LearnAlignConfig", rows: int) -> tuple[list[str], int]:
    """Say of each choice of candidates from `rows` prompts what it takes and leaves, and return how many are left."""
    lines = []
    for stage in config.stages():
        taken = spending(stage.measures, rows, 0, 0) or f"{rows:,} prompts"
        rows = min(stage.num_prompts, rows)
        lines.append(f"{taken}, {rows:,} of them {manner(stage.score)}")
    return lines, rows if lines else left_of(config, rows)


def _of_rollouts(measure: Measure) -> bool:
    return any(other.price == "rollouts" for other in needed(measure.requires))
