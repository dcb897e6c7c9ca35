"""
Selections and runs with the stand-in for vLLM in tests/fake_vllm, which generates with transformers. Not vLLM itself.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from packaging.version import Version
from tiny import digit_reward, make_dataset, make_model, make_tokenizer
from torch.testing import assert_close

from trl_learnalign import Selection
from trl_learnalign.ground.disk import rollouts_of
from trl_learnalign.host.groups import deal


HERE = Path(__file__).parent
SLEEP_WORKS = Version(version("trl")) >= Version("1.10")


def launch(task, path, processes=1):
    path.mkdir(exist_ok=True)
    make_model().save_pretrained(path / "model")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = os.pathsep.join([str(HERE / "fake_vllm"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, str(HERE / "vllm_run.py"), task, str(path)],
        env=os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((path / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    assert all(rank["run"]["world"] == processes for rank in ranks if "run" in rank)
    return ranks


def load(path):
    (step,) = (path / "learnalign").glob("step-*")
    files = sorted(rollouts_of(step).glob("rollouts*.parquet"))  # one for each process
    table = pd.concat([pq.read_table(file).to_pandas() for file in files]).sort_values("index", kind="stable")
    return Selection.load(step), table.reset_index(drop=True)


def phases(run):
    """Events before, in and after the only selection."""
    names = [event["event"] for event in run["events"]]
    begin, end = names.index("selection begins"), names.index("selection ends")
    return run["events"][:begin], run["events"][begin + 1 : end], run["events"][end + 1 :]


def counts(events):
    return Counter(event["event"] for event in events)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    path = tmp_path_factory.mktemp("colocate")
    return path, launch("colocate", path)[0]


def test_a_run_with_vllm_is_the_run_with_transformers(runs):
    """Equal weights and seeds: the same rollouts, of the same prompts, with the same rewards, and so on to the end."""
    path, results = runs
    (ours, rollouts), (theirs, expected) = load(path / "colocate"), load(path / "transformers")
    for column in expected.columns:
        assert rollouts[column].map(str).tolist() == expected[column].map(str).tolist(), column
    for column in ours.scores.column_names:
        a, b = (selection.scores[column].to_pandas().astype(float).tolist() for selection in (ours, theirs))
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5, nan_ok=True), column
    one, other = results["colocate"], results["transformers"]
    assert one["log"] == other["log"] and one["reward_seeds"] == other["reward_seeds"]
    assert_close(one["weights"], other["weights"], rtol=1e-3, atol=1e-4)


def test_an_online_run_generates_and_pushes_as_training_alone_would(runs):
    """Five steps: a push and a generation for each. The reward function is tried once, with the first row."""
    run = runs[1]["online"]
    assert counts(run["events"])["generate"] == counts(run["events"])["push"] == 5
    trained = Counter({row: 4 * visits for row, visits in enumerate(run["visits"]) if visits})
    assert Counter(run["rows"]) == trained + Counter({0: 4})
    assert sum(run["visits"]) == 5 * 4


def test_weights_are_pushed_once_in_a_selection(runs):
    """TRL pushes them where the step is not that of the last push; a selection's step stays the same."""
    _, results = runs
    before, during, after = phases(results["colocate"])
    assert counts(before) == {"made": 1, "push": 2, "generate": 2}
    assert [event["event"] for event in during] == ["push"] + ["generate"] * 12  # 23 prompts, two at a time
    assert [event["event"] for event in after] == ["generate"] + ["push", "generate"] * 2
    seeds = [event["seed"] for event in during if event["event"] == "generate"]
    assert len(set(seeds)) == 12
    reward_seeds = results["colocate"]["reward_seeds"][
        2:14
    ]  # the reward's random numbers are not those of the sampling
    assert len(set(reward_seeds)) == 12 and not set(reward_seeds) & set(seeds)
    # The importance-sampling correction of training goes on as it was
    assert results["colocate"]["correction"] and results["colocate"]["ratios"] == pytest.approx([1] * 5, abs=1e-4)


def test_going_back_to_the_first_weights_pushes_them(runs):
    """Else vLLM would go on with those of the warm-up, at whose step it was loaded."""
    _, results = runs
    before, during, after = phases(results["restart"])
    assert counts(during) == {"push": 1, "generate": 12}
    assert [event["event"] for event in after] == ["push", "generate"] * 3
    assert results["restart"]["ratios"] == pytest.approx([1] * 5, abs=1e-4)  # vLLM's weights are the policy's


def test_sleep_mode(runs):
    """It loses the weights whenever it sleeps, so TRL pushes them for every generate."""
    path, results = runs
    if not SLEEP_WORKS:
        assert "generates with the weights that vLLM reads from the disk" in results["sleep"]
        return
    (ours, rollouts), (theirs, expected) = load(path / "sleep"), load(path / "colocate")
    assert rollouts.map(str).equals(expected.map(str)) and ours.indices == theirs.indices
    before, during, after = phases(results["sleep"])
    turn = ["wake weights", "push", "wake kv_cache", "generate", "sleep"]
    assert [event["event"] for event in before] == ["made", "sleep"] + turn * 2
    assert [event["event"] for event in during] == turn * 12
    assert [event["event"] for event in after] == turn * 3
    assert results["sleep"]["weights"] == results["colocate"]["weights"]


def check_parallel(path, ranks, sharing=2):
    """Each group of processes generates as one, and every rollout belongs to its prompt."""
    _, rollouts = load(path / "run")
    tokenizer, prompts = make_tokenizer(), make_dataset(23)["prompt"]
    made, seeds = set(), []
    for first in range(0, len(ranks), sharing):
        group = [rank["run"]["events"] for rank in ranks[first : first + sharing]]
        assert all(events == group[0] for events in group)  # seeds, prompts and completions, in the training, too
        _, during, _ = phases(ranks[first]["run"])
        generates = [event for event in during if event["event"] == "generate"]
        assert len(generates) == -(-23 // len(ranks)) and counts(during)["push"] == 1
        seeds += [event["seed"] for event in generates]
        for event in generates:
            assert len(event["pairs"]) == 8 * sharing
            made |= {(tuple(prompt), tuple(completion)) for prompt, completion in event["pairs"]}
    assert len(rollouts) == 23 * 8 and set(rollouts["index"]) == set(range(23))
    assert len(set(seeds)) == len(seeds)
    for row in rollouts.itertuples():
        prompt = tuple(tokenizer(prompts[row.index])["input_ids"])
        assert (prompt, tuple(row.completion_ids.tolist())) in made
        assert row.rewards.tolist() == digit_reward([row.completion], [row.index])
    assert len({json.dumps(rank["run"]["log"]) for rank in ranks}) == 1
    for rank in ranks:
        assert rank["run"]["ratios"] == pytest.approx([1] * 5, abs=1e-4)
    # Rewards may draw random numbers: those of processes that share a vLLM are not the same
    assert not set(ranks[0]["run"]["reward_seeds"][: 23 // len(ranks)]) & set(
        ranks[1]["run"]["reward_seeds"][: 23 // len(ranks)]
    )


def test_processes_that_share_a_vllm_generate_as_one(tmp_path):
    ranks = launch("tensor parallel", tmp_path, 2)
    check_parallel(tmp_path, ranks)
    # Images on one process end all
    assert "PeerError" in ranks[0]["images"] and "The rollouts have images" in ranks[0]["images"]
    assert ranks[1]["images"].startswith("ValueError: The rollouts have images")


@pytest.mark.slow
def test_two_vllms_select_what_one_does(tmp_path):
    for processes in (2, 4):
        check_parallel(tmp_path / str(processes), launch("tensor parallel", tmp_path / str(processes), processes))
    (one, rollouts), (other, others) = load(tmp_path / "2" / "run"), load(tmp_path / "4" / "run")
    assert rollouts.map(str).equals(others.map(str)) and one.indices == other.indices


def test_batches_have_the_same_neighbours_and_seeds_on_any_number_of_processes():
    batches = [[i] for i in range(7)]
    for sharing in (1, 2, 4):
        for world in (4, 8):
            dealt = [
                [deal(batches, first, rank, sharing) for rank in range(world)]
                for first in range(0, len(batches), world)
            ]
            owned = [batch[0] for line in dealt for batch, _, own in line if own]
            assert owned == list(range(7))
            for line in dealt:
                for batch, seed_of, own in line:
                    assert not own or seed_of[0] == batch[0] - batch[0] % sharing
                for first in range(0, world, sharing):
                    assert len({seed_of[0] for _, seed_of, _ in line[first : first + sharing]}) == 1
    assert [(b[0], s[0], own) for b, s, own in (deal(batches, 4, rank, 2) for rank in range(4))] == [
        (4, 4, True), (5, 4, True), (6, 6, True), (6, 6, False),
    ]  # fmt: skip
