"""
Trinity-RFT: tasks chosen online. Written for Trinity-RFT 0.6.0; run with its registry and reader, not in a whole run.

Put this file where Python finds it, and name the class in the configuration of a task set:

    data_selector:
      selector_type: learnalign_trinity.OnlineSelector
      feature_keys: [length, source]  # columns that are known beforehand; may be left out
      kwargs: {repeat_times: 8}  # rollouts of a task

and let `pass_rate_calculator` be one of the operators of the experience pipeline, which gives the feedback.
"""

import base64

import numpy as np
from trinity.buffer.selector.selector import BaseSelector

from trl_learnalign.curriculum import Group, OnlineCurriculum, make_features, pack, unpack


class OnlineSelector(BaseSelector):
    def __init__(self, data_source, config):
        super().__init__(data_source, config)
        columns = [np.array(data_source.dataset[name]) for name in config.feature_keys]
        features = make_features(*columns) if columns else np.ones((data_source.dataset_size, 1))
        self.group_size = config.kwargs["repeat_times"]
        self.curriculum = OnlineCurriculum(features, group_size=self.group_size, seed=config.seed)

    def get_indices(self, batch_size, return_extra_info=False):
        rows = [draw.row for draw in self.curriculum.choose(batch_size)]
        return (rows, {}) if return_extra_info else rows

    def feedback(self, indices, values):
        """`values` are pass rates. A task is known by its row, so its feedback counts for the earliest draw."""
        for row, rate in zip(map(int, indices), values, strict=True):
            number = self.curriculum.number_of(row)
            if number is not None:
                passed = np.arange(self.group_size) < round(rate * self.group_size)
                self.curriculum.observe([Group(number, row, passed[:, None].astype(float))])
        self.curriculum.tick(1)

    def state_dict(self):
        """The state of the explorer is JSON. `current_index` is what Trinity itself reads."""
        state = base64.b64encode(pack(self.curriculum.state_dict())).decode()
        return {"current_index": self.curriculum.drawn, "learnalign": state}

    def load_state_dict(self, state_dict):
        if "learnalign" in state_dict:  # else a new run
            self.curriculum.load_state_dict(unpack(base64.b64decode(state_dict["learnalign"])))
