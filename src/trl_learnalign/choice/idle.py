"""Settings that would have no effect together with the others, in one table."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


@dataclass(frozen=True)
class Acting:
    """
    A condition for a setting to have an effect.

    Attributes:
        acts (`Callable`): takes the configuration, and returns whether the setting acts.
        idle (`str`): the settings without which it does not, after "has no effect". `{score}` and `{prompt_order}`
            stand for the values of these settings.
        remedy (`str`): the setting that lets it act.
        refused (`bool`): whether an idle setting is an error. Where only the score makes it idle, a warning is enough:
            somebody who compares scores changes no other line.
    """

    acts: Callable[["LearnAlignConfig"], bool]
    idle: str
    remedy: str
    refused: bool = True


_STAGED = Acting(lambda config: config.schedule == "staged", "with `schedule={schedule!r}`", "set `schedule='staged'`")
_ONLINE = Acting(lambda config: config.schedule == "online", "with `schedule={schedule!r}`", "set `schedule='online'`")
_ANY_DRAWS = Acting(
    lambda config: config.schedule != "staged" and not config.schedule.startswith("adept"),
    "with `schedule={schedule!r}`, which draws whole chunks, pass by pass",
    "set `schedule='online'`",
)
_SCORES = Acting(
    lambda config: config.schedule in ("staged", "online"),
    "with `schedule={schedule!r}`, which counts successes alone",
    "set `schedule='online'`",
)
_GROUPS = Acting(
    lambda config: config.schedule in ("online", "sec", "dump"),
    "with `schedule={schedule!r}`",
    "set `schedule='online'`",
)
_ROLLOUTS = Acting(
    lambda config: "rollouts" in config.measures,
    "with `score={score!r}`, which needs no rollouts",
    "use a score that does, such as 'learnability'",
    refused=False,
)
_COUNTED = Acting(  # reviews count successes in training
    lambda config: "rollouts" in config.measures or config.review_every is not None,
    *(_ROLLOUTS.idle, _ROLLOUTS.remedy, _ROLLOUTS.refused),
)
_GRADIENTS = Acting(
    lambda config: "gradients" in config.measures,
    "with `score={score!r}`, which needs no gradients",
    "use a score that does, such as 'learnalign'",
    refused=False,
)
_TARGET = Acting(
    lambda config: "target-gradients" in config.measures and config.score != "influence",
    "with `score={score!r}`, which has no target, or takes its gradients as they are",
    "use a score that does, such as 'target'",
    refused=False,
)
_WITHOUT_ANSWERS = {"rollouts", "gradients", "target-rollouts", "target-gradients", "hidden_states", "ask"}
_WITHOUT_ANSWERS |= {"density", "gradient_density"}
_ANSWERS = Acting(  # a measure from outside the package may read them
    lambda config: any(set(one.measures) - _WITHOUT_ANSWERS for one in (config, *config.stages())),
    "with `score={score!r}`, which needs no answers",
    "use a score that does, such as 'confidence'",
    refused=False,
)
_JUDGE = Acting(
    lambda config: "ask" in config.measures,
    "with `score={score!r}`, which asks no judge",
    "set `score='ask'`",
    refused=False,
)
_SUCCESS = Acting(  # a selection records success rates in any case
    lambda config: config.schedule == "staged" or config.learnability == "success_rate",
    "with `schedule={schedule!r}` and `learnability='variance'`, where no successes are counted",
    "set `learnability='success_rate'`",
)
_WARMUP = Acting(lambda config: config.warmup_prompts > 0, "with `warmup_prompts=0`", "set `warmup_prompts`")
_QUOTAS = Acting(lambda config: config.quota_column is not None, "without `quota_column`", "set `quota_column`")
_FOLDING = Acting(
    lambda config: config.prompt_order == "folding",
    "with `prompt_order={prompt_order!r}`",
    "set `prompt_order='folding'`",
)
_REPLAY = Acting(lambda config: config.replay_share > 0, "with `replay_share=0`", "set `replay_share`")
_SCORED = Acting(
    lambda config: not config.ranking().at_random,
    "with `score={score!r}`, whose draw is uniform",
    "use another score",
    refused=False,
)

# Conditions of each setting, in the order of the messages. A setting that is not here always acts
ACTING = {
    "num_prompts": (_STAGED,),
    "warmup_prompts": (_STAGED,),
    "num_rollouts": (_STAGED, _ROLLOUTS),
    "rollouts": (_STAGED, _ROLLOUTS),
    "rollout_batch_prompts": (_STAGED, _ROLLOUTS),
    "score_measures": (_STAGED,),
    "answer_column": (_STAGED, _ANSWERS),
    "judge_model": (_STAGED, _JUDGE),
    "score": (_SCORES,),
    "learnability": (_SCORES, _ROLLOUTS),
    "success_threshold": (_COUNTED, _SUCCESS),
    "success_reward": (_COUNTED,),
    "gradient_rollouts": (_STAGED, _GRADIENTS),
    "projection_dim": (_STAGED, _GRADIENTS),
    "max_tokens_per_batch": (_STAGED, _GRADIENTS),
    "candidate_prompts": (_STAGED,),
    "reselect_every": (_STAGED,),
    "review_every": (_STAGED,),
    "after_warmup": (_STAGED, _WARMUP),
    "target_dataset": (_STAGED,),
    "target_checkpoints": (_STAGED, _TARGET),
    "gradient_direction": (_STAGED, _TARGET),
    "quota_column": (_STAGED,),
    "quota": (_STAGED, _QUOTAS),
    "diversity": (_STAGED, _SCORED),
    "take": (_STAGED, _SCORED),
    "prompt_order": (_STAGED,),
    "fold": (_STAGED, _FOLDING),
    "save_rollouts": (_ROLLOUTS,),
    "prompt_features": (_ONLINE,),
    "group_column": (_GROUPS,),
    "pass_rate_column": (_ONLINE,),
    "drop_dead_groups": (_ONLINE,),
    "max_refills": (_ANY_DRAWS,),
    "replay_share": (_ANY_DRAWS,),
    "replay_groups": (_ANY_DRAWS, _REPLAY),
}


def missing(config: "LearnAlignConfig", name: str) -> Acting | None:
    """Find the condition that a setting lacks to have an effect; `None` if it has one."""
    return next((one for one in ACTING.get(name, ()) if not one.acts(config)), None)
