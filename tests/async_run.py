"""
A run of TRL's asynchronous trainer on a CPU: its real loops in a process of their own, against a server that answers
as vLLM does. What needs a GPU has a stand-in: the attention kernel, and the transfer of weights.

    python tests/async_run.py FOLDER '{"max_steps": 6}'

prints a line of JSON: what was drawn, trained on and kept.
"""

import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import torch


SIZE, GROUP = 40, 4


def prompt_of(row):
    return [{"role": "user", "content": f"{row % 10}+{row // 10}="}]


def response_format(tokenizer):
    """TRL wants to know how messages are written; of a template that it does not know it takes the text."""
    from trl import chat_template_utils as known

    tokenizer.response_template = getattr(known, "qwen3_template", None)
    if tokenizer.response_template is None:
        tokenizer.response_schema = known.qwen3_schema
    return tokenizer


def reward(completions, row, **kwargs):
    """1 for a completion that ends in 1."""
    return [float(completion[0]["content"].strip().endswith("1")) for completion in completions]


class Server:
    """
    Answers `/v1/completions`: every fourth of some prompts succeeds half of the time, the others never.
    """

    def __init__(self, tokenizer, delays, prompts=None):
        self.random, self.asked, self.hook = random.Random(0), [], None
        asks = {"add_generation_prompt": True, "return_dict": False}
        prompts = [prompt_of(row) for row in range(SIZE)] if prompts is None else prompts
        rows = {tuple(tokenizer.apply_chat_template(prompt, **asks)): row for row, prompt in enumerate(prompts)}
        assert len(rows) == len(prompts)
        one, two, end = (tokenizer.convert_tokens_to_ids(token) for token in ("1", "2", "<eos>"))
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                row = rows[tuple(asked["prompt"])]
                outer.asked.append(row)
                if outer.hook is not None:
                    outer.hook(len(outer.asked))
                time.sleep(outer.random.uniform(*delays))
                right = row % 4 == 0 and outer.random.random() < 0.5
                choice = {"token_ids": [one if right else two, end], "logprobs": {"token_logprobs": [-1.0, -0.5]}}
                body = json.dumps({"choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class NoTransfer:
    """In the place of the transfer of weights to vLLM."""

    def init_weight_transfer(self): ...
    def pause(self): ...
    def send_weights(self, iterator): ...
    def resume(self): ...
    def destroy(self): ...


def attention(query, key, value, lengths_q, lengths_k, *rest, softmax_scale=None, causal=True, **kwargs):
    """As `flash_attn_varlen_func`: sequences one after another, queries at the end of their keys."""
    found, groups = torch.empty_like(query), query.shape[1] // key.shape[1]
    for i in range(len(lengths_q) - 1):
        q = query[lengths_q[i] : lengths_q[i + 1]].transpose(0, 1)
        k, v = (
            part[lengths_k[i] : lengths_k[i + 1]].transpose(0, 1).repeat_interleave(groups, 0) for part in (key, value)
        )
        rows, columns = q.shape[1], k.shape[1]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=softmax_scale)
        found[lengths_q[i] : lengths_q[i + 1]] = out.transpose(0, 1)
    return found


def stand_in():
    """Replace what needs a GPU or vLLM."""
    import trl.experimental.async_grpo.async_grpo_trainer as trainer
    import trl.experimental.async_grpo.async_rollout_worker as worker

    worker.is_vllm_available = lambda *args, **kwargs: True
    if find_spec("trl.experimental.async_grpo.packing") is None:  # before TRL 1.16
        owner, name = trainer, "create_model_from_path"
        if not hasattr(trainer, name):
            owner, name = trainer.AutoModelForCausalLM, "from_pretrained"
        create = getattr(owner, name)

        def plain(*args, **kwargs):
            return create(*args, **(kwargs | {"attn_implementation": "sdpa"}))

        setattr(owner, name, plain)
    else:
        import trl.experimental.async_grpo.packing as packing

        packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=attention)
    trainer.get_peak_flops_per_device = lambda *args: None


def save_policy(folder):
    """Write a tiny policy with a tokenizer; return the tokenizer."""
    from tiny import make_model, make_tokenizer

    tokenizer = response_format(make_tokenizer())
    if not (folder / "policy").is_dir():
        make_model().save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")
    return tokenizer


def make(folder, config=None, settings=None, delays=(0.0, 0.02), rollout_worker=None, **changes):
    """A trainer, and the server that it asks."""
    from functools import partial

    from datasets import Dataset
    from tiny import EAGER, lora
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    from trl_learnalign import LearnAlignAsyncMixin, LearnAlignConfig, LearnAlignSampler
    from trl_learnalign.schedules import OnlineSchedule

    stand_in()

    class Trainer(LearnAlignAsyncMixin, AsyncGRPOTrainer):
        pass

    folder = Path(folder)
    tokenizer = save_policy(folder)
    server = Server(tokenizer, delays)
    arguments = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "num_generations": GROUP,
        "max_completion_length": 4,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "max_inflight_tasks": 24,
        "max_staleness": 100,
        "token_budget": -1,
        "vllm_server_base_url": server.url,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "dtype": "float32",
        "seed": 7,
    }
    rows = Dataset.from_dict({"prompt": [prompt_of(row) for row in range(SIZE)], "row": list(range(SIZE))})
    kwargs = {"peft_config": lora()} if "peft_config" in signature(AsyncGRPOTrainer.__init__).parameters else {}
    if config is not None:
        made = LearnAlignConfig(**({"schedule": "online", "score": "learnability", "write_report": False} | config))
        schedule = partial(OnlineSchedule, settings=EAGER if settings is None else settings)
        kwargs["train_sampler"] = LearnAlignSampler(made, schedule=schedule)
    trainer = Trainer(
        model=str(folder / "policy"),
        reward_funcs=reward,
        args=AsyncGRPOConfig(**(arguments | changes)),
        train_dataset=rows,
        processing_class=tokenizer,
        weight_transfer=NoTransfer(),
        rollout_worker=rollout_worker,
        **kwargs,
    )
    return trainer, server


def main():
    folder, changes = sys.argv[1], json.loads(sys.argv[2])
    config = changes.pop("config", {})
    resume = changes.pop("resume", None)
    trainer, server = make(folder, config, **changes)
    trainer.train(resume_from_checkpoint=resume)
    run = trainer._learnalign
    found = json.dumps(
        {
            "world": trainer.accelerator.num_processes,
            "steps": trainer.state.global_step,
            "asked": server.asked,
            "observed": run.schedule.curriculum.history.observed,
            "drawn": run.schedule.curriculum.drawn,
            "done": run.ledger.done,
            "pending": len(run.ledger.pending),
            "names": run.host.reward_names,
            "log": trainer.state.log_history[-2:],
        }
    )
    print(found)
    Path(folder, f"rank-{trainer.accelerator.process_index}.json").write_text(found)


if __name__ == "__main__":
    main()
