"""A selection, phase by phase: measures, score, choice, files."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from ..choice.table import draw_pool, load_target, rank, scores_table
from ..config import LearnAlignConfig
from ..data.columns import candidate_rows, row_index
from ..data.prompts import equal_prompts
from ..data.rows import dataset_fingerprint
from ..ground.disk import DirectoryLock, make_directory, rollouts_of, scratch
from ..ground.hashing import stable_hash
from ..ground.peers import Peers
from ..ground.store import Log, open_log
from ..ground.user_code import is_ours
from ..host import Host
from ..measures.base import Context, Finding
from ..measures.contract import check_finding
from ..measures.policies import check_policies
from ..measures.registry import MEASURES, needed, prices
from ..measures.rollouts import RolledOut
from ..measures.shards import save_shard
from ..run.uploads import warn_of_uploads
from ..scores.builtin import SCORES, diverse, score_name
from .checks import check_selection, stages_on
from .excerpt import texts_table
from .keys import keys_of, other_settings, parts_of
from .result import SELECTION_FILE, Selection
from .warnings import pool_warnings, selection_warning
from .words import chosen_by


logger = logging.getLogger(__name__)

_PACKAGES = ("trl-learnalign", "trl", "transformers", "peft", "accelerate", "datasets", "torch")


def checked_run(host: Host, config: LearnAlignConfig, stage: int, keep_measures: bool = False) -> "SelectionRun":
    """
    Check and prepare a selection. An error that one process alone finds, such as a file that its node lacks, ends all.
    """
    with Peers(host.accelerator) as peers:
        host.check(config)
        check_selection(host, config)
        if host.is_sharded and host.trainer.optimizer is None:
            raise ValueError(
                "FSDP and DeepSpeed shard the weights when training starts, so nothing can be selected before. Use "
                "`LearnAlignSampler` with `warmup_prompts=0`, or launch this script with DDP."
            )
        check_policies(host, config, now=True)
        run = SelectionRun(host, config, stage, keep_measures)
        peers.wait()
    return run


def forget_measures(host: Host) -> None:
    """Delete what the last selection of a run measured, once a checkpoint holds its result."""
    if host.accelerator.is_local_main_process:
        for path in scratch(Path(host.args.output_dir) / "learnalign").glob("step-*"):
            shutil.rmtree(path, ignore_errors=True)


class SelectionRun:
    """The state of one selection, phase by phase."""

    def __init__(self, host: Host, config, stage, keep_measures=False, above: "SelectionRun | None" = None):
        trainer = host.trainer
        self.host = host
        self.config = config
        self.accelerator = host.accelerator
        self.step = trainer.state.global_step
        self.seed = config.selection_seed if config.selection_seed is not None else trainer.args.seed
        self.keep_measures = keep_measures
        self.score = config.ranking()
        self.above = above  # the selection that this one chooses candidates for
        self.stages = stages_on(host.dataset, config)
        self.pool: Sequence[int] = candidate_rows(host.dataset, config) if above is None else above.pool
        if not self.stages:
            size = cast("int | None", config.candidate_prompts)
            self.pool = draw_pool(self.pool, size, stable_hash(self.seed, "pool", stage))
        self.path = Path(host.args.output_dir) / "learnalign" / f"step-{self.step:06d}"
        self.equal = equal_prompts(host.dataset) if config.deduplicate else None
        self.seconds: dict[str, float] = {}
        self._clocked = 0  # calls of `clock`
        self.reused = False
        self.peers: Peers = Peers(self.accelerator) if above is None else above.peers
        self.context = Context(
            host=host,
            peers=self.peers,
            config=config,
            score=self.score,
            seed=self.seed,
            step=self.step,
            dataset=host.visible(),
            open_log=self.open_log,
            clock=self.clock,
            note=self.note,
            prices=prices(self.score.requires),
            target=load_target(host.dataset, config),
        )
        model: Any = host.model.config
        self.provenance: dict[str, Any] = {
            "config": config.to_dict(),
            "seed": self.seed,
            "global_step": self.step,
            "stage": stage,
            "num_rollouts": self.context.num_rollouts,
            "measures": list(self.score.requires),
            "dataset_fingerprint": dataset_fingerprint(host.dataset),
            "num_rows": len(host.dataset),
            # Not the name of its class, which FSDP2 changes
            "model": model._name_or_path or model.model_type,
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

    def _run(self) -> Selection:
        self._choose_candidates()
        untouched: AbstractContextManager = nullcontext()
        if self.context.prices:
            self.make_keys()
            self.provenance |= {"key": self.keys["selection"], "made_from": self.parts["selection"]}
            found = self._finished()
            self.reused = found is not None
            if found is not None:
                return found
            self._warn_of_unknown()
            self._make_room()
            generates = "rollouts" in self.context.prices or "gradients" in self.context.prices
            untouched = self.host.left_as_found(self.context.num_rollouts if generates else None)
        with untouched:
            self._measure()
            selection = self._chosen()
        self._publish(selection)
        return selection

    def _choose_candidates(self) -> None:
        """Make the selections by `candidate_score`, each from the prompts that the one before has left."""
        if self.stages:
            self.note({"candidates": [self._candidates(*stage) for stage in enumerate(self.stages, 1)]})

    def _candidates(self, number, config) -> dict:
        """Leave the prompts of one choice. Its tables, of all prompts, are gone before the next one begins."""
        run = SelectionRun(self.host, config, self.provenance["stage"], self.keep_measures, self)
        run.path = self.path / f"candidates-{number}"
        found, name = run._run(), score_name(config.score)
        if not found.indices:
            raise ValueError(
                f"`candidate_score` {name!r} gave none of {len(self.pool)} prompts a number, so there are no "
                "candidates. Correct the score, or the column that it reads."
            )
        spent = round(sum(found.provenance["seconds"].values()), 3)
        price = (prices(config.measures) or ["none"])[-1]
        counts = {"prompts": len(self.pool), "kept": len(found.indices)}
        if price != "none":
            self.seconds[f"candidates {chosen_by(found)}"] = spent
        self.pool = sorted(found.indices)
        return {"score": name, "price": price, **counts, "seconds": spent}

    def _warn_of_unknown(self):
        if self.accelerator.is_main_process and (unknown := self.host.unidentified()):
            logger.warning(
                f"{'; '.join(unknown)}: LearnAlign cannot tell whether that is the same another time, so a selection "
                "that is interrupted starts again, and nothing that was measured is used twice."
            )

    def _finished(self):
        """Return a finished selection with the same key."""
        found = None
        if self.accelerator.is_main_process and (self.path / SELECTION_FILE).is_file():
            try:
                found = Selection.load(self.path)
            except (OSError, ValueError):
                found = None
            if found is not None and found.provenance.get("key") != self.provenance["key"]:
                other = other_settings(found.provenance, self.provenance)
                made = found.provenance.get("made", "unknown")
                tqdm.write(f"Will be replaced: {_REPLACED.format(self.path, other, made)}")
                found = None
            elif self.has_own_code or (found is not None and _fell_back_outside(found)):
                found = None  # what a function of the user's returns may depend on anything
        found = self.peers.broadcast(found)
        if found is not None:
            self._tidy_up()
        return found

    # Measures ---------------------------------------------------------------------------------------------------

    @property
    def has_own_code(self) -> bool:
        """Tell whether a function of the user's ranks, which may depend on anything."""
        return any(score.code is not None for score in (self.score, *(stage.ranking() for stage in self.stages)))

    @property
    def path_of_measures(self) -> Path:
        """The directory of what is measured at this step."""
        if self.above is not None:
            return self.above.path_of_measures / self.path.name
        return scratch(self.path.parent) / self.path.name

    def make_keys(self) -> None:
        """Find the parts that a selection and its measures are made from, and their keys. All processes must call."""
        self.peers.wait()  # before the collective operations of sharded weights
        weights = self.host.weights_digest()
        parts = parts_of(self.context, self.pool, needed(self.score.requires), weights, self.provenance["stage"])
        self.parts = self.peers.broadcast(parts)
        self.keys = keys_of(self.parts)

    def open_log(self, measure: str) -> Log:
        """Open the log of a measure, as far as it was made under the same key. All processes must call this."""
        path, parts = self.path_of_measures / measure, self.parts[measure]
        return open_log(path, self.keys[measure], self.accelerator, self.peers, parts)

    def _measure(self) -> None:
        """Run the measures that the score needs, each with the findings of those before."""
        while (name := self._next()) is not None:
            measure, started, clocked = MEASURES[name], time.perf_counter(), self._clocked
            log = None if measure.price == "none" else self.open_log(name)
            finding = measure.run(self.context, self.pool, log)
            if measure.price != "none" and self._clocked == clocked:
                self.clock(name.replace("-", " "), started)
            check_finding(measure, finding, self.context.found, self.pool)
            if finding.instead is not None:
                self._rank_instead(measure, finding.instead, finding.reason)
            found: dict[str, Finding] = {**self.context.found, name: finding}
            self.context = replace(self.context, score=self.score, found=found)

    def _rank_instead(self, measure, score, reason):
        """Rank by another score. It needs nothing that the first did not need: checks and keys were made for that."""
        if score not in SCORES:
            raise ValueError(
                f"The measure {measure.name!r} asks to rank by {score!r} instead, but the scores are: "
                f"{', '.join(SCORES)}. Correct the name."
            )
        known = {one.name for one in needed(self.config.ranking().requires)}
        if missing := [one.name for one in needed(SCORES[score].measures) if one.name not in known]:
            raise ValueError(
                f"The measure {measure.name!r} asks to rank by {score!r} instead, which needs {', '.join(missing)}, "
                f"but {score_name(self.config.score)} does not need that. Add it to the `requires` of that score, or "
                "name a score that needs less."
            )
        self.score = self.config.with_groups(diverse(SCORES[score], self.config.diversity))
        about = {"score": score, "reason": reason or f"the measure {measure.name!r} asked for it"}
        self.provenance |= {"measures": list(self.score.requires), "instead": about}

    def _next(self) -> str | None:
        names = [measure.name for measure in needed(self.score.measures)]
        return next((name for name in names if name not in self.context.found), None)

    def _make_room(self):
        """Delete what was measured at other steps."""
        if self.accelerator.is_local_main_process:
            for path in self.path_of_measures.parent.glob("step-*"):
                if path != self.path_of_measures:
                    shutil.rmtree(path, ignore_errors=True)
        self.peers.wait()

    # Choice and files -------------------------------------------------------------------------------------------

    def _chosen(self) -> Selection:
        """Join what was measured, rank and choose."""
        dataset, stage, found = self.host.dataset, self.provenance["stage"], self.context.found
        table = pd.DataFrame(index=row_index(self.pool))
        measured: list[str] = []
        for measure in needed(self.score.requires):
            if (part := found[measure.name].table) is not None:
                table = table.join(part, how="inner")
                measured += measure.columns
        self.provenance["unscorable"] = np.setdiff1d(self.pool, table.index, assume_unique=True).tolist()
        columns = found["columns"].table if "columns" in found else None
        ranked = rank(self.score, table, columns, found.get("gradients"))
        # With all scores equal the ties are the choice
        seed = stable_hash(self.seed, "random" if self.score.at_random else "ties", stage)
        scores = scores_table(table, ranked, dataset, self.config, seed, measured)
        selection = Selection([], scores, self.provenance | {"seconds": dict(self.seconds)})
        # Scores may differ in the last bit between processes
        return self.peers.broadcast(selection.chosen(self.equal))

    def _publish(self, selection):
        rolled_out = self.context.found.get("rollouts")
        own = rolled_out.own if isinstance(rolled_out, RolledOut) else None
        texts = None
        if self.above is None:
            texts = texts_table(self.host, self.context.dataset, selection, own, self.peers)
        self._save_rollouts(rolled_out)
        if self.accelerator.is_main_process:
            selection.save(self.path, texts)
        self.peers.wait()
        self._tidy_up()

    def _save_rollouts(self, rolled_out):
        """Write a file of each process. Those of a selection that this one replaces are deleted."""
        if self.accelerator.is_local_main_process:
            shutil.rmtree(rollouts_of(self.path), ignore_errors=True)
        self.peers.wait()
        if rolled_out is not None and self.config.save_rollouts:
            make_directory(rollouts_of(self.path))
            world, rank = self.accelerator.num_processes, self.accelerator.process_index
            name = "rollouts.parquet" if world == 1 else f"rollouts-{rank:05d}-of-{world:05d}.parquet"
            save_shard(rollouts_of(self.path) / name, rolled_out.own, rolled_out.pool)
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
            return None

    def _tidy_up(self):
        """
        Delete what was measured, on every node, unless another score may use it, or a resumed run, which computes a
        score of the user's own again.
        """
        if self.accelerator.is_local_main_process and not self.keep_measures and not self.has_own_code:
            shutil.rmtree(self.path_of_measures, ignore_errors=True)
        self.peers.wait()

    # Small things -----------------------------------------------------------------------------------------------

    def clock(self, phase: str, started: float) -> float:
        """Note the seconds that a phase took."""
        self._clocked += 1
        self.seconds[phase] = round(time.perf_counter() - started, 3)
        return self.seconds[phase]

    def note(self, about: dict) -> None:
        """Add to the provenance."""
        self.provenance |= about


def _fell_back_outside(selection) -> bool:
    """Tell whether a selection fell back to a score from outside the package, whose code its key does not have."""
    score = SCORES.get(selection.provenance.get("instead", {}).get("score"))
    return "instead" in selection.provenance and (score is None or not is_ours(score.rank))


_REUSED = (
    "'{}' holds this selection already, from the same policy, rows, rewards and settings (made: {}). Its times are "
    "those of that run. To select again, delete that directory or pass another `output_dir`."
)
_REPLACED = (
    "'{}' holds a selection from other {} (made: {}). To keep it, stop here and move that directory, or pass another "
    "`output_dir`."
)
