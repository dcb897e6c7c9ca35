"""The shape of a stream of prompts, and the arithmetic of chunks, batches and optimizer steps."""

import math
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Layout:
    """
    The shape of a stream, as the trainer's configuration has it. Equal layouts make equal streams.

    Attributes:
        pool_size (`int`): rows of the training dataset.
        num_prompts (`int`): prompts of an epoch, at most `pool_size`.
        warmup_prompts (`int`): random prompts before the first epoch.
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
        """Chunks of an epoch. `epochs` epochs hold the warm-up, if there is one, and `num_prompts` prompts each."""
        if not self.warmup_end:
            return math.ceil(self.num_prompts / self.chunk_prompts)
        total = self.warmup_end + math.ceil(self.epochs * self.num_prompts / self.chunk_prompts)
        return math.ceil(total / self.epochs)

    @property
    def epoch_steps(self) -> int:
        """Optimizer steps of an epoch; the last one may accumulate fewer batches."""
        return math.ceil(self.epoch_chunks * self.repeats / self.accumulation)

    def batches_trained(self, step: int) -> int:
        """Count the batches (a chunk makes `repeats` of them) that are trained on after optimizer step `step`."""
        epochs, rest = divmod(step, self.epoch_steps)
        epoch_batches = self.epoch_chunks * self.repeats
        return epochs * epoch_batches + min(rest * self.accumulation, epoch_batches)

    def chunks_trained(self, step: int) -> int:
        """Count the whole chunks that are trained on, all their repeats, after optimizer step `step`."""
        return self.batches_trained(step) // self.repeats

    def steps_of(self, chunks: int) -> int:
        """Return the optimizer step after which the first `chunks` chunks are trained on, all their repeats."""
        epochs, rest = divmod(chunks, self.epoch_chunks)
        return epochs * self.epoch_steps + math.ceil(rest * self.repeats / self.accumulation)

    def step_of(self, chunk: int) -> int:
        """Return the optimizer step, counted from 1, that begins to train on a chunk."""
        epochs, rest = divmod(chunk, self.epoch_chunks)
        return epochs * self.epoch_steps + rest * self.repeats // self.accumulation + 1

    def chunks_drawn(self, step: int) -> int:
        """Count the chunks that are drawn after a step: a dataloader reads ahead, but ends with its epoch."""
        drawn = math.ceil((self.batches_trained(step) + self.read_ahead) / self.repeats)
        return min(drawn, math.ceil(step / self.epoch_steps) * self.epoch_chunks)

    @property
    def first_selection(self) -> tuple[int, int]:
        """The optimizer step after which the first selection is made, and the chunk that it takes effect with."""
        if not self.warmup_prompts:
            return 0, 0
        step = self.steps_of(self.warmup_chunks)
        return step, self.chunks_drawn(step)

    def prompts_trained(self, step: int) -> float:
        """Count the prompts that are trained on after optimizer step `step`."""
        return self.batches_trained(step) / self.repeats * self.chunk_prompts

    def differences(self, saved: dict) -> list[str]:
        """Compare with `saved`, the fields of another layout. Return a text for each that a stream depends on."""
        return [
            f"{_EXPLAINED.get(name, name)} was {saved.get(name)!r} and is {getattr(self, name)!r}"
            for name in STREAM_FIELDS
            if saved.get(name) != getattr(self, name) and self._matters(name, saved)
        ]

    def _matters(self, name, saved):
        match name:
            case "epochs":
                return self.warmup_end > 0
            case "read_ahead":
                return replace(self, read_ahead=saved.get(name)).epoch_chunks != self.epoch_chunks
        return True


def to_train_longer(layout: Layout, epochs) -> str:
    """Say what to do instead of changing `num_train_epochs`, if that was changed."""
    if epochs == layout.epochs or not isinstance(epochs, (int, float)) or not 0 < epochs < math.inf:
        return ""
    steps = replace(layout, epochs=epochs).steps_of(math.ceil(layout.epochs * layout.epoch_chunks))
    return (
        f"The length of an epoch follows from `num_train_epochs`, so to train longer (or shorter) keep "
        f"`num_train_epochs={epochs}` and set `max_steps`: `max_steps={steps}` are {layout.epochs} epochs. "
    )


# Fields that a stream depends on: all. With a warm-up `epochs` and `read_ahead` decide the length of an epoch; else
# neither matters, as the log says where a selection really took effect
STREAM_FIELDS = tuple(field.name for field in fields(Layout))
_EXPLAINED = {"read_ahead": "read_ahead (1 + `dataloader_num_workers` x `dataloader_prefetch_factor`)"}
