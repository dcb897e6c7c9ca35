"""Batches of training, cut into their rows and put together of others."""

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from trl.trainer.utils import split_pixel_values_by_grid

from ..data.reading import read_rows
from .generation import mask_of_loss


if TYPE_CHECKING:
    from .trl import Host

_PROMPT, _WHOLE = ("prompt_ids", "prompt_mask"), ("token_type_ids", "mm_token_type_ids")
_PIXELS = (
    *("pixel_values", "image_grid_thw", "image_position_ids", "pixel_attention_mask", "spatial_shapes"),
    "image_sizes",
)
# Padding, if not 0. The loss takes exp(reference - policy) of padding, too, which must stay finite to be masked
_FILLING = {"tool_mask": 1, "importance_sampling_ratio": 1, "ref_per_token_logps": -1e4}
Row = dict[str, Any]


def part_of(host: "Host", whole: list) -> list:
    """Return this process's part of what all processes share, equally many each."""
    own = len(whole) // host.accelerator.num_processes
    return whole[host.accelerator.process_index * own :][:own]


def inputs_of(host: "Host", rows: list[int]) -> list[dict]:
    """Read this process's part of the rollouts of rows of the dataset, as the dataloader would."""
    own = part_of(host, [row for row in rows for _ in range(host.group_size)])
    return copy.deepcopy(read_rows(host.visible(), own))


def cut(batch: dict) -> list[Row]:
    """
    Cut what a trainer's generation returns into rows, on the CPU, without their padding: prompts are padded on the
    left, completions on the right. What is no row, such as `num_items_in_batch`, is left out.
    """
    batch = dict[str, Any](split_pixel_values_by_grid(batch))
    starts = batch["prompt_mask"].shape[1] - batch["prompt_mask"].sum(1)
    width, longest = batch["completion_mask"].shape
    # A completion that is not in the loss has a mask of zeros
    ends = (batch["completion_mask"] * torch.arange(1, longest + 1, device=starts.device)).amax(1).clamp(min=1)
    rows: list[Row] = [{} for _ in range(width)]
    for row, start, end in zip(range(width), starts.tolist(), ends.tolist(), strict=True):
        for name, values in batch.items():
            if values is None or (isinstance(values, torch.Tensor) and not values.dim()):
                continue
            if name in _PIXELS and isinstance(values, torch.Tensor):
                part = values[row : row + 1]
            elif name in _PROMPT:
                part = values[row][start:]
            elif name in _WHOLE:
                part = values[row][start : batch["prompt_mask"].shape[1] + end]
            elif isinstance(values, torch.Tensor) and values.shape[1:] == (longest,):
                part = values[row][:end]
            else:
                part = values[row]
            # A view would keep the whole batch, and be sent with all of it
            rows[row][name] = part.to("cpu", copy=True) if isinstance(part, torch.Tensor) else part
    return rows


def gathered(host: "Host", batch: dict) -> list[dict[str, np.ndarray]]:
    """
    Return the rows of all processes as arrays, in their order. Called on all processes.

    Raises:
        `ValueError`: the rows have images.
    """
    rows = [row for part in gather_object([cut(batch)]) for row in part]
    unfit = sorted({name for row in rows for name, part in row.items() if not _is_kept(name, part)})
    if unfit:
        raise ValueError(
            f"Rollouts with {', '.join(unfit)} cannot be kept for replay: images would fill the memory and the "
            "checkpoints. Set `replay_share=0`."
        )
    # NumPy knows no bfloat16
    kinds = {True: torch.float32, False: torch.int32}
    return [{name: part.to(kinds[part.is_floating_point()]).numpy() for name, part in row.items()} for row in rows]


def _is_kept(name, part) -> bool:
    return isinstance(part, torch.Tensor) and name not in _PIXELS and part.dim() < 2


def assemble(
    host: "Host",
    parts: list[tuple[dict, dict[int, int]]],
    groups: int,
    others: dict[int, list[dict[str, np.ndarray]]] | None = None,
) -> dict:
    """
    Make one batch of the groups of several. Called on all processes, with the same places.

    Args:
        host ([`Host`]): the trainer.
        parts (`list[tuple[dict, dict[int, int]]]`): what each generation has returned on this process, and for groups
            of it, counted over all processes, the place in the batch that is made.
        groups (`int`): of that batch, over all processes.
        others (`dict[int, list[dict]]`, *optional*): rows of other groups, as [`gathered`] returns them, by place.
    """
    size, rank, processes = host.group_size, host.accelerator.process_index, host.accelerator.num_processes
    own = groups * size // processes
    rows: dict[int, Row] = {}
    for place, members in (others or {}).items():
        for to, member in enumerate(members, place * size):
            rows[to] = {name: torch.from_numpy(np.asarray(part)) for name, part in member.items()}
    for batch, places in parts:
        leaving: dict[int, Row] = {}
        found = cut(batch)
        for number, row in enumerate(found, rank * len(found)):
            group, offset = divmod(number, size)
            if group in places:
                to = places[group] * size + offset
                (rows if to // own == rank else leaving)[to] = row
        for coming in gather_object([leaving]):
            rows |= {to: row for to, row in coming.items() if to // own == rank}
    return join(host, parts[0][0], [rows[to] for to in range(rank * own, (rank + 1) * own)])


def join(host: "Host", batch: dict, rows: list[Row]) -> dict:
    """
    Put rows of this process together, padded as TRL does. Called on all processes.

    Args:
        host ([`Host`]): the trainer.
        batch (`dict`): as its generation has returned it; what is no row is taken from here.
        rows (`list[dict]`): as [`cut`] returns them.

    Raises:
        `ValueError`: the rows do not hold the same, as where some have images and others none.
    """
    names = list(rows[0])
    if any(row.keys() != rows[0].keys() for row in rows):
        differ = sorted(set().union(*rows) - set(names).intersection(*rows))
        raise ValueError(
            f"Rollouts of several generations cannot be trained on together: only some have {', '.join(differ)}. "
            "Give all prompts images, or none; or set `max_refills=0` and `replay_share=0`."
        )
    device, multiple = batch["prompt_ids"].device, getattr(host.trainer, "pad_to_multiple_of", None) or 1
    longest = {name: max(len(row[name]) for row in rows) for name in ("prompt_ids", "completion_ids")}
    before, after = (-(-length // multiple) * multiple for length in longest.values())
    joined = dict(batch)  # in its order, as TRL looks at the first entry for the number of rows
    for name in names:
        parts = [row[name] for row in rows]
        if not isinstance(parts[0], torch.Tensor):
            joined[name] = parts
            continue
        if name in _PIXELS:
            joined[name] = torch.cat(parts).to(device)
            continue
        if parts[0].dim() == 1:
            wide = name in (*_PROMPT, *_WHOLE) or max(map(len, parts)) == longest["completion_ids"]
            filling = (
                host.tokenizer.pad_token_id if name in ("prompt_ids", "completion_ids") else _FILLING.get(name, 0)
            )
            left = [before - len(row["prompt_ids"]) if name in (*_PROMPT, *_WHOLE) else 0 for row in rows]
            right = [after - len(row["completion_ids"]) if name not in _PROMPT and wide else 0 for row in rows]
            parts = [
                torch.nn.functional.pad(part, gaps, value=filling)
                for part, *gaps in zip(parts, left, right, strict=True)
            ]
        joined[name] = torch.stack([part.to(batch[name].dtype) for part in parts]).to(device)
    if "num_items_in_batch" in joined:
        joined["num_items_in_batch"] = host.accelerator.gather(mask_of_loss(joined).sum()).sum()
    return joined
