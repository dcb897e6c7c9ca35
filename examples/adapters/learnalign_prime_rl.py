"""
prime-rl: tasks chosen online. Written for prime-rl of August 2026, not run with it.

prime-rl names its samplers in a closed list, so the sampler is put in the place of the one that was made:

    from learnalign_prime_rl import OnlineSampler  # this file

    curriculum = train_source.curricula["my-env"]
    curriculum.sampler = OnlineSampler(curriculum.sampler.tasks, group_size=16)
"""

import numpy as np
from prime_rl.orchestrator.curriculum.samplers.base import TaskSampler

from trl_learnalign.curriculum import Group, OnlineCurriculum, pack, unpack


class OnlineSampler(TaskSampler):
    """
    Args:
        tasks: of the environment, with different keys.
        group_size: episodes of a task. A group may have fewer, where some ended with an error.
        features: of the tasks, from `make_features`; without them success is learnt from rewards alone.
        ahead: tasks that are chosen at once, and handed out one by one.
    """

    def __init__(self, tasks, group_size, features=None, seed=0, ahead=16):
        self.tasks, self.ahead, self.chosen = tuple(tasks), ahead, []
        self.rows = {task.key: row for row, task in enumerate(self.tasks)}
        features = np.ones((len(self.tasks), 1)) if features is None else features
        self.curriculum = OnlineCurriculum(features, group_size=group_size, seed=seed)

    def __next__(self):
        if not self.chosen:
            self.chosen = [draw.row for draw in self.curriculum.choose(self.ahead)]
        return self.tasks[self.chosen.pop(0)]

    def observe(self, group):
        """A group is known by the key of its task, so it counts for the earliest draw."""
        row = self.rows[group[0].task.key]
        traces = [trace for episode in group for trace in episode.traces]
        rewards = [trace.reward for trace in traces if not trace.has_error and trace.agent.trainable]
        number = self.curriculum.number_of(row)
        if rewards and number is not None:
            self.curriculum.observe([Group(number, row, np.array(rewards, float)[:, None])])

    def tick(self, steps=1):
        """Count optimizer steps, where the orchestrator learns of a new policy; else nothing fades."""
        self.curriculum.tick(steps)

    def state_dict(self):
        return {"chosen": self.chosen, "learnalign": pack(self.curriculum.state_dict())}

    def load_state_dict(self, state_dict):
        self.chosen = list(state_dict["chosen"])
        self.curriculum.load_state_dict(unpack(state_dict["learnalign"]))

    def metrics(self):
        return {f"learnalign/{name}": value for name, value in self.curriculum.metrics().items()}
