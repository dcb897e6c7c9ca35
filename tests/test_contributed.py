"""
What a contributor writes for a new score: one function and one test; for a new schedule, a new measure, or a host for
another trainer: one class and one test. Nothing of the package is touched.
"""

import itertools

import numpy as np
import pytest
from tiny import (
    Seen,
    assert_same_weights,
    config,
    grpo_args,
    lora,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
    weights,
)
from trl import GRPOTrainer

from trl_learnalign import (
    LearnAlignCallback,
    LearnAlignGRPOTrainer,
    LearnAlignSampler,
    Selection,
    select_prompts,
)
from trl_learnalign.schedules import Schedule


def shortest_first(table):
    """Learnable prompts with short completions and a large gradient first."""
    return table["learnability"] * table["gradient_norm"] / table["completion_length_mean"]


def test_shortest_first(tmp_path):
    choice = config(score=shortest_first, score_measures=["gradients"])
    selection = select_prompts(make_trainer(tmp_path), choice)
    table = selection.scores.to_pandas().set_index("index")
    expected = (table["learnability"] * table["gradient_norm"] / table["completion_length_mean"]).dropna()
    assert table.loc[expected.index, "score"].tolist() == pytest.approx(expected.tolist())
    assert selection.indices == expected.sort_values(ascending=False).index[:8].tolist()
    assert Selection.load(tmp_path / "learnalign/step-000000").indices == selection.indices


class Unsolved(Schedule):
    """Goes round the pool, leaving out prompts that were solved by all rollouts of their last visit, three at most."""

    def __init__(self, run):
        self.position, self.solved = 0, np.zeros(run.pool_size, bool)

    def choose(self, n):
        return [self.next() for _ in range(n)]

    def next(self):
        for _ in range(4):
            row, self.position = self.position % len(self.solved), self.position + 1
            if not self.solved[row]:
                break
        return row

    def observe(self, groups):
        for group in groups:
            self.solved[group.row] = (group.rewards[:, 0] == 1).all()

    def metrics(self):
        return {"solved": self.solved.mean()}

    def state_dict(self):
        return {"position": self.position, "solved": self.solved}

    def load_state_dict(self, state):
        self.position, self.solved = state["position"], state["solved"].copy()


def easy(completions, row, **kwargs):
    """Every third prompt is always solved."""
    return [float(r % 3 == 0 or place % 2) for place, r in enumerate(row)]


def train_on(schedule, path, resume=None, **changes):
    seen = Seen(easy)
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1} | changes
    trainer = LearnAlignGRPOTrainer(
        model=make_model(),
        reward_funcs=seen,
        args=grpo_args(path, **settings),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=lora(),
        train_sampler=LearnAlignSampler(config(), schedule=schedule),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(path / f"checkpoint-{resume}"))
    return trainer, seen.rows[::4]


def test_unsolved(tmp_path):
    """What it chooses is trained on, what it counts is logged, and a resumed run is the run."""
    whole, rows = train_on(Unsolved, tmp_path)
    left = [row for row in range(24) if row % 3]
    assert rows == [*range(24), *left, *left[:8]]
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [entry["learnalign/solved"] for entry in logs] == pytest.approx(
        [*(i / 24 for i in (2, 3, 4, 6, 7, 8)), *[1 / 3] * 6]
    )
    for step in (3, 7):
        again, since = train_on(Unsolved, tmp_path, step)
        assert since == rows[4 * step :]
        assert_same_weights(weights(again), weights(whole))
    handle = whole.learnalign
    assert isinstance(handle.schedule, Unsolved) and handle.selections == [] and handle.report() is None
    with pytest.raises(ValueError, match="with the schedule Unsolved, but this sampler has StagedSchedule"):
        make_trainer(tmp_path, config(), num_train_epochs=2).train(resume_from_checkpoint=True)


class Diary(Schedule):
    """Writes down all that it is told. Its attributes have the names that the package has for things of its own."""

    def __init__(self, run):
        self.due, self.plan, self.start, self.log = [], "to go on", 3, {}
        self.stage = self.layout = self.selects = self.warning = self.check = self.report = self.prepare = None
        self.accept = self.summary = self.estimate = self.wanted = self.look = self.bind = self.masked = None
        self.size, self.number, self.steps, self.asked = run.pool_size, 0, 0, []

    def choose(self, n):
        rows = [(7 * (self.number + place) + self.start) % self.size for place in range(n)]
        self.asked.append(self.number)
        self.number += n
        return rows

    def observe(self, groups):
        self.due += [group.number for group in groups]
        self.log |= {group.number: (group.row, group.rewards.tolist()) for group in groups}

    def tick(self, steps):
        self.steps += steps

    def state_dict(self):
        return {"number": self.number, "steps": self.steps}

    def load_state_dict(self, state):
        self.number, self.steps = state["number"], state["steps"]


TWICE = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "steps_per_generation": 2}


@pytest.mark.parametrize("changes", [{}, TWICE, {"dataloader_num_workers": 1}], ids=["plain", "inside", "workers"])
def test_a_schedule_is_asked_for_every_draw_once_and_told_of_every_group(tmp_path, changes):
    """Across resumes, and across epochs. A chunk that was cut in two comes again, under the numbers that it had."""
    settings = {"max_steps": 15} | changes
    whole, rows = train_on(Diary, tmp_path, **settings)
    diary, size = whole.learnalign.schedule, 4
    trained = len(rows)
    assert diary.due == list(range(trained)) and diary.steps == 15
    assert diary.asked == list(range(0, diary.number, size)) and diary.number >= trained
    assert [diary.log[number][0] for number in diary.due] == rows
    made = []
    for step in (5,) if changes else (5, 8):
        again, since = train_on(lambda run: made.append(run) or Diary(run), tmp_path, step, **settings)
        late = again.learnalign.schedule
        first = whole._get_train_sampler().layout.chunks_trained(step) * size
        assert late.due == list(range(first, first + len(since))) and late.steps == 15
        assert since == rows[first : first + len(since)] and len(since) >= trained - first - size
        assert late.number == diary.number and late.asked == diary.asked[-len(late.asked) :]
        assert late.asked[0] > first  # some were in flight
        assert [late.log[number][0] for number in late.due] == since
        if not changes:
            assert late.log == {number: diary.log[number] for number in late.due}
            assert_same_weights(weights(again), weights(whole))
    assert [(run.pool_size, run.prompts_at_once, run.group_size, run.seed) for run in made] == [(24, 4, 4, 7)] * len(
        made
    )


def test_every_run_makes_a_schedule(tmp_path):
    """When the trainer is built, for the first run, and when another begins."""
    made = []

    def make(run):
        made.append(Diary(run))
        return made[-1]

    trainer, _ = train_on(make, tmp_path, max_steps=3)
    assert len(made) == 1 and trainer.learnalign.schedule is made[0]
    trainer.train()
    assert len(made) == 2 and trainer.learnalign.schedule is made[1]
    assert [one.due for one in made] == [list(range(12))] * 2
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(made) == 3 and made[2].steps == 3 and made[2].due == [8, 9, 10, 11]
    with pytest.raises(TypeError, match="`schedule` made a dict, but must make a Schedule"):
        train_on(lambda run: {}, tmp_path)


class Dealt(Schedule):
    """Deals rows from an iterator, so a chunk that is asked for twice would be another."""

    short, beyond = 0, 0

    def __init__(self, run):
        self.rows = itertools.cycle(range(run.pool_size))

    def choose(self, n):
        return [next(self.rows) + self.beyond for _ in range(n - self.short)]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "steps_per_generation": 1},
        {"dataloader_num_workers": 2, "max_steps": 6},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
    ],
)
def test_a_chunk_is_asked_for_once(tmp_path, changes):
    seen = Seen()
    settings = {"max_steps": 4} | changes
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, reward=seen, **settings)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config(), schedule=Dealt)))
    trainer.train()
    rows = seen.rows[:: trainer.num_generations]
    assert len(rows) >= 16 and rows == [place % 24 for place in range(len(rows))]
    assert isinstance(trainer.learnalign.schedule, Dealt)


@pytest.mark.parametrize(
    ("fault", "message"), [("short", "returned 3 rows, but 4 were"), ("beyond", "returned row 24, but")]
)
def test_a_schedule_of_yours_that_is_wrong_is_named(tmp_path, fault, message):
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, max_steps=8)
    wrong = type("Wrong", (Dealt,), {fault: 1})
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config(), schedule=wrong)))
    with pytest.raises(ValueError, match=rf"Wrong.choose\(4\) {message}"):
        trainer.train()
