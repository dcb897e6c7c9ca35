"""The online curriculum: every prompt chosen by the learnability that the rewards of training so far predict."""

from collections.abc import Sequence

import numpy as np

from .alignment import Alignment
from .batch import Batch, checked_mask, count_inconsistent, stacked, varies
from .candidates import Candidates
from .clusters import kinds_of
from .events import Draw, Gradient, Group
from .flight import Flight
from .graded import RewardScale, VarianceCurve
from .history import History
from .judge import Judge
from .keeping import KeepsState
from .kinds import Kinds
from .memory import PromptMemory
from .order import Order, Permutations, UniformDraws, rounded, rows_of
from .predictor import SuccessPredictor, checked_features, expected_deviation, expected_learnability
from .prior import known_rates, mean_rate
from .progress import Progress
from .report import read_curriculum
from .rewards import RewardReader, has_gradient, is_success, read_rewards
from .scored import Scored
from .settings import OnlineSettings
from .shares import raised
from .suspects import FindsSuspects
from .target import Target


class OnlineCurriculum(FindsSuspects, KeepsState):
    r"""
    Chooses every prompt by predicted learnability, from the rewards of training alone. It knows neither PyTorch nor
    TRL, so that any training loop can drive it:

    ```python
    curriculum = OnlineCurriculum(features, group_size=8)
    for step in range(steps):
        draws = curriculum.choose(16)
        rewards = [train_on(draw.row) for draw in draws]
        curriculum.observe([Group(draw.number, draw.row, found) for draw, found in zip(draws, rewards)])
        curriculum.tick(1)
    ```

    The success rate of a prompt has a Beta posterior: the prior comes from a regression on features of the prompt
    ([`SuccessPredictor`]), which all observations share; the prompt's own successes and failures are added, and fade.
    The curriculum takes the [`Candidates`] with the greatest E[p (1 - p)] / (1 + v), where v is the number of recent
    visits, which fade alike. After each visit a prompt rests, twice as long each time in a row that all its
    rollouts succeeded, or none did, or none had an outcome. Where some had none, utilities are multiplied by the
    predicted chance of one ([`Scored`]). One prompt in twenty is drawn uniformly from the whole pool, which measures
    the pool and the predictor. A prompt whose group is not finished is not drawn again while others are free.

    Draws are uniform until the predictor has been better than the mean on uniform draws and choosing is expected to
    raise the variance of rewards, and again when either has not been so for a while ([`Judge`]). With a `prior`
    both begin at once, the predictor with a fit to it, and one draw in eight is uniform until that was tried.

    Args:
        features (`np.ndarray` of shape `(N, D)`): what is known of each prompt, float16 or float32, with a column of
            ones; other columns have mean 0 and standard deviation 1 at most.
        group_size (`int`): G, rollouts of a prompt.
        seed (`int`, *optional*, defaults to 0): of everything random.
        settings ([`OnlineSettings`], *optional*): defaults to those that were tuned.
        pool (`np.ndarray` of shape `(n,)`, *optional*): rows that may be drawn, all by default.
        choosable (`np.ndarray` of shape `(m,)`, *optional*): rows of the pool that may be chosen, all by default.
            Uniform draws are of the whole pool.
        order ([`Order`], *optional*): of uniform draws; random by default.
        read ([`RewardReader`], *optional*): reads rewards; by default as [`read_rewards`].
        kinds (`np.ndarray` of shape `(N,)`, *optional*): the kind of each prompt, as [`Kinds`] takes it; by default
            [`kinds_of`] the features of those that may be chosen. What is chosen depends on them only through
            [`Alignment`], where each counts as its share of the pool.
        target (`np.ndarray` of shape `(N,)`, *optional*): rows to become good at, bool; needs the setting `alignment`.
            What is chosen shall be aligned with the gradients of these, see [`Target`].
        prior (`np.ndarray` of shape `(N,)`, *optional*): success rates that are known beforehand, NaN where not.
        groups (`float`, *optional*): of the whole run; in a short one the prediction is judged sooner.

    Raises:
        `ValueError`: the features, the group size, the target or the prior have another shape or range.
    """

    def __init__(
        self,
        features: np.ndarray,
        *,
        group_size: int,
        seed: int = 0,
        settings: OnlineSettings | None = None,
        pool: np.ndarray | None = None,
        choosable: np.ndarray | None = None,
        order: Order | None = None,
        read: RewardReader = read_rewards,
        kinds: np.ndarray | None = None,
        target: np.ndarray | None = None,
        prior: np.ndarray | None = None,
        groups: float | None = None,
    ):
        features = checked_features(features)
        if group_size < 2:
            raise ValueError(
                f"`group_size` is {group_size}, but a group of one rollout has no gradient. Use 2 or more."
            )
        self.settings = settings = OnlineSettings() if settings is None else settings
        self.features, self.group_size, self.seed = features, group_size, seed
        self.pool = rows_of("pool", np.arange(len(features)) if pool is None else pool, len(features))
        self.choosable = self.pool if choosable is None else rows_of("choosable", choosable, len(features))
        self.candidates = Candidates(self.choosable, len(features), settings.candidates)
        self._read = read
        self._prior = known_rates(prior, self.pool, len(features))
        self.predictor = SuccessPredictor(features, settings, self._prior)
        self.memory = PromptMemory(len(features), len(self.pool), settings)
        self.judge = Judge(settings, groups, mean_rate(self._prior))
        self.scored = Scored(features, settings)
        self.scale, self.curve = RewardScale(), VarianceCurve()
        self.history = History(settings.history_groups)
        labels = kinds_of(features, self.choosable, seed) if kinds is None else kinds
        self.kinds = Kinds(labels, self.pool, len(features))
        watched = Progress(self.kinds.labels, len(self.kinds), group_size, settings, groups)
        self.progress: Progress | None = watched if settings.kinds_count else None
        self.target = None if target is None else Target(target, self.pool, len(features), seed, settings)
        aligned = Alignment(features, self.kinds.labels, self.pool, settings, target) if settings.alignment else None
        self.alignment: Alignment | None = aligned
        self.order = UniformDraws(self.pool, Permutations(len(self.pool), seed) if order is None else order)
        self.flight = Flight.empty()
        self.completions: dict[int, str] = {}  # of suspects, by row
        self.drawn = 0  # draws so far
        self.steps = 0  # optimizer steps so far
        self._latest: dict[str, float] = {}  # shares and means of the groups that were observed last

    @property
    def clock(self) -> float:
        """Half-lives of the policy so far: by optimizer steps, but no faster than groups came in."""
        settings = self.settings
        return min(self.steps / settings.half_life_steps, self.history.observed / settings.half_life_groups)

    # Choosing ---------------------------------------------------------------------------------------------------

    def choose(self, n: int) -> list[Draw]:
        """
        Choose the next `n` prompts.

        Raises:
            `ValueError`: `n` is less than 1.
        """
        if n < 1:
            raise ValueError(f"`choose({n})` asks for no prompt. Ask for 1 or more.")
        settings, first = self.settings, self.drawn
        self.flight = self.flight.not_given_up(self.drawn, settings.give_up)
        generator = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, first]))
        candidates, random = self.candidates.draw(self.memory, first + n, generator)
        a, b, recent = self._posterior(candidates)
        utility = self.utility(a, b) * self.scored.chance(candidates, self.memory.unscored[candidates])
        if self.alignment is not None:
            utility = utility * self.alignment.factor(candidates)
        if self.progress is not None:
            utility = utility * self.progress.factors(candidates)
        # The last digits may differ between processes, whose choices must not
        ranks = np.round(utility / (1 + recent), 9)
        flying = self.flight.rows
        # A prompt that has rested before the last of these draws has rested: else longer chunks would round rests up
        rested = (self.memory.ready[candidates] < first + n) & ~np.isin(candidates, flying)
        if settings.sharpness:  # the greatest of these are a draw without replacement: Gumbel's trick
            logs = np.where(rested, settings.sharpness * np.log(np.maximum(ranks, 1e-9)), -np.inf)
            kinds = self.kinds.labels[candidates]
            logs = raised(logs, a / (a + b), kinds, self.kinds.sizes, settings.least_kind_share)
            ranks = np.round(logs + generator.gumbel(size=len(ranks)), 9)
        ranked = np.lexsort((generator.random(len(candidates)), -ranks))
        best = ranked[rested[ranked]]
        predicted = (a[:random] / (a + b)[:random]).mean()
        self.judge.decide(utility[best[: settings.headroom_prompts]], utility[:random].mean(), predicted, n)
        choosing = self.judge.choosing
        uniform = rounded(self.judge.uniform * n, generator) if choosing else n
        rows = self.order.take(uniform, flying if choosing else None)
        if choosing and self.target is not None and self.alignment is not None:
            taken = np.concatenate([flying, np.array(rows, dtype=np.int32)])
            rows += self.target.take(self.judge.uniform * n, n - uniform, taken, generator)
        places, unchosen = np.arange(n), len(rows)
        if unchosen < n:
            rows += self._best(candidates, ranked, rested, flying, rows, n - unchosen)
        rows += self.order.take(n - len(rows))  # a pool may be smaller than `n`
        aimed = (places >= uniform) & (places < unchosen)
        self._take_off(np.array(rows, dtype=np.int32), places < uniform, aimed, choosing)
        return [Draw(first + place, row) for place, row in enumerate(rows)]

    def _take_off(self, rows, uniform, aimed, choosing):
        numbers, same = self.drawn + np.arange(len(rows)), np.ones(len(rows))
        a, b, _ = self._posterior(rows)
        drawn = Flight(
            numbers=numbers,
            rows=rows,
            clock=self.clock * same,
            uniform=uniform,
            aimed=aimed,
            choosing=same * choosing > 0,
            learnt=same * (self._prior is not None or self.history.observed) > 0,
            prior=self.predictor.predict(rows),
            slow=self.predictor.predict(rows, slow=True),
            a=a,
            b=b,
            relative=np.full(len(rows), np.nan) if self.alignment is None else self.alignment.expect(rows),
        )
        self.memory.rest(rows, numbers)
        self.flight = self.flight + drawn
        self.drawn += len(rows)

    def _best(self, candidates, ranked, rested, flying, taken, number) -> list[int]:
        """Return the best that have rested, then those whose rest ends soonest, those in flight last."""
        free = ~np.isin(candidates, taken)
        best = ranked[(rested & free)[ranked]]
        if len(best) < number:
            others = np.flatnonzero(free & ~rested)
            rows = candidates[others]
            times = np.bincount(flying, minlength=len(self.features))[rows]
            best = np.concatenate([best, others[np.lexsort((self.memory.ready[rows], times))]])
        return candidates[best[:number]].tolist()

    def utility(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """
        Return what prompts of success ~ Beta(a, b) are ranked on: the expected p (1 - p); of graded rewards the
        expected variance.
        """
        if self.settings.utility == "deviation" and not self.settings.graded:
            return expected_deviation(a, b, self.group_size)
        return self.curve(a / (a + b)) if self.settings.graded else expected_learnability(a, b)

    @property
    def _weight(self) -> float:
        """Pseudo-counts of a rollout: 1 for pass or fail, more for graded rewards that vary less within a group."""
        return 1 / max(self.curve.ratio, self.settings.least_noise) if self.settings.graded else 1.0

    def posterior(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a and b of the Beta posteriors of the success rates of these rows, of shape `(n,)` each."""
        return self._posterior(rows)[:2]

    def _posterior(self, rows):
        prior, strength = self.predictor.predict(rows), self.predictor.concentration
        successes, failures, recent = self.memory.evidence(rows, self.clock)
        return strength * prior + successes, strength * (1 - prior) + failures, recent

    # Learning ---------------------------------------------------------------------------------------------------

    def observe(self, groups: Sequence[Group]) -> None:
        """
        Learn from finished groups, in any order. A group that was observed before, or given up, changes nothing. A
        group that never comes is given up when `give_up` groups of later draws have come.

        Every part learns from the same [`Batch`], in which the state before is written down, so the order of the parts
        does not matter.

        Raises:
            `ValueError`: a group names a draw that was never made, or another row than its draw; or its rewards have
                another shape.
        """
        places = self.flight.places(groups, self.drawn)
        if not places:
            return
        known = list({group.number: group for group in groups if group.number in places}.values())
        batch = self._batch(self.flight[np.array([places[group.number] for group in known])], known)
        self.flight = self.flight[~np.isin(self.flight.numbers, batch.drawn.numbers)]
        drawn, uniform = batch.drawn, batch.drawn.uniform & batch.scored
        self._latest = self.history.observe(batch)
        self.judge.observe(drawn.predicted[uniform], batch.rates[uniform], drawn.learnt[uniform])
        if self.settings.graded:
            self.curve.observe(drawn.predicted[batch.scored], np.nanvar(batch.outcomes[batch.scored], axis=1))
            self.predictor.noise = self.curve.ratio
        predicted = np.where(drawn.learnt, drawn.prior, np.nan)
        self.predictor.observe(drawn.numbers, drawn.rows, drawn.clock, batch.successes, batch.trials, predicted)
        self.scored.observe(batch)
        self.kinds.observe(batch)
        if self.progress is not None:
            self.progress.observe(batch)
        if self.target is not None:
            self.target.observe(batch)
        if self.alignment is not None:
            self.alignment.wait_for(drawn[batch.live])
        self.memory.observe(batch, self._weight)
        self.history.record(self._state_of_the_pool())
        self.remember({group.row: group.completion for group in known if group.completion is not None})

    def observe_gradients(self, gradients: Sequence[Gradient]) -> None:
        """
        Learn from the gradients of groups that were observed, in any order. One of another group, or that came before,
        changes nothing; nor does any without the setting `alignment`.

        Raises:
            `ValueError`: sketches have different lengths, or numbers that are not finite.
        """
        if self.alignment is not None:
            rows, values = self.alignment.observe(gradients)
            self.kinds.observe_alignment(rows, values)

    def without_gradients(self) -> None:
        """Go on by success alone, as no gradients can be had."""
        self.alignment = None

    def read_with(self, read: RewardReader) -> None:
        """Read rewards in another way from now on, such as one that can be pickled."""
        self._read = read

    def number_of(self, row: int) -> int | None:
        """
        Return the number of the earliest draw of a row that was not observed yet, for training loops that know a group
        by its prompt alone; `None` if there is none.
        """
        found = self.flight.numbers[self.flight.rows == row]
        return int(found[0]) if len(found) else None

    def _batch(self, drawn, groups) -> Batch:
        rewards, sizes = stacked(groups)
        deciding, advantages = self._read(rewards)
        masked = np.arange(deciding.shape[1]) >= sizes[:, None]  # rollouts that a shorter group has not
        for row, size, group in zip(masked, sizes.tolist(), groups, strict=True):
            if group.masked is not None:
                row[:size] = checked_mask(group, size)
        live = has_gradient(advantages, ~masked)
        outcomes = self._outcomes(deciding)
        dead = masked.all(1) | (~live & varies(outcomes))  # it teaches nothing, whatever its rewards
        outcomes[dead] = np.nan
        rows, memory = drawn.rows, self.memory
        before = memory.visits[rows].copy(), memory.is_retired(rows), memory.is_parked(rows)
        return Batch(drawn, outcomes, sizes, masked, live, dead, *before, count_inconsistent(outcomes, groups))

    def _outcomes(self, deciding):
        """Return 1 for a success, else 0; graded rewards scaled to [0, 1]. NaN where there is none."""
        if self.settings.graded:
            return self.scale(deciding)
        self.scale.learn(deciding)
        return np.where(np.isfinite(deciding), is_success(deciding, self.settings.success_threshold), np.nan)

    def _state_of_the_pool(self) -> dict[str, float]:
        judge = self.judge
        return {
            "step": self.steps,
            "pool_success": judge.pool_success,
            "skill": judge.skill,
            "headroom": judge.headroom,
            **self.memory.counts(),
        }

    def tick(self, steps: int) -> None:
        """
        Count optimizer steps that were taken since the last call.

        Raises:
            `ValueError`: a negative number.
        """
        if steps < 0:
            raise ValueError(f"`tick({steps})` would turn back the clock. Pass the steps since the last call.")
        self.steps += steps

    # What is known, and kept ------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return values for a log, of the groups that were observed last and of the pool; empty before any."""
        if not self._latest:
            return {}
        found = {"suspects": self.num_suspects(), "lost_kinds": int(self.kinds.lost().sum())}
        values = self._latest | self._state_of_the_pool() | found
        more = {} if self.alignment is None else self.alignment.metrics()
        more |= {} if self.target is None else self.target.metrics()
        more |= {} if self.progress is None else {"idle_kinds": float(self.progress.is_idle().sum())}
        return {name: float(values[name]) for name in _LOGGED} | more

    def report(self, kind_names: list[str] | None = None) -> dict:
        """
        Return the state as plain columns and numbers, for people to read; `trl_learnalign.report.online_page` makes a
        page of it.

        Args:
            kind_names (`list[str]`, *optional*): names of the kinds, where `kinds` were given.

        Returns:
            `dict`: `prompts`, a column of shape `(n,)` for each thing known of the prompts of the pool; `history`, one
            of shape `(t,)` for each value logged; `suspects` and `noise`, columns of the prompts whose answers or
            rewards may be wrong; `run`, the other numbers, for JSON. docs/files.md explains all of them.
        """
        return read_curriculum(self, kind_names)


_LOGGED = (
    *("choosing", "live_fraction", "live_chosen", "live_uniform", "predicted_success", "observed_success"),
    *("pool_success", "skill", "headroom", "retired", "unscored", "suspects", "lost_kinds"),
)
