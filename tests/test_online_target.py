"""Prompts chosen online for a target: in a world of simulated gradients, and through training."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset, concatenate_datasets
from tiny import EAGER, fixed_reward, make_dataset, make_trainer, online

from trl_learnalign import LearnAlignConfig
from trl_learnalign.curriculum import Gradient, Group, OnlineCurriculum, OnlineSettings


GROUP, CHUNK, DIM = 8, 16, 64
A, B, COIN, HARD = range(4)
SHARES = {A: 0.2, B: 0.3, COIN: 0.3, HARD: 0.2}


class World:
    """
    Two kinds whose gradients have a direction of their own each, at right angles to each other, and coins, whose
    gradients are noise; and prompts that are hardly ever solved.
    """

    def __init__(self, target=None, size=1000, seed=0, rates=(0.5, 0.5, 0.5, 0.001), **settings):
        self.random = np.random.default_rng(seed)
        self.kinds = self.random.choice(4, size, p=[*SHARES.values()])
        self.rates = np.array(rates)[self.kinds]
        features = np.concatenate([np.ones((size, 1)), np.eye(4)[self.kinds], self.random.normal(size=(size, 8))], 1)
        self.target = None if target is None else self.kinds == target
        self.curriculum = OnlineCurriculum(
            features.astype(np.float16),
            group_size=GROUP,
            settings=OnlineSettings(alignment=True, **settings),
            target=self.target,
        )

    def sketch(self, kind):
        signal = np.zeros(DIM)
        signal[kind if kind in (A, B) else []] = 0.3
        return (signal + self.random.normal(size=DIM) / np.sqrt(DIM)).astype(np.float32)

    def run(self, chunks):
        """The rows of each chunk."""
        found = []
        for _ in range(chunks):
            draws = self.curriculum.choose(CHUNK)
            rows = np.array([draw.row for draw in draws])
            rewards = (self.random.random((CHUNK, GROUP, 1)) < self.rates[rows, None, None]).astype(float)
            self.curriculum.observe([Group(d.number, d.row, own) for d, own in zip(draws, rewards, strict=True)])
            gradients = [Gradient(d.number, d.row, self.sketch(self.kinds[d.row])) for d in draws]
            self.curriculum.observe_gradients(gradients)
            self.curriculum.tick(1)
            found.append(rows)
        return np.array(found)

    def shares(self, rows):
        return np.bincount(self.kinds[rows.ravel()], minlength=4) / rows.size


def test_the_kind_of_the_target_is_chosen_and_neither_the_other_kind_nor_coins():
    for target, other in ((A, B), (B, A)):
        world = World(target)
        shares = world.shares(world.run(90)[40:])
        assert shares[target] >= 2 * SHARES[target]
        assert shares[other] < SHARES[other] and shares[COIN] < SHARES[COIN]
        metrics = world.curriculum.metrics()
        assert metrics["alignment_trusted"] == 1 and 0.3 < metrics["target_success"] < 0.7


def test_without_a_target_kinds_are_not_preferred_to_each_other():
    world = World()
    shares = world.shares(world.run(90)[40:])
    assert shares[A] < 2 * SHARES[A] and "target_success" not in world.curriculum.metrics()


def test_random_draws_of_the_target_are_no_uniform_draws_of_the_pool():
    """One draw in 20 is of the whole pool, as without a target, and as many are of the target beside these."""
    world = World(A)
    curriculum = world.curriculum
    seen = []
    take_off = curriculum._take_off
    curriculum._take_off = lambda *args: (seen.append(args), take_off(*args))
    world.run(200)
    rows, uniform, aimed = (
        np.array([one[place] for one in seen if one[3]]).ravel() for place in range(3)
    )  # while prompts were chosen
    assert len(rows) > 2500 and not (uniform & aimed).any()
    assert 0.04 < uniform.mean() < 0.06 and 0.04 < aimed.mean() < 0.06
    assert world.target[rows[aimed]].all() and 0.1 < world.target[rows[uniform]].mean() < 0.3
    assert len({*rows[aimed].tolist()}) > 0.9 * min(aimed.sum(), len(curriculum.target.rows))  # pass by pass
    # The pool is measured without bias: .2 x .001 and .8 x .5, though the target is drawn often
    assert abs(curriculum.judge.pool_success - 0.4) < 0.06
    assert curriculum.history.calibration[1, :, 0].sum() == 16 * len(seen) - len(rows) + uniform.sum()
    assert curriculum.history.calibration[:, :, 0].sum() == 16 * len(seen) - aimed.sum()


def test_a_small_target_is_not_drawn_twice_at_a_time():
    world = World(A, uniform=0.5)
    curriculum = world.curriculum
    mask = np.zeros(1000, bool)
    mask[:3] = True
    world.curriculum = small = OnlineCurriculum(
        curriculum.features, group_size=GROUP, settings=curriculum.settings, target=mask
    )
    small.judge.decide = lambda *args: setattr(small.judge, "choosing", True)
    drawn = [draw.row for _ in range(3) for draw in small.choose(CHUNK)]  # none of which was observed
    assert len({*drawn}) == len(drawn) == 48 and {0, 1, 2} < {*drawn}


def test_a_target_without_a_gradient_changes_nothing_but_its_own_draws():
    """Its groups are all dead: there is no direction, so utility alone decides."""
    world = World(HARD, rates=(0.5, 0.5, 0.5, 0.0))
    shares = world.shares(world.run(60)[20:])
    curriculum = world.curriculum
    assert curriculum.target.is_dead and not curriculum.alignment.trusted
    assert (curriculum.alignment.factor(np.arange(9)) == 1).all()
    assert np.isnan(curriculum.alignment.predict(np.arange(9))).all()
    assert shares[HARD] < SHARES[HARD] and min(shares[A], shares[B], shares[COIN]) > 0.15
    assert not World(A).curriculum.target.is_dead


def test_a_target_that_has_no_gradient_any_more_is_not_aligned_with():
    world = World(A, gradient_window=64)
    world.run(60)
    assert world.curriculum.alignment.trusted
    world.rates[world.kinds == A] = 1.0
    world.run(40)
    assert not world.curriculum.alignment.trusted


def test_a_state_goes_on_with_the_same_draws_and_belongs_to_its_target():
    world = World(A)
    world.run(45)
    state, random = world.curriculum.state_dict(), world.random.bit_generator.state
    expected = world.run(20)
    again = World(A)
    again.curriculum.load_state_dict(state)
    again.random.bit_generator.state = random
    np.testing.assert_array_equal(again.run(20), expected)
    for other in (World(B), World()):
        with pytest.raises(ValueError, match="`target` was .* Resume with the same"):
            other.curriculum.load_state_dict(state)
    state["target"]["sums"] = np.zeros(3)
    with pytest.raises(ValueError, match="damaged or of other data"):
        World(A).curriculum.load_state_dict(state)


def test_a_target_that_cannot_be_used_is_refused():
    features, settings = np.ones((6, 1)), OnlineSettings(alignment=True)
    some = np.arange(6) < 2
    for mask, words in (
        (np.zeros(6), "must be True or False for each of 6 prompts"),
        (some[:5], r"has the shape \(5,\)"),
        (~some & some, "holds 0 of the 6 rows"),
        (some | ~some, "holds 6 of the 6 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            OnlineCurriculum(features, group_size=4, settings=settings, target=mask)
    with pytest.raises(ValueError, match="are not compared with it"):
        OnlineCurriculum(features, group_size=4, target=some)
    with pytest.raises(ValueError, match="`target_share` must be at least 0 and below 1"):
        OnlineSettings(target_share=1.0)


# Through training --------------------------------------------------------------------------------------------------


def marked(values=None, num=24):
    dataset = make_dataset(num)
    return dataset.add_column("mine", [row % 4 == 0 for row in range(num)] if values is None else values)


AIMED = {"score": "target", "target_column": "mine"}
SETTINGS = replace(EAGER, uniform=0.25, gradient_dim=64, gradient_groups=2)


def trained(path, resume=None, settings=SETTINGS, chosen=None, **changes):
    changes = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4} | changes
    trainer = make_trainer(
        path, chosen or online(**AIMED), settings=settings, **{"dataset": marked(), "reward": fixed_reward} | changes
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_run_with_a_target_and_its_resume(tmp_path, capsys, caplog):
    trainer = trained(tmp_path)
    schedule = trainer.learnalign.schedule
    target, alignment = schedule.curriculum.target, schedule.curriculum.alignment
    assert target.rows.tolist() == [0, 4, 8, 12, 16, 20]
    said = " ".join(capsys.readouterr().out.split())
    assert "prompts are chosen for the target of 6 rows (25.0% of the pool) that `mine` marks" in said
    assert "prompts are chosen by predicted learnability for the target of 6 rows: their" in said
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert 0 <= last["learnalign/target_fraction"] <= 1 and 0 <= last["learnalign/target_success"] <= 1
    rows = alignment._groups["rows"]
    assert target.mask[rows].any() and len(rows) and "No prompt of the target" not in caplog.text
    assert "Prompts were chosen for a target of 6 rows, 25.0% of the pool, which had" in " ".join(schedule.summary())
    state = schedule.curriculum.state_dict()
    again = trained(tmp_path, resume=str(tmp_path / "checkpoint-4")).learnalign.schedule.curriculum.state_dict()
    for part in ("target", "alignment", "memory"):
        for name, value in state[part].items():
            np.testing.assert_equal(again[part][name], value)
    # Another target, by other rows or by another column
    resume = str(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="dataset"):
        trained(tmp_path, resume, dataset=marked([row < 5 for row in range(24)]))
    other = marked().add_column("other", [row < 5 for row in range(24)])
    trained(tmp_path / "b", dataset=other)
    with pytest.raises(ValueError, match="`target_column` was 'mine'"):
        chosen = online(score="target", target_column="other")
        trained(tmp_path / "b", str(tmp_path / "b/checkpoint-4"), dataset=other, chosen=chosen)


def test_a_target_that_is_never_live_is_told_once(tmp_path, caplog):
    def reward(completions, row, **kwargs):
        own = fixed_reward(completions, row)
        return [0.0 if one % 4 == 0 else value for one, value in zip(row, own, strict=True)]

    with caplog.at_level(logging.WARNING):
        settings = replace(SETTINGS, least_tried=3, uniform=0.5)
        reported = online(write_report=True, **AIMED)
        trainer = trained(tmp_path, reward=reward, settings=settings, chosen=reported, save_strategy="no")
    assert caplog.text.count("No prompt of the target has had a live group so far") == 1
    curriculum = trainer.learnalign.schedule.curriculum
    assert curriculum.target.is_dead and not curriculum.alignment.trusted
    page = (tmp_path / "learnalign/report.html").read_text()
    assert "Prompts are chosen for a target of 6 rows" in page and "6 (25% of the pool)" in page


def test_where_gradients_cannot_be_had_the_target_has_no_effect(tmp_path, caplog):
    trainer = trained(tmp_path, peft=False, max_steps=3, save_strategy="no")
    assert "cannot choose prompts for the target that `mine` marks" in " ".join(caplog.text.split())
    assert trainer.learnalign.schedule.curriculum.alignment is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "target"}, "`score` is 'target', but `target_column` is not set.*a column of True and False"),
        ({"score": "target_alignment"}, "alignment alone cannot choose.*Use `score='target'`"),
        (
            {"target_column": "mine"},
            "`target_column` is 'mine', but `score='learnalign'` does not.*`score='target'",
        ),
        ({"score": "learnability", "target_column": "mine"}, "`score='learnability'` does not look at a target"),
        (
            {"score": "target", "target_dataset": "a.jsonl"},
            "must be rows of the training.*concatenate_datasets",
        ),
        ({"score": "confidence", "target_column": "mine"}, "chooses by predicted learnability"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LearnAlignConfig(schedule="online", **settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([False] * 24, "True for no row that may be trained on"),
        ([True] * 24, "True for all 20 rows"),
        ([1] * 24, r"holds no True and False \(int64\).*Make one with `dataset.map"),
        ([None, *[True] * 23], "has no value in row 0"),
        ([row > 20 for row in range(24)], "True for no row that may be trained on"),
    ],
)
def test_columns_that_do_not_fit_are_refused_when_the_trainer_is_built(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, online(where="row < 20", **AIMED), dataset=marked(values))


def test_a_column_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`target_column` is 'theirs', but the training dataset has no column"):
        make_trainer(tmp_path, online(score="target", target_column="theirs"), dataset=marked())


def test_the_recipe_of_the_error_works(tmp_path):
    train, target = make_dataset(16), make_dataset(8)
    parts = (
        train.add_column("is_target", [False] * len(train)),
        target.add_column("is_target", [True] * len(target)),
    )
    dataset: Dataset = concatenate_datasets(parts)
    made = make_trainer(tmp_path, online(score="target", target_column="is_target"), dataset=dataset)
    assert made.learnalign.schedule.target.sum() == 8
