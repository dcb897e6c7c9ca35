"""The parts that a selection and its measures are made from, and the keys that follow."""

from collections.abc import Sequence
from typing import Any

from ..config import FREE_ON_RESUME
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest
from ..ground.store import other_parts
from ..ground.user_code import is_ours
from ..identity.objects import identify
from ..measures.base import Context, Measure
from ..scores.builtin import score_name


_NOT_IN_KEY = set(FREE_ON_RESUME) - {"save_rollouts"}  # which the files of a selection depend on
_LENGTH = 16  # characters of the digest of a part


def parts_of(
    context: Context, rows: Sequence[int], measures: list[Measure], weights: str, stage: int
) -> dict[str, dict[str, str]]:
    """
    Return what a selection, and each measure, is made from: by a name that people understand, the digest. No measure
    depends on the score, nor the rollouts on what is taken from them. On the main process alone, where `weights`, the
    digest of the trainable ones, is known. A measure that costs nothing has no log, but the selection depends on it.
    """
    host, config = context.host, context.config.to_dict()
    found = context.identity
    common = {"weights": weights} | {f"base model ({name})": part for name, part in found["base model"].items()}
    common |= {name: part for name, part in found["prompts"].items() if name != "transform"}
    common |= {
        "rows": [dataset_fingerprint(host.dataset), len(context.dataset)],
        "transform of the rows": found["prompts"]["transform"],
    }
    made_from = {measure.name: common | _own(measure, context, rows) for measure in measures}
    whole: dict[str, Any] = {f"`{name}`": value for name, value in config.items() if name not in _NOT_IN_KEY}
    for measure, parts in made_from.items():
        for name, part in parts.items():
            if name != "pool":  # a setting may be `None` where the measure knows the number that is used
                whole[name if whole.get(name, part) == part else f"{name} of the measure {measure}"] = part
    whole |= {"stage": stage, "seed": context.seed}
    code, rank = context.score.code, context.score.rank
    if code is not None or not is_ours(rank):
        whole["function of the score"] = identify(code or rank)
    for one in context.config.stages():
        if one.ranking().code is not None:
            whole[f"function of the candidates, {score_name(one.score)}"] = identify(one.ranking().code)
    priced = {measure.name: made_from[measure.name] for measure in measures if measure.price != "none"}
    return {
        measure: {name: digest(part)[:_LENGTH] for name, part in parts.items()}
        for measure, parts in (priced | {"selection": whole}).items()
    }


def _own(measure: Measure, context: Context, rows: Sequence[int]) -> dict[str, Any]:
    """Return the parts of a measure alone, with its code where that is not the package's, which has a version."""
    kind = type(measure)
    code = {} if is_ours(kind) else {f"code of the measure {measure.name}": identify(kind)}
    return {**measure.key(context, rows), **code}


def keys_of(parts: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return a hash of a selection, and of each measure: equal keys mean equal results."""
    return {measure: digest(part) for measure, part in parts.items()}


def other_settings(before: dict, now: dict) -> str:
    """Name the parts in which two selections differ, by their provenances; settings with their values."""
    if "made_from" not in before:  # nothing was measured
        return "weights, data, rewards or settings"
    was, made_from = before["made_from"], now["made_from"]
    if before.get("measures") != now["measures"]:  # those of one measure say nothing about another
        was, made_from = (
            {name: one[name] for name in one if name in was.keys() & made_from} for one in (was, made_from)
        )
    return other_parts(was, made_from, before.get("config", {}), now["config"])
