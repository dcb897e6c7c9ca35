"""What a selection and its measures are made from, part by part, and the keys that follow."""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ..config import FREE_ON_RESUME
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest
from ..ground.store import other_parts
from ..identity.objects import identify
from ..measures.parts import rollouts_at_once


if TYPE_CHECKING:
    from .run import SelectionRun

_NOT_IN_KEY = set(FREE_ON_RESUME) - {"save_rollouts"}  # which the files of a selection depend on
# What decides which rollouts make a gradient, and how long a feature is
_KEY_OF_GRADIENTS = ("gradient_rollouts", "projection_dim", "success_threshold", "success_reward", "learnability")
_LENGTH = 16  # characters of the digest of a part


def parts_of(run: "SelectionRun", weights: str) -> dict[str, dict[str, str]]:
    """
    Of a selection, and of each measure, what it is made from: by a name that people understand, the digest. No measure
    depends on the score, nor the rollouts on what is taken from them. On the main process alone, where `weights`, the
    digest of the trainable ones, is known.
    """
    host, config = run.host, run.config.to_dict()
    found = host.identity()
    policy = {"weights": weights} | {f"base model ({name})": part for name, part in found["base model"].items()}
    prompts = {name: part for name, part in found["prompts"].items() if name != "transform"}
    rolled_out = policy | prompts
    rolled_out |= {f"reward function `{name}`": part for name, part in found["rewards"]}
    rolled_out |= {f"environment `{name}`": part for name, part in found["environments"].items()}
    rolled_out |= {"order of the reward functions": [name for name, _ in found["rewards"]]}
    rolled_out |= {"`rollout_func`": found["rollout_func"]}
    rolled_out |= {f"`{name}`": part for name, part in found["generation"].items()}
    rolled_out |= {
        "seed": run.seed,
        "step": run.step,
        "`num_rollouts`": run.num_rollouts,
        "prompts at once (`rollout_batch_prompts`)": run.prompts_at_once,
        "rollouts at once": rollouts_at_once(host, run.num_rollouts),
        "penalties": host.has_penalties and "gradients" in run.config.measures,
        "rows": [dataset_fingerprint(host.dataset), len(run.dataset)],
        "transform of the rows": found["prompts"]["transform"],
    }
    features = {f"`{name}`": config[name] for name in _KEY_OF_GRADIENTS}
    pool = {"pool": hashlib.sha256(np.array(run.pool, np.int64).tobytes()).hexdigest()}
    target = {}
    if run.target is not None:
        transform = host.prompt_identity(run.target)["transform"]
        target = {"rows of the target": [dataset_fingerprint(run.target), transform]}
    settings = {f"`{name}`": value for name, value in config.items() if name not in _NOT_IN_KEY}
    settings |= {"stage": run.provenance["stage"]}
    if run.score.code is not None:
        settings["function of the score"] = identify(run.score.code)
    made_from = {
        "rollouts": rolled_out | pool,
        "gradients": rolled_out | pool | features,
        "target-rollouts": rolled_out | target,
        "target-gradients": rolled_out | target | features,
        "selection": rolled_out | target | settings,
    }
    return {
        measure: {name: digest(part)[:_LENGTH] for name, part in parts.items()} for measure, parts in made_from.items()
    }


def keys_of(parts: dict[str, dict[str, str]]) -> dict[str, str]:
    """Of a selection, and of each measure, a hash: equal keys mean equal results."""
    return {measure: digest(part) for measure, part in parts.items()}


def other_settings(before: dict, now: dict) -> str:
    """In which parts two selections differ, by their provenances; settings with their values."""
    was = before.get("made_from")
    if not isinstance(was, dict):  # of an earlier version
        return "weights, data, rewards or settings"
    return other_parts(was, now["made_from"], before.get("config", {}), now["config"])
