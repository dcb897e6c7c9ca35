"""The package as it is installed."""

import ast
import inspect
import os
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import trl
from tiny import config, make_trainer, online
from transformers import Trainer
from trl import GRPOTrainer, RLOOTrainer

import trl_learnalign
from trl_learnalign import LearnAlignGRPOTrainer, select_prompts
from trl_learnalign.host import check_kind, find_host, names


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
    (install,) = re.findall(r"^## Install\n+(.*?)\n## ", shown, re.MULTILINE | re.DOTALL)
    assert "\npip install trl-learnalign\n" in install and "clone" not in install


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
    names = ["LearnAlignAsyncMixin", "LearnAlignCallback", "LearnAlignConfig", "LearnAlignGRPOTrainer"]
    assert trl_learnalign.__all__ == [
        *names,
        "LearnAlignMixin",
        "LearnAlignSampler",
        "Schedule",
        "Selection",
        "find_selections",
        "preference_pairs",
        "register_host",
        "select_prompts",
    ]
    assert all(getattr(trl_learnalign, name).__doc__ for name in trl_learnalign.__all__)
    assert {*trl_learnalign.__all__} <= {*dir(trl_learnalign)}
    with pytest.raises(AttributeError, match="has no attribute 'LearnAlignSample'"):
        _ = trl_learnalign.LearnAlignSample


def test_an_editor_is_shown_the_arguments_of_trl():
    """Those of the installed version, and `train_sampler`."""
    (shown,) = (
        node
        for kind in ast.parse((ROOT / "src/trl_learnalign/trainer.py").read_text()).body
        if isinstance(kind, ast.ClassDef) and kind.name == "LearnAlignGRPOTrainer"
        for node in ast.walk(kind)
        if isinstance(node, ast.FunctionDef)
    )
    assert [one.arg for one in shown.args.args] == [*inspect.signature(GRPOTrainer.__init__).parameters]
    assert [one.arg for one in shown.args.kwonlyargs] == ["train_sampler"]


def test_a_package_that_is_missing_is_named():
    """Beside NumPy alone; a name that there is not is an attribute error as ever."""
    code = """
import sys
sys.modules.update(dict.fromkeys(["torch", "transformers", "trl", "datasets", "pandas"]))
import trl_learnalign, trl_learnalign.curriculum
assert not hasattr(trl_learnalign, "LearnAlignSample")
try:
    from trl_learnalign import LearnAlignSampler
except ModuleNotFoundError as error:
    print(error, error.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "`trl_learnalign.LearnAlignSampler` needs the package 'torch', which is not installed." in done.stdout
    assert done.stdout.endswith("`trl_learnalign.curriculum` works without. torch\n")


PURE = ("curriculum/", "scores/", "choice/", "gradients/", "selection/result", "selection/words")


def test_modules_are_small_and_import_only_what_they_may():
    """The architecture: no module over 400 lines, pure modules without trl."""
    imports = {}
    for file in SOURCES:
        text = file.read_text()
        assert text.count("\n") <= 400, file
        name = file.relative_to(ROOT / "src/trl_learnalign").with_suffix("").as_posix()  # two are called gradients
        imports[name] = set(re.findall(r"^(?:from|import) (\w+|\.\w*)", text, re.MULTILINE))
    for name, found in imports.items():
        if name == "config" or name.startswith(PURE):
            assert not {"trl", "transformers", "peft", "accelerate"} & found, name
        if name.startswith("curriculum/"):
            assert not {"torch", "pandas", "datasets"} & found, name


# What TRL's trainers have alone: not transformers' Trainer, nor its attributes
GENERAL = inspect.getsource(Trainer)


def own_names(kind):
    """Names that a trainer of TRL has and a Trainer has not, and private ones that both have."""
    names = {name for pair in re.findall(r"\bself\.(\w+)|def (_\w+)", inspect.getsource(kind)) for name in pair}
    special = {name for name in names if not hasattr(Trainer, name) and not re.search(rf"\bself\.{name}\b", GENERAL)}
    return {name for name in names if name.startswith("_") or name in special} - {"", "__init__"}


def used_names(file, quoted=True):
    """Attributes of whatever is called `trainer`, `host.trainer` included, and of `super()`; and names in quotes."""
    used = set()
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Attribute(value=owner, attr=name):
                if re.search(r"\btrainer$|^super\(\)$", ast.unparse(owner)):
                    used.add(name)
            case ast.Call(func=ast.Name("getattr" | "setattr"), args=[owner, ast.Constant(name), *_]):
                if re.search(r"\btrainer$", ast.unparse(owner)):
                    used.add(name)
            case ast.Constant(str(name)) if quoted and re.fullmatch(r"_[a-z_]+", name):
                used.add(name)
    return used


HOST = {file.stem: used_names(file) for file in SOURCES if file.parent.name == "host" and file.stem != "names"}
# Modules of one kind of trainer; the others are for all
OWN = {"GRPOTrainer": {"grpo", "objective"}, "RLOOTrainer": {"rloo"}, "SDPOTrainer": {"sdpo"}}
# Not every trainer has these, so each is asked for first
OPTIONAL = {"chat_template", "environment_factories", "ref_model", "rollout_func", "tools", "_batch_environments"}
OPTIONAL |= {"_entropy_bonus_enabled", "aux_loss_enabled", "entropy_coef", "use_adaptive_entropy"}
OPTIONAL |= {"pad_to_multiple_of"}


def kinds():
    yield GRPOTrainer
    yield RLOOTrainer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of everything experimental
        try:
            from trl.experimental.sdpo import SDPOTrainer
        except ImportError:
            return
    if hasattr(SDPOTrainer, "_prepare_training_batch"):  # else of another make, and refused
        yield SDPOTrainer


@pytest.mark.parametrize("kind", kinds())
def test_every_undocumented_name_of_a_trainer_is_checked(kind):
    """The names of the roles are those that the host uses of a trainer of TRL, but not of a Trainer."""
    host, others = check_kind(kind), set().union(*OWN.values()) - OWN[kind.__name__]
    used = set().union(*(found for module, found in HOST.items() if module not in others))
    needed = used & own_names(kind) - OPTIONAL - set(host.loss_methods)  # compared where there are any
    known = set().union(*host.names.values(), names.WITH_VLLM)
    assert needed - known == set() and len(needed) > 15
    assert known - set().union(*HOST.values()) - set(host.settings) == set()
    assert set(host.names) == set(names.ROLES)


def test_only_the_host_knows_the_insides_of_a_trainer():
    own = set().union(*map(own_names, kinds()))
    for file in SOURCES:
        if file.parent.name != "host":
            used = {name for name in used_names(file, quoted=False) if name in own or re.match("_[a-z]", name)}
            assert not used, f"{file.name} uses {used}"


@pytest.mark.parametrize(
    ("name", "purpose", "works"),
    [
        ("reward_weights", "serve the trainer", {}),
        ("_calculate_rewards", "generate rollouts outside of training", {}),
        ("_logs", "generate rollouts outside of training", {"schedule": "online", "score": "random"}),
        ("top_entropy_quantile", "take gradients of its loss", {"schedule": "online", "score": "learnability"}),
        ("_save_checkpoint", "choose the prompts of its training", {}),
    ],
)
def test_a_trainer_that_lacks_a_name_of_a_role_is_refused_when_it_is_built(tmp_path, name, purpose, works):
    """What needs the role is refused, with what works without it."""

    class Newer(LearnAlignGRPOTrainer):
        """As if TRL had renamed a method, or an attribute."""

        def __getattribute__(self, attribute):
            if attribute == name:
                raise AttributeError(attribute)
            return super().__getattribute__(attribute)

    message = f"Newer has no `{name}`, which LearnAlign needs to {purpose} and .* {trl.__version__} is inst"
    with pytest.raises(RuntimeError, match=message) as refused:
        make_trainer(tmp_path, config(), cls=Newer)
    for setting, value in works.items():
        assert f"`{setting}='{value}'`" in str(refused.value)
        make_trainer(tmp_path, online() if setting == "schedule" else config(score=value), cls=Newer)
    if name == "_logs":
        find_host(make_trainer(tmp_path, cls=Newer)).try_rewards(0)  # as an online run does, which needs it not
    if name == "_save_checkpoint":
        assert "Use `select_prompts`" in str(refused.value)
        select_prompts(make_trainer(tmp_path, cls=Newer), config(score="learnability"))


def test_nothing_that_is_read_can_run_code():
    """No pickle, no `torch.load` but of weights alone, no `eval`, no remote code."""
    for file in SOURCES:
        safe = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and "weights_only=True" in map(ast.unparse, node.keywords):
                safe.add(node.func)  # which are walked after it
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "subprocess"}, file
            if isinstance(node, ast.Attribute) and node not in safe:
                assert (ast.unparse(node.value), node.attr) != ("torch", "load"), file
            if isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "__import__"}, file
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", file


def imports_of(file):
    """Modules of the package that a file really imports, anywhere in it: not those for type checkers alone."""
    tree = ast.parse(file.read_text())
    typing = {
        id(one) for node in tree.body if ast.unparse(node).startswith("if TYPE_CHECKING") for one in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing:
            start = file.parents[node.level - 1] / (node.module or "").replace(".", "/")
            for alias in node.names:
                choices = (start / f"{alias.name}.py", start / alias.name / "__init__.py")
                found = next((one for one in choices if one.is_file()), None)
                own = start.with_suffix(".py") if start.with_suffix(".py").is_file() else start / "__init__.py"
                yield found or own


PACKAGE = ROOT / "src/trl_learnalign"


def room_of(file):
    """The folder of a module, or its name if it lies at the top."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_no_import_climbs():
    """The rooms as docs/contributing.md lists them, from the top down, and the imports as they are."""
    rooms = (ROOT / "docs/contributing.md").read_text().partition("## Rooms")[2]
    block = rooms.partition("```text\n")[2].partition("```")[0]
    rooms = [re.split(r"\s{2,}", line)[0].rstrip("/") for line in block.splitlines()]
    assert set(rooms) == {room_of(file) for file in SOURCES} - {"__init__"}
    for file in SOURCES:
        for other in imports_of(file):
            room, target = room_of(file), room_of(other)
            assert room == "__init__" or rooms.index(room) <= rooms.index(target), f"{file} imports {other}"


def test_no_circle_of_files():
    needs = {file: set(imports_of(file)) - {file} for file in SOURCES}
    while True:
        free = {file for file, others in needs.items() if not others & needs.keys()}
        if not free:
            break
        for file in free:
            del needs[file]
    assert not needs, sorted(str(file.relative_to(PACKAGE)) for file in needs)


def test_the_face_is_six_files():
    assert sorted(file.name for file in PACKAGE.glob("*.py")) == sorted(
        ["__init__.py", "async_trainer.py", "callback.py", "config.py", "sampler.py", "trainer.py"]
    )


RIDDLES = {"What", "Which", "Whether", "How", "Where", "Of", "As", "See", "Those", "These", "It", "One"}


def test_docstrings_name_their_subject():
    """Of methods and functions ruff checks that the first word is a verb."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                assert text.split()[0].strip(",:") not in RIDDLES, f"{file.name}: {text.splitlines()[0]}"
