"""Settings with which a selection would fail or be wrong, refused before anything is measured."""

import warnings

from ..choice.table import load_target
from ..config import LearnAlignConfig
from ..data.columns import check_columns
from ..ground.randomness import random_state, set_random_state
from ..host import Host
from ..host.names import GENERATES
from ..measures.registry import needed
from .rehearsal import rehearse


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
    check_columns(dataset, config, [name for measure in measures for name in measure.columns])
    load_target(dataset, config)
    randomness = random_state()  # a function of the user's may draw from it
    longest = getattr(host.args, "max_completion_length", None) or _LONG
    rehearse(dataset, config, config.num_rollouts or host.group_size, longest)
    set_random_state(randomness)
    if any(measure.price != "none" for measure in measures):
        host.require(GENERATES)
    for measure in measures:
        measure.check(host, config)
