"""The project as it is released: version, dependencies, Python versions, distributions."""

import ast
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import trl_learnalign


ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"deepspeed", "trackio", "wandb"}  # imported only where the user trains or logs with them
NAMES = {"PIL": "pillow", "yaml": "PyYAML"}


def imported(folder):
    """The top-level modules that files import, with one of the files."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0]: file for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found[node.module.partition(".")[0]] = file
    return found


def test_version_is_the_same_everywhere():
    """A version in development is that of no section of the changelog yet."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert trl_learnalign.__version__ == PROJECT["version"]
    assert newest in (("Unreleased", PROJECT["version"]) if ".dev" in PROJECT["version"] else (PROJECT["version"],))


@pytest.mark.parametrize(
    ("version", "newest", "tag", "released"),
    [
        ("0.2.0", "0.2.0", "v0.2.0", True),
        ("0.2.0", "0.2.0", "v0.3.0", False),
        ("0.2.0", "Unreleased", "v0.2.0", False),
        ("0.2.0.dev0", "0.2.0.dev0", "v0.2.0.dev0", False),
    ],
)
def test_only_a_version_that_is_ready_is_released(tmp_path, version, newest, tag, released):
    """The workflow refuses others, and checks the project before it builds distributions."""
    steps = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["build"]["steps"]
    check, *rest = [step["run"] for step in steps if "run" in step]
    assert rest == ["make lint", ".venv/bin/python -m pytest tests/test_release.py", "make dist"]
    (tmp_path / "pyproject.toml").write_text(f'[project]\nversion = "{version}"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {newest}\n\n## 0.1.0\n")
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {"GITHUB_REF_NAME": tag, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(check, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == released and (released or "AssertionError" in done.stderr), done.stderr


def test_all_that_is_imported_is_declared_and_nothing_else():
    declared = {re.match(r"[\w-]+", one)[0] for one in PROJECT["dependencies"]}
    used = imported(ROOT / "src").keys() - sys.stdlib_module_names - {"trl_learnalign"} - OPTIONAL
    assert {NAMES.get(name, name) for name in used} == declared


def test_python_versions_are_those_that_are_tested():
    declared = {one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", one)}
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert declared == {job["python"] for job in jobs["test"]["strategy"]["matrix"]["include"]}
    assert PROJECT["requires-python"] == f">={min(declared, key=lambda one: int(one.partition('.')[2]))}"


def test_tests_of_the_package_need_no_benchmark():
    modules = {file.stem for file in (ROOT / "benchmarks").rglob("*.py")} | {"benchmarks"}
    files = imported(ROOT / "tests")
    # modules that are named as a benchmark's, but are found beside the tests, in the examples or installed
    elsewhere = {file.stem for folder in ("tests", "examples") for file in (ROOT / folder).glob("*.py")}
    found = modules & files.keys() - elsewhere
    assert not found, f"{files[found.pop()]} imports a benchmark"
    for file in (ROOT / "tests").rglob("*.py"):
        assert file == Path(__file__) or not re.search(r"sys\.path.*benchmarks", file.read_text()), file


@pytest.mark.slow
def test_tests_of_a_source_distribution_run(tmp_path):
    """They find all that they need in it, and its description passes the index's check if that is installed."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, stdout=subprocess.DEVNULL)
    (source,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(source) as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / source.name.removesuffix(".tar.gz")
    held = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    assert {"tests/tiny.py", "tests/fake_vllm", "examples/assets/tiny-policy/model.safetensors"} <= held
    files = ["tests/test_choice.py", "tests/test_package.py", "tests/test_release.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *files]
    subprocess.run(command, check=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(folder / "src")})
    check = [sys.executable, "-m", "twine", "check", "--strict", source, *tmp_path.glob("*.whl")]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0 or "No module named twine" in done.stderr, done.stdout
