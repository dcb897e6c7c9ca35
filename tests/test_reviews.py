"""Passes that leave out what was solved, and reviews of all: through training, against a slow copy, and resumed."""

import shutil

import numpy as np
import pytest
import torch
from tiny import Seen, assert_same_weights, config, drawn, make_dataset, make_trainer, weights

from trl_learnalign.data.order import RandomOrder
from trl_learnalign.schedules.reviews import Reviews


RANKED = [22, 20, 19, 17, 13, 11, 8, 6, 3]


def settled(completions, row, trainer_state, **kwargs):
    """Even rows are always solved, 3, 11 and 19 until the seventh step, the others by every other rollout."""
    late = trainer_state.global_step >= 7
    return [float(r % 2 == 0 or (r % 8 == 3 and not late) or place % 2) for place, r in enumerate(row)]


def reviewed(path, **changes):
    dataset = make_dataset().add_column("grade", [float(RANKED.index(i) if i in RANKED else 99) for i in range(24)])
    settings = {"num_prompts": 9, "warmup_prompts": 4, "score": "column:grade", "where": "grade < 99"}
    settings |= {"prompt_order": "ranked", "review_every": 3, "write_report": True}
    steps = {"max_steps": 14, "save_strategy": "steps", "save_steps": 6}
    return make_trainer(path, config(**settings), dataset=dataset, **(steps | changes))


def test_solved_prompts_are_left_out_but_in_reviews_and_a_run_is_resumed_exactly(tmp_path):
    seen = Seen(settled)
    trainer = reviewed(tmp_path / "whole", reward=seen)
    chunks = drawn(trainer)
    trainer.train()
    best_first = RANKED[::-1]  # the greatest grade
    first, solved, ever, position, passes = trainer.learnalign.schedule.in_use_from, set(), set(), 0, []
    for chunk in range(len(chunks)):  # the last of which is only read ahead
        if chunk >= 2:  # drawn when the chunk before was read, and the one before that generated
            for row in dict.fromkeys(chunks[chunk - 2]):
                wins = row % 2 == 0 or (row % 8 == 3 and chunk - 2 < 7)
                (solved.add if wins else solved.discard)(row)
                ever |= {row} if wins else set()
        expected = []
        while chunk >= first and len(expected) < 4:
            number, place = divmod(position, 9)
            passes += [0] * (number == len(passes))
            if number % 3 == 0 or best_first[place] not in solved:
                expected.append(best_first[place])
                passes[number] += 1
            position += 1
        assert chunk < first or chunks[chunk] == expected
    schedule = trainer.learnalign.schedule
    assert passes[0] == passes[3] == 9 and 0 < min(passes) < 9 and schedule.reviews.passes[:, 2].tolist() == passes
    logs = [log for log in trainer.state.log_history if "learnalign/solved" in log]
    assert len(ever & set(RANKED)) == 7 and logs[-1]["learnalign/forgotten"] == pytest.approx(3 / 7)  # 3, 11, 19
    shares = [log["learnalign/solved"] for log in logs]
    assert shares[-1] == pytest.approx(4 / 9) and max(shares) == pytest.approx(7 / 9)
    page = (tmp_path / "whole/learnalign/report.html").read_text()
    assert "Passes over them" in page and 'data-label="forgotten">3<' in page
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in (12, 14):
        shutil.rmtree(tmp_path / f"again/checkpoint-{step}", ignore_errors=True)
    again = reviewed(tmp_path / "again", reward=settled)
    later = drawn(again)
    again.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-6"))
    assert [later[chunk] for chunk in range(7, 14)] == [chunks[chunk] for chunk in range(7, 14)]
    assert_same_weights(weights(trainer), weights(again))
    for name, value in schedule.state_dict()["reviews"].items():
        assert np.array_equal(again.learnalign.schedule.state_dict()["reviews"][name], value), name


def test_groups_without_rewards_and_damaged_states():
    reviews, rows = Reviews(6, 2), np.arange(6)
    rewards = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan], [0.0, 1.0], [torch.nan, torch.nan]])
    reviews.observe([0, 1, 2, 3], rewards, 1.0, rows)
    reviews.observe([1, 0], torch.tensor([[1.0, 1.0], [0.5, 1.0]]), 1.0, rows)
    reviews.observe([1], torch.full((1, 2), torch.nan), 1.0, rows)
    assert reviews.solved.nonzero()[0].tolist() == [1] and reviews.ever.nonzero()[0].tolist() == [0, 1]
    assert reviews.metrics(rows) == {"solved": pytest.approx(1 / 6), "forgotten": 0.5}
    state = reviews.state_dict()
    for name, value in {"at": np.zeros(3), "passes": np.zeros(3), "ever": np.array([6]), "solved": None}.items():
        broken = {**state, name: value} if value is not None else {key: state[key] for key in ("at", "passes", "ever")}
        with pytest.raises(ValueError, match="The reviews in the checkpoint are damaged"):
            Reviews(6, 2).load_state_dict(broken)


def test_a_selection_that_is_solved_is_reviewed_at_once():
    """No pass is left, and none of the draws is lost."""
    reviews, rows = Reviews(4, 3), np.arange(4)
    order = RandomOrder(4, 0, shuffle=False)
    first = [reviews.draw(1, order, rows) for _ in range(4)]
    reviews.observe(first, torch.ones(4, 2), 1.0, rows)
    assert [reviews.draw(1, order, rows) for _ in range(4)] == first == [0, 1, 2, 3]
    assert reviews.passes.tolist() == [[1, 0, 4, 4, 0], [1, 1, 0, 4, 0], [1, 2, 0, 4, 0], [1, 3, 4, 4, 0]]
