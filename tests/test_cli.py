"""`trl-learnalign` as it is called: through its installed command, on one process and on two."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    build,
    cli,
    select_prompts,
)
from trl_learnalign.cli import _parse


ROOT = Path(__file__).parent.parent
REWARD = """
def small_digits(completions, row, **kwargs):
    counts = [sum(character in "01234" for character in completion) for completion in completions]
    return [float(count % 2 == 0 and count * 3 >= r % 10) for count, r in zip(counts, row)]
"""


def make_folder(tmp_path):
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


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


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
def test_dry_run(folder, processes, tried):
    output = call(
        folder, *("select", "--config", "run.yaml", "--dry_run", "--num_rollouts", "8"),
        *("--per_device_train_batch_size", "40"), launcher=TWO_PROCESSES if processes == 2 else CLI,
    )  # fmt: skip
    assert output.count("pool: 24 prompts x 8 rollouts = 192") == 1
    learnable = int(re.search(f"tried: {tried}, of which (\\d+) are learnable", output)[1])
    more = 24 / int(tried.split()[0])
    assert f"gradients: about {learnable * more:.0f} prompts" in output and learnable > 0
    stored = float(re.search("gradients ([0-9.]+) MB, rollouts 0.01 MB", output)[1])
    assert stored == pytest.approx(learnable * more * 32768 * 4 / 1e6, abs=0.02)
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
    "both.jsonl": '{"question": "1+1=", "answer": "2", "prompt": "", "solution": ""}\n',
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
    (["--dataset_name", "mine.txt"], 1, "'mine.txt', but only files named .jsonl, .json, .parquet, .csv can be read"),
    (["--dataset_name", "nowhere"], 1, "`dataset_name` is 'nowhere', which could not be loaded"),
    (["--dataset_name", "question.jsonl"], 1, "no column `prompt`. Its columns are: question, answer. Rename"),
    (["--prompt_column", "promt"], 1, "no column 'promt' (did you mean 'prompt'?). It has: prompt, row."),
    (["--dataset_name", "both.jsonl", "--prompt_column", "question"], 1, "'question' is to be used as `prompt`, but"),
    (["--dataset_name", "both.jsonl", "--answer_column", "answer"], 1, "'answer' is to be used as `solution`, but"),
    (["--reward_funcs", "rewards.py"], 1, "Name the function in it, too, such as `rewards.py:small_digits`."),
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
        "`reward` failed in a selection: KeyError: 'points' (FOLDER/fails.py, line 2). It",
    ),
    (
        ["--reward_funcs", "rewards.py:small_digits", "two.py:good"],
        1,
        "(small_digits, good), and LearnAlign must know which one decides success. Set `success_reward` to one of "
        "these names, or use `learnability='variance'`",
    ),
    (["--success_reward", "good"], 1, "'good', which is not among"),
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
    assert short.count("\n") < 200 and long.startswith(short[:2000])
    assert "--no_" not in short and "ignore_bias_buffers" not in short and "`datasets`" not in short
    assert re.search(r"--warmup_prompts [^-]* before the first selection[^-]*\(default: 0\)", " ".join(short.split()))
    assert "with a warning. (default: 1000)" in " ".join(short.split())


def test_command_that_does_not_exist(capsys):
    with pytest.raises(SystemExit, match="no command 'selct' .did you mean 'select'"):
        cli.main(["selct", "--config", "run.yaml"])


def test_nothing_chosen_is_said_and_fails(folder, monkeypatch, run):
    monkeypatch.chdir(folder)
    (folder / "graded.py").write_text(
        "def graded(completions, **kwargs):\n    return [(0, 0.3, 0.7)[i % 3] for i in range(len(completions))]\n"
    )
    words = "which no reward reaches (rewards are between 0 and 0.7). Use `learnability='variance'`"
    for more in (["--dry_run"], ["--format", "jsonl", "--push_to_hub", "no/where"]):
        code, said = run("--reward_funcs", "graded.py:graded", *more)
        assert code == 1 and words in said and "Why each prompt was chosen" not in said
    assert "Report: out/learnalign/report.html" in said and not list(Path("out/learnalign").glob("selected*"))
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


def training_script(*arguments, callbacks=(), model=None):
    """What the user's own training script does with the same YAML file: TRL's parser, this package's trainer."""
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
