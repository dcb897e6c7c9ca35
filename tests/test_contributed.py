"""
What a contributor writes for a new score: one function and one test; for a new schedule, a new measure, or a host for
another trainer: one class and one test. Nothing of the package is touched.
"""

import itertools
from collections import defaultdict

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
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
    online,
    weights,
)
from transformers import Trainer
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from trl_learnalign import (
    LearnAlignCallback,
    LearnAlignGRPOTrainer,
    LearnAlignMixin,
    LearnAlignSampler,
    Selection,
    select_prompts,
)
from trl_learnalign.host import Host, register_host
from trl_learnalign.measures import MEASURES, Finding, Measure
from trl_learnalign.schedules import Run, Schedule, StagedSchedule, Ticks
from trl_learnalign.scores.builtin import SCORES, Score
from trl_learnalign.selection.dry_run import plan_selection


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
        self.tick = "any attribute"  # which is no role of this schedule

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


class Diary(Schedule, Ticks):
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


@pytest.mark.parametrize("wrong", [[1.7] * 4, np.ones(4, bool), ["2"] * 4, None, [[0]] * 4])
def test_rows_that_are_no_whole_numbers_are_refused(tmp_path, wrong):
    schedule = type("Wrong", (Dealt,), {"choose": lambda self, n: wrong})
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, max_steps=8)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config(), schedule=schedule)))
    with pytest.raises(
        TypeError, match=r"Wrong.choose\(4\) must return 4 rows of the dataset as whole numbers, but: "
    ):
        trainer.train()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"x": np.int64(3)}, r"`state_dict\(\)\['x'\]` is a int64"),
        ({"x": np.array(["a"])}, "an array of <U1"),
        ({"x": {"a/b": np.arange(2)}}, "The key 'a/b' of a state must be a text without '/'"),
    ],
)
def test_a_state_that_a_checkpoint_cannot_hold_is_named(tmp_path, state, words):
    schedule = type("Wrong", (Dealt,), {"state_dict": lambda self: state})
    changes = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, **changes)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config(), schedule=schedule)))
    with pytest.raises(TypeError, match=words):
        trainer.train()


def test_a_schedule_of_another_run_is_refused(tmp_path):
    one = Dealt(Run(24, 4, 4, 0, config(), None))
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, max_steps=1)
    trainer.add_callback(LearnAlignCallback(trainer, LearnAlignSampler(config(), schedule=lambda run: one)))
    trainer.train()
    with pytest.raises(ValueError, match="made the Dealt of the run before once more"):
        trainer.train()


def test_the_checks_of_a_selection_are_made_whatever_makes_the_schedule(tmp_path):
    trainer = make_trainer(tmp_path, cls=GRPOTrainer, reward=[digit_reward, easy])
    with pytest.raises(ValueError, match="success_reward"):
        LearnAlignCallback(trainer, LearnAlignSampler(config(), schedule=lambda run: StagedSchedule(run)))


class Different(Measure):
    """How many different first tokens the completions of a prompt have, of the rollouts that are there."""

    name = "different"
    requires = ("rollouts",)
    columns = ("different_starts",)
    price = "none"

    def run(self, context, rows, log):
        own = context.found["rollouts"].own
        counts = {group.row: float(len({int(ids[0]) for ids in group.completion_ids})) for group in own}
        whole = {row: count for part in context.peers.gather(counts) for row, count in part.items()}
        return Finding(pd.DataFrame({"different_starts": pd.Series(whole)}).reindex(rows))


def test_a_measure_and_its_score(tmp_path, monkeypatch):
    """Kept in scores.parquet, named by conditions, tried before anything is generated, shown in the report."""
    monkeypatch.setitem(MEASURES, "different", Different())
    rank = lambda table, align: table["learnability"] * table["different_starts"]  # noqa: E731
    monkeypatch.setitem(SCORES, "diverse", Score(("rollouts", "different"), rank))
    where = "different_starts > 5"
    choice = config(score="diverse", where=where, save_rollouts=True, write_report=True)
    selection = select_prompts(make_trainer(tmp_path), choice)
    rollouts = pq.read_table(tmp_path / "_learnalign/rollouts/step-000000/rollouts.parquet").to_pandas()
    expected = rollouts.groupby("index")["completion_ids"].apply(lambda parts: len({ids[0] for ids in parts}))
    table = Selection.load(tmp_path / "learnalign/step-000000").scores.to_pandas().set_index("index")
    assert table["different_starts"].to_dict() == expected.to_dict() and expected.nunique() > 1
    assert table["score"].tolist() == (table["learnability"] * expected).tolist()
    assert set(selection.indices) <= set(expected[expected > 5].index) and selection.measures == (
        "rollouts",
        "different",
    )
    page = (tmp_path / "learnalign/report.html").read_text()
    assert page.count("different starts") >= 3 and "Their score is" not in page  # both ends, and the table
    # The function of a user may have it, and the rollouts are there
    mine = config(score=lambda table: table["different_starts"], score_measures=["rollouts", "different"])
    by_number = select_prompts(make_trainer(tmp_path, reward=Seen(digit_reward)), mine)
    assert by_number.scores["different_starts"].to_pylist() == expected.tolist()
    wrong = config(score=lambda table: table["different"], score_measures=["rollouts", "differnet"])
    with pytest.raises(ValueError, match=r"requires the measure 'differnet'.*what can be measured is: .*different"):
        select_prompts(make_trainer(tmp_path), wrong)


class Priced(Measure):
    """A number of each even row: nothing of it is generated or computed, but a price is named."""

    name = "priced"
    columns = ("parity",)

    def __init__(self, price):
        self.price = price

    def run(self, context, rows, log):
        if log is not None:
            log.close()
        if self.price == "forward":  # as it is noted where a measure finds nothing for its score
            context.note({"instead": {"score": "random", "reason": "no row is odd."}})
        kept = [row for row in rows if row % 2 == 0] if self.price != "none" else []
        return Finding(pd.DataFrame({"parity": [row % 4 for row in kept]}, index=kept))


@pytest.mark.parametrize(
    ("price", "spent"),
    [
        ("gradients", "24 prompts, a forward and a backward over each"),
        ("rollouts", "24 prompts x 4 rollouts = 96"),
        ("forward", "24 prompts, a forward over each"),
    ],
)
def test_the_price_of_a_measure_is_told_and_what_it_left_out(tmp_path, monkeypatch, capsys, caplog, price, spent):
    """Plan, dry run, summary, warnings and page; nothing is said of success, which was not measured."""
    monkeypatch.setitem(MEASURES, "priced", Priced(price))
    monkeypatch.setitem(SCORES, "odd", Score(("priced",), lambda table, align: table["parity"] * 1.0))
    choice = config(score="odd", warmup_prompts=0, num_prompts=14, write_report=price == "gradients")
    text, possible = plan_selection(make_trainer(tmp_path), choice)
    assert possible and f"pool: {spent}\n" in text and "tried: " in text and " of which" not in text
    assert "learnable" not in text and ("gradients: about 24 prompts" in text) == (price == "gradients")
    assert ("rollouts: none" in text) == (price != "rollouts")
    make_trainer(tmp_path, choice, max_steps=1).train()
    said = capsys.readouterr().out + caplog.text
    assert f"selection now: {spent}." in said and "12 of 24 prompts (50%) are left out, as they could not be" in said
    assert "pool 24 (12 could not be measured); chosen 12 by odd" in said
    assert not any(word in said for word in ("learnable", "reward function", "unscorable:", "without rollouts"))
    selection = Selection.load(tmp_path / "learnalign/step-000000")
    assert ("(by random instead: no row is odd)" in selection.summary()) == (price == "forward")
    if price == "gradients":
        page = (tmp_path / "learnalign/report.html").read_text()
        assert "<dt>could not be measured</dt>" in page and "unscorable" not in page


def test_a_measure_that_has_no_prompt_is_named(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(MEASURES, "priced", Priced("none"))
    monkeypatch.setitem(SCORES, "odd", Score(("priced",), lambda table, align: table["parity"] * 1.0))
    assert select_prompts(make_trainer(tmp_path), config(score="odd", write_report=True)).indices == []
    assert "No prompt is chosen: all 24 could not be measured (priced). Check the prompts" in caplog.text
    assert "There are no such prompts" in (tmp_path / "learnalign/report.html").read_text()


class Reinforce(Trainer):
    """A policy gradient that owes nothing to TRL's trainers; an advantage is a reward less the mean of its group."""

    def __init__(self, reward_funcs, args, train_dataset, processing_class, **kwargs):
        self.reward_funcs, self.reward_func_names = [reward_funcs], [reward_funcs.__name__]
        self.reward_weights, self.reward_processing_classes = torch.ones(1), [None]
        self.num_generations, self.num_iterations, self.shuffle_dataset = args.num_generations, 1, True
        self._tokenizer, self._tag_names, self._metrics = processing_class, [], {"train": defaultdict(list)}
        given = {"args": args, "train_dataset": train_dataset, "processing_class": processing_class}
        super().__init__(data_collator=list, **given, **kwargs)

    def _get_train_sampler(self, dataset=None):
        return RepeatSampler(self.train_dataset, self.num_generations, self.args.generation_batch_size // 4)

    def _prepare_inputs(self, inputs):
        return self.roll_out(inputs)

    def roll_out(self, rows):
        prompts = [row["prompt"] for row in rows]
        given = self._tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.no_grad():
            made = self.model.generate(**given, do_sample=True, max_new_tokens=6, pad_token_id=0, eos_token_id=1)
        made = made[:, given["input_ids"].shape[1] :]
        mask = ((made == 1).cumsum(1) - (made == 1).long() == 0).long()
        tokens = [ids[kept.bool()].tolist() for ids, kept in zip(made, mask, strict=True)]
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        rewards = self._calculate_rewards(rows, prompts, texts, tokens)[:, 0].view(-1, self.num_generations)
        batch = {"prompt_ids": given["input_ids"], "prompt_mask": given["attention_mask"], "completion_mask": mask}
        return batch | {"completion_ids": made, "advantages": (rewards - rewards.mean(1, keepdim=True)).flatten()}

    def _calculate_rewards(self, rows, prompts, completions, completion_ids):
        found = self.reward_funcs[0](completions=completions, row=[row["row"] for row in rows])
        return torch.tensor(found)[:, None]

    def compute_loss(self, model, batch, **kwargs):
        ids, mask = (torch.cat([batch[f"prompt_{kind}"], batch[f"completion_{kind}"]], 1) for kind in ("ids", "mask"))
        logps = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        logps = logps.gather(2, ids[:, 1:, None])[:, -batch["completion_mask"].shape[1] :, 0]
        return -(batch["advantages"][:, None] * logps * batch["completion_mask"]).mean()

    def log(self, logs, *args):
        metrics = self._metrics["train"]
        super().log(logs | {name: sum(values) / len(values) for name, values in metrics.items()}, *args)
        metrics.clear()


NAMES = {
    "always": ("_tokenizer", "num_generations", "reward_func_names", "reward_funcs", "reward_weights"),
    "generates": ("_calculate_rewards", "_metrics", "roll_out"),
    "trains": ("_calculate_rewards", "_metrics", "_tag_names", "num_iterations", "roll_out", "shuffle_dataset"),
}


class ReinforceHost(Host):
    """The trainer generates and trains. Nothing is said of its loss, so no gradients are taken."""

    names = NAMES
    generation_method, logps_method, books = "roll_out", None, ("_metrics",)

    def tokenize(self, prompts):
        return self.trainer._tokenizer(prompts)["input_ids"]

    def advantages(self, rewards, penalties):
        total = self.total(rewards).double()
        return (total - total.nanmean(1, keepdim=True)).nan_to_num(0.0)


def test_a_host_of_ones_own(tmp_path):
    """A trainer that the package knows nothing of chooses prompts online, resumes, and selects without gradients."""

    class Mine(LearnAlignMixin, Reinforce):
        pass

    def make(choice, **changes):
        return Mine(
            model=get_peft_model(make_model(), lora()),
            reward_funcs=seen,
            args=grpo_args(tmp_path, **changes),
            train_dataset=make_dataset(),
            processing_class=make_tokenizer(),
            train_sampler=LearnAlignSampler(choice) if choice else None,
        )

    seen, settings = Seen(easy), {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(TypeError, match="but got a Mine. Pass one of these, or register a host"):
        make(online())
    register_host(Reinforce, ReinforceHost)
    whole = make(online(), **settings)
    whole.train()
    rows = list(seen.rows)
    live = [entry["learnalign/live_fraction"] for entry in whole.state.log_history if "loss" in entry]
    assert live == [np.mean(np.array(rows[i : i + 16]) % 3 > 0) for i in range(0, 96, 16)] and len(rows) == 96
    resumed = make(online(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert seen.rows[96:] == rows[48:]
    assert_same_weights(weights(resumed), weights(whole))
    selection = select_prompts(make(None), config(score="learnability"))
    assert len(selection.indices) == 8 and all(row % 3 for row in selection.indices)
    with pytest.raises(ValueError, match="The host of Mine does not know how to take gradients.*'learnability'"):
        select_prompts(make(None), config())
