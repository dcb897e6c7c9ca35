"""Kinds by what became of their groups: which are held back, and the questions that can only be guessed."""

from dataclasses import replace

import numpy as np
import pytest
from test_curriculum import assert_equal

from trl_learnalign.curriculum import Group, OnlineCurriculum, OnlineSettings, pack, unpack
from trl_learnalign.curriculum.progress import Progress
from trl_learnalign.curriculum.shares import raised
from trl_learnalign.schedules.online import LEARNALIGN


SIZES = np.array([150, 100, 150, 300, 200, 100, 200, 400, 400, 333, 334])  # as the questions of benchmarks/chat
GUESSED = 9  # the kinds from here on
LEARNT = [0, 1, 3, 4, 5]  # kinds that rise with each other


class Questions:
    """A policy that learns what it trains on, a little of what is like it, and nothing of what is guessed."""

    def __init__(self, seed, steps=60, chunk=8, decided=False, **settings):
        self.decided = decided  # guesses are the same in all rollouts of a group
        self.random, self.kinds = np.random.default_rng(seed), np.repeat(np.arange(len(SIZES)), SIZES)
        self.logits = np.array([-3, -2.7, -1.8, -2.7, -5, -3, -5, -7, -7, -0.3, -0.3])
        self.chunk, self.got = chunk, np.zeros(len(SIZES))
        features = np.concatenate([np.ones((len(self.kinds), 1)), np.eye(len(SIZES))[self.kinds]], axis=1)
        own = replace(LEARNALIGN, alignment=False, **settings)
        self.curriculum = OnlineCurriculum(
            features.astype(np.float16),
            group_size=8,
            seed=seed,
            settings=own,
            groups=steps * chunk,
            kinds=self.kinds,
        )

    def rates(self):
        return 1 / (1 + np.exp(-self.logits))

    def step(self):
        draws = self.curriculum.choose(self.chunk)
        kinds = self.kinds[[draw.row for draw in draws]]
        rewards = self.random.random((self.chunk, 8)) < self.rates()[kinds][:, None]
        if self.decided:
            rewards[kinds >= GUESSED] = rewards[kinds >= GUESSED, :1]
        groups = [
            Group(draw.number, draw.row, own[:, None].astype(float)) for draw, own in zip(draws, rewards, strict=True)
        ]
        self.curriculum.observe(groups)
        self.curriculum.tick(1)
        size = rewards.std(axis=1)
        for kind in range(GUESSED):
            self.logits[kind] += 0.25 * size[kinds == kind].sum()
            self.logits[kind] += 0.05 * size[kinds < GUESSED].sum() * (kind in LEARNT)
        np.add.at(self.got, kinds, 1)
        return draws

    def run(self, steps=60):
        for _ in range(steps):
            self.step()
        return self.got[GUESSED:].sum() / self.got.sum(), self.rates()[:GUESSED].mean()


@pytest.mark.parametrize("decided", [False, True])
def test_what_can_only_be_guessed_gets_no_more_than_its_share(decided):
    """On average; and the others are learnt, with every seed."""
    shares = []
    for seed in range(4):
        share, success = Questions(seed, decided=decided).run()
        without, failed = Questions(seed, decided=decided, kinds_count=False).run()
        assert success > failed + 0.05 and share < without - 0.1
        shares.append(share)
    assert np.mean(shares) <= SIZES[GUESSED:].sum() / SIZES.sum() + 0.02


def test_each_of_the_two_is_needed():
    """A guess that is the same in all rollouts has no gradient, and one that is not has no rise."""
    plain, realised = Questions(0, idle_factor=1.0).run()[0], Questions(0, decided=True, idle_factor=1.0).run()[0]
    assert realised < 0.25 < 0.4 < plain


def test_where_nothing_is_guessed_little_changes():
    """A kind that rises is not held back, though another one is."""
    found = []
    for counts in (True, False):
        one = Questions(0, kinds_count=counts)
        one.logits[GUESSED:] = -9.0  # never solved
        found.append((one.run()[1], one.got[:6].sum() / one.got.sum()))
    (success, share), (plain, plain_share) = found
    assert success > plain - 0.05 and share > plain_share - 0.15


def test_a_kind_is_idle_by_its_latest_groups():
    """Against means and errors of a list."""
    world = Questions(3)
    progress, kept = world.curriculum.progress, {kind: [] for kind in range(len(SIZES))}
    observe = progress.observe

    def noted(batch):
        for row, rate, prior, fits in zip(
            batch.drawn.rows, batch.rates, batch.drawn.slow, batch.scored & batch.drawn.learnt, strict=True
        ):
            if fits:
                kept[world.kinds[row]].append(rate - prior)
        observe(batch)

    progress.observe = noted
    assert progress.window == 20  # .02 of 480 groups would be less
    seen = set()
    for _ in range(60):
        world.step()
        for kind, idle in enumerate(progress.is_idle()):
            gains = np.array(kept[kind][-20:])
            if len(gains) < 20:
                assert not idle
                continue
            error = np.sqrt((((gains - gains.mean()) ** 2).sum() + 0.25) / 20 / 20)
            assert idle == (gains.mean() <= 1.5 * error)
            seen.add((kind >= GUESSED, bool(idle)))
    assert {(True, True), (False, False)} <= seen
    curriculum = world.curriculum
    curriculum.choose(8)  # by the quick fit, and told to rise by the slow one
    drawn = curriculum.flight
    np.testing.assert_array_equal(drawn.slow, curriculum.predictor.predict(drawn.rows, slow=True))
    assert np.abs(drawn.slow - drawn.prior).max() > 0.01


def test_what_was_realised_is_that_of_a_loop():
    world, random = Questions(4, decided=True), np.random.default_rng(0)
    progress, kept = world.curriculum.progress, {kind: [] for kind in range(len(SIZES))}
    observe = progress.observe

    def noted(batch):
        drawn = batch.drawn
        for place in np.flatnonzero(batch.scored & drawn.learnt):
            rates = random.binomial(8, random.beta(drawn.a[place], drawn.b[place], 20_000)) / 8
            expected = np.sqrt(rates * (1 - rates)).mean()
            kept[world.kinds[drawn.rows[place]]].append((np.nanstd(batch.outcomes[place]), expected))
        observe(batch)

    progress.observe = noted
    world.run(40)
    for kind, ratio in enumerate(progress.realised()):
        latest = np.array(kept[kind][-progress.window :]).reshape(-1, 2)
        observed, expected = latest.sum(0) * [1, 0.5] + 1
        assert ratio == pytest.approx(min(observed / expected, 1), rel=0.03)
    factors = progress.factors(np.arange(len(world.kinds)))
    own = progress.realised() * np.where(progress.is_idle(), 0.33, 1.0)
    assert factors == pytest.approx(own[world.kinds]) and own.min() < 0.4


@pytest.mark.parametrize(("groups", "window"), [(None, 64), (100, 20), (2000, 40), (10**6, 128)])
def test_the_window_is_a_part_of_the_run(groups, window):
    assert Progress(np.zeros(9, np.int16), 1, 8, OnlineSettings(kinds_count=True), groups).window == window


def test_a_resumed_run_chooses_the_same():
    world = Questions(5)
    world.run(30)
    state = unpack(pack(world.curriculum.state_dict()))
    other = Questions(5, steps=90)  # of a longer run
    other.curriculum.load_state_dict(state)
    other.random.bit_generator.state, other.logits = world.random.bit_generator.state, world.logits.copy()
    for _ in range(15):
        assert [draw.row for draw in world.step()] == [draw.row for draw in other.step()]
    assert_equal(world.curriculum.state_dict(), other.curriculum.state_dict())
    assert other.curriculum.progress.window == 20
    state["progress"]["gains"] = state["progress"]["gains"][:3]
    with pytest.raises(ValueError, match="gains has the shape"):
        other.curriculum.load_state_dict(state)


def test_prompts_of_no_kind_and_the_log():
    kinds = np.where(np.arange(60) % 3, np.arange(60) % 2, -1)
    settings = OnlineSettings(utility="deviation", sharpness=2.0, kinds_count=True, tried=4, begin_skill=-9.0)
    curriculum = OnlineCurriculum(np.ones((60, 1)), group_size=4, settings=settings, kinds=kinds)
    random = np.random.default_rng(0)
    for _ in range(60):
        draws = curriculum.choose(4)
        rewards = (random.random((4, 4, 1)) < 0.5).astype(float)
        curriculum.observe([Group(d.number, d.row, own) for d, own in zip(draws, rewards, strict=True)])
    assert curriculum.metrics()["idle_kinds"] == 2
    found = curriculum.progress.factors(np.arange(6))
    assert found[[0, 3]].tolist() == [1, 1] and (found[[1, 2, 4, 5]] < 1).all()
    plain = OnlineCurriculum(np.ones((60, 1)), group_size=4, kinds=kinds)
    assert plain.progress is None and plain.state_dict()["progress"] is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"idle_factor": 0.0}, "must be above 0, and 1 at most"),
        ({"least_kind_share": 1.0}, "must be at least 0 and below 1"),
        ({"idle_window": 2.0}, "must be between 0 and 1"),
        ({"least_idle_window": 0}, "must be at least 1"),
    ],
)
def test_settings_out_of_their_range(settings, words):
    with pytest.raises(ValueError, match=words):
        OnlineSettings(**settings)


def test_the_report_says_which_kinds_are_held_back():
    from trl_learnalign.report.online_kinds import kinds_section

    world = Questions(1)
    world.run()
    names = [f"kind {number}" for number in range(len(SIZES))]
    found = world.curriculum.report(names)["run"]["kinds"]
    idle = world.curriculum.progress.is_idle()
    assert [one["idle"] for one in found] == idle.tolist() and idle[GUESSED:].any() and not idle.all()
    page = kinds_section(found, "source", graded=False)
    assert all((f"kind {kind} (held back)" in page) == held for kind, held in enumerate(idle))


def test_a_kind_whose_chosen_groups_rise_is_not_warned_of():
    """A dozen uniform draws alone cannot tell a slow rise from none; hundreds of groups can."""
    world = Questions(0)
    world.run()
    kinds, idle = world.curriculum.kinds, world.curriculum.progress.is_idle()
    rising, staying = 0, GUESSED
    assert idle[staying] and not idle[rising]
    for kind in (rising, staying):
        kinds.uniform[kind], kinds.first[kind], kinds.latest[kind] = 32, 0.45, 0.45
        kinds.late[kind] *= 2 * kinds.late.sum(0)[0] / kinds.late[kind, 0]
        kinds.totals[kind] += 100
    assert kinds.greedy()[[rising, staying]].all() and kinds.is_noise()[[rising, staying]].all()
    warned = [one["warnings"] for one in world.curriculum.report(None)["run"]["kinds"]]
    assert "greedy" in warned[staying] and "greedy" not in warned[rising]
    rows = np.flatnonzero(np.isin(kinds.labels, [rising, staying]))
    world.curriculum.memory.successes[rows] = world.curriculum.memory.failures[rows] = 20
    world.curriculum.memory.visits[rows] = 9
    noise = kinds.labels[rows[world.curriculum.is_noise(rows)]]
    assert set(noise) == {staying}


def drawn_shares(logs, kinds, number):
    weights = np.exp(logs - logs[np.isfinite(logs)].max())
    return np.array([weights[kinds == kind].sum() for kind in range(-1, number)]) / weights.sum()


def test_a_kind_that_is_alive_gets_a_part_of_its_share():
    """Against shares raised one by one, the others scaled, until none is below its part; order inside a kind stays."""
    random = np.random.default_rng(0)
    for trial in range(30):
        number = 6
        kinds = random.integers(-1, number, 300).astype(np.int16)
        logs = random.normal(0, 4, 300) - 3 * kinds
        logs[random.random(300) < 0.3] = -np.inf
        logs[kinds == 4] = -np.inf  # none of them can be drawn now
        success = np.where(kinds == 2, 0.01, 0.5)  # hardly ever solved
        sizes, part = random.integers(20, 80, number), random.choice([0.2, 0.5, 0.9])
        found = raised(logs, success, kinds, sizes, part)
        shares, least = drawn_shares(logs, kinds, number), np.append(0, part * sizes / sizes.sum())
        least[[3, 5]] = 0.0  # kinds 2 and 4
        held = {}
        while (low := [i for i, share in enumerate(shares) if share < least[i] - 1e-12]) and len(held) < number:
            held[low[0]] = least[low[0]]
            rest = sum(share for i, share in enumerate(shares) if i not in held)
            shares = [held.get(i, share * (1 - sum(held.values())) / rest) for i, share in enumerate(shares)]
        assert drawn_shares(found, kinds, number) == pytest.approx(np.array(shares), abs=1e-9), trial
        one = np.isfinite(logs) & (kinds == 1)
        assert np.ptp(found[one] - logs[one]) < 1e-9 and np.array_equal(np.isfinite(found), np.isfinite(logs))
    assert raised(logs, success, kinds, sizes, 0.0) is logs
    nothing = np.full(300, -np.inf)
    assert raised(nothing, success, kinds, sizes, 0.5) is nothing


def test_what_is_held_back_is_drawn_now_and_then():
    """A kind at one half that never rises, such as one that is slow to learn: half of its share, about."""
    found, guessed = {}, SIZES[GUESSED:].sum() / SIZES.sum()
    for part in (0.0, 0.5):
        worlds = [Questions(seed, decided=True, least_kind_share=part) for seed in range(2)]
        for world in worlds:
            world.run()
        found[part] = np.mean([world.got[GUESSED:].sum() / world.got.sum() for world in worlds])
    assert found[0.0] < 0.5 * guessed < found[0.5] < 0.8 * guessed
