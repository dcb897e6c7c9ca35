"""Rollouts that are more than one completion of one prompt: tools, environments, a rollout function of the user's."""

import random
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tiny import config, grpo_args, lora, make_model, make_tokenizer, parity_reward, tool_calls
from tokenizers import decoders

from trl_learnalign import LearnAlignGRPOTrainer, LearnAlignSampler
from trl_learnalign.host import find_host, generation
from trl_learnalign.measures import alignments
from trl_learnalign.measures.gradients import GradientFeatures


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # TRL's, of experimental features

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}{% for c in m.get('tool_calls') or [] %}"
    "u{{ c['function']['name'] }}{{ c['function']['arguments'] }}{% endfor %}+{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
# "u" and a digit is a call of `double`, which a random policy writes now and then
RESPONSES = tool_calls("double", "u(?P<number>[0-9])")


def double(number: str) -> str:
    """
    Doubles a number.

    Args:
        number: the number
    """
    return f"={2 * int(number)}="


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSES
    return tokenizer


def train(path, monkeypatch, rewards=parity_reward, dataset=None, score="learnalign", **kwargs):
    """A run of two steps; the groups of its selection, and the rows of each that entered the gradient pass."""
    groups, rows = [], {}
    generate = generation.generate_groups

    def generated(*args):
        made = generate(*args)
        groups.extend(replace(group) for group in made)  # as they are now: their completions are let go later
        return made

    class Watched(GradientFeatures):
        def __init__(self, host, dim, seed, lengths, take, *args, **kwargs):
            super().__init__(
                host, dim, seed, lengths, lambda index: rows.setdefault(index, take(index)), *args, **kwargs
            )

    monkeypatch.setattr(generation, "generate_groups", generated)
    monkeypatch.setattr(alignments, "GradientFeatures", Watched)
    texts = [f"{i % 10}+{i // 10}=" for i in range(12)]
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts]})
    sampler = LearnAlignSampler(config(num_prompts=4, warmup_prompts=0, score=score))
    trainer = LearnAlignGRPOTrainer(
        model=make_model(max_position_embeddings=256),
        reward_funcs=rewards,
        args=grpo_args(path, max_completion_length=40, max_steps=2),
        train_dataset=prompts if dataset is None else dataset,
        processing_class=chat_tokenizer(),
        peft_config=lora(),
        train_sampler=sampler,
        **kwargs,
    )
    trainer.train()
    assert len(sampler.schedule.log[-1].indices) == 4 and len(groups) == (0 if score == "random" else 12)
    return trainer, groups, rows


def last_parity(completions, **kwargs):
    return [float(sum(map(ord, str(completion[-1]["content"]))) % 2) for completion in completions]


def test_results_of_tools_carry_no_gradient(tmp_path, monkeypatch):
    trainer, groups, rows = train(tmp_path, monkeypatch, last_parity, tools=[double])
    called = 0
    for group in groups:
        for ids, mask, completion in zip(group.completion_ids, group.loss_masks, group.completions, strict=True):
            results = [message["content"] for message in completion if message["role"] == "tool"]
            called += len(results)
            given = trainer.processing_class.decode(ids[mask == 0])
            # All that the template puts between two turns of the policy, and nothing that the policy wrote
            assert given == "".join(f"t:{result}+a:" for result in results)
    assert called > 10
    assert any((row.loss_mask == 0).any() for found in rows.values() for row in found)


class Counter:
    """Begins every rollout with digits of its own."""

    def __init__(self):
        self.random = random.Random(len(MADE))
        MADE.append(self)

    def reset(self, **kwargs):
        self.shown = "".join(str(self.random.randrange(10)) for _ in range(self.random.randrange(1, 4)))
        SHOWN.append(self.shown)
        return f":{self.shown}"

    def double(self, number: str) -> str:
        """
        Doubles a number.

        Args:
            number: the number
        """
        self.number = int(number)
        return double(number)

    def get_reward(self):
        return float(int(self.shown) % 2)


MADE, SHOWN = [], []


def test_an_environment_may_begin_every_rollout_differently(tmp_path, monkeypatch):
    MADE.clear(), SHOWN.clear()
    trainer, groups, rows = train(tmp_path, monkeypatch, None, environment_factory=Counter)
    decode = trainer.processing_class.decode
    prompts = [decode(prompt) for group in groups for prompt in group.prompt_ids]
    shown = SHOWN[: len(prompts)]  # the selection comes before the training
    texts = [f"{group.row % 10}+{group.row // 10}=" for group in groups for _ in range(8)]
    assert prompts == [f"u:{text}:{digits}+a:" for text, digits in zip(texts, shown, strict=True)]
    assert len(rows) > 4
    # What is known before the environment begins
    ids = find_host(trainer).prompt_ids([trainer.train_dataset[row] for row in (3, 11)])
    assert [decode(tokens) for tokens in ids] == ["u:3+0=+a:", "u:1+1=+a:"]
    for group in groups:
        if group.row in rows:
            expected = {(tuple(p), tuple(c)) for p, c in zip(group.prompt_ids, group.completion_ids, strict=True)}
            found = {(tuple(row.prompt_ids), tuple(row.completion_ids)) for row in rows[group.row]}
            assert found and found <= expected
    assert [float(int(digits) % 2) for digits in shown] == np.concatenate([g.rewards[:, 0] for g in groups]).tolist()


@pytest.mark.skipif(Version(trl.__version__) < Version("1.16"), reason="every row needs a prompt there")
@pytest.mark.parametrize("score", ["learnalign", "random"])
def test_rows_without_a_prompt(tmp_path, monkeypatch, score):
    """The environments supply it: the texts are the prompts as the policy got them, or else what the rows hold."""
    MADE.clear(), SHOWN.clear()
    rows = Dataset.from_dict({"environment": ["a", "b"] * 6, "level": list(range(12))})
    factories = {"a": Counter, "b": Counter}
    trainer, groups, _ = train(tmp_path, monkeypatch, None, rows, score, environment_factory=factories)
    texts = pq.read_table(tmp_path / "learnalign/step-000000/texts.parquet").to_pandas()
    if score == "random":
        expected = [f"environment: {'ab'[i % 2]}\nlevel: {i}" for i in range(12)]
    else:
        assert len(groups[0].prompt_ids) == 8
        expected = [trainer.processing_class.decode(group.prompt_ids[0]) for group in groups]
        assert all(f"u::{SHOWN[8 * i]}+a:" == text for i, text in enumerate(expected))
    assert texts["index"].tolist() == list(range(12)) and texts["prompt"].tolist() == expected
    with pytest.raises(ValueError, match="There are no prompt tokens before the environment begins"):
        find_host(trainer).prompt_ids([rows[0]])


def test_a_rollout_function(tmp_path, monkeypatch):
    """It writes its own prompts, masks what is not the policy's, and has a word for the reward."""
    calls = []

    def roll_out(prompts, trainer):
        calls.append(prompts)
        tokenizer, result = trainer.processing_class, {"prompt_ids": [], "completion_ids": [], "env_mask": []}
        model = trainer.accelerator.unwrap_model(trainer.model)
        for place, prompt in enumerate(prompts):
            ids = tokenizer(f"{place % 10}:{prompt[0]['content']}")["input_ids"]
            with torch.no_grad():
                first = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=True)[0, len(ids) :].tolist()
            result["prompt_ids"].append(ids)
            result["completion_ids"].append([*first, *tokenizer("=9")["input_ids"]])
            result["env_mask"].append([1] * len(first) + [0, 0])
        return result | {"logprobs": None, "word": [str(place) for place in range(len(prompts))]}

    words = []

    def reward(completions, word, **kwargs):
        words.extend(word)
        return parity_reward(completions)

    trainer, groups, rows = train(tmp_path, monkeypatch, reward, rollout_func=roll_out)
    per_batch = len(calls[0])
    assert per_batch % 8 == 0 and calls[0][0] == calls[0][7] != calls[0][8]  # groups of `num_rollouts`
    assert words[:per_batch] == [str(place) for place in range(per_batch)]
    for place, group in enumerate(groups):
        for g in range(8):
            text = f"{(place * 8 + g) % per_batch % 10}:{group.row % 10}+{group.row // 10}="
            assert trainer.processing_class.decode(group.prompt_ids[g]) == text
            assert group.loss_masks[g].tolist() == [1] * (len(group.completion_ids[g]) - 2) + [0, 0]
    assert all(row.loss_mask[-2:].tolist() == [0, 0] for found in rows.values() for row in found)
