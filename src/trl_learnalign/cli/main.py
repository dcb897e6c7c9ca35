"""
`trl-learnalign select` and `trl-learnalign report`: a selection without a training script, and its report.

    trl-learnalign select --config run.yaml --reward_funcs rewards.py:correct \\
        [--dry_run] [--format jsonl] [--push_to_hub REPO]
    trl-learnalign report OUTPUT_DIR

`trl-learnalign select --help` lists the arguments. On several processes:

    accelerate launch -m trl_learnalign.cli select --config run.yaml
"""

import argparse
import logging
import sys
import traceback
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml
from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser

from ..callback import LearnAlignCallback
from ..choice.idle import ACTING
from ..config import LearnAlignConfig
from ..ground.disk import make_directory, write_atomically
from ..report.online_page import rewrite_online_report
from ..report.selecting import select_at_stage, select_prompts
from ..report.selection_page import write_report
from ..sampler import LearnAlignSampler
from ..selection.dry_run import plan_selection
from ..selection.export import EXPORTS, check_export, export
from ..selection.result import Selection
from .build import SelectArguments, build_trainer, nearest
from .exports import check_repository, exact, push_rows, write_lines


logger = logging.getLogger(__name__)

_SELECT = "trl-learnalign select"
_OURS: tuple[Any, ...] = (SelectArguments, LearnAlignConfig)
_OF_TRL: tuple[Any, ...] = (GRPOConfig, ModelConfig)
_KINDS = _OURS + _OF_TRL
_UNUSED = ("dataset_test_split", "dataset_streaming", "ignore_bias_buffers")  # fields of TRL's ScriptArguments
_EPILOG = """
TRL's argument `--model_name_or_path` is needed, and `--output_dir`, `--use_peft`, `--lora_target_modules`,
`--per_device_train_batch_size`, `--num_generations` and `--max_completion_length` are often wanted; see `--help-all`.
Everything but `--config`, `--dry_run`, `--format`, `--push_to_hub` and `--overwrite` can be set in the YAML file
instead.
"""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    usage = "usage: trl-learnalign {select,report} ...\n" + __doc__
    match arguments:
        case ["select" | "report" as command, *rest]:
            try:
                _select(rest) if command == "select" else _report(rest)
            except Exception as error:
                if not _explains_itself(error):
                    raise
                sys.exit(f"trl-learnalign {command}: {_paragraph(error)}")
        case ["-h" | "--help"]:
            print(usage)
        case []:
            sys.exit(usage)
        case [command, *_]:
            hint = nearest(command, ["select", "report"])
            sys.exit(f"trl-learnalign: there is no command '{command}'{hint}.\n{usage}")


def _explains_itself(error) -> bool:
    """
    Tell whether this package raised the error on purpose, with reason and remedy, so that a traceback would add
    nothing: its last line is one of this package and a `raise`.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parents[1]) and (last.line or "").startswith("raise ")


def _paragraph(error) -> str:
    return " ".join(str(error).split())


def _report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("trl-learnalign report", description="Writes report.html and its figures.")
    parser.add_argument("path", help="output_dir of a run, its learnalign directory, or that of one selection")
    path = parser.parse_args(arguments).path
    print(rewrite_online_report(path) or write_report(path))


def _select(arguments: list[str]) -> None:
    options, rest = _own_parser().parse_known_args(arguments)
    if options.help or options.help_all:
        return _help(options.help_all)
    try:
        script, config, training_args, model_args, unknown = _parse(options.config, rest)
        _check_push(options, training_args)
        trainer, rows = build_trainer(script, training_args, model_args, config)
        if options.format in EXPORTS:
            check_export(options.format, rows.dataset, config.answer_column)
    except (ValueError, OSError, ImportError) as error:  # of TRL, transformers and peft: of what they were given
        sys.exit(f"{_SELECT}: {_paragraph(error)}")
    main_process = trainer.accelerator.is_main_process
    if main_process:
        for line in (_left_out(unknown), _policy(config, script, model_args), *rows.notes):
            if line is not None:
                logger.warning(line)
    if options.dry_run:
        plan, learnable = plan_selection(trainer, config)
        if main_process:
            if config.warmup_prompts:
                print(f"before it: a warm-up of {config.warmup_prompts:,} prompts, which is not part of this dry run")
            print(plan)
    else:
        selection = (
            _after_warmup(trainer, config, script) if config.warmup_prompts else select_prompts(trainer, config)
        )
        learnable = len(selection.indices) > 0
        if main_process and learnable and (options.format or options.push_to_hub):
            _export(trainer, selection, options, script, rows, config.answer_column)
    trainer.accelerator.end_training()
    if not learnable:
        sys.exit(1)


# Arguments ---------------------------------------------------------------------------------------------------------


def _own_parser() -> argparse.ArgumentParser:
    """Make a parser of arguments that TrlParser must not see: `--push_to_hub` of GRPOConfig would push the model."""
    parser = argparse.ArgumentParser(_SELECT, add_help=False, allow_abbrev=False)
    parser.error = _usage_error  # type: ignore[method-assign]  # of two parsers, whose classes differ
    parser.add_argument("--help", "-h", action="store_true", help="this list")
    parser.add_argument("--help-all", "--help_all", action="store_true", help="this list, and the arguments of TRL")
    parser.add_argument("--config", metavar="FILE", help="YAML file of arguments; the command line overrides it")
    parser.add_argument(
        "--dry_run",
        "--dry-run",
        action="store_true",
        help="score a few prompts, print what all would need",
    )
    parser.add_argument(
        "--format",
        choices=["jsonl", "parquet", *EXPORTS],
        help="also write the rows, as such a file or for a trainer",
    )
    parser.add_argument(
        "--push_to_hub",
        "--push-to-hub",
        metavar="REPO",
        help="also push the chosen rows to the Hub, to a private repository unless `hub_private_repo` is false",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --push_to_hub: replace rows and card of a repository"
    )
    return parser


def _parse(path, rest):
    parser = TrlParser(_KINDS, prog=_SELECT)
    parser.error = _usage_error
    parser.set_defaults(warmup_prompts=0)  # the default is for training; here a warm-up must be asked for
    for name, kind in {"schedule": _staged, "after_warmup": _continued}.items():
        next(action for action in parser._actions if action.dest == name).type = kind
    if path is not None:
        _check_config(path)
        rest = ["--config", path, *rest]
    try:
        with warnings.catch_warnings():
            # Reward functions get the answers as `solution`, whatever the score does with them
            warnings.filterwarnings("ignore", "`answer_column` is .*, but has no effect")
            *parsed, unknown, misspelt = parser.parse_args_and_config(
                rest, return_remaining_strings=True, separate_remaining_strings=True
            )
    except TypeError as error:  # a list where a number is wanted
        raise ValueError(f"An argument has a value of the wrong kind: {error}.") from error
    if misspelt:
        names = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in misspelt if word.startswith("--")]
        hints = "".join(nearest(name, _names()) for name in names)
        _usage_error(f"unrecognized arguments: {' '.join(misspelt)}{hints}")
    script, config, training_args, model_args = parsed
    return script, config, training_args, model_args, unknown


def _staged(schedule: str) -> str:
    """Refuse the others, before the configuration complains of `warmup_prompts`, which is set here."""
    if schedule != "staged" and schedule in get_args(LearnAlignConfig.__annotations__["schedule"]):
        raise argparse.ArgumentTypeError(
            f"`schedule` is {schedule!r}, but such a run chooses its prompts while it trains, so there is nothing to "
            "select. Leave it out here, and set it in the LearnAlignConfig of a training script."
        )
    return schedule


def _continued(after_warmup: str) -> str:
    """Replace `restart`: the command ends with the selection, so it never goes back to other weights."""
    return "continue" if after_warmup == "restart" else after_warmup


def _names() -> list[str]:
    return [
        "config",
        "dry_run",
        "format",
        "push_to_hub",
        "overwrite",
        *(field.name for kind in _KINDS for field in fields(kind)),
    ]


def _check_config(path: str) -> None:
    """
    Check a file of arguments before TRL reads it.

    Raises:
        `ValueError`, `FileNotFoundError`: the file does not exist, is not valid YAML, or is not a mapping of names to
            values.
    """
    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"`--config` is '{path}', but there is no such file.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The config file '{path}' is not valid YAML: {error}") from error
    if not isinstance(document, dict):
        kind = "is empty" if document is None else f"holds a {type(document).__name__}"
        raise ValueError(f"The config file '{path}' {kind}, but must hold lines of the form `name: value`.")


def _usage_error(message):
    print(f"{_SELECT}: error: {message}\n`{_SELECT} --help` lists the arguments.", file=sys.stderr)
    sys.exit(2)


def _help(everything: bool) -> None:
    """Print the package's own arguments, and, if wanted, TRL's after them."""
    usage = f"{_SELECT} --config run.yaml [arguments]"
    parser = TrlParser(_OURS, usage=usage, parents=[_own_parser()], add_help=False, epilog=_EPILOG)
    parser.set_defaults(warmup_prompts=0)
    # The first condition of a setting is the kind of schedule that it needs, if it needs one
    not_of_selections = [name for name, needs in ACTING.items() if not needs[0].acts(LearnAlignConfig())]
    for action in parser._actions:  # one spelling each, and no defaults that say nothing
        action.option_strings = action.option_strings[:1]
        if action.default is None or action.default is False or action.default == []:
            action.default = argparse.SUPPRESS
        if action.dest in (*_UNUSED, *not_of_selections) or action.option_strings[0].startswith("--no_"):
            action.help = argparse.SUPPRESS
        elif action.help:
            action.help = action.help.replace(" If `datasets` is provided, this will be ignored.", "")
    parser.print_help()
    if everything:
        print("\nArguments of TRL:")
        TrlParser(_OF_TRL, usage=argparse.SUPPRESS, add_help=False).print_help()


def _left_out(unknown) -> str | None:
    """Write a warning about unknown names in the YAML file; `None` if there are none."""
    if not unknown:
        return None
    names = [word.removeprefix("--") for word in unknown[::2]]
    hints = ", ".join(f"{name}{nearest(name, _names())}" for name in names)
    return f"These names in the config file are no arguments of `select` and are left out: {hints}."


def _policy(config, script, model_args) -> str | None:
    """Write a warning about a ranking without a warm-up; `None` if none is due."""
    if config.warmup_prompts or script.adapter or not config.measures:
        return None
    line = (
        "Neither `warmup_prompts` nor `adapter` is set, so the prompts are ranked for the policy as it is before "
        "training. Training changes the policy, so such a ranking may soon be out of date."
    )
    if model_args.use_peft and "gradients" in config.measures:
        line += " A new LoRA adapter has B = 0, so only B has a gradient."
    return line


# A warm-up ---------------------------------------------------------------------------------------------------------


class _SelectOnce(LearnAlignCallback):
    """Ends the training where its first selection is due, and makes that selection."""

    def __init__(self, trainer, config, adapter):
        super().__init__(trainer, LearnAlignSampler(config))
        self.adapter = adapter

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if self.sampler.stream.stage:
            raise ValueError(
                f"The checkpoint '{args.resume_from_checkpoint}' was saved after a selection, so its warm-up is over. "
                "Pass the one that was saved at the end of the warm-up, or leave out `resume_from_checkpoint`."
            )

    def on_step_end(self, args, state, control, **kwargs):
        if not self.selections:  # a run resumed into the selection trains one more step, which is not used
            super().on_step_end(args, state, control, **kwargs)

    def announce(self, state):
        """Print the plan up to the selection."""
        plan = self.announcer.plan(state.global_step, state.max_steps, self.pending is not None)
        self.announcer.begin([*plan[:2], "the command ends there."])

    def select(self, state):
        """Make the selection and end the training."""
        self.pending = None
        self.announcer.estimate(state.global_step)
        self.trainer.control.should_training_stop = True
        if self.adapter is not None:
            self.trainer.save_model(self.adapter)
        self.selections.append(select_at_stage(self.trainer, self.config, 0, keep_measures=True))


def _after_warmup(trainer: GRPOTrainer, config: LearnAlignConfig, script: SelectArguments) -> Selection:
    """Train on random prompts as a training run with this configuration would, up to its first selection."""
    checkpoint = trainer.args.resume_from_checkpoint
    if isinstance(checkpoint, str) and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"`resume_from_checkpoint` is '{checkpoint}', but there is no such directory.")
    once = _SelectOnce(trainer, config, script.save_adapter)
    trainer.add_callback(once)
    trainer.train(resume_from_checkpoint=checkpoint)
    return once.selections[0]


# Rows --------------------------------------------------------------------------------------------------------------


def _check_push(options, training_args) -> None:
    """Check the repository to push to, before anything is measured."""
    if options.push_to_hub:
        options.push_to_hub = check_repository(options.push_to_hub, *_access(training_args), options.overwrite)


def _access(training_args) -> tuple[bool, str | None]:
    """Return whether rows are pushed to a private repository, as they are unless told otherwise, and the token."""
    return training_args.hub_private_repo is not False, training_args.hub_token


def _export(trainer, selection, options, script, rows, answer_column) -> None:
    held = None if rows.source is None else rows.source.pick(selection.indices, len(rows.dataset))
    if rows.source is not None and held is None:
        logger.warning(
            f"'{script.dataset_name}' cannot be read row by row, or was changed since the selection began, so the "
            "exported rows have the values that `datasets` read then."
        )
    if held is not None:
        held = [{rows.aside.get(name, name): value for name, value in row.items()} for row in held]
    chosen = selection.to_dataset(trainer.train_dataset, with_scores=True)
    chosen = chosen.remove_columns(rows.added).rename_columns({new: old for old, new in rows.renamed.items()})
    if options.format == "jsonl":
        target = _target(trainer, "jsonl")
        write_lines(chosen, held, target)
        print(f"{len(chosen)} rows: {target}")
    if options.format in ("parquet", *EXPORTS) or options.push_to_hub:
        chosen, texts = exact(chosen, held)
        if texts and (options.format == "parquet" or options.push_to_hub):
            logger.warning(
                "These columns, or parts of them, are exported as JSON texts, as arrow holds only values of one type: "
                f"{', '.join(texts)}. `datasets` decodes them; for any other reader use `--format jsonl`."
            )
    if options.format == "parquet":
        target = _target(trainer, "parquet")
        make_directory(target.parent)
        write_atomically(target, lambda temporary: chosen.to_parquet(str(temporary)))
        print(f"{len(chosen)} rows: {target}")
    if options.format in EXPORTS:
        target = _target(trainer, f"{options.format}.{EXPORTS[options.format]}")
        own = {new: old for old, new in rows.renamed.items()}
        named = own.get(answer_column, answer_column), script.dataset_name, script.dataset_train_split
        export(options.format, target, chosen, selection.found(), *named, own.get("prompt", "prompt"))
        print(f"{len(chosen)} rows: {target}")
    if options.push_to_hub:
        print(push_rows(chosen, selection, options.push_to_hub, script.dataset_name, *_access(trainer.args)))


def _target(trainer, kind) -> Path:
    return Path(trainer.args.output_dir) / "learnalign" / f"selected.{kind}"


if __name__ == "__main__":
    main()
