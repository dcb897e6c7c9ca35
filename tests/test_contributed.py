"""
What a contributor writes for a new score: one function and one test; for a new schedule, or a host for another
trainer: one class and one test. Nothing of the package is touched.
"""

import itertools
from collections import defaultdict

import numpy as np
import pytest
import torch
from peft import get_peft_model
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
