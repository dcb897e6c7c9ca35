"""Judges of prompts: yes or no to a question, and worth as a worked example; against one forward for each."""

from functools import cache

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from test_likelihood import never_called
from tiny import config, make_dataset, make_model, make_trainer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from trl_learnalign import select_prompts
from trl_learnalign.measures import ask, demonstration
from trl_learnalign.selection.dry_run import plan_selection


WORDS = ["<pad>", "<eos>", "<unk>", "yes", "Yes", "no", "###", "ANSWER:", "+", "=", *map(str, range(10))]
ASK = {"score": "ask", "num_prompts": 24}
DEMONSTRATION = {"score": "demonstration", "answer_column": "answer"}


def fit(model, batch, targets, steps, rate=3e-3):
    """Train a model on `batch(step)`, token ids, to put `targets(step)` last; -100 where nothing is to be learnt."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    torch.manual_seed(0)
    for step in range(steps):
        ids = batch(step)
        labels = targets(ids)
        logits = model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def by_word(template=None):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    parts = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[0-9+=]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    fast.chat_template = template
    return fast


def sums(num, seed=0):
    """Sums in order, and the same words in an order that means nothing: half of each."""
    rng = np.random.default_rng(seed)
    good = [f"{rng.integers(10)} + {rng.integers(10)} =" for _ in range(num)]
    return [text if i % 2 else " ".join(text.split()[j] for j in (1, 3, 0, 2)) for i, text in enumerate(good)]


def unfitted():
    """Not of the policy's family, whose tokenizers are read from files otherwise than they were written."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(WORDS), max_position_embeddings=128, **sizes, **special))


@cache
def judge():
    """A model that was fitted to say yes of sums in order, and no of others."""
    model, tokenizer = unfitted(), by_word()
    texts = sums(256, seed=1)
    ids = torch.tensor(tokenizer([text.join(ask.QUESTION) for text in texts])["input_ids"])
    said = torch.tensor([WORDS.index(("no", "Yes")[i % 2]) for i in range(len(texts))])

    def targets(batch):
        return torch.cat([torch.full_like(batch[:, 1:], -100), said[picked[-1]][:, None]], 1)

    picked = []

    def batch(step):
        picked.append(torch.randperm(len(ids))[:32])
        return ids[picked[-1]]

    return fit(model, batch, targets, 80, 1e-2)


def test_a_policy_that_can_judge_finds_the_prompts_that_make_sense(tmp_path, monkeypatch, caplog):
    """Against a loop of forwards; asked through a chat template, or another model with its own tokenizer and none."""
    texts = sums(24)
    dataset = Dataset.from_dict({"prompt": [*texts[:-1], "1 + " * 60], "row": range(24)})
    model, tokenizer = judge(), by_word()
    expected = []
    for text in texts[:-1]:
        asked = f"###\n{text}\n###\n\nDoes the previous paragraph demarcated within ### and ### contain"
        whole = text.join(ask.QUESTION)
        assert whole.startswith(asked)
        with torch.no_grad():
            shares = model(torch.tensor([tokenizer(whole)["input_ids"]])).logits[0, -1].softmax(0)
        yes = shares[WORDS.index("yes")] + shares[WORDS.index("Yes")]
        expected.append((yes / (yes + shares[WORDS.index("no")])).item())
    model.save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    settings = {"dataset": dataset, "reward": never_called, "peft": False}
    other = make_trainer(tmp_path / "other", **settings)
    judged = select_prompts(other, config(**ASK, judge_model=str(tmp_path / "judge")))
    assert "1 of 24 prompts (4%) are left out, as they could not be measured (ask): row 23" in caplog.text
    template = "{{ messages[0]['content'] }}{% if enable_thinking %} +{% endif %}"
    monkeypatch.setattr(tiny, "make_tokenizer", lambda: by_word(template))
    monkeypatch.setattr(ask, "WINDOW", 10)
    own = select_prompts(make_trainer(tmp_path / "own", model=model, **settings), config(**ASK))
    for selection in (judged, own):
        table = selection.scores.to_pandas().set_index("index").sort_index()
        np.testing.assert_allclose(table["ask_yes"], expected, rtol=1e-4)
        assert min(expected[1::2]) > 0.6 > 0.4 > max(expected[::2])
        assert selection.indices == table["score"].sort_values(ascending=False).index.tolist()
    # Another judge under the same name is another judge
    unfitted().save_pretrained(tmp_path / "judge")
    assert select_prompts(other, config(**ASK, judge_model=str(tmp_path / "judge"))).indices != judged.indices


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "`judge_model` is None, and the judge's tokenizer has no tokens that yes and no begin with"),
        ("{path}", "`judge_model` is '.*', which cannot be loaded .*Name a causal language model and its tokenizer"),
    ],
)
def test_a_judge_that_cannot_answer_is_refused(tmp_path, name, message):
    trainer = make_trainer(tmp_path, reward=never_called)
    with pytest.raises(ValueError, match=message):
        select_prompts(trainer, config(score="ask", judge_model=name and name.format(path=tmp_path)))


def answered(conversational=False, num=24):
    """Sums that are all answered by 7, of which every second should be."""
    dataset = make_dataset(num, conversational=conversational)
    return dataset.add_column("answer", ["7" if i % 2 else "88" for i in range(num)])


@cache
def sayer(conversational):
    """A policy that was fitted to answer 7 and to end the answer."""
    tokenizer = tiny.make_tokenizer()
    ask, answer = ("u:{}a:", "7u") if conversational else ("{}", "7\n\n")
    texts = [ask.format(f"{i % 10}+{i // 10}=") + answer for i in range(64)]
    ids = torch.tensor(tokenizer(texts)["input_ids"])
    size = len(answer)

    def targets(batch):
        return (
            torch.cat([torch.full_like(batch[:, :-size], -100), batch[:, -size:]], 1)
            .roll(-1, 1)
            .index_fill(1, torch.tensor([batch.shape[1] - 1]), -100)
        )

    # Anywhere in a context
    return fit(
        make_model(),
        lambda step: torch.cat([ids[torch.randint(64, (32,))] for _ in range(1 + step % 6)], 1)[:, :64],
        targets,
        60,
        1e-2,
    )


@pytest.mark.parametrize("conversational", [False, True])
def test_worth_as_a_worked_example_is_that_of_greedy_answers(tmp_path, monkeypatch, conversational):
    """Against generation, and the attention of a model that computes it by plain products everywhere."""
    monkeypatch.setattr(demonstration, "WINDOW", 10)
    dataset = answered(conversational)
    trainer = make_trainer(tmp_path, dataset=dataset, reward=never_called, model=sayer(conversational), peft=False)
    model, tokenizer = trainer.model, trainer.processing_class
    kind = model.config._attn_implementation
    selection = select_prompts(trainer, config(**DEMONSTRATION))
    assert model.config._attn_implementation == kind != "eager"
    assert not any(module._forward_hooks for module in model.modules())
    table = selection.scores.to_pandas().set_index("index").sort_index()

    def length(text):
        return len(tokenizer(text)["input_ids"])

    plain = make_model(attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    values, examples_of, right = np.zeros((24, 2)), [], 0
    for *examples, query in demonstration.draw_contexts(np.arange(24), 7).tolist():
        assert len({*examples, query}) == 6
        text, spans = "", []
        for row in (*examples, query):
            prompt = dataset[row]["prompt"]
            if conversational:
                prompt = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            begin = length(text) + 2 * conversational  # not the role of the user
            text += prompt
            if row != query:
                text += dataset[row]["answer"]
                spans.append((begin, length(text)))
                text += "\n\n" * (not conversational)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            written = plain.generate(ids, do_sample=False, max_new_tokens=2)
            attention = plain(ids, output_attentions=True).attentions[1][0].sum(0)
        answer, end = tokenizer.convert_ids_to_tokens(written[0, ids.shape[1] :].tolist())
        correct = answer == dataset[query]["answer"] and end in ("<eos>", "u" if conversational else "<unk>")
        each = [attention[spans[-1][1] :, begin:end].mean().item() for begin, end in spans]
        values[examples] += np.array([[correct * one / sum(each), 1.0] for one in each])
        examples_of += examples
        right += correct
    assert right > 8 and set(np.bincount(examples_of)) == {2 * 3, 2 * 4}
    np.testing.assert_allclose(table["demonstration_value"], values[:, 0] / values[:, 1], rtol=1e-4, atol=1e-7)
    assert selection.indices == table["score"].sort_values(ascending=False).index[:8].tolist()


def test_what_worked_examples_cost_and_cannot_do(tmp_path, caplog):
    text, possible = plan_selection(
        make_trainer(tmp_path, dataset=answered(), reward=never_called), config(**DEMONSTRATION)
    )
    assert possible and "pool: 24 prompts, 7 forwards over each\n" in text and "rollouts: none" in text
    # A policy that never answers right
    wrong = answered().remove_columns("answer").add_column("answer", ["99999"] * 24)
    chosen = select_prompts(make_trainer(tmp_path, dataset=wrong, reward=never_called), config(**DEMONSTRATION))
    assert "All 24 scores are equal (0), so the choice among these prompts is a random draw" in caplog.text
    assert len(chosen.indices) == 8
    for dataset, changes, message in (
        (answered(num=6), {"num_prompts": 6}, "The pool has 6 prompts, but the score needs 7"),
        (answered(), {"answer_column": None}, "`answer_column` is not set"),
        (
            wrong,
            {"max_position_embeddings": 40},
            r"take up to \d+ tokens \(rows .*\), but the policy's context has 40",
        ),
    ):
        model = make_model(**{name: changes.pop(name) for name in ("max_position_embeddings",) if name in changes})
        trainer = make_trainer(tmp_path / "bad", dataset=dataset, reward=never_called, model=model)
        with pytest.raises(ValueError, match=message):
            select_prompts(trainer, config(**DEMONSTRATION | changes))
