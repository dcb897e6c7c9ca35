"""
verl: prompts chosen online, in place of the curriculum sampler that verl removed. Written for verl
0.9.1, not run with it.

    VERL_USE_EXTERNAL_MODULES=learnalign_verl python -m verl.trainer.main_ppo trainer.v1.trainer_mode=learnalign ...

(this file where Python finds it), or in a package of yours the entry point

    [project.entry-points."verl.plugins"]
    learnalign = "my_package.learnalign_verl"

A group is known by its `uid`, which holds the number of its draw and its row. Groups that `filter_groups` leaves out
are never observed, so choose without it: what is chosen is mostly live.
"""

import os

import numpy as np
import transfer_queue as tq
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.rl_dataset import collate_fn

from trl_learnalign.curriculum import Group, OnlineCurriculum, pack, unpack


FILE = "learnalign.npz"


@register_trainer("learnalign")
class OnlineTrainer(PPOTrainerSync):
    # verl asks for the mode by this name wherever modes differ; this one is the synchronous one
    trainer_mode = property(lambda self: "sync", lambda self, name: None)

    def features(self, dataset):
        """Override it: what is known of the prompts, from `make_features`, a row for each prompt of the dataset."""
        return np.ones((len(dataset), 1))

    def _init_dataloader(self):
        super()._init_dataloader()
        config = self.config
        self.curriculum = OnlineCurriculum(
            self.features(self.train_dataset),
            group_size=config.actor_rollout_ref.rollout.n,
            seed=config.data.get("seed") or 0,
        )

    def _fetch_one_gen_batch(self):
        number = self.config.data.get("gen_batch_size", None) or self.config.data.train_batch_size
        draws = self.curriculum.choose(number)
        batch = collate_fn([self.train_dataset[draw.row] for draw in draws])
        batch["uid"] = np.array([f"{draw.number}-{draw.row}" for draw in draws], dtype=object)
        return tu.get_tensordict(batch)

    def _compute_advantage(self, batch, metrics):
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", "rm_scores"])
        scores = {}
        for uid, score in zip(data["uid"].tolist(), data["rm_scores"], strict=True):
            scores.setdefault(uid, []).append(float(score.sum()))
        self.curriculum.observe(
            [Group(*map(int, uid.split("-")), np.array(found)[:, None]) for uid, found in scores.items()]
        )
        self.curriculum.tick(1)
        metrics.update({f"learnalign/{name}": value for name, value in self.curriculum.metrics().items()})
        return super()._compute_advantage(batch, metrics)

    def _folder(self):
        return os.path.join(self.config.trainer.default_local_dir, f"global_step_{self.global_steps}")

    def _save_checkpoint(self):
        super()._save_checkpoint()
        with open(os.path.join(self._folder(), FILE), "wb") as file:
            file.write(pack(self.curriculum.state_dict()))

    def _load_checkpoint(self):
        result = super()._load_checkpoint()
        file = os.path.join(self._folder(), FILE)
        if os.path.exists(file):
            with open(file, "rb") as opened:
                self.curriculum.load_state_dict(unpack(opened.read()))
        return result
