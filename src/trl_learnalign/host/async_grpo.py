"""
The host of AsyncGRPOTrainer, which is experimental in TRL, and what its rollout worker runs in its own process:
imported only where there is a trainer of that class.
"""

import logging
import math
import queue
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, _AsyncRolloutLoop

from ..config import LearnAlignConfig
from ..curriculum.events import Draw, Group
from ..curriculum.feed import Event, Feed, Ledger
from ..curriculum.rewards import DecidedBy, RewardReader, read_rewards
from ..ground.peers import Peers
from ..scores import maths as scoring
from .names import ASYNC_GRPO
from .rewards import success_names
from .trl import Host


logger = logging.getLogger(__name__)

FIRST_WARNING = 64  # groups without a gradient, one after another
ZERO_STD = "frac_reward_zero_std"  # as GRPOTrainer calls it
_WAITED = 600.0  # seconds for events that the worker has sent before


class AsyncGRPOHost(Host):
    """
    [`~trl.experimental.async_grpo.AsyncGRPOTrainer`]: rewards are summed unweighted, groups finish in any order, in
    another process, and are trained on when they come.
    """

    is_asynchronous = True
    names = ASYNC_GRPO
    tried = "1.11 to 1.16"
    settings = ("temperature",)
    arguments = ("bf16", "fp16")

    _names: Sequence[str] = ()
    _environments: list | None = None

    @property
    def group_size(self) -> int:
        return self.args.num_generations

    @property
    def max_steps(self) -> int:
        # Where epochs end the run, after so many groups, TRL's own number is a ceiling: 32 times as many, or more
        groups, most = getattr(self.trainer, "_epoch_stop_groups", None), self.trainer.state.max_steps
        return most if groups is None else min(most, math.ceil(groups / self.layout()["chunk_prompts"]))

    @property
    def worker(self) -> Any:
        """The rollout worker, on the main process; `None` on others."""
        trainer: Any = self.trainer
        return trainer.rollout_worker

    @property
    def has_own_worker(self) -> bool:
        """Tell if the rollout worker is TRL's, which is what the main process has."""
        return isinstance(self.worker, AsyncRolloutWorker)

    def share(self, peers: Peers) -> None:
        """Tell all processes what the worker, which is on the main process, calls. To be called on all, first."""
        worker = self.worker
        settings = worker._loop_kwargs if self.has_own_worker else {}
        made = settings.get("environment_factory")
        names = [
            getattr(function, "__name__", type(function).__name__) for function in settings.get("reward_funcs") or []
        ]
        environments = None if made is None else list(made) if isinstance(made, dict) else [None]
        self._names, self._environments = peers.broadcast((names, environments))

    @property
    def environments(self) -> dict | None:
        """Names of the environments, if there are any; their factories are the worker's alone."""
        return None if self._environments is None else dict.fromkeys(self._environments)

    @property
    def reward_names(self) -> list[str]:
        """
        Names of the reward functions, once [`~AsyncGRPOHost.share`] was called; without an environment's own reward,
        which the worker knows alone.
        """
        return list(self._names)

    def try_rewards(self, row: int) -> None:
        """Do nothing: reward functions are called in the worker alone."""

    @property
    def tokenizer(self) -> Any:
        processor = self.trainer.processing_class
        return getattr(processor, "tokenizer", processor)

    def tokenize(self, prompts: list) -> list[list[int]]:
        """Return the tokens of prompts, text or messages, without tools."""
        processor, settings = self.trainer.processing_class, self.args.chat_template_kwargs or {}
        texts = [
            prompt
            if isinstance(prompt, str)
            else processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **settings)
            for prompt in prompts
        ]
        return processor(texts, add_special_tokens=False)["input_ids"]

    def total(self, rewards: torch.Tensor) -> torch.Tensor:
        return rewards.nansum(-1).masked_fill(rewards.isnan().all(-1), torch.nan)

    def advantages(self, rewards: torch.Tensor, penalties: torch.Tensor) -> torch.Tensor:
        return scoring.advantages(rewards, torch.ones(rewards.shape[-1]), "group")

    def reader(self, config: LearnAlignConfig) -> RewardReader:
        """Return what reads rewards in the worker's process, and here."""
        if config.success_reward is None:
            return read_rewards
        return DecidedBy(tuple(self.reward_names.index(name) for name in success_names(config.success_reward)))

    def layout(self) -> dict:
        """Return the shape of a stream in which each optimizer step trains on whole groups, one after another."""
        self.require("trains")
        args, processes = self.args, self.accelerator.num_processes
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
        return {
            "pool_size": len(self.dataset),
            "chunk_prompts": max(samples // self.group_size, 1),
            "repeats": 1,
            "group_size": self.group_size,
            "accumulation": 1,
            "read_ahead": 1,
            "epochs": args.num_train_epochs,
            "shuffle": True,
            "seed": args.seed,
        }

    @contextmanager
    def plain_attention(self) -> Iterator[None]:
        """
        Let the policy attend as models of transformers do while the context is open: the trainer's own attention takes
        packed sequences alone.
        """
        parts = (getattr(module, "config", None) for module in self.model.modules())
        configs: dict[int, Any] = {id(config): config for config in parts if config is not None}
        before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
        try:
            for key, config in configs.items():
                if before[key] is not None:
                    config._attn_implementation = "sdpa"
            yield
        finally:
            for key, config in configs.items():
                if before[key] is not None:
                    config._attn_implementation = before[key]

    # The worker -------------------------------------------------------------------------------------------------

    def hand_over(self, recipe: "Recipe") -> None:
        """Let the worker draw by a recipe, once it starts."""
        self.worker._loop_cls = OnlineRolloutLoop
        self.worker._loop_kwargs["recipe"] = recipe

    def take_queue(self, ledger: Ledger) -> "SampleQueue":
        """Count the rows that training gets from now on. To be called before training makes its dataloader."""
        trainer: Any = self.trainer
        if self.has_own_worker:
            worker = self.worker
            worker.check_health = partial(_check_alive, worker, worker.check_health)
            worker.stop = partial(_stop_alive, worker, worker.stop)
        trainer.rollout_queue = found = SampleQueue(trainer, trainer.rollout_queue, ledger)
        trainer._trained_groups = found.counted
        return found

    def resume_epochs(self, done: int) -> None:
        """Let so many groups count as trained on before this run began."""
        trainer: Any = self.trainer
        trainer._groups_before_resume = done


def _is_dead(worker) -> bool:
    return worker._process is not None and not worker._process.is_alive()


def _check_alive(worker, check_health, *args, **kwargs):
    """Raise an error if the process has ended, whatever its last sign of life."""
    if _is_dead(worker) and not worker._failed_event.is_set():
        raise RuntimeError(
            f"The process of the rollout worker has ended (exit code {worker._process.exitcode}): it was killed, for "
            "example for its memory. Resume from the last checkpoint; no prompt is lost."
        )
    check_health(*args, **kwargs)


def _stop_alive(worker, stop):
    """Stop the worker, but one that was killed: telling it to stop waits for an answer, for ever."""
    if _is_dead(worker):
        worker._process = None
    stop()


class SpawnedQueue:
    """A queue between processes that may lie in what a spawned process is given; pickled otherwise it is left out."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __getstate__(self):
        return {"inner": None if get_spawning_popen() is None else self.inner}


class Recipe:
    """
    Rules by which the worker's process draws prompts.

    Args:
        curriculum: as it is when the worker starts.
        pending (`list[Draw]`): to be generated again first.
        events (`Queue`): between the processes, of [`Feed`]'s events.
        drop_dead (`bool`): leave groups out that have no gradient.
        steps_per_version (`int`): optimizer steps from one version of the policy to the next.
    """

    def __init__(self, curriculum: Any, pending: list[Draw], events: Any, drop_dead: bool, steps_per_version: int):
        self.curriculum, self.pending, self.drop_dead = curriculum, pending, drop_dead
        self.events, self.steps_per_version = SpawnedQueue(events), steps_per_version

    def feed(self) -> Feed:
        """Make the feed, in the worker's process."""
        return Feed(self.curriculum, self.pending, self.events.inner.put)


class OnlineRolloutLoop(_AsyncRolloutLoop):
    """TRL's loop, with the prompts that a feed hands out, in the worker's process."""

    def __init__(self, *, recipe: Recipe, **kwargs):
        super().__init__(**kwargs)
        self._recipe, self._feed = recipe, recipe.feed()
        self._first_version = self.model_version
        self._drawn: dict[int, int] = {}  # rows of the groups under way
        self._dead, self._warn_at = 0, FIRST_WARNING  # groups without a gradient, one after another

    def _repeat_iterator(self):
        while True:
            draw = self._feed.next()
            self._drawn[draw.number] = draw.row
            row = self.dataset[draw.row]
            for _ in range(self.num_generations):
                yield draw.number, row

    async def _score_group(self, group):
        samples = await super()._score_group(group)
        self._feed.tick((self.model_version - self._first_version) * self._recipe.steps_per_version)
        rewards, masked = _rewards_of(samples, group.completions_sequences, self.reward_func_names)
        dead = not any(abs(sample.advantage) > 1e-6 for sample in samples)
        self._note_dead(dead)
        self._rates[ZERO_STD][0] += dead
        self._rates[ZERO_STD][1] += 1
        kept = [] if dead and self._recipe.drop_dead else samples
        texts = [str(completion[-1].get("content")) if completion else "" for completion in group.completions]
        _, alike = np.unique(texts, return_inverse=True)
        number = group.group_id
        self._feed.finished(Group(number, self._drawn.pop(number), rewards, masked, alike=alike), len(kept), texts[0])
        return kept

    def _note_dead(self, dead):
        """Warn, ever more rarely, while no group has a gradient: training may be waiting, which says nothing."""
        self._dead = self._dead + 1 if dead else 0
        if self._dead < self._warn_at:
            return
        self._warn_at *= 8
        waits = (
            "these are dropped, so training waits for one that has" if self._recipe.drop_dead else "nothing is learnt"
        )
        logger.warning(
            f"The last {self._dead:,} groups have no gradient: all rollouts of a group got the same reward, or no "
            f"token is trained on. {waits[0].upper()}{waits[1:]}. Look at a few completions and their rewards. If all "
            "is as it should be, the prompts are too hard or too easy for this policy."
        )


def _rewards_of(samples, sequences, names) -> tuple[np.ndarray, np.ndarray]:
    """
    Return rewards of shape `(G, F)`, and which rollouts have no token in the loss, `(G,)`. Such a rollout makes no
    sample, which is what names rewards: they are not known.
    """
    rewards = np.full((len(sequences), len(names)), np.nan)
    masked, place = np.ones(len(sequences), bool), 0
    for rollout, rows in enumerate(sequences):
        if rows:
            metrics = samples[place].metrics
            rewards[rollout] = [metrics[f"rewards/{name}"] for name in names]
            masked[rollout] = False
        place += len(rows)
    return rewards, masked


class SampleQueue:
    """
    The queue of samples as training reads it; the ledger is told of those that it drops, and of those trained on.

    Args:
        trainer: the trainer.
        inner (`Queue`): what the worker fills.
        ledger ([`Ledger`]): is told.

    Attributes:
        counted ([`CountedGroups`]): in the place of the trainer's set of groups trained on.
    """

    def __init__(self, trainer: Any, inner: Any, ledger: Ledger):
        self.trainer, self.inner, self.ledger = trainer, inner, ledger
        self.counted = CountedGroups()

    def get(self, *args, **kwargs):
        """Return the next sample that is not stale."""
        trainer = self.trainer
        while True:
            sample = self.inner.get(*args, **kwargs)
            if trainer.model_version - sample.model_version <= trainer.args.max_staleness:
                if 0 < (trainer.args.token_budget or 0) < len(sample.input_ids):  # the trainer will warn, and drop it
                    self.ledger.came(sample.group_id)
                return sample
            self.ledger.came(sample.group_id)
            trainer._metrics["train"]["sample/dropped_stale_total"].append(1.0)

    def qsize(self) -> int:
        return self.inner.qsize()

    def trained(self) -> None:
        """Tell the ledger that the oldest microbatch that was put together was trained on."""
        if self.counted.microbatches:
            for number, samples in self.counted.microbatches.popleft().items():
                self.ledger.came(number, samples)


class CountedGroups(set):
    """A set of groups that keeps how many samples of each every microbatch has."""

    def __init__(self) -> None:
        super().__init__()
        self.microbatches: deque[Mapping[int, int]] = deque()

    def update(self, *groups) -> None:
        """Add the groups of the samples of a microbatch."""
        counts = Counter(number for part in groups for number in part)
        self.microbatches.append(counts)
        super().update(counts)


def drained(events: Any, apply: Callable[[Event], None], wanted: Callable[[], bool] = lambda: False) -> None:
    """
    Apply the events that have come, and wait for more while they are `wanted`.

    Raises:
        `RuntimeError`: no event came for ten minutes.
    """
    while True:
        try:
            event = events.get(timeout=_WAITED) if wanted() else events.get_nowait()
        except queue.Empty:
            if not wanted():
                return
            raise RuntimeError(
                "The rollout worker did not say which groups it has finished, so the checkpoint would generate them "
                "again. See whether its process is alive, and resume from the last checkpoint."
            ) from None
        apply(event)
