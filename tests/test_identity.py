"""Keys of a cache: the code that runs, the values that it works with, the policy, the rows as they are."""

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
from torch import nn
from transformers import Qwen2Config, Qwen2ForSequenceClassification
from trl.rewards import get_soft_overlong_punishment

from trl_learnalign import __version__, select_prompts
from trl_learnalign.cli.build import load_reward
from trl_learnalign.ground.user_code import is_library, version_of
from trl_learnalign.host import find_host
from trl_learnalign.identity.objects import examine, identify
from trl_learnalign.identity.seen import look, note
from trl_learnalign.identity.seen import seen as seen_function
from trl_learnalign.measures import rollouts


def same(*values):
    return len({identify(value) for value in values}) == 1


def different(*values):
    return len({identify(value) for value in values}) == len(values)


def compiled(text, name="f"):
    """A function without a file, as of a console or a notebook that was sent to a shell."""
    space = {"__name__": "__main__"}
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

    assert different(*map(over, values)) and not any(examine(over(value))[1] for value in values)
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


def make_stateful(least, seen, *, calls=0, most=3):
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


IDIOMS = """
import collections, functools, heapq, itertools
CACHE, LOG, HEAP, COUNTER, MODEL, HISTORY = {}, set(), [], itertools.count(), None, collections.defaultdict(list)

def put(where, key, value):
    where[key] = value

def helper(completions, **kwargs):
    put(CACHE, completions[0], 1)

def alias(completions, **kwargs):
    log = LOG
    log.add(completions[0])

def heap(completions, **kwargs):
    heapq.heappush(HEAP, completions[0])

def counter(completions, **kwargs):
    next(COUNTER)

def lazy_global(completions, **kwargs):
    global MODEL
    MODEL = MODEL or object()

def default(completions, cache={}, **kwargs):
    cache[completions[0]] = 1

def of_function(completions, **kwargs):
    of_function.n = getattr(of_function, "n", 0) + 1

def history(completions, **kwargs):
    HISTORY[len(completions)].append(1)

class Cached:
    def __init__(self):
        self._cache, self.log = {}, collections.deque(maxlen=10)

    @functools.cached_property
    def table(self):
        return {"a": 1}

    def remember(self, text):
        cache = self._cache
        cache[text] = 1

    def __call__(self, completions, **kwargs):
        log = self.log
        log.append(1)
        self.remember(completions[0])
        if not hasattr(self, "_lazy"):
            self._lazy = self.table | {"b": object()}

cached = Cached()
"""


def test_state_that_calls_change_counts_as_it_was_first_seen():
    """Lists of completions, counters, caches, generators: else every call would be of another function."""
    space = {"__name__": "__main__"}
    exec(IDIOMS, space)
    names = "helper alias heap counter lazy_global default of_function history cached".split()
    functions = [space[name] for name in names] + [make_stateful(1, []), Seen()]
    for function in functions:
        before = look(function).digest
        function(completions=["ab", "c"], row=[1, 2])
        assert seen_function(function).digest == before, function  # of a run under way
        note(function)
        assert look(function).digest == before, function  # of the next
        function(completions=["d"], row=[3])
        assert (look(function).digest != before) == (function is not space["lazy_global"]), function  # by hand
    cached = space["Cached"]()
    before = look(cached.remember).digest
    cached.remember("a")
    note(cached.remember)
    assert look(cached.remember).digest == before
    for made in (Seen, lambda: make_stateful(1, []), space["Cached"]):  # in another process
        assert same(made(), made())
    make = make_stateful
    assert different(make(1, []), make(5, []), make(1, [], most=4), make(1, [2]), make(1, [], calls=4))
    wrapped = [update_wrapper(lambda *args, f=f, **kwargs: f(*args, **kwargs), f) for f in (make(1, []), make(5, []))]
    assert different(*wrapped)


def test_a_tokenizer_that_a_function_calls():
    tokenizer = make_tokenizer()

    def counts(completions):
        return [len(choice(tokenizer(completion)["input_ids"])) for completion in completions]

    before = identify(counts)
    tokenizer(["1", "22"], padding=True, truncation=True, max_length=5)  # which it notes
    choice([1])
    assert identify(counts) == before
    tokenizer.add_tokens(["12"])
    assert identify(counts) != before


def test_large_tables():
    """However many containers of plain values; of more objects than can be looked at one warning names the place."""
    table = {str(i): [i] for i in range(250_000)}
    points = {"all": [(datetime.date(2020, 1, 1), lambda: 0) for _ in range(90_000)]}

    def reads(completions):
        return [table.get(completion) for completion in completions]

    def too_many(completions):
        return points

    found, unknown = examine(reads)
    assert not unknown
    table["7"][0] = 8
    assert examine(reads)[0] != found
    assert examine(too_many)[1] == ["`points` (more than 200,000 objects)"]


PYDANTIC = """
from pydantic import BaseModel, field_validator

class Answer(BaseModel):
    value: int = {}
    names: list[str] = []

    @field_validator("value", mode="{}")
    @classmethod
    def least(cls, value):
        return max(value, {})

def f(completions, **kwargs):
    return [Answer(value=len(completion)).value for completion in completions]
"""


def test_models_of_pydantic_are_their_fields_and_validators():
    """Not the addresses of what is made of these, which differ each time that a class is made."""
    pytest.importorskip("pydantic")
    variants = (1, "after", 1), (1, "after", 1), (2, "after", 1), (1, "before", 1), (1, "after", 2)
    functions = [compiled(PYDANTIC.format(*one)) for one in variants]
    before = [examine(function) for function in functions]
    assert not any(unknown for _, unknown in before)
    functions[0](["ab"])
    assert examine(functions[0]) == before[0] == before[1] and different(*functions[1:])


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


CELL = """
TABLE, weight = {"bonus": 1.0}, 1.0

def reward(completions, **kwargs):
    global weight
    weight *= 0.5
    TABLE["calls"] = TABLE.get("calls", 0) + 1
    return [float(TABLE["bonus"] * len(completion) > 3) for completion in completions]
"""


class Tables:
    def __init__(self):
        self.items = {"least": 2}


class Counting:
    __name__ = "counting"

    def __init__(self, tables):
        self.tables, self.items, self.least = tables, [], 0

    def __call__(self, completions, **kwargs):
        self.items.append(len(completions))
        self.least *= 2
        return [float(len(text) >= max(self.least, self.tables.items["least"])) for text in completions]


def test_what_is_changed_by_hand_is_measured_again_and_what_calls_change_is_not(tmp_path, monkeypatch):
    """A notebook runs cells again while the process lives."""
    rolled_out = count_generations(monkeypatch)

    def select(trainer):
        before = len(rolled_out)
        return rate(select_prompts(trainer, config(score="learnability"))), len(rolled_out) > before

    space = {"__name__": "__main__"}
    exec(CELL, space)
    cell = make_trainer(tmp_path / "cell", reward=space["reward"])
    first, _ = select(cell)
    assert first > 0 and select(cell) == (first, False)
    space["weight"] = 3.0
    assert select(cell) == (first, True) and select(cell) == (first, False)
    space["TABLE"]["bonus"] = 0.0
    assert select(cell) == (0, True)
    exec(CELL.replace("1.0}", "0.5}"), space)  # the trainer keeps the function of before, which reads the new table
    half, again = select(cell)
    assert 0 < half < first and again
    exec(CELL.replace("1.0}", "0.0}"), space)
    assert select(make_trainer(tmp_path / "cell", reward=space["reward"])) == (0, True)

    counting = Counting(Tables())
    trainer = make_trainer(tmp_path / "object", reward=counting)
    first, _ = select(trainer)
    assert select(trainer) == (first, False)
    counting.tables.items["least"] = 6
    assert select(trainer)[0] < first and not select(trainer)[1]
    counting.tables.items["least"], counting.least = 0, 1
    assert select(trainer)[1]


def count_generations(monkeypatch, stop=None):
    """The batches that are rolled out; a process is killed in place of the one after `stop`."""
    rolled_out, generate = [], rollouts.generate_in_parts

    def counted(host, dataset, rows, *args):
        rolled_out.append(rows)
        if len(rolled_out) == stop:
            raise KeyboardInterrupt
        return generate(host, dataset, rows, *args)

    monkeypatch.setattr(rollouts, "generate_in_parts", counted)
    return rolled_out


def test_a_run_killed_in_its_selection_goes_on_whatever_its_reward_function_keeps(tmp_path, monkeypatch):
    """The function of the process that is started again is as that of the first was, before warm-up filled a cache."""
    rolled_out, space = count_generations(monkeypatch, stop=3), {}
    exec(IDIOMS, space)

    def run(**resume):
        cached, default = space["Cached"](), {}

        def reward(completions, cache=default, **kwargs):
            cached(completions)
            put(cache, completions[0])
            return parity_reward(completions)

        def put(where, key):
            where[key] = 1

        settings = config(score="learnability", warmup_prompts=4, rollout_batch_prompts=4, num_prompts=4)
        trainer = make_trainer(tmp_path, settings, reward=reward, save_strategy="steps", save_steps=1, max_steps=4)
        return trainer.train(**resume)

    with pytest.raises(KeyboardInterrupt):
        run()
    run(resume_from_checkpoint=True)
    assert len(rolled_out) == 7  # of 6 batches one twice


def test_a_base_whose_weights_are_buffers(tmp_path):
    """A layer like those of GPTQ and AWQ."""

    class Quantized(nn.Linear):
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features, bias=False)
            del self.weight
            self.register_buffer("weight", linear.weight.detach().clone())

    def select(scale):
        model, seen = make_model(), Seen()
        for layer in model.model.layers:
            layer.mlp.down_proj = Quantized(layer.mlp.down_proj)
            layer.mlp.down_proj.weight *= scale
        select_prompts(make_trainer(tmp_path, model=model, reward=seen), config(score="learnability"))
        return len(seen.rows)

    assert [select(1), select(1), select(200)] == [24 * 8, 0, 24 * 8]
    scratch = nn.Linear(2, 2)
    before = identify(scratch)
    scratch.register_buffer("scratch", torch.ones(1), persistent=False)
    assert identify(scratch) == before


def test_a_reward_model_reads_by_its_own_tokenizer(tmp_path, monkeypatch):
    rolled_out = count_generations(monkeypatch)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(
        Qwen2Config(vocab_size=len(make_tokenizer()), num_key_value_heads=1, num_labels=1, pad_token_id=0, **size)
    )

    def select(template):
        before, tokenizer = len(rolled_out), make_tokenizer()
        tokenizer.chat_template = template or tokenizer.chat_template
        trainer = make_trainer(
            tmp_path,
            reward=model,
            dataset=make_dataset(6, conversational=True),
            reward_tokenizers=[tokenizer],
        )
        select_prompts(trainer, config(score="learnability", learnability="variance"))
        return len(rolled_out) - before

    other = "{% for message in messages %}9{{ message['content'] }}{% endfor %}"
    found = [select(template) for template in (None, None, other, other)]
    assert found[0] == found[2] > 0 and found[1] == found[3] == 0


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


def test_the_package_itself_is_a_library():
    """Known by its version, wherever it is installed from."""
    assert is_library("trl_learnalign.scores.builtin") and version_of("trl_learnalign.scores") == __version__
