"""The docs tell the truth: fields and defaults, results, and code that runs."""

import ast
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trl_learnalign
from trl_learnalign import LearnAlignConfig
from trl_learnalign.config import FREE_BEFORE_SELECTION, FREE_ON_RESUME, FREE_WITHOUT_TARGET
from trl_learnalign.gradients.layers import unseen_message


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_config_examples_run():
    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```python\n(LearnAlignConfig\(.*?)```", page.read_text(), re.S)
    ]
    assert len(blocks) >= 4
    for block in blocks:
        assert isinstance(eval(block, {"LearnAlignConfig": LearnAlignConfig}), LearnAlignConfig)


def test_settings_are_explained_as_in_the_docstring():
    subprocess.run([sys.executable, ROOT / "docs/configuration.py", "--check"], check=True)


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_quick_start_of_the_readme_runs(tmp_path, monkeypatch):
    """
    As it stands, with rows as GSM8K has them, a tiny policy, short completions, and 8 in place of 300 and of 1,000
    prompts.
    """
    import datasets
    from tiny import grpo_args, make_dataset, make_model, make_tokenizer

    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("policy")
    make_tokenizer().save_pretrained("policy")
    rows = [
        {"question": prompt, "answer": f"so it is #### {i % 3}"} for i, prompt in enumerate(make_dataset()["prompt"])
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, split: datasets.Dataset.from_list(rows))
    monkeypatch.setattr("trl.GRPOConfig", lambda output_dir, **batch: grpo_args(output_dir, num_train_epochs=2))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    names = {}
    assert '"Qwen/Qwen2.5-1.5B-Instruct"' in block
    exec(block.replace('"Qwen/Qwen2.5-1.5B-Instruct"', '"policy"'), names)
    assert names["trainer"].state.global_step == names["trainer"].state.max_steps > 0
    assert Path("runs/first/learnalign/report.html").is_file()
    assert names["reward"](["it is 72", "it is", ""], ["48/2=24 #### 72", "#### 3", "#### 3"]) == [1.0, 0.0, 0.0]


def test_gains_in_the_readme_are_those_of_the_evidence():
    after = (ROOT / "README.md").read_text().partition("<!-- written by benchmarks/online/alignment_page.py -->")[2]
    rest = after.partition("<!-- end -->")[2]  # `alignment_page.py --check` reads what is before
    gains = re.findall(r"[+-][\d.]+ \[[^]]+\]", rest)
    evidence = (ROOT / "docs/evidence.md").read_text()
    assert len(gains) == 3 and all(gain in evidence for gain in gains)
    words = " ".join(rest.split())
    took = re.search(r"took (\d+) s of rollouts.* and (\d+) s of gradients.* took (\d+) s", words)
    rows = ("rollouts of a selection", "gradients of a selection", "training on 1,000 prompts, 125 steps")
    assert all(f"| {row} | {seconds} |" in evidence for row, seconds in zip(rows, took.groups(), strict=True))


def test_code_of_the_page_about_online_runs(capsys, tmp_path, monkeypatch):
    """Settings of an experiment, a loop of one's own, and the asynchronous trainer."""
    import trl_learnalign

    pytest.importorskip("aiohttp")
    found = [block for block in blocks("online.md", "python") if "OnlineSettings" in block]
    found += blocks("any_loop.md", "python") + blocks("asynchronous.md", "python")
    assert len(found) == 5
    monkeypatch.chdir(tmp_path)
    names = {name: getattr(trl_learnalign, name) for name in trl_learnalign.__all__}
    for block in found:
        exec(block, names)
    assert "six weights, 2,000 prompts" in (tmp_path / "report" / "report.html").read_text()
    shown = capsys.readouterr().out  # as the page says
    assert "99% of what can be learnt" in shown and "100% of the last groups were live" in shown


def test_lines_that_change_are_counted_honestly():
    """In the quick start: what a script of its own has not."""
    readme, page = (ROOT / "README.md").read_text(), (ROOT / "docs/index.md").read_text()
    script = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    online, selecting, callback = blocks("index.md", "python")[:3]
    ours = re.compile("learnalign|train_sampler", re.I)
    cases = (
        (readme, "Three lines change", script),
        (page, "Three lines change", online),
        (page, "Three lines change", selecting),
        (page, "add two lines", callback),
    )
    for text, words, block in cases:
        assert words in text
        number = {"Three": 3, "two": 2}[next(word for word in words.split() if word in ("Three", "two"))]
        assert sum(bool(ours.search(line)) for line in block.splitlines()) == number


def literal(node):
    """The text of a message, with `...` in place of what varies."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(value.value if isinstance(value, ast.Constant) else "..." for value in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return "..."


def test_every_error_is_in_the_troubleshooting_page():
    page = (ROOT / "docs/troubleshooting.md").read_text().replace("`", "").replace('"', "'")
    messages = [unseen_message([]), unseen_message(["name"])]
    for file in sorted((ROOT / "src/trl_learnalign").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if ast.unparse(node.exc.func) == "AttributeError":  # a module says so of a name that it lacks
                    continue
                assert node.exc.args, f"{file.name}: an error without a message"
                if not isinstance(node.exc.args[0], ast.Call):  # `unseen_message`
                    messages.append(literal(node.exc.args[0]))
    assert len(messages) > 50
    for message in messages:
        parts = [part.strip(" .,:'()") for part in message.replace("`", "").replace('"', "'").split("...")]
        start = next(part for part in parts if len(part) >= 12 or part == max(parts, key=len))
        assert re.split(r"[.:] ", start)[0][:60] in page, f"not in troubleshooting.md: {message}"


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S)


@pytest.mark.parametrize("page", ["index.md", "recipes.md", "training.md", "migrating.md", "files.md"])
def test_code_of_the_pages_runs(page, tmp_path, monkeypatch):
    """One block after another, as they stand, with a tiny policy, few rows and few prompts."""
    from datasets import Dataset
    from peft import LoraConfig
    from tiny import grpo_args, make_dataset, make_model, make_tokenizer, parity_reward
    from trl import RLOOConfig

    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("policy")
    make_tokenizer().save_pretrained("policy")
    dataset = Dataset.from_list([row | {"answer": str(row["row"] % 10)} for row in make_dataset().to_list()])

    def small_args(output_dir, gradient_accumulation_steps=1, **changes):
        return grpo_args(output_dir, save_strategy="steps", save_steps=1, **changes)

    def small_config(**settings):
        if settings.get("schedule") == "online":
            return LearnAlignConfig(**settings)
        for name, most in {"num_prompts": 8, "warmup_prompts": 8, "candidate_prompts": 16}.items():
            if settings.setdefault(name, {"candidate_prompts": None}.get(name, most)) is not None:
                settings[name] = min(settings[name], most)
        return LearnAlignConfig(**settings, **({"save_rollouts": True} if page == "files.md" else {}))

    names = {name: getattr(trl_learnalign, name) for name in trl_learnalign.__all__}
    names |= {"reward": parity_reward, "dataset": dataset, "LoraConfig": LoraConfig}
    names |= {"small_args": small_args, "small_config": small_config}
    names |= {"small_rloo_args": functools.partial(small_args, kind=RLOOConfig)}
    replaced = {
        '"Qwen/Qwen2.5-1.5B-Instruct"': '"policy"',
        " GRPOConfig(": " small_args(",
        "=GRPOConfig(": "=small_args(",
        "=RLOOConfig(": "=small_rloo_args(",
    }
    replaced |= {"LearnAlignConfig(": "small_config(", '"OUTPUT_DIR': '"runs/first', "step-000038": "step-000002"}

    def run(block):
        for old, new in replaced.items():
            block = block.replace(old, new)
        exec(block, names)

    if page != "index.md":
        run(blocks("index.md", "python")[1])  # the one that selects
    for block in blocks(page, "python"):
        if "resume_from_checkpoint" in block:
            names["trainer"].train()  # the run to resume
        run(block)
    assert list(Path("runs/first/learnalign").glob("step-*/selection.json"))
    if page == "training.md":
        assert names["trainer"].state.global_step == names["trainer"].state.max_steps
        assert Path("selected.jsonl").read_text().count("\n") == len(names["selection"].indices)
    if page == "files.md":
        assert len(names["rollouts"]) > 8
    if page == "migrating.md":
        assert len(names["filtered"]) == min(1000, names["selection"].num_learnable())


@pytest.mark.parametrize("page", [path.name for path in sorted((ROOT / "docs").glob("*.md"))])
def test_settings_and_commands_of_the_pages_exist(page):
    from dataclasses import fields

    import yaml
    from trl import GRPOConfig, ModelConfig

    from trl_learnalign.cli.main import SelectArguments

    known = {
        field.name for kind in (SelectArguments, GRPOConfig, ModelConfig, LearnAlignConfig) for field in fields(kind)
    }
    for block in blocks(page, "yaml"):
        assert set(yaml.safe_load(block)) <= known
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            words = line.partition("#")[0].split()
            assert words[0] in ("make", "accelerate", "trl-learnalign", "python")
            assert words[0] != "make" or words[1] in targets
            for word in words:
                assert not word.startswith(("examples/", "benchmarks/")) or (ROOT / word).exists(), word
                assert not word.startswith("--") or word[2:] in known | {
                    "config",
                    "config_file",
                    "dry_run",
                    "format",
                    "index-url",
                    "no-deps",
                }


def test_types_of_the_api_reference_are_links_and_have_no_marks():
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    hooks = module_from_spec(spec)
    spec.loader.exec_module(hooks)
    heading = '<h2 id="trl_learnalign.Selection">Selection</h2>'
    link = '<code><a href="#trl_learnalign.Selection">Selection</a></code>'
    for written, read in {
        "<code>`int`, *optional*, defaults to `3`</code>": "<code>int</code>",
        "<code>[`Selection`], *optional*</code>": link,
        "[<code>~trl_learnalign.Selection</code>]": link,
        "<code>[`~trl.GRPOTrainer`]</code>": "<code>GRPOTrainer</code>",
        "<code>`torch.Tensor` of shape `(n,)`</code>": "<code>torch.Tensor of shape (n,)</code>",
        "<code>plain</code> [1]": "<code>plain</code> [1]",
    }.items():
        assert hooks.on_page_content(heading + written) == heading + read


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_of_prose_are_short(page):
    """At most 120 columns, so that changes can be read; a row of a table is one line."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "!["))]
    assert not found


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f": {path.name}\n" in navigation


def test_every_public_name_is_in_the_api_reference():
    import trl_learnalign.curriculum
    from trl_learnalign.schedules import base

    shown = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(), re.M)
    named = {name.rpartition(".")[2] for name in shown}
    assert len(named) == len(shown)
    assert {*trl_learnalign.__all__, *trl_learnalign.curriculum.__all__} <= named
    contract = {name for name, kind in vars(base).items() if getattr(kind, "__module__", "") == base.__name__}
    assert contract - {"whole_pool"} <= named
    for name in shown:
        module, _, last = name.rpartition(".")
        assert getattr(importlib.import_module(module), last).__doc__


def test_settings_that_may_change_before_a_selection_are_named():
    words = " ".join((ROOT / "docs/configuration.md").read_text().split())
    for start, names in (
        ("**At any time**", FREE_ON_RESUME),
        ("all settings of selections, which are", FREE_BEFORE_SELECTION),
        ("as nothing could be learnt from the target**", FREE_WITHOUT_TARGET),
    ):
        part = re.search(rf"{re.escape(start)}(.*?)(?:\. | - \*\*)", words)[1]
        named = re.findall(r"`(\w+)`", part)
        assert sorted(named) == sorted(names)


PACKAGE = ROOT / "src/trl_learnalign"


def test_lives_of_a_chunk_and_a_selection_are_told_once():
    """The page and the docstring of the package have the same lists, of files that exist."""
    told = [
        re.findall(r"^ *\d+ [a-z_]+(?:/[a-z_]+)? .*", text, re.M)
        for text in ((ROOT / "docs/contributing.md").read_text(), trl_learnalign.__doc__)
    ]
    assert told[0] == told[1] and len(told[0]) == 22
    for path in re.findall(r"(?<= )[a-z_]+/[a-z_]+|(?<=\d )[a-z_]+", "\n".join(told[0])):
        assert (PACKAGE / f"{path}.py").is_file(), path


def test_paths_of_the_contributing_page_exist():
    page = (ROOT / "docs/contributing.md").read_text()
    prose = re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)
    paths = [path for path in re.findall(r"`([\w./-]+)`", prose) if "/" in path or path.endswith(".py")]
    assert len(paths) > 50
    for path in paths:
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    changed = prose.partition("## Where to change what")[2].partition("\n## ")[0]
    assert not re.findall(r"\| `[a-z_]+`", changed)  # a module is named with its room
