"""What a cache may answer for: the code that runs, the values that it works with, the policy, the rows as they are."""

import datetime
import enum
import re
import socket
import threading
from functools import partial, update_wrapper
from random import choice

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import (
    Seen,
    config,
    digit_reward,
    make_dataset,
    make_model,
    make_tokenizer,
    make_trainer,
    parity_reward,
)
from trl.rewards import get_soft_overlong_punishment

from trl_learnalign import select_prompts
from trl_learnalign.build import load_reward
from trl_learnalign.host import find_host
from trl_learnalign.identity import identify, unknown_parts


def same(*values):
    return len({identify(value) for value in values}) == 1


def different(*values):
    return len({identify(value) for value in values}) == len(values)


def compiled(text, name="f"):
    """A function without a file, as of a console or a notebook that was sent to a shell."""
    space = {}
    exec(text, space)
    return space[name]


def test_code_is_known_by_what_it_does():
    times = [compiled(f"def f(x):\n    return x * {factor}") for factor in (1, 2)]
    assert different(*times)
    moved = "\n\n# moved\ndef f(x):\n    'And told.'\n    return x * 1"
    assert same(times[0], compiled(moved), compiled("def f(x):\n    return x * 1"))
    inner = [
        compiled(f"def f(x):\n    class A:\n        def g(self):\n            return {n}\n    return A")
        for n in (1, 2)
    ]
    assert different(*inner, print, len, digit_reward, parity_reward)
    assert different(*(compiled(f"def f(x, {name}=None):\n    return x") for name in ("answer", "solution")))


def test_functions_that_a_function_calls_belong_to_it():
    helper = "def half(x):\n    return x / {}\ndef f(x):\n    return half(x) if x else f(x)"
    assert different(compiled(helper.format(2)), compiled(helper.format(3)))
    assert same(compiled(helper.format(2)), compiled(helper.format(2)))


def test_values_that_a_function_works_with():
    values = [
        {"a": 1.0}, {"a": 2.0}, [1, [2]], [1, [3]], {1, 2}, {1, 3}, np.arange(3), np.arange(3.0), torch.arange(3),
        pd.Series([1, 2]), pd.Series([1, 3]), pd.DataFrame({"a": ["x", None]}), pd.DataFrame({"a": ["y", None]}),
        re.compile("a"), re.compile("b"), make_dataset(3), make_dataset(4), datetime.date(2020, 1, 1), 1, True, "1",
        enum.Enum("E", "A B").A, make_model(0), make_model(1),
    ]  # fmt: skip

    def over(value):
        return lambda x: value

    assert different(*map(over, values)) and not any(unknown_parts(over(value)) for value in values)
    assert same(over({"a", "b", "c"}), over({"c", "b", "a"})) and same(over(make_model(0)), over(make_model(0)))
    table = {"a": 1}
    read = compiled("def f(x):\n    return table[x]")
    read.__globals__["table"] = table
    before = identify(read)
    table["a"] = 2
    assert identify(read) != before
    table["a"] = 1
    assert identify(read) == before
    assert different(get_soft_overlong_punishment(100, 20), get_soft_overlong_punishment(200, 20))
    cycle = []
    cycle.append(cycle)
    assert same(over(cycle), over(cycle))


class Scorer:
    def __init__(self, sign):
        self.sign = sign
        self.lock = threading.Lock()

    def turn(self):
        self.sign = -self.sign

    def __call__(self, completions, **kwargs):
        return [self.sign * len(completion) for completion in completions]


def test_objects():
    one = Scorer(1)
    before = identify(one)
    assert same(one, Scorer(1)) and different(one, Scorer(-1), Scorer(1).__call__, partial(one, 1), partial(one, 2))
    one.turn()  # by the user, not by a call
    assert identify(one) != before
    assert different(one.turn, Scorer(5).turn)


def test_state_that_calls_change_counts_as_it_was_first_seen():
    """Lists of completions, counters, caches, generators: else every call would be of another function."""

    def make(least, seen, *, calls=0, most=3):
        known, drawn = {}, np.random.default_rng(0)

        def reward(completions, weight=least, *, most=most, **kwargs):
            nonlocal calls
            calls += 1
            seen.append(len(completions))
            for completion in completions:
                if completion not in known:
                    known[completion] = len(completion) + drawn.random()
                known[completion] += 1
            reward.last = completions
            return [float(least <= len(completion) <= most) * weight for completion in completions]

        reward.last = None
        return reward

    reward, seen = make(1, []), Seen()
    before = identify(reward), identify(seen)
    reward(["ab", "c"])
    seen(completions=["ab", "c"], row=[1, 2])
    assert (identify(reward), identify(seen)) == before == (identify(make(1, [])), identify(Seen()))
    assert different(reward, make(5, []), make(1, [], most=4), make(1, [2]), make(1, [], calls=4))
    wrapped = [update_wrapper(lambda *args, f=f, **kwargs: f(*args, **kwargs), f) for f in (make(1, []), make(5, []))]
    assert different(*wrapped)
    tokenizer = make_tokenizer()

    def counts(completions):
        return [len(choice(tokenizer(completion)["input_ids"])) for completion in completions]

    before = identify(counts)
    tokenizer(["1", "22"], padding=True, truncation=True, max_length=5)  # which it notes
    choice([1])
    assert identify(counts) == before
    tokenizer.add_tokens(["12"])
    assert identify(counts) != before


class Connected:
    def __init__(self):
        self.connection = socket.socket()
        self.__name__ = "judge"

    def __call__(self, completions, row, **kwargs):
        return digit_reward(completions, row)


def test_what_cannot_be_identified_is_measured_again_and_said(tmp_path, caplog):
    judge = Connected()
    assert identify(judge) != identify(judge)
    seen = Seen(judge)
    for _ in range(2):
        before = len(seen.rows)
        select_prompts(make_trainer(tmp_path, reward=seen), config(score="learnability"))
        assert len(seen.rows) == before + 24 * 8
    assert "the reward function `judge` depends on `reward.connection` (socket.socket)" in caplog.text
    judge.connection.close()


# Through selections ------------------------------------------------------------------------------------------------


def rate(selection):
    return selection.mean_success_rates()[0]


def test_a_file_that_is_edited_while_its_function_runs(tmp_path, capsys):
    """The rollouts are those of the function that ran, whatever the file says by then."""
    file, settings = tmp_path / "rewards.py", config(score="learnability")
    text = "def least(completions, **kwargs):\n    return [float(len(c) >= {}) for c in completions]\n"
    file.write_text(text.format(2))
    trainer = make_trainer(tmp_path, reward=load_reward(f"{file}:least"))
    file.write_text(text.format(6))  # for the next experiment
    first = select_prompts(trainer, settings)
    second = select_prompts(make_trainer(tmp_path, reward=load_reward(f"{file}:least")), settings)
    out = capsys.readouterr().out
    assert rate(second) < rate(first) and "Used again" not in out
    assert "holds a selection from other reward function `least` (made:" in out


def test_functions_without_a_file_are_not_all_equal(tmp_path):
    text = "def f(completions, **kwargs):\n    return [float(len(c) >= {}) for c in completions]"
    rates = [
        rate(select_prompts(make_trainer(tmp_path, reward=compiled(text.format(least))), config(score="learnability")))
        for least in (2, 6)
    ]
    assert rates[0] > rates[1]


class Ranks:
    def __init__(self, sign):
        self.sign = sign

    def __call__(self, table):
        return self.sign * table["success_rate"]


@pytest.mark.parametrize("kind", ["object", "global"])
def test_a_score_of_ones_own_is_always_computed_and_nothing_measured_again(tmp_path, kind, capsys):
    def by_global(table):
        return vars(pytest)["SIGN"] * table["success_rate"]  # which nothing can see

    found, seen = [], Seen(digit_reward)
    for sign in (1, -1):
        pytest.SIGN = sign
        score = Ranks(sign) if kind == "object" else by_global
        settings = config(score=score, score_measures=["rollouts"], num_prompts=4)
        found.append(select_prompts(make_trainer(tmp_path, reward=seen), settings).to_pandas())
    assert len(seen.rows) == 24 * 8 and "Used again" not in capsys.readouterr().out
    assert (found[0]["score"].sort_index() == -found[1]["score"].sort_index()).all()
    del pytest.SIGN


def test_another_base_model_under_the_same_name(tmp_path, capsys):
    def select(change=None):
        seen, trainer = Seen(), None
        trainer = make_trainer(tmp_path, reward=seen)
        if change is not None:
            change(trainer.model)
        select_prompts(trainer, config(score="learnability"))
        return len(seen.rows)

    def train_further(model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if not p.requires_grad and "norm" not in name).mul_(1.5)

    def other_precision(model):
        model.config.quantization_config = {"load_in_8bit": True}

    def other_revision(model):
        model.config._commit_hash = "another"

    assert select() == 24 * 8 and select() == 0
    for change, named in (
        (train_further, "weights"), (other_precision, "quantization"), (other_revision, "revision"),
    ):  # fmt: skip
        capsys.readouterr()
        assert select(change) == 24 * 8
        out = capsys.readouterr().out
        assert f"base model ({named})" in out and "Used again" not in out


def shout(batch):
    return batch | {"prompt": [f"{prompt}:" for prompt in batch["prompt"]]}


def test_rows_as_the_trainer_reads_them(tmp_path, capsys):
    seen = Seen()

    def select(dataset):
        before = len(seen.rows)
        select_prompts(make_trainer(tmp_path, reward=seen, dataset=dataset), config(score="learnability"))
        return len(seen.rows) - before

    rows = make_dataset(6)
    assert select(rows) == 6 * 8 and select(rows) == 0
    capsys.readouterr()
    assert select(rows.with_transform(shout)) == 6 * 8
    assert "from other transform of the rows (made" in capsys.readouterr().out
    assert select(rows.with_transform(shout)) == 0
    with socket.socket() as open_connection:

        def asks(batch):
            return shout(batch) if open_connection else batch

        assert [select(rows.with_transform(asks)) for _ in range(2)] == [6 * 8, 6 * 8]


def test_prompts_have_an_identity_that_features_of_prompts_share(tmp_path):
    trainer = make_trainer(tmp_path, dataset=make_dataset(conversational=True))
    host = find_host(trainer)
    found = [host.prompt_identity()]
    assert host.prompt_identity() == found[0]
    trainer.processing_class.chat_template = trainer.processing_class.chat_template.replace("a:", "t:")
    found.append(host.prompt_identity())
    trainer.args.chat_template_kwargs = {"enable_thinking": False}
    found.append(host.prompt_identity())
    trainer.train_dataset = trainer.train_dataset.with_transform(shout)
    found.append(host.prompt_identity())
    trainer.tools = [digit_reward]
    found.append(host.prompt_identity())
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


def test_what_is_replaced_says_what_differs(tmp_path, capsys, caplog):
    select_prompts(make_trainer(tmp_path), config())
    select_prompts(make_trainer(tmp_path), config(score="learnability", num_prompts=4))
    out = capsys.readouterr().out
    assert (
        "from other `num_prompts` (it was 8 and is 4), `score` (it was 'learnalign' and is 'learnability') (made:"
        in out
    )
    select_prompts(make_trainer(tmp_path, temperature=0.5, reward=parity_reward), config(score="learnability"))
    out = capsys.readouterr().out
    for name in ("reward function `parity_reward`", "reward function `digit_reward`", "`temperature`"):
        assert name in out and name in caplog.text
    assert "was made from other" in caplog.text and "base model" not in out + caplog.text
