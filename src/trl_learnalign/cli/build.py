"""Rows, reward functions, an adapter and a trainer, built from command-line arguments."""

import ast
import difflib
import importlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets
from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict
from transformers import AutoConfig, set_seed
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..config import LearnAlignConfig
from ..data.files import JsonRows
from ..data.prompts import check_dataset
from ..data.rows import read_source
from ..ground.user_code import load_file
from ..host.rewards import check_success_reward
from ..measures.registry import prices
from ..selection.result import SCORE_COLUMNS


_SOLUTION = "solution"  # the name of the answers in `trl.rewards`
# Columns of these names, which TRL looks at to tell whether prompts are messages, cannot stay beside the prompts
_TAKEN_FOR_PROMPTS = ("messages", "chosen", "rejected", "completion")


@dataclass
class SelectArguments(ScriptArguments):
    """Arguments of `select` in addition to those of TRL and of LearnAlignConfig."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward functions: `file.py:function`, a dotted path, or the name of one of `trl.rewards`."},
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column of the dataset that holds the prompts."})
    adapter: str | None = field(
        default=None,
        metadata={"help": "Directory of a PEFT adapter trained on the model, loaded before the selection."},
    )
    save_adapter: str | None = field(
        default=None, metadata={"help": "Directory to save the adapter in after the warm-up."}
    )

    def wanted(self, columns: list[str], answer_column: str | None) -> dict[str, str]:
        """
        Map the dataset's names of columns to the trainer's, where they differ. A column that has a name of the
        trainer's already, or that of the copy of the answers, gets another, as in `dataset_prompt`.
        """
        named = {self.prompt_column: "prompt"}
        if answer_column in _TAKEN_FOR_PROMPTS:
            named[answer_column] = _SOLUTION
        pairs = {old: new for old, new in named.items() if old != new}
        new = [*pairs.values(), *[_SOLUTION] * (answer_column not in (None, _SOLUTION, *pairs))]
        taken = [name for name in new if name in columns and name not in pairs]
        return pairs | {name: f"dataset_{name}" for name in taken}


@dataclass
class Rows:
    """
    The rows to select from.

    Attributes:
        dataset (`Dataset`): the rows, with the trainer's names of columns.
        source ([`JsonRows`], *optional*): the same rows as JSON files hold them.
        renamed (`dict[str, str]`): the dataset's names of columns -> the trainer's, where they differ.
        added (`list[str]`): columns that the dataset does not have: the copy of the answers, if there is one.
        aside (`dict[str, str]`): columns named as those that the selection adds -> their names here and in exports.
        notes (`list[str]`): sentences about changed columns, for the user.
    """

    dataset: Dataset
    source: JsonRows | None
    renamed: dict[str, str]
    added: list[str]
    aside: dict[str, str]
    notes: list[str]


def build_trainer(
    arguments: SelectArguments, training_args: GRPOConfig, model_args: ModelConfig, config: LearnAlignConfig
) -> tuple[GRPOTrainer, Rows]:
    """
    Build a stock trainer, as a training script does, and the rows to select from. All checks that do not need the
    model come first.
    """
    if arguments.dataset_name is None:
        raise ValueError(
            "There is nothing to select from. Set `dataset_name` to a dataset of the Hub, a directory or a file."
        )
    generates = bool(config.warmup_prompts) or "rollouts" in prices(config.measures)
    if generates and not arguments.reward_funcs:
        raise ValueError(
            "There is nothing to score rollouts by. Set `reward_funcs`, for example to `rewards.py:correct`."
        )
    if model_args.model_name_or_path is None:
        raise ValueError("There is no policy. Set `model_name_or_path`.")
    if arguments.save_adapter is not None and not config.warmup_prompts:
        raise ValueError(
            "`save_adapter` saves the adapter after a warm-up, but there is no warm-up. Set `warmup_prompts`."
        )
    if arguments.save_adapter is not None and not (model_args.use_peft or arguments.adapter):
        raise ValueError(
            "`save_adapter` saves an adapter, but the policy has none. Set `use_peft: true`, or take the weights from "
            "the checkpoint that is saved after the warm-up."
        )
    if arguments.adapter is not None and not (Path(arguments.adapter) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"`adapter` is '{arguments.adapter}', but that is not a directory with an `adapter_config.json`. Pass the "
            "directory of `--save_adapter`, or a checkpoint of a training run with an adapter."
        )
    reward_funcs = [load_reward(name) for name in arguments.reward_funcs] or [_never_called]
    names = [function.__name__ for function in reward_funcs if hasattr(function, "__name__")]
    if "rollouts" in config.measures and len(names) == len(reward_funcs):
        check_success_reward(names, config.success_reward, config.learnability)
    _check_model(model_args)
    rows = read_rows(arguments, config.answer_column)
    if config.answer_column is not None:
        config.answer_column = rows.renamed.get(config.answer_column, config.answer_column)
    check_dataset(rows.dataset)
    peft_config = get_peft_config(model_args)
    if arguments.adapter is not None:
        peft_config = PeftConfig.from_pretrained(arguments.adapter)
        peft_config.inference_mode = False
    set_seed(training_args.seed)  # a new adapter is the same each time, so that a finished selection is recognised
    training_args.push_to_hub = False  # it would push the model, not the chosen rows
    training_args.eval_strategy, training_args.load_best_model_at_end = "no", False
    given: Any = training_args.model_init_kwargs or {}  # a text only before the arguments are checked
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **given,
    }
    trainer = GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=rows.dataset,
        peft_config=peft_config,
        quantization_config=get_quantization_config(model_args),
    )
    if arguments.adapter is not None:
        load_adapter(trainer, arguments.adapter)
    return trainer, rows


def _never_called(prompts, **kwargs):
    """Stand for the rewards where nothing is generated, as TRL makes no trainer without."""
    return [None for _ in prompts]


def _check_model(model_args):
    """
    Check that the model is a directory or on the Hub, with an error that names it; the trainer's own does not.
    """
    name = model_args.model_name_or_path
    if not Path(name).is_dir():
        try:
            AutoConfig.from_pretrained(name, revision=model_args.model_revision)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"`model_name_or_path` is '{name}', which is not a directory here and could not be loaded from the "
                f"Hub: {error}"
            ) from error


def load_adapter(trainer: GRPOTrainer, path: str) -> None:
    """
    Replace the trainer's new adapter weights by those of a saved adapter. The trainer makes the adapter itself, so
    that precision, quantization and the reference policy of a KL term (the model without it) are those of a training
    run.
    """
    weights = load_peft_weights(path, device="cpu")
    try:
        result: Any = set_peft_model_state_dict(trainer.model, weights)
        missing = [name for name in result.missing_keys if ".default." in name]
        fault = f"{len(missing)} of its tensors are missing" if missing else None
        if result.unexpected_keys:
            fault = f"the model has no parameter for {result.unexpected_keys[0]}"
    except RuntimeError as error:  # shapes differ
        fault = str(error)
    if fault is not None:
        raise ValueError(
            f"The adapter in '{path}' does not fit the model: {fault}. Set `model_name_or_path` to the model that it "
            "was trained on."
        )


# Rows --------------------------------------------------------------------------------------------------------------


def read_rows(arguments: SelectArguments, answer_column: str | None) -> Rows:
    """
    Read the training split of a dataset of the Hub or of a directory, or the rows of files, and give columns the
    trainer's names. The answers are copied, so that they have the user's name and that of `trl.rewards`. Scores that
    an earlier export added are left out.

    Raises:
        `ValueError`, `FileNotFoundError`: the rows cannot be read, or a named column is missing.
    """
    notes = []
    assert arguments.dataset_name is not None
    dataset, source = read_source(
        arguments.dataset_name, "dataset_name", arguments.dataset_config, arguments.dataset_train_split
    )
    taken = [name for name in SCORE_COLUMNS if name in dataset.column_names]
    if len(taken) == len(SCORE_COLUMNS):
        dataset, taken = dataset.remove_columns(taken), []
        notes.append(
            f"The dataset is an earlier selection: its columns {' and '.join(SCORE_COLUMNS)} are left out, and those "
            "of this selection take their place."
        )
    aside = {name: f"dataset_{name}" for name in taken}
    for old, new in aside.items():
        dataset = dataset.rename_column(old, new)
        notes.append(f"The selection adds a column '{old}', so that of the dataset is called '{new}'.")
    columns = dataset.column_names
    renamed = arguments.wanted(columns, answer_column)
    if answer_column is not None and answer_column not in columns:
        raise ValueError(
            f"`answer_column` is '{answer_column}', but the dataset has no such column"
            f"{nearest(answer_column, columns)}. It has: {', '.join(columns)}."
        )
    for old, new in renamed.items():
        if old not in columns:
            raise ValueError(
                f"The dataset has no column '{old}'{nearest(old, columns)}. It has: {', '.join(columns)}."
            )
        if new in columns and new not in renamed:
            raise ValueError(
                f"The column '{old}' is to be used as `{new}`, but the dataset already has a column of that name. "
                "Remove or rename one of them."
            )
        if new == f"dataset_{old}":
            notes.append(
                f"Another column is used as `{old}`, so the column '{old}' of the dataset is passed to reward "
                f"functions as `{new}`. Exported rows keep the names of the dataset."
            )
    dataset, added = dataset.rename_columns(renamed), []
    if answer_column is not None and _SOLUTION not in dataset.column_names:
        answers = renamed.get(answer_column, answer_column)
        copy = dataset.select_columns([answers]).rename_column(answers, _SOLUTION)
        dataset, added = concatenate_datasets([dataset, copy], axis=1), [_SOLUTION]
    return Rows(dataset, source, renamed, added, aside, notes)


# Reward functions --------------------------------------------------------------------------------------------------


def load_reward(name: str):
    """Load a reward function by `file.py:function`, by a dotted path, or by its name in `trl.rewards`."""
    file, _, function = name.rpartition(":")
    if name.endswith(".py"):
        functions = _functions_of(Path(name)) if Path(name).is_file() else []
        example = f"`{name}:{functions[0] if functions else 'correct'}`"
        raise ValueError(
            f"The reward function '{name}' is a file. Name the function in it as well, such as {example}."
        )
    if file:
        if not Path(file).is_file():
            raise FileNotFoundError(f"The reward function '{name}' should be in '{file}', but there is no such file.")
        module = load_file(file, f"reward function '{name}'")
        names = _functions_of(Path(file))
    else:
        sys.path.insert(0, os.getcwd())
        path, _, function = name.rpartition(".")
        try:
            module = importlib.import_module(path or "trl.rewards")
        except Exception as error:
            raise ValueError(
                f"The reward function '{name}' could not be imported ({type(error).__name__}: {error}). Give "
                "`file.py:function`, a dotted path, or the name of a function of `trl.rewards`."
            ) from error
        names = dir(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(
            f"There is no function '{function}' in {file or module.__name__}, which `reward_funcs` names"
            f"{nearest(function, names)}."
        )
    return getattr(module, function)


def _functions_of(file) -> list[str]:
    """List the public functions and classes at the top of a Python file."""
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError):
        return []
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def nearest(name: str, known) -> str:
    """Ask whether `name` was meant to be a similar known name; `""` if there is none."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
