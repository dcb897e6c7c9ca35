"""One process of two for test_peers.py, started as `srun` would: no launcher ends the other."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch.distributed as dist
from tiny import config, digit_reward, make_dataset, make_trainer

from trl_learnalign import select_prompts
from trl_learnalign import trainer as learnalign_trainer
from trl_learnalign.ground import peers
from trl_learnalign.host import objective


task, path, rank = sys.argv[1], sys.argv[2], int(os.environ["RANK"])
peers._BEAT, peers._SILENCE = (2.0, 60.0) if task == "fails" else (0.2, 4.0)
dist.init_process_group("gloo", timeout=timedelta(seconds=8 if task == "stuck" else 60))
microbatches = 0
original = objective.policy_objective


def disturbed(*args):
    """A microbatch of rank 1 (or 0) that goes wrong, while the other goes on."""
    global microbatches
    microbatches += 1
    match task, rank, microbatches:
        case ("slow", 1, 3) | ("fails", 1, 1):
            time.sleep(8)  # alive
        case ("killed", 1, 3) | ("main killed", 0, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        case ("main frozen", 0, 3):
            os.kill(os.getpid(), signal.SIGSTOP)
        case ("fails", 0, 1):
            raise ValueError("the policy is gone")
        case ("stuck", 1, 3):
            time.sleep(600)
    return original(*args)


def slow_reward(completions, row, **kwargs):
    if task == "slow" and rank == 1 and 9 in row:
        time.sleep(5)
    return digit_reward(completions=completions, row=row)


objective.policy_objective = disturbed
if task == "main killed":  # before: a run without a whole checkpoint, which only the main process may look at
    if rank == 1:
        learnalign_trainer.survey = None
    try:
        make_trainer(path, config()).train(resume_from_checkpoint=True)
    except Exception as error:
        print(f"rank {rank}: {type(error).__name__}: {error}", file=open(f"{path}/refused-{rank}.txt", "w"))
if task == "target missing":  # on the disk of one node
    make_dataset(6).to_json(f"{path}/here-{rank}.jsonl")
    choice = config(score="target", target_dataset=f"{path}/{'here' if rank == 0 else 'nowhere'}-{rank}.jsonl")
    for begin in (lambda: make_trainer(path, choice), lambda: select_prompts(make_trainer(path), choice)):
        try:
            begin()
            print(f"rank {rank} has begun", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}", flush=True)
    os._exit(0)
trainer = make_trainer(path, reward=slow_reward, dataset=make_dataset(23), per_device_train_batch_size=8)
assert trainer.accelerator.num_processes == 2
if task == "slow":  # it ends well; then, with the same processes, one is killed
    assert len(select_prompts(trainer, config(max_tokens_per_batch=60)).indices) == 8
    print("selected", flush=True)
    task, microbatches = "killed", 0
    trainer.args.output_dir += "/second"
try:
    select_prompts(trainer, config(max_tokens_per_batch=60))
except Exception as error:
    import threading

    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("learnalign")]
    print(f"{type(error).__name__}: {error} threads {left}", flush=True)
os._exit(0)  # at once, with the store that the main process keeps
