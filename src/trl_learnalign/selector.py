"""One selection: rollouts, gradients, scores, choice, files."""

import hashlib
import json
import logging
import shutil
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import Trainer

from .advice import selection_warning
from .columns import candidate_rows, dataset_columns
from .config import FREE_ON_RESUME, LearnAlignConfig
from .disk import DirectoryLock, make_directory, scratch
from .host import Host, find_host
from .measures.alignments import GradientAlignments
from .measures.rollouts import Rollouts, prompts_at_once, roll_out, save_shard
from .parts import rollouts_at_once
from .peers import Peers
from .pool import Pool, draw_pool, load_target, scores_table
from .projection import stable_hash
from .prompts import equal_prompts
from .rewards import source_of
from .scores import find_score
from .selection import SELECTION_FILE, Selection, dataset_fingerprint
from .store import Log, open_log
from .texts import texts_table


logger = logging.getLogger(__name__)

_PACKAGES = ("trl-learnalign", "trl", "transformers", "peft", "accelerate", "datasets", "torch")


def select_prompts(trainer: Trainer, config: LearnAlignConfig | None = None) -> Selection:
    r"""
    Scores the prompts of a trainer's dataset with the policy as it is, and selects the best. Nothing is trained, and
    the trainer's state does not change.

    With several processes every process must call this; all get the same selection. One line about it is printed, and
    its files, with a report, are left in `OUTPUT_DIR/learnalign/step-{global_step:06d}/` (see docs/files.md). A
    selection there that was made from the same weights, data, rewards and settings is reused, and an interrupted
    one is finished. What was measured stays in `OUTPUT_DIR/_learnalign/`: another score at the same weights measures
    only what it needs besides.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): supplies the policy, the prompts, the generation and
            the rewards.
        config ([`LearnAlignConfig`], *optional*): defaults to the paper's settings.

    Returns:
        [`Selection`]: `trainer.train_dataset.select(selection.indices)` are the chosen prompts. Empty if no prompt
        is learnable.

    Raises:
        `ValueError`: see [`Host.check`] and [`UnseenParametersError`]; or weights sharded before training.
    """
    return select_at_stage(trainer, config if config is not None else LearnAlignConfig(), stage=0, keep_measures=True)


def select_at_stage(trainer: Trainer, config: LearnAlignConfig, stage: int, keep_measures: bool = False) -> Selection:
    """
    [`select_prompts`], with the number of selections before this one in a staged run. In training nothing that was
    measured is kept, as the next step changes the weights.
    """
    return checked_run(find_host(trainer), config, stage, keep_measures).run()


def checked_run(host: Host, config: LearnAlignConfig, stage: int, keep_measures: bool = False) -> "SelectionRun":
    """A selection to be made. What one process alone finds wrong, such as a file that its node lacks, ends all."""
    with Peers(host.accelerator) as peers:
        host.check(config)
        if host.is_sharded and host.trainer.optimizer is None:
            raise ValueError(
                "FSDP and DeepSpeed shard the weights when training starts, so nothing can be selected before. Use "
                "`LearnAlignSampler` with `warmup_prompts=0`, or launch this script with DDP."
            )
        run = SelectionRun(host, config, stage, keep_measures)
        peers.wait()
    return run


class SelectionRun:
    """The state of one selection, phase by phase."""

    def __init__(self, host: Host, config, stage, keep_measures=False):
        trainer = host.trainer
        self.host = host
        self.config = config
        self.accelerator = host.accelerator
        self.step = trainer.state.global_step
        self.seed = config.selection_seed if config.selection_seed is not None else trainer.args.seed
        self.num_rollouts = config.num_rollouts or host.group_size
        self.keep_measures = keep_measures
        self.dataset = host.visible()
        self.score = find_score(config.score, config.score_measures)
        rows = candidate_rows(host.dataset, config)
        self.pool = draw_pool(rows, config.candidate_prompts, stable_hash(self.seed, "pool", stage))
        self.prompts_at_once = prompts_at_once(host, config, self.num_rollouts, len(self.pool))
        self.path = Path(trainer.args.output_dir) / "learnalign" / f"step-{self.step:06d}"
        self.target = load_target(host.dataset, config)
        self.equal = equal_prompts(host.dataset) if config.deduplicate else None
        self.seconds = {}
        self.reused = False
        self.peers = Peers(self.accelerator)
        self.provenance = {
            "config": config.to_dict(),
            "seed": self.seed,
            "global_step": self.step,
            "stage": stage,
            "num_rollouts": self.num_rollouts,
            "measures": list(self.score.requires),
            "dataset_fingerprint": dataset_fingerprint(host.dataset),
            "num_rows": len(self.dataset),
            # Not the name of its class, which FSDP2 changes
            "model": trainer.model.config._name_or_path or trainer.model.config.model_type,
            "versions": {package: version(package) for package in _PACKAGES},
            "num_processes": self.accelerator.num_processes,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def run(self):
        lock = None
        try:
            with self.peers:
                if self.accelerator.is_main_process:
                    lock = DirectoryLock(self.path.parent)
                selection = self._run()
                report = self._report()
        finally:
            if lock is not None:
                lock.release()
        if self.accelerator.is_main_process:
            if self.reused:
                tqdm.write(f"Used again: {_REUSED.format(self.path, selection.provenance.get('made', 'unknown'))}")
            tqdm.write(selection.summary())
            if (warning := selection_warning(selection)) is not None:
                logger.warning(warning)
            if report is not None:
                tqdm.write(f"{'Why each prompt was chosen' if selection.indices else 'Report'}: {report}")
        return selection

    def _run(self):
        if not self.score.requires:
            table = pd.DataFrame(index=pd.Index(self.pool, name="index"))
            self.provenance["unscorable"] = []
            selection = self._choose(table)
            self._publish(selection)
            return selection
        self.keys = self._keys()
        self.provenance["key"] = self.keys["selection"]
        found = self._finished()
        self.reused = found is not None
        return found if self.reused else self._scored()

    def _finished(self):
        """A finished selection with the same key."""
        found = None
        if self.accelerator.is_main_process and (self.path / SELECTION_FILE).is_file():
            try:
                found = Selection.load(self.path)
            except (OSError, ValueError):
                found = None
            if found is not None and found.provenance.get("key") != self.provenance["key"]:
                tqdm.write(f"Will be replaced: {_REPLACED.format(self.path, found.provenance.get('made', 'unknown'))}")
                found = None
        found = self.peers.broadcast(found)
        if found is not None:
            self._tidy_up()
        return found

    def _scored(self):
        self._make_room()
        log = self.open_log("rollouts")
        with self.host.left_as_found(self.num_rollouts):
            started = time.perf_counter()
            own = roll_out(self, self.dataset, self.pool, log)
            self.clock("rollouts", started)
            pool = self.gather_rewards(own)
            self.provenance |= {"unscorable": pool.unscorable, "reward_range": pool.reward_range()}
            align = GradientAlignments(self, own, pool) if "gradients" in self.score.requires else None
            selection = self._choose(pool.table(), align)
        self._publish(selection, own, pool)
        return selection

    # Measures ---------------------------------------------------------------------------------------------------

    @property
    def path_of_measures(self) -> Path:
        """The directory of what is measured at this step."""
        return scratch(self.path.parent) / self.path.name

    def open_log(self, measure: str) -> Log:
        """The log of a measure, as far as it was made under the same key. All processes must call this."""
        return open_log(self.path_of_measures / measure, self.keys[measure], self.accelerator, self.peers)

    def _make_room(self):
        """Deletes what was measured at other steps, and by earlier versions."""
        if self.accelerator.is_local_main_process:
            for path in self.path_of_measures.parent.glob("step-*"):
                if path != self.path_of_measures or (path / "manifest.json").exists():
                    shutil.rmtree(path, ignore_errors=True)
        self.peers.wait()

    def gather_rewards(self, own: Rollouts) -> Pool:
        """What the rollouts of all processes found out, on every process."""
        columns = own.rows, own.rewards, own.penalties, own.lengths
        gathered = zip(*self.peers.gather(columns), strict=True)
        indices, rewards, penalties, lengths = (torch.from_numpy(np.concatenate(parts)) for parts in gathered)
        return Pool.of_rewards(indices, rewards, penalties, lengths, self.config, self.host)

    # Choice and files -------------------------------------------------------------------------------------------

    def _choose(self, table, align=None) -> Selection:
        dataset, stage = self.host.dataset, self.provenance["stage"]
        more = dataset_columns(dataset, table.index, self.score.columns)
        ranked = self.score.rank(more.drop(columns=table.columns, errors="ignore").join(table), align)
        # With all scores equal the ties are the choice
        seed = stable_hash(self.seed, "random" if self.config.score == "random" else "ties", stage)
        scores = scores_table(table, ranked, dataset, self.config, seed)
        selection = Selection([], scores, self.provenance | {"seconds": dict(self.seconds)})
        # Scores may differ in the last bit between processes
        return self.peers.broadcast(selection.chosen(self.equal))

    def _publish(self, selection, own=None, pool=None):
        texts = texts_table(self.host, self.dataset, selection, own, self.peers)
        self._save_rollouts(own, pool)
        if self.accelerator.is_main_process:
            selection.save(self.path, texts)
        self.peers.wait()
        self._tidy_up()

    def _save_rollouts(self, own, pool):
        """A file of each process. Those of a selection that this one replaces are deleted."""
        if self.accelerator.is_local_main_process:
            for file in self.path.glob("rollouts*.parquet"):
                file.unlink(missing_ok=True)
        self.peers.wait()
        if own is not None and self.config.save_rollouts:
            make_directory(self.path)
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            name = "rollouts.parquet" if world == 1 else f"rollouts-{rank:05d}-of-{world:05d}.parquet"
            save_shard(self.path / name, own, pool)
        self.peers.wait()

    def _report(self) -> Path | None:
        """The report, if there is one. A failure to write it does not end the run."""
        if not (self.accelerator.is_main_process and self.config.write_report):
            return None
        try:
            from .report import write_report

            return write_report(self.path.parent, self.step)
        except Exception as error:
            logger.warning(
                f"The report about the selection could not be written ({error!r}). The selection itself is complete; "
                f"`trl-learnalign report {self.path.parent}` tries again."
            )

    def _tidy_up(self):
        """Deletes what was measured, on every node, unless another score may use it."""
        if self.accelerator.is_local_main_process and not self.keep_measures:
            shutil.rmtree(self.path_of_measures, ignore_errors=True)
        self.peers.wait()

    # Small things -----------------------------------------------------------------------------------------------

    def _keys(self) -> dict[str, str]:
        """
        Hashes of everything that a selection, and each measure, is made from: equal keys mean equal selections. No
        measure depends on the score, nor the rollouts on what is taken from them.
        """
        rolled_out = {name: self.provenance[name] for name in _KEY_FIELDS}
        rolled_out["prompts_at_once"] = self.prompts_at_once
        rolled_out["rollouts_at_once"] = rollouts_at_once(self.host, self.num_rollouts)
        rolled_out["penalties"] = self.host.has_penalties and "gradients" in self.score.requires
        rolled_out |= self.host.identity()
        self.peers.wait()  # before the collective operations of sharded weights
        rolled_out["weights"] = self.host.weights_digest()
        config = self.provenance["config"]
        features = {name: config[name] for name in _KEY_OF_GRADIENTS}
        target = {"target": dataset_fingerprint(self.target)} if self.target is not None else {}
        rows = hashlib.sha256(np.array(self.pool, np.int64).tobytes()).hexdigest()
        made_from = {
            "rollouts": rolled_out | {"pool": rows},
            "gradients": rolled_out | {"pool": rows} | features,
            "target-rollouts": rolled_out | target,
            "target-gradients": rolled_out | target | features,
            "selection": rolled_out
            | target
            | {
                "config": {name: value for name, value in config.items() if name not in _NOT_IN_KEY},
                "stage": self.provenance["stage"],
                "score": None if self.score.code is None else source_of(self.score.code),
            },
        }
        return self.peers.broadcast({name: _digest(parts) for name, parts in made_from.items()})

    def clock(self, phase: str, started: float) -> None:
        """Notes the seconds that a phase took."""
        self.seconds[phase] = round(time.perf_counter() - started, 3)


_REUSED = (
    "'{}' holds this selection already, from the same weights, data, rewards and settings (made: {}). Its times are "
    "those of that run. To select again, delete that directory or pass another `output_dir`."
)
_REPLACED = (
    "'{}' holds a selection from other weights, data, rewards or settings (made: {}). To keep it, stop here and move "
    "that directory, or pass another `output_dir`."
)
_NOT_IN_KEY = set(FREE_ON_RESUME) - {"save_rollouts"}  # which the files of a selection depend on
_KEY_FIELDS = ("seed", "global_step", "num_rollouts", "dataset_fingerprint", "num_rows", "model")
# What decides which rollouts make a gradient, and how long a feature is
_KEY_OF_GRADIENTS = ("gradient_rollouts", "projection_dim", "success_threshold", "success_reward", "learnability")


def _digest(made_from):
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()
