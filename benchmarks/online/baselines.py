"""
What chooses prompts for an arm: the package's schedules, and rivals that it does not have. These are `BetaMean`, which
differs from MoPPS by the mean in the place of a draw, and `RefillingTrainer` (DAPO, 2503.14476): groups without a
gradient are replaced by fresh ones, generated at once, a bounded number of times. It makes rollouts of its own.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rivals import RIVALS
from torch.nn.functional import pad
from trl import GRPOTrainer

from trl_learnalign import LearnAlignConfig, LearnAlignSampler
from trl_learnalign.curriculum import OnlineSettings
from trl_learnalign.schedules import PUBLISHED
from trl_learnalign.schedules.online import LEARNALIGN as IN_PROPORTION
from trl_learnalign.schedules.online import OnlineSchedule
from trl_learnalign.schedules.published import MoPPS


class BetaMean(MoPPS):
    """The mean of the posterior in place of a draw from it."""

    def score(self, a, b, random):
        return -np.abs(a / (a + b) - self.target)


SCHEDULES = {"beta mean": BetaMean, **PUBLISHED}
LEARNABILITY, LEARNALIGN = {"score": "learnability"}, {"score": "learnalign"}
UNBOUND = replace(IN_PROPORTION, kinds_count=False, least_kind_share=0.0, quick_speed=0.0)  # before kinds counted
ONLINE = {  # settings of LearnAlignConfig, and of the curriculum
    "online": (LEARNABILITY, None),
    "online without features": ({**LEARNABILITY, "prompt_features": False}, None),
    "online with groups": ({**LEARNABILITY, "group_column": "task"}, None),
    "learnalign online": (LEARNALIGN, None),
    "target online": ({"score": "target", "target_column": "is_target"}, None),
    "online without fading": (LEARNABILITY, OnlineSettings(half_life_steps=1e9)),
    "online without longer rests": (LEARNABILITY, OnlineSettings(longest_rest=0)),
    "learnalign online without kinds": (LEARNALIGN, UNBOUND),
    "learnalign online on top": (LEARNALIGN, OnlineSettings()),
    "online in proportion": (LEARNABILITY, UNBOUND),
    "online with kinds": (LEARNABILITY, IN_PROPORTION),
    "learnalign online without floor": (LEARNALIGN, replace(IN_PROPORTION, least_kind_share=0.0)),
    "learnalign online without quick fit": (LEARNALIGN, replace(IN_PROPORTION, quick_speed=0.0)),
    "learnalign online flatter": (LEARNALIGN, replace(IN_PROPORTION, sharpness=2.0)),
    "learnalign online more uniform": (LEARNALIGN, replace(IN_PROPORTION, uniform=0.2)),
    **dict.fromkeys(RIVALS, (LEARNABILITY, UNBOUND)),
}


def sampler_of(arm, **settings) -> LearnAlignSampler | None:
    """The sampler of an arm, with more settings of this package; None where no schedule chooses."""
    if arm in SCHEDULES:
        return LearnAlignSampler(LearnAlignConfig(write_report=False), schedule=SCHEDULES[arm])
    if arm in ONLINE:
        own, curriculum = ONLINE[arm]
        config = LearnAlignConfig(schedule="online", write_report=False, **own, **settings)
        return LearnAlignSampler(config, schedule=partial(RIVALS.get(arm, OnlineSchedule), settings=curriculum))
    return None


class RefillingTrainer(GRPOTrainer):
    """
    DAPO's refill: as long as fewer groups than a batch holds have a gradient, another batch of fresh prompts is rolled
    out, at most `MOST` times in a step. Fresh are those that training draws last: it goes through another order of the
    same kind. For one process, a batch a step, and no images, tools, KL term or vLLM.
    """

    MOST, taken = 8, 0

    def fresh(self, number) -> list[dict]:
        rows = self.train_dataset
        order = np.random.default_rng(self.args.seed).permutation(len(rows))
        self.taken += number
        return [rows[int(order[place % len(order)])] for place in range(self.taken - number, self.taken)]

    def _generate_and_score_completions(self, inputs):
        size, groups, dead = self.num_generations, [], []
        wanted = len(inputs) // size
        for _ in range(1 + self.MOST):
            for group in self._groups(super()._generate_and_score_completions(inputs)):
                (groups if group["advantages"].any() else dead).append(group)
            if len(groups) >= wanted:
                break
            inputs = [row for row in self.fresh(wanted) for _ in range(size)]
        return self._joined((groups + dead)[:wanted])

    def _groups(self, output):
        """The tensors of each group, with the rows of a group together."""
        parts = {name: value.split(self.num_generations) for name, value in output.items() if value.dim()}
        return [dict(zip(parts, group, strict=True)) for group in zip(*parts.values(), strict=True)]

    def _joined(self, groups):
        output = {}
        for name in groups[0]:
            tensors, filling = [group[name] for group in groups], 0
            if tensors[0].dim() == 2:
                width = max(tensor.shape[1] for tensor in tensors)
                filling = self._tokenizer.pad_token_id if name.endswith("_ids") else 0
                left = name.startswith("prompt")  # which TRL pads on the left, and completions on the right
                tensors = [
                    pad(tensor, (gap, 0) if left else (0, gap), value=filling)
                    for tensor in tensors
                    for gap in [width - tensor.shape[1]]
                ]
            output[name] = torch.cat(tensors)
        return output | {"num_items_in_batch": output["completion_mask"].sum()}
