"""Alignments that training's gradients predict: against plain loops, in simulated worlds, and through training."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from test_curriculum import arrays_of, assert_equal
from tiny import EAGER, assert_same_weights, drawn, fixed_reward, make_trainer, online, weights

from trl_learnalign.curriculum import Gradient, Group, OnlineCurriculum, OnlineSettings
from trl_learnalign.curriculum.alignment import Alignment, leave_one_out, products
from trl_learnalign.curriculum.flight import Flight
from trl_learnalign.gradients import training
from trl_learnalign.host import gradient_tap


DIM = 32
KINDS = 4


# The maths ---------------------------------------------------------------------------------------------------------


def without_own_row(units, weights, shares, rows, whitening):
    """Alignments by plain loops: S and m without the groups of the row, solved in dim x dim."""
    dim, found = units.shape[1], []
    for unit, row in zip(units, rows, strict=True):
        second, mean = whitening / dim * np.eye(dim), np.zeros(dim)
        for other, weight, share, of in zip(units, weights, shares, rows, strict=True):
            if of != row:
                second += weight * np.outer(other, other)
                mean += share * other
        found.append(unit @ np.linalg.solve(second, mean))
    return np.array(found)


def unit_vectors(random, n, dim):
    units = random.standard_normal((n, dim)) + 0.5
    return (units / np.linalg.norm(units, axis=1)[:, None]).astype(np.float16)


@pytest.mark.parametrize("n", [3, 20, 50])
@pytest.mark.parametrize("case", ["uniform", "weights", "target", "repeated", "one direction", "one row", "faded"])
def test_leaving_a_row_out_is_a_plain_loop(n, case):
    """With fewer groups than dimensions, and more."""
    random = np.random.default_rng(n)
    units, rows = unit_vectors(random, n, 24), np.arange(n)
    weights, whitening = np.full(n, 1 / n), 3.0
    if case != "uniform":
        weights = random.uniform(0.01, 1, n)
        rows = random.integers(0, max(n // 3, 1), n)
    match case:
        case "one direction":  # 1 - h w is as near to 0 as it can be
            units[:], whitening = units[0], 1e-3
        case "one row":
            rows[:] = 7
        case "faded":
            weights[: n // 2] *= 1e-4
    weights /= weights.sum()
    shares = weights * (random.random(n) < 0.3) if case == "target" else weights
    found = leave_one_out(products(units, units), weights, shares, rows, whitening / 24)
    expected = without_own_row(units.astype(float), weights, shares, rows, whitening)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert case != "one row" or np.allclose(found, 0, atol=1e-8)


def test_products_of_sketches_do_not_depend_on_the_order_of_their_sums():
    """So they are the same on every machine, and only the inverse may differ in its last digits."""
    random = np.random.default_rng(0)
    units = unit_vectors(random, 8, 2048)
    mixed = units[:, random.permutation(2048)]
    assert np.array_equal(products(units, units), products(mixed, mixed))


def test_products_are_kept_from_fit_to_fit():
    """Of the very groups whose sketches are kept, though gradients come late and in any order, and the oldest go."""
    world = World(gradient_window=20)
    late = []
    for chunk in range(12):
        flight = world.draw()
        world.alignment.wait_for(flight)
        gradients = world.gradients(flight)
        late.append(gradients.pop(chunk % 16))
        world.alignment.observe(gradients[::-1])
        if chunk % 3 == 2:
            world.alignment.observe([late.pop(0)])
        alignment = world.alignment
        assert alignment._products.shape == (len(alignment._sketches),) * 2
        assert np.array_equal(alignment._products, products(alignment._sketches, alignment._sketches))


# Learning ----------------------------------------------------------------------------------------------------------


def features(random, n, kinds):
    """Ones, the kind, and what says nothing."""
    x = np.concatenate([np.ones((n, 1)), np.eye(KINDS)[kinds], 0.5 * random.standard_normal((n, 4))], axis=1)
    x[:, 1:] -= x[:, 1:].mean(0)
    return x.astype(np.float16)


class World:
    """
    Prompts of four kinds: two whose gradients point one way, and two of coins, whose gradients point both ways of a
    direction of their own, or (`noise`) anywhere. Every group is live; half of the rollouts succeed.
    """

    def __init__(self, seed=0, noise=False, n=400, target=None, labels=None, **settings):
        self.random = random = np.random.default_rng(seed)
        self.kinds = random.integers(0, KINDS, n)
        self.directions = random.standard_normal((KINDS, DIM)) / DIM**0.5
        self.directions[1] += self.directions[0]
        self.noise = noise
        kwargs = {"gradient_dim": DIM, "gradient_window": 96, "alignment_ridge": 30.0} | settings
        self.alignment = Alignment(
            features(random, n, self.kinds),
            self.kinds if labels is None else labels,
            np.arange(n),
            OnlineSettings(alignment=True, **kwargs),
            target,
        )
        self.drawn = 0

    def draw(self, n=16):
        rows = self.random.integers(0, len(self.kinds), n).astype(np.int32)
        numbers, ones = self.drawn + np.arange(n), np.ones(n)
        self.drawn += n
        expected = self.alignment.expect(rows)
        clock = ones * numbers[0] / 800
        flags, rates = (ones > 0, ones < 0, ones > 0, ones > 0), (ones / 2, ones / 2, ones, ones)
        return Flight(numbers, rows, clock, *flags, *rates, expected)

    def gradients(self, flight):
        random, found = self.random, []
        for number, row in zip(flight.numbers.tolist(), flight.rows.tolist(), strict=True):
            kind, sketch = self.kinds[row], random.standard_normal(DIM) / DIM**0.5
            if not self.noise:
                sign = 1 if kind < 2 else random.choice([-1, 1])
                sketch = sketch + sign * self.directions[kind]
            found.append(Gradient(number, row, sketch.astype(np.float32)))
        return found

    def run(self, chunks):
        for _ in range(chunks):
            flight = self.draw()
            self.alignment.wait_for(flight)
            self.alignment.observe(self.gradients(flight))

    def auc(self):
        """How often a prompt of the kinds that can be learnt is predicted to align better than a coin."""
        predicted = self.alignment.predict(np.arange(len(self.kinds)))
        good, coins = predicted[self.kinds < 2], predicted[self.kinds >= 2]
        return (good[:, None] > coins).mean()


def test_coins_align_less_and_are_told_apart():
    world = World()
    world.run(30)
    rows, values = world.alignment.latest()
    means = [values[world.kinds[rows] == kind].mean() for kind in range(KINDS)]
    assert min(means[:2]) > 0.4 and np.abs(means[2:]).max() < 0.25, means
    assert world.auc() > 0.95 and world.alignment.trusted and world.alignment.skill > 0.3
    everything = np.arange(len(world.kinds))
    factor = world.alignment.relative(everything)
    assert factor[world.kinds < 2].mean() > 1.4 and factor[world.kinds >= 2].mean() < 0.6


def test_a_fall_that_all_prompts_share_is_no_skill():
    """What they have in common ends, for all alike: nothing tells one prompt from another."""
    skills = []
    for seed in range(6):
        world = World(seed, noise=True, gradient_window=48, alignment_ridge=300.0)
        common = world.random.standard_normal(DIM) / DIM**0.5
        for chunk in range(40):
            flight, strength = world.draw(), max(1.5 - chunk / 20, 0)
            found = [
                Gradient(one.number, one.row, (one.sketch + strength * common).astype(np.float32))
                for one in world.gradients(flight)
            ]
            world.alignment.wait_for(flight)
            world.alignment.observe(found)
        skills.append(world.alignment.skill)
    assert abs(np.mean(skills)) < 0.08 and np.abs(skills).max() < 0.2, skills


def test_predictions_of_noise_are_not_trusted():
    """In hardly any run, at any time."""
    trusted = []
    for seed in range(6):
        world = World(seed, noise=True, n=200, gradient_window=48, alignment_ridge=300.0)
        before = []
        for _ in range(15):
            world.run(1)
            before.append(world.alignment.trusted)
        trusted.append(any(before))
        if not any(before):
            assert np.all(world.alignment.factor(np.arange(200)) == 1)
    assert sum(trusted) <= 1


def shuffled(random, found):
    return [found[place] for place in random.permutation(len(found))]


def test_the_order_of_gradients_does_not_matter():
    """Neither within a call, nor that of the groups that are waited for, nor a gradient twice."""
    one, other, random = World(), World(), np.random.default_rng(1)
    for _ in range(12):
        flights = one.draw(), other.draw()
        for world, flight in zip((one, other), flights, strict=True):
            mixed = random.permutation(16) if world is other else np.arange(16)
            world.alignment.wait_for(flight[mixed])
        assert_equal(one.alignment.state_dict(), other.alignment.state_dict())
        found = one.gradients(flights[0])
        assert [g.sketch.tolist() for g in other.gradients(flights[1])] == [g.sketch.tolist() for g in found]
        one.alignment.observe(found)
        other.alignment.observe(shuffled(random, found + found[:5]))
        other.alignment.observe(found)
        assert_equal(one.alignment.state_dict(), other.alignment.state_dict())
    assert np.isfinite(one.alignment.latest()[1]).sum() > 100


def test_gradients_that_come_late_are_learnt_in_their_place():
    """Groups and sketches are the same in the end; a value is the mean of fits, which were others."""
    one, late = World(gradient_groups=1), World(gradient_groups=1)
    queue, last = [], None
    for chunk in range(15):
        flight = one.draw()
        late.draw()
        found = one.gradients(flight)
        one.alignment.wait_for(flight)
        late.alignment.wait_for(flight)
        if chunk == 14:
            one.alignment.observe(found[:-1])
            last = found[-1]
            found = found[:-1]
        else:
            one.alignment.observe(found)
        queue.append(found)
        if len(queue) == 3:  # the oldest last
            for found in reversed(queue):
                late.alignment.observe(found)
            queue.clear()
    for world in (one, late):
        rows, values = world.alignment.observe([last])
        assert rows.tolist() == [last.row] and np.isfinite(values).all()
    a, b = one.alignment.state_dict(), late.alignment.state_dict()
    for name in ("numbers", "rows", "clock", "sketches"):
        np.testing.assert_array_equal(a[name], b[name])
    assert np.corrcoef(a["values"][-96:], b["values"][-96:])[0, 1] > 0.9 and np.isfinite(b["values"]).all()
    assert len(late.alignment.waiting) == 0


def test_what_is_too_late_for_a_sketch_has_no_value():
    world = World(gradient_window=16, gradient_groups=4)
    first = world.draw()
    world.alignment.wait_for(first)
    found = world.gradients(first)
    world.alignment.observe(found[1:])
    world.run(2)
    before = world.alignment.state_dict()
    assert len(world.alignment.observe(found[:1])[0]) == 0
    after = world.alignment.state_dict()
    np.testing.assert_array_equal(after["sketches"], before["sketches"])
    assert after["numbers"].tolist() == list(range(48)) and np.isnan(after["values"][0])
    assert np.isfinite(after["values"][1:]).all()


def test_what_is_kept_is_bounded():
    """Sketches, values, and groups whose gradient never comes."""
    world = World(window=64, gradient_window=48)
    sizes = set()
    for chunk in range(12):
        flight = world.draw()
        world.alignment.wait_for(flight)
        world.alignment.observe(world.gradients(flight)[:8])
        if chunk > 8:
            state = world.alignment.state_dict()
            sizes.add((len(state["values"]), state["sketches"].shape, len(world.alignment.waiting)))
    assert sizes == {(64, (48, DIM), 56)}  # eight of them came
    assert World(window=16, gradient_window=48).alignment.state_dict().keys() == state.keys()
    small = World(window=16, gradient_window=48)
    small.run(3)  # a window of sketches that is larger than that of values
    assert small.alignment.state_dict()["sketches"].shape == (16, DIM)


def test_a_gradient_of_no_length_says_nothing():
    world = World(gradient_groups=1)
    flight = world.draw(4)
    world.alignment.wait_for(flight)
    rows = flight.rows.tolist()
    zero = [Gradient(number, row, np.zeros(DIM, np.float32)) for number, row in enumerate(rows[:3])]
    assert len(world.alignment.observe(zero)[0]) == 0
    assert world.alignment.waiting.numbers.tolist() == [3] and len(world.alignment.state_dict()["values"]) == 0
    assert np.isnan(world.alignment.predict(np.arange(4))).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-25, 1e20, 1e37])
def test_the_scale_of_a_gradient_does_not_matter(scale):
    worlds = World(), World()
    for world in worlds:
        flight = world.draw()
        world.alignment.wait_for(flight)
        found = world.gradients(flight)
        if world is worlds[1]:
            found = [Gradient(one.number, one.row, one.sketch * np.float32(scale)) for one in found]
        assert len(world.alignment.observe(found)[0]) == 16
    a, b = (world.alignment.state_dict() for world in worlds)
    np.testing.assert_allclose(b["sketches"].astype(float), a["sketches"], atol=2e-3 if scale > 1e-30 else 1e-2)


def test_what_is_told_wrongly_is_refused_and_changes_nothing():
    world = World()
    world.run(2)
    flight = world.draw()
    world.alignment.wait_for(flight)
    before, found = world.alignment.state_dict(), world.gradients(flight)
    first = found[0]
    for wrong, words in (
        (Gradient(first.number, first.row + 1, first.sketch), f"has row {first.row + 1}, but that draw asked for row"),
        (Gradient(first.number, first.row, first.sketch[:7]), rf"has the shape \(7,\), .*where {DIM} finite"),
        (Gradient(first.number, first.row, first.sketch * np.nan), "is not finite"),
    ):
        with pytest.raises(ValueError, match=words):
            world.alignment.observe([*found[1:], wrong])
        assert_equal(world.alignment.state_dict(), before)
    assert len(world.alignment.observe(found)[0]) == 16


def test_without_a_group_of_another_prompt_there_is_no_value_yet():
    """Nor as long as no group is of the target; those groups have one as soon as there is."""
    target = np.zeros(400, bool)
    world = World(target=target)
    world.run(2)
    assert len(world.alignment.latest()[0]) == 0 and np.isnan(world.alignment.predict(np.arange(3))).all()
    target[world.kinds == 0] = True
    world.run(1)
    assert len(world.alignment.latest()[0]) == 48


def test_of_a_target_the_direction_is_that_of_its_prompts():
    """And what pulls the other way is against it."""
    world = World()
    target = world.kinds == 1
    world = World(target=target)
    world.directions[1] = -world.directions[0]
    world.run(12)
    predicted = world.alignment.predict(np.arange(400))
    assert predicted[world.kinds == 1].mean() > 0.4 and predicted[world.kinds == 0].mean() < -0.2


def test_a_kind_counts_as_its_share_of_the_pool_however_often_it_is_drawn():
    world = World(n=400)
    alignment, rows = world.alignment, np.repeat([0, 1], [90, 10])
    one, two = (np.flatnonzero(world.kinds == kind)[0] for kind in (0, 1))
    found = alignment._weights(np.where(rows == 0, one, two), np.ones(100))
    share = [(world.kinds == kind).mean() for kind in (0, 1)]
    assert found[:90].sum() / found[90:].sum() == pytest.approx(share[0] / share[1]) and found.sum() == pytest.approx(
        1
    )
    labels = np.full(400, -1, np.int16)
    labels[0] = 2**15 - 1  # the greatest that there may be
    assert World(labels=labels).alignment.shares[-1] == 399 / 400


# Keeping -----------------------------------------------------------------------------------------------------------


def saved():
    world = World()
    world.run(5)
    flight = world.draw()
    world.alignment.wait_for(flight)
    world.alignment.observe(world.gradients(flight)[:5])  # between two fits, groups of a chunk still to come
    return world


def copied(state):
    return {name: copied(value) if isinstance(value, dict) else np.copy(value) for name, value in state.items()}


def test_a_state_goes_on_as_the_run_would_have():
    whole, again = saved(), saved()
    state = copied(whole.alignment.state_dict())
    again.alignment = World().alignment
    again.alignment.load_state_dict(state)
    for world in (whole, again):
        world.run(8)
    assert_equal(again.alignment.state_dict(), whole.alignment.state_dict())
    assert whole.alignment.trusted or whole.alignment.skill


DAMAGES = [
    lambda s: s.pop("values"),
    lambda s: s.update(values=s["values"][:-1]),
    lambda s: s.update(rows=s["rows"] + 400),
    lambda s: s.update(numbers=s["numbers"][::-1]),
    lambda s: s.update(sketches=s["sketches"][1:]),
    lambda s: s.update(sketches=s["sketches"] * np.nan),
    lambda s: s.update(sketches=s["sketches"].ravel()),
    lambda s: s.update(weights=np.zeros(3)),
    lambda s: s.update(sums=np.zeros(5)),
    lambda s: s["waiting"].update(rows=s["waiting"]["rows"][1:]),
    lambda s: s["waiting"].update(numbers=s["waiting"]["numbers"][::-1]),
]


@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_loading_is_strict(damage):
    state = copied(saved().alignment.state_dict())
    DAMAGES[damage](state)
    with pytest.raises((ValueError, KeyError)):
        World().alignment.load_state_dict(state)


# The curriculum ----------------------------------------------------------------------------------------------------


class Training:
    """A curriculum over the prompts of a [`World`], driven by a loop of one's own. Coins vary most."""

    def __init__(self, seed=0, noise=False, alignment=True, **settings):
        self.world = World(seed, noise, n=320)
        kwargs = {"gradient_dim": DIM, "gradient_window": 96, "alignment_ridge": 30.0, "half_life_groups": 400}
        self.curriculum = OnlineCurriculum(
            self.world.alignment.features,
            group_size=8,
            seed=seed,
            settings=OnlineSettings(alignment=alignment, **(kwargs | settings)),
            kinds=self.world.kinds,
        )
        self.random = np.random.default_rng(seed)
        self.rates = np.array([0.75, 0.05, 0.5, 0.5])[self.world.kinds]
        self.rows = []

    def run(self, chunks, gradients=True):
        curriculum = self.curriculum
        for _ in range(chunks):
            draws = curriculum.choose(16)
            rows = np.array([draw.row for draw in draws], np.int32)
            rewards = (self.random.random((16, 8, 1)) < self.rates[rows, None, None]).astype(float)
            groups = [Group(one.number, one.row, own) for one, own in zip(draws, rewards, strict=True)]
            curriculum.observe(groups)
            empty = np.zeros(16)
            numbers = np.array([draw.number for draw in draws])
            flight = Flight(numbers, rows, *[empty] * 10)
            found = self.world.gradients(flight)
            if gradients:
                curriculum.observe_gradients(found)
            curriculum.tick(1)
            self.rows.append(rows.tolist())
        return self

    def coins(self, last):
        return np.isin(self.world.kinds[np.concatenate(self.rows[-last:])], (2, 3)).mean()


def test_coins_get_less_than_their_share_though_they_vary_most():
    plain, aligned = Training(alignment=False).run(45), Training().run(45)
    assert plain.coins(15) > 0.7 and aligned.coins(15) < 0.4, (plain.coins(15), aligned.coins(15))
    metrics = aligned.curriculum.metrics()
    assert metrics["alignment_trusted"] == 1 and metrics["alignment_skill"] > 0.2
    mean, error = aligned.curriculum.kinds.alignment()
    assert mean[:2].min() > 0.3 > 0.2 > np.abs(mean[2:]).max(), mean


def test_without_skill_choices_are_those_without_alignment():
    """Of gradients that are noise, that never come, and of none at all."""
    plain = Training(alignment=False).run(20)
    for noise, gradients in ((True, True), (False, False)):
        other = Training(noise=noise).run(20, gradients)
        assert not other.curriculum.alignment.trusted and other.rows == plain.rows
    without = Training()
    without.curriculum.without_gradients()
    assert without.run(20).rows == plain.rows


def test_a_gradient_before_its_group_or_of_another_changes_nothing():
    """Its group waits from then on, as for one that never comes."""
    training = Training().run(2)
    curriculum = training.curriculum
    draws = curriculum.choose(2)
    before = curriculum.state_dict()
    sketch = np.ones(DIM, np.float32)
    curriculum.observe_gradients([Gradient(one.number, one.row, sketch) for one in draws])
    curriculum.observe_gradients([Gradient(0, draws[0].row, sketch), Gradient(10**6, 0, sketch)])
    assert_equal(curriculum.state_dict(), before)


def test_a_curriculum_goes_on_from_its_state():
    whole, again = Training().run(12), Training().run(12)
    state = whole.curriculum.state_dict()
    arrays = list(arrays_of(state["alignment"]))
    again.curriculum = Training().curriculum
    again.curriculum.load_state_dict(state)
    assert again.run(6).rows == whole.run(6).rows
    assert_equal(again.curriculum.state_dict(), whole.curriculum.state_dict())
    assert sum(array.nbytes for array in arrays) <= 96 * 2 * DIM + 12 * 16 * (32 + 67) + 1000
    with pytest.raises(ValueError, match="`gradient_dim` was 32 and is 64"):
        Training(gradient_dim=64).curriculum.load_state_dict(state)
    with pytest.raises(ValueError, match="`alignment` was True and is False"):
        Training(alignment=False).curriculum.load_state_dict(state)
    del state["alignment"]
    with pytest.raises(ValueError, match="damaged or of other data: KeyError"):
        Training().curriculum.load_state_dict(state)


def test_a_run_without_gradients_is_resumed_without():
    whole, again = Training(), Training()
    whole.curriculum.without_gradients()
    again.curriculum.load_state_dict(whole.run(3).curriculum.state_dict())
    assert again.curriculum.alignment is None


# Through training --------------------------------------------------------------------------------------------------

ALIGNED = replace(
    EAGER,
    alignment=True,
    gradient_groups=4,
    gradient_dim=256,
    begin_trust=-9.0,
    least_trust=-9.0,
    tried_gradients=4,
)


def train(path, score="learnalign", resume=None, steps=8, **changes):
    """A run of eight chunks of eight groups, and the chunks."""
    trainer = make_trainer(
        path,
        online(score=score, prompt_features=True),
        reward=fixed_reward,
        settings=ALIGNED,
        **(
            {"per_device_train_batch_size": 32, "max_steps": steps, "save_strategy": "steps", "save_steps": 1}
            | changes
        ),
    )
    chunks = drawn(trainer)
    trainer.train(resume_from_checkpoint=resume and str(path / f"checkpoint-{resume}"))
    return trainer, chunks


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    path = tmp_path_factory.mktemp("aligned")
    return path, *train(path)


def test_training_learns_alignments_and_chooses_by_them(aligned):
    _, trainer, _ = aligned
    alignment = trainer.learnalign.schedule.curriculum.alignment
    rows, values = alignment.latest()
    assert len(rows) >= 16 and np.isfinite(values).all() and alignment.trusted
    factor = alignment.factor(np.arange(24))
    assert alignment.predict(np.arange(24)).mean() <= 0 or len(set(factor.tolist())) > 1
    logged = [entry for entry in trainer.state.log_history if "learnalign/alignment_observed" in entry]
    assert logged and {"learnalign/alignment_predicted", "learnalign/alignment_skill"} <= logged[-1].keys()
    assert logged[-1]["learnalign/alignment_trusted"] == 1
    state = trainer.learnalign.schedule.state_dict()["curriculum"]["alignment"]
    assert state["sketches"].shape == (len(state["numbers"]), 256)


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_is_the_run(aligned, step):
    """Prompts, weights and the state, sketches among them, bit for bit."""
    path, whole, chunks = aligned
    again, since = train(path, resume=step, save_strategy="no")
    assert {i: rows for i, rows in since.items() if i > step} == {i: rows for i, rows in chunks.items() if i > step}
    assert_same_weights(weights(again), weights(whole))
    state = whole.learnalign.schedule.state_dict()
    assert len(state["curriculum"]["alignment"]["sketches"]) > 0
    assert_equal(again.learnalign.schedule.state_dict(), state)


def test_learnability_takes_no_gradients(tmp_path, monkeypatch):
    """No layer is hooked, and choices are those of a run whose gradients cannot be had, which says so once."""
    made = []

    class Counted(training.GroupGradients):
        def __init__(self, *args):
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(gradient_tap, "GroupGradients", Counted)
    settings = {"steps": 4, "save_strategy": "no", "peft": False}
    plain, chunks = train(tmp_path, "learnability", **(settings | {"peft": True}))
    assert made == [] and plain.learnalign.schedule.curriculum.alignment is None
    assert not any("alignment" in name for entry in plain.state.log_history for name in entry)
    train(tmp_path, steps=1, save_strategy="no")
    assert made == [1]


def test_where_gradients_cannot_be_had_learnability_decides_and_that_is_said_once(tmp_path, caplog):
    settings = {"steps": 5, "peft": False, "save_strategy": "steps", "save_steps": 3}
    plain, chunks = train(tmp_path / "plain", "learnability", **settings)
    with caplog.at_level(logging.WARNING, "trl_learnalign"):
        other, others = train(tmp_path / "other", **settings)
    said = [record.message for record in caplog.records if "by learnability alone" in record.message]
    assert len(said) == 1 and "the whole model is trained" in said[0] and chunks == others
    assert_same_weights(weights(plain), weights(other))
    again, since = train(tmp_path / "other", resume=3, **(settings | {"save_strategy": "no"}))
    assert {i: rows for i, rows in since.items() if i > 3} == {i: rows for i, rows in chunks.items() if i > 3}
    assert again.learnalign.schedule.curriculum.alignment is None
