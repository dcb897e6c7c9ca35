"""Every chunk chosen by the learnability that the rewards of training so far predict."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from ..rewards import check_success_reward
from .base import RandomOrder, Schedule
from .history import History
from .overview import periods, prompt_columns, summary_lines, switch_line
from .predictor import SuccessPredictor, all_fail, expected_learnability, live_probability
from .prompt_features import check_online, eligible_rows, prompt_features


logger = logging.getLogger(__name__)

CANDIDATES = 16_384  # prompts that a chunk is chosen from, at random; all of a smaller pool
UNIFORM = 0.05  # of a chunk: uniform draws from the whole pool, which measure the pool and the predictor
REVIEW = 0.05  # of a chunk: mastered and never-solved prompts whose time has come
COOLDOWN = 0.1, 2, 25  # chunks until a prompt may come again: this share of those of the pool, at least, at most
LONGEST_REST = 6  # doublings of the cooldown of a mastered or never-solved prompt
HALF_LIFE = 50.0  # chunks after which a prompt's own rewards count half, as the policy moves on
TRIED = 32  # uniform draws before the predictor is judged
LEAST_SKILL = 0.05
LEAST_HEADROOM = 1.1
PATIENCE = 20  # chunks without headroom before draws are uniform
SUSPICION = 0.1  # probability of failing so often, below which a prompt is a suspect
MOST_SUSPECTS = 1000
MEMORY = 0.995  # of the sums over uniform draws, per draw: the last 200 count
RETIRED_AFTER = 2  # visits in a row with all rollouts right, or none


@dataclass
class _Drawn:
    """A chunk that was chosen, and what was expected of it."""

    rows: np.ndarray  # (n,) int32
    uniform: np.ndarray  # (n,) bool
    predicted: np.ndarray  # (n,) float64, success
    live: np.ndarray  # (n,) float64, probability


class OnlineSchedule(Schedule):
    r"""
    Chooses every chunk by predicted learnability. No rollout is made for it: it learns from the rewards of training.

    The success rate of a prompt has a Beta posterior: the prior comes from a regression on features of the prompt
    ([`SuccessPredictor`]), which all observations share; the prompt's own successes and failures are added, and fade. Of random
    candidates a chunk takes those with the greatest E[p (1 - p)]. One prompt in twenty is drawn uniformly from the whole pool,
    which measures the pool and the predictor without bias; one in twenty is a review of a prompt that was always or
    never solved when it was last seen: such a prompt rests twice as long after each visit.

    Draws are uniform, in the order that TRL would have, until the predictor has been better than the mean on uniform draws, and
    again where choosing would not make more groups live for `PATIENCE` chunks.

    Args:
        config ([`LearnAlignConfig`]): of the sampler.
    """

    def __init__(self, config):
        super().__init__(config)
        self.predictor: SuccessPredictor | None = None
        self.pool = np.zeros(0, np.int32)  # rows that may be trained on
        self.features: np.ndarray | None = None
        self.features_key: str | None = None  # of the hidden states among them
        self.host = None

    # Setting up -------------------------------------------------------------------------------------------------

    def check(self, host):
        """See [`Schedule`]."""
        check_success_reward(host.reward_names, self.config.success_reward, self.config.learnability)
        check_online(host.dataset, self.config)
        self.pool = eligible_rows(host.dataset, self.config)

    def prepare(self, host, state, peers):
        """See [`Schedule`]."""
        self.host = host
        key = None if state is None else state.get("features_key")
        features, self.features_key = prompt_features(host, self.config, peers, key)
        self.set_features(features)
        super().prepare(host, state, peers)
        if state is not None:
            self._read_completions(peers)

    def _read_completions(self, peers):
        """Those of suspects are in no checkpoint. All processes must know of the same."""
        from ..online_tables import read_completions

        directory = Path(self.host.args.output_dir) / "learnalign"
        found = read_completions(directory, self.layout.pool_size) if self.host.accelerator.is_main_process else None
        self.completions = peers.gather(found)[0]

    def set_features(self, features: np.ndarray) -> None:
        """Features of all rows of the dataset, of shape `(N, D)`, with a column of ones."""
        self.features = features
        if not len(self.pool):
            self.pool = np.arange(self.layout.pool_size, dtype=np.int32)
        self.start()

    def start(self):
        """See [`Schedule`]."""
        if self.features is None:  # `prepare` comes later
            return
        size = self.layout.pool_size
        self.predictor = SuccessPredictor(self.features)
        self.successes = np.zeros(size, np.float32)  # own rewards, faded to the time of the last visit
        self.failures = np.zeros(size, np.float32)
        self.last = np.full(size, -1, np.int32)  # chunk of the last visit
        self.visits = np.zeros(size, np.int32)
        self.ready = np.zeros(size, np.int32)  # the chunk from which on a prompt may come again
        self.solved = np.zeros(size, np.uint8)  # visits in a row in which all rollouts succeeded
        self.failed = np.zeros(size, np.uint8)  # visits in a row in which none did
        self.surprise = np.zeros(
            size, np.float32
        )  # -log of the probability of failures only, as was predicted; 0 once solved
        self.completions: dict[int, str] = {}  # of suspects, by row
        self.reward_range = [math.inf, -math.inf]
        self.drawn: dict[int, _Drawn] = {}
        self.observed = 0  # chunks before this one were observed
        self.position = 0  # in the random order
        self.choosing = False
        self.switched = False  # whether the chunk drawn last is the first that was chosen, or the first that was not
        self.headroom = 1.0
        self.without_headroom = 0
        self.skill_sums = np.zeros(
            4
        )  # of uniform draws: squared errors of the predictor and of the mean, successes, draws
        self.history = History()
        self._reported: int | None = None  # the step of the last report
        self._random = RandomOrder(len(self.pool), self.layout.seed, self.layout.shuffle)
        seed = self.config.selection_seed
        self._seed = self.layout.seed if seed is None else seed
        share, least, most = COOLDOWN
        self.cooldown = int(np.clip(share * len(self.pool) / self.layout.chunk_prompts, least, most))

    # Choosing ---------------------------------------------------------------------------------------------------

    def prompts(self, chunk):
        """See [`Schedule`]."""
        if chunk not in self.drawn:
            if chunk < self.observed:  # trained on before a resume, which skips its batches
                return [int(self.pool[0])] * self.layout.chunk_prompts
            self.drawn[chunk] = self._choose(chunk)
        return self.drawn[chunk].rows.tolist()

    def _choose(self, chunk) -> _Drawn:
        number = self.layout.chunk_prompts
        generator = np.random.Generator(np.random.Philox(key=[self._seed % 2**64, chunk]))
        candidates = self._candidates(generator)
        a, b = self.posterior(candidates, chunk)
        utility = np.round(expected_learnability(a, b), 9)
        ranked = np.lexsort((generator.random(len(candidates)), -utility))
        rested = self.ready[candidates] <= chunk
        self._judge(a, b, ranked, rested)
        if self.switched and self.host.accelerator.is_main_process:
            tqdm.write(switch_line(chunk, self, self.able, PATIENCE))
        uniform = number if not self.choosing else _rounded(UNIFORM * number, generator)
        rows = self._uniform(uniform)
        if uniform < number:
            taken = set(rows)
            unseen = ~np.isin(candidates, rows)
            resting = (self.solved[candidates] > 0) | (self.failed[candidates] > 0)
            review = np.flatnonzero(rested & resting & unseen)
            review = review[np.lexsort((review, self.ready[candidates[review]]))][
                : _rounded(REVIEW * number, generator)
            ]
            best = ranked[(rested & unseen)[ranked]]
            # Where too few have rested, those that have rested longest
            others = np.flatnonzero(unseen & ~rested)
            others = others[np.argsort(self.ready[candidates[others]], kind="stable")]
            for place in (*review, *best, *others):
                row = int(candidates[place])
                if len(rows) == number:
                    break
                if row not in taken:
                    taken.add(row)
                    rows.append(row)
        rows += self._uniform(number - len(rows))  # a pool smaller than a chunk
        rows = np.array(rows, dtype=np.int32)
        a, b = self.posterior(rows, chunk)
        self.ready[rows] = chunk + self.cooldown
        is_uniform = np.arange(number) < uniform
        return _Drawn(rows, is_uniform, a / (a + b), live_probability(a, b, self.layout.group_size))

    def _candidates(self, generator):
        if len(self.pool) <= CANDIDATES:
            return self.pool
        return self.pool[generator.choice(len(self.pool), CANDIDATES, replace=False, shuffle=False)]

    def _uniform(self, number) -> list[int]:
        rows = [int(self.pool[self._random[self.position + i]]) for i in range(number)]
        self.position += number
        return rows

    def posterior(self, rows: np.ndarray, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """a and b of the Beta posteriors of the success rates of these rows, of shape `(n,)` each."""
        prior = self.predictor.predict(rows)
        faded = 0.5 ** ((chunk - self.last[rows]) / HALF_LIFE)
        strength = self.predictor.concentration
        a = strength * prior + faded * self.successes[rows]
        b = strength * (1 - prior) + faded * self.failures[rows]
        return a, b

    def _judge(self, a, b, ranked, rested):
        """Whether to choose: the predictor has skill, and choosing makes more groups live."""
        live = live_probability(a, b, self.layout.group_size)
        best = ranked[rested[ranked]][: self.layout.chunk_prompts]
        self.headroom = float(live[best].mean() / live.mean()) if len(best) else 1.0
        self.without_headroom = 0 if self.headroom >= LEAST_HEADROOM else self.without_headroom + 1
        before = self.choosing
        if not self.choosing:
            self.choosing = self.able and self.headroom >= LEAST_HEADROOM
        elif not self.able or self.without_headroom >= PATIENCE:
            self.choosing = False
        self.switched = before != self.choosing

    @property
    def able(self) -> bool:
        """Whether success was predicted better than by the mean on enough uniform draws."""
        return bool(self.skill_sums[3] >= TRIED and self.skill > LEAST_SKILL)

    @property
    def skill(self) -> float:
        """Brier skill on uniform draws: 1 - squared errors of the predictor / squared errors of their mean."""
        model, mean, _, _ = self.skill_sums
        return float(1 - model / mean) if mean > 0 else 0.0

    @property
    def pool_success(self) -> float:
        """Mean success of the latest uniform draws, which is an unbiased estimate of the pool's."""
        _, _, successes, draws = self.skill_sums
        return float(successes / draws) if draws else math.nan

    # Learning ---------------------------------------------------------------------------------------------------

    def observe(self, chunk, rewards):
        """See [`Schedule`]. A chunk that was observed before, or never drawn, changes nothing."""
        if chunk < self.observed or chunk not in self.drawn:
            return None
        drawn = self.drawn[chunk]
        deciding, total = self._rewards(rewards)
        known = np.isfinite(deciding)
        trials = known.sum(1)
        outcomes = np.where(known, self._outcomes(deciding, known), 0.0)
        successes = outcomes.sum(1)
        live = np.array([len(set(row[np.isfinite(row)].tolist())) > 1 for row in total])
        seen = trials > 0
        observed = successes[seen] / trials[seen]
        self.history.count(
            drawn.predicted[seen], observed, drawn.uniform[seen], live[seen], self.visits[drawn.rows[seen]]
        )
        self._count_reviews(drawn.rows[seen], successes[seen], trials[seen])
        self._measure(drawn, seen, observed)
        self._suspect(chunk, drawn.rows, successes, trials)
        self.predictor.observe(chunk, drawn.rows, successes, trials)
        for places in _distinct(drawn.rows):  # a pool smaller than a chunk has a row twice
            self._update(chunk, drawn.rows[places], successes[places], trials[places])
        self.observed = chunk + 1
        self.drawn = {number: one for number, one in self.drawn.items() if number >= chunk}
        self._record(chunk, drawn, live, seen, observed)
        return self._suspicious(drawn.rows)

    def _count_reviews(self, rows, successes, trials):
        retired, parked = (streak[rows] >= RETIRED_AFTER for streak in (self.solved, self.failed))
        self.history.count_reviews(retired, successes >= trials, parked, successes <= 0)

    def _suspicious(self, rows) -> dict[int, int]:
        """Suspects among these rows whose completion is not known yet, with their places."""
        chance = np.exp(-self.surprise[rows].astype(np.float64))
        return {
            row: place
            for place, row in enumerate(rows.tolist())
            if chance[place] < SUSPICION and row not in self.completions and len(self.completions) < 2 * MOST_SUSPECTS
        }

    def remember(self, completions):
        """See [`Schedule`]. Those of prompts that are no suspects any more make room."""
        known = self.completions | completions
        self.completions = {row: text for row, text in known.items() if math.exp(-self.surprise[row]) < SUSPICION}

    def _rewards(self, rewards):
        """Of `(n, G, F)` rewards the one that decides success and the total, `(n, G)` each; NaN for none."""
        rewards = torch.from_numpy(rewards)
        return self.host.deciding(rewards, self.config).numpy(), self.host.total(rewards).numpy()

    def _outcomes(self, deciding, known):
        """1 for a success, else 0; or, for graded rewards, the reward scaled to the range of all so far."""
        if self.config.learnability == "success_rate":
            return deciding >= self.config.success_threshold
        if known.any():
            least, greatest = deciding[known].min(), deciding[known].max()
            self.reward_range = [min(self.reward_range[0], least), max(self.reward_range[1], greatest)]
        least, greatest = self.reward_range
        return (deciding - least) / max(greatest - least, 1e-12)

    def _measure(self, drawn, seen, observed):
        """The predictor against the mean, on uniform draws of which something had been learnt before."""
        uniform = drawn.uniform[seen]
        if not uniform.any():
            return
        predicted, y = drawn.predicted[seen][uniform], observed[uniform]
        errors = np.array([0.0, 0.0, y.sum(), len(y)])
        if self.observed:
            mean = self.pool_success if self.skill_sums[3] else 0.5
            errors[:2] = ((predicted - y) ** 2).sum(), ((mean - y) ** 2).sum()
        self.skill_sums = self.skill_sums * MEMORY ** len(y) + errors

    def _suspect(self, chunk, rows, successes, trials):
        """Adds to the surprise of prompts that failed in all rollouts; a success ends it."""
        a, b = self.posterior(rows, chunk)
        failed = (trials > 0) & (successes <= 0)
        self.surprise[rows[failed]] -= np.log(all_fail(a, b, trials)[failed]).astype(np.float32)
        self.surprise[rows[successes > 0]] = 0

    def _update(self, chunk, rows, successes, trials):
        faded = 0.5 ** ((chunk - self.last[rows]) / HALF_LIFE)
        self.successes[rows] = faded * self.successes[rows] + successes
        self.failures[rows] = faded * self.failures[rows] + trials - successes
        self.last[rows] = chunk
        self.visits[rows] += 1
        solved, failed = (trials > 0) & (successes >= trials), (trials > 0) & (successes <= 0)
        self.solved[rows] = np.where(solved, np.minimum(self.solved[rows], 254) + 1, 0)
        self.failed[rows] = np.where(failed, np.minimum(self.failed[rows], 254) + 1, 0)
        rests = np.minimum(np.maximum(self.solved[rows], self.failed[rows]), LONGEST_REST).astype(np.int32)
        self.ready[rows] = chunk + self.cooldown * 2**rests

    def _record(self, chunk, drawn, live, seen, observed):
        uniform = drawn.uniform & seen
        self.history.add(
            {
                "chunk": chunk,
                "live_fraction": live.mean(),
                "live_uniform": live[uniform].mean() if uniform.any() else math.nan,
                "predicted_success": drawn.predicted.mean(),
                "observed_success": observed.mean() if len(observed) else math.nan,
                "pool_success": self.pool_success,
                "skill": self.skill,
                "headroom": self.headroom,
                "choosing": not drawn.uniform.all(),
                "visited": np.count_nonzero(self.visits),
                "retired": np.count_nonzero(self.solved >= RETIRED_AFTER),
                "parked": np.count_nonzero(self.failed >= RETIRED_AFTER),
            }
        )

    def suspects(self) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows of prompts that were never solved though the predictor is sure that they would be, most suspicious first, and how
        probable so many failures are for each.
        """
        chance = np.exp(-self.surprise.astype(np.float64))
        rows = np.flatnonzero(chance < SUSPICION)
        rows = rows[np.lexsort((rows, chance[rows]))][:MOST_SUSPECTS]
        return rows, chance[rows]

    def metrics(self):
        """See [`Schedule`]."""
        latest = self.history.latest()
        names = (
            "live_fraction",
            "predicted_success",
            "observed_success",
            "pool_success",
            "skill",
            "headroom",
            "retired",
        )
        values = {name: latest[name] for name in names if name in latest}
        return values | {"suspects": float(len(self.suspects()[0]))}

    # What is said -----------------------------------------------------------------------------------------------

    def plan(self, step, max_steps, due):
        """See [`Schedule`]."""
        prompts, pool = self.layout.prompts_trained(max_steps), len(self.pool)
        by = ["length"] * (self.features.shape[1] > 1) + [
            name for name in (self.config.group_column, self.config.pass_rate_column) if name
        ]
        by += ["hidden states"] * (self.features_key is not None)
        return [
            f"steps {step + 1} to {max_steps} train on prompts chosen online, {UNIFORM:.0%} of them at random.",
            f"{prompts:,.0f} prompts in all from a pool of {pool:,}: {prompts / pool:.2f} visits per prompt.",
            f"success is predicted from what was seen of a prompt, and from {', '.join(by) or 'nothing else'}.",
        ]

    def warning(self, max_steps):
        """See [`Schedule`]."""
        visits = self.layout.prompts_trained(max_steps) / len(self.pool)
        known = self.features_key or self.config.group_column or self.config.pass_rate_column
        if known or visits >= 1:
            return None
        return (
            f"The run has room for {visits:.2f} visits per prompt, so most prompts are seen once at most, and nothing but the length tells "
            "about those not seen: choosing online can hardly help. Set `prompt_features=True`, name a `group_column` or a "
            "`pass_rate_column`, or take a smaller pool."
        )

    def report(self, host, directory):
        """See [`Schedule`]. Once per step."""
        step = host.trainer.state.global_step
        if host.accelerator.is_main_process and self.observed and step != self._reported:
            from ..online_report import write_online_report  # with matplotlib

            write_online_report(self, host, directory)
            self._reported = step

    def summary(self):
        """See [`Schedule`]."""
        return summary_lines(self)

    def prompt_columns(self) -> dict[str, np.ndarray]:
        """What is known of each prompt; see [`overview.prompt_columns`]."""
        return prompt_columns(self, RETIRED_AFTER)

    def periods(self) -> list[dict]:
        """When prompts were chosen and when not, and why; see [`overview.periods`]."""
        return periods(self.history, self.layout.chunk_prompts, TRIED, LEAST_SKILL, LEAST_HEADROOM)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self):
        """See [`Schedule`]: 26 bytes a prompt, and what was observed last."""
        drawn = sorted(self.drawn.items())
        return {
            **{name: getattr(self, name) for name in _PER_PROMPT},
            "predictor": self.predictor.state_dict(),
            "history": self.history.state_dict(),
            "skill_sums": self.skill_sums,
            "drawn_chunks": np.array([chunk for chunk, _ in drawn], dtype=np.int64),
            **{f"drawn_{name}": _stacked([getattr(one, name) for _, one in drawn]) for name in _DRAWN},
            "features_key": self.features_key,
            "reward_range": [None if math.isinf(end) else float(end) for end in self.reward_range],
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    def load_state_dict(self, state):
        """See [`Schedule`]."""
        self.start()
        try:
            for name in _PER_PROMPT:
                now = getattr(self, name)
                if state[name].shape != now.shape or state[name].dtype != now.dtype:
                    raise ValueError(f"{name} is of {len(state[name])} prompts, the dataset has {len(now)}")
                setattr(self, name, state[name].copy())
            self.predictor.load_state_dict(state["predictor"])
            self.history.load_state_dict(state["history"])
            self.skill_sums = state["skill_sums"].copy()
            for name in _NUMBERS:
                setattr(self, name, type(getattr(self, name))(state[name]))
            least, greatest = state["reward_range"]
            self.reward_range = [math.inf, -math.inf] if least is None else [least, greatest]
            parts = zip(*(state[f"drawn_{name}"] for name in _DRAWN), strict=True)
            self.drawn = {
                chunk: _Drawn(*part) for chunk, part in zip(state["drawn_chunks"].tolist(), parts, strict=True)
            }
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(
                f"The state of the online schedule in the checkpoint is damaged or of other data: {error!r}. Resume with the same "
                "dataset and settings, or from an earlier checkpoint."
            ) from error


_PER_PROMPT = "successes", "failures", "last", "visits", "ready", "solved", "failed", "surprise"
_DRAWN = "rows", "uniform", "predicted", "live"
_NUMBERS = "observed", "position", "choosing", "without_headroom", "headroom"


def _stacked(arrays):
    return np.stack(arrays) if arrays else np.zeros((0, 0))


def _rounded(number: float, generator) -> int:
    """A whole number that is `number` on average."""
    return math.floor(number + generator.random())


def _distinct(rows):
    """Places of the rows, so that no row is twice in one part."""
    left = np.arange(len(rows))
    while len(left):
        first = np.unique(rows[left], return_index=True)[1]
        yield left[first]
        left = np.delete(left, first)
