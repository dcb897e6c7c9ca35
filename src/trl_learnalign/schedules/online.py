"""Every chunk chosen by the learnability that the rewards of training so far predict."""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..curriculum import draws, judge
from ..curriculum.draws import Drawn, UniformDraws
from ..curriculum.graded import RewardScale, VarianceCurve
from ..curriculum.history import History
from ..curriculum.judge import UNIFORM, Judge
from ..curriculum.memory import MOST_SUSPECTS, PromptMemory
from ..curriculum.predictor import SuccessPredictor, expected_learnability
from ..curriculum.scored import Scored, varies
from ..host.rewards import check_success_reward
from ..measures.feature_file import PromptFeatures
from ..run.layout import Layout
from ..scores.maths import has_gradient, is_success
from .base import Describes, Prepares, Run, Schedule, whole_pool
from .online_words import (
    nothing_to_predict,
    periods,
    plan_lines,
    prompt_columns,
    summary_lines,
    switch_line,
    warning,
)
from .prompt_features import check_online, eligible_rows, hidden_features, known_beforehand, whole_features


logger = logging.getLogger(__name__)

CANDIDATES = 16_384  # prompts that a chunk is chosen from, at random; all of a smaller pool
LEAST_NOISE = 0.02  # variance within groups of graded rewards, over that of successes


class OnlineSchedule(Schedule, Describes, Prepares):
    r"""
    Chooses every chunk by predicted learnability. No rollout is made for it: it learns from the rewards of training.

    The success rate of a prompt has a Beta posterior: the prior comes from a regression on features of the prompt
    ([`SuccessPredictor`]), which all observations share; the prompt's own successes and failures are added, and fade.
    Of random candidates a chunk takes those with the greatest E[p (1 - p)] / (1 + v), where v is the number of recent
    visits, which fade alike. After each visit a prompt rests, twice as long each time in a row that all its rollouts
    succeeded, or none did, or none had an outcome. Where some had none, utilities are multiplied by the predicted
    chance of one ([`Scored`]). One prompt in twenty is drawn uniformly from the whole pool, which measures the pool
    and the predictor. What was drawn and not yet observed is not drawn again while other prompts are free.

    Draws are uniform, in the random order that TRL would have in the first epoch, until the predictor has been better
    than the mean on uniform draws and choosing is expected to make more groups live, and again when either has not
    been so for `PATIENCE` chunks.

    Args:
        run ([`Run`]): the run that begins.
    """

    layout: Layout

    def __init__(self, run: Run):
        super().__init__(run)
        self.config = run.config
        self.predictor: SuccessPredictor | None = None
        self.pool = np.zeros(0, np.int32)  # rows that may be trained on
        self.choosable = self.pool  # those that may be chosen; uniform draws are of the pool
        self.features: np.ndarray | None = None
        self.hidden: PromptFeatures | None = None  # the hidden states among them
        self.features_key: str | None = None  # theirs
        self.known: list[str] = []  # what success is predicted from, besides a prompt's own rewards
        self.host = None

    # Setting up -------------------------------------------------------------------------------------------------

    def fit(self, host):
        """Looks for the pool. An epoch has as many prompts as may be trained on."""
        check_success_reward(host.reward_names, self.config.success_reward, self.config.learnability)
        check_online(host.dataset, self.config)
        self.pool = eligible_rows(host.dataset, self.config)
        self.layout = whole_pool(host, len(self.pool))
        return self.layout

    def prepare(self, host, state, peers):
        """See [`Schedule`]."""
        self.host, self.known = host, known_beforehand(host, self.config)
        if state is not None:
            self._take(hidden_features(host, self.config, self.layout, self.pool, peers, state.get("features_key")))
            self._read_completions(peers)

    def look(self, host, peers):
        """See [`Schedule`]."""
        self._take(hidden_features(host, self.config, self.layout, self.pool, peers))

    def _take(self, hidden):
        features, self.hidden = whole_features(self.host.dataset, self.config, hidden)
        self.features_key, rows = (None, None) if hidden is None else (hidden.key, hidden.rows)
        self.set_features(features, rows)

    def _read_completions(self, peers):
        """Those of suspects are in no checkpoint. All processes must know of the same."""
        from ..report.online_tables import read_completions

        directory = Path(self.host.args.output_dir) / "learnalign"
        found = read_completions(directory, self.layout.pool_size) if self.host.accelerator.is_main_process else None
        self.completions = peers.broadcast(found)

    def set_features(self, features: np.ndarray, choosable: np.ndarray | None = None) -> None:
        """
        Features of all rows of the dataset, of shape `(N, D)`, with a column of ones; and the rows of the pool that
        may be chosen, all by default.
        """
        self.features = features
        if not len(self.pool):
            self.pool = np.arange(self.layout.pool_size, dtype=np.int32)
        self.choosable = self.pool if choosable is None else choosable
        self.start()

    def start(self):
        """See [`Schedule`]."""
        if self.features is None:  # `prepare` comes later
            return
        self.predictor = SuccessPredictor(self.features)
        self.memory = PromptMemory(self.layout.pool_size, len(self.pool) / self.layout.chunk_prompts)
        self.judge = Judge()
        self.scored = Scored(self.features)
        self.scale, self.curve = RewardScale(), VarianceCurve()
        self.history = History()
        self.completions: dict[int, str] = {}  # of suspects, by row
        self.drawn: dict[int, Drawn] = {}
        self.asked = 0  # chunks that were drawn
        self.observed = 0  # chunks before this one were observed
        self._suspects: list[int] = []  # rows of the groups observed last whose completion is wanted
        self._reported: tuple[int, Path] | None = None  # the step of the last report, and its file
        self.order = UniformDraws(self.pool, self.layout.seed)
        seed = self.config.selection_seed
        self._seed = self.layout.seed if seed is None else seed

    # Choosing ---------------------------------------------------------------------------------------------------

    def choose(self, n):
        """Chooses the next chunk."""
        chunk, self.asked = self.asked, self.asked + 1
        self.drawn[chunk] = self._choose(chunk)
        return self.drawn[chunk].rows.tolist()

    def _choose(self, chunk) -> Drawn:
        number = self.layout.chunk_prompts
        generator = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, chunk]))
        candidates = self._candidates(generator)
        a, b = self.posterior(candidates, chunk)
        utility = self.utility(a, b) * self.scored.chance(candidates, self.memory.unscored[candidates])
        # The last digits may differ between processes, whose choices must not
        ranks = np.round(utility / (1 + self._recent_visits(a, b)), 9)
        ranked = np.lexsort((generator.random(len(candidates)), -ranks))
        flying = draws.in_flight(self.drawn, self.observed)
        rested = (self.memory.ready[candidates] <= chunk) & ~np.isin(candidates, flying)
        self.judge.look(utility, ranked[rested[ranked]][:number], (a / (a + b)).mean())
        if self.judge.switched and self.host.accelerator.is_main_process:
            tqdm.write(switch_line(chunk, self.judge))
        uniform = _rounded(UNIFORM * number, generator) if self.judge.choosing else number
        rows = self.order.take(uniform, flying if self.judge.choosing else None)
        if uniform < number:
            rows += self._best(candidates, ranked, rested, flying, rows, number - uniform)
        rows += self.order.take(number - len(rows))  # a pool may be smaller than a chunk
        rows = np.array(rows, dtype=np.int32)
        a, b = self.posterior(rows, chunk)
        self.memory.rest(rows, chunk)
        return Drawn(rows, np.arange(number) < uniform, a / (a + b), self.observed > 0, self.judge.choosing)

    def _best(self, candidates, ranked, rested, flying, taken, number) -> list[int]:
        """The best that have rested, then those whose rest ends soonest, and at last those in flight, least often."""
        free = ~np.isin(candidates, taken)
        best = ranked[(rested & free)[ranked]]
        others = np.flatnonzero(free & ~rested)
        rows = candidates[others]
        times = np.bincount(flying, minlength=self.layout.pool_size)[rows]
        others = others[np.lexsort((self.memory.ready[rows], times))]
        return candidates[np.concatenate([best, others])[:number]].tolist()

    def utility(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """
        What prompts of success ~ Beta(a, b) are ranked on: the expected p (1 - p); of graded rewards the expected
        variance.
        """
        return self.curve(a / (a + b)) if self.graded else expected_learnability(a, b)

    @property
    def graded(self) -> bool:
        """Whether rewards are graded, so that their variance counts."""
        return self.config.learnability == "variance"

    def _recent_visits(self, a, b):
        """Visits that have not faded, from the posteriors: what a prompt teaches, it teaches less each time."""
        return (a + b - self.predictor.concentration) / (self._weight * self.layout.group_size)

    @property
    def _weight(self) -> float:
        """Successes that a rollout says as much as; a graded one that varies less says more."""
        return 1 / max(self.curve.ratio, LEAST_NOISE) if self.graded else 1.0

    def _candidates(self, generator):
        rows = self.choosable
        if len(rows) <= CANDIDATES:
            return rows
        return rows[generator.choice(len(rows), CANDIDATES, replace=False, shuffle=False)]

    def posterior(self, rows: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """a and b of the Beta posteriors of the success rates of these rows, of shape `(n,)` each."""
        prior, strength = self.predictor.predict(rows), self.predictor.concentration
        successes, failures = self.memory.evidence(rows, chunk)
        return strength * prior + successes, strength * (1 - prior) + failures

    # Learning ---------------------------------------------------------------------------------------------------

    def observe(self, groups):
        """Learns from the groups of a chunk. A chunk that was observed before, or never drawn, changes nothing."""
        chunk, self._suspects = groups[0].number // self.layout.chunk_prompts, []
        if chunk < self.observed or chunk not in self.drawn:
            return
        rewards, masked = np.stack([group.rewards for group in groups]), None
        if groups[0].masked is not None:
            masked = np.stack([group.masked for group in groups])
        self._suspects = self._learn(chunk, rewards, masked)

    def wanted(self, groups):
        """Returns the rows of suspects whose completion is not known yet."""
        return self._suspects

    def _learn(self, chunk, rewards, masked):
        drawn = self.drawn[chunk]
        deciding, advantages = self._rewards(rewards)
        masked = np.zeros(deciding.shape, bool) if masked is None else masked
        live = has_gradient(advantages, ~masked)
        outcomes = self._outcomes(deciding)
        dead = masked.all(1) | (~live & varies(outcomes))  # it teaches nothing, whatever its rewards
        outcomes[dead] = np.nan
        trials, successes = np.isfinite(outcomes).sum(1), np.nansum(outcomes, axis=1)
        seen, equal, before = trials > 0, ~varies(outcomes), self.history.groups
        rows, observed, uniform = drawn.rows[seen], successes[seen] / trials[seen], drawn.uniform[seen]
        self.history.count(drawn.predicted[seen], observed, uniform, live[seen], self.memory.visits[rows])
        good = observed >= 0.5
        retired, parked = self.memory.is_retired(rows), self.memory.is_parked(rows)
        self.history.count_revisits(retired, equal[seen] & good, parked, equal[seen] & ~good)
        self.judge.measure(drawn.predicted[seen][uniform], observed[uniform], drawn.learnt)
        noise = None
        if self.graded:
            self.curve.observe(drawn.predicted[seen], np.nanvar(outcomes[seen], axis=1))
            noise = self.curve.ratio
        else:
            self.memory.suspect(drawn.rows, *self.posterior(drawn.rows, chunk), successes, trials)
        self.predictor.observe(chunk, drawn.rows, successes, trials, noise)
        self.scored.observe(chunk, drawn.rows, seen, dead, masked)
        self.memory.update(drawn.rows, chunk, successes, trials, equal, self._weight)
        self.observed = chunk + 1
        self.drawn = {number: one for number, one in self.drawn.items() if number >= chunk}
        self._record(chunk, drawn, live, observed)
        self._warn_of_rewards(before, chunk == 0 and not seen.any())
        return self._suspicious(drawn.rows)

    def _warn_of_rewards(self, before, nothing):
        """When enough was seen; at once where nothing of the first chunk can be learnt from."""
        tried = before < judge.TRIED <= self.history.groups
        texts = [nothing_to_predict(self)] if tried or nothing else []
        if self.scored.counts[0] >= judge.TRIED:
            texts += self.scored.warnings(self.host.reward_names)
        for text in filter(None, texts * self.host.accelerator.is_main_process):
            logger.warning(text)

    def suspects(self) -> tuple[np.ndarray, np.ndarray]:
        """See [`PromptMemory.suspects`]; none before the prediction was tried."""
        rows, chances = self.memory.suspects()
        return (rows, chances) if self.judge.tried else (rows[:0], chances[:0])

    def num_suspects(self) -> int:
        """Number of all of them."""
        return self.memory.num_suspects() if self.judge.tried else 0

    def _suspicious(self, rows) -> list[int]:
        """Returns the suspects among these rows whose completion is not known yet."""
        if len(self.completions) >= 2 * MOST_SUSPECTS:
            return []
        return [row for row in rows[self.memory.is_suspect(rows)].tolist() if row not in self.completions]

    def remember(self, completions):
        """See [`Schedule`]. Those of prompts that are no suspects any more make room."""
        known = self.completions | completions
        suspects = self.memory.is_suspect(np.array([*known], dtype=np.int64))
        self.completions = {row: text for (row, text), so in zip(known.items(), suspects, strict=True) if so}

    def _rewards(self, rewards):
        """
        Of `(n, G, F)` rewards the one that decides success, NaN for none, and the advantages, but for a penalty; of
        shape `(n, G)` each.
        """
        rewards = torch.from_numpy(rewards)
        none = torch.zeros(rewards.shape[:2])
        return self.host.deciding(rewards, self.config).numpy(), self.host.advantages(rewards, none).numpy()

    def _outcomes(self, deciding):
        """1 for a success, else 0; graded rewards scaled to [0, 1]. NaN where there is none; of shape `(n, G)`."""
        if self.graded:
            return self.scale(deciding)
        self.scale.learn(deciding)
        return np.where(np.isfinite(deciding), is_success(deciding, self.config.success_threshold), np.nan)

    def _record(self, chunk, drawn, live, observed):
        uniform, chosen = drawn.uniform, ~drawn.uniform
        self.history.add(
            {
                "chunk": chunk,
                "live_fraction": live.mean(),
                "live_uniform": live[uniform].mean() if uniform.any() else math.nan,
                "live_chosen": live[chosen].mean() if chosen.any() else math.nan,
                "uniform_draws": uniform.sum(),
                "predicted_success": drawn.predicted.mean(),
                "observed_success": observed.mean() if len(observed) else math.nan,
                "pool_success": self.judge.pool_success,
                "skill": self.judge.skill,
                "headroom": self.judge.headroom,
                "choosing": drawn.choosing,
                **self.memory.counts(),
            }
        )

    def metrics(self):
        """See [`Schedule`]."""
        latest = self.history.latest()
        return {name: latest[name] for name in _LOGGED if name in latest} | {"suspects": self.num_suspects()}

    # What is said -----------------------------------------------------------------------------------------------

    def plan(self, step, max_steps, due):
        """See [`Schedule`]."""
        return plan_lines(self, step, max_steps)

    def warning(self, max_steps):
        """See [`Schedule`]."""
        return warning(self, max_steps)

    def report(self, host, directory):
        """Writes the report. Once per step."""
        step = host.trainer.state.global_step
        if not (host.accelerator.is_main_process and self.observed):
            return None
        if self._reported is None or self._reported[0] != step:
            from ..report.online_page import write_online_report  # with matplotlib

            self._reported = step, write_online_report(self, host, directory)
        return self._reported[1]

    def summary(self):
        """See [`Schedule`]."""
        return summary_lines(self)

    def prompt_columns(self) -> dict[str, np.ndarray]:
        """What is known of each prompt; see [`overview.prompt_columns`]."""
        return prompt_columns(self)

    def periods(self) -> list[dict]:
        """When prompts were chosen and when not, and why; see [`overview.periods`]."""
        return periods(self.history, self.layout.chunk_prompts)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self):
        """See [`Schedule`]: 27 bytes a prompt, what was observed last, and 60 bytes a chunk."""
        return {
            **{name: getattr(self, name).state_dict() for name in _PARTS},
            "drawn": draws.stacked(self.drawn),
            "features_key": self.features_key,
            "observed": self.observed,
            "asked": self.asked,
        }

    def write_files(self, directory, is_writer):
        """See [`Schedule`]: the hidden states, which later weights do not have."""
        if self.hidden is None:
            return {}
        if is_writer:
            self.hidden.write(directory, Path(self.host.args.output_dir) / "learnalign")
        return {self.hidden.file: self.hidden.sha256}

    def load_state_dict(self, state):
        """Restores the state."""
        try:
            for name in _PARTS:
                getattr(self, name).load_state_dict(state[name])
            self.observed, self.asked = int(state["observed"]), int(state["asked"])
            self.drawn = draws.unstacked(state["drawn"])
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The state of the online schedule in the checkpoint is damaged or of other data: {error!r}. Resume "
                "with the same dataset and settings, or from an earlier checkpoint."
            ) from error


_PARTS = "memory", "judge", "predictor", "scored", "scale", "curve", "history", "order"
_LOGGED = (
    *("choosing", "live_fraction", "live_chosen", "live_uniform", "predicted_success", "observed_success"),
    *("pool_success", "skill", "headroom", "retired", "unscored"),
)


def _rounded(number: float, generator) -> int:
    """A whole number that is `number` on average."""
    return math.floor(number + generator.random())
