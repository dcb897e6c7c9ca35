"""Measures that are made once: for another score, after a kill, in larger batches, in halves, and not in memory."""

import gc
import tracemalloc

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import Seen, config, digit_reward, grpo_args, lora, make_dataset, make_model, make_tokenizer, make_trainer
from trl import RLOOConfig, RLOOTrainer

from trl_learnalign import select_prompts
from trl_learnalign.gradients.engine import PromptGradients
from trl_learnalign.host import find_host, generation
from trl_learnalign.host.groups import RolloutGroup, Row
from trl_learnalign.measures import gradients, packing, rollouts
from trl_learnalign.selection.run import SelectionRun


@pytest.fixture
def counted(monkeypatch):
    """How many prompts were generated for, and how many microbatches of gradients were computed."""
    counts = {"prompts": 0, "microbatches": 0}

    def generate(host, dataset, indices, *args, original=generation.generate_groups):
        counts["prompts"] += len(indices)
        return original(host, dataset, indices, *args)

    def collect(self, *args, original=PromptGradients.collect):
        counts["microbatches"] += 1
        return original(self, *args)

    monkeypatch.setattr(generation, "generate_groups", generate)
    monkeypatch.setattr(PromptGradients, "collect", collect)

    def spent():
        taken = dict(counts)
        counts.update(prompts=0, microbatches=0)
        return taken["prompts"], taken["microbatches"]

    return spent


def select(path, **settings):
    return select_prompts(make_trainer(path), config(**settings))


# Another score on the same measures


def test_another_score_measures_only_what_is_missing(tmp_path, counted):
    first = select(tmp_path, score="learnability")
    assert counted() == (24, 0)
    second = select(tmp_path, score="learnalign")
    prompts, microbatches = counted()
    assert prompts == 0 and microbatches > 0
    third = select(tmp_path, score="alignment", save_rollouts=True)
    assert counted() == (0, 0)
    fourth = select(tmp_path, score=lambda table: table["gradient_norm"], score_measures=["gradients"])
    fifth = select(tmp_path, score="learnalign", num_prompts=3)
    assert counted() == (0, 0)
    target = make_dataset(6)
    sixth = select(tmp_path, score="target", target_dataset=target)
    prompts, microbatches = counted()
    assert prompts == 6 and microbatches > 0
    seventh = select(tmp_path, score="target_alignment", target_dataset=target)
    assert counted() == (0, 0)
    assert fifth.indices == second.indices[:3] and len(fourth.indices) == 8
    for selection, settings in (
        (first, {"score": "learnability"}),
        (second, {"score": "learnalign"}),
        (third, {"score": "alignment"}),
        (sixth, {"score": "target", "target_dataset": target}),
        (seventh, {"score": "target_alignment", "target_dataset": target}),
    ):
        name = settings["score"]
        assert selection.scores.equals(select(tmp_path / name, **settings).scores), name


def test_text_of_rollouts_that_were_made_before(tmp_path, counted):
    select(tmp_path)
    select(tmp_path, save_rollouts=True)
    select(tmp_path / "fresh", save_rollouts=True)
    assert counted()[0] == 2 * 24
    again, fresh = (
        pq.read_table(path / "_learnalign/rollouts/step-000000/rollouts.parquet")
        for path in (tmp_path, tmp_path / "fresh")
    )
    assert again.equals(fresh) and again.num_rows == 24 * 8


@pytest.mark.parametrize(
    ("settings", "changes", "again"),
    [
        ({"num_rollouts": 6}, {}, (True, True)),
        ({"candidate_prompts": 20}, {}, (True, True)),
        ({"rollout_batch_prompts": 3}, {}, (True, True)),
        ({"selection_seed": 5}, {}, (True, True)),
        ({}, {"temperature": 0.5}, (True, True)),
        ({"projection_dim": 512}, {}, (False, True)),
        ({"gradient_rollouts": "one_correct"}, {}, (False, True)),
        ({"success_threshold": 0.5}, {}, (False, True)),
        ({"take": "proportional", "where": "completion_length_mean > 1"}, {}, (False, False)),
    ],
)
def test_what_a_measure_is_known_by(tmp_path, counted, settings, changes, again):
    select(tmp_path)
    counted()
    select_prompts(make_trainer(tmp_path, **changes), config(**settings))
    assert tuple(count > 0 for count in counted()) == again


def test_measures_of_another_step_make_room(tmp_path, counted):
    """And those of a selection in training, after which the weights change, are not kept."""
    trainer = make_trainer(tmp_path)
    select_prompts(trainer, config())
    trainer.state.global_step = 5
    select_prompts(trainer, config())
    kept = {path.name for path in (tmp_path / "_learnalign").iterdir()}
    assert kept == {"lock", "step-000005"} and counted()[0] == 48
    assert {path.name for path in (tmp_path / "_learnalign/step-000005").iterdir()} == {"rollouts", "gradients"}
    make_trainer(tmp_path, config(warmup_prompts=4), max_steps=4).train()
    assert {path.name for path in (tmp_path / "_learnalign").iterdir()} == {"lock"}


def test_gradients_of_rloo_need_rollouts_with_the_kl_term(tmp_path, counted):
    """Which RLOOTrainer takes off the rewards, and which is computed only where gradients will be taken."""

    def rloo(path, beta):
        names = (
            "use_cpu",
            "per_device_train_batch_size",
            "num_generations",
            "max_completion_length",
            "report_to",
            "seed",
            "bf16",
        )
        args = {name: getattr(grpo_args(path), name) for name in names}
        args = RLOOConfig(**args, output_dir=str(path), beta=beta, disable_tqdm=True, gradient_checkpointing=False)
        return RLOOTrainer(
            model=make_model(),
            reward_funcs=digit_reward,
            args=args,
            train_dataset=make_dataset(8),
            processing_class=make_tokenizer(),
            peft_config=lora(),
        )

    for beta, again in ((0.5, 8), (0.0, 0)):
        path = tmp_path / str(beta)
        select_prompts(rloo(path, beta), config(score="learnability", num_prompts=4))
        assert counted()[0] == 8
        selection = select_prompts(rloo(path, beta), config(num_prompts=4))
        assert counted()[0] == again
        fresh = select_prompts(rloo(tmp_path / f"fresh {beta}", beta), config(num_prompts=4))
        assert selection.scores.equals(fresh.scores)
        counted()


def test_rollouts_that_are_lost_are_an_error_not_a_score(tmp_path, monkeypatch, counted):
    """Between the rewards and the gradients; what is left is used again."""

    def damage(context, own, original=rollouts.gather_rewards):
        file = next(own.log.path.glob("*.log"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        return original(context, own)

    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "gather_rewards", damage)
        with pytest.raises(RuntimeError, match=r"The rollouts of prompt \d+ could not be read back from .*rollouts'"):
            select(tmp_path, save_rollouts=True)
    counted()
    again = select(tmp_path)
    assert counted()[0] == 2  # one batch
    assert again.scores.equals(select(tmp_path / "fresh").scores)


# Rounds


def test_rounds(tmp_path, monkeypatch):
    """64 times as many prompts at once: a 64th of the rounds, at each of which all processes wait for the slowest."""
    sizes = []

    def generate(host, dataset, indices, *args):
        sizes.append(len(indices))
        return synthetic(host, indices)

    monkeypatch.setattr(generation, "generate_groups", generate)
    dataset = make_dataset(1).select([0] * 512)
    trainer = make_trainer(tmp_path, dataset=dataset, per_device_train_batch_size=8)
    for settings, batch in (({}, 8), ({"rollout_batch_prompts": 1}, 1), ({"rollout_batch_prompts": 64}, 64)):
        sizes.clear()
        meetings = []
        run = SelectionRun(find_host(trainer), config(score="learnability", **settings), 0)
        monkeypatch.setattr(run.peers, "gather", lambda value, meetings=meetings: [meetings.append(0), value][1:])
        run._run()
        assert sizes == [batch] * (512 // batch)
        assert len(meetings) == 512 // batch + 2  # one a round; the rewards; the texts


@pytest.mark.parametrize(
    ("training", "pool", "expected"),
    [(1, 24, 1), (1, 127, 1), (1, 128, 2), (2, 7473, 64), (8, 7473, 64), (1, 10**6, 64), (3, 10**6, 192)],
)
def test_prompts_at_once_by_default(tmp_path, training, pool, expected):
    host = find_host(make_trainer(tmp_path, per_device_train_batch_size=8 * training))
    assert rollouts.prompts_at_once(host, config(), 8, pool) == expected
    host.trainer.is_fsdp_enabled = True  # where generation cannot go on in halves
    assert rollouts.prompts_at_once(host, config(), 8, pool) == training


# Memory of the device


def test_generation_in_halves_where_memory_is_full(tmp_path, monkeypatch, caplog):
    """Every prompt has its rollouts; what did not fit is not tried again, not even by a resumed selection."""
    attempts = []
    model_class = type(make_model())

    def generate(self, *args, original=model_class.generate, most=9, **inputs):
        attempts.append(len(inputs["input_ids"]))
        if attempts[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, *args, **inputs)

    monkeypatch.setattr(model_class, "generate", generate)
    settings = {"rollout_batch_prompts": 4, "save_rollouts": True}
    whole = select(tmp_path / "whole", **settings)
    assert attempts == [32, 16, 8, 8, 8, 8, *([8] * 20)] and "32 rollouts at once do not fit" in caplog.text
    table = pq.read_table(tmp_path / "whole/_learnalign/rollouts/step-000000/rollouts.parquet").to_pandas()
    assert table.groupby("index").size().tolist() == [8] * 24
    completions = {tuple(part["completion"]) for _, part in table.groupby("index")}
    assert len(completions) == 24  # of different random numbers

    attempts.clear()
    left = [3]

    def killed(*args, original=generation.generate_groups):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(generation, "generate_groups", killed)
        with pytest.raises(KeyboardInterrupt):
            select(tmp_path / "killed", **settings)
    attempts.clear()
    assert select(tmp_path / "killed", **settings).scores.equals(whole.scores)
    assert attempts == [8] * 12


def test_a_rollout_that_does_not_fit_alone(tmp_path, monkeypatch):
    def generate(self, *args, **inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(type(make_model()), "generate", generate)
    with pytest.raises(
        MemoryError, match="1 rollouts at once do not fit into the memory .*Lower `rollout_batch_prompts`"
    ):
        select(tmp_path)


# Memory of the host


def synthetic(host, indices, tokens=6):
    """Groups as a generation makes them, of random tokens; half of the rewards are 1."""
    size = host.group_size
    generator = np.random.default_rng(indices[0])
    return [
        RolloutGroup(
            row=index,
            prompt_ids=[np.full(4, 5, np.int32)] * size,
            completion_ids=[generator.integers(3, 20, tokens, np.int32) for _ in range(size)],
            loss_masks=[np.ones(tokens, np.int8) for _ in range(size)],
            completions=["x" * 4 * tokens] * size,
            rewards=(np.arange(size) % 2).astype(np.float32)[:, None],
            penalties=np.zeros(size, np.float32),
        )
        for index in indices
    ]


def test_rollouts_are_not_in_memory(tmp_path, monkeypatch):
    """Of 512 prompts with 8 completions of 1,000 tokens, less than a fiftieth, and no group but those of a batch."""
    prompts, tokens = 512, 1000
    monkeypatch.setattr(
        generation, "generate_groups", lambda host, dataset, indices, *args: synthetic(host, indices, tokens)
    )
    trainer = make_trainer(tmp_path, dataset=make_dataset(1).select([0] * prompts))
    run = SelectionRun(find_host(trainer), config(rollout_batch_prompts=8), 0)
    run.make_keys()
    with run.host.left_as_found(8):
        log = run.open_log("rollouts")
        gc.collect()
        tracemalloc.start()
        try:
            own = rollouts.roll_out(run.context, run.context.dataset, run.pool, log, 8)
            gc.collect()
            taken, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        whole = prompts * 8 * tokens * 4
        assert taken < whole / 50 and peak < whole / 5
        assert not [one for one in gc.get_objects() if isinstance(one, RolloutGroup)]
        # Read back, each as it was
        for group, expected in zip(own, synthetic(run.host, run.pool[:8], tokens), strict=False):
            np.testing.assert_equal(group.completion_ids, expected.completion_ids)


def test_rows_of_one_window_are_in_memory(tmp_path, monkeypatch):
    most = []

    def collect(self, counts, rows, original=gradients.GradientFeatures._collect):
        gc.collect()
        alive = gc.get_objects()
        most.append([sum(isinstance(one, kind) for one in alive) for kind in (Row, RolloutGroup)])
        return original(self, counts, rows)

    monkeypatch.setattr(gradients.GradientFeatures, "_collect", collect)
    monkeypatch.setattr(gradients, "WINDOW", 3)
    selection = select(tmp_path, max_tokens_per_batch=60)
    assert selection.num_learnable() > 9 and len(most) > 9
    assert max(rows for rows, _ in most) <= 3 * 8 and max(groups for _, groups in most) <= 1
    windows = packing.pack({index: np.array([5] * 8) for index in range(100)}, 40, 64)
    assert [len(window.indices) for window in windows] == [64, 36]


def test_seen_rows_are_those_of_the_pool(tmp_path):
    """The reward functions see each prompt of a batch, and nothing of it twice."""
    seen = Seen(digit_reward)
    select_prompts(make_trainer(tmp_path, reward=seen), config(rollout_batch_prompts=5))
    assert sorted(seen.rows) == sorted([*range(24), 20] * 8)  # the last batch is filled up with its first prompt
