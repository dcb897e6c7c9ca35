"""What the benchmarks that train share: trainers, and the success of a policy on rows held out."""

import copy
import os
import time
from functools import cache

import harness
import numpy as np
import torch
from demo import POLICY
from equations import equations_reward, generate_chains, load_gsm8k_equations
from peft import LoraConfig, PeftModel
from train_tiny_policy import generate
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_learnalign import LearnAlignGRPOTrainer


GROUP = 8
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


@cache
def read_equations(dataset_path) -> tuple:
    """The equations to train on, those held out, and where they are from."""
    if dataset_path is None:
        return generate_chains(7378, seed=11), generate_chains(1301, seed=12), "generated chains"
    rows = (load_gsm8k_equations(dataset_path / f"{split}.jsonl")[0] for split in ("train", "test"))
    return *rows, "equations of GSM8K"


def load_policy(path=POLICY):
    """A small model and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)


def arguments_of(folder, **settings) -> GRPOConfig:
    """Arguments of training that keeps no checkpoint and talks to nobody; `settings` come on top."""
    common = {"bf16": False, "gradient_checkpointing": False, "num_generations": GROUP, "beta": 0.0}
    common |= {"lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    common |= {"disable_tqdm": True, "log_level": "error", "dataloader_pin_memory": False}
    common |= {"use_cpu": not torch.cuda.is_available()}
    return GRPOConfig(output_dir=str(folder), **common | settings)


def trainer_of(policy, reward, args, rows, callbacks=(), sampler=None, kind=None, lora=LORA):
    """A trainer of a pair of model and tokenizer, with a new adapter unless the model has one."""
    model, tokenizer = policy
    kind = kind or (GRPOTrainer if sampler is None else LearnAlignGRPOTrainer)
    trainer = kind(
        model=model,
        reward_funcs=reward,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else LoraConfig(**lora),
        callbacks=list(callbacks),
        **({} if sampler is None else {"train_sampler": sampler}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tiny_trainer(policy, adapter, reward, folder, rows, rate, steps, seed, callbacks=(), length=56, **kwargs):
    """A trainer of a small policy: 16 prompts x 8 rollouts a step, from the adapter in a folder where one is named."""
    model, tokenizer = load_policy(policy)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    sizes = {"per_device_train_batch_size": 16 * GROUP, "max_completion_length": length}
    args = arguments_of(folder, learning_rate=rate, max_steps=steps, seed=seed, **sizes)
    return trainer_of((model, tokenizer), reward, args, rows, callbacks, **kwargs)


def trained(path, build):
    """The folder of the adapter that the trainer of `build()` ends with. One process trains it; others wait for it."""
    with harness.claimed(path.with_name(f"{path.name}.lock"), wait=True):
        if not (path / "done.json").is_file():
            trainer, started = build(), time.perf_counter()
            trainer.train()
            trainer.model.save_pretrained(path)
            harness.write(path / "done.json", {"seconds": round(time.perf_counter() - started, 2)})
    return path


class Looking(TrainerCallback):
    """Keeps what looks at a policy find, with the seconds of training until then, without those of the looks."""

    def __init__(self):
        self.looks, self.away, self.started = [], 0.0, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def look(self, measure, *args, digits=2, **known):
        now = time.perf_counter()
        seconds = round(now - self.started - self.away, digits)
        self.looks.append({**known, "seconds": seconds, **measure(*args)})
        self.away += time.perf_counter() - now


def successes(model, tokenizer, rows, samples, reward=equations_reward, seed=0) -> tuple[np.ndarray, list[str]]:
    """
    Rewards of `samples` completions of each row at temperature 1, or of the greedy one where `samples` is 0, shape
    (N, samples); and the completions. Neither the model nor the state of random numbers is changed.
    """
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()  # faster; the copy leaves the one in training as it is
    training, state, number = model.training, torch.get_rng_state(), max(1, samples)
    torch.manual_seed(seed)
    prompts, answers = ([text for text in rows[name] for _ in range(number)] for name in ("prompt", "answer"))
    with torch.inference_mode():
        texts = generate(model, tokenizer, prompts, do_sample=samples > 0)
    torch.set_rng_state(state)
    model.train(training)
    return np.array(reward(texts, answers)).reshape(-1, number), texts
