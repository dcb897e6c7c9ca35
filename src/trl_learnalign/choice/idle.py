"""Settings that would have no effect together with the others, in one table."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Acting:
    """
    Attributes:
        acts (`Callable`): whether a setting acts, by the configuration.
        idle (`str`): with what it does not, after "has no effect"; `{score}` and `{prompt_order}`
            stand for the values of these settings.
        remedy (`str`): what to set to let it act.
        refused (`bool`): whether an idle setting is an error. It is not where only the score makes it idle: who
            compares scores changes no other line.
    """

    acts: Callable[[object], bool]
    idle: str
    remedy: str
    refused: bool = True


_STAGED = Acting(lambda config: config.schedule == "staged", "with `schedule='online'`", "set `schedule='staged'`")
_ONLINE = Acting(lambda config: config.schedule == "online", "with `schedule='staged'`", "set `schedule='online'`")
_ROLLOUTS = Acting(
    lambda config: "rollouts" in config.measures,
    "with `score={score!r}`, which needs no rollouts",
    "use a score that does, such as 'learnability'",
    refused=False,
)
_GRADIENTS = Acting(
    lambda config: "gradients" in config.measures,
    "with `score={score!r}`, which needs no gradients",
    "use a score that does, such as 'learnalign'",
    refused=False,
)
_SUCCESS = Acting(  # a selection writes down success rates in any case
    lambda config: config.schedule == "staged" or config.learnability == "success_rate",
    "with `schedule='online'` and `learnability='variance'`, where no successes are counted",
    "set `learnability='success_rate'`",
)
_WARMUP = Acting(lambda config: config.warmup_prompts > 0, "with `warmup_prompts=0`", "set `warmup_prompts`")
_QUOTAS = Acting(lambda config: config.quota_column is not None, "without `quota_column`", "set `quota_column`")
_FOLDING = Acting(
    lambda config: config.prompt_order == "folding",
    "with `prompt_order={prompt_order!r}`",
    "set `prompt_order='folding'`",
)
_SCORED = Acting(
    lambda config: not config.ranking().at_random,
    "with `score={score!r}`, whose draw is uniform",
    "use another score",
    refused=False,
)

# What has to hold for a setting to act, in the order of the messages. A setting that is not here always acts
ACTING = {
    "num_prompts": (_STAGED,),
    "warmup_prompts": (_STAGED,),
    "num_rollouts": (_STAGED, _ROLLOUTS),
    "rollout_batch_prompts": (_STAGED, _ROLLOUTS),
    "score_measures": (_STAGED,),
    "answer_column": (_STAGED,),
    "learnability": (_ROLLOUTS,),
    "success_threshold": (_ROLLOUTS, _SUCCESS),
    "success_reward": (_ROLLOUTS,),
    "gradient_rollouts": (_STAGED, _GRADIENTS),
    "projection_dim": (_STAGED, _GRADIENTS),
    "max_tokens_per_batch": (_STAGED, _GRADIENTS),
    "candidate_prompts": (_STAGED,),
    "reselect_every": (_STAGED,),
    "after_warmup": (_STAGED, _WARMUP),
    "target_dataset": (_STAGED,),
    "target_column": (_STAGED,),
    "quota_column": (_STAGED,),
    "quota": (_STAGED, _QUOTAS),
    "take": (_STAGED, _SCORED),
    "prompt_order": (_STAGED,),
    "fold": (_STAGED, _FOLDING),
    "save_rollouts": (_STAGED, _ROLLOUTS),
    "prompt_features": (_ONLINE,),
    "group_column": (_ONLINE,),
    "pass_rate_column": (_ONLINE,),
}


def missing(config, name: str) -> Acting | None:
    """What a setting of a `LearnAlignConfig` lacks to have an effect; `None` if it has one."""
    return next((one for one in ACTING.get(name, ()) if not one.acts(config)), None)
