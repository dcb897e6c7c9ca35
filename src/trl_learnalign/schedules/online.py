"""The online curriculum as a schedule of a trainer: its features, its rewards, and what is said about it."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..curriculum import OnlineCurriculum, OnlineSettings
from ..curriculum.judge import Judge
from ..curriculum.prior import known_rates, mean_rate
from ..curriculum.report import kind_warnings
from ..data.order import RandomOrder
from ..host.rewards import check_success_reward
from ..measures.feature_file import PromptFeatures
from . import online_words as words
from .base import Describes, LearnsFromGradients, Prepares, Run, Schedule, Ticks, whole_pool
from .prompt_features import (
    check_online,
    eligible_rows,
    hidden_features,
    kinds_by_column,
    known_beforehand,
    rates_beforehand,
    target_rows,
    whole_features,
)


logger = logging.getLogger(__name__)

# Of `score="learnalign"`; `score="learnability"` keeps the greatest p (1 - p)
LEARNALIGN = OnlineSettings(
    utility="deviation", sharpness=4.0, kinds_count=True, least_kind_share=0.5, quick_speed=32.0
)


class OnlineSchedule(Schedule, Ticks, LearnsFromGradients, Describes, Prepares):
    """
    Chooses every prompt by predicted learnability, see [`OnlineCurriculum`]. Uniform draws come in the random order
    that TRL would have.

    Args:
        run ([`Run`]): the run that begins.
        settings ([`OnlineSettings`], *optional*): other settings of the curriculum, for experiments. What a reward
            means is taken from the configuration.

    Attributes:
        curriculum ([`OnlineCurriculum`]): from the beginning of training on.
        pool (`np.ndarray` of shape `(n,)`): rows that may be trained on.
        prior (`np.ndarray` of shape `(N,)`, *optional*): success rates that are known beforehand, NaN where not.
        target (`np.ndarray` of shape `(N,)`, *optional*): rows that the policy should become good at, bool.
        known (`list[str]`): names of what success is predicted from, besides a prompt's own rewards.
        kind_names (`list[str]`, *optional*): names of the kinds of prompts, where `group_column` gives them.
        is_asynchronous (`bool`): whether the trainer generates while it trains.
    """

    compares = True

    def __init__(self, run: Run, settings: OnlineSettings | None = None):
        super().__init__(run)
        config = run.config
        aligned = config.score in ("learnalign", "target")
        usual = LEARNALIGN if aligned else OnlineSettings()
        self.settings = replace(
            usual if settings is None else settings,
            success_threshold=config.success_threshold,
            graded=config.learnability == "variance",
            alignment=aligned,
        )
        self._curriculum: OnlineCurriculum | None = None
        self.prior: np.ndarray | None = None
        self.target: np.ndarray | None = None
        self.known: list[str] = []
        self.kind_names: list[str] | None = None
        self.is_asynchronous = False
        self._hidden: PromptFeatures | None = None
        self._logged = False  # the figures, to the trackers
        self._said = np.zeros(len(words.KINDS), bool)  # kinds of warnings that were given
        self._told_of_target = False  # that it has no gradient
        self._told = np.zeros(0, bool)  # of kinds of prompts: warnings that were given

    @property
    def curriculum(self) -> OnlineCurriculum:
        """The curriculum of the run. Raises a `RuntimeError` before training begins, which looks at the prompts."""
        if self._curriculum is None:
            raise RuntimeError(
                "This online schedule has no curriculum yet: features of the prompts are computed when training "
                "begins. Call `trainer.train()` first."
            )
        return self._curriculum

    @curriculum.setter
    def curriculum(self, curriculum: OnlineCurriculum) -> None:
        self._curriculum = curriculum

    # Setting up -------------------------------------------------------------------------------------------------

    def fit(self, host):
        config, self.is_asynchronous = self.run.config, host.is_asynchronous
        check_success_reward(host.reward_names, config.success_reward, config.learnability)
        check_online(host.dataset, config)
        self.pool = eligible_rows(host.dataset, config)
        self.prior = known_rates(rates_beforehand(host.dataset, config), self.pool, len(host.dataset))
        self.target = target_rows(host.dataset, config, self.pool)
        self.layout = whole_pool(host, len(self.pool))
        return self.layout

    def prepare(self, host, state, peers):
        self.host, self.known = host, known_beforehand(host, self.run.config)
        if state is not None:  # a new run looks at its prompts after its plan was printed
            self._begin(peers, state.get("features_key"))
            self.curriculum.completions = self._read_completions(peers)

    def look(self, host, peers):
        self._begin(peers)

    def _begin(self, peers, features_key=None):
        config, host = self.run.config, self.host
        hidden = hidden_features(host, config, self.layout, self.pool, peers, features_key)
        features, self._hidden = whole_features(host.dataset, config, hidden)
        seed = self.run.seed if config.selection_seed is None else config.selection_seed
        labels, self.kind_names = kinds_by_column(host.dataset, config)
        self.curriculum = OnlineCurriculum(
            features,
            group_size=self.run.group_size,
            seed=seed,
            settings=self.settings,
            pool=self.pool,
            choosable=None if hidden is None else hidden.rows,
            order=RandomOrder(len(self.pool), self.run.seed),
            read=self._read_rewards,
            kinds=labels,
            target=self.target,
            prior=self.prior,
            groups=self.layout.prompts_trained(host.max_steps),
        )

    def judge(self, max_steps: int) -> Judge:
        """Return the judge of a run of so many steps, as it begins; in a run that goes on it waits as it did then."""
        judge = Judge(self.settings, self.layout.prompts_trained(max_steps), mean_rate(self.prior))
        if self._curriculum is not None:
            judge.wait = self._curriculum.judge.wait
        return judge

    def _read_completions(self, peers) -> dict[int, str]:
        """Read suspects' completions, which are not in a checkpoint, and send them, so that all processes agree."""
        from ..report.online_tables import read_completions

        directory = Path(self.host.args.output_dir) / "learnalign"
        is_reader = self.host.accelerator.is_main_process
        return peers.broadcast(read_completions(directory, self.run.pool_size) if is_reader else None)

    def _read_rewards(self, rewards):
        """Read rewards as the trainer does; the advantages are those without a penalty for the length."""
        tensor = torch.from_numpy(rewards)
        none = torch.zeros(tensor.shape[:2])
        return (
            self.host.deciding(tensor, self.run.config).numpy(),
            self.host.advantages(tensor, none).numpy(),
        )

    # The stream -------------------------------------------------------------------------------------------------

    def choose(self, n):
        draws, judge = self.curriculum.choose(n), self.curriculum.judge
        if judge.switched and self.host.accelerator.is_main_process:
            tqdm.write(words.switch_line(draws[0].number, judge, self._aligned_with()))
        return [draw.row for draw in draws]

    def observe(self, groups):
        before = self.curriculum.history.groups
        self.curriculum.observe(groups)
        self._warn(before)
        self._warn_of_kinds()
        self._warn_of_target()

    def _warn(self, before):
        """Warn of rewards that say nothing: when enough was seen, or at once where no group says anything."""
        curriculum, tried = self.curriculum, self.settings.tried
        texts = []
        nothing = curriculum.history.observed == self.run.prompts_at_once and not curriculum.history.groups
        if nothing or before < tried <= curriculum.history.groups:
            texts.append(words.nothing_to_predict(curriculum))
        if curriculum.scored.counts[0] >= tried:
            kinds, found = words.unscored_warnings(curriculum.scored, self.host.reward_names)
            texts += [text for text, kind, said in zip(found, kinds, self._said, strict=True) if kind and not said]
            self._said |= kinds
            curriculum.scored.begin_count()
        if self.host.accelerator.is_main_process:
            for text in filter(None, texts):
                logger.warning(text)

    @property
    def gradient_dim(self):
        return None if self.curriculum.alignment is None else self.settings.gradient_dim

    def observe_gradients(self, gradients):
        self.curriculum.observe_gradients(gradients)

    def no_gradients(self, reason):
        self.curriculum.without_gradients()
        if self.host.accelerator.is_main_process:
            logger.warning(words.without_gradients(reason, self.run.config.target_column))

    def _aligned_with(self):
        """Return the target that prompts are chosen for; `None` without one, or where gradients cannot be had."""
        return None if self.curriculum.alignment is None else self.curriculum.target

    def _warn_of_target(self):
        """Warn once of a target of which no group had a gradient so far."""
        target = self._aligned_with()
        if target is None or self._told_of_target or not target.is_dead:
            return
        self._told_of_target = True
        if self.host.accelerator.is_main_process:
            logger.warning(words.dead_target(target))

    def _warn_of_kinds(self):
        """Warn, once of each, of kinds of prompts that take too much, are lost or have inconsistent rewards."""
        found = np.stack([*kind_warnings(self.curriculum).values()])
        told = self._told if self._told.shape == found.shape else np.zeros_like(found)
        new, self._told = found & ~told, told | found
        if new.any() and self.host.accelerator.is_main_process:
            for text in words.kind_warnings(self, new):
                logger.warning(text)

    def tick(self, steps):
        self.curriculum.tick(steps)

    def metrics(self):
        return {} if self._curriculum is None else self._curriculum.metrics()

    # What is said -----------------------------------------------------------------------------------------------

    def plan(self, step, max_steps, due):
        return words.plan_lines(self, step, max_steps)

    def warning(self, max_steps):
        return words.warning(self, max_steps)

    def wanted(self, groups):
        return self.curriculum.asks_for([group.row for group in groups])

    def remember(self, completions):
        self.curriculum.remember(completions)

    def report(self, host, directory):
        if self._curriculum is None or not (host.accelerator.is_main_process and self.curriculum.history.observed):
            return None
        from ..report.online_page import write_online_report  # with matplotlib

        ends = host.trainer.control.should_training_stop and not self._logged
        self._logged |= ends  # once, at the end of training
        return write_online_report(self, host, directory, log=ends)

    def summary(self):
        return [] if self._curriculum is None else words.summary_lines(self)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self):
        key = None if self._hidden is None else self._hidden.key
        return {
            "curriculum": self.curriculum.state_dict(),
            "features_key": key,
            "said": self._said,
            "told": self._told,
            "told_of_target": self._told_of_target,
        }

    def load_state_dict(self, state):
        self.curriculum.load_state_dict(state["curriculum"])
        self._said, self._told = state["said"].copy(), state["told"].copy()
        self._told_of_target = bool(state["told_of_target"])

    def write_files(self, directory, is_writer):
        """Write the hidden states, which later weights do not have."""
        if self._hidden is None:
            return {}
        if is_writer:
            self._hidden.write(directory, Path(self.host.args.output_dir) / "learnalign")
        return {self._hidden.file: self._hidden.sha256}
