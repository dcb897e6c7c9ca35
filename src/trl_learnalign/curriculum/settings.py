"""The settings of the online curriculum, each with its reason."""

import math
from dataclasses import dataclass


UTILITIES = "variance", "deviation"


@dataclass(frozen=True)
class OnlineSettings:
    """
    Settings of [`OnlineCurriculum`]. The defaults are meant to be kept; experiments pass others.

    Two clocks run. What fades as the policy changes fades by optimizer steps, but never faster than groups come in to
    replace it. What concerns the coverage of the pool counts draws, whatever the batch size.
    """

    # What a reward means. A rollout succeeds where its reward is at least this
    success_threshold: float = 1.0
    # Rank by the variance of graded rewards instead of p (1 - p)
    graded: bool = False

    # An observation counts half after so many optimizer steps, as the policy moves on ...
    half_life_steps: float = 50.0
    # ... but not before so many groups: a regression on 65 features cannot live on fewer
    half_life_groups: float = 800.0

    # Precision of the Gaussian prior of a regression weight; features have standard deviation 1 at most
    ridge: float = 3.0
    # Success is fitted again to groups that fade so many times as fast, around the slow fit; 0 for the slow fit alone
    quick_speed: float = 0.0
    # Precision of the Gaussian prior of what a weight of the quick fit differs by
    quick_ridge: float = 10.0
    # Rollouts that a group counts for in the regression: the rollouts of one prompt are alike
    group_weight: float = 3.0
    # Groups that the regression keeps. Bounds its time
    window: int = 4096
    # Bounds of the strength of the prior, in rollouts: below, one rollout would decide; above, none would
    least_concentration: float = 0.5
    greatest_concentration: float = 50.0

    # Draws until a prompt may come again: this share of the pool, with bounds that 16 prompts a step were tuned with
    cooldown_share: float = 0.1
    least_cooldown: int = 32
    most_cooldown: int = 400
    # A rest is doubled per so many rollouts in a row that all succeed, or all fail; a visit counts for one doubling
    doubling: int = 8
    # Doublings at most, so that even a prompt that is always solved comes again
    longest_rest: int = 6
    # Doublings after which a prompt is called retired (always solved) or parked (never solved)
    retired_after: int = 2

    # Probability of failing so often below which a prompt is suspected of a wrong answer
    suspicion: float = 0.1
    # Visits of a prompt, and distance of its success from one half at most, before its rewards may be called noise
    noise_visits: int = 4
    noise_width: float = 0.2
    # Suspects that a report lists
    most_suspects: int = 1000

    # Share of the draws that is uniform, which measures the pool and the prediction
    uniform: float = 0.05
    # The same where choosing begins with what was known beforehand, until that was tried
    uniform_untried: float = 0.125
    # Uniform draws before the prediction is judged ...
    tried: int = 64
    # ... or this share of the groups of a short run ...
    tried_share: float = 0.05
    # ... but not less than so many, which are enough where success was known beforehand
    least_tried: int = 24
    # Skill on uniform draws that choosing begins with, and less that it goes on with, so that it does not flicker
    begin_skill: float = 0.1
    least_skill: float = 0.05
    # Utility of the best prompts over that of random ones, below which choosing is not worth it
    least_headroom: float = 1.1
    # Prompts that are called the best: a fixed number, as the best of one would promise more than the best of 64
    headroom_prompts: int = 16
    # Draws without skill or headroom before draws are uniform again
    patience: int = 320
    # Fading of the sums over uniform draws, per draw: the latest 200 count
    judge_memory: float = 0.995

    # Multiply utility by the predicted alignment of a prompt's gradient, where gradients are observed
    alignment: bool = False
    # What a prompt is ranked on: "variance", E[p (1 - p)], or "deviation", the expected deviation of a group's
    # rewards, which is how far GRPO moves along its gradient when it divides advantages by it
    utility: str = "variance"
    # 0 draws the prompts of greatest utility; else prompts are drawn in proportion to utility to this power
    sharpness: float = 0.0
    # Multiply utility by what became of it in the latest groups of the same kind of prompts
    kinds_count: bool = False
    # ... and by so much where their success does not rise
    idle_factor: float = 0.33
    # Groups of a kind that tell whether it rises: this part of the run, and not less than so many
    idle_window: float = 0.02
    least_idle_window: int = 20
    # Part of its share of the pool that each kind gets at least which is solved now and then; needs `sharpness`
    least_kind_share: float = 0.0
    # Length of a sketch of a gradient
    gradient_dim: int = 2048
    # Groups whose sketches are kept. Bounds the time: their products are inverted
    gradient_window: int = 512
    # Groups with a gradient from one fit of alignments to the next
    gradient_groups: int = 16
    # lambda of the whitening, in mean eigenvalues of the second moment of the gradients
    whitening: float = 3.0
    # Precision of the Gaussian prior of a regression weight of alignments, which are far noisier than rewards
    alignment_ridge: float = 150.0
    # Mean alignment, in units of the spread of one, below which a time counts less than the ridge
    least_common: float = 0.15
    # An alignment counts half after so many half-lives
    slower_alignment: float = 8.0
    # A kind that is drawn too often, or too seldom, counts at most so many times less, or more, in the direction
    most_kind_weight: float = 10.0
    # Live groups before the prediction of alignments is judged
    tried_gradients: int = 24
    # Fading of that judgement, per live group: skill is seldom shown once the prompts without are no longer drawn
    skill_memory: float = 0.9993
    # Correlation of predicted with observed alignment, and the mean of the observed, both in standard errors, from
    # which on the prediction is used; and the correlation with which it stays in use
    begin_trust: float = 1.5
    least_trust: float = 0.0
    # Of a target, where there is one: share of the random draws beside chosen prompts that are of its rows. Those of
    # the whole pool stay as many as without a target
    target_share: float = 0.5
    # Bounds of what utility is multiplied by: prompts that agree less than the mean are drawn less, none is drawn more
    least_factor: float = 0.1
    most_factor: float = 1.0

    # Prompts that are ranked at a time; all of a smaller pool. Of a larger one up to half are those visited that
    # have rested, the others random. Bounds the time of a choice
    candidates: int = 16_384
    # Variance within groups of graded rewards, over that of successes, that is taken for the least possible
    least_noise: float = 0.02
    # Groups of later draws after which a group that never came is given up, so that its prompt may come again
    give_up: int = 4096
    # Groups that a row of the history holds at least
    history_groups: int = 16

    def __post_init__(self):
        for name in ("half_life_steps", "half_life_groups", "ridge", "group_weight", "least_concentration"):
            self._check(name, getattr(self, name) > 0, "must be above 0")
        for name in ("window", "candidates", "doubling", "retired_after", "tried", "headroom_prompts", "patience"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        for name in (
            "gradient_dim",
            "gradient_window",
            "gradient_groups",
            "tried_gradients",
            "slower_alignment",
            "most_kind_weight",
        ):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        self._check("quick_speed", self.quick_speed == 0 or self.quick_speed >= 1, "must be 0, or at least 1")
        for name in ("quick_ridge", "whitening", "alignment_ridge", "least_factor", "least_common"):
            self._check(name, getattr(self, name) > 0, "must be above 0")
        self._check("most_factor", self.most_factor >= 1, "must be at least 1")
        self._check("target_share", 0 <= self.target_share < 1, "must be at least 0 and below 1")
        self._check("sharpness", self.sharpness >= 0, "must be at least 0")
        self._check("least_kind_share", 0 <= self.least_kind_share < 1, "must be at least 0 and below 1")
        self._check("idle_factor", 0 < self.idle_factor <= 1, "must be above 0, and 1 at most")
        self._check("utility", self.utility in UTILITIES, f"must be one of {', '.join(UTILITIES)}")
        for name in ("give_up", "history_groups", "most_suspects", "noise_visits", "least_tried", "least_idle_window"):
            self._check(name, getattr(self, name) >= 1, "must be at least 1")
        shares = (
            "uniform",
            "uniform_untried",
            "cooldown_share",
            "suspicion",
            "judge_memory",
            "noise_width",
            "tried_share",
            "idle_window",
        )
        for name in shares:
            self._check(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        remembered = 0.9 / max(1 - self.judge_memory, 1e-9)  # more than that fade away before they are counted
        rule = f"must be at most {remembered:.0f}, as older draws fade (`judge_memory`)"
        self._check("tried", self.tried <= remembered, rule)
        self._check("longest_rest", 0 <= self.longest_rest <= 16, "must be between 0 and 16: rests are doubled")
        fits = self.retired_after * self.doubling <= 255
        self._check("retired_after", fits, "times `doubling` must be at most 255, the longest streak that is kept")

    def wait(self, groups: float | None = None, trusted: bool = False) -> int:
        """
        Return the uniform draws before the prediction is judged.

        Args:
            groups (`float`, *optional*): of the whole run.
            trusted (`bool`, *optional*, defaults to `False`): whether success was known beforehand.
        """
        if trusted:
            return min(self.tried, self.least_tried)
        if groups is None:
            return self.tried
        return min(self.tried, max(self.least_tried, math.ceil(self.tried_share * groups)))

    def _check(self, name, holds, rule):
        if not holds:
            raise ValueError(f"`OnlineSettings({name}={getattr(self, name)!r})`: `{name}` {rule}.")
