"""
What test_vllm.py starts with the stand-in for vLLM on its path: a task, a directory; a JSON file per rank comes out.
"""

import json
import os
import sys
from pathlib import Path

import torch
import vllm
from tiny import Seen, config, digit_reward, make_dataset, make_trainer, online, weights
from transformers import Qwen2ForCausalLM, set_seed

from trl_learnalign import LearnAlignGRPOTrainer, callback


class Seeds(Seen):
    """Notes the seed that the reward function finds, too."""

    def __init__(self):
        super().__init__(digit_reward)
        self.seeds = []

    def __call__(self, **kwargs):
        self.seeds.append(torch.initial_seed())
        return super().__call__(**kwargs)


def marked(select):
    def select_marked(*args):
        vllm.EVENTS.append({"event": "selection begins"})
        selection = select(*args)
        vllm.EVENTS.append({"event": "selection ends"})
        return selection

    return select_marked


def run(path, choice, cls=None, pool=23, **changes):
    """A whole run from the weights in `path/model`, always with the same random numbers."""
    vllm.EVENTS.clear()
    reward = Seeds()
    set_seed(5)
    model = Qwen2ForCausalLM.from_pretrained(path.parent / "model")
    settings = {"per_device_train_batch_size": 16, "max_steps": 5, "learning_rate": 1e-2, "vllm_mode": "colocate"}
    trainer = make_trainer(
        path, choice, cls=cls, reward=reward, dataset=make_dataset(pool), model=model, **(settings | changes)
    )
    set_seed(11)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "events": list(vllm.EVENTS),
        "log": [[one.start_chunk, list(one.indices)] for one in getattr(trainer.learnalign.schedule, "log", [])],
        "rows": reward.rows,
        "visits": [] if choice.schedule == "staged" else trainer.learnalign.schedule.curriculum.memory.visits.tolist(),
        "weights": {name: tensor.flatten().tolist() for name, tensor in weights(trainer).items()},
        "ratios": [entry.get("sampling/importance_sampling_ratio/mean") for entry in logs],
        "correction": trainer.vllm_importance_sampling_correction,
        "reward_seeds": reward.seeds,
        "world": trainer.accelerator.num_processes,
    }


def images_on_one(path):
    """A batch with images on rank 1 alone."""

    class Showing(LearnAlignGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            return output | ({"pixel_values": torch.zeros(1)} if self.accelerator.process_index == 1 else {})

    try:
        run(path, config(warmup_prompts=0), cls=Showing, per_device_train_batch_size=8)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(task, path):
    rank = int(os.environ.get("RANK", 0))
    result = {}
    callback.select_at_stage = marked(callback.select_at_stage)
    match task:
        case "colocate":
            plain = config(save_rollouts=True)
            restart = config(after_warmup="restart")
            for name, choice, changes in (
                ("transformers", plain, {}),
                ("colocate", plain, {"use_vllm": True}),
                ("restart", restart, {"use_vllm": True}),
                ("sleep", plain, {"use_vllm": True, "vllm_enable_sleep_mode": True}),
                ("online", online(prompt_features=True), {"use_vllm": True}),
            ):
                try:
                    result[name] = run(path / name, choice, **changes)
                except ValueError as error:
                    result[name] = str(error)
        case "tensor parallel":
            parallel = {"use_vllm": True, "vllm_tensor_parallel_size": 2, "per_device_train_batch_size": 8}
            # Without a warm-up, whose chunks depend on the number of processes
            choice = config(save_rollouts=True, warmup_prompts=0)
            result["run"] = run(path / "run", choice, **parallel)
            result["images"] = images_on_one(path / "images")
    (path / f"rank-{rank}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
