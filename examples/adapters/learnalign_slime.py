"""
slime: prompts chosen online. Written for slime of August 2026, not run with it.

    --data-source-path learnalign_slime.OnlineDataSource
    --rollout-all-samples-process-path learnalign_slime.observe

(this file where Python finds it). The second path sees dynamically filtered groups as well.
"""

import copy
from pathlib import Path

import numpy as np
from slime.rollout.data_source import RolloutDataSource

from trl_learnalign.curriculum import Group, OnlineCurriculum, make_features, pack, unpack


KEY = "learnalign_draw"  # in a sample's metadata


class OnlineDataSource(RolloutDataSource):
    """A prompt is the place of its sample in the data set as it was read, which is not shuffled."""

    def __init__(self, args):
        args.rollout_shuffle = False
        super().__init__(args)
        self.prompts = list(self.dataset.samples)
        lengths = np.log1p([len(str(sample.prompt)) for sample in self.prompts])
        self.curriculum = OnlineCurriculum(
            make_features(lengths), group_size=args.n_samples_per_prompt, seed=args.rollout_seed
        )
        self.waiting = []  # aborted samples, which are generated first

    def get_samples(self, num_samples):
        first, self.waiting = self.waiting[:num_samples], self.waiting[num_samples:]
        missing = num_samples - len(first)
        return first + [self._group(draw) for draw in (self.curriculum.choose(missing) if missing else [])]

    def _group(self, draw):
        group = []
        for _ in range(self.args.n_samples_per_prompt):
            sample = copy.deepcopy(self.prompts[draw.row])
            sample.group_index, sample.index = draw.number, self.sample_index
            sample.metadata = {**sample.metadata, KEY: [draw.number, draw.row]}
            self.sample_index += 1
            group.append(sample)
        return group

    def add_samples(self, samples):
        self.waiting += samples

    def observe(self, groups):
        found = []
        for group in groups:
            samples = [part for one in group for part in (one if isinstance(one, list) else [one])]
            number, row = samples[0].metadata[KEY]
            rewards = [one.get_reward_value(self.args) for one in samples if one.reward is not None]
            if rewards:
                found.append(Group(number, row, np.array(rewards, float)[:, None]))
        self.curriculum.observe(found)
        self.curriculum.tick(1)

    def _file(self, folder, rollout_id):
        return Path(folder) / "rollout" / f"learnalign_{rollout_id}.npz"

    def save(self, rollout_id):
        super().save(rollout_id)
        file = self._file(self.args.save, rollout_id)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pack(self.curriculum.state_dict()))

    def load(self, rollout_id=None):
        super().load(rollout_id)
        if self.args.load is not None and self._file(self.args.load, rollout_id).is_file():
            self.curriculum.load_state_dict(unpack(self._file(self.args.load, rollout_id).read_bytes()))


def observe(args, all_samples, data_source):
    """`data_source` is the method `get_samples` of the source."""
    data_source.__self__.observe(all_samples)
