"""Published methods as schedules: each against a slow copy of its paper's formulas, and end to end with a resume."""

import math
import shutil

import numpy as np
import pytest
from tiny import Seen, assert_same_weights, drawn, fixed_reward, make_dataset, make_trainer, parity_reward, weights

from trl_learnalign import LearnAlignConfig
from trl_learnalign.curriculum import Group, pack, unpack
from trl_learnalign.data.order import RandomOrder
from trl_learnalign.host import find_host
from trl_learnalign.schedules import PUBLISHED, Run
from trl_learnalign.schedules.published import ADEPT, DUMP, GRESO, LFR, SEC, base
from trl_learnalign.schedules.published.insight import mutual_information


SIZE, GROUP, CHUNK = 24, 4, 4


def settings(name, **changes):
    column = {"group_column": "source"} if name in ("sec", "dump") else {}
    return LearnAlignConfig(**({"schedule": name, "write_report": False} | column | changes))


def rows():
    return make_dataset(SIZE).add_column("source", [f"source {row % 3}" for row in range(SIZE)])


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return find_host(make_trainer(tmp_path_factory.mktemp("host"), dataset=rows(), reward=fixed_reward))


def made(name, host, **changes):
    schedule = PUBLISHED[name](Run(SIZE, CHUNK, GROUP, 7, settings(name, **changes), host.dataset))
    schedule.fit(host)
    return schedule


class World:
    """Groups whose rollouts succeed with a chance of their prompt; some have no reward."""

    def __init__(self, schedule, seed=0, size=SIZE, group=GROUP):
        self.schedule, self.random, self.group = schedule, np.random.default_rng(seed), group
        self.chance = self.random.choice([0.0, 0.2, 0.5, 0.9, 1.0], size)
        self.number, self.history = 0, []

    def chunk(self, n=CHUNK):
        found = [int(row) for row in self.schedule.choose(n)]
        groups = []
        for row in found:
            rewards = (self.random.random(self.group) < self.chance[row]).astype(float)
            if self.random.random() < 0.1:
                rewards[0] = np.nan
            groups.append(Group(self.number, row, rewards[:, None]))
            self.number += 1
        self.schedule.observe(groups)
        self.history.append([(group.row, group.rewards[:, 0]) for group in groups])
        return found


def outcome(rewards):
    return int(np.nansum(rewards)), int(np.nansum(1 - rewards))


# Each method against its formulas ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1.0, 0.5])
def test_mopps_has_the_posterior_and_takes_the_draws_nearest_to_one_half(host, kept):
    schedule = made("mopps", host)
    schedule.kept = kept
    world = World(schedule)
    for _ in range(20):
        world.chunk()
    a, b = np.ones(SIZE), np.ones(SIZE)
    for row, rewards in (one for chunk in world.history for one in chunk):
        won, lost = outcome(rewards)
        a[row], b[row] = kept * a[row] + (1 - kept) + won, kept * b[row] + (1 - kept) + lost
    np.testing.assert_allclose(schedule.arrays["a"], a)
    np.testing.assert_allclose(schedule.arrays["b"], b)
    random = np.random.Generator(np.random.Philox(key=[7, schedule.drawn]))
    places = random.choice(SIZE, SIZE, replace=False)  # 16 times four are more than there are
    far = {place: abs(draw - 0.5) for place, draw in zip(places, random.beta(a[places], b[places]), strict=True)}
    assert sorted(schedule.choose(CHUNK)) == sorted(sorted(far, key=far.get)[:CHUNK])


def test_insight_weighs_the_mutual_information(host):
    """By sums over all results of a group, and over a fine grid of success rates."""
    a, b = np.array([1.0, 3.0, 40.0]), np.array([1.0, 8.0, 2.5])
    rate = (np.arange(200_000) + 0.5) / 200_000
    for one, first, second in zip(mutual_information(a, b, 5), a, b, strict=True):
        density = rate ** (first - 1) * (1 - rate) ** (second - 1)
        density /= density.sum()
        chances = np.stack([math.comb(5, s) * rate**s * (1 - rate) ** (5 - s) for s in range(6)])
        whole = chances @ density
        conditional = -(chances * np.log(chances)).sum(0) @ density
        assert one == pytest.approx(-(whole * np.log(whole)).sum() - conditional, rel=1e-4)
    schedule = made("insight", host)
    schedule.arrays["a"][:], schedule.arrays["b"][:] = 30.0, 30.0
    schedule.arrays["a"][[3, 5]], schedule.arrays["b"][[3, 5]] = 1.0, 1.0  # of which less is known
    schedule.arrays["a"][[8, 9]], schedule.arrays["b"][[8, 9]] = 1.5, 3.5  # and nearer to .3
    assert set(schedule.choose(4)) == {3, 5, 8, 9}


def test_dps_has_the_states_of_a_chain_for_each_prompt(host):
    """The authors' update, a prompt at a time, with every prompt known from the beginning."""
    schedule = made("dps", host)
    world = World(schedule)
    counts = {row: np.ones((3, 3)) for row in range(SIZE)}
    state, before = ({row: np.ones(3) / 3 for row in range(SIZE)} for _ in range(2))
    for _ in range(25):
        found = world.chunk()
        assert len(set(found)) == CHUNK
        seen = {row: outcome(rewards) for row, rewards in world.history[-1]}
        for row in range(SIZE):
            now = state[row]
            counts_before = counts[row]
            counts[row] = 0.7 * counts_before + 0.3
            if row in seen:
                won, lost = seen[row]
                now = np.eye(3)[0 if won == 0 else 2 if lost == 0 else 1]
                moved = np.outer(now, before[row]) * counts_before / counts_before.sum(0)
                counts[row] = counts[row] + moved / moved.sum()
            before[row] = now
            following = counts[row] / counts[row].sum(0) @ now
            state[row] = following / following.sum()
    for row in range(SIZE):
        np.testing.assert_allclose(schedule.arrays["state"][row], state[row], atol=1e-4)
    chosen, chances = schedule.choose(CHUNK), np.array([state[row][1] for row in range(SIZE)])
    assert min(chances[chosen]) >= np.sort(chances)[-CHUNK] - 1e-4


def test_greso_skips_by_the_number_of_visits_without_a_gradient(host):
    schedule, later = made("greso", host), []
    world = World(schedule)
    world.chance = np.where(np.arange(SIZE) % 2, 0.5, 1.0)  # even rows are solved each time
    for chunk in range(80):
        found = world.chunk()
        later += found if chunk >= 50 else []
    assert np.mean([row % 2 == 0 for row in later]) < 0.35
    streaks, keep = np.zeros((2, SIZE), int), [0.5, 0.5]
    for chunk in world.history:
        shares = [0.0, 0.0]
        for row, rewards in chunk:
            won, lost = outcome(rewards)
            for kind, dead in enumerate((lost == 0, won == 0)):
                streaks[kind][row] = streaks[kind][row] + 1 if dead else 0
                shares[kind] += dead / CHUNK
        for kind, target in enumerate(GRESO.targets):
            keep[kind] = min(max(keep[kind] + (0.01 if shares[kind] < target else -0.01), 0.05), 0.95)
    assert schedule.arrays["streak"].tolist() == streaks.tolist()
    np.testing.assert_allclose(schedule.arrays["keep"], keep)


def test_pools_weigh_by_the_last_success_rate(host):
    schedule = made("pools", host)
    world = World(schedule)
    world.chance = np.where(np.arange(SIZE) % 3, 0.5, 1.0)
    for _ in range(30):
        world.chunk()
    expected = np.ones(SIZE)
    for row, rewards in (one for chunk in world.history for one in chunk):
        won, lost = outcome(rewards)
        expected[row] = 1.0 if 0.25 < won / (won + lost) <= 0.75 else 0.2
    assert schedule.arrays["weights"].tolist() == expected.tolist() and len(set(expected)) == 2
    many = np.concatenate([schedule.choose(CHUNK) for _ in range(300)])
    assert np.mean(expected[many] == 1) == pytest.approx(expected[expected == 1].sum() / expected.sum(), abs=0.06)


def advantages(host, rewards):
    import torch

    given = torch.from_numpy(rewards)[None, :, None]
    return np.abs(host.advantages(given, torch.zeros(1, len(rewards))).numpy()[0])


def test_sec_draws_groups_by_their_mean_absolute_advantage(host):
    schedule = made("sec", host)
    world = World(schedule)
    world.chance = np.where(np.arange(SIZE) % 3 == 0, 0.5, 0.0)
    for _ in range(25):
        world.chunk()
    value = np.zeros(3)
    for chunk in world.history:
        for group in {row % 3 for row, _ in chunk}:
            found = np.concatenate([advantages(host, rewards) for row, rewards in chunk if row % 3 == group])
            value[group] += SEC.rate * (found.mean() - value[group])
    np.testing.assert_allclose(schedule.arrays["value"], value, rtol=1e-6)
    many = np.concatenate([schedule.choose(8) for _ in range(300)])
    share = np.exp(value) / np.exp(value).sum()
    np.testing.assert_allclose(np.bincount(many % 3) / len(many), share, atol=0.04)
    assert np.argmax(share) == 0 and set(many) == set(range(SIZE))


def test_dump_draws_groups_by_their_upper_confidence_bound(host):
    schedule = made("dump", host)
    world = World(schedule)
    for _ in range(120):
        world.chunk()
    bounds, total = [], sum(map(len, world.history)) * GROUP
    for group in range(3):
        found = [advantages(host, rewards) for chunk in world.history for row, rewards in chunk if row % 3 == group]
        last = np.concatenate(found)[-DUMP.window :]
        bounds.append(last.mean() + math.sqrt(2 * math.log(total + 1) / (len(found) * GROUP + 1)))
    np.testing.assert_allclose(schedule.values(), bounds, rtol=1e-5)


def test_lfr_goes_through_all_then_the_hard_half_then_all_then_the_hardest(host):
    schedule = made("lfr", host)
    world = World(schedule)
    world.chance = np.arange(SIZE) / SIZE
    every = set(range(SIZE))
    assert {row for _ in range(SIZE // 4) for row in world.chunk()} == every
    rates = {row: outcome(rewards)[0] / sum(outcome(rewards)) for chunk in world.history for row, rewards in chunk}
    focus = [row for _ in range(SIZE // 8) for row in world.chunk()]
    left = every - set(focus)
    # The chunk that ends the first round is known when the next begins: choosing and observing take turns here
    assert len(set(focus)) == SIZE // 2 and max(rates[row] for row in focus) <= min(rates[row] for row in left)
    assert {row for _ in range(SIZE // 4) for row in world.chunk()} == every
    hardest = int(0.3 * SIZE)
    last = schedule.choose(hardest)
    assert len(set(last.tolist())) == hardest
    for chunk in world.history:
        for row, rewards in chunk:
            rates[row] = outcome(rewards)[0] / sum(outcome(rewards))
    assert max(rates[row] for row in last) <= min(rates[row] for row in every - set(last.tolist()))
    solved = {row for chunk in world.history for row, rewards in chunk if outcome(rewards)[1] == 0}
    lost = sum(rates[row] < 1 for row in solved)
    assert schedule.metrics()["forgotten"] == pytest.approx(lost / len(solved)) and LFR.focus == (0.5, 0.3)


@pytest.mark.parametrize("name", ["adept", pytest.param("adept_thompson", marks=pytest.mark.slow)])
def test_adept_chooses_the_passes_over_each_generated_batch_and_is_resumed_exactly(tmp_path, name):
    """One chunk is a step: a chunk is generated for once, and trained on as often as the bandit said then."""
    changes = {"dataset": rows(), "save_strategy": "steps", "save_steps": 3, "max_steps": 12}
    seen = Seen(fixed_reward)
    whole = make_trainer(tmp_path / "whole", settings(name), reward=seen, **changes)
    chunks = drawn(whole)
    whole.train()
    generated = [seen.rows[first : first + 16] for first in range(0, len(seen.rows), 16)]
    order = RandomOrder(SIZE, 7)
    assert [row for part in generated for row in part[::4]] == [order[place] for place in range(4 * len(generated))]
    found, start, runs = [], 0, []  # of each chunk that was generated for: its return, its first step and passes
    for part in generated:
        same = [chunks[chunk] == part[::4] for chunk in range(start, 12)]
        runs.append((start, same.index(False) if False in same else 12 - start))
        start += runs[-1][1]
        found.append(np.mean(fixed_reward([None] * 16, part)))
    assert start == 12
    logged = [log["learnalign/passes"] for log in whole.state.log_history if "learnalign/passes" in log]
    assert logged[:-1] == [passes for _, passes in runs][:-1]  # the last may be cut by the end
    if name == "adept":
        assert [passes for _, passes in runs[:3]] == [3, 2, 1]
        for j, (first, passes) in enumerate(runs[:-1]):  # drawn when the batch before was read, not yet generated for
            known = [(runs[i - 1][1], found[i]) for i in range(1, j) if runs[i][0] <= first - 2]
            bounds = []
            for arm in (3, 2, 1):
                last = [one for of, one in known if of == arm][-10:]
                number = 1 + sum(other == arm for _, other in runs[:j])
                bounds.append(np.mean(last or [0]) + 0.5 * math.sqrt(math.log(j + 1) / number))
                bounds[-1] = bounds[-1] if number > 1 else math.inf
            assert passes == (3, 2, 1)[int(np.argmax(bounds))]
    boundary = next(first for first, _ in runs if first and first % 3 == 0)
    shutil.copytree(tmp_path / f"whole/checkpoint-{boundary}", tmp_path / f"again/checkpoint-{boundary}")
    again = make_trainer(tmp_path / "again", settings(name), reward=fixed_reward, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / f"again/checkpoint-{boundary}"))
    assert_same_weights(weights(whole), weights(again))
    for key, value in whole.learnalign.schedule.state_dict().items():
        assert np.array_equal(again.learnalign.schedule.state_dict()[key], value, equal_nan=True), key


def test_adept_with_one_number_of_passes_trains_as_trl_does(tmp_path, monkeypatch):
    monkeypatch.setattr(ADEPT, "passes", (2,))
    changes = {"dataset": rows(), "max_steps": 6, "reward": parity_reward, "gradient_accumulation_steps": 2}
    ours = make_trainer(tmp_path / "ours", settings("adept"), per_device_train_batch_size=8, **changes)
    ours.train()
    trls = make_trainer(tmp_path / "trls", num_iterations=2, per_device_train_batch_size=8, **changes)
    trls.train()
    assert_same_weights(weights(ours), weights(trls))
    assert ours.num_iterations == 1  # as it was


def test_thompson_has_the_mean_and_deviation_of_each_number_of_passes(host):
    """As the authors' code keeps them: the mean of the last returns of all is what an arm gets."""
    schedule, random = made("adept_thompson", host), np.random.default_rng(0)
    known, last = {0: [], 1: [], 2: []}, []
    for arm in random.integers(0, 3, 60):
        last.append(random.random())
        schedule.reward(int(arm), last[-1])
        known[int(arm)].append(np.mean(last[-10:]))
    for arm, values in known.items():
        assert schedule.arrays["mean"][arm] == pytest.approx(np.mean(values))
        squares = 1 + np.sum((values - np.mean(values)) ** 2)  # of the deviation at first, and of the returns
        assert schedule.arrays["deviation"][arm] == pytest.approx(math.sqrt(squares / len(values)))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_iterations": 2}, "`num_iterations` is 2, but `schedule='adept'` chooses it"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            r"`steps_per_generation` \(2\) is no multiple of `gradient_accumulation_steps` \(4\)",
        ),
    ],
)
def test_adept_refuses_passes_that_are_not_its_own(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, settings("adept"), dataset=rows(), **changes)


# What they have in common ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PUBLISHED if not name.startswith("adept")])
def test_a_run_is_resumed_exactly(tmp_path, name):
    """Through the trainer: prompts, what is known of them, and weights; the log has the live share."""
    changes = {"dataset": rows(), "save_strategy": "steps", "save_steps": 2, "max_steps": 6, "reward": fixed_reward}
    whole = make_trainer(tmp_path / "whole", settings(name), **changes)
    chunks = drawn(whole)
    whole.train()
    schedule = whole.learnalign.schedule
    assert type(schedule) is PUBLISHED[name]
    per_chunk = len(chunks[0])
    assert schedule.drawn == len(chunks) * per_chunk and min(schedule._flight, default=6 * per_chunk) == 6 * per_chunk
    shares = [log["learnalign/live_fraction"] for log in whole.state.log_history if "learnalign/live_fraction" in log]
    assert len(shares) == 6 and 0 < np.mean(shares) < 1
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "again/checkpoint-2")
    seen = Seen(fixed_reward)
    again = make_trainer(tmp_path / "again", settings(name), **(changes | {"reward": seen}))
    again.train(resume_from_checkpoint=str(tmp_path / "again/checkpoint-2"))
    assert seen.rows[::4] == [row for chunk in range(2, 6) for row in chunks[chunk]]
    assert_same_weights(weights(whole), weights(again))
    assert again.learnalign.schedule.state_dict().keys() == schedule.state_dict().keys()
    for key, value in schedule.state_dict().items():
        assert np.array_equal(again.learnalign.schedule.state_dict()[key], value, equal_nan=True), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_groups_twice_late_or_never_and_a_state_of_another_pool(host, name):
    schedule, other = made(name, host), made(name, host)
    first = schedule.choose(8)
    assert first.tolist() == other.choose(8).tolist() and len(first) == 8
    groups = [Group(number, int(row), np.eye(4)[[number % 4]].T) for number, row in enumerate(first)]
    schedule.observe(groups)
    schedule.observe(groups[:3])
    schedule.observe([])
    other.observe(groups)
    state = unpack(pack(schedule.state_dict()))
    for key, value in other.state_dict().items():
        assert np.array_equal(state[key], value, equal_nan=True)
    third = made(name, host)
    third.load_state_dict(state)
    assert third.choose(8).tolist() == schedule.choose(8).tolist() == other.choose(8).tolist()
    with pytest.raises(ValueError, match="has the shape"):
        key = next(key for key, value in state.items() if key.startswith("array_"))
        third.load_state_dict(state | {key: np.zeros(99)})


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_rows_that_meet_the_condition_and_more_than_there_are(host, name):
    schedule = made(name, host, where="source != 'source 1'", selection_seed=3)
    world = World(schedule)
    found = [row for _ in range(10) for row in world.chunk()]
    assert {row % 3 for row in found} == {0, 2} and len(set(found)) > 4
    few = made(name, host, where="source == 'source 2'")
    assert len(few.choose(20)) == 20  # of eight rows


def test_draws_whose_groups_never_come_are_given_up(host, monkeypatch):
    monkeypatch.setattr(base, "MOST_IN_FLIGHT", 16)
    schedule = made("pools", host)
    for _ in range(10):
        schedule.choose(8)
    assert len(schedule._flight) == 16 and min(schedule._flight) == 64


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"schedule": "sec"}, "draws among groups, but `group_column` is not set"),
        ({"schedule": "mopps", "score": "random"}, "`score` is 'random', but has no effect with `schedule='mopps'`"),
        ({"schedule": "dps", "num_prompts": 5}, "`num_prompts` is 5, but has no effect with `schedule='dps'`"),
        ({"schedule": "lfr", "learnability": "variance"}, "which counts successes alone"),
        ({"schedule": "adept", "max_refills": 1}, "has no effect with `schedule='adept'`, which draws whole chunks"),
        ({"schedule": "greso", "group_column": "a"}, "`group_column` is 'a', but has no effect"),
        ({"schedule": "MoPPS"}, "must be one of staged, online, mopps"),
    ],
)
def test_settings_that_a_method_has_not(changes, words):
    with pytest.raises(ValueError, match=words):
        LearnAlignConfig(**changes)
