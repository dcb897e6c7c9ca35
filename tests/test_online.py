"""The online schedule on simulated policies, against plain loops, and through trainer.train()."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from trl.trainer.utils import RepeatSampler

from trl_learnalign import LearnAlignConfig, LearnAlignSampler
from trl_learnalign.curriculum import judge, memory, predictor
from trl_learnalign.curriculum.draws import UniformDraws
from trl_learnalign.curriculum.graded import VarianceCurve
from trl_learnalign.curriculum.predictor import SuccessPredictor, expected_learnability
from trl_learnalign.host import Host
from trl_learnalign.run.layout import Layout
from trl_learnalign.run.state import decided, join, split
from trl_learnalign.schedules import online
from trl_learnalign.schedules.tap import first_rollouts
from trl_learnalign.scores import maths as scoring


GROUP = 8


def host(names=("reward",), weights=None):
    """As far as the schedule's arithmetic needs a trainer; the runs below have a real one."""
    weights = torch.tensor(weights or [1.0] * len(names))

    def total(rewards):
        return (rewards * weights).nansum(-1).masked_fill(rewards.isnan().all(-1), torch.nan)

    def advantages(rewards, penalties):
        return scoring.advantages(rewards, weights, "group", "sum_then_normalize")

    found = SimpleNamespace(reward_names=list(names), total=total, accelerator=SimpleNamespace(is_main_process=False))
    found.advantages = advantages
    found.deciding = partial(Host.deciding, found)
    return found


class World:
    """A pool whose prompts have true success rates, of which features tell something."""

    def __init__(
        self, size=2000, chunk=16, mean=-3.0, spread=3.0, noise=0.7, seed=0, informed=True, shuffle=True, **config
    ):
        self.random = np.random.default_rng(seed)
        x = self.random.normal(size=(size, 4))
        self.logits = mean + spread * x[:, 0] + noise * self.random.normal(size=size)
        features = np.concatenate([np.ones((size, 1)), x if informed else self.random.normal(size=(size, 4))], axis=1)
        self.sampler = LearnAlignSampler(LearnAlignConfig(schedule="online", **config))
        layout = Layout(
            pool_size=size,
            num_prompts=max(size // chunk, 1) * chunk,
            warmup_prompts=0,
            chunk_prompts=chunk,
            repeats=1,
            group_size=GROUP,
            accumulation=1,
            read_ahead=1,
            epochs=1.0,
            shuffle=shuffle,
            seed=seed,
        )
        self.sampler.bind(layout)
        self.schedule = self.sampler.schedule
        self.schedule.host = host()
        self.schedule.set_features(features.astype(np.float16))

    def rewards(self, rows):
        p = 1 / (1 + np.exp(-self.logits[rows]))
        return (self.random.random((len(rows), GROUP, 1)) < p[:, None, None]).astype(float)

    def run(self, chunks, first=0, drift=0.0):
        """The rows of each chunk; each is drawn before the one before it was observed, as a dataloader does."""
        rows = [np.array(self.schedule.prompts(first))]
        for chunk in range(first, first + chunks):
            rows.append(np.array(self.schedule.prompts(chunk + 1)))
            self.schedule.observe(chunk, self.rewards(rows[-2]))
            self.logits = self.logits + drift
        return rows[:-1]

    def live(self, rows):
        p = 1 / (1 + np.exp(-self.logits[np.concatenate(rows)]))
        return (1 - p**GROUP - (1 - p) ** GROUP).mean()


# Maths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (2.0, 6.0), (1.0, 1.0), (9.0, 1.3)])
def test_expectations_are_integrals_over_the_beta_density(a, b):
    p = (np.arange(200_000) + 0.5) / 200_000
    density = p ** (a - 1) * (1 - p) ** (b - 1)
    density /= density.sum()
    ends = np.array([a]), np.array([b])
    assert expected_learnability(*ends)[0] == pytest.approx((density * p * (1 - p)).sum(), rel=2e-3)
    fail = (density * (1 - p) ** GROUP).sum()
    assert predictor.all_fail(*ends, GROUP)[0] == pytest.approx(fail, rel=2e-3)


def test_the_regression_is_the_minimum_of_its_loss():
    """Against plain gradient descent on the penalised likelihood."""
    random = np.random.default_rng(0)
    x = np.concatenate([np.ones((60, 1)), random.normal(size=(60, 3))], axis=1).astype(np.float32)
    model = SuccessPredictor(x)
    chunks = np.repeat(np.arange(6), 10)
    successes = random.integers(0, GROUP + 1, 60)
    for chunk in range(6):
        rows = np.flatnonzero(chunks == chunk)
        model.observe(chunk, rows, successes[rows], np.full(10, float(GROUP)))
    for _ in range(20):  # to convergence
        model._fit(5)
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor(predictor.GROUP_WEIGHT * 0.5 ** ((5 - chunks) / predictor.HALF_LIFE))
    y = torch.tensor(successes / GROUP)
    for _ in range(20_000):
        logits = torch.tensor(x, dtype=torch.float64) @ w
        loss = (counts * torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")).sum()
        loss = loss + predictor.RIDGE / 2 * w.square().sum()
        (gradient,) = torch.autograd.grad(loss, w)
        w.data -= 0.005 * gradient
    np.testing.assert_allclose(model.weights, w.detach().numpy(), atol=1e-6)


def test_concentration_is_that_of_the_prompts():
    """Success rates drawn from Beta(kappa q, kappa (1 - q)) around what is predicted give kappa back."""
    random = np.random.default_rng(1)
    for kappa in (1.0, 4.0, 20.0):
        model = SuccessPredictor(np.ones((4000, 1), np.float32))
        p = random.beta(kappa * 0.3, kappa * 0.7, 4000)
        for chunk in range(40):
            rows = np.arange(chunk * 100, chunk * 100 + 100)
            model.observe(chunk, rows, random.binomial(GROUP, p[rows]), np.full(100, float(GROUP)))
        assert model.concentration == pytest.approx(kappa, rel=0.35)


def test_posteriors_and_rests_are_those_of_a_loop_over_prompts():
    world = World(size=60, chunk=4)
    schedule = world.schedule
    seen = {}
    rows = [np.array(schedule.prompts(0))]
    for chunk in range(40):
        rows.append(np.array(schedule.prompts(chunk + 1)))
        rewards = world.rewards(rows[chunk])
        schedule.observe(chunk, rewards)
        for row, own in zip(rows[chunk].tolist(), rewards[:, :, 0].sum(1), strict=True):
            seen.setdefault(row, []).append((chunk, own))
    assert np.count_nonzero(schedule.memory.visits) == len(seen)
    for row, visits in seen.items():
        half = [0.5 ** ((41 - chunk) / memory.HALF_LIFE) for chunk, _ in visits]
        kappa, q = schedule.predictor.concentration, schedule.predictor.predict(np.array([row]))[0]
        a, b = schedule.posterior(np.array([row]), 41)
        assert a[0] == pytest.approx(
            kappa * q + sum(f * own for f, (_, own) in zip(half, visits, strict=True)), rel=1e-5
        )
        wrong = sum(f * (GROUP - own) for f, (_, own) in zip(half, visits, strict=True))
        assert b[0] == pytest.approx(kappa * (1 - q) + wrong, rel=1e-5)
        right_streak = failed_streak = 0
        for _, own in visits:
            right_streak = right_streak + 1 if own == GROUP else 0
            failed_streak = failed_streak + 1 if own == 0 else 0
        assert (schedule.memory.solved[row], schedule.memory.failed[row], schedule.memory.visits[row]) == (
            min(GROUP * right_streak, 255),
            min(GROUP * failed_streak, 255),
            len(visits),
        )
        last, cooldown = visits[-1][0], schedule.memory.cooldown
        rest = cooldown * 2 ** min(max(right_streak, failed_streak), memory.LONGEST_REST)
        drawn_again = row in rows[40]  # not yet observed
        assert schedule.memory.ready[row] == (40 + cooldown if drawn_again else last + rest)


@pytest.mark.parametrize("number", [2, 4, 8, 12, 24, 48])
def test_one_process_has_the_first_rollout_of_each_group_though_groups_are_split(number):
    wanted = {100 + place: place for place in range(6)}  # rows, and places in a chunk of 6 groups of 8
    found = []
    for start in range(0, 48, number):
        found += [(row, start + at) for row, at in first_rollouts(wanted, start, number, 8).items()]
    assert sorted(found) == [(100 + place, 8 * place) for place in range(6)]


def test_processes_are_compared_by_decisions_and_not_by_last_digits():
    values, arrays = split({"skill": 0.3, "observed": 4, "rows": np.arange(3), "q": np.array([0.1, 0.2])})
    known = decided(values, arrays)
    nearly = split({"skill": 0.3 + 1e-16, "observed": 4, "rows": np.arange(3), "q": np.nextafter([0.1, 0.2], 1)})
    assert decided(*nearly) == known
    for change in ({"observed": 5}, {"rows": np.array([0, 2, 1])}):
        other = {"skill": 0.3, "observed": 4, "rows": np.arange(3), "q": np.array([0.1, 0.2])} | change
        assert decided(*split(other)) != known


# Choice ------------------------------------------------------------------------------------------------------------


def test_where_features_tell_most_chunks_are_live_and_elsewhere_draws_are_uniform():
    informed, blind = World(), World(informed=False, noise=3.0)
    rows, others = informed.run(100), blind.run(100)
    pool = informed.live([np.arange(2000)])
    assert informed.live(rows[20:]) > 1.8 * pool and informed.schedule.judge.skill > 0.3
    assert np.mean(blind.schedule.history.column("choosing")) <= 0.2
    assert blind.live(others) > 0.8 * blind.live([np.arange(2000)])


def test_where_every_prompt_is_live_the_order_is_that_of_trl():
    world = World(mean=0.0, spread=0.3, noise=0.2, size=320)
    rows = np.concatenate(world.run(60)).tolist()
    theirs = RepeatSampler(range(320), mini_repeat_count=1, batch_size=16, repeat_count=1, shuffle=True, seed=0)
    assert rows[:640] == [*theirs, *theirs]
    assert world.schedule.judge.headroom < judge.LEAST_HEADROOM and not world.schedule.judge.choosing


def test_headroom_that_is_gone_ends_the_choice():
    world = World()
    world.run(60)
    assert world.schedule.judge.choosing
    world.logits = np.zeros(2000)  # from now on everything is live
    world.run(300, first=60)
    assert not world.schedule.judge.choosing and world.schedule.judge.headroom < judge.LEAST_HEADROOM


def test_a_prompt_rests_and_uniform_draws_come_from_the_whole_pool():
    world = World()
    last = {}
    for chunk, rows in enumerate(world.run(80)):
        drawn = dict.fromkeys(rows.tolist(), chunk)
        assert len(drawn) == 16
        last |= drawn
    schedule = world.schedule
    share = schedule.history.calibration[1, :, 0].sum() / schedule.history.calibration[:, :, 0].sum()
    choosing = schedule.history.column("choosing").mean()
    assert share == pytest.approx(1 - choosing * (1 - online.UNIFORM), abs=0.03)


def test_the_best_that_have_rested_are_chosen_and_recent_visits_count_against_a_prompt():
    """Against a loop over the pool."""
    world = World(mean=-1.0)
    schedule, memory_ = world.schedule, world.schedule.memory
    world.run(60)
    chunk = 61
    scores = {}
    for row in range(2000):
        a, b = (float(value[0]) for value in schedule.posterior(np.array([row]), chunk))
        fade = 0.5 ** ((chunk - memory_.last[row]) / memory.HALF_LIFE)
        visits = fade * (memory_.successes[row] + memory_.failures[row]) / GROUP
        if memory_.ready[row] <= chunk:
            scores[row] = a * b / ((a + b) * (a + b + 1)) / (1 + visits)
    rows = schedule.prompts(chunk)
    drawn = schedule.drawn[chunk]
    best = [row for row, uniform in zip(rows, drawn.uniform, strict=True) if not uniform]
    assert len(best) >= 15 and set(best) <= scores.keys()
    others = [score for row, score in scores.items() if row not in set(rows)]
    assert min(scores[row] for row in best) >= max(others) - 1e-6
    again = [row for row in best if memory_.visits[row]]
    assert again  # some come again, though it counts against them


def test_prompts_rest():
    world = World()
    assert world.schedule.memory.cooldown == 12
    world.schedule.judge.look = lambda *args: setattr(world.schedule.judge, "choosing", True)
    seen = {}
    for chunk, rows in enumerate(world.run(60)):
        uniform = set(rows[: round(16 * 0.1)].tolist())
        for row in set(rows.tolist()) - uniform:
            assert chunk - seen.get(row, -100) >= world.schedule.memory.cooldown
        seen |= dict.fromkeys(rows.tolist(), chunk)


def test_solved_and_failed_prompts_rest_twice_as_long():
    world = World(size=64, chunk=8, mean=0.0, spread=0.0, noise=0.0)
    world.logits[:32] = 30.0  # always solved
    schedule = world.schedule
    schedule.judge.look = lambda *args: setattr(schedule.judge, "choosing", True)
    visits = {}
    for chunk, rows in enumerate(world.run(200)):
        for row in rows.tolist():
            visits.setdefault(row, []).append(chunk)
    solved = [len(visits.get(row, ())) for row in range(32)]
    live = [len(visits.get(row, ())) for row in range(32, 64)]
    assert np.mean(solved) >= 2 and np.mean(live) > 3 * np.mean(solved)  # seldom, but again
    kept = schedule.memory
    streaks = np.maximum(kept.solved, kept.failed).astype(int) // GROUP
    assert streaks.min() == 0 and streaks.max() >= 3
    known = np.setdiff1d(np.arange(64), schedule.drawn[200].rows)  # all but those of the chunk that comes next
    rests = kept.cooldown * 2 ** np.minimum(streaks, 6)
    np.testing.assert_array_equal(kept.ready[known], (kept.last + rests)[known])


def test_where_too_few_have_rested_those_whose_rest_ends_soonest_are_next():
    world = World(size=64, chunk=8)
    schedule = world.schedule
    schedule.judge.look = lambda *args: setattr(schedule.judge, "choosing", True)
    world.run(20)
    ready = schedule.memory.ready
    ready[:] = 1000 + np.random.default_rng(0).permutation(64)
    ready[5] = 0  # the only one that has rested
    before = ready.copy()
    rows = np.array(schedule.prompts(21))
    best = rows[~schedule.drawn[21].uniform]
    free = np.setdiff1d(np.arange(64), rows[schedule.drawn[21].uniform])
    assert len(best) >= 7
    flying = schedule.drawn[20].rows  # drawn, but not yet observed: those come last
    assert best.tolist() == sorted(free, key=lambda row: (row in flying, before[row]))[: len(best)]


def test_skill_and_success_of_the_pool_are_those_of_uniform_draws():
    """Against a loop over the draws. Each chunk's are compared with the mean of those before, and fade together."""
    world = World()
    schedule = world.schedule
    rows = [np.array(schedule.prompts(0))]
    model = mean_errors = successes = draws = beyond = learnt = 0.0
    chosen = 0
    for chunk in range(60):
        before = schedule.posterior(schedule.pool, chunk + 1)  # when the last of all is chosen
        rows.append(np.array(schedule.prompts(chunk + 1)))
        drawn = schedule.drawn[chunk]
        rewards = world.rewards(rows[chunk])
        schedule.observe(chunk, rewards)
        rates = rewards[:, :, 0].mean(1)
        uniform = [place for place in range(16) if drawn.uniform[place]]
        chosen += 16 - len(uniform)
        mean = successes / draws if draws else None
        fade = judge.MEMORY ** len(uniform)
        model, mean_errors, successes, draws, beyond, learnt = (
            fade * one for one in (model, mean_errors, successes, draws, beyond, learnt)
        )
        for place in uniform:
            if chunk > 1:  # nothing was known when the first two were drawn
                beyond, learnt = beyond + rates[place] - drawn.predicted[place], learnt + 1
                model += (drawn.predicted[place] - rates[place]) ** 2
                mean_errors += (mean - rates[place]) ** 2
            successes, draws = successes + rates[place], draws + 1
    assert chosen > 400
    assert schedule.judge.skill == pytest.approx(1 - model / mean_errors)
    a, b = before
    assert schedule.judge.pool_success == pytest.approx((a / (a + b)).mean() + beyond / learnt)


def test_success_of_the_pool_follows_a_policy_that_improves():
    world = World()
    world.run(125, drift=0.05)
    rates = 1 / (1 + np.exp(-world.logits))
    assert schedule_mean(world) < rates.mean() - 0.2  # the mean of the latest uniform draws
    assert world.schedule.judge.pool_success == pytest.approx(rates.mean(), abs=0.15)


def schedule_mean(world):
    _, _, successes, draws, *_ = world.schedule.judge.sums
    return successes / draws


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(predictor, "WINDOW", 64)
    world = World()
    world.run(40)
    state = world.schedule.state_dict()
    assert (
        len(state["drawn"]["chunks"]) <= 2
    )  # the one observed last, which a resume may ask for, and the one drawn ahead
    assert len(state["predictor"]["rows"]) == 64
    assert set(state["predictor"]["chunks"]) == {36, 37, 38, 39}


def test_the_order_of_a_sum_does_not_decide():
    """Processes may add up in another order. Their choices must be the same all the same."""
    random = np.random.default_rng(3)
    x = random.normal(size=(200, 12)).astype(np.float32)
    successes, order = random.integers(0, GROUP + 1, 200), random.permutation(200)
    found = []
    for rows in (np.arange(200), order):
        model = SuccessPredictor(x)
        model.observe(0, rows, successes[rows], np.full(200, float(GROUP)))
        found.append(model.weights)
    np.testing.assert_array_equal(*found)


def test_a_chunk_is_observed_once_and_only_if_it_was_drawn():
    world = World()
    world.run(5)
    before = split(world.schedule.state_dict())[1]
    world.schedule.observe(4, np.ones((16, GROUP, 1)))
    world.schedule.observe(99, np.ones((16, GROUP, 1)))
    for name, array in split(world.schedule.state_dict())[1].items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("stop", [1, 7, 30])
def test_a_state_goes_on_as_the_run_would_have(stop):
    whole, part = World(), World()
    part.run(stop)
    state = join(*split(part.schedule.state_dict()))
    again = World()
    again.schedule.load_state_dict(state)
    again.random = part.random
    assert [again.schedule.prompts(i) for i in range(stop, stop + 1)] == [part.schedule.prompts(stop)]
    assert len(again.schedule.prompts(0)) == 16  # an epoch is skipped through from its start
    expected = [rows.tolist() for rows in whole.run(stop + 20)[stop:]]
    assert [rows.tolist() for rows in again.run(20, first=stop)] == expected


def test_the_state_takes_at_most_40_bytes_a_prompt():
    world = World(size=50_000)
    world.run(10)
    arrays = split(world.schedule.state_dict())[1]
    assert sum(array.nbytes for array in arrays.values() if len(array) == 50_000) <= 40 * 50_000
    assert sum(array.nbytes for array in arrays.values() if len(array) != 50_000) < 200_000


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["memory"].pop("ready"),
        lambda s: s["memory"].update(ready=s["memory"]["ready"][:-1]),
        lambda s: s["memory"].update(visits=s["memory"]["visits"].astype(np.int64)),
        lambda s: s["predictor"].update(weights=np.zeros(3)),
        lambda s: s["scale"].update(recent=np.zeros((2, 2))),
        lambda s: s["drawn"].update(chunks=np.array([1, 2, 3, 4, 5])),
        lambda s: s["history"].update(calibration=np.zeros(3)),
        lambda s: s.update(observed="x"),
    ],
)
def test_loading_is_strict(damage):
    world = World()
    world.run(3)
    state = world.schedule.state_dict()
    damage(state)
    with pytest.raises(ValueError, match="damaged or of other data"):
        World().schedule.load_state_dict(state)


def test_a_pool_smaller_than_a_chunk():
    world = World(size=5, chunk=8)
    for rows in world.run(30):
        assert len(rows) == 8 and set(rows.tolist()) == set(range(5))


# Rewards -----------------------------------------------------------------------------------------------------------


def test_rewards_that_are_missing_count_for_nothing():
    world = World()
    first = world.schedule.prompts(0)
    rewards = world.rewards(np.array(first))
    rewards[0] = np.nan
    rewards[1, :3] = np.nan
    world.schedule.observe(0, rewards)
    assert world.schedule.memory.successes[first[0]] == world.schedule.memory.failures[first[0]] == 0
    assert world.schedule.memory.successes[first[1]] + world.schedule.memory.failures[first[1]] == 5
    world.schedule.prompts(1)
    world.schedule.observe(1, np.full((16, GROUP, 1), np.nan))
    assert math.isfinite(world.schedule.judge.skill)


def test_the_success_reward_decides_and_any_difference_is_live():
    world = World(success_reward="right", success_threshold=0.5)
    world.schedule.host = host(("form", "right"), [1.0, 1.0])
    rows = world.schedule.prompts(0)
    rewards = np.zeros((16, GROUP, 2))
    rewards[:, :, 1] = 1.0
    rewards[0, 0, 0] = 1.0
    world.schedule.observe(0, rewards)
    assert (world.schedule.memory.successes[rows] == GROUP).all()
    assert world.schedule.metrics()["live_fraction"] == 1 / 16


def test_graded_rewards_are_scaled_to_their_range_and_the_greatest_variance_is_chosen():
    world = World(learnability="variance", mean=0.0, spread=3.0)
    mean = 1 / (1 + np.exp(-world.logits))
    world.rewards = lambda rows: (
        -5
        + 10
        * world.random.beta(
            *(np.broadcast_to(3 * side[rows][:, None, None], (len(rows), GROUP, 1)) for side in (mean, 1 - mean))
        )
    )
    rows = world.run(80)
    chosen = np.concatenate(rows[30:])
    variance = mean * (1 - mean) / 4
    assert variance[chosen].mean() > 1.15 * variance.mean()
    scaled = world.schedule.scale(np.array([[-5.0, 0.0, 5.0, np.nan]]))
    np.testing.assert_allclose(scaled, [[0, 0.5, 1, np.nan]], atol=0.05)


@pytest.mark.parametrize("odd", [-1.0, -10.0, 100.0])
def test_one_odd_reward_does_not_mislead_the_choice(odd):
    world = World(learnability="variance")
    calls, rewards = [], world.rewards

    def with_one(rows):
        calls.append(rewards(rows))
        if len(calls) == 3:
            calls[-1][0, 0] = odd
        return calls[-1]

    world.rewards = with_one
    rows = world.run(80)
    assert world.live(rows[40:]) > 1.8 * world.live([np.arange(2000)])


def test_a_prompts_own_graded_rewards_count_for_more_where_they_vary_less():
    """Of means that differ by .15 between prompts and rewards that differ by .05 within one, its own mean says all."""
    world = World(learnability="variance", informed=False)
    means = np.clip(0.5 + 0.15 * world.random.normal(size=2000), 0.1, 0.9)
    world.rewards = lambda rows: means[rows][:, None, None] + 0.05 * world.random.normal(size=(len(rows), GROUP, 1))
    rows = np.unique(np.concatenate(world.run(60)[40:]))
    a, b = world.schedule.posterior(rows, 60)
    own, other = world.schedule.scale(means[rows]), world.schedule.predictor.predict(rows)
    far = np.abs(own - other) > 0.1
    share = ((a / (a + b) - other) / (own - other))[far]
    assert np.median(share) > 0.8


def test_where_the_variance_is_the_same_everywhere_the_curve_is_flat():
    curve, random = VarianceCurve(), np.random.default_rng(0)
    for _ in range(500):
        means = random.uniform(size=16)
        curve.observe(means, np.full(16, 0.01))
    for _ in range(500):  # from now on of a part of the means only
        curve.observe(random.uniform(0.7, 1.0, size=16), np.full(16, 0.01))
    np.testing.assert_allclose(curve(np.linspace(0, 1, 101)), 0.01, rtol=0.07)
    assert curve.ratio == pytest.approx(0.06, rel=0.6)  # of m (1 - m), whose mean is 1/6


def test_a_reward_for_the_form_does_not_make_failures_attractive():
    """
    Every completion gets half a point, and half a point more if it is right: at a mean of a half there is nothing to
    learn.
    """
    world = World(learnability="variance", mean=-3.0)
    rewards = world.rewards
    world.rewards = lambda rows: (1 + rewards(rows)) / 2
    world.schedule.scale(np.zeros(200))  # as completions without the form have shown
    rows = world.run(80)
    assert world.live(rows[30:]) > 1.25 * world.live([np.arange(2000)])


def test_one_success_ends_a_suspicion():
    world = World(mean=3.0, spread=0.0, noise=0.0)  # nearly always solved
    rows = np.concatenate(world.run(20))
    schedule, row = world.schedule, int(world.schedule.prompts(20)[0])
    schedule.drawn[20].rows[:] = [row, *rows[:15]]
    rewards = np.ones((16, GROUP, 1))
    rewards[0] = 0.0
    assert schedule.observe(20, rewards) == {row: 0}  # its completion is asked for
    assert schedule.memory.suspects()[0].tolist() == [row] and schedule.memory.num_suspects() == 1
    schedule.remember({row: "wrong"})
    assert schedule.completions == {row: "wrong"}
    schedule.prompts(21)
    schedule.drawn[21].rows[:] = [row, *rows[:15]]
    rewards[0, 3] = 1.0
    assert schedule.observe(21, rewards) == {}
    schedule.remember({})
    assert schedule.memory.num_suspects() == 0 and schedule.completions == {}
    schedule.prompts(22)
    schedule.drawn[22].rows[:] = [row, *rows[:15]]
    rewards[0] = 0.0
    assert schedule.observe(22, rewards) == {}  # nor does it come again after a success


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rewards: 0.5 * rewards, "no rollout counts as a success, though rewards differ (they lie between 0"),
        (lambda rewards: 2 + rewards, "every rollout counts as a success"),
        (lambda rewards: np.nan * rewards, "no rollout of the first chunk has a reward"),
        (lambda rewards: rewards, None),
        (lambda rewards: 0 * rewards, None),  # nothing is known of what a success would be
    ],
)
def test_where_success_cannot_be_predicted_it_is_said_once(caplog, change, words):
    world = World()
    world.schedule.host.accelerator.is_main_process = True
    rewards = world.rewards
    world.rewards = lambda rows: change(rewards(rows))
    world.run(12)
    found = [record.message for record in caplog.records if "Success cannot be predicted" in record.message]
    assert len(found) == (words is not None)
    assert all(
        words in message and ("success_threshold" in message or "reward functions" in message) for message in found
    )


def test_the_order_of_the_file_is_not_that_of_uniform_draws():
    world = World(shuffle=False)
    assert world.run(1)[0].tolist() != list(range(16))
    assert "`shuffle_dataset=False` has no effect" in world.schedule.warning(1000)
    assert World().schedule.warning(1000) is None


def test_wrong_labels_are_suspects_and_get_no_more_rollouts():
    world = World(mean=0.5, spread=2.5, noise=0.5)
    wrong = world.random.permutation(2000)[:200]
    world.logits[wrong] = -30.0
    rows = np.concatenate(world.run(250))
    assert np.isin(rows, wrong).mean() <= 0.1
    suspects, chances = world.schedule.memory.suspects()
    seen = np.intersect1d(rows, wrong)
    assert np.isin(suspects[: len(seen)], wrong).sum() >= 0.5 * len(seen)
    assert (np.diff(chances) >= -1e-8).all()


# Groups that say nothing -------------------------------------------------------------------------------------------


def world_with_unscored(share, known, **settings):
    """Rows that never get a reward; a feature tells them, or nothing does."""
    world = World(spread=1.5, **settings)
    none = world.random.random(len(world.logits)) < share
    if known:
        columns = [world.schedule.features, none[:, None], ~none[:, None]]
        world.schedule.set_features(np.concatenate(columns, axis=1).astype(np.float16))
    inner = world.rewards

    def rewards(rows):
        found = inner(rows)
        found[none[rows]] = np.nan
        return found

    world.rewards = rewards
    return world, none


@pytest.mark.parametrize(("share", "known", "most"), [(0.5, True, 0.1), (0.5, False, 0.3), (0.05, False, 0.03)])
@pytest.mark.parametrize("mean", [-1.5, 1.5])
def test_rows_that_are_never_scored_get_few_rollouts(share, known, most, mean):
    """However much the prior promises of them, which no observation ever corrects."""
    world, none = world_with_unscored(share, known, mean=mean)
    rows = world.run(100)
    assert none[np.concatenate(rows[50:])].mean() <= most
    visited = np.unique(np.concatenate(rows))
    schedule = world.schedule
    assert (schedule.memory.visits[visited] > 0).all()
    assert schedule.metrics()["unscored"] == none[visited].sum()
    assert set(schedule.prompt_columns()["state"][none & (schedule.memory.visits > 0)]) == {"unscored"}


def test_a_visit_without_a_reward_is_a_visit_and_doubles_the_rest():
    world = World()
    world.run(20)
    memory_ = world.schedule.memory
    row = int(np.flatnonzero(memory_.failed)[0])
    evidence = [one.item() for one in memory_.evidence(np.array([row]), 40)]
    before = memory_.visits[row], memory_.solved[row], memory_.failed[row]
    for number, chunk in enumerate((21, 30, 31), start=1):
        memory_.update(np.array([row]), chunk, np.zeros(1), np.zeros(1), np.array([True]))
        assert memory_.unscored[row] == number
        assert memory_.ready[row] == chunk + memory_.cooldown * 2**number
    # What was known of it stays, and fades as it would have
    assert (memory_.visits[row] - 3, memory_.solved[row], memory_.failed[row]) == before
    assert [one.item() for one in memory_.evidence(np.array([row]), 40)] == pytest.approx(evidence)
    memory_.update(np.array([row]), 40, np.ones(1), np.full(1, 8.0), np.array([False]))
    assert memory_.unscored[row] == -1 and memory_.ready[row] == 40 + memory_.cooldown


def test_of_several_success_rewards_the_first_that_gave_one_decides():
    rewards = np.array([[[np.nan, 0.3, 1.0], [0.0, 1.0, 1.0], [np.nan, np.nan, 1.0], [np.nan, np.nan, np.nan]]])
    found = Host.deciding(
        host(("a", "b", "c")), torch.from_numpy(rewards), LearnAlignConfig(success_reward=["a", "b"])
    )
    np.testing.assert_array_equal(found.numpy(), [[0.3, 0.0, np.nan, np.nan]])
    assert LearnAlignConfig(success_reward=["a"]).success_reward == "a"


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7, 0.9, 0.95, 1.0, -0.7, 0.0])
def test_a_reward_equal_to_the_threshold_is_a_success_in_both_halves(threshold):
    """TRL's rewards are float32; the sum of several may be off in the last digit."""
    for reward in (np.float32(threshold), np.nextafter(np.float32(threshold), np.float32(-9 * bool(threshold)))):
        world = World(success_threshold=threshold)
        rows = world.schedule.prompts(0)
        world.schedule.observe(0, np.full((16, GROUP, 1), reward, dtype=float))
        assert (world.schedule.memory.successes[rows] == GROUP).all()
        assert scoring.success_rates(torch.full((1, GROUP), float(reward)), threshold).item() == 1.0
    below = np.float32(threshold - 1e-4)
    assert scoring.success_rates(torch.full((1, GROUP), float(below)), threshold).item() == 0.0


def test_a_group_has_a_gradient_where_a_rollout_in_the_loss_differs_from_the_mean():
    """Against a loop. Where it has none though its outcomes differ, it is not scored."""
    world, random = World(success_threshold=0.5), np.random.default_rng(0)
    for chunk in range(30):
        rows = np.array(world.schedule.prompts(chunk))
        rewards = random.choice([0.0, 0.1, 0.5, 1.0, np.nan], size=(16, GROUP), p=[0.3, 0.1, 0.2, 0.2, 0.2])
        rewards[:3] = 0.1  # whose mean is off in the last digit
        masked = random.random((16, GROUP)) < 0.8
        expected, scored = [], []
        for own, out in zip(rewards.tolist(), masked.tolist(), strict=True):
            known = [reward for reward in own if not math.isnan(reward)]
            mean = sum(known) / max(1, len(known))
            pairs = list(zip(own, out, strict=True))
            expected.append(any(not cut and not math.isnan(r) and abs(r - mean) > 1e-9 for r, cut in pairs))
            differ = len({reward >= 0.5 for reward in known}) > 1
            scored.append(bool(known) and not all(out) and (expected[-1] or not differ))
        world.schedule.masked(chunk, masked)
        world.schedule.observe(chunk, rewards[:, :, None])
        assert world.schedule.metrics()["live_fraction"] == np.mean(expected)
        np.testing.assert_array_equal(world.schedule.memory.unscored[rows] < 0, scored)


def test_rewards_without_a_gradient_are_told_whenever_they_come(caplog):
    """Each kind once: completions that are cut, at first only some of a group; and a reward without a weight."""
    world = World(mean=0.0, spread=0.5, success_reward="right")
    world.schedule.host = host(("right", "form"), [1.0, 0.0])
    world.schedule.host.accelerator.is_main_process = True
    for chunk in range(30):
        rewards = np.concatenate([world.rewards(np.array(world.schedule.prompts(chunk)))] * 2, axis=2)
        masked = np.zeros((16, GROUP), bool)
        masked[:, : GROUP - 1] = chunk >= 10
        world.schedule.masked(chunk, masked)
        world.schedule.observe(chunk, rewards)
    said = [record.message for record in caplog.records if "last 64 groups" in record.message]
    assert len(said) == 1 and "were cut off, and `mask_truncated_completions=True`" in said[0]
    caplog.clear()
    world.schedule.host = host(("right", "form"), [0.0, 1.0])
    world.schedule.host.accelerator.is_main_process = True
    for chunk in range(30, 40):
        rewards = np.concatenate([world.rewards(np.array(world.schedule.prompts(chunk)))] * 2, axis=2)
        rewards[:, :, 1] = 1.0
        world.schedule.observe(chunk, rewards)
    said = [record.message for record in caplog.records if "last 64 groups" in record.message]
    assert len(said) == 1 and "Give the reward that decides success a weight" in said[0]
    assert world.schedule.metrics()["live_fraction"] == 0 and world.schedule.metrics()["unscored"] > 0


def test_groups_without_a_token_in_the_loss_are_dead_and_rest():
    world = World(mean=0.0, spread=0.1)
    cut = world.random.random(2000) < 0.5  # all their completions are too long
    for chunk in range(40):
        rows = np.array(world.schedule.prompts(chunk))
        rewards = world.rewards(rows)
        masked = np.repeat(cut[rows][:, None], GROUP, axis=1)
        masked[~cut[rows], :2] = True
        world.schedule.masked(chunk, masked)
        world.schedule.observe(chunk, rewards)
        assert world.schedule.metrics()["live_fraction"] <= 1 - cut[rows].mean()
    visited = world.schedule.memory.visits > 0
    np.testing.assert_array_equal((world.schedule.memory.unscored > 0)[visited], cut[visited])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda rewards, rng: rewards * np.where(rng.random(rewards.shape) < 0.05, 1.0, rng.uniform(0.9, 0.99)),
            "better",
        ),
        (lambda rewards, rng: np.where(rewards > 0, 3.0, rng.uniform(0.9, 1.2, rewards.shape)), "worse"),
        (lambda rewards, rng: rewards + 0.25 * (rng.random(rewards.shape) < 0.5), None),  # points for the form
    ],
)
def test_shaped_rewards_on_the_wrong_side_of_the_threshold_are_told(caplog, change, words):
    world = World(mean=0.0, spread=1.0)
    world.schedule.host.accelerator.is_main_process = True
    rewards, random = world.rewards, np.random.default_rng(0)
    world.rewards = lambda rows: change(rewards(rows), random)
    world.run(12)
    found = [record.message for record in caplog.records if "half of their range" in record.message]
    assert len(found) == (words is not None)
    assert all(f"rewards of the {words} half" in message and "success_threshold" in message for message in found)


# What is asked and what is ranked ----------------------------------------------------------------------------------


def test_with_large_groups_the_schedule_chooses_what_varies_more(monkeypatch):
    """All of 64 rollouts are hardly ever equal, but p (1 - p) differs all the same."""
    monkeypatch.setattr(f"{__name__}.GROUP", 64)
    world = World(mean=0.0, spread=1.4, noise=0.5)
    rows = np.concatenate(world.run(80)[20:])
    p = 1 / (1 + np.exp(-world.logits))
    assert world.schedule.judge.choosing
    assert (p * (1 - p))[rows].mean() > 1.15 * (p * (1 - p)).mean()


def test_two_equal_rollouts_say_less_than_eight(monkeypatch):
    """At p = .3 two are equal in 58 % of the visits."""
    monkeypatch.setattr(f"{__name__}.GROUP", 2)
    world = World(size=1000, mean=-0.85, spread=0.0, noise=0.0)
    world.schedule.judge.look = lambda *args: setattr(world.schedule.judge, "choosing", True)
    world.run(150)
    counts = world.schedule.memory.counts()
    assert counts["visited"] == 1000 and counts["parked"] <= 3 and counts["retired"] == 0


# Reading ahead -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "choosing"), [(400, True), (96, True), (400, False)])
def test_what_is_in_flight_is_not_drawn_again_while_others_are_free(size, choosing):
    """Seventeen chunks are drawn before the rewards of the first are known, as by `dataloader_num_workers=8`."""
    world = World(size=size, chunk=8, mean=-1.0)
    schedule = world.schedule
    schedule.judge.look = lambda *args: setattr(schedule.judge, "choosing", choosing)
    drawn = [np.array(schedule.prompts(chunk)) for chunk in range(17)]
    for chunk in range(60):
        drawn.append(np.array(schedule.prompts(chunk + 17)))
        flying = np.concatenate(drawn[chunk : chunk + 18])
        numbers = np.bincount(flying, minlength=size)
        if size == 400:
            assert numbers.max() <= (1 if choosing else 2)  # a pass of the stock order may end in between
        else:
            assert numbers.max() <= 3 and (numbers > 0).sum() >= 80  # 144 places, 96 prompts
        schedule.observe(chunk, world.rewards(drawn[chunk]))


def test_uniform_draws_that_wait_come_later():
    """So in the end every row comes equally often."""
    draws = UniformDraws(np.arange(50), seed=0)
    random, found = np.random.default_rng(0), []
    for _ in range(500):
        found += draws.take(1, random.permutation(50)[:20])
        again = UniformDraws(np.arange(50), seed=0)
        again.load_state_dict(draws.state_dict())
        assert again.postponed == draws.postponed and len(draws.postponed) <= 50
    counts = np.bincount(found, minlength=50)
    assert counts.min() >= 8 and counts.max() <= 11
    plain = UniformDraws(np.arange(50), seed=0)
    theirs = RepeatSampler(range(50), mini_repeat_count=1, batch_size=50, repeat_count=1, shuffle=True, seed=0)
    assert plain.take(100) == [*theirs, *theirs]
    assert sorted(UniformDraws(np.arange(4), 0).take(4, np.arange(4))) == [0, 1, 2, 3]  # none is free
    assert len(set(UniformDraws(np.arange(10), 0).take(5, np.arange(9)))) == 5  # too few are


def test_one_prompt_a_chunk_is_chosen_from_though_a_draw_is_uniform():
    """A chunk that is one uniform draw is no time without choosing."""
    world = World(chunk=1)
    world.run(400)
    history = world.schedule.history
    choosing = history.column("choosing") > 0
    alone = choosing & (history.column("uniform_draws") == 1)
    assert choosing.any() and alone.any()
    flips = np.count_nonzero(np.diff(choosing))
    assert len(world.schedule.periods()) == flips + 1 <= 8


def test_suspects_are_not_told_before_the_prediction_was_tried():
    world = World(size=12, chunk=1)
    for chunk in range(judge.TRIED - 1):
        world.schedule.prompts(chunk)
        world.schedule.observe(chunk, np.zeros((1, GROUP, 1)))
    assert world.schedule.num_suspects() == 0 and not len(world.schedule.suspects()[0])
    assert world.schedule.memory.solved_by() == (0, 12)
