"""The patch of docs/upstream, on a copy of the installed TRL."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trl


ROOT = Path(__file__).parent.parent
UPSTREAM = ROOT / "docs" / "upstream"
SCRIPT = """
import json, sys
import numpy as np, torch
from pathlib import Path
from tiny import Seen, fixed_reward, make_dataset, make_trainer, weights
from trl import GRPOTrainer
from trl_learnalign.curriculum import pack, unpack

exec(Path(sys.argv[2]).read_text())


class Kept(Online):
    def state_dict(self):
        return {"packed": torch.frombuffer(bytearray(pack(self.curriculum.state_dict())), dtype=torch.uint8)}

    def load_state_dict(self, state):
        self.curriculum.load_state_dict(unpack(state["packed"].numpy().tobytes()))


def run(folder, sampler, resume=None, **changes):
    seen = Seen(fixed_reward)

    class Trainer(GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **({"prompt_sampler": sampler} if sampler else {}))

    trainer = make_trainer(folder, cls=Trainer, reward=seen, dataset=make_dataset(24), max_steps=12,
                           save_strategy="steps", save_steps=4, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return seen.rows[::4], {name: value.double().sum().item() for name, value in weights(trainer).items()}


folder, found = Path(sys.argv[1]), {}
features = np.concatenate([np.ones((24, 1)), (np.arange(24)[:, None] % 3 == np.arange(3)) * 1.0], axis=1)
for name, changes in {"plain": {}, "iterations": {"steps_per_generation": 2, "num_iterations": 2}}.items():
    chooser = Kept(features, 4)
    rows, whole = run(folder / name, chooser, **changes)
    again, same = run(folder / name, Kept(features, 4), str(folder / name / "checkpoint-8"), **changes)
    stock, _ = run(folder / f"{name}-stock", None, **changes)
    found[name] = {"rows": rows, "again": again, "equal": whole == same, "stock": stock,
                   "observed": chooser.curriculum.history.observed, "per_chunk": len(chooser.curriculum.choose(1))}
print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason="the patch is for TRL 1.16")
@pytest.mark.skipif(shutil.which("patch") is None, reason="`patch` is not installed")
def test_two_hooks_make_it_a_dozen_lines(tmp_path):
    shutil.copytree(Path(trl.__file__).parent, tmp_path / "patched" / "trl")
    with open(UPSTREAM / "prompt_sampler.patch") as patch:
        subprocess.run(["patch", "-p1", "--silent"], stdin=patch, cwd=tmp_path / "patched", check=True)
    (block,) = re.findall(r"```python\n(.*?)```", (UPSTREAM / "index.md").read_text(), re.S)
    (tmp_path / "page.py").write_text(block)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'patched'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "page.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.partition("FOUND ")[2])
    for name in ("plain", "iterations"):
        one = found[name]
        assert one["equal"], name
        # What was generated for after step 8, where a chunk ends, once more
        assert one["again"] == one["rows"][-len(one["again"]) :] and len(one["again"]) < len(one["rows"])
        assert one["observed"] == len(one["rows"])
        assert one["stock"] != one["rows"] and set(one["rows"]) <= set(range(24))
    added = [line for line in (UPSTREAM / "prompt_sampler.patch").read_text().splitlines() if line.startswith("+")]
    assert len(added) < 130 and sum(bool(line.strip()) for line in block.splitlines()) <= 16
