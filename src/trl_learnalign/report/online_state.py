"""The state of an online schedule as plain columns and numbers."""

from dataclasses import asdict
from importlib.metadata import version

from ..choice.idle import missing


_PACKAGES = ("trl-learnalign", "trl", "transformers", "accelerate", "torch")


def read_state(schedule, max_steps) -> dict:
    """Return what the files hold of a schedule: see [`OnlineCurriculum.report`], with its plan and its settings."""
    found, config = schedule.curriculum.report(schedule.kind_names), schedule.run.config
    found["run"]["plan"] = schedule.plan(0, max_steps, False)
    found["run"]["settings"] = {
        "config": {
            name: value
            for name, value in config.to_dict().items()
            if name not in ("schedule", "score") and missing(config, name) is None
        },
        # Without a selection an epoch has `num_prompts`
        "stream": {
            "prompts_per_epoch" if name == "num_prompts" else name: value
            for name, value in asdict(schedule.layout).items()
        },
        "curriculum": asdict(schedule.settings),
        "versions": versions(),
    }
    return found


def versions() -> dict[str, str]:
    """Return the versions of the packages that matter."""
    return {package: version(package) for package in _PACKAGES}
