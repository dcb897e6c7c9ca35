"""Features of prompts from the policy's hidden states, against one forward for each prompt."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_distributed import SHARDED, alone, launch
from tiny import make_dataset, make_model, make_trainer, weights

from trl_learnalign.host import find_host
from trl_learnalign.measures import hidden_states as measure
from trl_learnalign.peers import Peers


def features(trainer, path, **kwargs):
    with Peers(trainer.accelerator) as peers:
        return measure.hidden_states(find_host(trainer), path, peers, **kwargs)


def with_dropout(path, dataset, **changes):
    """With dropout where a model can have it: a forward that leaves it on gives other states each time."""
    return make_trainer(path, dataset=dataset, model=make_model(attention_dropout=0.5), **changes)


def one_by_one(trainer, dataset):
    """The mean hidden state of every prompt after half of the layers, each from its own forward without padding."""
    model, found = trainer.model, []
    model.eval()
    for prompt in dataset["prompt"]:
        ids = trainer._tokenize_prompts([prompt])[0][0]
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        found.append(states[len(states) // 2][0].mean(0))
    model.train()
    return torch.stack(found).double().numpy()


def components(states, sample):
    """The same by a singular value decomposition."""
    standard = (states - states[sample].mean(0)) / states[sample].std(0)
    _, sizes, directions = np.linalg.svd(standard[sample], full_matrices=False)
    keep = sizes**2 > 1e-4 * sizes[0] ** 2
    keep[len(sample) - 1 :] = False
    directions = directions[keep] * np.sign([row[np.abs(row).argmax()] for row in directions[keep]])[:, None]
    scale = sizes[keep] / np.sqrt(len(sample))
    return standard @ directions.T / np.sqrt(scale * scale[0])


def of_unequal_lengths(num=60):
    return Dataset.from_dict({"prompt": ["+".join(str(i * j % 97) for j in range(1 + i % 7)) for i in range(num)]})


class Counter:
    """Counts forwards, their tokens with padding, and the positions that reach the head."""

    def __init__(self, model):
        self.forwards = self.tokens = self.heads = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)
        model.get_output_embeddings().register_forward_pre_hook(self.count_head)

    def count(self, module, args, kwargs):
        self.forwards += 1
        self.tokens += kwargs["input_ids"].numel()

    def count_head(self, module, args):
        self.heads += args[0].shape[:-1].numel()


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize("sizes", [(2048, 1024), (30, 7)], ids=["one window", "a sample and windows"])
def test_they_are_those_of_one_forward_for_each_prompt(tmp_path, monkeypatch, sizes, conversational):
    monkeypatch.setattr(measure, "SAMPLE", sizes[0])
    monkeypatch.setattr(measure, "WINDOW", sizes[1])
    dataset = make_dataset(60, conversational=True) if conversational else of_unequal_lengths()
    trainer = with_dropout(tmp_path, dataset)
    found = features(trainer, tmp_path)
    sample = np.sort(np.random.Generator(np.random.Philox(0)).permutation(60)[: sizes[0]])
    expected = components(one_by_one(trainer, dataset), sample)
    assert found.values.dtype == np.float16 and found.values.shape == expected.shape
    np.testing.assert_allclose(found.values, expected, atol=5e-3, rtol=5e-3)
    spread = found.values[sample].astype(float).std(0)
    assert abs(spread[0] - 1) < 1e-2 and (np.diff(spread) < 1e-3).all()


def test_the_policy_is_left_as_found(tmp_path):
    trainer = with_dropout(tmp_path, of_unequal_lengths(), gradient_checkpointing=True)
    modes = [module.training for module in trainer.model.modules()]
    before, state, metrics = weights(trainer), torch.get_rng_state(), str(trainer._metrics)
    features(trainer, tmp_path)
    assert [module.training for module in trainer.model.modules()] == modes and any(modes)
    assert torch.equal(torch.get_rng_state(), state) and str(trainer._metrics) == metrics
    assert all(torch.equal(before[name], value) for name, value in weights(trainer).items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_every_prompt_goes_through_the_policy_once_and_its_last_token_alone_to_the_head(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE", 20)
    dataset = of_unequal_lengths(200)
    trainer = make_trainer(tmp_path, dataset=dataset, per_device_train_batch_size=16, max_completion_length=16)
    counter = Counter(trainer.accelerator.unwrap_model(trainer.model).base_model.model)
    features(trainer, tmp_path)
    tokens = sum(len(ids) for ids in trainer._tokenize_prompts(list(dataset["prompt"]))[0])
    assert counter.heads == 200
    assert tokens <= counter.tokens <= 1.2 * tokens  # sorted by length, little is padding
    assert counter.forwards <= 2 + 1.5 * tokens / (16 * 16)


@pytest.mark.parametrize("fits", [3, 0])
def test_forwards_are_halved_where_memory_is_full(tmp_path, fits):
    trainer = make_trainer(tmp_path, dataset=make_dataset(24))
    expected = features(trainer, tmp_path / "before").values
    forward, sizes = trainer.model.forward, []

    def full(*args, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    trainer.model.forward = full
    if fits:
        np.testing.assert_allclose(features(trainer, tmp_path / "after").values, expected, atol=2e-3)
        assert sum(size for size in sizes if size <= fits) == 24
    else:
        with pytest.raises(MemoryError, match="Set `prompt_features=False`"):
            features(trainer, tmp_path / "after")


def test_they_are_read_back_where_data_and_weights_are_the_same(tmp_path):
    trainer = make_trainer(tmp_path, dataset=of_unequal_lengths())
    counter = Counter(trainer.accelerator.unwrap_model(trainer.model).base_model.model)
    first = features(trainer, tmp_path)
    made = counter.forwards
    again = features(trainer, tmp_path)
    assert counter.forwards == made and again.key == first.key and np.array_equal(again.values, first.values)

    path = tmp_path / measure.FILE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a flipped bit
    assert np.array_equal(features(trainer, tmp_path).values, first.values) and counter.forwards == 2 * made

    with torch.no_grad():
        next(iter(weights_of(trainer))).add_(0.5)
    other = features(trainer, tmp_path)
    assert other.key != first.key and counter.forwards == 3 * made
    assert not np.array_equal(other.values, first.values)


def weights_of(trainer):
    return (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)


def test_a_resumed_run_gets_those_it_began_with_or_an_error(tmp_path):
    trainer = make_trainer(tmp_path, dataset=of_unequal_lengths())
    first = features(trainer, tmp_path)
    with torch.no_grad():
        for parameter in weights_of(trainer):
            parameter.add_(0.5)
    counter = Counter(trainer.accelerator.unwrap_model(trainer.model).base_model.model)
    assert np.array_equal(features(trainer, tmp_path, key=first.key).values, first.values)
    assert counter.forwards == 0
    with pytest.raises(ValueError, match="holds features of another run"):
        features(trainer, tmp_path, key="0" * 64)
    (tmp_path / measure.FILE).unlink()
    with pytest.raises(ValueError, match="holds no features of prompts"):
        features(trainer, tmp_path, key=first.key)


def test_prompts_that_only_training_knows_are_named(tmp_path):
    def roll_out(prompts, trainer):
        raise AssertionError

    trainer = make_trainer(tmp_path)
    host = find_host(trainer)
    assert measure.reason_against(host) is None
    trainer.rollout_func = roll_out
    assert "rollout_func" in measure.reason_against(host)
    trainer.rollout_func = None
    trainer.environment_factories = {None: object}
    assert "environment" in measure.reason_against(host)
    trainer.environment_factories = None
    trainer.train_dataset = make_dataset().add_column("image", [None] * 24)
    assert "images" in measure.reason_against(host)
    trainer.train_dataset = make_dataset().remove_columns("prompt")
    assert "no column `prompt`" in measure.reason_against(host)


def test_a_pool_without_variety_has_few_components_and_no_bad_numbers(tmp_path):
    for prompts in (["1+1="] * 9, ["1+1=", "2+2="], ["1+1="]):
        trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": prompts}))
        values = features(trainer, tmp_path / str(len(prompts))).values
        assert values.shape == (len(prompts), len(set(prompts)) - 1) and np.isfinite(values).all()


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory):
    return alone("hidden states", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("how", [None, "FSDP2", "ZeRO-3"])
def test_two_processes_come_to_the_same(tmp_path, of_one_process, how):
    if how == "ZeRO-3":
        pytest.importorskip("deepspeed")
    ranks = launch("hidden states", tmp_path, 2, SHARDED.get(how))
    assert ranks[0]["features"] == ranks[1]["features"]
    np.testing.assert_allclose(ranks[0]["features"], of_one_process["features"], atol=2e-3)
    # The forward of sharded weights takes both; else each process has its own batches
    numbers = [rank["forwards"] for rank in ranks]
    assert numbers[0] == numbers[1] if how else sum(numbers) == of_one_process["forwards"]
