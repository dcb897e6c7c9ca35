"""Kinds of prompts: their sums against plain loops, their clusters, and what is told of them."""

import time

import numpy as np
import pytest
from test_curriculum import World, assert_equal

from trl_learnalign.curriculum import Group
from trl_learnalign.curriculum.clusters import clusters, kinds_of, nearest_rows
from trl_learnalign.curriculum.kinds import EARLIER, HALF_LIFE, WINDOW, Kinds


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
    assert_equal(whole.curriculum.kinds.state_dict(), again.curriculum.kinds.state_dict())
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
