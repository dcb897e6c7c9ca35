"""The parts that a selection and its measures are made from, and the keys that follow."""

from collections.abc import Sequence

from ..config import FREE_ON_RESUME
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest
from ..ground.store import other_parts
from ..identity.objects import identify
from ..measures.base import Context, Measure


_NOT_IN_KEY = set(FREE_ON_RESUME) - {"save_rollouts"}  # which the files of a selection depend on
_LENGTH = 16  # characters of the digest of a part


def parts_of(
    context: Context, rows: Sequence[int], measures: list[Measure], weights: str, stage: int
) -> dict[str, dict[str, str]]:
    """
    Return what a selection, and each measure, is made from: by a name that people understand, the digest. No measure
    depends on the score, nor the rollouts on what is taken from them. On the main process alone, where `weights`, the
    digest of the trainable ones, is known.
    """
    host, config = context.host, context.config.to_dict()
    found = context.identity
    common = {"weights": weights} | {f"base model ({name})": part for name, part in found["base model"].items()}
    common |= {name: part for name, part in found["prompts"].items() if name != "transform"}
    common |= {
        "rows": [dataset_fingerprint(host.dataset), len(context.dataset)],
        "transform of the rows": found["prompts"]["transform"],
    }
    made_from = {measure.name: common | measure.key(context, rows) for measure in measures}
    whole = {name: part for parts in made_from.values() for name, part in parts.items() if name != "pool"}
    whole |= {f"`{name}`": value for name, value in config.items() if name not in _NOT_IN_KEY}
    whole |= {"stage": stage}
    if context.score.code is not None:
        whole["function of the score"] = identify(context.score.code)
    return {
        measure: {name: digest(part)[:_LENGTH] for name, part in parts.items()}
        for measure, parts in (made_from | {"selection": whole}).items()
    }


def keys_of(parts: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return a hash of a selection, and of each measure: equal keys mean equal results."""
    return {measure: digest(part) for measure, part in parts.items()}


def other_settings(before: dict, now: dict) -> str:
    """Name the parts in which two selections differ, by their provenances; settings with their values."""
    if "made_from" not in before:  # nothing was measured
        return "weights, data, rewards or settings"
    return other_parts(before["made_from"], now["made_from"], before.get("config", {}), now["config"])
