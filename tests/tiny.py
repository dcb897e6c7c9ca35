"""A tiny random policy, a task it solves now and then, and trainers made of them."""

import itertools
from dataclasses import replace
from functools import partial

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedTokenizerFast, ProcessorMixin, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_learnalign import LearnAlignConfig, LearnAlignGRPOTrainer, LearnAlignSampler
from trl_learnalign.curriculum import OnlineSettings
from trl_learnalign.schedules import OnlineSchedule


ALPHABET = "0123456789+=:ausert\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def make_tokenizer():
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


class TextProcessor(ProcessorMixin):
    """A processor as vision-language models have it, for text alone."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, chat_template=CHAT_TEMPLATE)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(ALPHABET) + 3,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return Qwen2ForCausalLM(Qwen2Config(**(settings | changes)))


def lora(**changes):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return LoraConfig(**(settings | changes))


def make_dataset(num=24, conversational=False, extra=False):
    texts = [f"{i % 10}+{i // 10}=" for i in range(num)]
    rows = {"prompt": [[{"role": "user", "content": text}] for text in texts] if conversational else texts}
    rows["row"] = list(range(num))
    if extra:
        rows["note"] = [{"a": [i, None], "b": "x" * i} for i in range(num)]
    return Dataset.from_dict(rows)


def digit_reward(completions, row, **kwargs):
    """1 for a completion with an even number of small digits, harder the greater the row's last digit."""
    return [float(_digits(c) % 2 == 0 and _digits(c) * 3 >= r % 10) for c, r in zip(completions, row, strict=True)]


def graded_reward(completions, **kwargs):
    return [_digits(completion) / 8 for completion in completions]


def parity_reward(completions, **kwargs):
    """Nearly always both 0 and 1 within a group of 8: every prompt is learnable."""
    return [float(sum(map(ord, _text(completion))) % 2) for completion in completions]


def fixed_reward(completions, row, **kwargs):
    """Depends on the prompt and on the place in its group of four, whatever the policy writes."""
    return [float((7 * r + place % 4) % 5 < r % 5) for place, r in enumerate(row)]


def _text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def _digits(completion):
    return sum(character in "01234" for character in _text(completion))


class Seen:
    """Wraps a reward function and notes the rows whose completions it was given, in order."""

    def __init__(self, reward=parity_reward):
        self.reward = reward
        self.rows = []
        self.__name__ = reward.__name__

    def __call__(self, completions, row, **kwargs):
        self.rows += row
        return self.reward(completions=completions, row=row, **kwargs)


def grpo_args(path, kind=GRPOConfig, **changes):
    settings = {
        "output_dir": str(path),
        "use_cpu": True,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "seed": 7,
    }
    return kind(**(settings | changes))


def make_trainer(
    path,
    config=None,
    cls=None,
    reward=digit_reward,
    dataset=None,
    peft=True,
    model=None,
    processor=False,
    eval_dataset=None,
    reward_tokenizers=None,
    settings=None,
    **changes,
):
    """
    A LearnAlignGRPOTrainer if `config` is given, else a stock GRPOTrainer; `settings` are of an online schedule;
    `changes` go to its kind of arguments.
    """
    kind = RLOOConfig if cls is not None and issubclass(cls, RLOOTrainer) else getattr(cls, "config_cls", GRPOConfig)
    kwargs = {
        "model": model if model is not None else make_model(),
        "reward_funcs": reward,
        "reward_processing_classes": reward_tokenizers,
        "args": grpo_args(path, kind, **changes),
        "train_dataset": dataset if dataset is not None else make_dataset(),
        "eval_dataset": eval_dataset,
        "processing_class": TextProcessor(make_tokenizer()) if processor else make_tokenizer(),
        "peft_config": lora() if peft is True else (peft or None),
    }
    if processor:
        kwargs["model"].config.image_token_id = 2  # newer TRL keeps it from being generated
    if config is None:
        return (cls or GRPOTrainer)(**kwargs)
    schedule = partial(OnlineSchedule, settings=settings) if config.schedule == "online" else None
    return (cls or LearnAlignGRPOTrainer)(**kwargs, train_sampler=LearnAlignSampler(config, schedule=schedule))


def config(**changes):
    """Without reports, whose figures take longer than a tiny selection; where they matter a test switches them on."""
    settings = {"num_prompts": 8, "warmup_prompts": 8, "write_report": False}
    made = LearnAlignConfig(**(settings | changes))
    return replace(made, num_rollouts=8) if "rollouts" in made.measures and "num_rollouts" not in changes else made


def online(**changes):
    """Chunks chosen from the rewards of training; what is known of a prompt beforehand is its length."""
    settings = {"schedule": "online", "prompt_features": False, "write_report": False}
    return LearnAlignConfig(**(settings | changes))


# Runs of a few steps prove no skill: with these settings the online schedule chooses without
EAGER = OnlineSettings(tried=4, begin_skill=-1e9, least_skill=-1e9, least_headroom=0.0)


def drawn(trainer):
    """Fills with the rows of every chunk that the sampler is asked for."""
    sampler = trainer._get_train_sampler()
    chunks, ask = {}, sampler.chunk

    def chunk(i):
        return chunks.setdefault(i, ask(i))

    sampler.chunk = chunk
    return chunks


def planned(sampler, i):
    """The rows of chunk `i` of a staged run, by its log, whenever it was drawn."""
    n = sampler.layout.chunk_prompts
    return [sampler.schedule.row(number) for number in range(i * n, (i + 1) * n)]


def weights(trainer):
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name} differs by {(a[name] - b[name]).abs().max()}"


def peak_bytes(call):
    """Most memory of the CPU that `call` holds at a time above the memory held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes), default=0)


def tool_calls(name, opens):
    """How a tokenizer finds calls of the tool `name` in a completion: by a pattern with the group `number`."""
    call = {"type": "function", "function": {"name": name, "arguments": {"number": "{number}"}}}
    found = {
        "open_pattern": opens,
        "close_pattern": r"\+|<eos>",
        "repeats": True,
        "content": "text",
        "transform": call,
    }
    fields = {"tool_calls": found, "content": {"close_pattern": "<eos>", "content": "text"}}
    return {"defaults": {"role": "assistant"}, "start_anchor": "a:", "fields": fields}
