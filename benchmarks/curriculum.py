"""
The curriculum of any training loop at scale, in processor time of one thread.

    python benchmarks/curriculum.py [--prompts 1000000] [--groups 64] [--steps 40] [--long 100000]

- A pool of a million prompts: to choose for and to learn from a step of 64 groups; the state, its bytes, and the time
  to write them.
- 100,000 groups that come in random order, a tenth of them never and a tenth twice, against the same in the order of
  their draws: the largest difference of what is remembered of a prompt.
- Memory after a tenth and after all of 100,000 steps of one prompt each.

Writes benchmarks/results/curriculum.json. The features are synthetic, as many as a run with hidden states has.
"""

import gc
import tempfile
import time
import tracemalloc
from pathlib import Path

import harness
import numpy as np
from choosing import COLUMNS, GROUP, Pool

from trl_learnalign.curriculum import Group, OnlineCurriculum, OnlineSettings, pack, unpack


ALONE = "successes", "failures", "visits", "last", "surprise"  # of the memory: what the order does not decide


def at_scale(prompts, groups, steps) -> dict:
    """What a step costs in a pool of so many prompts, and what its state takes."""
    pool = Pool(prompts)
    found = {"prompts": prompts, "groups": groups, **pool.costs(steps, groups)}
    started = time.process_time()
    content = pack(pool.curriculum.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "state").write_bytes(content)
    saved = time.process_time() - started
    again = Pool(prompts).curriculum
    started = time.process_time()
    again.load_state_dict(unpack(content))
    found |= {"state_bytes": len(content), "save_seconds": saved, "load_seconds": time.process_time() - started}
    assert again.choose(5) == pool.curriculum.choose(5)
    return found


def out_of_order(prompts, groups) -> dict:
    """Differences between a curriculum whose groups come in order and one whose groups do not."""
    random = np.random.default_rng(0)
    features = np.ones((prompts, 1), np.float32)
    settings = OnlineSettings(give_up=2 * groups, begin_skill=9.0)  # draws are uniform, whatever comes
    one, other = (OnlineCurriculum(features, group_size=GROUP, settings=settings) for _ in range(2))
    draws = one.choose(groups)
    assert draws == other.choose(groups)
    rates = random.random(prompts)
    found = [
        Group(draw.number, draw.row, (random.random((GROUP, 1)) < rates[draw.row]).astype(float)) for draw in draws
    ]
    kept = random.random(groups) < 0.9
    in_order = [group for group, keep in zip(found, kept, strict=True) if keep]
    twice = [group for group in in_order if random.random() < 0.1]
    mixed = in_order + twice
    random.shuffle(mixed)
    for curriculum, sequence in ((one, in_order), (other, mixed)):
        for start in range(0, len(sequence), 64):
            curriculum.observe(sequence[start : start + 64])
    alike = [(np.nan_to_num(getattr(curriculum.memory, name)) for curriculum in (one, other)) for name in ALONE]
    largest = [np.abs(first - second).max() for first, second in alike]
    totals = [curriculum.kinds.totals.sum(0) for curriculum in (one, other)]
    return {
        "groups": groups,
        "lost": int(groups - kept.sum()),
        "twice": len(twice),
        "observed": [one.history.observed, other.history.observed],
        "differences": {name: float(value) for name, value in zip(ALONE, largest, strict=True)},
        "totals": float(np.abs(totals[0] - totals[1]).max()),
    }


def memory_over(steps) -> dict:
    """Bytes that are held after a tenth of the steps and after all, one prompt a step."""
    pool = Pool(2000)
    tracemalloc.start()
    held = {}
    for step in range(1, steps + 1):
        pool.step(1)
        if step in (steps // 10, steps):
            gc.collect()
            held[step] = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"steps": [*held], "bytes": [*held.values()], "state_bytes": len(pack(pool.curriculum.state_dict()))}


def main():
    sizes = {"prompts": 1_000_000, "groups": 64, "steps": 40, "disorder": 100_000, "long": 100_000}
    options = harness.options(__doc__, **sizes, output="curriculum")
    values = {"scale": at_scale(options.prompts, options.groups, options.steps), "columns": COLUMNS}
    values |= {"disorder": out_of_order(20_000, options.disorder), "memory": memory_over(options.long)}
    harness.report(options.output, harness.conditions(**values))


if __name__ == "__main__":
    main()
