"""
Other answers to prompts on which nothing is learnt, as changes to the online schedule, for comparison: each takes the
place of predicted alignment, and of what prompts are ranked on.

- `Progress`: utility times how much the success of a prompt's kind has risen of late, against that of the kind that
  rose most (learning progress, as of SEC and DUMP, pooled by clusters of the features).
- `BelowHalf`: E[p (1 - p)^2], which is greatest at p = 1/3, in place of E[p (1 - p)] (InSight aims at .3; of pass@k,
  ARCUS's kernel is greatest at 1 / 2k).
- `Consistent`: a tenth of the utility where of a kind's rollouts more than one in a hundred said what another of their
  group said, and got another reward.
"""

import numpy as np

from trl_learnalign.schedules.online import OnlineSchedule


class _ByKind(OnlineSchedule):
    """Utility times a factor of a prompt's kind, without gradients."""

    gradient_dim = None

    def _begin(self, *args, **kwargs):
        super()._begin(*args, **kwargs)
        curriculum = self.curriculum
        utility, kinds = curriculum.utility, curriculum.kinds
        choosable = curriculum.choosable

        def times_factor(a, b):
            found = utility(a, b)
            if len(a) != len(choosable):  # other rows than those that are ranked
                return found
            factor = np.clip(np.nan_to_num(self.factor(kinds), nan=1.0), 0.1, 1.0)
            labels = kinds.labels[choosable]
            return found * np.where(labels < 0, 1.0, factor[labels])

        curriculum.utility = times_factor

    def factor(self, kinds) -> np.ndarray:
        """The factor of each kind, shape `(kinds,)`; NaN where nothing is known."""
        raise NotImplementedError


class Progress(_ByKind):
    def factor(self, kinds):
        (now, error), (before, error_before) = kinds.success_late(), kinds.success_earlier()
        rise = np.maximum(now - before, 0.0)
        sure = rise > np.hypot(error, error_before)
        return rise / rise[sure].max() if sure.any() else np.ones(len(rise))


class Consistent(_ByKind):
    def factor(self, kinds):
        return np.where(kinds.total("inconsistent") > 0.01 * kinds.total("rollouts"), 0.1, 1.0)


class BelowHalf(OnlineSchedule):
    gradient_dim = None

    def _begin(self, *args, **kwargs):
        super()._begin(*args, **kwargs)
        self.curriculum.utility = lambda a, b: a * b * (b + 1) / ((a + b) * (a + b + 1) * (a + b + 2))


RIVALS = {"progress by kind": Progress, "consistent rewards": Consistent, "below half": BelowHalf}
