"""
The adapters of examples/adapters, against the protocols of the frameworks that they are for, whose packages need GPUs
or servers: what an adapter imports is a stand-in that does what the framework's own class does, as far as it is used.
"""

import copy
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import fixed_reward, grpo_args, make_dataset, make_model, make_tokenizer
from trl import GRPOTrainer


ADAPTERS = Path(__file__).parent.parent / "examples" / "adapters"
SIZE, GROUP = 60, 4


@pytest.fixture
def load(monkeypatch):
    """Import an adapter among stand-ins, given by the names of their modules."""

    def loaded(name, modules):
        for path, names in modules.items():
            for end in range(1, path.count(".") + 1):
                package = ".".join(path.split(".")[:end])
                monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
            module = ModuleType(path)
            vars(module).update(names)
            monkeypatch.setitem(sys.modules, path, module)
            parent, _, last = path.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, module)
        spec = importlib.util.spec_from_file_location(name, ADAPTERS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


def rewards_of(row, random):
    """Every third prompt can be learnt."""
    return (random.random(GROUP) < (0.5 if row % 3 == 0 else 0.0)).astype(float)


# Trinity-RFT -------------------------------------------------------------------------------------------------------


class BaseSelector:
    def __init__(self, data_source, config):
        self.data_source, self.config = data_source, config


def trinity_selector(load):
    adapter = load("learnalign_trinity", {"trinity.buffer.selector.selector": {"BaseSelector": BaseSelector}})
    rows = {"length": list(range(SIZE)), "source": ["web", "book"] * (SIZE // 2)}
    config = SimpleNamespace(feature_keys=["length", "source"], kwargs={"repeat_times": GROUP}, seed=3)
    selector = adapter.OnlineSelector(SimpleNamespace(dataset=rows, dataset_size=SIZE), config)
    selector.load_state_dict({"current_index": 0})  # as Trinity does with a new run
    return selector


def test_trinity_chooses_learns_and_goes_on(load):
    selector, random = trinity_selector(load), np.random.default_rng(0)
    assert selector.curriculum.features.shape == (SIZE, 4)

    def step(one):
        rows = one.get_indices(8)
        one.feedback([np.int64(row) for row in rows], [rewards_of(row, random).mean() for row in rows])
        return rows

    for _ in range(6):
        step(selector)
    assert selector.curriculum.history.observed == 48 and selector.curriculum.steps == 6
    behind = selector.get_indices(8)  # feedback comes later
    state = json.loads(json.dumps(selector.state_dict()))
    assert state["current_index"] == 56
    resumed = trinity_selector(load)
    resumed.load_state_dict(state)
    for one in (selector, resumed):
        one.feedback(behind, [0.5] * 8)
        one.feedback([behind[0]], [1.0])  # nothing waits for it
    assert selector.curriculum.history.observed == resumed.curriculum.history.observed == 56
    assert selector.get_indices(20) == resumed.get_indices(20)
    assert selector.get_indices(3, return_extra_info=True)[1] == {}


@pytest.mark.slow
def test_trinity_with_the_real_package(monkeypatch):
    """Its registry finds the class by its dotted path; its reader reads the tasks. Ray is imported, not started."""
    reason = "trinity-rft 0.6, ray, omegaconf and sqlalchemy are not installed"
    readers = pytest.importorskip("trinity.buffer.reader.file_reader", reason=reason)
    from datasets import Dataset
    from trinity.buffer.selector import SELECTORS
    from trinity.common.config import DataSelectorConfig

    monkeypatch.syspath_prepend(str(ADAPTERS))
    kind, random = SELECTORS.get("learnalign_trinity.OnlineSelector"), np.random.default_rng(0)
    rows = Dataset.from_dict({"length": list(range(SIZE)), "source": ["web", "book"] * (SIZE // 2)})
    config = DataSelectorConfig(
        selector_type="learnalign_trinity.OnlineSelector",
        feature_keys=["length", "source"],
        kwargs={"repeat_times": GROUP},
        seed=3,
    )

    def selector():
        reader = readers._HFBatchReader(
            rows, name="tasks", default_batch_size=8, total_epochs=9, enable_progress_bar=False
        )
        return kind(reader, config), reader

    one, reader = selector()
    for _ in range(6):
        chosen = one.get_indices(8)
        assert [task["length"] for task in reader.select_batch(chosen)] == chosen
        one.feedback(chosen, [rewards_of(row, random).mean() for row in chosen])
    assert one.curriculum.history.observed == 48
    again, _ = selector()
    again.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert again.get_indices(20) == one.get_indices(20)


def test_trinity_feedback_of_a_task_drawn_twice_counts_twice(load):
    selector = trinity_selector(load)
    rows = selector.get_indices(SIZE + 5)  # more than there are
    twice = next(row for row in rows if rows.count(row) == 2)
    selector.feedback([twice, twice], [1.0, 0.0])
    assert selector.curriculum.memory.visits[twice] == 2
    assert selector.curriculum.memory.successes[twice] == pytest.approx(GROUP, rel=1e-3)


# slime -------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    prompt: str
    group_index: int | None = None
    index: int | None = None
    reward: float | dict | None = None
    metadata: dict = field(default_factory=dict)

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


class RolloutDataSource:
    """As in slime: the data set, counters, and their file."""

    def __init__(self, args):
        assert not args.rollout_shuffle, "the rows would be others"
        self.args, self.sample_index = args, 0
        self.dataset = SimpleNamespace(samples=[Sample("x" * (1 + row)) for row in range(SIZE)])

    def save(self, rollout_id):
        path = Path(self.args.save) / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"sample_index": self.sample_index}, path)

    def load(self, rollout_id=None):
        path = Path(self.args.load or "none") / "rollout" / f"global_dataset_state_dict_{rollout_id}.pt"
        if path.exists():
            self.sample_index = torch.load(path)["sample_index"]


def slime_source(load, folder, resume=False):
    adapter = load("learnalign_slime", {"slime.rollout.data_source": {"RolloutDataSource": RolloutDataSource}})
    args = SimpleNamespace(
        rollout_shuffle=True, n_samples_per_prompt=GROUP, rollout_seed=1, reward_key="score", save=str(folder)
    )
    args.load = str(folder) if resume else None
    return adapter, adapter.OnlineDataSource(args)


def test_slime_chooses_learns_and_goes_on(load, tmp_path):
    adapter, source = slime_source(load, tmp_path)
    random = np.random.default_rng(0)

    def rolled_out(groups):
        for group in groups:
            for sample, reward in zip(group, rewards_of(len(group[0].prompt) - 1, random), strict=True):
                sample.reward = {"score": float(reward)}
        return groups

    for step in range(5):
        groups = rolled_out(source.get_samples(8))
        assert [len(group) for group in groups] == [GROUP] * 8
        assert [group[0].group_index for group in groups] == list(range(8 * step, 8 * step + 8))
        for group in groups:
            number, row = group[0].metadata["learnalign_draw"]
            assert group[0].prompt == "x" * (row + 1) and number == group[0].group_index
        adapter.observe(source.args, groups[::-1], source.get_samples)  # as slime calls it
    assert source.curriculum.history.observed == 40 and source.curriculum.steps == 5
    assert sorted(sample.index for sample in groups[-1]) == list(range(156, 160))
    assert not source.prompts[0].metadata  # the data set itself is as it was
    aborted = source.get_samples(3)
    source.save(5)
    _, resumed = slime_source(load, tmp_path, resume=True)
    resumed.load(5)
    assert resumed.curriculum.drawn == 43 and resumed.sample_index == source.sample_index
    source.add_samples(aborted)
    assert source.get_samples(2) == aborted[:2]  # aborted groups come first
    first, *then = source.get_samples(4)
    assert first is aborted[2]
    expected = [group[0].metadata["learnalign_draw"] for group in then]
    assert [group[0].metadata["learnalign_draw"] for group in resumed.get_samples(3)] == expected


def test_slime_leaves_out_samples_without_a_reward(load, tmp_path):
    adapter, source = slime_source(load, tmp_path)
    groups = source.get_samples(3)
    for sample in groups[0][:2] + groups[1]:
        sample.reward = {"score": 1.0}
    source.observe([[groups[0][:2], groups[0][2:]], groups[1], groups[2]])  # the first fanned out
    counts = source.curriculum.memory
    rows = [group[0].metadata["learnalign_draw"][1] for group in groups]
    assert counts.successes[rows].tolist() == [2, 4, 0] and counts.visits[rows].tolist() == [1, 1, 0]


# prime-rl ----------------------------------------------------------------------------------------------------------


class TaskSampler(ABC):
    def __iter__(self):
        return self

    @abstractmethod
    def __next__(self): ...


def prime_sampler(load):
    path = "prime_rl.orchestrator.curriculum.samplers.base"
    adapter = load("learnalign_prime_rl", {path: {"TaskSampler": TaskSampler}})
    return adapter.OnlineSampler([SimpleNamespace(key=f"task-{row}") for row in range(SIZE)], GROUP, ahead=4)


def episodes(task, rewards, errors=0):
    return [
        SimpleNamespace(
            task=task,
            traces=[
                SimpleNamespace(reward=reward, has_error=place < errors, agent=SimpleNamespace(trainable=True)),
                SimpleNamespace(reward=9.0, has_error=False, agent=SimpleNamespace(trainable=False)),
            ],
        )
        for place, reward in enumerate(rewards)
    ]


def test_prime_rl_chooses_learns_and_goes_on(load):
    sampler, random = prime_sampler(load), np.random.default_rng(0)
    flight = [next(sampler) for _ in range(20)]
    for _ in range(60):  # out of order, with many in flight
        task = flight.pop(int(random.integers(len(flight))))
        row = int(task.key.split("-")[1])
        sampler.observe(episodes(task, rewards_of(row, random), errors=int(random.integers(0, 3))))
        flight.append(next(sampler))
    sampler.tick()
    history = sampler.curriculum.history
    assert history.observed == 60 and sampler.metrics()["learnalign/live_fraction"] >= 0
    assert 0 < sampler.curriculum.memory.successes.sum() < 60 * GROUP  # those with errors are left out
    resumed = prime_sampler(load)
    resumed.load_state_dict(copy.deepcopy(sampler.state_dict()))
    assert [next(sampler).key for _ in range(9)] == [next(resumed).key for _ in range(9)]
    sampler.observe(episodes(flight[0], np.ones(GROUP), errors=GROUP))  # nothing to learn from it
    assert history.observed == 60


# verl --------------------------------------------------------------------------------------------------------------


class PPOTrainerSync:
    """As in verl: batches of the dataloader, an advantage of what came back, a folder a step."""

    def __init__(self, config):
        self.config, self.global_steps = config, 0
        self.trainer_mode = config.trainer.v1.trainer_mode
        self._init_dataloader()
        self._load_checkpoint()

    def _init_dataloader(self):
        self.train_dataset = [{"raw_prompt": f"prompt {row}"} for row in range(SIZE)]

    def _compute_advantage(self, batch, metrics):
        return batch

    def _save_checkpoint(self):
        (Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}").mkdir(parents=True)

    def _load_checkpoint(self):
        folders = Path(self.config.trainer.default_local_dir).glob("global_step_*")
        self.global_steps = max((int(folder.name.rpartition("_")[2]) for folder in folders), default=0)


class Config(SimpleNamespace):
    def get(self, name, default=None):
        return getattr(self, name, default)


def verl_trainer(load, folder, queue):
    registered = {}

    def register_trainer(name):
        return lambda kind: registered.setdefault(name, kind)

    def kv_batch_get(keys, partition_id, select_fields):
        assert partition_id == "train" and select_fields == ["uid", "rm_scores"]
        return {"uid": np.array(queue["uid"], dtype=object), "rm_scores": queue["rm_scores"]}

    def collate_fn(rows):
        return {"raw_prompt": np.array([row["raw_prompt"] for row in rows], dtype=object)}

    adapter = load(
        "learnalign_verl",
        {
            "transfer_queue": {"kv_batch_get": kv_batch_get},
            "verl.trainer.ppo.v1.trainer_base": {"register_trainer": register_trainer},
            "verl.trainer.ppo.v1.trainer_sync": {"PPOTrainerSync": PPOTrainerSync},
            "verl.utils": {"tensordict_utils": SimpleNamespace(get_tensordict=dict)},
            "verl.utils.dataset.rl_dataset": {"collate_fn": collate_fn},
        },
    )
    assert registered == {"learnalign": adapter.OnlineTrainer}
    config = Config(
        data=Config(train_batch_size=8, seed=2),
        actor_rollout_ref=Config(rollout=Config(n=GROUP)),
        trainer=Config(default_local_dir=str(folder), v1=Config(trainer_mode="learnalign")),
    )
    return adapter.OnlineTrainer(config)


def test_verl_chooses_learns_and_goes_on(load, tmp_path):
    queue, random, total = {}, np.random.default_rng(0), 0.0
    trainer = verl_trainer(load, tmp_path, queue)
    assert trainer.trainer_mode == "sync"
    for step in range(4):
        batch = trainer._fetch_one_gen_batch()
        draws = [tuple(map(int, uid.split("-"))) for uid in batch["uid"]]
        assert [number for number, _ in draws] == list(range(8 * step, 8 * step + 8))
        assert batch["raw_prompt"].tolist() == [f"prompt {row}" for _, row in draws]
        # A row for each rollout, in any order, with scores a token
        places = random.permutation(8 * GROUP)
        queue["uid"] = batch["uid"].repeat(GROUP)[places].tolist()
        rewards = np.concatenate([rewards_of(row, random) for _, row in draws])
        queue["rm_scores"] = [torch.tensor([0.0, reward]) for reward in rewards[places]]
        metrics, total = {}, total + rewards.sum()
        answer = SimpleNamespace(keys=[], partition_id="train")
        assert trainer._compute_advantage(answer, metrics) is answer
        trainer.global_steps += 1
        memory = trainer.curriculum.memory
        assert memory.visits.sum() == 8 * (step + 1) and "learnalign/live_fraction" in metrics
    assert trainer.curriculum.steps == 4
    assert 0.9 * total < trainer.curriculum.memory.successes.sum() <= total  # the first have faded a little
    trainer._save_checkpoint()
    resumed = verl_trainer(load, tmp_path, queue)
    assert resumed.curriculum.drawn == 32 and resumed.global_steps == 4
    assert trainer._fetch_one_gen_batch()["uid"].tolist() == resumed._fetch_one_gen_batch()["uid"].tolist()


# Axolotl -----------------------------------------------------------------------------------------------------------


def test_axolotl_trains(load, tmp_path):
    class AxolotlGRPOTrainer(GRPOTrainer):
        """With mixins of its own before GRPOTrainer."""

    path = "axolotl.core.trainers.grpo.trainer"
    adapter = load("learnalign_axolotl", {path: {"AxolotlGRPOTrainer": AxolotlGRPOTrainer}})
    adapter.CONFIG = replace(adapter.CONFIG, write_report=False, prompt_features=False)
    trainer = adapter.OnlineGRPOTrainer(
        make_model(),
        fixed_reward,  # Axolotl passes the reward functions by their place
        args=grpo_args(tmp_path, max_steps=2),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert trainer.learnalign.schedule.curriculum.history.observed > 0
