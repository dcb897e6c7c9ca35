"""
`trl-learnalign select` and `trl-learnalign report`: a selection without training, and the page about one.

    trl-learnalign select --config run.yaml --reward_funcs rewards.py:correct [--dry_run] [--format jsonl] [--push_to_hub REPO]
    trl-learnalign report OUTPUT_DIR

On several processes: `accelerate launch -m trl_learnalign.cli select --config run.yaml`.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import set_seed
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from .config import LearnAlignConfig
from .report import write_report
from .selection import Selection, check_score_columns
from .selector import plan_selection, select_prompts


logger = logging.getLogger(__name__)

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@dataclass
class SelectArguments(ScriptArguments):
    """What `select` needs beside TRL's own arguments and those of LearnAlignConfig."""

    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "Reward functions: `file.py:function`, a dotted path, or the name of one of `trl.rewards`."},
    )


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "usage: trl-learnalign {select,report} ...\n" + __doc__
    match arguments:
        case ["select", *rest]:
            _select(rest)
        case ["report", *rest]:
            parser = argparse.ArgumentParser(
                "trl-learnalign report", description="Writes report.html and its figures."
            )
            parser.add_argument("path", help="output_dir of a run, its learnalign directory, or that of one selection")
            try:
                print(write_report(parser.parse_args(rest).path))
            except (FileNotFoundError, ValueError) as error:
                sys.exit(f"trl-learnalign report: {error}")
        case ["-h" | "--help"]:
            print(usage)
        case _:
            sys.exit(usage)


def _select(arguments: list[str]) -> None:
    # Ahead of TrlParser: `--push_to_hub` of GRPOConfig is a flag and means the model
    own = argparse.ArgumentParser("trl-learnalign select", add_help=False, allow_abbrev=False)
    own.add_argument("--dry_run", action="store_true")
    own.add_argument("--format", choices=["jsonl", "parquet"])
    own.add_argument("--push_to_hub", metavar="REPO")
    if {"-h", "--help"} & set(arguments):
        own.print_help()
    options, rest = own.parse_known_args(arguments)
    parser = TrlParser((SelectArguments, GRPOConfig, ModelConfig, LearnAlignConfig), prog="trl-learnalign select")
    try:
        *parsed, unknown, misspelt = parser.parse_args_and_config(
            rest, return_remaining_strings=True, separate_remaining_strings=True
        )
        if misspelt:
            parser.error(f"unrecognized arguments: {' '.join(misspelt)}")
        trainer = build_trainer(*parsed[:3])
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"trl-learnalign select: {error}")
    main_process = trainer.accelerator.is_main_process
    if unknown and main_process:
        names = ", ".join(name.removeprefix("--") for name in unknown if name.startswith("--"))
        logger.warning(f"Of the config file, these are no arguments of `select` and are left out: {names}.")
    if options.dry_run:
        plan = plan_selection(trainer, parsed[3])
        if main_process:
            print(plan)
    else:
        selection = select_prompts(trainer, parsed[3])
        if main_process and (options.format or options.push_to_hub):
            rows = selection.to_dataset(trainer.train_dataset, with_scores=True)
            if options.format:
                target = Path(trainer.args.output_dir) / "learnalign" / f"selected.{options.format}"
                print(f"{len(rows)} rows: {write_rows(rows, target)}")
            if options.push_to_hub:
                print(push_rows(rows, selection, options.push_to_hub, parsed[0].dataset_name))
    trainer.accelerator.end_training()


def build_trainer(arguments: SelectArguments, training_args: GRPOConfig, model_args: ModelConfig) -> GRPOTrainer:
    """A stock trainer as a training script builds it; it is not going to train."""
    if arguments.dataset_name is None:
        raise ValueError(
            "There is nothing to select from. Set `dataset_name` to a dataset of the Hub, a directory or a file."
        )
    if not arguments.reward_funcs:
        raise ValueError(
            "There is nothing to score rollouts by. Set `reward_funcs`, for example to `rewards.py:correct`."
        )
    if model_args.model_name_or_path is None:
        raise ValueError("There is no policy. Set `model_name_or_path`.")
    dataset = read_rows(arguments)
    check_score_columns(dataset)
    set_seed(training_args.seed)  # a new adapter is the same each time, so that a selection is known again
    training_args.push_to_hub = False  # of the model, which stays as it is
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return GRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[load_reward(name) for name in arguments.reward_funcs],
        args=training_args,
        train_dataset=dataset,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )


def read_rows(arguments: ScriptArguments) -> Dataset:
    """The training split of a dataset of the Hub or of a directory, or the rows of one file."""
    file = Path(arguments.dataset_name)
    if file.suffix in _READERS:
        if not file.is_file():
            raise FileNotFoundError(f"`dataset_name` is '{file}', but there is no such file.")
        return load_dataset(_READERS[file.suffix], data_files=str(file), split="train")
    return load_dataset(arguments.dataset_name, arguments.dataset_config, split=arguments.dataset_train_split)


def load_reward(name: str):
    """A reward function by `file.py:function`, by a dotted path, or by its name in `trl.rewards`."""
    if ":" in name:
        file, _, function = name.rpartition(":")
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"The reward function '{name}' is to be found in '{file}', but there is no such file."
            )
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, os.getcwd())
        path, _, function = name.rpartition(".")
        try:
            module = importlib.import_module(path or "trl.rewards")
        except ModuleNotFoundError as error:
            raise ValueError(
                f"The reward function '{name}' could not be imported ({error}). Give `file.py:function`, a dotted path, or "
                "the name of a function of `trl.rewards`."
            ) from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"There is no function '{function}' in {module.__name__}, which `reward_funcs` names.")
    return getattr(module, function)


def write_rows(rows: Dataset, target: Path) -> Path:
    """As JSON lines or parquet, by the name of the file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    rows.to_json(str(target), force_ascii=False) if target.suffix == ".jsonl" else rows.to_parquet(str(target))
    return target


def push_rows(rows: Dataset, selection: Selection, repo: str, source: str) -> str:
    """Pushes the chosen rows as a dataset, and a card that says how they were chosen."""
    from huggingface_hub import DatasetCard

    rows.push_to_hub(repo)
    card = DatasetCard.load(repo)  # with what `datasets` has written about the files
    card.data.tags = ["learnalign", "trl"]
    card.text = selection.card(source)
    card.push_to_hub(repo)
    return f"https://huggingface.co/datasets/{repo}"


if __name__ == "__main__":
    main()
