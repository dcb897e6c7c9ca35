"""
One run of training: a schedule, a pool, a seed. What it reached on equations held out, and what it spent.

    python benchmarks/online/run.py --dataset_path DIR --arm online --pool hard --seed 0

writes runs/online/POOL/ARM-SEED.json; a run that is there already is left out, and one that was stopped begins again.
--arms, --pools and --seeds take several, one after another; another call beside it takes other runs. DIR holds GSM8K's
train.jsonl and test.jsonl. Without it generated chains stand in.

`uniform` is stock GRPOTrainer, `refill` and the other methods are those of baselines.py. The arms of `SELECTIONS` roll
the pool out first and train on a fixed choice; those that end in "then online" choose online among the better half of
the learnable prompts. What that costs is part of a run's rollouts. The policy trains as
benchmarks/gsm8k_equations/grid.py trains it: LoRA, 16 prompts x 8 rollouts a step. On the pools `clean` and
`clean-wrong` it is warmed up first, on 300 random prompts, the same for all arms. `target online` chooses for the rows
of the tasks that the test of `skills-target` asks for, a fifth of that pool; `target_share` of a result is their share
of training.
"""

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import numpy as np
import pandas as pd
from baselines import ONLINE, SCHEDULES, RefillingTrainer, sampler_of
from harness import DATASET, options, versions
from policies import GROUP, Looking, load_policy, read_equations, successes, tiny_trainer, trained
from pools import POOLS, make_pool, make_task

from trl_learnalign import LearnAlignConfig, LearnAlignSampler, select_prompts


CHUNK, WARMUP_STEPS = 16, 19
SAMPLES = 8  # of a row held out at the end; half as many before
PARTS = 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1  # of a run, at which held-out success is measured


def learnable_only(seed):
    """The score of the arm `filter`: at random among the learnable prompts."""

    def score(table):
        values = pd.Series(np.random.default_rng(seed).random(len(table)), table.index)
        return values.where(table["learnability"] > 0)

    return score


# Settings of a selection before the first step. "then online" keeps the better half of the learnable prompts
SELECTIONS = {
    "filter": {"score": "learnable_only", "score_measures": ["rollouts"]},
    "learnability": {"score": "learnability"},
    "learnalign": {"score": "learnalign"},
    "target": {"score": "target"},
    "target alignment": {"score": "target_alignment"},
    "learnalign then online": {"score": "learnalign"},
    "target then online": {"score": "target_alignment"},
}
# Every score of a selection, at the price of at most a quarter of a run of 125 steps where it needs rollouts
FEW = {"candidate_prompts": 500}
SELECTIONS |= {
    "static random": {"score": "random"},
    "static confidence": {"score": "confidence", "answer_column": "answer"},
    "static pvi": {"score": "pvi", "answer_column": "answer"},
    "static demonstration": {"score": "demonstration", "answer_column": "answer"},
    "static density": {"score": "density", "take": "proportional"},
    "static learnability": {"score": "learnability", **FEW},
    "static racing": {"score": "learnability", "rollouts": "racing", "candidate_prompts": 900},
    "static learnalign": {"score": "learnalign", **FEW},
    "static alignment": {"score": "alignment", **FEW},
    "static influence": {"score": "influence", **FEW},
    "static diversity": {"score": "learnability", "diversity": "hidden_states", **FEW},
    "static funnel": {"score": "learnability", "candidate_score": "confidence", "answer_column": "answer", **FEW},
}
CHOSEN = 100  # prompts of a selection, less than half of the learnable ones
ARMS = ("uniform", *SCHEDULES, "refill", *ONLINE, *SELECTIONS)
WARM_POOLS = ("clean", "clean-wrong")


class Recorder:
    """The reward, and the rows and successes of every group it was asked for: all that was rolled out."""

    def __init__(self, reward, false_positives=0.0, seed=0, coins=None):
        self.reward, self.false_positives, self.rng = reward, false_positives, np.random.default_rng(seed)
        self.coins = coins  # of every row: its rollouts are rewarded at one half, whatever they say
        self.__name__ = reward.__name__
        self.rows, self.successes, self.lengths, self.calls = [], [], [], []

    def __call__(self, completions, answer, row, **kwargs):
        rewards = self.reward(completions, answer)
        if self.false_positives:
            lucky = self.rng.random(len(rewards)) < self.false_positives
            rewards = np.maximum(rewards, lucky).tolist()
        if self.coins is not None:
            flips = self.rng.random(len(rewards)) < 0.5
            rewards = np.where(self.coins[row], flips, rewards).tolist()
        self.rows += row[::GROUP]
        self.successes += np.array(rewards, int).reshape(-1, GROUP).sum(1).tolist()
        self.lengths += np.array([len(text) for text in completions]).reshape(-1, GROUP).sum(1).tolist()
        self.calls.append(len(self.rows))
        return rewards

    def rollouts(self):
        return GROUP * len(self.rows)


def look(model, tokenizer, rows, samples, reward) -> dict:
    """Success on rows held out at temperature 1, and of at least one of `samples`; mean length in tokens."""
    sampled, texts = successes(model, tokenizer, rows, samples, reward)
    tasks = list(rows["task"]) if "task" in rows.column_names else [0] * len(rows)
    rates = pd.Series(sampled.mean(1)).groupby(tasks).mean()
    return {
        "sampled": round(float(sampled.mean()), 4),
        f"pass@{samples}": round(float((sampled.max(1) > 0).mean()), 4),
        "length": round(float(np.mean([len(text) + 1 for text in texts])), 2),  # with the end token
    } | ({"tasks": [round(float(rate), 3) for rate in rates]} if len(rates) > 1 else {})


class Looks(Looking):
    """Looks after each step by which so many rollouts of `marks` are made, and ends training after the last."""

    def __init__(self, task, recorder, marks):
        super().__init__()
        self.task, self.recorder, self.marks = task, recorder, sorted(marks)
        self.tokenizer = load_policy(task.policy)[1]
        self.selected = None  # groups rolled out before the first step

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control)
        self.look_at(model, 0, SAMPLES // 2)

    def on_step_begin(self, args, state, control, **kwargs):
        if self.selected is None:
            self.selected = len(self.recorder.rows)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        left = [mark for mark in self.marks if mark > self.recorder.rollouts()]
        if len(left) < len(self.marks):
            self.look_at(model, state.global_step, SAMPLES // 2 if left else SAMPLES)
        self.marks = left
        control.should_training_stop |= not left

    def look_at(self, model, step, samples):
        on = model, self.tokenizer, self.task.test, samples, self.task.reward
        self.look(look, *on, digits=1, step=step, rollouts=self.recorder.rollouts())


def build_trainer(arm, task, adapter, rows, reward, steps, seed, folder, learning_rate, callbacks, **settings):
    """A trainer that chooses prompts by `arm`; `settings` are more settings of this package."""
    sampler = sampler_of(arm, **settings)
    if arm in SELECTIONS:
        sampler = LearnAlignSampler(selection_config(arm, task, seed))
    kind, run = RefillingTrainer if arm == "refill" else None, (rows, learning_rate, steps, seed, callbacks)
    length = task.max_completion
    return tiny_trainer(task.policy, adapter, reward, folder, *run, length=length, sampler=sampler, kind=kind)


def selection_config(arm, task, seed, chosen=None):
    """Of a selection before the first step, of `CHOSEN` prompts by default."""
    settings = dict(SELECTIONS[arm])
    if settings["score"] == "learnable_only":
        settings["score"] = learnable_only(seed)
    if settings["score"] in ("target", "target_alignment"):
        target = task.target.select_columns(["prompt", "answer", "task"])
        settings["target_dataset"] = target.add_column("row", [-1] * len(target))
    return LearnAlignConfig(num_prompts=chosen or CHOSEN, warmup_prompts=0, write_report=False, **settings)


def better_half(arm, task, adapter, rows, recorder, seed, folder, learning_rate):
    """The rows that the selection of an arm ranks in the better half of the learnable ones, with success rates."""
    trainer = build_trainer("uniform", task, adapter, rows, recorder, 1, seed, folder, learning_rate, [])
    selection = select_prompts(trainer, selection_config(arm, task, seed, len(rows)))
    return selection.to_dataset(rows, with_scores=True).select(range(len(selection.indices) // 2))


def warm_up(seed, task, rows, arguments) -> Path:
    """The adapter after the warm-up."""
    with TemporaryDirectory() as folder:
        run = Recorder(task.reward), WARMUP_STEPS, seed, folder, 1e-3, []
        path = arguments.output_dir / f"warm-{seed}"
        return trained(path, lambda: build_trainer("uniform", task, None, rows, *run))


def run(arm, name, seed, arguments) -> dict:
    pool = make_pool(name, arguments.dataset_path, seed, arguments.output_dir / "pools")
    task = make_task(name, arguments.dataset_path, arguments.output_dir)
    task = replace(task, test=task.test.select(range(min(arguments.test, len(task.test)))))
    rows = pool.rows.add_column("row", list(range(len(pool.rows))))
    if arm == "target online":
        if pool.target is None:
            sys.exit(f"The pool '{name}' has no target. Run '{arm}' on skills-target.")
        rows = rows.add_column("is_target", pool.target.tolist())
    adapter = None
    if name in WARM_POOLS:
        clean = make_pool("clean", arguments.dataset_path, seed).rows
        adapter = warm_up(seed, task, clean.add_column("row", list(range(len(clean)))), arguments)
    steps, recorder = arguments.steps, Recorder(task.reward, pool.false_positives, seed, pool.coins)
    # After as many rollouts as one chunk a step makes, since a refill makes more, and a selection comes before
    marks = [round(steps * part) * CHUNK * GROUP for part in PARTS]
    looks = Looks(task, recorder, marks)
    rate = arguments.learning_rate
    with TemporaryDirectory() as folder:
        settings, kind = {}, arm
        if arm.endswith("then online"):
            rows = better_half(arm, task, adapter, rows, recorder, seed, folder, rate)
            settings, kind = {"pass_rate_column": "success_rate"}, "online"
        trainer = build_trainer(kind, task, adapter, rows, recorder, steps, seed, folder, rate, [looks], **settings)
        trainer.train()
        logs = trainer.state.log_history
        result = {"suspects": suspects(trainer, pool)} if arm in ONLINE and pool.wrong.any() else {}
    selected = looks.selected  # what follows is of training alone
    successes, trained = np.array(recorder.successes[selected:]), np.array(recorder.rows[selected:])
    live = (successes > 0) & (successes < GROUP)
    names = sorted({key for log in logs for key in log if key.startswith("learnalign/")})
    batches = [call - selected for call in recorder.calls if call > selected]
    return (
        result
        | {
            "arm": arm,
            "pool": name,
            "seed": seed,
            "looks": looks.looks,
            "live": [int(part.sum()) for part in np.split(live, batches[:-1])],  # groups, of each batch generated
            "groups": [len(part) for part in np.split(live, batches[:-1])],
            "live_share": round(float(live.mean()), 4),
            "distinct": len(set(trained.tolist())),
            "rollouts": recorder.rollouts(),
            "selection_rollouts": GROUP * selected,
            "kinds": by_kind(pool, trained),
            "target_share": None if pool.target is None else round(float(pool.target[trained].mean()), 4),
            "quarters": quarters(pool, trained, live),
            "wrong": int(pool.wrong[trained].sum()),
            "completion_length": round(sum(recorder.lengths) / recorder.rollouts(), 2),
            "logged": {key: [log[key] for log in logs if key in log] for key in names},
        }
    )


def by_kind(pool, rows) -> list[int]:
    """How many of these rows are of each kind."""
    return np.bincount(pool.kind[rows], minlength=int(pool.kind.max()) + 1).tolist()


def quarters(pool, trained, live) -> dict[str, list[list[int]]]:
    """Groups, and those that were live, of each kind in each quarter of a run, of 4 lists."""
    parts = list(zip(np.array_split(trained, 4), np.array_split(live, 4), strict=True))
    return {
        "groups": [by_kind(pool, rows) for rows, _ in parts],
        "live": [by_kind(pool, rows[own]) for rows, own in parts],
    }


def suspects(trainer, pool) -> dict:
    """How many of the first 10, 30, 100 and 300 prompts that the schedule suspects, and of all, have wrong answers."""
    rows = trainer.learnalign.schedule.curriculum.memory.suspects()[0]
    firsts = [first for first in (10, 30, 100, 300) if first < len(rows)]
    return {str(first): int(pool.wrong[rows[:first]].sum()) for first in [*firsts, len(rows)]}


def main():
    files = {"dataset_path": DATASET, "output_dir": Path("runs/online")}
    cells = {"arms": [*ARMS], "pools": ["hard"], "seeds": [0, 1]}
    choices, test = {"arms": ARMS, "pools": POOLS}, (1301, "only the first rows of the test")
    arguments = options(__doc__, choices, **files, **cells, steps=125, learning_rate=1e-3, test=test)
    conditions = {name: getattr(arguments, name) for name in ("steps", "learning_rate", "test")}
    conditions["data"] = read_equations(arguments.dataset_path)[2]
    conditions["versions"] = versions()
    for name, seed, arm in harness.cells(arguments):
        policy = make_task(name, arguments.dataset_path, arguments.output_dir).policy / "model.safetensors"
        conditions["policy"] = hashlib.sha256(policy.read_bytes()).hexdigest()[:16]
        file = arguments.output_dir / name / f"{arm.replace(' ', '-')}-{seed}.json"
        found = harness.cell(file, conditions, run, arm, name, seed, arguments)
        if found is not None:
            end = f"{found['looks'][-1]['sampled']:.4f}, live {found['live_share']:.3f}"
            print(f"{name}, {arm}, seed {seed}: {end}", flush=True)


if __name__ == "__main__":
    main()
