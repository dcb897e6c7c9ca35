"""The order of the prompts of a run: a pure function of a seed and a short log of selections."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.utils.data import Sampler

from .config import LearnAlignConfig


STATE_VERSION = 1


@dataclass(frozen=True)
class Version:
    """From chunk `start_chunk` on the stream visits `indices`, or goes on with random prompts if they are empty."""

    start_chunk: int
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """
    What the trainer's configuration says of the stream. Equal layouts make equal streams.

    Attributes:
        pool_size (`int`): rows of the training dataset.
        num_prompts (`int`): prompts to select, at most `pool_size`.
        warmup_prompts (`int`): see [`LearnAlignConfig`].
        chunk_prompts (`int`): prompts that are generated for at once, `generation_batch_size // num_generations`.
        repeats (`int`): batches that reuse a chunk, `steps_per_generation * num_iterations`.
        group_size (`int`): the trainer's `num_generations`.
        accumulation (`int`): batches per optimizer step.
        read_ahead (`int`): batches that the dataloader has drawn beyond the one in use.
        epochs (`float`): the trainer's `num_train_epochs`.
        shuffle (`bool`): the trainer's `shuffle_dataset`.
        seed (`int`): the trainer's `seed`.
    """

    pool_size: int
    num_prompts: int
    warmup_prompts: int
    chunk_prompts: int
    repeats: int
    group_size: int
    accumulation: int
    read_ahead: int
    epochs: float
    shuffle: bool
    seed: int

    @property
    def warmup_chunks(self) -> int:
        """Chunks that hold the warm-up prompts."""
        return math.ceil(self.warmup_prompts / self.chunk_prompts)

    @property
    def warmup_end(self) -> int:
        """
        Chunk that the first selection starts with if the warm-up ends inside an epoch: the warm-up, the rest of the
        optimizer step that ends it, and what the dataloader has read ahead by then.
        """
        if not self.warmup_prompts:
            return 0
        steps = math.ceil(self.warmup_chunks * self.repeats / self.accumulation)
        return math.ceil((steps * self.accumulation + self.read_ahead) / self.repeats)

    @property
    def epoch_chunks(self) -> int:
        """Chunks of an epoch. `epochs` epochs hold the warm-up and as many passes over the selection."""
        total = self.warmup_end + math.ceil(self.epochs * self.num_prompts / self.chunk_prompts)
        return math.ceil(total / self.epochs)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch; the last one may accumulate fewer batches."""
        return math.ceil(self.epoch_chunks * self.repeats / self.accumulation)

    def batches_trained(self, step: int) -> int:
        """Batches (a chunk makes `repeats` of them) that have been trained on after optimizer step `step`."""
        epochs, rest = divmod(step, self.epoch_steps)
        epoch_batches = self.epoch_chunks * self.repeats
        return epochs * epoch_batches + min(rest * self.accumulation, epoch_batches)

    def chunks_trained(self, step: int) -> int:
        """Whole chunks that have been trained on, all their repeats, after optimizer step `step`."""
        return self.batches_trained(step) // self.repeats

    def steps_of(self, chunks: int) -> int:
        """Optimizer step after which the first `chunks` chunks have been trained on, all their repeats."""
        epochs, rest = divmod(chunks, self.epoch_chunks)
        return epochs * self.epoch_steps + math.ceil(rest * self.repeats / self.accumulation)

    @property
    def first_selection(self) -> tuple[int, int]:
        """The optimizer step after which the first selection is made, and the chunk that it takes effect with."""
        if not self.warmup_prompts:
            return 0, 0
        step = self.steps_of(self.warmup_chunks)
        drawn = math.ceil((self.batches_trained(step) + self.read_ahead) / self.repeats)
        return step, min(
            drawn, math.ceil(step / self.epoch_steps) * self.epoch_chunks
        )  # an epoch's dataloader ends with it

    def prompts_trained(self, step: int) -> float:
        """Prompts that have been trained on after optimizer step `step`."""
        return self.batches_trained(step) / self.repeats * self.chunk_prompts


@dataclass
class _Passes:
    """The passes over one version so far."""

    generator: torch.Generator
    indices: torch.Tensor
    orders: list[list[int]] = field(default_factory=list)


class LearnAlignSampler(Sampler[int]):
    r"""
    Sampler that trains on random prompts during the warm-up and on the selected prompts afterwards.

    Pass it to [`LearnAlignGRPOTrainer`] as `train_sampler`, or to [`LearnAlignCallback`]; either binds it to the
    trainer. One sampler serves one trainer.

    The run is a stream of chunks. `chunk(i)` is a pure function of the layout, the log of versions and i:

        chunk     0    1    2    3    4    5    6    7    8        chunk_prompts = 2, group_size = 3, repeats = 2
        version   0    0    0    1    1    1    1    2    2
        log       (0, random)    (3, selection 1)    (7, selection 2)
                  |
                  a a a b b b   a a a b b b      <- one chunk: each prompt `group_size` times, all `repeats` times

    Within a version, prompts are visited pass by pass, each pass a new permutation, or in the order of
    `prompt_order`; a chunk may contain the end of one pass and the beginning of the next. So no prompt is dropped, and two prompts of a version are
    visited equally often, or one of them once more.

    Args:
        config ([`LearnAlignConfig`], *optional*): defaults to the paper's settings for GSM8K.
    """

    def __init__(self, config: LearnAlignConfig | None = None):
        self.config = config if config is not None else LearnAlignConfig()
        if not isinstance(self.config, LearnAlignConfig):
            raise TypeError(f"`config` must be a LearnAlignConfig, but is a {type(self.config).__name__}.")
        self.layout: Layout | None = None
        self.log: list[Version] = []
        self.epoch = 0
        self.cursor = 0
        self._passes: dict[int, _Passes] = {}

    def bind(self, layout: Layout) -> None:
        """
        Ties the sampler to a trainer. Called by the trainer or the callback, not by users.

        Raises:
            `ValueError`: the sampler serves another trainer already.
        """
        if self.layout is not None:
            raise ValueError(
                "This LearnAlignSampler already belongs to a trainer, and its state would be shared by both. Make a "
                "new LearnAlignSampler for each trainer."
            )
        self.layout = layout
        self.reset()

    def reset(self) -> None:
        """Forgets all selections."""
        self.log = [Version(0, ())]
        self.epoch = self.cursor = 0
        self._passes = {}

    def append(self, start_chunk: int, indices: list[int]) -> None:
        """Adds a version to the log: from `start_chunk` on, train on `indices` (empty: random prompts)."""
        last = self.log[-1].start_chunk
        if start_chunk < last:
            raise ValueError(f"A version cannot start at chunk {start_chunk}, before the last one, at {last}.")
        self.log.append(Version(start_chunk, tuple(indices)))

    def chunk(self, i: int) -> list[int]:
        """Dataset indices of the prompts of chunk `i`, of length `chunk_prompts`."""
        number = bisect_right(self.log, i, key=lambda version: version.start_chunk) - 1
        version = self.log[number]
        if not version.indices:  # random prompts: the order of version 0, as if nothing had been selected
            number, version = 0, self.log[0]
        size = len(version.indices) if number else self.layout.pool_size
        first = (i - version.start_chunk) * self.layout.chunk_prompts
        positions = range(first, first + self.layout.chunk_prompts)
        return [self._pass(number, position // size)[position % size] for position in positions]

    def _pass(self, number, k):
        """The k-th pass over version `number`: its indices in the order of the pass."""
        if number not in self._passes:
            # Version 0 draws its permutations as TRL's RepeatSampler does
            generator = torch.Generator().manual_seed(self.layout.seed + number * 1_000_003)
            self._passes[number] = _Passes(generator, self._indices(number))
        passes = self._passes[number]
        while len(passes.orders) <= k:
            shuffled = self.layout.shuffle and (number == 0 or self.config.prompt_order == "shuffle")
            order = torch.randperm(len(passes.indices), generator=passes.generator) if shuffled else slice(None)
            passes.orders.append(passes.indices[order].tolist())
        return passes.orders[k]

    def _indices(self, number):
        """Of a version, before they are shuffled: by row, or by rank, or folded."""
        if not number:
            return torch.arange(self.layout.pool_size)
        ranked = torch.tensor(self.log[number].indices, dtype=torch.int64)
        match self.config.prompt_order:
            case "ranked":
                return ranked
            case "folding":
                return torch.cat([ranked[first :: self.config.fold] for first in range(self.config.fold)])
            case _:
                return ranked.sort().values

    def set_epoch(self, epoch: int) -> None:
        """The next iteration yields epoch `epoch`."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self._bound().epoch_chunks
        for i in range(first, first + self.layout.epoch_chunks):
            self.cursor = i + 1
            prompts = self.chunk(i)
            for _ in range(self.layout.repeats):
                for index in prompts:
                    for _ in range(self.layout.group_size):
                        yield index

    def __len__(self) -> int:
        layout = self._bound()
        return layout.epoch_chunks * layout.repeats * layout.chunk_prompts * layout.group_size

    def _bound(self) -> Layout:
        if self.layout is None:
            raise RuntimeError(
                "This LearnAlignSampler belongs to no trainer yet. Pass it to LearnAlignGRPOTrainer as `train_sampler`, "
                "or call `trainer.add_callback(LearnAlignCallback(trainer, sampler))` on a trainer already built."
            )
        return self.layout

    def state_dict(self) -> dict:
        """The log and the layout as plain values, for JSON."""
        layout = {name: getattr(self._bound(), name) for name in _STREAM_FIELDS}
        log = [{"start_chunk": version.start_chunk, "indices": list(version.indices)} for version in self.log]
        return {"state_version": STATE_VERSION, "layout": layout, "log": log}

    def load_state_dict(self, state: dict) -> None:
        """
        Restores the log.

        Raises:
            `ValueError`: the state is damaged, or was made for another stream (other data, batch size, number of
                processes or seed), which would train on other prompts.
        """
        layout = self._bound()
        try:
            version, saved = state["state_version"], state["layout"]
            log = [Version(entry["start_chunk"], tuple(entry["indices"])) for entry in state["log"]]
            starts = [entry.start_chunk for entry in log]
            indices = [index for entry in log for index in entry.indices]
            whole = all(type(number) is int and number >= 0 for number in starts + indices)
        except (KeyError, TypeError) as error:
            raise ValueError(f"The sampler state in the checkpoint is damaged: {error!r}.") from error
        if version != STATE_VERSION:
            raise ValueError(f"The sampler state has version {version!r}, but this package reads {STATE_VERSION}.")
        changed = [
            f"{name} was {saved.get(name)!r} and is {getattr(layout, name)!r}"
            for name in _STREAM_FIELDS
            if saved.get(name) != getattr(layout, name)
        ]
        if changed:
            raise ValueError(
                "The checkpoint was written for another stream of prompts: "
                + "; ".join(changed)
                + f". {_to_train_longer(layout, saved.get('epochs'))}Resume with the "
                "settings, the data and the number of processes of the first run (or keep `per_device_train_batch_size` x "
                "processes, `steps_per_generation` and `gradient_accumulation_steps` the same), or start a new run."
            )
        if not whole or not starts or starts[0] != 0 or starts != sorted(starts):
            raise ValueError(f"The sampler state in the checkpoint is damaged: versions start at {starts[:10]}.")
        if indices and max(indices) >= layout.pool_size:
            raise ValueError(
                f"The sampler state in the checkpoint names row {max(indices)}, but the training dataset has "
                f"{layout.pool_size} rows."
            )
        self.log = log
        self._passes = {}


def _to_train_longer(layout, epochs) -> str:
    """What to do instead of changing `num_train_epochs`, if that was changed."""
    if epochs == layout.epochs or not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
        return ""
    steps = replace(layout, epochs=epochs).steps_of(math.ceil(layout.epochs * layout.epoch_chunks))
    return (
        f"The length of an epoch follows from `num_train_epochs`, so to train longer (or shorter) keep "
        f"`num_train_epochs={epochs}` and set `max_steps`: `max_steps={steps}` are {layout.epochs} passes over the selection. "
    )


# Fields of the layout that a stream depends on: `epochs` decides the length of an epoch; `read_ahead` is left out, as the
# log says where a selection really took effect
_STREAM_FIELDS = (
    "pool_size",
    "num_prompts",
    "warmup_prompts",
    "chunk_prompts",
    "repeats",
    "group_size",
    "accumulation",
    "epochs",
    "shuffle",
    "seed",
)
