"""`trl-learnalign` as it is called: through its installed command, on one process and on two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tiny import make_dataset, make_model, make_tokenizer

from trl_learnalign import Selection, cli


ROOT = Path(__file__).parent.parent
REWARD = """
def small_digits(completions, row, **kwargs):
    counts = [sum(character in "01234" for character in completion) for completion in completions]
    return [float(count % 2 == 0 and count * 3 >= r % 10) for count, r in zip(counts, row)]
"""


@pytest.fixture
def folder(tmp_path):
    """What a user has: rows, a reward function in a file, a YAML file."""
    make_model().save_pretrained(tmp_path / "policy")
    make_tokenizer().save_pretrained(tmp_path / "policy")
    make_dataset().to_json(str(tmp_path / "mine.jsonl"))
    (tmp_path / "rewards.py").write_text(REWARD)
    settings = {
        "model_name_or_path": "policy",
        "dtype": "float32",
        "dataset_name": "mine.jsonl",
        "reward_funcs": ["rewards.py:small_digits"],
        "output_dir": "out",
        "num_prompts": 5,
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "bf16": False,
        "use_cpu": True,
        "per_device_train_batch_size": 16,
        "max_completion_length": 6,
        "report_to": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


CLI = ("-m", "trl_learnalign.cli")


def call(folder, *arguments, launcher=CLI, fails=False):
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def test_select_and_report(folder):
    output = call(folder, "select", "--config", "run.yaml", "--format", "jsonl", "--max_completion_length", "7")
    selection = Selection.load(folder / "out/learnalign/step-000000")
    assert selection.summary() in output and len(selection.indices) == 5
    lines = [json.loads(line) for line in (folder / "out/learnalign/selected.jsonl").read_text().splitlines()]
    rows, table = make_dataset().to_list(), selection.to_pandas()
    for line, index in zip(lines, selection.indices, strict=True):
        assert {name: line[name] for name in rows[index]} == rows[index]
        assert line["success_rate"] == table.loc[index, "success_rate"]
        assert line["learnalign_score"] == pytest.approx(table.loc[index, "score"], rel=1e-6)
        assert set(line) == {*rows[index], "success_rate", "learnalign_score"}
    # The same settings again: read, not made again; and as parquet
    again = call(folder, "select", "--config", "run.yaml", "--format", "parquet", "--max_completion_length", "7")
    assert selection.summary() in again
    assert pq.read_table(folder / "out/learnalign/selected.parquet").num_rows == 5
    (folder / "out/learnalign/report.html").unlink()
    assert call(folder, "report", "out").strip() == "out/learnalign/report.html"
    assert (folder / "out/learnalign/report.html").is_file()


TWO_PROCESSES = (
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "examples/accelerate_configs/two_cpu_processes.yaml"),
    "-m",
    "trl_learnalign.cli",
)


def test_two_processes_select_the_same(folder):
    output = call(
        folder, *("select", "--config", "run.yaml", "--output_dir", "two", "--format", "jsonl"), launcher=TWO_PROCESSES
    )
    call(folder, "select", "--config", "run.yaml", "--output_dir", "one", "--per_device_train_batch_size", "32")
    two, one = (Selection.load(folder / name / "learnalign/step-000000") for name in ("two", "one"))
    assert two.provenance["num_processes"] == 2 and one.provenance["num_processes"] == 1
    assert output.count("5 rows:") == 1 and len(two.indices) == len(one.indices) == 5


@pytest.mark.parametrize(("processes", "tried"), [(1, "20 prompts on 1 process"), (2, "20 prompts on 2 processes")])
def test_dry_run(folder, processes, tried):
    output = call(
        folder, *("select", "--config", "run.yaml", "--dry_run", "--num_rollouts", "8"),
        *("--per_device_train_batch_size", "40"), launcher=TWO_PROCESSES if processes == 2 else CLI,
    )  # fmt: skip
    assert output.count("pool: 24 prompts x 8 rollouts = 192") == 1
    learnable = int(re.search(f"tried: {tried}, of which (\\d+) are learnable", output)[1])
    more = 24 / int(tried.split()[0])
    assert f"gradient passes: about {learnable * more:.0f} prompts" in output and learnable > 0
    assert f"about {learnable * more * 32768 * 4 / 1e9:.2f} GB" in output
    assert "expected time: rollouts" in output and "Nothing was kept." in output
    assert not (folder / "out/learnalign").exists()


def test_dry_run_of_a_choice_at_random(folder):
    assert "no rollouts" in call(folder, "select", "--config", "run.yaml", "--dry_run", "--score", "random")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward_funcs", "nowhere.py:f"], "there is no such file"),
        (["--reward_funcs", "rewards.py:g"], "no function 'g'"),
        (["--reward_funcs", "no_such_package.f"], "could not be imported"),
        (["--reward_funcs", "no_such_reward"], "no function 'no_such_reward' in trl.rewards"),
        (["--dataset_name", "nowhere.jsonl"], "there is no such file"),
        (["--no_such_flag", "1"], "unrecognized arguments: --no_such_flag 1"),
        (["--num_prompts", "0"], "must be at least 1"),
        (["--format", "xml"], "invalid choice: 'xml'"),
    ],
)
def test_bad_input(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["select", "--config", "run.yaml", *arguments])
    assert message in capsys.readouterr().err + str(stopped.value.code)
    assert stopped.value.code != 0


def test_what_is_missing_and_what_is_taken(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for name in ("dataset_name", "reward_funcs", "model_name_or_path"):
        (folder / "less.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != name}))
        with pytest.raises(SystemExit, match=f"Set `{name}`"):
            cli.main(["select", "--config", "less.yaml"])
    make_dataset().add_column("success_rate", [0.5] * 24).to_json("taken.jsonl")
    with pytest.raises(SystemExit, match="has columns that the selection adds: .'success_rate'"):
        cli.main(["select", "--config", "run.yaml", "--dataset_name", "taken.jsonl"])
    for arguments in ([], ["train"]):
        with pytest.raises(SystemExit, match="usage"):
            cli.main(arguments)
    with pytest.raises(SystemExit, match="holds no finished selection"):
        cli.main(["report", "policy"])


def test_pushed_with_a_card(folder, monkeypatch):
    """Everything but the Hub itself, which takes the place of a folder here."""
    import huggingface_hub
    from datasets import Dataset

    monkeypatch.chdir(folder)
    pushed = {}
    monkeypatch.setattr(Dataset, "push_to_hub", lambda rows, repo: pushed.update(rows=rows, repo=repo))
    card = huggingface_hub.DatasetCard("---\ndataset_info:\n  features: []\n---\nempty")
    monkeypatch.setattr(huggingface_hub.DatasetCard, "load", lambda repo: card)
    monkeypatch.setattr(huggingface_hub.DatasetCard, "push_to_hub", lambda card, repo: pushed.update(card=str(card)))
    cli.main(["select", "--config", "run.yaml", "--push_to_hub", "someone/best"])
    assert pushed["repo"] == "someone/best" and pushed["rows"].num_rows == 5
    text = pushed["card"]
    assert "dataset_info" in text and "- learnalign" in text and "5 prompts of mine.jsonl" in text
    assert "arXiv:2506.11480" in text and "| `num_prompts` | 5 |" in text
