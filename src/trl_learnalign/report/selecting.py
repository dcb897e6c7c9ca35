"""Selections with their page, as users, training runs and the command ask for them."""

from pathlib import Path

from transformers import Trainer

from ..config import LearnAlignConfig
from ..host import find_host
from ..selection.result import Selection
from ..selection.run import checked_run


def select_prompts(trainer: Trainer, config: LearnAlignConfig | None = None) -> Selection:
    r"""
    Score the prompts of a trainer's dataset with the policy as it is, and select the best. Nothing is trained, and
    the trainer's state does not change.

    With several processes every process must call this; all get the same selection. One line about it is printed, and
    its files, with a report, are left in `OUTPUT_DIR/learnalign/step-{global_step:06d}/` (see docs/files.md). A
    selection there that was made from the same policy, data, rewards and settings is reused, unless its score is a
    function of your own, and an interrupted one is finished. What was measured stays in `OUTPUT_DIR/_learnalign/`:
    another score at the same weights measures only what it needs besides.

    Args:
        trainer (`Trainer`): any that a [`Host`] serves, such as [`~trl.GRPOTrainer`]. It supplies the policy, the
            prompts, the generation and the rewards.
        config ([`LearnAlignConfig`], *optional*): defaults to the paper's settings.

    Returns:
        [`Selection`]: `trainer.train_dataset.select(selection.indices)` are the chosen prompts. Empty if no prompt
        is learnable.

    Raises:
        `ValueError`: see [`Host.check`] and [`UnseenParametersError`]; or weights sharded before training.
    """
    find_host(trainer).look_at_functions()
    return select_at_stage(trainer, config if config is not None else LearnAlignConfig(), stage=0, keep_measures=True)


def select_at_stage(trainer: Trainer, config: LearnAlignConfig, stage: int, keep_measures: bool = False) -> Selection:
    """
    Make one selection of a run and write its page: [`select_prompts`] for training, where nothing that was measured
    is kept, as the next step changes the weights.

    Args:
        trainer (`Trainer`): as for [`select_prompts`].
        config ([`LearnAlignConfig`]): the settings.
        stage (`int`): the number of selections before this one in the run.
        keep_measures (`bool`): keep what was measured for another score at the same weights.
    """
    return checked_run(find_host(trainer), config, stage, keep_measures).run(_write_page)


def _write_page(directory: Path, until: int) -> Path:
    from .selection_page import write_report  # with matplotlib, which pages alone need

    return write_report(directory, until)
