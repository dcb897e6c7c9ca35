"""Settings with which a selection would fail or be wrong, refused before anything is measured."""

import warnings

from ..choice.table import load_target
from ..config import LearnAlignConfig
from ..data.columns import check_columns
from ..ground.randomness import random_state, set_random_state
from ..host import Host
from ..host.names import GENERATES
from ..measures.registry import needed
from .rehearsal import made_up, rehearse


_LONG = 1000  # tokens, where nothing limits a completion


def check_selection(host: Host, config: LearnAlignConfig) -> None:
    """
    Check the columns, the target, the score and the measures of a selection.

    Raises:
        `ValueError`: an unknown column or measure, a score, a condition or a target that cannot be used, or what one
            of the measures cannot work with, see [`Measure.check`].
        `RuntimeError`: a version of TRL that lacks what the score needs.
        [`UnseenParametersError`]: trainable tensors whose gradients would be missed.
    """
    dataset = host.dataset
    if config.num_prompts > len(dataset):
        warnings.warn(
            f"`num_prompts` is {config.num_prompts}, but the training dataset has {len(dataset)} rows: every "
            "prompt that may be chosen will be selected.",
            stacklevel=4,
        )
    measures = needed(config.ranking().measures)
    longest = getattr(host.args, "max_completion_length", None) or _LONG
    sizes = config.num_rollouts or host.group_size, longest
    randomness = random_state()  # a function of the user's may draw from it
    table, _ = made_up([0], [measure for measure in measures if measure.name != "columns"], *sizes)
    names = [name for measure in measures for name in measure.columns]
    check_columns(dataset, config, {name: table[name].iloc[0] if name in table else 0.0 for name in names})
    load_target(dataset, config)
    rehearse(dataset, config, *sizes)
    set_random_state(randomness)
    if any(measure.price in ("rollouts", "gradients") for measure in measures):
        host.require(GENERATES)
    for measure in measures:
        measure.check(host, config)
