"""Rollouts of a pool, in rounds of all processes; they stay on the disk and are read back prompt by prompt."""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from ..curriculum.rewards import is_success
from ..ground.hashing import stable_hash
from ..ground.progress import progress_bar
from ..ground.store import Log
from ..host import Host
from ..host.checks import check_vllm
from ..host.groups import RolloutGroup, deal
from ..host.rewards import check_success_reward
from .base import Context, Finding, Measure
from .parts import generate_in_parts, joined, prompts_per_batch, rollouts_at_once
from .pool import Pool
from .racing import Prior, check_race, contenders, fit_prior, rounds_of
from .records import decode, encode


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


# By default a pool is cut into at least so many batches, so that as many processes have work
LEAST_BATCHES = 64
MOST_FOLD = 64  # and a batch is at most so many times training's

_KEY_OF_RACE = ("num_prompts", "success_threshold", "success_reward")
_FITTING = 1 << 63  # and the rank of a process: the name of the record of how many rollouts fit into its memory


class RolledOut(Finding):
    """
    The rollouts of some prompts.

    Attributes:
        own ([`Rollouts`]): of this process.
        pool ([`Pool`]): what those of all processes found out.
        seconds (`float`): what they took.
    """

    def __init__(self, own: "Rollouts", pool: Pool, seconds: float = 0.0):
        super().__init__(pool.table())
        self.own, self.pool, self.seconds = own, pool, seconds

    @property
    def learnable(self) -> list[int]:
        """Rows with V > 0."""
        return self.pool.rows[self.pool.learnability > 0].tolist()


class RolloutMeasure(Measure):
    """`num_rollouts` completions of every prompt, with their rewards."""

    name = "rollouts"
    columns = ("success_rate", "learnability", "reward_mean", "reward_std", "completion_length_mean")
    price = "rollouts"

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """Raise a `ValueError` for an unknown or missing reward name, and for vLLM that mixes completions up."""
        check_success_reward(host.reward_names, config.success_reward, config.learnability)
        check_vllm(host)
        if config.rollouts == "racing":
            check_race(host, config)

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return what generation and rewards depend on; in a race also what tells who goes on."""
        found, config = {**made_from(context, len(rows)), **super().key(context, rows)}, context.config
        if config.rollouts == "racing":
            found |= {f"`{name}`": getattr(config, name) for name in ("rollouts", *_KEY_OF_RACE)}
            found["rollouts of a training step"] = context.host.rows_at_once
        return found

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Roll out every prompt."""
        started = time.perf_counter()
        prior = None
        if context.config.rollouts == "racing":
            own, prior = race(context, rows, log)
        else:
            at_once = prompts_at_once(context.host, context.config, context.num_rollouts, len(rows))
            own = roll_out(context, context.dataset, rows, log, at_once)
        seconds = context.clock("rollouts", started)
        pool = gather_rewards(context, own)
        if prior is not None:
            pool.expect(prior, context.config.success_threshold)
        context.note(pool.provenance())
        return RolledOut(own, pool, seconds)

    def made_up(self, table: pd.DataFrame, num_rollouts: int, longest: int) -> Finding:
        """Return success rates from 0 to 1, and lengths up to `longest` tokens."""
        places = np.arange(len(table))
        rates = (7 * places + 1) % (num_rollouts + 1) / num_rollouts
        columns = {
            "success_rate": rates,
            "learnability": rates * (1 - rates),
            "reward_mean": rates,
            "reward_std": np.sqrt(rates * (1 - rates)),
            "completion_length_mean": 1 + (13 * places) % max(longest, 1) * 1.0,
        }
        return Finding(pd.DataFrame(columns, index=table.index))


def made_from(context: Context, pool: int) -> dict:
    """Return what the rollouts of a selection from `pool` prompts depend on, see [`Measure.key`]."""
    host, found = context.host, context.identity
    parts = {f"reward function `{name}`": part for name, part in found["rewards"]}
    parts |= {f"environment `{name}`": part for name, part in found["environments"].items()}
    parts |= {f"the trainer's {name}": part for name, part in found["own code"].items()}
    parts |= {"order of the reward functions": [name for name, _ in found["rewards"]]}
    parts |= {"`rollout_func`": found["rollout_func"]}
    parts |= {f"`{name}`": part for name, part in found["generation"].items()}
    return parts | {
        "seed": context.seed,
        "step": context.step,
        "`num_rollouts`": context.num_rollouts,
        "prompts at once (`rollout_batch_prompts`)": prompts_at_once(host, context.config, context.num_rollouts, pool),
        "rollouts at once": rollouts_at_once(host, context.num_rollouts),
        "penalties": host.has_penalties and "gradients" in context.prices,
    }


def gather_rewards(context: Context, own: "Rollouts") -> Pool:
    """Return what the rollouts of all processes found out, on every process."""
    columns = own.rows, own.rewards, own.penalties, own.lengths, own.trained, own.made
    gathered = zip(*context.peers.gather(columns), strict=True)
    rows, *others = (torch.from_numpy(np.concatenate(parts)) for parts in gathered)
    return Pool.of_rewards(context.config, context.host, rows, *others)


def prompts_at_once(host: Host, config, num_rollouts: int, pool: int) -> int:
    """
    Return the prompts of a batch, which one process generates for at once: `rollout_batch_prompts`, or training's
    batch, doubled while the pool of `pool` prompts has `LEAST_BATCHES` of them and at most `MOST_FOLD` times. The
    number does not depend on that of the processes, since the rollouts depend on it. A reward model scores all
    rollouts of a batch at once, and cannot do so in halves, nor can sharded weights generate in halves: there the
    batch is training's.
    """
    if config.rollout_batch_prompts is not None:
        return config.rollout_batch_prompts
    size = least = prompts_per_batch(host, num_rollouts)
    at_once = host.has_reward_model or host.is_sharded
    while not at_once and size < MOST_FOLD * least and 2 * size * LEAST_BATCHES <= pool:
        size *= 2
    return size


class Rollouts:
    """
    The groups of this process. Rewards, lengths and counts of all of them are in memory; the tokens are read from the
    log.

    Attributes:
        rows (`np.ndarray` of shape `(n,)`): dataset rows, in the order of the batches.
        rewards (`np.ndarray` of shape `(n, G, F)`): float32, NaN where a reward function gave none, or a race made no
            rollout.
        penalties (`np.ndarray` of shape `(n, G)`): float32, see [`RolloutGroup`].
        lengths, prompt_lengths, trained (`np.ndarray` of shape `(n, G)`): tokens of completions and of prompts, and
            how many tokens of the completion count in the loss; int32, 0 where no rollout was made.
        made (`np.ndarray` of shape `(n,)`): how many of the G rollouts of a prompt were made, the first ones.
        found (`bool`): whether some had been finished before the run began.
    """

    def __init__(self, log: Log, num_rollouts: int, num_rewards: int):
        self.log = log
        self.found = False
        self._batches = [
            (
                np.empty(0, np.int64),
                np.empty((0, num_rollouts, num_rewards), np.float32),
                np.empty((0, num_rollouts), np.float32),
                *(np.empty((0, num_rollouts), np.int32) for _ in range(3)),
            )
        ]
        self._place: dict[int, int] = {}

    def add(self, groups: list[RolloutGroup]) -> None:
        """Note groups whose records are in the log."""
        values = (
            np.array([group.row for group in groups], np.int64),
            np.stack([group.rewards for group in groups]),
            np.stack([group.penalties for group in groups]),
            np.array([[len(ids) for ids in group.completion_ids] for group in groups], np.int32),
            np.array([[len(ids) for ids in group.prompt_ids] for group in groups], np.int32),
            np.array([[mask.sum() for mask in group.loss_masks] for group in groups], np.int32),
        )
        self._batches.append(values)

    def close(self) -> None:
        """Note that all groups are there."""
        columns = [np.concatenate(parts) for parts in zip(*self._batches, strict=True)]
        self.rows, self.rewards, self.penalties, self.lengths, self.prompt_lengths, self.trained = columns
        self._place = {row: place for place, row in enumerate(self.rows.tolist())}
        self.made = np.full(len(self.rows), self.lengths.shape[1])
        self.records = np.ones(len(self.rows), np.int64)
        self._batches = []

    @classmethod
    def joined(cls, rounds: "list[Rollouts]", size: int) -> "Rollouts":
        """Join the rounds of a race, each of rows of the one before, as groups of `size` that may have gaps."""
        own, start = copy.copy(rounds[0]), 0
        places = [[own.place(row) for row in one.rows.tolist()] for one in rounds]
        for name in ("rewards", "penalties", "lengths", "prompt_lengths", "trained"):
            parts, start = [getattr(one, name) for one in rounds], 0
            whole = np.zeros((len(own.rows), size, *parts[0].shape[2:]), parts[0].dtype)
            if name == "rewards":
                whole[:] = np.nan
            for place, part in zip(places, parts, strict=True):
                whole[place, start : start + part.shape[1]] = part
                start += part.shape[1]
            setattr(own, name, whole)
        own.made, own.records = np.zeros((2, len(own.rows)), np.int64)
        for place, one in zip(places, rounds, strict=True):
            own.made[place] += one.lengths.shape[1]
            own.records[place] += 1
        own.found = any(one.found for one in rounds)
        return own

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def place(self, row: int) -> int:
        """Return where a dataset row is in the arrays."""
        return self._place[row]

    def group(self, row: int, completions: bool = False) -> RolloutGroup:
        """
        Read the rollouts of a dataset row from the disk; without the completions' text or messages unless they are
        asked for.

        Raises:
            `RuntimeError`: they are not there any more, or damaged.
        """
        parts = []
        for number in range(self.records[self._place[row]]):
            payload = self.log.read(_record(row, number))
            if payload is None:
                raise RuntimeError(
                    f"The rollouts of prompt {row} could not be read back from '{self.log.path}'. Check the disk and "
                    "run again: the rollouts that are still there are reused."
                )
            parts.append(decode(payload, completions))
        return joined(parts)

    def __iter__(self) -> Iterator[RolloutGroup]:
        return (self.group(row) for row in self.rows.tolist())


def roll_out(
    context: Context,
    dataset: Dataset,
    rows: Sequence[int],
    log: Log,
    size: int,
    phase: str = "rollouts",
    before: Sequence[Rollouts] = (),
) -> Rollouts:
    """
    Roll out rows of a dataset, and return this process's groups. The batches do not depend on the number of processes,
    and each has its own seed; batch b goes to process b % world. All processes generate in the same rounds, as rewards
    are gathered. A finished batch is written at once, and nothing but its rewards and lengths stays in memory.

    Args:
        context ([`Context`]): inside [`Host.left_as_found`]. All processes must call this.
        dataset (`Dataset`): with the columns that the trainer would see.
        rows (`Sequence[int]`): of the dataset.
        log ([`Log`]): keeps finished batches.
        size (`int`): prompts of a batch.
        phase (`str`, *optional*): for the progress bar; part of the seed.
        before (`Sequence[Rollouts]`, *optional*): the earlier rounds of a race. A prompt stays with the process that
            had it in the first one, to which the others send what they make of it.

    Raises:
        `ValueError`: a rollout has an image, and the score needs gradients.
    """
    host, peers = context.host, context.peers
    batches = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
    world, rank = host.accelerator.num_processes, host.accelerator.process_index
    gradients = "gradients" in context.prices
    if (rows_that_fit := log.read(_FITTING + rank)) is not None:
        # Or the rollouts would be others than without the interruption
        host.halving.rows = int.from_bytes(rows_that_fit, "big")
    found, number = Rollouts(log, host.group_size, len(host.reward_names)), len(before)
    with progress_bar(host, phase, len(rows), "prompts") as bar:
        for first in range(0, len(batches), world):
            # Rewards are gathered, so every process must bring equally many prompts; the last batch is filled up even
            # on one process, so that its rollouts do not depend on the number of processes
            batch, seed_of, mine = deal(batches, first, rank, host.sharing)
            done, fresh = _finished(log, batch, number) if mine else None, []
            found.found |= done is not None
            if not all(peers.gather(done is not None or not mine)):
                padded = batch + [batch[0]] * (min(size, len(rows)) - len(batch))
                seed = stable_hash(context.seed, phase, context.step, seed_of[0])
                groups = generate_in_parts(host, dataset, padded, seed, gradients, peers)
                if done is None and mine:
                    done = fresh = groups[: len(batch)]
            if number:
                done, fresh = _sent(peers, before[0], done or [], fresh, log, number)
            if fresh:
                records = [(_record(group.row, number), encode(group)) for group in fresh]
                if host.halving.rows < math.inf:
                    records.append((_FITTING + rank, int(host.halving.rows).to_bytes(8, "big")))
                log.append(records)
            if done:
                if gradients and any(group.has_images for group in done):
                    raise ValueError(_IMAGES)
                found.add(done)
            bar.update(sum(len(batch) for batch in batches[first : first + world]))
    log.close()
    found.close()
    return found


_IMAGES = (
    "The rollouts have images (from an environment or a tool), and gradients of multimodal prompts are not supported. "
    "Use `score='learnability'`, which takes no gradients."
)


def _record(row, number):
    """Name the record of a prompt's rollouts in a round."""
    return row | number << 48


def _finished(log, batch, number) -> list[RolloutGroup] | None:
    """Return the groups of a batch, if all are in the log; with their completions if they may be sent on."""
    groups = []
    for row in batch:
        payload = log.read(_record(row, number))
        if payload is None:
            return None
        groups.append(decode(payload, completions=number > 0))
    return groups


def _sent(peers, owned, done, fresh, log, number):
    """Send groups to the processes that have their prompts; return this one's, and those that its log lacks."""
    parts = peers.gather((done, bool(fresh)))
    own = [(group, new) for groups, new in parts for group in groups if group.row in owned]
    lacking = [group for group, new in own if new or log.read(_record(group.row, number)) is None]
    return [group for group, _ in own], lacking


def race(context: Context, rows: Sequence[int], log: Log) -> tuple[Rollouts, Prior]:
    """
    Roll out rows of the dataset in rounds, each for the contenders of the round before; see [`contenders`]. Batches
    are made anew in every round, and a reward function gets the rollouts of one round at a time. All processes must
    call this.

    Returns:
        the rollouts of this process, and the prior, which the first round was fitted by.
    """
    host, config, rounds = context.host, context.config, rounds_of(context.num_rollouts)
    done: list[Rollouts] = []
    going, made, spent = np.asarray(rows, np.int64), 0, []
    successes, tries = np.zeros((2, len(context.dataset)), np.int64)
    for number, most in enumerate(rounds):
        phase = f"rollouts, round {number + 1}" if number else "rollouts"
        with host.groups_of(most - made):
            size = prompts_at_once(host, config, most - made, len(going))
            done.append(roll_out(context, context.dataset, going.tolist(), log, size, phase, done))
        spent.append([len(going), most - made])
        made = most
        if made == rounds[-1]:
            break
        for own, counts in context.peers.gather((done[-1].rows, _counts(context, done[-1]))):
            successes[own] += counts[0]
            tries[own] += counts[1]
        if not number:
            prior = fit_prior(successes[going], tries[going])
        kept = contenders(successes[going], tries[going], rounds[-1] - made, config.num_prompts, prior)
        going = going[kept]
        if not len(going):
            break
    used = sum(prompts * each for prompts, each in spent)
    about = {"rounds": spent, "rollouts": used, "of": len(rows) * rounds[-1], "prior": list(prior)}
    context.note({"race": about})
    return Rollouts.joined(done, rounds[-1]), prior


def _counts(context, found):
    """Count the successes of each prompt in a round, and the rollouts that a reward decides."""
    deciding = context.host.deciding(torch.from_numpy(found.rewards), context.config)
    success = is_success(deciding, context.config.success_threshold)
    return success.sum(1).numpy(), (~deciding.isnan()).sum(1).numpy()
