"""Kinds whose success does not rise: which they are, what they get, and what becomes of questions that are guessed."""

from dataclasses import replace

import numpy as np
import pytest
from test_curriculum import assert_equal

from trl_learnalign.curriculum import Group, OnlineCurriculum, OnlineSettings, pack, unpack
from trl_learnalign.curriculum.progress import Progress, capped
from trl_learnalign.schedules.online import LEARNALIGN


SIZES = np.array([150, 100, 150, 300, 200, 100, 200, 400, 400, 333, 334])  # as the questions of benchmarks/chat
GUESSED = 9  # the kinds from here on
LEARNT = [0, 1, 3, 4, 5]  # kinds that rise with each other


class Questions:
    """A policy that learns what it trains on, a little of what is like it, and nothing of what is guessed."""

    def __init__(self, seed, steps=60, chunk=8, **settings):
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


@pytest.mark.parametrize("seed", range(4))
def test_what_can_only_be_guessed_gets_no_more_than_its_share(seed):
    (share, success), (without, failed) = Questions(seed).run(), Questions(seed, idle_share=0.0).run()
    assert share <= SIZES[GUESSED:].sum() / SIZES.sum() < 0.5 < without
    assert success > failed + 0.1


def test_where_nothing_is_guessed_little_changes():
    """A kind that rises is not held back, though another one is."""
    shares = []
    for idle_share in (0.5, 0.0):
        one = Questions(0, idle_share=idle_share)
        one.logits[GUESSED:] = -9.0  # never solved
        shares.append((one.run()[1], one.got[:6].sum() / one.got.sum()))
    (success, share), (plain, plain_share) = shares
    assert success > plain - 0.03 and share > plain_share - 0.1 and share > 2 * SIZES[:6].sum() / SIZES.sum() * 0.5


def slow_factors(sums, most):
    """Lowers the greatest excess, again and again, until none is above its part."""
    now = sums.astype(float).copy()
    for _ in range(20_000):
        total = now.sum()
        over = now - most * total
        place = int(np.argmax(over))
        if over[place] <= 1e-12 * max(total, 1e-300):
            return now / np.where(sums > 0, sums, 1)
        others = total - now[place]
        now[place] = most[place] * others / (1 - most[place])
    raise AssertionError("no end")


def test_bounds_are_those_of_a_loop():
    random = np.random.default_rng(0)
    for _ in range(200):
        size = random.integers(2, 8)
        sums = random.exponential(size=size) ** 3
        most = np.where(random.random(size) < 0.6, random.random(size) / size, np.inf)
        most[random.integers(size)] = np.inf
        factors = capped(sums, most)
        np.testing.assert_allclose(factors, slow_factors(sums, np.minimum(most, 1 - 1e-15)), rtol=1e-6)
        assert (factors <= 1 + 1e-12).all() and (factors[np.isinf(most)] == 1).all()


def test_where_all_have_a_bound_they_share_by_it():
    sums, most = np.array([1.0, 2.0, 7.0, 0.0]), np.array([0.1, 0.1, 0.25, 0.05])
    found = capped(sums, most) * sums
    np.testing.assert_allclose(found / found.sum(), [0.1 / 0.45, 0.1 / 0.45, 0.25 / 0.45, 0.0])
    assert capped(np.zeros(3), np.full(3, np.inf)).tolist() == [1, 1, 1]


def test_a_kind_is_idle_by_its_latest_groups():
    """Against means and errors of a list."""
    world = Questions(3)
    progress, kept = world.curriculum.progress, {kind: [] for kind in range(len(SIZES))}
    observe = progress.observe

    def noted(batch):
        for row, rate, prior, fits in zip(
            batch.drawn.rows, batch.rates, batch.drawn.prior, batch.scored & batch.drawn.learnt, strict=True
        ):
            if fits:
                kept[world.kinds[row]].append(rate - prior)
        observe(batch)

    progress.observe = noted
    assert progress.window == 19  # .04 of 480 groups
    seen = set()
    for _ in range(60):
        world.step()
        for kind, idle in enumerate(progress.is_idle()):
            gains = np.array(kept[kind][-19:])
            if len(gains) < 19:
                assert not idle
                continue
            error = np.sqrt((((gains - gains.mean()) ** 2).sum() + 0.25) / 19 / 19)
            assert idle == (gains.mean() <= 1.5 * error)
            seen.add((kind >= GUESSED, bool(idle)))
    assert {(True, True), (False, False)} <= seen


@pytest.mark.parametrize(("groups", "window"), [(None, 64), (100, 16), (2000, 80), (10**6, 128)])
def test_the_window_is_a_part_of_the_run(groups, window):
    labels = np.zeros(9, np.int16)
    assert Progress(labels, np.ones(1), OnlineSettings(sharpness=1.0, idle_share=0.5), groups).window == window


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
    assert other.curriculum.progress.window == 19
    state["progress"]["gains"] = state["progress"]["gains"][:3]
    with pytest.raises(ValueError, match="gains has the shape"):
        other.curriculum.load_state_dict(state)


def test_prompts_of_no_kind_and_the_log():
    kinds = np.where(np.arange(60) % 3, np.arange(60) % 2, -1)
    settings = OnlineSettings(utility="deviation", sharpness=2.0, idle_share=0.5, tried=4, begin_skill=-9.0)
    curriculum = OnlineCurriculum(np.ones((60, 1)), group_size=4, settings=settings, kinds=kinds)
    random = np.random.default_rng(0)
    for _ in range(60):
        draws = curriculum.choose(4)
        rewards = (random.random((4, 4, 1)) < 0.5).astype(float)
        curriculum.observe([Group(d.number, d.row, own) for d, own in zip(draws, rewards, strict=True)])
    assert curriculum.metrics()["idle_kinds"] == 2
    found = curriculum.progress.factors(np.arange(6), np.ones(6))
    assert found[[0, 3]].tolist() == [1, 1] and (found[[1, 2, 4, 5]] < 1).all()
    plain = OnlineCurriculum(np.ones((60, 1)), group_size=4, kinds=kinds)
    assert plain.progress is None and plain.state_dict()["progress"] is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"idle_share": -1.0}, "must be at least 0"),
        ({"idle_share": 0.5}, "needs a `sharpness` above 0"),
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
