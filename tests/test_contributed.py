"""
What a contributor writes for a new score: one function and one test; and for a new schedule or a new measure: one
class and one test. Nothing of the package is touched.
"""

import itertools

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from tiny import (
    Seen,
    assert_same_weights,
    config,
    digit_reward,
    grpo_args,
    lora,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
    weights,
)
from trl import GRPOTrainer

from trl_learnalign import LearnAlignCallback, LearnAlignGRPOTrainer, LearnAlignSampler, Selection, select_prompts
from trl_learnalign.measures import MEASURES, Finding, Measure
from trl_learnalign.schedules import Schedule
from trl_learnalign.scores.builtin import SCORES, Score


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

    def start(self):
        self.position, self.solved, self.chunks = 0, np.zeros(self.layout.pool_size, bool), []

    def prompts(self, chunk):
        while len(self.chunks) <= chunk:
            self.chunks.append([self.next() for _ in range(self.layout.chunk_prompts)])
        return self.chunks[chunk]

    def next(self):
        for _ in range(4):
            row, self.position = self.position % len(self.solved), self.position + 1
            if not self.solved[row]:
                break
        return row

    def observe(self, chunk, rewards):
        self.solved[self.chunks[chunk]] = (rewards[:, :, 0] == 1).all(1)

    def metrics(self):
        return {"solved": self.solved.mean()}

    def state_dict(self):
        return {"position": self.position, "solved": self.solved, "chunks": np.array(self.chunks)}

    def load_state_dict(self, state):
        self.position, self.solved, self.chunks = state["position"], state["solved"].copy(), state["chunks"].tolist()


def easy(completions, row, **kwargs):
    """Every third prompt is always solved."""
    return [float(r % 3 == 0 or place % 2) for place, r in enumerate(row)]


def train_on_unsolved(path, **settings):
    seen = Seen(easy)
    sampler = LearnAlignSampler(config(), schedule=Unsolved(config()))
    trainer = LearnAlignGRPOTrainer(
        model=make_model(),
        reward_funcs=seen,
        args=grpo_args(path, num_train_epochs=2, save_strategy="steps", save_steps=1),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=lora(),
        train_sampler=sampler,
    )
    trainer.train(**settings)
    return trainer, seen.rows[::4]


def test_unsolved(tmp_path):
    """What it chooses is trained on, what it counts is logged, and a resumed run is the run."""
    whole, rows = train_on_unsolved(tmp_path)
    left = [row for row in range(24) if row % 3]
    assert rows == [*range(24), *left, *left[:8]]
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert [entry["learnalign/solved"] for entry in logs] == pytest.approx(
        [*(i / 24 for i in (2, 3, 4, 6, 7, 8)), *[1 / 3] * 6]
    )
    for step in (3, 7):
        again, since = train_on_unsolved(tmp_path, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert since == rows[4 * step :]
        assert_same_weights(weights(again), weights(whole))
    with pytest.raises(ValueError, match="with the schedule Unsolved, but this sampler has StagedSchedule"):
        make_trainer(tmp_path, config(), num_train_epochs=2).train(resume_from_checkpoint=True)
    with pytest.raises(TypeError, match="`schedule` must be a Schedule, but is a type"):
        LearnAlignSampler(config(), schedule=Unsolved)


class Dealt(Schedule):
    """Deals rows from an iterator, so a chunk that is asked for twice would be another."""

    short, beyond = 0, 0

    def start(self):
        self.rows = itertools.cycle(range(self.layout.pool_size))

    def prompts(self, chunk):
        return [next(self.rows) + self.beyond for _ in range(self.layout.chunk_prompts - self.short)]


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "steps_per_generation": 1},
        {"dataloader_num_workers": 2, "max_steps": 6},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
    ],
)
def test_a_chunk_is_asked_for_once(tmp_path, changes):
    seen, choice = Seen(), config()
    settings = {"max_steps": 4} | changes
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, reward=seen, **settings)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(choice, schedule=Dealt(choice))))
    trainer.train()
    rows = seen.rows[:: trainer.num_generations]
    assert len(rows) >= 16 and rows == [place % 24 for place in range(len(rows))]


@pytest.mark.parametrize(("fault", "message"), [("short", "returned 3 rows, but a chunk has 4"), ("beyond", "row 24")])
def test_a_schedule_of_yours_that_is_wrong_is_named(tmp_path, fault, message):
    choice = config()
    schedule = Dealt(choice)
    setattr(schedule, fault, 1)
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, max_steps=8)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(choice, schedule=schedule)))
    with pytest.raises(ValueError, match=rf"Dealt.prompts\(\d\) returned.*{message}|{message}"):
        trainer.train()


class Different(Measure):
    """How many of a prompt's completions are different, of the rollouts that are there."""

    name = "different"
    requires = ("rollouts",)
    columns = ("different_completions",)
    price = "none"

    def run(self, context, rows, log):
        own = context.found["rollouts"].own
        counts = {group.row: float(len({tuple(ids) for ids in group.completion_ids})) for group in own}
        whole = {row: count for part in context.peers.gather(counts) for row, count in part.items()}
        return Finding(pd.DataFrame({"different_completions": pd.Series(whole)}).reindex(rows))


def test_a_measure_and_its_score(tmp_path, monkeypatch):
    """Kept in scores.parquet, named by conditions, tried before anything is generated, shown in the report."""
    monkeypatch.setitem(MEASURES, "different", Different())
    rank = lambda table, align: table["learnability"] * table["different_completions"]  # noqa: E731
    monkeypatch.setitem(SCORES, "diverse", Score(("rollouts", "different"), rank))
    where = "different_completions > 2"
    choice = config(score="diverse", where=where, save_rollouts=True, write_report=True)
    selection = select_prompts(make_trainer(tmp_path), choice)
    rollouts = pq.read_table(tmp_path / "_learnalign/rollouts/step-000000/rollouts.parquet").to_pandas()
    expected = rollouts.groupby("index")["completion_ids"].apply(lambda ids: len(set(map(tuple, ids))))
    table = Selection.load(tmp_path / "learnalign/step-000000").scores.to_pandas().set_index("index")
    assert table["different_completions"].to_dict() == expected.to_dict() and expected.nunique() > 1
    assert table["score"].tolist() == (table["learnability"] * expected).tolist()
    assert set(selection.indices) <= set(expected[expected > 2].index) and selection.measures == (
        "rollouts",
        "different",
    )
    page = (tmp_path / "learnalign/report.html").read_text()
    assert "different completions" in page
    # The function of a user may have it, and the rollouts are there
    mine = config(score=lambda table: table["different_completions"], score_measures=["rollouts", "different"])
    by_number = select_prompts(make_trainer(tmp_path, reward=Seen(digit_reward)), mine)
    assert by_number.scores["different_completions"].to_pylist() == expected.tolist()
    wrong = config(score=lambda table: table["different"], score_measures=["rollouts", "differnet"])
    with pytest.raises(ValueError, match=r"requires the measure 'differnet'.*what can be measured is: .*different"):
        select_prompts(make_trainer(tmp_path), wrong)
