"""
Rows of GSM8K and MATH as they come, with a real chat model: what the package makes of them, and what it refuses.

    python benchmarks/chat/real_rows.py --dataset_path DIR --math_path DIR [--model DIR] [--output_dir DIR]

The features and kinds that an online run has of 600 rows, and what they tell of MATH's subjects and levels; rollouts
of the first random prompts of that run, and what is said of them; how many rows of MATH filters keep and quotas take;
settings that are refused. Nothing is trained. Writes benchmarks/results/real_rows.json: numbers and
messages, no row. Each DIR has a train.jsonl. Most of its time goes into the rollouts, of which finished ones are kept.
"""

import json
import logging
import re
import sys
from copy import deepcopy
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import numpy as np
from datasets import Dataset
from model import load
from policies import GROUP, arguments_of, trainer_of

from trl_learnalign import LearnAlignCallback, LearnAlignConfig, LearnAlignSampler, select_prompts
from trl_learnalign.curriculum import Group
from trl_learnalign.ground.peers import Peers
from trl_learnalign.schedules.prompt_features import eligible_rows


ROWS, GSM8K, DRAWN = 600, 200, 64  # rows with features, those of GSM8K among them, those that are rolled out
LENGTH, RIDGE, FOLDS = 48, 10.0, 5
COLUMNS = "prompt", "answer", "characters", "source", "level", "type"
WHERE = "level >= 4", "type == 'Algebra' and level <= 2", "answer is not None", "level > 0 and characters < 150"
QUOTAS = ("type", "proportional"), ("type", "equal"), ("level", "equal")
ONLINE = {"schedule": "online"}
# fmt: off
REFUSED = (
    {"where": "subject == 'Algebra'"}, {"where": "level == 'Level 5'"}, {"where": "level > 5"},
    {"where": "completion_length_mean < 100", **ONLINE}, {"quota_column": "problem"},
    {"group_column": "answer", **ONLINE}, {"pass_rate_column": "level", **ONLINE},
    {"target_column": "type", "score": "target", **ONLINE}, {"answer_column": "answer", "score": "confidence"},
)
# fmt: on
SAID: list[str] = []  # warnings of the package
listener = logging.Handler(logging.WARNING)
listener.emit = lambda record: SAID.append(record.getMessage())
logging.getLogger("trl_learnalign").addHandler(listener)


def read(path, source) -> list[dict]:
    """Rows as they are, with messages as `prompt`."""
    found = []
    for row in map(json.loads, (path / "train.jsonl").read_text(encoding="utf-8").splitlines()):
        text = row["question" if source == "GSM8K" else "problem"]
        messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": text}]
        row |= {"prompt": messages, "characters": len(text), "source": source}
        found.append({"level": None, "type": None} | row)
    return found


def right(completions, answer, **kwargs) -> list[float]:
    """1 where the last number of a completion is the answer, or an answer that is no number ends it."""
    found, number = [], r"-?\d+(?:\.\d+)?"
    for completion, own in zip(completions, answer, strict=True):
        text, own = (one.replace(",", "") for one in (completion[0]["content"], (own or "").split("####")[-1].strip()))
        is_last = bool(own) and text.rstrip("\n .$").endswith(own)
        found.append(float(re.findall(number, text)[-1:] == [own] if re.fullmatch(number, own) else is_last))
    return found


def trainer_on(rows, options):
    args = {"bf16": True, "per_device_train_batch_size": 8 * GROUP, "max_completion_length": LENGTH, "max_steps": 60}
    return trainer_of(load(options.model), right, arguments_of(options.output_dir, **args), rows)


def told(x, labels, values) -> dict:
    """How often ridge regression on features names the class of rows it was not fitted to, and what kinds have."""
    names, codes = np.unique(values, return_inverse=True)
    fold, said = np.random.default_rng(0).permutation(len(x)) % FOLDS, np.zeros(len(x), int)
    for part in range(FOLDS):
        own, precision = x[fold != part], RIDGE * np.diag(np.arange(x.shape[1]) > 0)  # the constant is free
        weights = np.linalg.solve(own.T @ own + precision, own.T @ np.eye(len(names))[codes[fold != part]])
        said[fold == part] = (x[fold == part] @ weights).argmax(1)

    def purest(labels):  # share of rows that are of the most common class of their kind
        return sum(np.bincount(codes[labels == kind]).max() for kind in np.unique(labels)) / len(codes)

    shuffled = [purest(np.random.default_rng(seed).permutation(labels)) for seed in range(20)]
    found = {"right": (said == codes).mean(), "most_common": np.bincount(codes).max() / len(codes)}
    found |= {"of_kinds": purest(labels), "of_shuffled_kinds": np.mean(shuffled)}
    return {name: round(float(value), 3) for name, value in found.items()}


def features_and_kinds(schedule, rows) -> dict:
    """What an online run knows of each prompt at its start tells of its source, and of MATH's subjects and levels."""
    x, labels = schedule.curriculum.features.astype(np.float64), schedule.curriculum.kinds.labels
    own = np.array(rows["source"]) == "MATH"
    found = {"sizes": np.bincount(labels).tolist(), "columns": x.shape[1], "source": told(x, labels, rows["source"])}
    for name in ("type", "level"):
        values = [value for value in rows[name] if value is not None]
        found[name] = told(x[own], labels[own], values)
        found[name]["by_length"] = told(x[own][:, :2], labels[own], values)["right"]
    return found


def first_draws(schedule, rows, options) -> dict:
    """Roll out the first random prompts, tell the schedule as they come, and choose some by a filter and a quota."""
    begun = deepcopy(schedule.state_dict())
    drawn = [row for _ in range(DRAWN // 8) for row in schedule.choose(8)]
    own, common = rows.select(drawn), {"score": "learnability", "write_report": False}
    trainer = trainer_on(own, options)
    SAID.clear()
    table = select_prompts(trainer, LearnAlignConfig(num_prompts=DRAWN, **common)).to_pandas().sort_index()
    found: dict = {"said": [*SAID]}
    table = table.assign(source=own["source"], right=(GROUP * table["success_rate"]).round().astype(int))
    rewards = [(np.arange(GROUP) < number)[:, None].astype(float) for number in table["right"]]
    schedule.load_state_dict(begun)
    SAID.clear()
    for place in range(0, DRAWN, 8):
        draws = enumerate(schedule.choose(8), place)
        schedule.observe([Group(number, row, rewards[number]) for number, row in draws])
        schedule.tick(1)
    schedule.choose(8)
    found["schedule"] = {name: round(schedule.metrics()[name], 3) for name in ("choosing", "skill", "pool_success")}
    found["schedule"] |= {"said": [*SAID], "summary": schedule.summary()}
    for name, part in table.groupby("source"):
        found[name] = part[["success_rate", "completion_length_mean"]].mean().round(3).to_dict()
        found[name] |= {"groups": len(part), "live": int(part["right"].between(1, GROUP - 1).sum())}
    SAID.clear()
    settings = {"where": f"completion_length_mean < {LENGTH - 8}", "quota_column": "source", "num_prompts": 8}
    chosen = select_prompts(trainer, LearnAlignConfig(**settings, **common)).indices
    found["filtered"] = {name: own.select(chosen)["source"].count(name) for name in ("GSM8K", "MATH")}
    return found | {"filter": settings, "filter_said": [*SAID]}


def counts(trainer, column, quota) -> dict:
    """How many of 500 prompts each value of a column gets."""
    settings = {"num_prompts": 500, "score": "random", "quota_column": column, "quota": quota, "write_report": False}
    values = trainer.train_dataset.select(select_prompts(trainer, LearnAlignConfig(**settings)).indices)[column]
    return {"column": column, "quota": quota, "counts": {str(one): values.count(one) for one in sorted({*values})}}


def answer_to(trainer, settings) -> str:
    """The error that a setting gives on these rows."""
    try:
        LearnAlignCallback(trainer, LearnAlignSampler(LearnAlignConfig(write_report=False, **settings)))
    except ValueError as error:
        return str(error)
    return "accepted"


def main():
    paths = {"dataset_path": harness.DATASET, "math_path": (Path, "directory with MATH's train.jsonl")}
    options = harness.options(__doc__, **paths, model=Path("runs/chat/model"), output_dir=Path("runs/chat/real-rows"))
    if None in (options.dataset_path, options.math_path):
        sys.exit("Say where the rows are: --dataset_path DIR --math_path DIR.")
    random, math = np.random.default_rng(0), read(options.math_path, "MATH")
    both = (read(options.dataset_path, "GSM8K"), GSM8K), (math, ROWS - GSM8K)
    some = [rows[i] for rows, number in both for i in random.permutation(len(rows))[:number]]
    some = Dataset.from_list([{name: row[name] for name in COLUMNS} for row in some])
    trainer, sampler = trainer_on(some, options), LearnAlignSampler(LearnAlignConfig(write_report=False, **ONLINE))
    host, trainer.state.max_steps = LearnAlignCallback(trainer, sampler).host, trainer.args.max_steps
    with Peers(trainer.accelerator) as peers:
        sampler.schedule.prepare(host, None, peers)
        sampler.schedule.look(host, peers)
    found = {"features": features_and_kinds(sampler.schedule, some)}
    found["draws"] = first_draws(sampler.schedule, some, options)
    rows = Dataset.from_list(math)
    trainer = trainer_on(rows, options)
    found["where"] = {text: len(eligible_rows(rows, LearnAlignConfig(where=text, **ONLINE))) for text in WHERE}
    found["quotas"], found["rows"] = [counts(trainer, *quota) for quota in QUOTAS], len(rows)
    found["refused"] = [[settings, answer_to(trainer, settings)] for settings in REFUSED]
    settings = {"rows": ROWS, "gsm8k": GSM8K, "draws": DRAWN, "tokens": LENGTH}
    harness.report(harness.RESULTS / "real_rows.json", {"conditions": harness.conditions(**settings)} | found)


if __name__ == "__main__":
    main()
