"""Kinds of prompts: their sums against plain loops, their clusters, and what is told of them."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_curriculum import World, assert_equal
from test_online_report import schedule_of
from tiny import EAGER, make_dataset, make_trainer

from trl_learnalign import LearnAlignConfig
from trl_learnalign.curriculum import Group
from trl_learnalign.curriculum.batch import count_inconsistent, most_frequent
from trl_learnalign.curriculum.clusters import clusters, kinds_of, nearest_rows
from trl_learnalign.curriculum.kinds import EARLIER, HALF_LIFE, WINDOW, Kinds
from trl_learnalign.report.online_tables import read_completions


def labelled(labels=None, size=300, **settings):
    """A world whose kinds are thirds of the pool by default."""
    world = World(size=size, mean=0.0, spread=1.0, **settings)
    labels = np.arange(size) % 3 if labels is None else labels
    world.curriculum.kinds = Kinds(labels, world.curriculum.pool)
    return world


def groups_of(world, chunks, together=None):
    """Rows, rewards, and whether the draw was uniform, of each group in the order of the draws; observed meanwhile."""
    found = []
    for _ in range(chunks):
        draws = world.curriculum.choose(together or world.chunk)
        uniform = world.curriculum.flight.uniform[-len(draws) :].tolist()
        rewards = world.rewards(np.array([draw.row for draw in draws]))[:, :, 0]
        found += zip([draw.row for draw in draws], rewards, uniform, strict=True)
        world.curriculum.observe([Group(one.number, one.row, own) for one, own in zip(draws, rewards, strict=True)])
    return found


def test_sums_are_those_of_a_loop():
    labels = np.where(np.arange(300) % 7 == 0, -1, np.arange(300) % 3)
    world = labelled(labels, group=4)
    world.always_choose()
    groups, kinds = groups_of(world, 70), world.curriculum.kinds
    assert kinds.sizes.tolist() == [np.count_nonzero(labels == kind) for kind in range(3)]
    late = np.zeros(3)
    for kind in range(3):
        own = [(number, *one) for number, one in enumerate(groups) if labels[one[0]] == kind]
        assert kinds.total("groups")[kind] == len(own) and kinds.total("rollouts")[kind] == 4 * len(own)
        assert kinds.total("live")[kind] == sum(0 < rewards.sum() < 4 for _, _, rewards, _ in own)
        rates = [rewards.mean() for _, _, rewards, uniform in own if uniform]
        width = min(len(rates) // 2, WINDOW)
        for part, (mean, error) in ((rates[:width], kinds.success_first()), (rates[-width:], kinds.success_now())):
            assert mean[kind] == pytest.approx(np.mean(part), rel=1e-6)
            assert error[kind] == pytest.approx(np.sqrt(width * np.var(part) + 0.25) / width, rel=1e-5)
        weights = [0.5 ** ((len(groups) - 1 - number) / HALF_LIFE) for number, *_ in own]
        mean = np.average([rewards.mean() for _, _, rewards, _ in own], weights=weights)
        assert kinds.success_late()[0][kind] == pytest.approx(mean)
        late[kind] = sum(weights)
        ages = [len(groups) - 1 - number // 64 * 64 for number, *_ in own]
        early = [one[2].mean() for one, age in zip(own, ages, strict=True) if EARLIER[0] <= age < EARLIER[1]]
        assert len(early) > 50 and kinds.success_earlier()[0][kind] == pytest.approx(np.mean(early))
    np.testing.assert_allclose(kinds.late_shares, late / late.sum())


def test_sums_depend_neither_on_the_order_nor_on_the_cut():
    found = []
    for order in (np.arange(400), np.random.default_rng(0).permutation(400)):
        world = labelled()
        draws = world.curriculum.choose(400)
        rewards = np.random.default_rng(1).integers(0, 2, (400, 8)).astype(float)
        groups = [Group(one.number, one.row, own) for one, own in zip(draws, rewards, strict=True)]
        for part in np.array_split(order, 1 if order[0] == 0 else 9):
            world.curriculum.observe([groups[place] for place in part])
        found.append(world.curriculum.kinds)
    for name in ("totals", "late", "bins", "bin_of", "uniform"):
        np.testing.assert_allclose(getattr(found[0], name), getattr(found[1], name), err_msg=name)


def test_kinds_do_not_change_what_is_chosen():
    """Today's choices, with any labels, with those of the features, and without a kind at all."""
    found = []
    for labels in (np.zeros(300, int), np.arange(300) % 5, None):
        world = World(size=300, mean=-1.0)
        if labels is not None:
            world.curriculum.kinds = Kinds(labels, world.curriculum.pool)
        found.append(np.concatenate(world.run(60)).tolist())
    assert found[0] == found[1] == found[2]
    world = World(size=300, mean=-1.0)
    world.curriculum.kinds.observe = lambda batch: None
    assert np.concatenate(world.run(60)).tolist() == found[0]


def test_a_state_goes_on_and_is_strict():
    whole, part, again = labelled(), labelled(), labelled()
    for world in (whole, part):
        world.run(30)
    whole.curriculum.kinds.observe_alignment(np.arange(9), np.linspace(0, 1, 9))
    part.curriculum.kinds.observe_alignment(np.arange(9), np.linspace(0, 1, 9))
    again.curriculum.load_state_dict(part.curriculum.state_dict())
    again.random.bit_generator.state, again.queue = part.random.bit_generator.state, part.queue
    whole.run(60)
    again.run(60)
    assert_equal(vars(whole.curriculum.kinds), vars(again.curriculum.kinds))
    for damage in (
        lambda kinds: kinds.update(sizes=kinds["sizes"][:-1]),
        lambda kinds: kinds.update(first=kinds["first"][:, :-1]),
        lambda kinds: kinds.update(late=kinds["late"].astype(np.float32)),
        lambda kinds: kinds.pop("best"),
        lambda kinds: kinds.pop("newest"),
    ):
        state = whole.curriculum.state_dict()
        damage(state["kinds"])
        with pytest.raises(ValueError, match="damaged or of other data"):
            labelled().curriculum.load_state_dict(state)
    with pytest.raises(ValueError, match="damaged or of other data"):  # other kinds
        labelled(np.arange(300) % 4).curriculum.load_state_dict(whole.curriculum.state_dict())


@pytest.mark.parametrize("labels", [np.zeros(299, int), np.zeros(300), np.full(300, -1), np.full(300, 2**15)])
def test_labels_that_are_none_are_refused(labels):
    with pytest.raises(ValueError, match=r"`kinds` have the shape .* for each of 300 prompts"):
        Kinds(labels, np.arange(300), 300)


def test_alignments_are_means_by_kind():
    kinds = Kinds(np.array([0, 0, 1, 2, -1]), np.arange(5))
    kinds.observe_alignment(np.array([0, 1, 2, 4]), np.array([1.0, 2.0, np.nan, 9.0]))
    kinds.observe_alignment(np.array([0, 3]), np.array([6.0, 4.0]))
    mean, error = kinds.alignment()
    np.testing.assert_allclose(mean, [3.0, np.nan, 4.0])
    np.testing.assert_allclose(error, [np.std([1, 2, 6], ddof=1) / np.sqrt(3), np.nan, np.nan])


# Clusters ----------------------------------------------------------------------------------------------------------


def test_clusters_are_found_and_do_not_depend_on_how_sums_are_rounded():
    random = np.random.default_rng(0)
    centres = 3 * random.normal(size=(6, 10))
    truth = random.integers(0, 6, 3000)
    features = np.concatenate([np.ones((3000, 1)), centres[truth] + random.normal(size=(3000, 10))], axis=1)
    features = features.astype(np.float16)
    labels = clusters(features, 6)
    assert labels.dtype == np.int16 and len({*zip(truth.tolist(), labels.tolist(), strict=True)}) <= 12
    agree = sum(np.bincount(labels[truth == one]).max() for one in range(6))
    assert agree >= 0.98 * 3000
    assert (np.diff(np.bincount(labels)) <= 0).all()  # the largest first
    # Another order of the columns, as of a sum, and another type: the same to the last label
    np.testing.assert_array_equal(labels, clusters(features[:, ::-1].astype(np.float64), 6))
    near = nearest_rows(features, labels, np.arange(3000), 3)
    for kind, rows in near.items():
        far = ((features.astype(float) - features[labels == kind].astype(float).mean(0)) ** 2).sum(1)
        own = np.flatnonzero(labels == kind)
        np.testing.assert_allclose(np.sort(far[rows]), np.sort(far[own])[:3], rtol=0.05)


def test_of_copies_of_a_prompt_one_is_shown():
    features = np.repeat([[1, 0.0], [1, 0.1], [1, 0.3], [1, 1.0]], [40, 3, 1, 1], axis=0)
    assert nearest_rows(features, np.zeros(45, np.int16), np.arange(45), 3) == {0: [0, 40, 43]}


def test_few_or_equal_prompts_have_few_kinds():
    assert set(clusters(np.ones((50, 1)), 12).tolist()) == {0}
    assert set(clusters(np.repeat(np.eye(3), 40, axis=0), 12).tolist()) == {0, 1, 2}
    features = np.random.default_rng(0).normal(size=(1000, 3))
    assert kinds_of(features, np.arange(40)).max() == 0 and kinds_of(features, np.arange(1000)).max() == 11
    part = kinds_of(features, np.arange(100, 200))
    assert (part[100:200] >= 0).all() and (np.delete(part, np.arange(100, 200)) == -1).all()


@pytest.mark.slow
def test_a_million_prompts_are_sorted_in_seconds():
    features = np.random.default_rng(0).normal(size=(1_000_000, 66)).astype(np.float16)
    start = time.perf_counter()
    assert len(np.unique(kinds_of(features, np.arange(len(features))))) == 12
    assert time.perf_counter() - start < 30


# What is told ------------------------------------------------------------------------------------------------------


def warned(caplog, rise, seed=0):
    """
    A run whose pool is half too hard, a quarter easy, a quarter coins, or prompts like them that rise as they are
    trained on. Returns the world, the schedule and the warnings about kinds.
    """
    labels = np.array([0, 0, 1, 2] * 150)
    extra = [np.eye(3)[labels]]
    world = World(size=600, mean=0.0, spread=0.0, noise=0.0, seed=seed, extra=extra)
    world.curriculum.kinds = Kinds(labels, world.curriculum.pool)
    world.logits = np.array([-6.0, 6.0, 0.0])[labels]
    schedule = schedule_of(world)
    schedule.kind_names = ["hard", "easy", "odd"]
    schedule.host = SimpleNamespace(
        accelerator=SimpleNamespace(is_main_process=True), dataset=None, reward_names=["reward"]
    )
    caplog.clear()
    for _ in range(60):
        draws = world.curriculum.choose(16)
        rows = np.array([draw.row for draw in draws])
        groups = zip(draws, world.rewards(rows), strict=True)
        schedule.observe([Group(one.number, one.row, own) for one, own in groups])
        schedule.tick(1)
        world.logits[labels == 2] += rise * np.count_nonzero(labels[rows] == 2)
    return world, schedule, [record.message for record in caplog.records if "prompts of" in record.message]


def test_a_kind_that_takes_much_and_does_not_rise_is_warned_of_once(caplog):
    world, schedule, texts = warned(caplog, rise=0.0)
    kinds = world.curriculum.kinds
    assert kinds.late_shares[2] > 0.5 and kinds.shares[2] == 0.25
    (text,) = texts
    assert "of the rollouts of late went to prompts of 'odd', which are 25% of the pool" in text
    noise = world.curriculum.noise()
    assert len(noise) > 20 and (kinds.labels[noise] == 2).all() and (world.curriculum.memory.visits[noise] >= 4).all()
    assert set(world.curriculum.asks_for(range(600))) == set(noise.tolist())
    world.curriculum.remember({int(noise[0]): "heads", 0: "no suspect"})
    assert world.curriculum.completions == {int(noise[0]): "heads"}
    # What aligns is no noise
    kinds.observe_alignment(np.flatnonzero(kinds.labels == 2)[:40], 0.5 + np.linspace(-0.1, 0.1, 40))
    assert not len(world.curriculum.noise())


def test_a_kind_that_takes_much_and_rises_is_not(caplog):
    world, _, texts = warned(caplog, rise=0.003)
    (first, _), (now, _) = world.curriculum.kinds.success_first(), world.curriculum.kinds.success_now()
    assert world.curriculum.kinds.late_shares[2] > 0.5 and now[2] > first[2] + 0.1
    assert texts == [] and not len(world.curriculum.noise())


def test_success_that_is_lost_is_warned_of(caplog):
    world, schedule, _ = warned(caplog, rise=0.003)
    assert world.curriculum.metrics()["lost_kinds"] == 0
    world.logits[world.curriculum.kinds.labels == 1] = -2.0  # the easy ones are forgotten
    caplog.clear()
    for _ in range(150):
        draws = world.curriculum.choose(16)
        groups = zip(draws, world.rewards(np.array([draw.row for draw in draws])), strict=True)
        schedule.observe([Group(one.number, one.row, own) for one, own in groups])
        schedule.tick(1)
    (text,) = [record.message for record in caplog.records if "being lost" in record.message]
    assert "Success on prompts of 'easy' is being lost" in text and " at its best" in text
    again = schedule_of(labelled(world.curriculum.kinds.labels, size=600, extra=[np.zeros((600, 3))]))
    again.load_state_dict(schedule.state_dict())  # a resumed run does not say it again
    np.testing.assert_array_equal(again._told, schedule._told)
    assert schedule._told.any()


def test_equal_completions_with_unequal_outcomes_are_counted():
    """Against a loop; rewards that differ by rounding are equal, and none is no reward."""
    random = np.random.default_rng(0)
    rewards, alike = random.integers(0, 2, (40, 6)).astype(float), random.integers(0, 4, (40, 6))
    rewards[random.random(rewards.shape) < 0.1] = np.nan
    groups = [Group(0, 0, own, alike=same) for own, same in zip(rewards, alike, strict=True)]
    expected = [
        sum(any(s == t and abs(x - y) > 0.1 for t, y in zip(same, own, strict=True)) for s, x in pairs)
        for own, same in zip(rewards, alike, strict=True)
        for pairs in [list(zip(same, own, strict=True))]
    ]
    found = count_inconsistent(rewards, groups)
    assert found.tolist() == expected and 0 < found.sum() < np.isfinite(rewards).sum()
    assert not count_inconsistent(0.5 + 0.01 * rewards, groups).any()
    assert not count_inconsistent(rewards, [Group(0, 0, own) for own in rewards]).any()


def test_the_most_frequent_completion_is_shown():
    for alike, place in (([3, 1, 2, 1], 1), ([1, 2, 3], 0), ([5, 4, 4, 5], 0), (None, 0)):
        assert most_frequent(alike if alike is None else np.array(alike)) == place


class Flaky:
    """Grades rows of the kind "coin" by chance, the others by what they are; notes what it was asked."""

    __name__ = "flaky"

    def __init__(self):
        self.groups, self.random = [], np.random.default_rng(0)

    def __call__(self, completions, row, kind, **kwargs):
        rewards = [float(self.random.random() < 0.5 if one == "coin" else one == "easy") for one in kind]
        for start in range(0, len(row), 4):
            part = slice(start, start + 4)
            self.groups.append((row[start], completions[part], rewards[part]))
        return rewards


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on coins, easy and hard prompts with completions of one token: its path, trainer and reward function."""
    path, reward = tmp_path_factory.mktemp("flaky"), Flaky()
    rows = make_dataset(24).add_column("kind", [NAMES[i % 3] for i in range(24)])
    rows = rows.add_column("answer", [f"answer {i}" for i in range(24)])
    choice = LearnAlignConfig(schedule="online", prompt_features=False, group_column="kind")
    settings = replace(EAGER, uniform=0.5)
    changes = {"max_steps": 30, "max_completion_length": 1, "logging_steps": 30}
    trainer = make_trainer(path, choice, reward=reward, dataset=rows, settings=settings, **changes)
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("trl_learnalign.schedules.online.logger.warning", said.append)
        trainer.train()
    return path, trainer, reward.groups, said


NAMES = ["coin", "easy", "hard"]


def test_the_table_is_the_truth_of_a_run(run):
    path, trainer, groups, said = run
    kinds = json.loads((path / "learnalign/online.json").read_text())["kinds"]
    assert [one["name"] for one in kinds] == NAMES and [one["share"] for one in kinds] == [1 / 3] * 3
    assert len(groups) == 120
    live = [sum(0 < sum(own) < 4 for row, _, own in groups if row % 3 == kind) for kind in range(3)]
    for kind, one in enumerate(kinds):
        own = [group for group in groups if group[0] % 3 == kind]
        assert one["groups"] == len(own) and one["rollouts"] == len(own) / 120
        assert one["live"] == live[kind] / sum(live)
        inconsistent = [
            sum(any(a == b and x != y for b, y in zip(texts, found, strict=True)) for a, x in pairs)
            for _, texts, found in own
            for pairs in [list(zip(texts, found, strict=True))]
        ]
        assert one["inconsistent"] == sum(inconsistent) and (kind == 0) == (one["inconsistent"] > 0)
    assert kinds[1]["now"][0] == kinds[1]["first"][0] == 1.0 and kinds[2]["now"][0] == 0.0
    page = (path / "learnalign/report.html").read_text()
    assert "Where the rollouts went" in page and all(f"{one['rollouts']:.1%}" in page for one in kinds)
    (text,) = [one for one in said if "The same completion got different rewards" in one]
    assert "of prompts of 'coin'" in text and "The same completion got different rewards" in page
    assert f">{kinds[0]['first'][0]:.2f} \u00b1 {kinds[0]['first'][1]:.2f}<" in page


def test_suspects_of_noise_have_their_most_frequent_completion(run):
    path, trainer, groups, _ = run
    found = pq.read_table(path / "learnalign/noise.parquet").to_pylist()
    curriculum = trainer.learnalign.schedule.curriculum
    assert [one["index"] for one in found] == curriculum.noise().tolist()
    assert len(found) > 2 and all(one["index"] % 3 == 0 for one in found)
    for one in found:
        assert one["answer"] == f"answer {one['index']}"
        assert one["visits"] >= 4 and abs(one["success_rate"] - 0.5) <= 0.2
        asked = [texts for row, texts, _ in groups if row == one["index"] and one["completion"] in texts]
        most = [max(map(texts.count, texts)) == texts.count(one["completion"]) for texts in asked]
        assert one["completion"] is None or any(most)
    texts = {one["index"]: one["completion"] for one in found if one["completion"] is not None}
    assert texts and read_completions(path / "learnalign", 24).items() >= texts.items()
    page = (path / "learnalign/report.html").read_text()
    assert "Rewards that may be noise" in page and "most frequent completion" in page
