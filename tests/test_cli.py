"""`trl-learnalign` as it is called: through its installed command, on one process and on two."""

import datetime
import gzip
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import make_dataset, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, set_seed
from trl import GRPOConfig, ModelConfig, TrlParser, get_peft_config

from trl_learnalign import (
    LearnAlignConfig,
    LearnAlignGRPOTrainer,
    LearnAlignSampler,
    Selection,
    select_prompts,
)
from trl_learnalign.cli import build
from trl_learnalign.cli import main as cli
from trl_learnalign.cli.main import _parse
from trl_learnalign.data.rows import read_dataset


ROOT = Path(__file__).parent.parent
REWARD = """
def small_digits(completions, row, **kwargs):
    counts = [sum(character in "01234" for character in completion) for completion in completions]
    return [float(count % 2 == 0 and count * 3 >= r % 10) for count, r in zip(counts, row)]
"""


def make_folder(tmp_path):
    """The files of a user: rows, a reward function in a file, a YAML file."""
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


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


CLI = ("-m", "trl_learnalign.cli")


def call(folder, *arguments, launcher=CLI, fails=False):
    command = [sys.executable, *launcher, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, env=dict(os.environ))
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout


def test_select_and_report(folder, monkeypatch, run):
    """In a process of its own as a user starts it, then in this one."""
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
    monkeypatch.chdir(folder)
    code, again = run("--format", "parquet", "--max_completion_length", "7")
    assert code == 0 and selection.summary() in again
    assert pq.read_table(folder / "out/learnalign/selected.parquet").num_rows == 5
    (folder / "out/learnalign/report.html").unlink()
    cli.main(["report", "out"])
    assert (folder / "out/learnalign/report.html").is_file()


TWO_PROCESSES = (
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "examples/accelerate_configs/two_cpu_processes.yaml"),
    "-m",
    "trl_learnalign.cli",
)


def test_the_documented_module_is_the_command(monkeypatch):
    """The name after `-m` in the documentation, and the file that a user may find instead."""
    texts = [cli.__doc__, *(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))]
    named = {name for text in texts for name in re.findall(r"accelerate launch -m\s+(\S+)", text)}
    assert named == {"trl_learnalign.cli"}
    monkeypatch.setattr(sys, "argv", ["trl-learnalign", "selct"])
    for name in (*named, "trl_learnalign.cli.main"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(SystemExit, match="there is no command 'selct'"):
            runpy.run_module(name, run_name="__main__")


@pytest.mark.slow  # as test_distributed.py does in Python
def test_two_processes_select_the_same(folder):
    """After a warm-up on both; `test_dry_run` has two processes without."""
    warmup = ("--warmup_prompts", "8", "--save_adapter", "kept", "--save_strategy", "no")
    output = call(
        folder,
        *("select", "--config", "run.yaml", "--output_dir", "two", "--format", "jsonl", *warmup),
        launcher=TWO_PROCESSES,
    )
    assert (folder / "kept/adapter_model.safetensors").is_file()
    call(
        folder, "select", "--config", "run.yaml", "--output_dir", "one", "--per_device_train_batch_size", "32", *warmup
    )
    two, one = (Selection.load(folder / name / "learnalign/step-000002") for name in ("two", "one"))
    assert two.provenance["num_processes"] == 2 and one.provenance["num_processes"] == 1
    assert output.count("5 rows:") == 1 and len(two.indices) == len(one.indices) == 5


@pytest.mark.parametrize(("processes", "tried"), [(1, "20 prompts on 1 process"), (2, "20 prompts on 2 processes")])
def test_dry_run(folder, monkeypatch, run, processes, tried):
    arguments = ("--dry_run", "--num_rollouts", "8", "--per_device_train_batch_size", "40")
    monkeypatch.chdir(folder)
    if processes == 2:
        output = call(folder, "select", "--config", "run.yaml", *arguments, launcher=TWO_PROCESSES)
    else:
        _, output = run(*arguments)
    assert output.count("pool: 24 prompts x 8 rollouts = 192") == 1
    learnable = int(re.search(f"tried: {tried}, of which (\\d+) are learnable", output)[1])
    more = 24 / int(tried.split()[0])
    assert f"gradients: about {learnable * more:.0f} prompts" in output and learnable > 0
    stored = float(re.search("gradients ([0-9.]+) MB, rollouts 0.01 MB", output)[1])
    assert stored == pytest.approx(learnable * more * 32768 * 4 / 1e6, abs=0.02)
    assert "expected time: rollouts" in output and "Nothing was kept." in output
    assert not (folder / "out/learnalign").exists()


def test_dry_run_of_a_choice_at_random(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    assert "no rollouts" in run("--dry_run", "--score", "random")[1]


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
        (["--schedule", "online"], "`schedule` is 'online', but such a run chooses its prompts while it trains"),
        (["--schedule", "later"], "invalid choice: 'later'"),
    ],
)
def test_bad_input(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["select", "--config", "run.yaml", *arguments])
    assert message in capsys.readouterr().err + str(stopped.value.code)
    assert stopped.value.code != 0


def test_a_training_script_of_an_online_run_is_told_by_name(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "online.yaml").write_text(yaml.safe_dump(settings | {"schedule": "online"}))
    with pytest.raises(SystemExit):
        cli.main(["select", "--config", "online.yaml"])
    said = capsys.readouterr().err
    assert "`schedule` is 'online', but such a run chooses" in said and "warmup_prompts" not in said


def test_what_is_missing_and_what_is_taken(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for name in ("dataset_name", "reward_funcs", "model_name_or_path"):
        (folder / "less.yaml").write_text(yaml.safe_dump({k: v for k, v in settings.items() if k != name}))
        with pytest.raises(SystemExit, match=f"Set `{name}`"):
            cli.main(["select", "--config", "less.yaml"])
    for arguments in ([], ["train"]):
        with pytest.raises(SystemExit, match="usage"):
            cli.main(arguments)
    with pytest.raises(SystemExit, match="holds no finished selection"):
        cli.main(["report", "policy"])


@pytest.fixture
def run(capfd, caplog):
    """
    Calls `select` in this process: the exit code and all that was said. Any other exception is a traceback to the
    user.
    """

    def select(*arguments):
        code, message = 0, ""
        caplog.clear()
        try:
            cli.main(["select", "--config", "run.yaml", *arguments])
        except SystemExit as stopped:
            code, message = (1, stopped.code + "\n") if isinstance(stopped.code, str) else (stopped.code, "")
        said = capfd.readouterr()
        return code, message + said.out + said.err + caplog.text

    return select


BAD = {
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "broken.jsonl": '{"prompt": "1+1=", "row": 1}\n\n{"prompt": 1+1=}\n',
    "arrays.jsonl": '{"prompt": "1+1=", "row": 1}\n["1+1="]\n',
    "broken.json": '[{"prompt": "1+1="},\n {"prompt" "2+2="}]\n',
    "mine.txt": "1+1=\n",
    "question.jsonl": '{"question": "1+1=", "answer": "2"}\n',
    "both.jsonl": '{"question": "1+1=", "dataset_prompt": "2", "prompt": "", "solution": ""}\n',
    **{
        f"{name}.jsonl": f'{{"prompt": "1+1=", "{name}": "2"}}\n'
        for name in ("prompts", "completions", "completion_ids", "trainer_state")
    },
    "list.yaml": "- a\n- b\n",
    "broken.yaml": "a: 1\nb: [1\nc: 2\n",
    "empty.yaml": "",
    "syntax.py": "import os\n\ndef reward(completions):\n    return [1\n",
    "imports.py": "import os\nimport no_such_module_here\n",
    "fails.py": "def helper(row):\n    return row['points']\n\n\n"
    "def reward(completions, **kwargs):\n    return [helper({})]\n",
    "two.py": "def _hidden(): ...\n\n\ndef good(completions, **kwargs):\n    return [0.0 for _ in completions]\n",
}
MISTAKES = [
    # (arguments, exit code, words)
    (["--dataset_name", "empty.jsonl"], 1, "'empty.jsonl', which is empty."),
    (["--dataset_name", "blank.jsonl"], 1, "'blank.jsonl', which is empty."),
    (
        ["--dataset_name", "broken.jsonl"],
        1,
        "'broken.jsonl', which cannot be read: line 3 is not valid JSON (Expecting",
    ),
    (["--dataset_name", "arrays.jsonl"], 1, "'arrays.jsonl', which cannot be read: line 2 is not an object"),
    (
        ["--dataset_name", "broken.json"],
        1,
        "'broken.json', which cannot be read: Expecting ':' delimiter: line 2 column 12",
    ),
    (
        ["--dataset_name", "mine.txt"],
        1,
        "'mine.txt', but only files named .jsonl, .json, .parquet, .csv, also with .gz",
    ),
    (["--dataset_name", "nowhere"], 1, "`dataset_name` is 'nowhere', which could not be loaded"),
    (["--dataset_name", "question.jsonl"], 1, "no column `prompt`. Its columns are: question, answer. Rename"),
    (["--prompt_column", "promt"], 1, "no column 'promt' (did you mean 'prompt'?). It has: prompt, row."),
    (
        ["--dataset_name", "both.jsonl", "--prompt_column", "question"],
        1,
        "'prompt' is to be used as `dataset_prompt`, but",
    ),
    *(
        (["--dataset_name", f"{name}.jsonl"], 1, f"has a column '{name}', but TRL passes")
        for name in ("prompts", "completions", "completion_ids", "trainer_state")
    ),
    (["--dataset_name", "broken.js*"], 1, "'broken.json', which cannot be read"),
    (["--reward_funcs", "rewards.py"], 1, "Name the function in it as well, such as `rewards.py:small_digits`."),
    (["--reward_funcs", "two.py"], 1, "such as `two.py:good`."),
    (
        ["--reward_funcs", "rewards.py:smal_digits"],
        1,
        "no function 'smal_digits' in rewards.py, which `reward_funcs` names (did you mean 'small_digits'?)",
    ),
    (["--reward_funcs", "acuracy_reward"], 1, "(did you mean 'accuracy_reward'?)"),
    (
        ["--reward_funcs", "syntax.py:reward"],
        1,
        "'syntax.py:reward' failed in line 4: SyntaxError: '[' was never closed.",
    ),
    (
        ["--reward_funcs", "imports.py:reward"],
        1,
        "'imports.py:reward' failed in line 2: ModuleNotFoundError: No module",
    ),
    (
        ["--reward_funcs", "fails.py:reward"],
        1,
        "`reward` failed: KeyError: 'points' (FOLDER/fails.py, line 2). It",
    ),
    (
        ["--reward_funcs", "rewards.py:small_digits", "two.py:good"],
        1,
        "(small_digits, good), and LearnAlign must know which one decides success. Set `success_reward` to one of "
        "these names, or to several if each scores the rows of its own task; or use `learnability='variance'`",
    ),
    (["--success_reward", "good"], 1, "but 'good' is not among"),
    (["--config", "nowhere.yaml"], 1, "`--config` is 'nowhere.yaml', but there is no such file."),
    (
        ["--config", "list.yaml"],
        1,
        "The config file 'list.yaml' holds a list, but must hold lines of the form `name: value`.",
    ),
    (["--config", "empty.yaml"], 1, "The config file 'empty.yaml' is empty"),
    (["--config", "broken.yaml"], 1, "The config file 'broken.yaml' is not valid YAML"),
    (["--config"], 2, "expected one argument"),
    (["--num_promts", "5"], 2, "unrecognized arguments: --num_promts 5 (did you mean 'num_prompts'?)"),
    (["--dryrun"], 2, "unrecognized arguments: --dryrun (did you mean 'dry_run'?)"),
    (["--num_prompts", "many"], 2, "argument --num_prompts/--num-prompts: invalid int value: 'many'"),
    (["--model_name_or_path", "nowhere"], 1, "`model_name_or_path` is 'nowhere', which is not a directory here"),
    (["--save_adapter", "kept"], 1, "Set `warmup_prompts`."),
    (["--adapter", "nowhere"], 1, "`adapter` is 'nowhere', but that is not a directory with an"),
    (
        ["--save_adapter", "kept", "--warmup_prompts", "8", "--use_peft", "false"],
        1,
        "the policy has none. Set `use_peft: true`",
    ),
    (["--warmup_prompts", "8", "--max_steps", "1"], 1, "The warm-up of 8 prompts takes 10"),
    (["--warmup_prompts", "8", "--resume_from_checkpoint", "nowhere"], 1, "'nowhere', but there is no such directory"),
    (["--use_dora", "true"], 1, "Train without them"),
]


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    path = make_folder(tmp_path_factory.mktemp("mistakes"))
    for name, text in BAD.items():
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(("arguments", "code", "words"), MISTAKES, ids=lambda value: str(value)[:60])
def test_mistake_of_a_user_is_one_paragraph(mistakes, arguments, code, words, monkeypatch, run):
    monkeypatch.chdir(mistakes)
    exited, said = run(*arguments)
    assert exited == code and words.replace("FOLDER", str(mistakes)) in said
    ours = [line for line in said.splitlines() if line.startswith("trl-learnalign select: ")]
    assert len(ours) == 1 and "Traceback" not in said and "usage:" not in said


def test_faults_that_are_no_mistakes_keep_their_traceback(folder, monkeypatch):
    monkeypatch.chdir(folder)

    def broken(*args):
        raise ValueError("not the user's")

    monkeypatch.setattr("trl.GRPOTrainer._generate_and_score_completions", broken)
    with pytest.raises(ValueError, match="not the user's"):
        cli.main(["select", "--config", "run.yaml"])


def test_typo_in_the_config_file_names_its_neighbour(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    with open("run.yaml", "a") as file:
        file.write("num_promts: 7\nmy_own: 1\n")
    code, said = run("--score", "random")
    assert code == 0 and "left out: num_promts (did you mean 'num_prompts'?), my_own." in said


def test_help_shows_the_own_arguments_first_and_all_on_request(capsys):
    cli.main(["select", "--help"])
    short = capsys.readouterr().out
    cli.main(["select", "--help-all"])
    long = capsys.readouterr().out
    for own in ("--dry_run", "--push_to_hub REPO", "--prompt_column", "--adapter", "--warmup_prompts", "--help-all"):
        assert own in short and long.index(own) < long.index("--learning_rate")
    assert "--learning_rate" not in short and "--lora_r" in long
    assert short.count("\n") < 290 and long.startswith(short[:2000])
    assert "--no_" not in short and "ignore_bias_buffers" not in short and "`datasets`" not in short
    assert re.search(r"--warmup_prompts [^-]* before the first selection[^-]*\(default: 0\)", " ".join(short.split()))
    assert "with a warning. (default: 1000)" in " ".join(short.split())


def test_command_that_does_not_exist(capsys):
    with pytest.raises(SystemExit, match="no command 'selct' .did you mean 'select'"):
        cli.main(["selct", "--config", "run.yaml"])


def test_nothing_chosen_is_said_and_fails(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    hub = Hub(monkeypatch)
    (folder / "graded.py").write_text(
        "def graded(completions, **kwargs):\n    return [(0, 0.3, 0.7)[i % 3] for i in range(len(completions))]\n"
    )
    words = "which no reward reaches (rewards are between 0 and 0.7). Use `learnability='variance'`"
    for more in (["--dry_run"], ["--format", "jsonl", "--push_to_hub", "no/where"]):
        code, said = run("--reward_funcs", "graded.py:graded", *more)
        assert code == 1 and words in said and "Why each prompt was chosen" not in said
    assert (
        not hub.calls
        and "Report: out/learnalign/report.html" in said
        and not list(Path("out/learnalign").glob("selected*"))
    )
    code, said = run("--reward_funcs", "graded.py:graded", "--learnability", "variance")
    assert code == 0 and "Why each prompt was chosen" in said and "No prompt" not in said


def test_columns_by_other_names(folder, monkeypatch, run):
    """
    As in GSM8K: a reward function of TRL's sort gets the answers as `solution`; the rows written keep their names.
    """
    monkeypatch.chdir(folder)
    rows = [{"question": row["prompt"], "answer": str(row["row"]), "source": "s"} for row in make_dataset()]
    Path("gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("solution.py").write_text(
        "def right(completions, solution, source, **kwargs):\n"
        "    return [float((len(c) + int(s) + sum(map(ord, c))) % 2) for c, s in zip(completions, solution)]\n"
    )
    columns = ["--prompt_column", "question", "--answer_column", "answer"]
    arguments = ["--dataset_name", "gsm8k.jsonl", "--reward_funcs", "solution.py:right", "--format", "jsonl"]
    assert run(*arguments, *columns)[0] == 0
    lines = [json.loads(line) for line in Path("out/learnalign/selected.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    for line in lines:
        assert {name: line[name] for name in rows[0]} in rows
        assert set(line) == {*rows[0], "success_rate", "learnalign_score"}
    # The answers are also what a score without rollouts takes
    code, said = run(*arguments, *columns, "--score", "confidence", "--dry_run")
    assert code == 0 and "pool: 24 prompts, a forward over each" in said and "learnable" not in said


def test_answers_keep_their_name(folder, monkeypatch, run):
    """For reward functions in a warm-up, for `where`, in messages and in files; `solution` is a copy."""
    monkeypatch.chdir(folder)
    rows = [{"prompt": row["prompt"], "answer": str(row["row"] % 5), "row": row["row"]} for row in make_dataset()]
    Path("answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("both.py").write_text(
        "def right(completions, answer, solution, **kwargs):\n"
        "    assert answer == solution\n"
        "    return [float((len(c) + int(a) + sum(map(ord, c))) % 2) for c, a in zip(completions, answer)]\n"
    )
    answered = ["--dataset_name", "answered.jsonl", "--answer_column", "answer", "--write_report", "false"]
    confident = [*answered, "--score", "confidence", "--where", "answer != '3'"]
    rewarded = [*confident, "--reward_funcs", "both.py:right", "--warmup_prompts", "8", "--save_strategy", "no"]
    code, said = run(*rewarded, "--format", "jsonl")
    assert code == 0 and "has no effect" not in said
    (path,) = Path("out/learnalign").glob("step-*")
    config = Selection.load(path).provenance["config"]
    assert config["answer_column"] == "answer" and config["where"] == "answer != '3'"
    for line in map(json.loads, Path("out/learnalign/selected.jsonl").read_text().splitlines()):
        assert {name: line[name] for name in rows[0]} == rows[line["row"]] and line["answer"] != "3"
        assert set(line) == {*rows[0], "success_rate", "learnalign_score"}
    # A score that ignores them, whose reward functions may not
    code, said = run(*answered, "--reward_funcs", "both.py:right", "--score", "learnability")
    assert code == 0 and "has no effect" not in said
    # Rewards are needed by rollouts and by a warm-up alone
    settings = yaml.safe_load(Path("run.yaml").read_text())
    Path("run.yaml").write_text(yaml.safe_dump({name: settings[name] for name in settings if name != "reward_funcs"}))
    assert run(*confident)[0] == run("--score", "random", "--write_report", "false")[0] == 0
    for more in ([*confident, "--warmup_prompts", "8"], answered):
        code, said = run(*more)
        assert code == 1 and "There is nothing to score rollouts by" in said
    Path("answered.jsonl").write_text("".join(json.dumps(row | {"answer": ""}) + "\n" for row in rows))
    code, said = run(*confident)
    assert code == 1 and "`answer_column` is 'answer', but not every row has an answer" in said
    code, said = run(*confident, "--answer_column", "anser")
    assert (
        code == 1 and "`answer_column` is 'anser', but the dataset has no such column (did you mean 'answer'?" in said
    )


QUICK = ("--write_report", "false", "--score", "learnability")


class Hub:
    """Takes the place of the Hub, at the calls of its clients, and keeps what is pushed."""

    def __init__(self, monkeypatch, files=None, public=False):
        self.files, self.public, self.calls = files, public, []
        self.card = huggingface_hub.DatasetCard("---\nlicense: mit\ntags:\n- mine\n---\nMy words.")
        for name in ("whoami", "repo_exists", "dataset_info"):
            monkeypatch.setattr(huggingface_hub.HfApi, name, getattr(self, name))
        monkeypatch.setattr(Dataset, "push_to_hub", self.push)
        monkeypatch.setattr(huggingface_hub.DatasetCard, "load", self.load)
        monkeypatch.setattr(huggingface_hub.DatasetCard, "push_to_hub", self.push_card)

    @property
    def whoami(self):
        return lambda api: self.calls.append(("whoami", api.token)) or {"name": "someone"}

    @property
    def repo_exists(self):
        return lambda api, repo, repo_type: self.files is not None

    @property
    def dataset_info(self):
        siblings = [SimpleNamespace(rfilename=name) for name in self.files or ()]
        return lambda api, repo: SimpleNamespace(siblings=siblings, private=not self.public)

    @property
    def push(self):
        return lambda rows, repo, **access: self.calls.append(("rows", repo, access, rows))

    def load(self, repo, token):
        self.calls.append(("card read", repo, token))
        return self.card

    @property
    def push_card(self):
        return lambda card, repo, token: self.calls.append(("card", repo, token, str(card)))


def test_pushed_privately_with_a_card_without_paths(folder, monkeypatch, run):
    """Everything but the Hub itself: the rows go to a private repository, with the token of the YAML file."""
    monkeypatch.chdir(folder)
    hub = Hub(monkeypatch)
    (folder / "own.py").write_text("def own(table):\n    return table['success_rate']\n")
    paths = [
        *("--dataset_name", str(folder / "mine.jsonl"), "--model_name_or_path", str(folder / "policy")),
        *("--score", f"{folder}/own.py:own", "--score_measures", "rollouts"),
    ]
    code, said = run(*QUICK[:2], "--push_to_hub", "best", "--hub_token", "secret", *paths)
    assert code == 0 and "https://huggingface.co/datasets/someone/best" in said
    asked, (_, repo, access, rows), read, (_, card_repo, token, text) = hub.calls
    assert asked == ("whoami", "secret") and read == ("card read", "someone/best", "secret")
    assert access == {"private": True, "token": "secret"} and token == "secret"
    assert repo == card_repo == "someone/best" and rows.num_rows == 5
    assert {"license: mit", "- mine", "- learnalign"} <= set(text.split("---")[1].split("\n"))
    assert "# 5 prompts of mine, selected" in text and "policy `policy`" in text and "| `score` | own.py:own |" in text
    assert str(folder) not in text and "| `num_prompts` | 5 |" in text and "arXiv:2506.11480" in text
    # Public only if that is asked for
    hub.calls.clear()
    assert run(*QUICK[:2], "--push_to_hub", "someone/best", "--hub_private_repo", "false", *paths)[0] == 0
    assert [call[2] for call in hub.calls if call[0] == "rows"] == [{"private": False, "token": None}]


def test_what_exists_on_the_hub_is_not_replaced_unless_asked(folder, monkeypatch, run):
    """Before anything is measured."""
    monkeypatch.chdir(folder)
    push = [*QUICK, "--push_to_hub", "someone/best"]
    hub = Hub(monkeypatch, files=[".gitattributes", "README.md", "data/train.parquet"])
    code, said = run(*push)
    assert code == 1 and "'someone/best', which exists and holds README.md, data/train.parquet: its rows" in said
    assert "add `--overwrite`" in said and not hub.calls and not Path("out").exists()
    assert run(*push, "--overwrite")[0] == 0 and [call[0] for call in hub.calls] == ["rows", "card read", "card"]
    hub = Hub(monkeypatch, files=[".gitattributes"], public=True)  # made by hand, and still empty
    code, said = run(*push)
    assert code == 1 and "'someone/best', which is public, but rows are pushed to private" in said and not hub.calls
    assert run(*push, "--hub_private_repo", "false")[0] == 0 and len(hub.calls) == 3

    def unknown(api, repo, repo_type):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_exists", unknown)
    code, said = run(*push)
    assert code == 1 and "the Hub could not be asked about it (ConnectionError: no network)" in said


VALUES = [
    {
        "prompt": f"{i % 10}+{i // 10}=",
        "row": i,
        "answer": str(i) if i % 2 else i,
        "date": f"2026-01-{i + 1:02}T10:00:00",
        "rate": 0.13845678901234498 + i,
        "tiny": (i + 1) * 1.6e-11,
        "big": 2**53 + 1 + i,
        "text": "é\u2028\x00</script> \U0001f600",
        "extra_info": {"index": i, "split": "a"},
        "reward_model": {"ground_truth": str(i) if i % 2 else [i], "style": "rule"},
        "tools": [{"name": "f", "properties": {f"p{i % 3}": {"type": "integer"}}}],
        **({"note": None} if i % 3 else {}),
    }
    for i in range(24)
]
NESTED = ("extra_info", "prompt", "date", "rate", "tiny", "text", "row", "big")


def write_values(path, layout):
    lines = [json.dumps(row, ensure_ascii=layout == "jsonl").replace("1.6e-11", "16.0E-12") for row in VALUES]
    if layout == "jsonl":
        path.write_text("\ufeff" + "".join(f"{line}\r\n" for line in lines), encoding="utf-8")
    elif layout == "gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif layout == "array":
        path.write_text(json.dumps(VALUES, indent=2), encoding="utf-8")
    else:
        rows = [{name: value for name, value in row.items() if name in NESTED} for row in VALUES]
        path.write_text(json.dumps({"version": "1", "data": rows}), encoding="utf-8")


def chosen_of(path):
    """The rows of an export, and the same of the source, in the order of the export."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return lines, [VALUES[line["row"]] for line in lines]


@pytest.mark.parametrize(
    "name", ["values.jsonl", "values.jsonl.gz", "array.json", "data.json", "part*.jsonl", "parts"]
)
def test_exported_lines_hold_what_the_files_held(folder, monkeypatch, run, name):
    monkeypatch.chdir(folder)
    layout = {"values.jsonl.gz": "gz", "array.json": "array", "data.json": "data"}.get(name, "jsonl")
    if name.startswith("part"):
        where = folder if "*" in name else folder / "parts"
        where.mkdir(exist_ok=True)
        for part in range(2):
            rows = "".join(json.dumps(row) + "\n" for row in VALUES[part * 12 : part * 12 + 12])
            (where / f"part{part}.jsonl").write_text(rows)
    else:
        write_values(folder / name, layout)
    code, said = run(*QUICK, "--dataset_name", name, "--format", "jsonl", "--score", "random")
    assert code == 0, said
    lines, held = chosen_of(folder / "out/learnalign/selected.jsonl")
    assert len(lines) == 5
    for line, row in zip(lines, held, strict=True):
        added = {name: line.pop(name) for name in ("learnalign_score", "success_rate")}
        row = {name: value for name, value in row.items() if name in NESTED or layout != "data"}
        assert line == row and repr(line) == repr(row) and added["success_rate"] is None
    if name == "values.jsonl":  # byte for byte
        texts = (folder / name).read_text(encoding="utf-8-sig").split("\n")
        exported = (folder / "out/learnalign/selected.jsonl").read_text(encoding="utf-8").split("\n")
        assert all(
            text.startswith(texts[row["row"]].strip()[:-1] + ", ")
            for text, row in zip(exported[:-1], held, strict=True)
        )
    # What reading changed is said by column, once; with mixed types it may also cut the last digit of numbers
    changed = re.findall(r"'(\w+)' \(.{,200}? becomes", said.partition("other values than it holds: ")[2])
    mixed = {"answer", "reward_model"} if layout != "data" else set()
    assert said.count("reads other values than it holds: ") == 1
    assert mixed <= set(changed) <= mixed | {"date", "rate", "tiny"}


def test_numbers_too_large_are_said_and_kept(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    rows = [{"prompt": row["prompt"], "row": row["row"], "big": 10**25 + row["row"]} for row in make_dataset()]
    Path("big.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for kind in ("jsonl", "parquet"):
        code, said = run(
            *QUICK, "--dataset_name", "big.jsonl", "--format", kind, "--score", "random", "--output_dir", kind
        )
        assert code == 0 and (kind == "parquet") == ("exported as JSON texts, as arrow holds only" in said)
    for line in map(json.loads, Path("jsonl/learnalign/selected.jsonl").read_text().splitlines()):
        assert line["big"] == 10**25 + line["row"]
    for row in pq.read_table("parquet/learnalign/selected.parquet").to_pylist():
        assert row["big"] == str(10**25 + row["row"])


def test_exported_parquet_is_nested_where_arrow_can_hold_it(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    write_values(folder / "values.jsonl", "jsonl")
    code, said = run(
        "--dataset_name", "values.jsonl", "--format", "parquet", "--num_prompts", "24", "--score", "random"
    )
    assert code == 0
    table = pq.read_table(folder / "out/learnalign/selected.parquet")
    texts = said.split("values of one type: ")[1].split(". `datasets`")[0].split(", ")
    rows = table.to_pylist()
    for row in rows:
        held = VALUES[row["row"]]
        for name in NESTED:
            assert row[name] == held[name], name
        for name in set(texts) & set(held):  # whole columns
            assert json.loads(row[name]) == held[name]
        assert row["tools"][0]["name"] == "f"
        assert json.loads(row["tools"][0]["properties"]) == held["tools"][0]["properties"]
    assert set(texts) == {"answer", "reward_model", "tools.properties"}
    again = Dataset.from_parquet(str(folder / "out/learnalign/selected.parquet"))
    assert [row["answer"] for row in again] == [VALUES[row["row"]]["answer"] for row in again]


def test_rows_of_other_sources_keep_their_digits_and_dates(folder, monkeypatch, run, caplog):
    """A parquet file and a directory of `save_to_disk`; a CSV file has no types, so a warning names guesses."""
    monkeypatch.chdir(folder)
    moment = datetime.datetime(2026, 1, 16, 10)
    columns = {"prompt": make_dataset()["prompt"][:], "row": list(range(24)), "rate": [0.13845678901234498] * 24}
    rows = Dataset.from_dict(columns | {"tiny": [1.6e-11] * 24, "date": [moment] * 24, "nan": [float("nan")] * 24})
    rows.to_parquet("rows.parquet")
    rows.save_to_disk("saved")
    for name in ("rows.parquet", "saved"):
        assert (
            run(
                *QUICK, "--dataset_name", name, "--format", "jsonl", "--score", "random", "--output_dir", name + "-out"
            )[0]
            == 0
        )
        for line in Path(name + "-out/learnalign/selected.jsonl").read_text().splitlines():
            line = json.loads(line)
            assert (line["rate"], line["tiny"], line["date"]) == (0.13845678901234498, 1.6e-11, "2026-01-16T10:00:00")
            assert line["nan"] is None
    lines = [f"{i % 10}+{i // 10}=,{i},00{i},{'NA' if i == 3 else 'yes'},{i / 8},{i < 9},\n" for i in range(24)]
    text = "prompt,row,code,word,rate,low,none\n" + "".join(lines)
    Path("parts").mkdir()
    Path("parts/rows.csv").write_text(text)
    with gzip.open("rows.csv.gz", "wt") as file:
        file.write(text)
    changed = "'code' ('000' becomes 0 in row 0, and 23 more); 'word' ('NA' becomes None in row 3). Reward"
    csv = ["--dataset_name", "rows.csv.gz", "--score", "random", "--num_prompts", "24", "--output_dir", "csv-out"]
    assert changed in run(*QUICK, *csv, "--format", "jsonl")[1]
    lines = Path("csv-out/learnalign/selected.jsonl").read_text().splitlines()
    assert {row["row"]: row["code"] for row in map(json.loads, lines)} == {i: f"00{i}" for i in range(24)}
    (line,) = [text for text in lines if '"row": 3,' in text]
    assert '"word": "NA", "rate": 0.375, "low": true, "none": null' in line
    for name in ("parts", "parts/*.csv"):
        caplog.clear()
        read_dataset(name, "dataset_name")
        assert changed in caplog.text


def test_a_number_that_is_too_large_is_named(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[{"prompt": "1", "v": 1}, {"prompt": "2", "v": {"a": [10000000000000000000000015]}}]')
    with pytest.raises(ValueError, match=r"row 1 \(counted from 0\) has in 'v' a whole number of more than 64 bits"):
        read_dataset(str(file), "dataset_name")


def test_a_file_that_changes_meanwhile_is_not_read_again(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    Path("edits.py").write_text(
        "def edits(completions, row, **kwargs):\n    open('mine.jsonl', 'a').write('\\n')\n"
        "    return [float(i % 2) for i in range(len(row))]\n"
    )
    code, said = run(*QUICK, "--reward_funcs", "edits.py:edits", "--format", "jsonl")
    assert code == 0 and "was changed since the selection began, so the exported rows" in said
    for line in map(json.loads, Path("out/learnalign/selected.jsonl").read_text().splitlines()):
        assert line["prompt"] == make_dataset()[line["row"]]["prompt"]


def test_a_selection_is_selected_from_and_names_in_use_are_set_aside(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    assert run(*QUICK, "--format", "jsonl", "--num_prompts", "12")[0] == 0
    shutil.move("out/learnalign/selected.jsonl", "again.jsonl")
    code, said = run(
        *QUICK, "--dataset_name", "again.jsonl", "--format", "jsonl", "--output_dir", "two", "--num_prompts", "3"
    )
    assert code == 0 and "The dataset is an earlier selection: its columns learnalign_score and success_rate" in said
    lines = [json.loads(line) for line in Path("two/learnalign/selected.jsonl").read_text().splitlines()]
    table = Selection.load("two/learnalign/step-000000").to_pandas()
    assert [line["success_rate"] for line in lines] == table["success_rate"][table["selected"]].tolist()
    assert all(list(line) == ["prompt", "row", "learnalign_score", "success_rate"] for line in lines)
    # A column of the user's own of that name, and one of the name that another is to be used as
    rows = [
        {"prompt": "no", "question": row["prompt"], "row": row["row"], "success_rate": 7} for row in make_dataset()
    ]
    Path("taken.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("sees.py").write_text(
        "def sees(prompts, completions, dataset_prompt, dataset_success_rate, **kwargs):\n"
        "    assert set(dataset_prompt) == {'no'} != set(prompts) and set(dataset_success_rate) == {7}\n"
        "    return [float(i % 2) for i in range(len(prompts))]\n"
    )
    more = ["--prompt_column", "question", "--reward_funcs", "sees.py:sees", "--format", "jsonl"]
    code, said = run(*QUICK, "--dataset_name", "taken.jsonl", "--output_dir", "three", *more)
    assert code == 0 and "the column 'prompt' of the dataset is passed to reward functions as `dataset_prompt`" in said
    for line in map(json.loads, Path("three/learnalign/selected.jsonl").read_text().splitlines()):
        old = {name: line[name] for name in ("prompt", "question", "row")}
        assert old | {"success_rate": line["dataset_success_rate"]} == rows[line["row"]]
        assert line["success_rate"] == 0.5


def test_prompts_that_end_with_the_answer_and_models_without_a_template(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    ask = [{"role": "user", "content": "1+1="}]
    rows = [ask + [{"role": "assistant", "content": "2"}] * (i % 3 == 0) for i in range(24)]
    Path("sft.jsonl").write_text("".join(json.dumps({"messages": row, "row": i}) + "\n" for i, row in enumerate(rows)))
    sft = ["--dataset_name", "sft.jsonl", "--prompt_column", "messages"]
    with pytest.warns(UserWarning, match="^8 of 24 prompts end with a message of the assistant, so the policy reads"):
        assert run(*QUICK, *sft, "--score", "random")[0] == 0
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_model().save_pretrained("base")
    tokenizer.save_pretrained("base")
    code, said = run(*QUICK, *sft, "--model_name_or_path", "base")
    assert code == 1 and "messages, but the tokenizer of the policy ('base') has no chat template" in said


def test_an_error_of_a_reward_is_said_once(mistakes, monkeypatch, run):
    monkeypatch.chdir(mistakes)
    said = run("--reward_funcs", "fails.py:reward")[1]
    assert "KeyError: 'points'" in said and "All reward functions returned None" not in said


def training_script(*arguments, callbacks=(), model=None):
    """Train as the user's own script does with the same YAML file: TRL's parser, this package's trainer."""
    settings = yaml.safe_load(Path("run.yaml").read_text())
    kept = {name: value for name, value in settings.items() if name not in ("reward_funcs", "dataset_name")}
    Path("script.yaml").write_text(yaml.safe_dump(kept))
    parser = TrlParser((GRPOConfig, ModelConfig, LearnAlignConfig))
    training_args, model_args, config = parser.parse_args_and_config(["--config", "script.yaml", *arguments])
    set_seed(training_args.seed)
    training_args.model_init_kwargs = {"dtype": "float32"}
    return LearnAlignGRPOTrainer(
        model="policy" if model is None else model,
        reward_funcs=build.load_reward("rewards.py:small_digits"),
        args=training_args,
        train_dataset=Dataset.from_json("mine.jsonl"),
        peft_config=get_peft_config(model_args) if model is None else None,
        train_sampler=LearnAlignSampler(config),
        callbacks=list(callbacks),
    ), config


def test_warmup_is_that_of_training_and_its_adapter_can_be_kept_and_loaded(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    warmup = ["--warmup_prompts", "8", "--learning_rate", "1e-2", "--num_train_epochs", "2"]
    code, said = run(*warmup, "--save_adapter", "kept", "--format", "jsonl")
    assert code == 0 and "Neither `warmup_prompts`" not in said
    assert "LearnAlign plan: the command ends there." in said and "selected prompts" not in said  # it trains on none
    assert "at the pace of training" in said
    assert len(Path("out/learnalign/selected.jsonl").read_text().splitlines()) == 5
    selection = Selection.load("out/learnalign/step-000004")
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-4"]
    # Equal keys: the same weights, data, rewards and settings
    trainer, _ = training_script(*warmup, "--output_dir", "trained", "--save_steps", "6")
    trainer.train()
    trained = Selection.load("trained/learnalign/step-000004")
    assert trained.provenance["key"] == selection.provenance["key"] and trained.indices == selection.indices
    assert trainer.state.global_step == trainer.state.max_steps > 4
    # A run that was killed in the selection goes on from the checkpoint before it
    shutil.rmtree("out/learnalign")
    assert run(*warmup, "--resume_from_checkpoint", "out/checkpoint-4")[0] == 0
    resumed = Selection.load("out/learnalign/step-000004")
    assert resumed.provenance["key"] == selection.provenance["key"] and resumed.indices == selection.indices
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-4"]
    code, said = run(*warmup, "--output_dir", "trained", "--resume_from_checkpoint", "trained/checkpoint-6")
    assert code == 1 and "'trained/checkpoint-6' was saved after a selection, so its warm-up is over" in said

    # The adapter that was kept, loaded by PEFT itself, makes the policy that `--adapter` makes
    code, said = run("--adapter", "kept", "--output_dir", "loaded")
    assert code == 0 and "Neither `warmup_prompts`" not in said
    loaded = Selection.load("loaded/learnalign/step-000000")
    base = AutoModelForCausalLM.from_pretrained("policy", dtype="float32")
    trainer, config = training_script(
        *("--output_dir", "peft", "--warmup_prompts", "0"),
        model=PeftModel.from_pretrained(base, "kept", is_trainable=True),
    )
    assert select_prompts(trainer, config).provenance["key"] == loaded.provenance["key"]
    assert any(
        value.abs().max() > 0 for name, value in load_file("kept/adapter_model.safetensors").items() if "_B" in name
    )
    assert run("--output_dir", "fresh")[0] == 0
    fresh = Selection.load("fresh/learnalign/step-000000")
    assert fresh.provenance["key"] != loaded.provenance["key"]
    # One that is of another model
    make_model(hidden_size=32).save_pretrained("other")
    make_tokenizer().save_pretrained("other")
    code, said = run("--adapter", "kept", "--model_name_or_path", "other")
    assert code == 1 and "The adapter in 'kept' does not fit the model" in said


def test_without_a_warmup_it_says_what_that_means(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    said = run("--score", "learnability")[1]
    assert said.count("Neither `warmup_prompts` nor `adapter` is set") == 1 and "B = 0" not in said
    with open("run.yaml", "a") as file:
        file.write("warmup_prompts: 8\n")
    said = run("--dry_run")[1]
    assert "before it: a warm-up of 8 prompts" in said and "Neither" not in said
    assert "A new LoRA adapter has B = 0" in run("--warmup_prompts", "0", "--output_dir", "zero")[1]
    assert [path.name for path in Path("zero/learnalign").glob("step-*")] == ["step-000000"]


def test_a_file_of_a_training_run_that_goes_back_is_read(tmp_path):
    """Here no warm-up is the default, and the command ends before the run would go back."""
    (tmp_path / "run.yaml").write_text(f"output_dir: {tmp_path}\nbf16: false\nafter_warmup: restart\n")
    config = _parse(str(tmp_path / "run.yaml"), [])[1]
    assert (config.after_warmup, config.warmup_prompts) == ("continue", 0)
