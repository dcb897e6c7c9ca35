"""The package as it is installed."""

import ast
import inspect
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import trl
from tiny import config, make_trainer
from transformers import Trainer
from trl import GRPOTrainer

import trl_learnalign
from trl_learnalign import LearnAlignGRPOTrainer
from trl_learnalign.names import NAMES, NAMES_WITH_VLLM


ROOT = Path(__file__).parent.parent
BLOCKED = ("vllm", "deepspeed", "bitsandbytes", "wandb", "matplotlib")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(path), str(ROOT)]
    subprocess.run(command, check=True)
    return next(path.glob("*.whl"))


def test_wheel_holds_the_package_and_its_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"trl_learnalign/{file.name}" for file in (ROOT / "src/trl_learnalign").glob("*.py")} <= set(names)
    assert "trl_learnalign/py.typed" in names and any(name.endswith("licenses/LICENSE") for name in names)
    assert all(name.startswith("trl_learnalign") for name in names)


def test_wheel_imports_without_what_it_does_not_need(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\nimport trl_learnalign as t; print(t.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, wheel], check=True)
    subprocess.run(
        [python, "-c", "import trl_learnalign; trl_learnalign.LearnAlignConfig()"], check=True, cwd=tmp_path
    )


def test_public_names():
    names = ["LearnAlignCallback", "LearnAlignConfig", "LearnAlignGRPOTrainer", "LearnAlignMixin", "LearnAlignSampler"]
    assert trl_learnalign.__all__ == [*names, "Selection", "select_prompts"]
    assert all(getattr(trl_learnalign, name).__doc__ for name in trl_learnalign.__all__)


def test_version_is_the_same_everywhere():
    project = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    changelog = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert trl_learnalign.__version__ == project[1] == changelog[1]


def test_modules_are_small_and_import_only_what_they_may():
    """The architecture: no module over 400 lines, pure modules without trl, private names of TRL in four modules only."""
    imports = {}
    for file in (ROOT / "src/trl_learnalign").glob("*.py"):
        text = file.read_text()
        assert text.count("\n") <= 400, file
        imports[file.stem] = set(re.findall(r"^(?:from|import) (\w+|\.\w*)", text, re.MULTILINE))
    for module in ("config", "scoring", "projection", "choice", "scores", "gradients", "selection", "sampler"):
        assert not {"trl", "transformers", "peft", "accelerate"} & imports[module], module
    private = re.compile(r"trainer\._\w+")
    users = {file.stem for file in (ROOT / "src/trl_learnalign").glob("*.py") if private.search(file.read_text())}
    assert users <= {"objective", "rollouts", "trainer", "callback"}


def test_every_undocumented_name_of_the_trainer_is_checked():
    """What the sources use of a GRPOTrainer, but not of a Trainer."""
    texts = [file.read_text() for file in (ROOT / "src/trl_learnalign").glob("*.py") if file.stem != "names"]
    used = {name for text in texts for name in re.findall(r"\btrainer\.(\w+)", text)}
    rollouts = (ROOT / "src/trl_learnalign/rollouts.py").read_text()
    used |= set(re.findall(r'"(_[a-z_]+)"', rollouts)) | {"_tag_names"}
    general = inspect.getsource(Trainer)
    own = set(re.findall(r"\bself\.(\w+)|def (_\w+)", inspect.getsource(GRPOTrainer)))
    own = {name for names in own for name in names}
    missing = {
        name
        for name in used & own
        if name.startswith("_") or (not hasattr(Trainer, name) and not re.search(rf"\bself\.{name}\b", general))
    }
    assert missing - {*NAMES, *NAMES_WITH_VLLM} == set() and len(missing) > 15


@pytest.mark.parametrize("name", ["_calculate_rewards", "_metrics"])
def test_a_trainer_that_lacks_a_name_is_refused_when_it_is_built(tmp_path, name):
    class Newer(LearnAlignGRPOTrainer):
        """As if TRL had renamed a method, or an attribute."""

        def __getattribute__(self, attribute):
            if attribute == name:
                raise AttributeError(attribute)
            return super().__getattribute__(attribute)

    with pytest.raises(
        RuntimeError, match=f"Newer has no `{name}`, which LearnAlign needs.* {trl.__version__} is inst"
    ):
        make_trainer(tmp_path, config(), cls=Newer)


def test_nothing_that_is_read_can_run_code():
    """No pickle, no `torch.load`, no `eval`, no remote code."""
    for file in (Path(__file__).parent.parent / "src" / "trl_learnalign").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess"}, file
            if isinstance(node, ast.Attribute):
                assert (ast.unparse(node.value), node.attr) != ("torch", "load"), file
            if isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "__import__"}, file
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", file


def test_modules_import_from_layers_below():
    """The layers as docs/contributing.md lists them, and the imports as they are."""
    block = (ROOT / "docs/contributing.md").read_text().partition("```text\n")[2].partition("```")[0]
    modules = {file.stem: file for file in (ROOT / "src/trl_learnalign").glob("[!_]*.py")}
    layer = {}
    for number, line in enumerate(block.splitlines()):
        if not line.startswith(" "):
            layer |= dict.fromkeys(re.split(r"\s{2,}", line)[0].split(", "), number)
    assert set(layer) == set(modules)
    for module, file in modules.items():
        tree = ast.parse(file.read_text())
        typing = {
            id(one) for node in tree.body if ast.unparse(node).startswith("if TYPE_CHECKING") for one in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and id(node) not in typing:
                for other in [node.module] if node.module else [name.name for name in node.names]:
                    assert layer[other] > layer[module], f"{module} imports {other}"
