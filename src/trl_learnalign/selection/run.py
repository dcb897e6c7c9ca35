"""One selection: rollouts, gradients, scores, choice, files."""

import logging
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from ..choice.table import Pool, draw_pool, load_target, rank, scores_table
from ..config import LearnAlignConfig
from ..data.columns import candidate_rows
from ..data.prompts import equal_prompts
from ..data.rows import dataset_fingerprint
from ..ground.disk import DirectoryLock, make_directory, rollouts_of, scratch
from ..ground.hashing import stable_hash
from ..ground.peers import Peers
from ..ground.store import Log, open_log
from ..host import Host
from ..measures.alignments import GradientAlignments, Target, roll_out_target
from ..measures.rollouts import Rollouts, prompts_at_once, roll_out, save_shard
from ..run.uploads import warn_of_uploads
from ..scores.builtin import SCORES
from .excerpt import texts_table
from .keys import keys_of, other_settings, parts_of
from .result import SELECTION_FILE, Selection
from .warnings import pool_warnings, selection_warning


logger = logging.getLogger(__name__)

_PACKAGES = ("trl-learnalign", "trl", "transformers", "peft", "accelerate", "datasets", "torch")


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


def forget_measures(host: Host) -> None:
    """Deletes what the last selection of a run measured; for when a checkpoint holds its result."""
    if host.accelerator.is_local_main_process:
        for path in scratch(Path(host.args.output_dir) / "learnalign").glob("step-*"):
            shutil.rmtree(path, ignore_errors=True)


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
        self.score = config.ranking()
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

    def run(self, write_page: Callable[[Path, int], Path] | None = None) -> Selection:
        """
        Make the selection, or find it finished, and say what came of it. All processes must call this.

        Args:
            write_page (`Callable`, *optional*): writes the page about the selections of a directory up to an optimizer
                step, and returns its path. It is called on the main process while the directory is locked, unless
                `write_report=False`. Without it there is no page.
        """
        lock = None
        try:
            with self.peers:
                if self.accelerator.is_main_process:
                    lock = DirectoryLock(self.path.parent)
                    warn_of_uploads(self.host.trainer, self.config)
                selection = self._run()
                report = self._report(write_page)
        finally:
            self.host.note_functions()
            if lock is not None:
                lock.release()
        if self.accelerator.is_main_process:
            if self.reused:
                tqdm.write(f"Used again: {_REUSED.format(self.path, selection.provenance.get('made', 'unknown'))}")
            tqdm.write(selection.summary())
            for warning in filter(None, (selection_warning(selection), *pool_warnings(selection))):
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
        self.make_keys()
        self.provenance |= {"key": self.keys["selection"], "made_from": self.parts["selection"]}
        found = self._finished()
        self.reused = found is not None
        if self.reused:
            return found
        if self.accelerator.is_main_process and (unknown := self.host.unidentified()):
            logger.warning(
                f"{'; '.join(unknown)}: LearnAlign cannot tell whether that is the same another time, so a selection "
                "that is interrupted starts again, and nothing that was measured is used twice."
            )
        return self._scored()

    def _finished(self):
        """A finished selection with the same key."""
        found = None
        if self.accelerator.is_main_process and (self.path / SELECTION_FILE).is_file():
            try:
                found = Selection.load(self.path)
            except (OSError, ValueError):
                found = None
            if found is not None and found.provenance.get("key") != self.provenance["key"]:
                other, made = (
                    other_settings(found.provenance, self.provenance),
                    found.provenance.get("made", "unknown"),
                )
                tqdm.write(f"Will be replaced: {_REPLACED.format(self.path, other, made)}")
                found = None
            elif self.score.code is not None:
                found = None  # what a function of the user's returns may depend on anything
        found = self.peers.broadcast(found)
        if found is not None:
            self._tidy_up()
        return found

    def _scored(self):
        self._make_room()
        log = self.open_log("rollouts")
        with self.host.left_as_found(self.num_rollouts):
            target = self._rolled_out_target() if self.target is not None else None
            started = time.perf_counter()
            own = roll_out(self, self.dataset, self.pool, log)
            self.clock("rollouts", started)
            pool = self.gather_rewards(own)
            self.provenance |= pool.provenance()
            align = GradientAlignments(self, own, pool, target) if "gradients" in self.score.requires else None
            selection = self._choose(pool.table(), align)
        self._publish(selection, own, pool)
        return selection

    def _rolled_out_target(self) -> Target:
        """Of few prompts, so before the pool. Without a learnable one the selection is made by learnability."""
        started = time.perf_counter()
        target = roll_out_target(self)
        self.clock("target rollouts", started)
        self.provenance["target"] = {"num_rows": len(self.target), "learnable": len(target.learnable), "without": []}
        if not target.learnable:
            self.score = SCORES["learnability"]
            self.provenance |= {"measures": list(self.score.requires)}
            self.provenance["target"]["instead"] = "learnability"
            if self.accelerator.is_main_process:
                logger.warning(
                    f"No prompt of `target_dataset` is learnable: all {len(self.target)} were always or never solved, "
                    "or could not be scored, so the target has no gradient, and this selection is made by "
                    "`learnability` instead. For the next one resume with `reselect_every`, and with more "
                    "`num_rollouts` or other target prompts; or warm up longer in a new run."
                )
        return target

    # Measures ---------------------------------------------------------------------------------------------------

    @property
    def path_of_measures(self) -> Path:
        """The directory of what is measured at this step."""
        return scratch(self.path.parent) / self.path.name

    def make_keys(self) -> None:
        """What a selection and its measures are made from, and their keys. All processes must call this."""
        self.peers.wait()  # before the collective operations of sharded weights
        weights = self.host.weights_digest()
        self.parts = self.peers.broadcast(parts_of(self, weights))
        self.keys = keys_of(self.parts)

    def open_log(self, measure: str) -> Log:
        """The log of a measure, as far as it was made under the same key. All processes must call this."""
        path, parts = self.path_of_measures / measure, self.parts[measure]
        return open_log(path, self.keys[measure], self.accelerator, self.peers, parts)

    def _make_room(self):
        """Deletes what was measured at other steps, and by earlier versions."""
        if self.accelerator.is_local_main_process:
            for path in self.path_of_measures.parent.glob("step-*"):
                if path != self.path_of_measures or (path / "manifest.json").exists():
                    shutil.rmtree(path, ignore_errors=True)
        self.peers.wait()

    def gather_rewards(self, own: Rollouts) -> Pool:
        """What the rollouts of all processes found out, on every process."""
        columns = own.rows, own.rewards, own.penalties, own.lengths, own.trained
        gathered = zip(*self.peers.gather(columns), strict=True)
        return Pool.of_rewards(
            *(torch.from_numpy(np.concatenate(parts)) for parts in gathered), self.config, self.host
        )

    # Choice and files -------------------------------------------------------------------------------------------

    def _choose(self, table, align=None) -> Selection:
        dataset, stage = self.host.dataset, self.provenance["stage"]
        ranked = rank(self.score, table, dataset, align)
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
            shutil.rmtree(rollouts_of(self.path), ignore_errors=True)
        self.peers.wait()
        if own is not None and self.config.save_rollouts:
            make_directory(rollouts_of(self.path))
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            name = "rollouts.parquet" if world == 1 else f"rollouts-{rank:05d}-of-{world:05d}.parquet"
            save_shard(rollouts_of(self.path) / name, own, pool)
        self.peers.wait()

    def _report(self, write_page) -> Path | None:
        """Write the page, if there is one. A failure to write it does not end the run."""
        if write_page is None or not (self.accelerator.is_main_process and self.config.write_report):
            return None
        try:
            return write_page(self.path.parent, self.step)
        except Exception as error:
            logger.warning(
                f"The report about the selection could not be written ({error!r}). The selection itself is complete; "
                f"`trl-learnalign report {self.path.parent}` tries again."
            )

    def _tidy_up(self):
        """
        Deletes what was measured, on every node, unless another score may use it, or a resumed run, which computes a
        score of the user's own again.
        """
        if self.accelerator.is_local_main_process and not self.keep_measures and self.score.code is None:
            shutil.rmtree(self.path_of_measures, ignore_errors=True)
        self.peers.wait()

    # Small things -----------------------------------------------------------------------------------------------

    def clock(self, phase: str, started: float) -> None:
        """Notes the seconds that a phase took."""
        self.seconds[phase] = round(time.perf_counter() - started, 3)


_REUSED = (
    "'{}' holds this selection already, from the same policy, rows, rewards and settings (made: {}). Its times are "
    "those of that run. To select again, delete that directory or pass another `output_dir`."
)
_REPLACED = (
    "'{}' holds a selection from other {} (made: {}). To keep it, stop here and move that directory, or pass another "
    "`output_dir`."
)
