"""
What test_kills.py starts: a training run that notes what happens in it and is killed at one of these events.

    killed_run.py OUTPUT_DIR SCHEDULE    resumes if there is something to resume from
    KILL_AT=n KILL_RANK=r                SIGKILL at event n on rank r
"""

import json
import os
import signal
import sys
from pathlib import Path

from safetensors.torch import save_file
from tiny import EAGER, config, digit_reward, make_dataset, make_trainer, online, weights
from transformers import Trainer, TrainerState

from trl_learnalign.curriculum.states import split
from trl_learnalign.gradients.engine import PromptGradients
from trl_learnalign.ground import disk, store
from trl_learnalign.host import generation
from trl_learnalign.schedules import OnlineSchedule, StagedSchedule
from trl_learnalign.scores import maths as scoring


path, schedule = Path(sys.argv[1]), sys.argv[2]
choices = {
    "staged": config(num_prompts=6, warmup_prompts=8, reselect_every=1, max_tokens_per_batch=60, write_report=True),
    "online": online(),
}
rank = int(os.environ.get("RANK", 0))
kill_at = int(os.environ.get("KILL_AT", -1)) if rank == int(os.environ.get("KILL_RANK", 0)) else -1
events = []
selecting = False


def event(name, halve=None):
    """Something happens; `halve` is a file that a kill leaves half-written, or what does half of it."""
    made = trainer._get_train_sampler().schedule
    events.append(f"{name}, stage {made.stage if schedule == 'staged' else 0}")
    if len(events) - 1 == kill_at:
        if callable(halve):
            halve()
        elif halve is not None:
            os.truncate(halve, os.path.getsize(halve) // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def before(owner, attribute, name):
    original = getattr(owner, attribute)

    def wrapper(*args, **kwargs):
        event(name)
        return original(*args, **kwargs)

    setattr(owner, attribute, wrapper)


def select_groups(*args, original=generation.generate_groups):
    global selecting
    event("rollouts")
    selecting = True
    groups = original(*args)
    selecting = False
    return groups


def replace(source, target, original=os.replace):
    kind = "checkpoint" if "checkpoint-" in str(target) else Path(target).name.split("-")[0]
    event(f"writing {kind}", halve=source)
    original(source, target)
    event(f"written {kind}")


def append(stream, data, original=store._write):
    """Records in a log. A kill leaves the half of them, with one that is torn."""
    kind = Path(stream.name).parent.name
    event(f"writing {kind}", halve=lambda: original(stream, data[: len(data) // 2]))
    original(stream, data)
    event(f"written {kind}")


def save_model(self, output_dir=None, *args, original=Trainer.save_model, **kwargs):
    original(self, output_dir, *args, **kwargs)
    file = Path(output_dir or self.args.output_dir, "adapter_model.safetensors")
    event("checkpoint, weights", halve=file if rank == 0 else None)


def save_rng(self, output_dir, original=Trainer._save_rng_state):
    original(self, output_dir)
    event("checkpoint, random state", halve=next(Path(output_dir).glob(f"rng_state*{rank or ''}.pth")))


def save_state(self, json_path, original=TrainerState.save_to_json):
    original(self, json_path)
    event("checkpoint, state", halve=json_path)


def reward(completions, row, **kwargs):
    if not selecting:
        with open(path / f"prompts-{rank}.jsonl", "a") as file:
            print(json.dumps([trainer.state.global_step, row]), file=file)
    return digit_reward(completions=completions, row=row)


generation.generate_groups = select_groups
os.replace = replace
disk.os.replace = replace
store._write = append
before(PromptGradients, "collect", "gradients")
before(scoring, "scores_of_batches", "scores")
before(StagedSchedule, "accept", "choice")
before(OnlineSchedule, "observe", "observing")
before(Trainer, "training_step", "training")
Trainer.save_model, Trainer._save_rng_state, TrainerState.save_to_json = save_model, save_rng, save_state

path.mkdir(exist_ok=True)
trainer = make_trainer(
    path,
    choices[schedule],
    reward=reward,
    dataset=make_dataset(14),
    settings=EAGER,
    num_train_epochs=3,
    per_device_train_batch_size=16 // int(os.environ.get("WORLD_SIZE", 1)),
    save_strategy="steps",
    save_steps=1,
)
trainer.train(resume_from_checkpoint=any(path.iterdir()) or None)
values, arrays = split(trainer._get_train_sampler().schedule.state_dict())
log = [values, {name: array.astype(str).tolist() for name, array in sorted(arrays.items())}]
result = {"world": trainer.accelerator.num_processes, "events": events, "log": log, "step": trainer.state.global_step}
save_file(weights(trainer), path / f"final-{rank}.safetensors")
(path / f"rank-{rank}.json").write_text(json.dumps(result))
sys.stdout.flush()
os._exit(0)
