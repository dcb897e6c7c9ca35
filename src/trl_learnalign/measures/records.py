"""A group of rollouts as bytes."""

import json

import numpy as np

from ..host.groups import RolloutGroup


# A record begins with so many numbers: dataset row, G, F, number of prompts, has a loss mask, has images
_COUNTS = 6


def encode(group: RolloutGroup) -> bytes:
    """
    Return the bytes of a group: its counts (int64), the lengths of its prompts and completions, their tokens (int32),
    its rewards and penalties (float32), its loss masks unless all tokens count (a bit each), and its completions
    (JSON).
    """
    prompts = group.prompt_ids[:1] if all(ids is group.prompt_ids[0] for ids in group.prompt_ids) else group.prompt_ids
    masks = np.concatenate(group.loss_masks)
    partial = not masks.all()
    counts = [group.row, *group.rewards.shape, len(prompts), partial, group.has_images]
    tokens = [*prompts, *group.completion_ids]
    return b"".join(
        [
            np.array(counts, np.int64).tobytes(),
            np.array([len(ids) for ids in tokens], np.int32).tobytes(),
            np.concatenate(tokens).astype(np.int32).tobytes(),
            group.rewards.astype(np.float32).tobytes(),
            group.penalties.astype(np.float32).tobytes(),
            np.packbits(masks).tobytes() if partial else b"",
            json.dumps(group.completions).encode(),
        ]
    )


def decode(payload: bytes, completions: bool = False) -> RolloutGroup:
    """
    Return the group that [`encode`] was given; with `completions=False` without its completions, whose tokens are
    there.
    """
    place = 0

    def take(kind, count):
        nonlocal place
        array = np.frombuffer(payload, kind, count, place)
        place += array.nbytes
        return array

    row, size, rewards, prompts, partial, has_images = take(np.int64, _COUNTS).tolist()
    lengths = take(np.int32, prompts + size)
    ids = [take(np.int32, length) for length in lengths]
    rewards = take(np.float32, size * rewards).reshape(size, rewards)
    penalties = take(np.float32, size)
    total = int(lengths[prompts:].sum())
    masks = np.unpackbits(take(np.uint8, -(-total // 8)), count=total) if partial else np.ones(total, np.uint8)
    return RolloutGroup(
        row=row,
        prompt_ids=ids[:prompts] * (size if prompts == 1 else 1),
        completion_ids=ids[prompts:],
        loss_masks=np.split(masks.view(np.int8), np.cumsum(lengths[prompts:-1])),
        completions=json.loads(payload[place:]) if completions else [],
        rewards=rewards,
        penalties=penalties,
        has_images=bool(has_images),
    )
