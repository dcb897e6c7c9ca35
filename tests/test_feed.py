"""A curriculum in one process and its replica in another: the same events make the same state, and no draw is lost."""

import numpy as np
import pytest
from test_curriculum import assert_equal

from trl_learnalign.curriculum import Draw, Group, OnlineCurriculum, make_features
from trl_learnalign.curriculum.feed import AHEAD, CHOSE, FINISHED, TICKED, Feed, Ledger, Replica


def curriculum_of(seed=0, size=60):
    features = make_features(np.random.default_rng(1).standard_normal(size))
    return OnlineCurriculum(features, group_size=4, seed=seed)


class Both:
    """A feed whose events come to a replica, as through a queue between processes."""

    def __init__(self, one=None, other=None, pending=(), ledger=None):
        self.events, self.random = [], np.random.default_rng(0)
        self.feed = Feed(one or curriculum_of(), pending, self.events.append)
        self.ledger = ledger or Ledger()
        self.replica = Replica(other or curriculum_of(), self.ledger)
        self.flight = [self.feed.next() for _ in range(12)]

    def run(self, groups, samples=4):
        for _ in range(groups):
            draw = self.flight.pop(int(self.random.integers(len(self.flight))))
            rewards = (self.random.random((4, 1)) < 0.5).astype(float)
            self.feed.finished(Group(draw.number, draw.row, rewards), samples, "a text")
            self.feed.tick(self.feed.curriculum.history.observed // 8)
            self.flight.append(self.feed.next())

    def deliver(self, number=None):
        while self.events and (number is None or number > 0):
            self.replica.apply(self.events.pop(0))
            number = None if number is None else number - 1

    def states(self):
        return self.feed.curriculum.state_dict(), self.replica.curriculum.state_dict()


def test_a_replica_comes_to_the_same_state():
    both = Both()
    both.run(70)
    kinds = {kind for kind, _ in both.events}
    assert {CHOSE, FINISHED, TICKED} <= kinds
    both.deliver(40)  # late
    assert both.replica.curriculum.history.observed < both.feed.curriculum.history.observed
    both.deliver()
    assert_equal(*both.states())
    assert both.feed.curriculum.completions == both.replica.curriculum.completions
    drawn = both.feed.curriculum.drawn
    assert list(both.ledger.pending) == list(range(drawn)) and both.ledger.done == 0  # nothing was trained on yet


def test_draws_are_handed_out_one_by_one_in_their_order():
    feed = Feed(curriculum_of(), [Draw(5, 3), Draw(9, 8)], lambda event: None)
    draws = [feed.next() for _ in range(2 + AHEAD + 1)]
    assert draws[:2] == [Draw(5, 3), Draw(9, 8)]
    assert [draw.number for draw in draws[2:]] == list(range(AHEAD + 1))


def test_a_replica_that_chooses_otherwise_says_so():
    both = Both(other=curriculum_of(seed=1))
    with pytest.raises(RuntimeError, match="rollout worker chose the prompts .* where the trainer chooses"):
        both.deliver()


@pytest.mark.parametrize("early", [True, False])
def test_a_draw_is_done_when_all_rows_of_its_group_came(early):
    """Whether training hears of the rows or of the finished group first."""
    ledger = Ledger()
    ledger.chose([(0, 30), (1, 31), (2, 32)])
    if early:
        ledger.came(1, 2)
        assert ledger.is_behind
    ledger.finished(1, 3)
    assert not ledger.is_behind and list(ledger.pending) == [0, 1, 2]
    if not early:
        ledger.came(1, 2)
    ledger.came(1)
    assert list(ledger.pending) == [0, 2] and ledger.done == 1
    ledger.finished(2, 0)  # a group that is dropped
    assert ledger.draws() == [Draw(0, 30)] and ledger.done == 2


def test_a_resumed_run_draws_what_was_not_done_first_and_loses_nothing():
    both = Both()
    both.run(30)
    both.deliver()
    for number in range(20):
        both.ledger.came(number, 4)
    done = both.ledger.done
    open_draws = both.ledger.draws()
    assert done and {draw.number for draw in open_draws} == set(range(both.feed.curriculum.drawn)) - {
        number for number in range(20) if number not in both.ledger.pending
    }
    # Killed: what the checkpoint holds goes into another process
    ledger, again, replica = Ledger(), curriculum_of(), curriculum_of()
    ledger.load_state_dict(both.ledger.state_dict())
    for one in (again, replica):
        one.load_state_dict(both.replica.curriculum.state_dict())
    resumed = Both(again, replica, ledger.draws(), ledger)
    assert resumed.flight == open_draws[:12]
    resumed.run(40)
    resumed.deliver()
    assert_equal(*resumed.states())
    finished = set(range(again.drawn)) - set(ledger.pending)
    assert ledger.done == done and len(finished) == done  # none twice: groups observed before change nothing
    observed = again.history.observed
    resumed.feed.finished(Group(open_draws[0].number, open_draws[0].row, np.ones((4, 1))), 4)
    assert again.history.observed == observed


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(rows=state["rows"][:-1]),
        lambda state: state.update(numbers=state["numbers"][::-1].copy()),
    ],
)
def test_a_damaged_ledger_is_refused(change):
    ledger = Ledger()
    ledger.chose([(0, 3), (4, 5)])
    state = ledger.state_dict()
    change(state)
    with pytest.raises(ValueError, match="draws that are not done"):
        Ledger().load_state_dict(state)
