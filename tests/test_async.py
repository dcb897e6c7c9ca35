"""TRL's asynchronous trainer: real loops, real processes, and a server in the place of vLLM (tests/async_run.py)."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import async_run
import numpy as np
import pytest
import trl
from async_run import GROUP, SIZE, make
from packaging.version import Version
from transformers import Trainer
from trl import GRPOTrainer

from trl_learnalign import (
    LearnAlignAsyncMixin,
    LearnAlignCallback,
    LearnAlignConfig,
    LearnAlignMixin,
    LearnAlignSampler,
)
from trl_learnalign.curriculum import Group, unpack
from trl_learnalign.curriculum.feed import Ledger
from trl_learnalign.ground.disk import DirectoryLock
from trl_learnalign.schedules.async_checkpoint import FILE


pytestmark = [
    pytest.mark.skipif(Version(trl.__version__) < Version("1.11"), reason="TRL 1.11 is the first that it works with"),
    pytest.mark.skipif(find_spec("aiohttp") is None, reason="the rollout worker needs aiohttp"),
]
PLAIN = {"prompt_features": False}


def trained(trainer, resume=None):
    """Train; return the run, and the numbers of the groups of each microbatch."""
    run, batches = trainer._learnalign, []
    came = run.queue.trained

    def count():
        batches.append(dict(run.queue.counted.microbatches[0]))
        came()

    run.queue.trained = count
    trainer.train(resume_from_checkpoint=resume)
    return run, batches


def test_groups_are_observed_in_any_order_and_training_gets_live_ones(tmp_path):
    trainer, server = make(tmp_path, PLAIN, max_steps=12, save_strategy="no")
    run, batches = trained(trainer)
    curriculum, ledger = run.schedule.curriculum, run.ledger
    assert trainer.state.global_step == 12 and len(batches) == 12
    assert all(sum(batch.values()) == 8 for batch in batches)
    # Every draw is known: observed, or in flight
    assert curriculum.history.observed + len(curriculum.flight) == curriculum.drawn
    assert ledger.done + len(ledger.pending) == curriculum.drawn
    numbers = [number for batch in batches for number in batch]
    assert len(set(numbers)) * GROUP == sum(sum(batch.values()) for batch in batches)
    # What training got was live, all of it; the others were dropped, and are done
    memory = curriculum.memory
    rows = [row for row in range(SIZE) if memory.visits[row] and row % 4]
    assert memory.successes[rows].sum() == 0 < len(rows)
    rewards = [log["reward_std"] for log in trainer.state.log_history if "reward_std" in log]
    assert len(rewards) == 12 and min(rewards) > 0
    shares = [
        log["frac_reward_zero_std"] for log in trainer.state.log_history if log.get("frac_reward_zero_std") is not None
    ]
    assert shares and 0 < np.mean(shares) < 1
    logs = [log for log in trainer.state.log_history if "learnalign/live_fraction" in log]
    assert logs and logs[-1]["learnalign/choosing"] > 0
    # Chosen: the later half has more of the rows that can be learnt than random draws would, a quarter
    assert np.mean([row % 4 == 0 for row in server.asked[len(server.asked) // 2 :]]) > 0.35
    assert server.asked[: 6 * GROUP] != sorted(server.asked[: 6 * GROUP])  # TRL itself goes through the rows in order


def test_a_resumed_run_generates_again_what_was_not_trained_on_and_nothing_else(tmp_path):
    trainer, server = make(tmp_path, PLAIN, max_steps=4, save_steps=4)
    run, batches = trained(trainer)
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert (checkpoint / FILE).is_file()
    saved = unpack((checkpoint / FILE).read_bytes())
    open_rows = saved["ledger"]["rows"].tolist()
    open_numbers = saved["ledger"]["numbers"].tolist()
    gone = {number for batch in batches for number in batch}
    assert open_numbers and not gone & set(open_numbers)  # none twice
    drawn = saved["schedule"]["curriculum"]["drawn"]
    assert saved["ledger"]["done"] + len(open_numbers) == drawn  # none lost
    resumed, server = make(tmp_path, PLAIN, max_steps=8, save_strategy="no")
    again, more = trained(resumed, True)  # the last complete checkpoint
    assert resumed.state.global_step == 8 and len(more) == 4
    assert set(server.asked[:12]) <= set(open_rows[:8])  # these come first
    later = {number for batch in more for number in batch}
    assert not later & gone and min(later) in open_numbers
    assert again.ledger.done + len(again.ledger.pending) == again.schedule.curriculum.drawn
    assert resumed._groups_before_resume == saved["ledger"]["done"]
    with pytest.raises(RuntimeError, match="This trainer has trained before"):
        resumed.train()


def test_stale_groups_are_done_and_pin_nothing(tmp_path):
    """trl#7274: one stale group, and a resumed run begins where that group was."""
    trainer, _ = make(tmp_path, PLAIN, max_steps=6, save_steps=6, max_staleness=0, max_inflight_tasks=64)
    read, inner = Counter(), trainer._learnalign.queue.inner.get

    def get(*args, **kwargs):
        sample = inner(*args, **kwargs)
        read[sample.group_id] += 1
        return sample

    trainer._learnalign.queue.inner.get = get
    run, batches = trained(trainer)
    ahead = {number for batch in run.queue.counted.microbatches for number in batch}
    gone = {number for batch in batches for number in batch}
    stale = {number for number, count in read.items() if count == GROUP} - gone - ahead
    assert stale and not stale & run.ledger.pending.keys()


def sample_of(number, version=5, length=3):
    return SimpleNamespace(group_id=number, model_version=version, input_ids=[1] * length)


def test_the_queue_tells_of_samples_that_training_drops():
    from trl_learnalign.host.async_grpo import SampleQueue

    metrics, inner, ledger = {"train": defaultdict(list)}, queue.Queue(), Ledger()
    args = SimpleNamespace(max_staleness=1, token_budget=4)
    reader = SampleQueue(SimpleNamespace(model_version=6, args=args, _metrics=metrics), inner, ledger)
    ledger.chose((number, 0) for number in range(3))
    for number in range(3):
        ledger.finished(number, 1)
    for sample in (sample_of(0, version=4), sample_of(1, length=5), sample_of(2)):
        inner.put(sample)
    assert reader.get().group_id == 1  # the first is stale; of this one the trainer says that it is too long
    assert list(ledger.pending) == [2] and metrics["train"]["sample/dropped_stale_total"] == [1.0]
    assert reader.get().group_id == 2 and list(ledger.pending) == [2]
    reader.counted.update(iter([2]))
    reader.trained()
    assert not ledger.pending and ledger.done == 3 and reader.counted == {2}


def test_a_rollout_without_a_sample_has_no_known_reward():
    from trl_learnalign.host.async_grpo import _rewards_of

    samples = [SimpleNamespace(metrics={"rewards/a": value, "rewards/b": -value}) for value in (1.0, 1.0, 3.0)]
    rewards, masked = _rewards_of(samples, [["row", "row"], [], ["row"]], ["a", "b"])
    assert rewards[[0, 2]].tolist() == [[1.0, -1.0], [3.0, -3.0]] and np.isnan(rewards[1]).all()
    assert masked.tolist() == [False, True, False]


@pytest.mark.slow
def test_dead_groups_may_be_kept(tmp_path):
    trainer, _ = make(tmp_path, PLAIN | {"drop_dead_groups": False}, max_steps=4, save_strategy="no")
    run, batches = trained(trainer)
    live = [log["reward_std"] for log in trainer.state.log_history if "reward_std" in log]
    assert min(live) < 0.4  # a microbatch of two groups, one of which was dead
    assert run.ledger.done >= sum(len(batch) for batch in batches) - 1


@pytest.mark.slow
def test_an_epoch_is_so_many_prompts_live_or_not(tmp_path, capsys):
    trainer, _ = make(tmp_path, PLAIN, max_steps=-1, num_train_epochs=1, save_strategy="no", max_inflight_tasks=8)
    run, batches = trained(trainer)
    assert 1 < trainer.state.global_step < SIZE * GROUP / 8
    assert SIZE <= run.ledger.done < SIZE + 12
    # TRL's `max_steps` is a ceiling, of 32 rows for each conversation
    assert trainer.args.max_steps == 32 * SIZE * GROUP / 8
    said = capsys.readouterr().out
    assert f"steps 1 to {SIZE * GROUP // 8} train on" in said and f"{SIZE} prompts with a gradient in all" in said


@pytest.mark.slow
def test_prompts_have_hidden_states_and_gradients_are_not_to_be_had(tmp_path, caplog):
    trainer, _ = make(tmp_path, {"score": "learnalign"}, max_steps=2, save_steps=2)
    run, _ = trained(trainer)
    assert run.schedule.curriculum.features.shape[1] > 10 and run.schedule.curriculum.alignment is None
    assert "packs the rows of several groups" in caplog.text
    assert (
        trainer.model.config._attn_implementation == "trl_tree" or "tree" in trainer.model.config._attn_implementation
    )
    again, _ = make(tmp_path, {"score": "learnalign"}, max_steps=3, save_strategy="no")
    trained(again, str(tmp_path / "run" / "checkpoint-2"))
    assert np.array_equal(again._learnalign.schedule.curriculum.features, run.schedule.curriculum.features)


class Worker:
    """A rollout worker of the user's: a thread that makes samples up, as TRL's protocol asks for."""

    def __init__(self):
        self.rollout_buffer, self.metrics_queue = queue.Queue(maxsize=64), queue.Queue()
        self.version, self.failure, self._stop = 0, None, threading.Event()

    def start(self):
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

        random = np.random.default_rng(0)
        try:
            while not self._stop.is_set():
                draw = self.handle.choose(1)[0]
                rewards = (random.random(GROUP) < (0.5 if draw.row % 4 == 0 else 0.0)).astype(float)
                dead = rewards.std() == 0
                self.handle.observe(Group(draw.number, draw.row, rewards[:, None]), samples=0 if dead else GROUP)
                for reward in [] if dead else rewards:
                    sample = RolloutSample(
                        prompt=[],
                        completion=[],
                        input_ids=np.array([5, 6, 7, 1]),
                        completion_mask=np.array([0, 0, 1, 1]),
                        old_log_probs=np.array([0.0, 0.0, -1.0, -0.5], np.float32),
                        advantage=float((reward - rewards.mean()) / rewards.std()),
                        model_version=self.version,
                        group_id=draw.number,
                        metrics={"reward": float(reward)},
                    )
                    while not self._stop.is_set():
                        try:
                            self.rollout_buffer.put(sample, timeout=0.1)
                            break
                        except queue.Full:
                            pass
        except Exception as error:
            self.failure = error

    def stop(self):
        self._stop.set()
        self.thread.join(timeout=10)

    def update_model_version(self, version):
        self.version = version

    def check_health(self, stale_after_s):
        if self.failure is not None:
            raise self.failure


def test_a_worker_of_the_users_asks_for_prompts_and_hands_groups_back(tmp_path):
    worker = Worker()
    trainer, _ = make(tmp_path, PLAIN, max_steps=6, save_steps=6, rollout_worker=worker)
    worker.handle = trainer.learnalign
    run, batches = trained(trainer)
    assert worker.failure is None and len(batches) == 6
    assert run.schedule.curriculum.steps == 6
    assert run.ledger.done + len(run.ledger.pending) == run.schedule.curriculum.drawn
    again = Worker()
    resumed, _ = make(tmp_path, PLAIN, max_steps=7, save_strategy="no", rollout_worker=again)
    again.handle = resumed.learnalign
    trained(resumed, str(tmp_path / "run" / "checkpoint-6"))
    assert resumed.learnalign.schedule.curriculum.drawn > run.schedule.curriculum.drawn - 40


# Refused -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_chosen_is_refused(tmp_path):
    from trl.experimental.async_grpo import AsyncGRPOTrainer

    with pytest.raises(ValueError, match="`schedule='staged'` cannot choose while"):
        make(tmp_path, {"schedule": "staged", "score": "learnalign"})
    with pytest.raises(ValueError, match="`save_rollouts` is True, but the completions of .* stay with its rollout"):
        make(tmp_path, PLAIN | {"save_rollouts": True})
    trainer, _ = make(tmp_path, None)
    assert trainer.learnalign is None
    with pytest.raises(TypeError, match="must be a LearnAlignSampler, but is a dict"):
        type(trainer)(model=str(tmp_path / "policy"), train_sampler={})
    sampler = LearnAlignSampler(LearnAlignConfig(schedule="online"))
    with pytest.raises(TypeError, match="LearnAlignCallback do not serve. Put LearnAlignAsyncMixin before"):
        LearnAlignCallback(trainer, sampler)

    class Wrong(LearnAlignMixin, AsyncGRPOTrainer):
        pass

    with pytest.raises(TypeError, match="Wrong generates in another process while it trains"):
        Wrong(model=str(tmp_path / "policy"), train_sampler=sampler)

    moved = type("AsyncGRPOTrainer", (Trainer,), {"__module__": "trl.trainer.async_grpo_trainer"})
    with pytest.raises(RuntimeError, match="The AsyncGRPOTrainer of TRL .* has other parts than those of TRL 1.16"):
        type("Newer", (LearnAlignAsyncMixin, moved), {})(model=str(tmp_path / "policy"), train_sampler=sampler)

    class Synchronous(LearnAlignAsyncMixin, GRPOTrainer):
        pass

    with pytest.raises(TypeError, match="Synchronous is no asynchronous trainer"):
        Synchronous(model=str(tmp_path / "policy"), train_sampler=sampler)


@pytest.mark.slow
def test_a_resume_of_another_run_is_refused(tmp_path):
    trainer, _ = make(tmp_path, PLAIN, max_steps=2, save_steps=2)
    trained(trainer)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    other, _ = make(tmp_path, PLAIN | {"drop_dead_groups": False}, max_steps=3, save_strategy="no")
    with pytest.raises(ValueError, match="`drop_dead_groups` was True and is False"):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / FILE).write_bytes(b"nothing")
    other, _ = make(tmp_path, PLAIN, max_steps=3, save_strategy="no")
    with pytest.raises(ValueError, match="does not agree with its checksum"):
        other.train(resume_from_checkpoint=str(checkpoint))


# Kills -------------------------------------------------------------------------------------------------------------


def test_a_run_whose_worker_is_killed_ends_and_goes_on(tmp_path):
    trainer, server = make(tmp_path, PLAIN, max_steps=40, save_steps=2, delays=(0.02, 0.05))
    killed = []

    def kill(asked):
        process = trainer.rollout_worker._process
        if not killed and process is not None and (tmp_path / "run" / "checkpoint-2" / "trainer_state.json").is_file():
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    server.hook = kill
    with pytest.raises(RuntimeError, match="rollout worker has ended .exit code -9."):
        trained(trainer)
    assert killed
    last = max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run").glob("checkpoint-*"))
    resumed, _ = make(tmp_path, PLAIN, max_steps=last + 2, save_strategy="no")
    run, batches = trained(resumed, str(tmp_path / "run" / f"checkpoint-{last}"))
    assert len(batches) == 2
    assert run.ledger.done + len(run.ledger.pending) == run.schedule.curriculum.drawn


@pytest.mark.slow
def test_a_killed_learner_goes_on(tmp_path):
    """With its worker, which ends with it."""
    changes = {"max_steps": 100, "save_steps": 2, "config": PLAIN, "delays": [0.05, 0.1]}
    arguments = [sys.executable, async_run.__file__, str(tmp_path)]
    process = subprocess.Popen([*arguments, json.dumps(changes)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").is_file():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    checkpoint = tmp_path / "run" / "checkpoint-4"
    changes |= {"max_steps": 6, "resume": str(checkpoint)}
    done = subprocess.run([*arguments, json.dumps(changes)], capture_output=True, text=True, check=True, timeout=240)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["steps"] == 6 and found["done"] + found["pending"] == found["drawn"]


@pytest.mark.slow
def test_the_example(tmp_path, monkeypatch, capsys):
    """With TRL's own loops; it begins, and goes on."""
    from trl.experimental.async_grpo import async_grpo_trainer

    examples = str(Path(__file__).parent.parent / "examples")
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setenv("PYTHONPATH", examples)  # of the worker
    import grpo_async
    from grpo_gsm8k import INSTRUCTION

    async_run.stand_in()
    tokenizer = async_run.save_policy(tmp_path)
    monkeypatch.setattr(grpo_async.LearnAlignAsyncTrainer, "_init_lora_sync", lambda *args: False, raising=False)
    monkeypatch.setattr(async_grpo_trainer, "WeightTransferClient", lambda **kwargs: async_run.NoTransfer())
    read = async_grpo_trainer.AutoTokenizer
    monkeypatch.setattr(read, "from_pretrained", lambda *args, **kwargs: async_run.response_format(tokenizer))
    questions = [f"{row % 10}+{row // 10}" for row in range(SIZE)]
    lines = [json.dumps({"question": question, "answer": "so #### 1"}) for question in questions]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    prompts = [[{"role": "user", "content": question + INSTRUCTION}] for question in questions]
    server = async_run.Server(tokenizer, (0.0, 0.01), prompts)
    arguments = f"grpo_async.py --model {tmp_path}/policy --dataset_path {tmp_path} --output_dir {tmp_path}/run"
    arguments += f" --vllm_server_base_url {server.url} --use_cpu --bf16 false --dtype float32 --num_generations 4"
    arguments += " --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --token_budget -1 --save_steps 2"
    arguments += " --gradient_checkpointing false --max_completion_length 4 --report_to none --write_report false"
    for more in ("--max_steps 2", "--max_steps 3 --resume_from_checkpoint true"):
        monkeypatch.setattr(sys, "argv", f"{arguments} {more}".split())
        grpo_async.main()
    said = capsys.readouterr().out
    assert "steps 1 to 2 train on random prompts" in said and "step 3 trains on" in said, said
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file() and len(server.asked) > 3 * 8


# Several processes that train --------------------------------------------------------------------------------------


def launch(folder, **changes):
    """Two processes that train; what each has to say, or the end of what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    changes = {"per_device_train_batch_size": 4, "config": PLAIN} | changes
    arguments = [async_run.__file__, str(folder), json.dumps(changes)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        return done.stderr
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_train_and_go_on(tmp_path):
    """The main process alone draws; the other trains on its share of what comes, and knows what the rewards are."""
    config = PLAIN | {"success_reward": "reward"}
    make(tmp_path, None)  # writes the policy
    one, two = launch(tmp_path, max_steps=4, save_steps=4, config=config)
    assert one["world"] == two["world"] == 2 and one["steps"] == two["steps"] == 4
    assert one["names"] == two["names"] == ["reward"]
    assert one["drawn"] == one["done"] + one["pending"] > 0 and one["asked"]
    assert two["drawn"] == 0 and not two["asked"]
    saved = unpack((tmp_path / "run" / "checkpoint-4" / FILE).read_bytes())
    rows, done = saved["ledger"]["rows"].tolist(), saved["ledger"]["done"]
    one, two = launch(tmp_path, max_steps=6, save_strategy="no", resume=True, config=config)
    assert one["steps"] == two["steps"] == 6 and set(one["asked"][:12]) <= set(rows[:8])
    assert one["drawn"] == one["done"] + one["pending"] and one["done"] > done


@pytest.mark.slow
def test_what_the_main_process_finds_wrong_ends_both(tmp_path):
    make(tmp_path, None)
    printed = launch(tmp_path, max_steps=2, config={"success_reward": "missing"})
    assert printed.count("'missing' is not among the trainer's reward functions: reward") == 2, printed
    (tmp_path / "run" / "learnalign").mkdir(parents=True)
    lock = DirectoryLock(tmp_path / "run" / "learnalign")
    printed = launch(tmp_path, max_steps=2)
    lock.release()
    assert "process 0: RuntimeError: Another run is using" in printed, printed


def test_training_that_waits_for_a_group_with_a_gradient_says_so(caplog):
    from trl_learnalign.host.async_grpo import OnlineRolloutLoop

    loop = object.__new__(OnlineRolloutLoop)
    loop._dead, loop._warn_at, loop._recipe = 0, 64, SimpleNamespace(drop_dead=True)
    for _ in range(63):
        loop._note_dead(True)
    loop._note_dead(False)
    assert not caplog.text
    for _ in range(600):
        loop._note_dead(True)
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2 and "The last 64 groups have no gradient" in texts[0] and "The last 512" in texts[1]
    assert all("These are dropped, so training waits" in text for text in texts)
