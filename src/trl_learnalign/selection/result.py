"""The result of a selection: the chosen prompts, their scores, and what it was made from."""

import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset

from ..choice.choose import choose
from ..data.rows import dataset_fingerprint
from ..ground.disk import digest, make_directory, write_json, write_parquet
from . import words
from .warnings import too_few


if TYPE_CHECKING:
    import matplotlib.figure
    import pandas

SCORES_FILE = "scores.parquet"
SELECTION_FILE = "selection.json"
TEXTS_FILE = "texts.parquet"
FORMAT_VERSION = 1
SCORE_COLUMNS = ("learnalign_score", "success_rate")


@dataclass
class Selection:
    r"""
    Chosen prompts and their provenance.

    Attributes:
        indices (`list[int]`):
            Rows of the training dataset that were chosen, best first: `dataset.select(selection.indices)`.
        scores (`pyarrow.Table`):
            A row per scored prompt, by dataset index. `success_rate` is the share of successful rollouts in [0, 1];
            `learnability` V in [0, .25]; `alignment` the cosine of the prompt's gradient with the mean of all, in
            [-1, 1]; `score` what was ranked on; `rank` starts at 0; `completion_length_mean` is in tokens;
            `gradient_norm` is the norm of the gradient feature. A column that the configured score does not need is
            null; so are `alignment` and `gradient_norm` of a prompt with V = 0, whose gradient is not computed.
        provenance (`dict`):
            `config`, `seed`, `global_step`, `stage`, `num_rollouts`, `dataset_fingerprint`, `num_rows`, `model`,
            `versions`, `num_processes`, `made` (when, in UTC), `seconds` (of each phase), `unscorable` (indices that
            could not be measured; with rollouts, that no reward function could score), with `deduplicate` the
            `duplicates` (indices left out for a better-ranked row of the same prompt), with `candidate_score` the
            `candidates` (of each score its `price`, the `prompts` that it chose from, and how many it `kept`), with
            `rollouts="racing"` the `race` (of each round prompts and rollouts of each; `rollouts` made `of` all; the
            `prior`), and, unless prompts were chosen
            at random, `reward_range` (the least and the greatest reward that decides success), `key` (a hash of all
            that the selection was made from) and `cost`: tokens rolled out, in gradient rows, and computed with
            padding; `of_rollouts`, the time of gradients and scores divided by that of the rollouts; `floor`, an
            estimate of the least that this ratio can be: a plain forward and backward over the gradient rows, if
            generating a token costs as much as one forward over it (2 x the gradient rows' share of the tokens, 3 x
            with a KL term).
    """

    indices: list[int]
    scores: pa.Table
    provenance: dict = field(default_factory=dict)

    def save(self, path: str | os.PathLike, texts: pa.Table | None = None) -> Path:
        """
        Write `scores.parquet` and `selection.json` (and `texts.parquet`) into the directory `path`.

        Every file is written under a temporary name and renamed; `selection.json` comes last, so that a directory
        which has it is complete.
        """
        path = Path(path)
        make_directory(path)
        write_parquet(path / SCORES_FILE, self.scores)
        if texts is not None:
            write_parquet(path / TEXTS_FILE, texts)
        document = {
            "format_version": FORMAT_VERSION,
            "indices": self.indices,
            "scores_sha256": hashlib.sha256((path / SCORES_FILE).read_bytes()).hexdigest(),
            "provenance": self.provenance,
        }
        write_json(path / SELECTION_FILE, document | {"sha256": digest(document)})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Selection":
        """
        Read what [`~Selection.save`] wrote.

        Raises:
            `FileNotFoundError`: `path` holds no finished selection.
            `ValueError`: a file is damaged or of another format.
        """
        path = Path(path)
        if not (path / SELECTION_FILE).is_file() or not (path / SCORES_FILE).is_file():
            raise FileNotFoundError(
                f"'{path}' holds no finished selection: {SELECTION_FILE} and {SCORES_FILE} are expected. Pass the "
                "directory of one selection, such as OUTPUT_DIR/learnalign/step-000038."
            )
        try:
            document = json.loads((path / SELECTION_FILE).read_text(encoding="utf-8"))
            scores_bytes = (path / SCORES_FILE).read_bytes()
            version = document["format_version"]
            if version != FORMAT_VERSION:
                raise ValueError(f"it has format {version!r}, but this version reads format {FORMAT_VERSION}")
            if document.pop("sha256") != digest(document):
                raise ValueError(f"{SELECTION_FILE} does not agree with its checksum")
            if document["scores_sha256"] != hashlib.sha256(scores_bytes).hexdigest():
                raise ValueError(f"{SCORES_FILE} is not the one that {SELECTION_FILE} was written with")
            scores = pq.read_table(pa.BufferReader(scores_bytes))
            indices, provenance = document["indices"], document["provenance"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError, pa.ArrowException) as error:
            raise ValueError(
                f"The selection in '{path}' cannot be used: {error}. Delete it and select again."
            ) from error
        return cls(indices=indices, scores=scores, provenance=provenance)

    def to_dataset(self, dataset: Dataset, with_scores: bool = False) -> Dataset:
        """
        Return the chosen rows of the dataset that the selection was made from, best first; with `with_scores` also the
        columns `learnalign_score` and `success_rate`.

        Raises:
            `ValueError`: `dataset` has other rows than that, or the same in another order; or it has those columns.
        """
        if (
            len(dataset) != self.provenance["num_rows"]
            or dataset_fingerprint(dataset) != self.provenance["dataset_fingerprint"]
        ):
            raise ValueError(
                "The dataset is not the one that the selection was made from: it has other rows, or the same in "
                f"another order ({len(dataset)} rows; the selection was made from {self.provenance['num_rows']}). "
                "Load that one, or select again."
            )
        rows = dataset.select(self.indices)
        if not with_scores:
            return rows
        check_score_columns(dataset)
        table = self.to_pandas().loc[self.indices]
        for name, column in zip(SCORE_COLUMNS, ("score", "success_rate"), strict=True):
            rows = rows.add_column(name, [None if value != value else value for value in table[column].astype(float)])
        return rows

    def export(
        self,
        dataset: Dataset,
        path: str | os.PathLike,
        kind: str,
        answer_column: str | None = None,
        source: str = "learnalign",
        split: str = "train",
    ) -> Path:
        """
        Write the chosen rows, best first, for another trainer.

        - `"verl"` (its docs/preparation/prepare_data.rst): parquet with `data_source`, `prompt` (messages; a text
          becomes one of the user), `ability`, `reward_model` (`style`, `ground_truth`) and `extra_info` (`index`,
          `split`). Columns `data_source` and `ability` of the dataset are taken where it has them.
        - `"openrlhf"` (its README, openrlhf/datasets/prompts_dataset.py): JSON lines with `prompt`, `label` and
          `datasource`, for `--data.input_key prompt --data.label_key label`.
        - `"slime"` (its docs/en/get_started/usage.md, slime/utils/data.py): JSON lines with `prompt`, `label` and
          `metadata`, for `--input-key prompt --label-key label`.

        Answers are texts, others than texts in JSON. `learnalign_score` and `success_rate` are in `extra_info`, in
        `metadata`, or beside the prompt.

        Args:
            dataset (`Dataset`): that the selection was made from.
            path (`str` or `PathLike`): the file: `.parquet` for verl, else `.jsonl`, by which they know its kind.
            kind (`str`): the trainer.
            answer_column (`str`, *optional*): column of the right answers, or a field such as `extra.answer`. By
                default that of the configuration.
            source (`str`, *optional*): name of the dataset, by which verl finds the reward function.
            split (`str`, *optional*): name of the split.

        Raises:
            `ValueError`: another dataset, an unknown trainer, no answers, or prompts that cannot be written.
        """
        from .export import export

        answers = answer_column or self.provenance["config"].get("answer_column")
        export(kind, Path(path), self.to_dataset(dataset), self.found(), answers, source, split)
        return Path(path)

    def found(self) -> list[tuple[int, float, float]]:
        """Return the row, the score and the success rate of each chosen prompt, best first; NaN for none."""
        table = self.to_pandas().loc[self.indices, ["score", "success_rate"]].astype(float)
        return list(zip(self.indices, table["score"].tolist(), table["success_rate"].tolist(), strict=True))

    def preference_pairs(self, dataset: Dataset, rollouts: str | os.PathLike) -> Dataset:
        """
        Pair the best with the worst rollout of each chosen prompt, best first: [`preference_pairs`].

        Args:
            dataset (`Dataset`): that the selection was made from.
            rollouts (`str` or `PathLike`): directory of its rollouts,
                `OUTPUT_DIR/_learnalign/rollouts/step-000000`, see `LearnAlignConfig(save_rollouts=True)`.

        Raises:
            `ValueError`: there are no rollouts, or not those of all chosen prompts; or another dataset.
        """
        from .preferences import preference_pairs

        self.to_dataset(dataset)  # refuses another
        return preference_pairs(dataset, rollouts, self.indices)

    def to_pandas(self) -> "pandas.DataFrame":
        """Return the table of scores, best first, with the dataset's indices as its index."""
        return self.scores.to_pandas().sort_values("rank").set_index("index")

    def select(self, num_prompts: int) -> "Selection":
        """
        Choose another number of prompts from the same scores: no rollouts, no gradients. Fewer than `num_prompts`,
        with a warning, if fewer are learnable (with `deduplicate`, each prompt counts once).

        Raises:
            `ValueError`: `num_prompts` is not an integer of at least 1.
        """
        if isinstance(num_prompts, bool) or not isinstance(num_prompts, int) or num_prompts < 1:
            raise ValueError(f"`num_prompts` must be an integer of at least 1, but is {num_prompts!r}.")
        if num_prompts > (most := len(self.eligible())):
            warnings.warn(too_few(self, num_prompts, most), stacklevel=2)
        # The key is of another choice
        provenance = {name: value for name, value in self.provenance.items() if name != "key"}
        provenance["config"] = self.provenance["config"] | {"num_prompts": num_prompts}
        return replace(self._choose(num_prompts), provenance=provenance)

    def chosen(self, equal: np.ndarray | None = None) -> "Selection":
        """
        Choose from these scores as the configuration says.

        Args:
            equal (`np.ndarray` of shape `(N,)`, *optional*): for each row of the dataset a number that is the same for
                equal prompts, of which only the best-ranked may be chosen.
        """
        seen, left_out, provenance = set(), [], self.provenance
        if equal is not None:
            for index in self.eligible().tolist():
                left_out += [index] * (equal[index] in seen)
                seen.add(equal[index])
            provenance = provenance | {"duplicates": sorted(left_out)}
        return replace(self, provenance=provenance)._choose(self.provenance["config"]["num_prompts"])

    def eligible(self) -> np.ndarray:
        """Return the dataset indices of the prompts that may be chosen, best first, of shape `(num_eligible,)`."""
        indices = self.scores["index"].to_numpy()
        may = self.scores["eligible"].to_numpy() & ~np.isin(indices, self.provenance.get("duplicates", []))
        return indices[may][np.argsort(self.scores["rank"].to_numpy()[may])]

    def _choose(self, num_prompts) -> "Selection":
        order = np.argsort(self.scores["rank"].to_numpy())
        indices, groups = self.scores["index"].to_numpy()[order], None
        if "quota_group" in self.scores.column_names:  # a missing value is a group of its own
            values = self.scores["quota_group"].to_pandas()
            groups = pd.factorize(values, sort=True, use_na_sentinel=False)[0][order]
        quota = self.provenance["config"].get("quota", "proportional")
        places = choose(np.arange(len(indices)), np.isin(indices, self.eligible()), num_prompts, groups, quota)
        chosen = indices[places].tolist()
        selected = pc.is_in(self.scores["index"], value_set=pa.array(chosen, pa.int64()))
        scores = self.scores.set_column(self.scores.column_names.index("selected"), "selected", selected)
        return replace(self, indices=chosen, scores=scores)

    def plot(self, dark: bool = False) -> "matplotlib.figure.Figure":
        """Plot success rates, learnability against alignment, and completion lengths of pool and choice."""
        from .figures import plot  # with matplotlib, which nothing else here needs

        return plot(self, dark)

    def num_pool(self) -> int:
        """Count the prompts to choose from: those with a score and those that could not be measured."""
        return self.scores.num_rows + len(self.provenance.get("unscorable", ()))

    def mean_success_rates(self) -> tuple[float, float]:
        """Average the success rates of the pool and of the chosen, in [0, 1]; NaN without rollouts or prompts."""
        return self._means("success_rate")

    def outcomes(self) -> dict[str, tuple[float, float]]:
        """
        Average what the rollouts came to over the pool and over the chosen prompts (NaN without prompts):
        `success_rate`, or, with `learnability="variance"`, where a graded reward need not be a success, `reward_mean`
        and `reward_std`, the standard deviation of a prompt's rewards. Empty without rollouts.
        """
        if "rollouts" not in self.measures:
            return {}
        graded = self.provenance.get("config", {}).get("learnability") == "variance"
        return {name: self._means(name) for name in (("reward_mean", "reward_std") if graded else ("success_rate",))}

    def _means(self, name):
        values, chosen = self.scores[name], self.scores["selected"]
        means = pc.mean(values).as_py(), pc.mean(values.filter(chosen)).as_py()
        return tuple(math.nan if mean is None else mean for mean in means)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of what was measured, such as `"rollouts"` and `"gradients"`; empty if nothing was."""
        return tuple(self.provenance.get("measures", ()))

    def num_learnable(self) -> int:
        """Count the scored prompts with V > 0; 0 without rollouts."""
        return pc.sum(pc.greater(self.scores["learnability"], 0)).as_py() or 0

    def summary(self) -> str:
        """Say in one line: pool, learnable, chosen, mean outcomes, time of each phase, cost of the gradients."""
        return words.summary(self)

    def __repr__(self):
        return words.representation(self)


def find_selections(path: str | os.PathLike) -> list[Path]:
    """
    List the directories of finished selections, oldest first: `path` itself, or those below it, if it is the
    `output_dir` of a run or its `learnalign` directory.

    Raises:
        `FileNotFoundError`: there is none.
    """
    path = Path(path)
    if (path / SELECTION_FILE).is_file():
        return [path]
    for directory in (path / "learnalign", path):
        steps = [step for step in directory.glob("step-*") if (step / SELECTION_FILE).is_file()]
        if steps:
            return sorted(steps, key=lambda step: (len(step.name), step.name))
    raise FileNotFoundError(
        f"'{path}' holds no finished selection. Pass the `output_dir` of a run, its `learnalign` directory, or the "
        "directory of one selection, such as OUTPUT_DIR/learnalign/step-000038."
    )


def check_score_columns(dataset: Dataset) -> None:
    """
    Check that a dataset has room for `SCORE_COLUMNS`.

    Raises:
        `ValueError`: the dataset has a column of one of these names.
    """
    taken = set(SCORE_COLUMNS) & set(dataset.column_names)
    if taken:
        raise ValueError(f"The dataset has columns that the selection adds: {sorted(taken)}. Rename or remove them.")
