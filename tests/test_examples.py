"""The scripts of `examples/`, started as a user starts them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from tiny import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_learnalign import Selection


ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GSM8K = Path(os.environ.get("GSM8K_PATH", ROOT.parent / "shared/data/gsm8k"))
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]

sys.path.insert(0, str(EXAMPLES))
from equations import equations_reward, generate_chains, load_gsm8k_equations  # noqa: E402
from train_tiny_policy import evaluate  # noqa: E402


needs_gsm8k = pytest.mark.skipif(
    not (GSM8K / "train.jsonl").is_file(),
    reason=f"GSM8K is not at {GSM8K}; set GSM8K_PATH to a directory with its train.jsonl and test.jsonl",
)


def run(*command, cwd=ROOT, apart=False):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    # Threads of gloo now and then abort a process that has finished, at the shutdown of its interpreter; the tests
    # look for what the script does last
    aborted_at_exit = "terminate called without an active exception" in done.stderr
    assert done.returncode == 0 or aborted_at_exit, done.stderr[-5000:]
    return (done.stdout, done.stderr) if apart else done.stdout + done.stderr


@needs_gsm8k
@pytest.mark.parametrize(("split", "usable", "rows"), [("train", 7378, 7473), ("test", 1301, 1319)])
def test_equations_of_gsm8k(split, usable, rows):
    dataset, dropped = load_gsm8k_equations(GSM8K / f"{split}.jsonl")
    assert (len(dataset), dropped) == (usable, rows - usable)
    assert equations_reward(dataset["solution"], dataset["answer"]) == [1.0] * usable
    if split == "train":
        assert dataset[0] == {"prompt": "48/2;48+24=", "answer": "72", "solution": "24;72"}


def test_generated_chains():
    dataset = generate_chains(300, seed=4)
    assert dataset.to_list() == generate_chains(300, seed=4).to_list() != generate_chains(300, seed=5).to_list()
    assert equations_reward(dataset["solution"], dataset["answer"]) == [1.0] * 300
    for prompt, solution in zip(dataset["prompt"], dataset["solution"], strict=True):
        lefts, results = prompt.removesuffix("=").split(";"), solution.split(";")
        assert len(lefts) == len(results)
        for left, result in zip(lefts, results, strict=True):
            assert re.fullmatch(r"[-+*/().\d]+", left)
            assert eval(left) == pytest.approx(float(result), abs=0.005)


def test_equations_reward():
    assert equations_reward(["24;72", "72", "24;72.0", "24;27", "24;72;", "", "7 2"], ["72"] * 7) == [
        1,
        1,
        1,
        0,
        0,
        0,
        0,
    ]
    assert equations_reward([[{"role": "assistant", "content": "1;5"}]], ["5"]) == [1.0]


def test_tiny_policy_knows_more_than_it_samples():
    """On generated chains, which need no data; the numbers on GSM8K are in benchmarks/results/tiny_policy.json."""
    folder = EXAMPLES / "assets/tiny-policy"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    measured = evaluate(model.float(), tokenizer, generate_chains(150, seed=77), num_samples=8)
    assert 0.2 < measured["sampled"] < 0.6 and measured["greedy"] > measured["sampled"] + 0.2
    assert measured["learnable"] > 0.5


@pytest.mark.slow  # it uses nothing of the package
def test_training_script_of_the_tiny_policy(tmp_path):
    run(
        *(sys.executable, EXAMPLES / "train_tiny_policy.py", "--output_dir", tmp_path / "policy"),
        *("--clean_steps", "2", "--noisy_steps", "2", "--eval_every", "0", "--batch_size", "8", "--threads", "1"),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    text = "48/2;48+24="
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "policy").config.model_type == "qwen2"


@pytest.mark.parametrize(
    ("data", "processes"),
    [
        pytest.param("gsm8k", 1, marks=[needs_gsm8k, pytest.mark.slow]),
        pytest.param("gsm8k", 2, marks=[needs_gsm8k, pytest.mark.slow]),
        ("generated", 2),
    ],
)
def test_equations_end_to_end(tmp_path, processes, data):
    launch = ["--config_file", EXAMPLES / "accelerate_configs/two_cpu_processes.yaml"]
    output = run(
        *ACCELERATE,
        *(launch if processes == 2 else ["--cpu", "--num_processes", "1"]),
        *(EXAMPLES / "grpo_gsm8k.py", "--config", EXAMPLES / "equations_cpu.yaml", "--output_dir", tmp_path),
        *(["--dataset_path", GSM8K] if data == "gsm8k" else []),
        *("--candidate_prompts", "48", "--num_prompts", "16", "--warmup_prompts", "16", "--num_train_epochs", "2"),
        *("--per_device_train_batch_size", 128 // processes, "--save_rollouts", "--seed", "3"),
    )
    selection = Selection.load(tmp_path / "learnalign/step-000001")
    assert selection.provenance["num_processes"] == processes
    assert selection.scores.num_rows == 48 and len(selection.indices) == 16
    assert selection.provenance["num_rows"] == (7378 if data == "gsm8k" else 7473)
    assert 0.1 < selection.mean_success_rates()[0] < 0.7 and 16 < selection.num_learnable() < 48
    assert output.count("LearnAlign, step 1: pool 48; learnable") == 1
    assert f"selections: {tmp_path / 'learnalign'}" in output
    if data == "gsm8k":
        assert "train: 7378 rows with equations, 95 without left out" in output
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_equations_online_end_to_end(tmp_path):
    output = run(
        *(*ACCELERATE, "--cpu", "--num_processes", "1"),
        *(EXAMPLES / "grpo_gsm8k.py", "--config", EXAMPLES / "equations_online.yaml", "--output_dir", tmp_path),
        *("--max_steps", "4", "--per_device_train_batch_size", "64"),
    )
    assert "32 prompts in all, 8 at once, from a pool of 7,473: 0.00 visits per prompt." in output
    assert "success is predicted from a prompt's own rewards, and from length, hidden states." in output
    history = pq.read_table(tmp_path / "learnalign/online_history.parquet")
    for name, expected in {"groups": [16, 32], "step": [1, 3], "visited": [16, 32]}.items():
        assert history[name].to_pylist() == expected
    assert (tmp_path / "learnalign/report.html").is_file() and (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.slow  # as test_settings_of_the_paper, with an evaluation
def test_word_problems_end_to_end(tmp_path):
    """`--task gsm8k`: conversational prompts and the numeric reward, with a random policy that solves nothing."""
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"}
        for i in range(16)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run(
        *ACCELERATE,
        *("--cpu", "--num_processes", "1", EXAMPLES / "grpo_gsm8k.py", "--dataset_path", tmp_path),
        *(
            "--model_name_or_path",
            tmp_path / "policy",
            "--output_dir",
            tmp_path / "run",
            "--max_completion_length",
            "8",
        ),
        *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--num_train_epochs", "1"),
        *("--num_prompts", "4", "--warmup_prompts", "4", "--bf16", "false", "--eval_strategy", "epoch"),
        *("--report_to", "none", "--num_generations_eval", "2", "--per_device_eval_batch_size", "8"),
    )
    assert "LearnAlign, step 2: pool 16; learnable" in output and "eval_reward" in output


PAPER = {
    "gsm8k_qwen2.5_1.5b": {
        **{"dataset_name": "openai/gsm8k", "warmup_prompts": 300, "gradient_rollouts": "all"},
        "prompts_a_step": 48,
    },
    "dapo_math_17k_qwen2.5_7b": {
        **{
            "dataset_name": "open-r1/DAPO-Math-17k-Processed",
            "warmup_prompts": 1000,
            "gradient_rollouts": "one_correct",
        },
        "prompts_a_step": 64,
    },
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(tmp_path, name):
    """
    Everything but the weights and the Hub: the file's own settings, with a random policy and rows of the same shape.
    """
    make_model(max_position_embeddings=512).save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    rows = {
        "gsm8k_qwen2.5_1.5b": [{"question": f"What is {i} + 1?", "answer": f"So.\n#### {i + 1}"} for i in range(12)],
        "dapo_math_17k_qwen2.5_7b": [
            {
                "prompt": f"Find {i} + 1.",
                "solution": str(i + 1),
                "data_source": "math_dapo",
                "extra_info": {"index": "x"},
            }
            for i in range(12)
        ]
        + [{"prompt": "Find x.", "solution": "\\pi", "data_source": "math_dapo", "extra_info": {"index": "y"}}],
    }[name]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run(
        *(*ACCELERATE, "--cpu", "--num_processes", "1", EXAMPLES / "grpo_gsm8k.py"),
        *("--config", EXAMPLES / f"paper/{name}.yaml", "--dataset_path", tmp_path),
        *("--model_name_or_path", tmp_path / "policy", "--dtype", "float32", "--bf16", "false", "--report_to", "none"),
        *("--output_dir", tmp_path / "run", "--max_completion_length", "8", "--num_train_epochs", "1"),
        *("--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--num_prompts", "4"),
        *("--warmup_prompts", "4"),
    )
    assert "LearnAlign, step 2: pool 12; learnable" in output
    assert ("1 without a number as the answer left out" in output) == name.startswith("dapo")
    assert ("Success on the test rows: 0." in output) == name.startswith("gsm8k")
    written = torch.load(tmp_path / "run/training_args.bin", weights_only=False)
    for field, value in {
        "num_generations": 8,
        "temperature": 1.0,
        "beta": 0.04,
        "epsilon": 0.2,
        "learning_rate": 1e-6,
    }.items():
        assert getattr(written, field) == value
    selection = Selection.load(tmp_path / "run/learnalign/step-000002")
    assert selection.provenance["config"]["gradient_rollouts"] == PAPER[name]["gradient_rollouts"]
    settings = yaml.safe_load((EXAMPLES / f"paper/{name}.yaml").read_text())
    assert {key: settings.get(key, "all") for key in ("dataset_name", "warmup_prompts", "gradient_rollouts")} == {
        key: PAPER[name][key] for key in ("dataset_name", "warmup_prompts", "gradient_rollouts")
    }
    assert (settings["loss_type"], settings["use_bias_correction_kl"]) == ("grpo", False)  # Eq. 7 as printed
    rollouts = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert rollouts == PAPER[name]["prompts_a_step"] * settings["num_generations"]


def test_dataset_path_without_data(tmp_path, monkeypatch):
    import grpo_gsm8k

    monkeypatch.setattr(sys, "argv", ["grpo_gsm8k.py", "--dataset_path", str(tmp_path), "--bf16", "false"])
    with pytest.raises(FileNotFoundError, match="holds no train.jsonl"):
        grpo_gsm8k.main()


def test_demo(tmp_path):
    command = [sys.executable, EXAMPLES / "demo.py", "--output_dir", tmp_path, "--pool", "64", "--num_prompts", "32"]
    output, _ = run(*command, "--passes", "1", "--test", "20", apart=True)
    for line in ("before training", "after random prompts", "after LearnAlign's", "LearnAlign - random", "Total:"):
        assert line in output
    assert Selection.load(re.search(r"Selection.load\('(.*)'\)", output)[1]).indices
    report = output.splitlines()[-1].partition("in a browser: ")[2]
    assert Path(report).read_text().startswith("<!doctype html>")
    # On one screen of lines of 100 columns
    assert sum(max(1, -(-len(line.replace(str(tmp_path), "runs/demo")) // 100)) for line in output.splitlines()) <= 40


def test_demo_online(tmp_path):
    command = [sys.executable, EXAMPLES / "demo_online.py", "--output_dir", tmp_path, "--pool", "200", "--steps", "5"]
    output, _ = run(*command, "--test", "20", apart=True)
    for line in ("after rollouts", "random prompts", "LearnAlign online", "by chance", "Total:"):
        assert line in output
    assert re.search(r"With LearnAlign online the final success of random prompts is (not )?reached", output)
    figure, report = (re.search(rf"{words}: (.*)", output)[1] for words in ("The figure", "in a browser"))
    assert Path(figure).read_bytes().startswith(b"\x89PNG")
    assert Path(report).read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_demo_chat(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    command = [sys.executable, EXAMPLES / "demo_chat.py", "--output_dir", tmp_path, "--steps", "5"]
    output, _ = run(*command, apart=True)
    for line in ("of which 25% can only be guessed", "after rollouts", "LearnAlign online", "by chance", "Total:"):
        assert line in output
    assert (tmp_path / "success.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_process_of_the_demo_that_fails_ends_it(tmp_path):
    command = [sys.executable, EXAMPLES / "demo_online.py", "--output_dir", "/dev/null/runs", "--pool", "40"]
    ended = subprocess.run([*map(str, command), "--steps", "2", "--test", "4"], capture_output=True, text=True)
    assert ended.returncode and "NotADirectoryError" in ended.stderr


def test_a_step_of_every_example_has_at_least_eight_prompts():
    files = [file for folder in (EXAMPLES, EXAMPLES / "paper") for file in folder.glob("*.yaml")]
    settings = {file.stem: yaml.safe_load(file.read_text()) for file in files}
    for file in (EXAMPLES / "demo.py", EXAMPLES / "multi_reward.py", EXAMPLES / "quick_start.ipynb"):
        found = dict(re.findall(r"(per_device_train_batch_size|num_generations)=(\d+)", file.read_text()))
        settings[file.stem] = {name: int(value) for name, value in found.items()}
    assert len(settings) == 7
    for name, one in settings.items():
        rollouts = one["per_device_train_batch_size"] * one.get("gradient_accumulation_steps", 1)
        assert rollouts >= 8 * one["num_generations"], name


def test_accelerate_reads_the_configs():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {
        "ddp": "MULTI_GPU",
        "deepspeed_zero2": "DEEPSPEED",
        "deepspeed_zero3": "DEEPSPEED",
        "fsdp2": "FSDP",
        "two_cpu_processes": "MULTI_GPU",
        "two_nodes": "MULTI_GPU",
    }
    files = sorted((EXAMPLES / "accelerate_configs").glob("*.yaml"))
    assert [file.stem for file in files] == list(kinds)
    for file in files:
        config = load_config_from_file(str(file))
        assert config.distributed_type == kinds[file.stem]
        assert config.num_machines == (2 if file.stem == "two_nodes" else 1)


@pytest.mark.slow  # test_docs.py runs the recipe for several rewards
def test_several_rewards_end_to_end(tmp_path, monkeypatch, capsys):
    """The script itself, with a smaller pool."""
    import multi_reward

    monkeypatch.setattr(multi_reward, "generate_chains", lambda num, seed: generate_chains(num // 4, seed))
    monkeypatch.setattr(sys, "argv", ["multi_reward.py", "--output_dir", str(tmp_path)])
    multi_reward.main()
    assert "LearnAlign, step 2: pool 50; learnable" in capsys.readouterr().out
    selection = Selection.load(tmp_path / "learnalign/step-000002")
    assert selection.provenance["config"]["success_reward"] == "equations_reward"
    assert set(selection.to_pandas()["success_rate"] * 8 % 1) == {0}


def test_notebook_runs_from_top_to_bottom(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "quick_start.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # committed without outputs
    for cell in notebook.cells:
        cell.source = cell.source.replace("../runs/quick_start", str(tmp_path))
        cell.source = cell.source.replace("generate_chains(200", "generate_chains(64").replace("s=48", "s=24")
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": EXAMPLES}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    text = " ".join(output.get("data", {}).get("text/plain", "") for output in outputs)
    assert "Selection(24 of 64 prompts" in text and "learnalign_score" in text
