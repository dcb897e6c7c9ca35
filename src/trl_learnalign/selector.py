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
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer

from .advice import selection_warning
from .alignments import GradientAlignments
from .audit import rollouts_table, texts_table
from .config import FREE_ON_RESUME, LearnAlignConfig
from .disk import DirectoryLock, make_directory, scratch
from .groups import Group, deal
from .host import Host, find_host
from .journal import Journal
from .parts import generate_in_parts, prompts_per_batch, rollouts_at_once
from .peers import Peers
from .pool import Pool, candidate_rows, dataset_columns, draw_pool, load_target, scores_table
from .progress import progress_bar
from .projection import stable_hash
from .prompts import equal_prompts
from .rewards import source_of
from .scores import find_score
from .selection import ROLLOUTS_FILE, SELECTION_FILE, Selection, dataset_fingerprint


logger = logging.getLogger(__name__)

_PACKAGES = ("trl-learnalign", "trl", "transformers", "peft", "accelerate", "datasets", "torch")


def select_prompts(trainer: Trainer, config: LearnAlignConfig | None = None) -> Selection:
    r"""
    Scores the prompts of a trainer's dataset with the policy as it is, and selects the best. Nothing is trained, and
    the trainer's state does not change.

    With several processes every process must call this; all get the same selection. One line about it is printed, and
    its files, with a report, are left in `OUTPUT_DIR/learnalign/step-{global_step:06d}/` (see docs/files.md). A selection there that was made
    from the same weights, data, rewards and settings is reused, and an interrupted
    one is finished.

    Args:
        trainer ([`~trl.GRPOTrainer`] or [`~trl.RLOOTrainer`]): supplies the policy, the prompts, the generation and the rewards.
        config ([`LearnAlignConfig`], *optional*): defaults to the paper's settings.

    Returns:
        [`Selection`]: `host.dataset.select(selection.indices)` are the chosen prompts. Empty if no prompt
        is learnable.

    Raises:
        `ValueError`: see [`Host.check`] and [`UnseenParametersError`]; or weights sharded before training.
    """
    return select_at_stage(trainer, config if config is not None else LearnAlignConfig(), stage=0)


def select_at_stage(trainer: Trainer, config: LearnAlignConfig, stage: int) -> Selection:
    """[`select_prompts`], with the number of selections before this one in a staged run."""
    host = find_host(trainer)
    host.check(config)
    if host.is_sharded and trainer.optimizer is None:
        raise ValueError(
            "FSDP and DeepSpeed shard the weights when training starts, so nothing can be selected before. Use "
            "`LearnAlignSampler` with `warmup_prompts=0`, or launch this script with DDP."
        )
    return SelectionRun(host, config, stage).run()


class SelectionRun:
    """The state of one selection, phase by phase."""

    def __init__(self, host: Host, config, stage):
        trainer = host.trainer
        self.host = host
        self.config = config
        self.accelerator = host.accelerator
        self.step = trainer.state.global_step
        self.seed = config.selection_seed if config.selection_seed is not None else trainer.args.seed
        self.num_rollouts = config.num_rollouts or host.group_size
        self.dataset = host.visible()
        self.score = find_score(config.score, config.score_measures)
        rows = candidate_rows(host.dataset, config)
        self.pool = draw_pool(rows, config.candidate_prompts, stable_hash(self.seed, "pool", stage))
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
            self._publish(selection, [])
            return selection
        self.provenance["key"] = self._key()
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
        self.journal = self.open_journal(self._journal_path())
        with self.host.left_as_found(self.num_rollouts):
            started = time.perf_counter()
            own = self.roll_out(self.dataset, self.pool, self.journal)
            self.clock("rollouts", started)
            pool = self.gather_rewards(own)
            self.provenance |= {"unscorable": pool.unscorable, "reward_range": pool.reward_range()}
            align = GradientAlignments(self, own, pool) if "gradients" in self.score.requires else None
            selection = self._choose(pool.table(), align)
        saved = rollouts_table(own, pool, self.peers) if self.config.save_rollouts else None
        self._publish(selection, own, saved)
        return selection

    def open_journal(self, path: Path) -> Journal:
        """The journal in a directory, which is made where it is missing. All processes must call this."""
        # The other nodes come second; they have work only if they have their own disks
        for mine in (self.accelerator.is_main_process, self.accelerator.is_local_main_process):
            journal = Journal(path, self.provenance["key"], mine)
            self.peers.wait()
        make_directory(path)  # in a dry run, where each process has one
        return journal

    # Rollouts ---------------------------------------------------------------------------------------------------

    def roll_out(self, dataset: Dataset, rows: list[int], journal: Journal, phase: str = "rollouts") -> list[Group]:
        """
        This process's groups of these rows of a dataset. The batches do not depend on the number of processes, and each has its own
        seed; batch b goes to process b % world. All processes generate in the same rounds, as rewards are gathered.
        """
        size = prompts_per_batch(self.host, self.num_rollouts)
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        sharing = self.host.sharing
        groups = []
        bar = progress_bar(self.host, phase, len(rows), "prompts")
        for first in range(0, len(batches), world):
            # Rewards are gathered, so every process must bring equally many prompts; the last batch is filled up even on
            # one process, so that its rollouts do not depend on the number of processes
            batch, seed_of, mine = deal(batches, first, rank, sharing)
            shape = self.num_rollouts, len(self.host.reward_names)
            done = journal.load_groups(batch, shape) if mine else None
            if not all(self.peers.gather(done is not None or not mine)):
                padded = batch + [batch[0]] * (min(size, len(rows)) - len(batch))
                seed = stable_hash(self.seed, phase, self.step, seed_of[0])
                gradients = "gradients" in self.score.requires
                fresh = generate_in_parts(self.host, dataset, padded, seed, gradients, self.peers)
                fresh = fresh[: len(batch)]
                if done is None and mine:
                    done = fresh
                    journal.save_groups(done)
            if mine:
                if not self.config.save_rollouts:
                    for group in done:
                        group.completions = []  # the tokens are enough
                groups += done
            bar.update(sum(len(batch) for batch in batches[first : first + world]))
        bar.close()
        return groups

    def gather_rewards(self, own: list[Group]) -> Pool:
        """What the rollouts of all processes found out, on every process."""
        num_rewards = len(self.host.reward_names)
        columns = (
            np.array([group.index for group in own], dtype=np.int64),
            np.array([group.rewards for group in own], np.float32).reshape(-1, self.num_rollouts, num_rewards),
            np.array([group.penalties for group in own], np.float32).reshape(-1, self.num_rollouts),
            np.array([[len(ids) for ids in group.completion_ids] for group in own]).reshape(-1, self.num_rollouts),
        )
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
        return self.peers.broadcast(
            selection.chosen(self.equal)
        )  # scores may differ in the last bit between processes

    def _publish(self, selection, own, saved=None):
        texts = texts_table(self.host, self.dataset, selection, own, self.peers)
        if self.accelerator.is_main_process:
            if saved is None:  # it is of a selection that this one replaces
                (self.path / ROLLOUTS_FILE).unlink(missing_ok=True)
            selection.save(self.path, saved, texts)
        self.peers.wait()
        self._tidy_up()

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

    def _journal_path(self):
        return scratch(self.path.parent) / self.path.name

    def _tidy_up(self):
        """Deletes what a finished selection no longer needs, on every node."""
        if self.accelerator.is_local_main_process:
            shutil.rmtree(self._journal_path(), ignore_errors=True)
        self.peers.wait()

    # Small things -----------------------------------------------------------------------------------------------

    def _key(self) -> str:
        """A hash of everything that a selection is made from: equal keys mean equal selections."""
        made_from = {name: self.provenance[name] for name in _KEY_FIELDS}
        made_from["config"] = {name: value for name, value in made_from["config"].items() if name not in _NOT_IN_KEY}
        made_from["prompts_per_batch"] = prompts_per_batch(self.host, self.num_rollouts)
        if self.target is not None:
            made_from["target"] = dataset_fingerprint(self.target)
        made_from["score"] = None if self.score.code is None else source_of(self.score.code)
        made_from["rollouts_at_once"] = rollouts_at_once(self.host, self.num_rollouts)
        made_from |= self.host.identity()
        self.peers.wait()  # before the collective operations of sharded weights
        made_from["weights"] = self.host.weights_digest()
        digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()
        return self.peers.broadcast(digest)

    def clock(self, phase: str, started: float) -> None:
        """Notes the seconds that a phase took."""
        self.seconds[phase] = round(time.perf_counter() - started, 3)


_REUSED = (
    "'{}' holds this selection already, from the same weights, data, rewards and settings (made: {}). Its times are "
    "from then. To select again, delete that directory or pass another `output_dir`."
)
_REPLACED = (
    "'{}' holds a selection from other weights, data, rewards or settings (made: {}). To keep it, stop here and move that "
    "directory, or pass another `output_dir`."
)
_NOT_IN_KEY = set(FREE_ON_RESUME) - {"save_rollouts"}  # which the files of a selection depend on
_KEY_FIELDS = ("config", "seed", "global_step", "stage", "num_rollouts", "dataset_fingerprint", "num_rows", "model")
