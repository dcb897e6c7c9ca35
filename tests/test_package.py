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
from trl import GRPOTrainer, RLOOTrainer

import trl_learnalign
from trl_learnalign import LearnAlignGRPOTrainer
from trl_learnalign.host import check_kind, names


ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src/trl_learnalign").rglob("*.py"))
BLOCKED = ("vllm", "deepspeed", "bitsandbytes", "wandb", "matplotlib")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    path = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(path), str(ROOT)]
    subprocess.run(command, check=True)
    return next(path.glob("*.whl"))


def test_wheel_holds_the_package_and_its_license(wheel):
    held = zipfile.ZipFile(wheel).namelist()
    assert {str(file.relative_to(ROOT / "src")) for file in SOURCES} <= set(held)
    assert "trl_learnalign/py.typed" in held and any(name.endswith("licenses/LICENSE") for name in held)
    assert all(name.startswith("trl_learnalign") for name in held)


def test_wheel_imports_without_what_it_does_not_need(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\nimport trl_learnalign as t; print(t.__file__)"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


def test_an_index_shows_the_readme_without_links_to_files(wheel):
    (metadata,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    shown = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "](https://arxiv.org/abs/2506.11480)" in shown and "Content-Type: text/markdown" in shown
    assert not re.findall(r"\]\((?!https?:)", shown)


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


def test_modules_are_small_and_import_only_what_they_may():
    """The architecture: no module over 400 lines, pure modules without trl."""
    imports = {}
    for file in SOURCES:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        name = file.relative_to(ROOT / "src/trl_learnalign").with_suffix("").as_posix()  # two are called gradients
        imports[name] = set(re.findall(r"^(?:from|import) (\w+|\.\w*)", text, re.MULTILINE))
    for module in (
        "config",
        "scoring",
        "projection",
        "choice",
        "scores",
        "gradients",
        "selection",
        "sampler",
        "groups",
    ):
        assert not {"trl", "transformers", "peft", "accelerate"} & imports[module], module


# What is of TRL's trainers alone: not of transformers' Trainer, nor of its attributes
GENERAL = inspect.getsource(Trainer)


def own_names(kind):
    """Names that a trainer of TRL has and a Trainer has not, and private ones that both have."""
    names = {name for pair in re.findall(r"\bself\.(\w+)|def (_\w+)", inspect.getsource(kind)) for name in pair}
    special = {name for name in names if not hasattr(Trainer, name) and not re.search(rf"\bself\.{name}\b", GENERAL)}
    return {name for name in names if name.startswith("_") or name in special} - {
        "",
        "__init__",
    }


def used_names(files):
    texts = [file.read_text() for file in files]
    used = {name for text in texts for name in re.findall(r"\b(?:trainer|super\(\))\.(\w+)", text)}
    quoted = re.compile(r'"(_[a-z_]+|vllm_[a-z_]+)"|\btrainer, "(\w+)"')
    return used | {name for text in texts for pair in quoted.findall(text) for name in pair} - {""}


@pytest.mark.parametrize(("kind", "extra"), [(GRPOTrainer, names.GRPO), (RLOOTrainer, names.RLOO)])
def test_every_undocumented_name_of_a_trainer_is_checked(kind, extra):
    """What the host uses of a GRPOTrainer or an RLOOTrainer, but not of a Trainer."""
    used = used_names(file for file in SOURCES if file.parent.name == "host" and file.stem != "names")
    needed = used & own_names(kind)
    known = {*names.COMMON, *extra, *names.WITH_VLLM}
    optional = {
        "chat_template",
        "environment_factories",
        "rollout_func",
        "_batch_environments",
    }  # that not every trainer has
    assert needed - known - optional == set() and len(needed) > 15
    other = {*names.GRPO, *names.RLOO} - {*extra}
    unused = known - used - set(check_kind(kind).settings)
    assert unused == set() and not other & known


def test_only_the_host_knows_the_insides_of_a_trainer():
    own = own_names(GRPOTrainer) | own_names(RLOOTrainer)
    for file in SOURCES:
        if file.parent.name != "host":
            used = used_names([file]) & own
            private = re.findall(r"\btrainer\.(_\w+)", file.read_text())
            assert not used and not private, f"{file.name} uses {used or private}"


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
    for file in SOURCES:
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
    package = ROOT / "src/trl_learnalign"
    modules = {path.stem: [path] if path.is_file() else sorted(path.glob("*.py")) for path in package.glob("[!_]*")}
    modules = {name: files for name, files in modules.items() if all(file.suffix == ".py" for file in files)}
    layer = {}
    for number, line in enumerate(block.splitlines()):
        if not line.startswith(" "):
            layer |= dict.fromkeys(re.split(r"\s{2,}", line)[0].split(", "), number)
    assert set(layer) == set(modules)
    for module, files in modules.items():
        for file in files:
            outside = 1 + (file.parent != package)  # dots of an import from another module of the package
            tree = ast.parse(file.read_text())
            typing = {
                id(one)
                for node in tree.body
                if ast.unparse(node).startswith("if TYPE_CHECKING")
                for one in ast.walk(node)
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.level == outside and id(node) not in typing:
                    for other in [node.module] if node.module else [name.name for name in node.names]:
                        assert layer[other.partition(".")[0]] > layer[module], f"{file} imports {other}"
