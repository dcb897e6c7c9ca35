"""
One run of a real chat model: SmolLM2-135M-Instruct trained with GRPO on short questions, on a CPU.

    python benchmarks/chat/run.py --arm random --pool short --seed 0

writes runs/chat/POOL/ARM-SEED/: `steps.jsonl` (a line a step: rows, kinds, successes, norms, entropy), `looks.jsonl`
(success on questions held out, by kind, and the KL divergence to the model as it was), and `done.json` at the end.
A run that was stopped goes on at its last checkpoint; one that is done is left out. --arms, --pools and --seeds take
several, one after another; another call beside it takes other runs.

A step has 8 prompts x 8 rollouts of at most 12 tokens. It runs on a GPU where there is one. On one thread of a machine
with bfloat16 instructions it takes 15 to 25 s, a run of 60 steps some 25 minutes.
"""

import json
import shutil
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
import numpy as np
import torch
from baselines import RefillingTrainer, sampler_of
from datasets import Dataset
from harness import options, versions
from model import load
from policies import GROUP, arguments_of, trainer_of
from questions import KINDS, POOLS, held_out, is_right, pool
from transformers import TrainerCallback


PROMPTS, LENGTH, ROWS = 8, 12, 16  # a step, tokens, rows of a microbatch
SAMPLES = 3  # of a question held out
PARTS = 0.2, 0.4, 0.6, 0.8, 1  # of a run, after which success is measured
SAVE_STEPS = 5
ARMS = ("random", "refill", "mopps", "online", "learnalign online", "learnalign online without kinds")
ARMS += ("learnalign online without quick fit", "learnalign online on top", "online in proportion")


class Recorder:
    """The reward; writes what each step trained on."""

    __name__ = "right"

    def __init__(self, folder: Path, pool: str):
        self.pool = pool
        self.file, self.rows, self.successes, self.tokens = folder / "steps.jsonl", [], [], 0

    def __call__(self, completions, completion_ids, answer, row, **kwargs):
        texts = [completion[0]["content"] for completion in completions]
        rewards = [float(is_right(text, own, self.pool)) for text, own in zip(texts, answer, strict=True)]
        self.rows += row[::GROUP]
        self.tokens += sum(map(len, completion_ids))
        self.successes += np.array(rewards, int).reshape(-1, GROUP).sum(1).tolist()
        return rewards


class Looks(TrainerCallback):
    """Writes a line for each step, and looks at success on the questions held out."""

    def __init__(self, recorder, folder, tokenizer, kinds, marks):
        self.recorder, self.folder, self.tokenizer, self.kinds, self.marks = recorder, folder, tokenizer, kinds, marks
        self.test, self.before = held_out(recorder.pool), None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        # What a killed run wrote after its last checkpoint comes again
        for name in ("steps.jsonl", "looks.jsonl"):
            file = self.folder / name
            lines = file.read_text().splitlines() if file.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            file.write_text("".join(line + "\n" for line in kept))
        if state.global_step == 0:
            self._look(0, model)
        self.before, self.started = _weights(model), time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        now, weights = time.perf_counter(), _weights(model)
        rows, successes = self.recorder.rows, self.recorder.successes
        line = {
            "step": state.global_step,
            "rows": rows,
            "kinds": [KINDS.index(self.kinds[row]) for row in rows],
            "successes": successes,
            "tokens": self.recorder.tokens,
            "update_norm": float((weights - self.before).norm()),
            "seconds": round(now - self.started, 1),
        }
        self.recorder.rows, self.recorder.successes, self.recorder.tokens = [], [], 0
        self._write("steps.jsonl", line)
        self.before = weights
        if state.global_step in self.marks:
            self._look(state.global_step, model)
        self.started = time.perf_counter()

    def _write(self, name, line):
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")

    def _look(self, step, model):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            texts, kl = _sample(model, self.tokenizer, list(self.test["prompt"]))
        right = [
            is_right(text, answer, self.recorder.pool)
            for text, answer in zip(texts, self.test["answer"].repeat(SAMPLES), strict=True)
        ]
        table = self.test.assign(success=np.array(right).reshape(-1, SAMPLES).mean(1))
        rates = table.groupby("kind", sort=False)["success"].mean().round(4)
        self._write("looks.jsonl", {"step": step, "kl": round(kl, 4), "mean": float(rates.mean())} | rates.to_dict())
        print(f"step {step}: {rates.mean():.3f}  " + ", ".join(f"{k} {v:.2f}" for k, v in rates.items()), flush=True)


def _weights(model) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad]).cpu()


@torch.no_grad()
def _sample(model, tokenizer, prompts) -> tuple[list[str], float]:
    """Return completions of prompts at temperature 1, and the mean log-ratio to the model without adapter a token."""
    training = model.training
    model.eval()
    texts, ratios = [], []
    kwargs = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    for start in range(0, len(prompts), 32):
        batch = tokenizer.apply_chat_template(prompts[start : start + 32], **kwargs).to(model.device)
        width = batch["input_ids"].shape[1]
        found = model.generate(
            **batch, do_sample=True, top_k=0, max_new_tokens=LENGTH, num_return_sequences=SAMPLES, use_cache=True
        )
        new = found[:, width:]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = (new == tokenizer.eos_token_id).int()
        mask = ended.cumsum(1) - ended == 0  # up to the end token, with it
        few = slice(None, None, 4 * SAMPLES)  # one completion of every fourth question
        attended = torch.cat([batch["attention_mask"][::4], mask[few].long()], 1)
        inputs = {"input_ids": found[few], "attention_mask": attended, "logits_to_keep": new.shape[1] + 1}
        logps = []
        for _ in range(2):
            logits = model(**inputs).logits[:, :-1].float()
            logps.append(logits.log_softmax(-1).gather(-1, new[few][..., None])[..., 0])
            model.disable_adapter_layers()
        model.enable_adapter_layers()
        ratios.append((logps[0] - logps[1])[mask[few]])
    model.train(training)
    return texts, float(torch.cat(ratios).mean())


def build_trainer(arm, rows, reward, seed, folder, options, callbacks):
    args = arguments_of(
        folder / "trainer",
        bf16=True,
        per_device_train_batch_size=ROWS,
        gradient_accumulation_steps=PROMPTS * GROUP // ROWS,
        max_completion_length=LENGTH,
        max_steps=options.steps,
        learning_rate=options.learning_rate,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=1,
        seed=seed,
    )
    kind = RefillingTrainer if arm == "refill" else None
    return trainer_of(load(options.model), reward, args, rows, callbacks, sampler_of(arm), kind)


def run(arm, name, seed, folder, options) -> dict:
    """Train. Return what the trainer logged, a value a step."""
    print(f"{name}, {arm}, seed {seed}", flush=True)
    questions = pool(name, seed).assign(row=lambda table: range(len(table)))
    rows = Dataset.from_list(questions.to_dict("records"))
    marks = [round(options.steps * part) for part in PARTS]
    recorder = Recorder(folder, name)
    tokenizer = load(options.model)[1]
    looks = Looks(recorder, folder, tokenizer, list(questions["kind"]), marks)
    trainer = build_trainer(arm, rows.remove_columns("kind"), recorder, seed, folder, options, [looks])
    checkpoints = list((folder / "trainer").glob("checkpoint-*/trainer_state.json"))
    trainer.train(resume_from_checkpoint=bool(checkpoints))
    logs = trainer.state.log_history
    names = ("grad_norm", "entropy", "frac_reward_zero_std")
    names = (*names, *sorted({key for log in logs for key in log if key.startswith("learnalign/")}))
    return {"logged": {key: [log.get(key) for log in logs if "entropy" in log] for key in names}}


def main():
    files = {"output_dir": Path("runs/chat"), "model": Path("runs/chat/model")}
    cells = {"arms": ["random", "online"], "pools": ["short"], "seeds": [0]}
    choices = {"arms": ARMS, "pools": POOLS}
    arguments = options(__doc__, choices, **files, **cells, steps=60, learning_rate=3e-4)
    conditions = {"steps": arguments.steps, "learning_rate": arguments.learning_rate, "versions": versions()}
    for name, seed, arm in harness.cells(arguments):
        folder = arguments.output_dir / name / f"{arm.replace(' ', '-')}-{seed}"
        files = {"lock": folder / "lock", "begun": folder / "conditions.json"}
        if harness.cell(folder / "done.json", conditions, run, arm, name, seed, folder, arguments, **files):
            shutil.rmtree(folder / "trainer", ignore_errors=True)


if __name__ == "__main__":
    main()
