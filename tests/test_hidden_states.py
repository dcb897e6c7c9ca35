"""Features of prompts from the policy's hidden states, against one forward for each prompt."""

import hashlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_distributed import SHARDED, alone, launch
from tiny import config, make_dataset, make_model, make_trainer, weights
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from trl_learnalign import select_prompts
from trl_learnalign.gradients.modes import as_in_evaluation
from trl_learnalign.ground.peers import Peers
from trl_learnalign.host import find_host
from trl_learnalign.measures import forwards, half_forward
from trl_learnalign.measures import hidden_states as measure
from trl_learnalign.measures.feature_file import PromptFeatures
from trl_learnalign.measures.half_forward import HalfForward


def features(trainer, path, **kwargs):
    with Peers(trainer.accelerator) as peers:
        return measure.hidden_states(find_host(trainer), path, peers, **kwargs)


def features_again(trainer, path, key, checkpoint=None):
    host = find_host(trainer)
    host.resumed_from = checkpoint
    with Peers(trainer.accelerator) as peers:
        return measure.features_of_the_run(host, path, peers, key)


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
    """Counts forwards of the backbone, their tokens with padding, those that reach its last layer, and its head."""

    def __init__(self, trainer):
        model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
        self.forwards = self.tokens = self.ends = self.heads = 0
        model.model.register_forward_pre_hook(self.count, with_kwargs=True)
        model.model.layers[-1].register_forward_hook(self.count_end)
        model.get_output_embeddings().register_forward_pre_hook(self.count_head)

    def count(self, module, args, kwargs):
        self.forwards += 1
        self.tokens += kwargs["input_ids"].numel()

    def count_end(self, module, args, output):
        self.ends += 1

    def count_head(self, module, args):
        self.heads += args[0].shape[:-1].numel()


def of_kind(kind, layers):
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "vocab_size": 22}
    common = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    torch.manual_seed(0)
    match kind:
        case "Qwen2":
            return make_model(num_hidden_layers=layers, attention_dropout=0.5)
        case "Llama":
            return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32, **common))
        case "GPT-2":
            return GPT2LMHeadModel(GPT2Config(vocab_size=22, n_embd=16, n_layer=layers, n_head=2, **common))
        case "OPT":
            return OPTForCausalLM(OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, **common))


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


@pytest.mark.parametrize("kind", ["Qwen2", "Llama", "GPT-2", "OPT"])
@pytest.mark.parametrize(("layers", "peft"), [(4, True), (5, False)])
def test_half_of_the_layers_gives_the_state_in_the_middle_of_all(tmp_path, kind, layers, peft):
    """Of the whole model in eval mode, from whatever mode the trainer has left it in."""
    trainer = make_trainer(tmp_path, model=of_kind(kind, layers), peft=peft, gradient_checkpointing=peft)
    host, ids = find_host(trainer), [[3, 4, 5, 6, 7], [8, 9], [7]]
    layer = (
        len(trainer.model.get_decoder().layers if kind != "GPT-2" else trainer.model.base_model.h) if not peft else 4
    )
    assert layer == layers
    with as_in_evaluation(host.policy), torch.no_grad():
        forward = HalfForward(host)
        found = forward(ids)
    assert forward._decoder is not None
    trainer.model.eval()
    for one, state in zip(ids, found, strict=True):
        with torch.no_grad():
            states = trainer.model(torch.tensor([one]), output_hidden_states=True).hidden_states
        np.testing.assert_allclose(state, states[len(states) // 2][0].mean(0).numpy(), atol=1e-6)


@pytest.mark.parametrize("why", ["one layer", "other states", "its own signature"])
def test_where_the_short_way_is_another_the_whole_policy_runs(tmp_path, monkeypatch, why):
    trainer = make_trainer(tmp_path, model=make_model(num_hidden_layers=1 if why == "one layer" else 4))
    host, ids = find_host(trainer), [[3, 4, 5, 6, 7], [8, 9]]
    decoder = host.model.get_base_model().model
    if why == "other states":  # those after another layer
        monkeypatch.setattr(half_forward, "_first_half", lambda model: (decoder, [], decoder.layers[3]))
    if why == "its own signature":
        monkeypatch.setattr(half_forward, "_first_half", lambda model: (torch.nn.Linear(2, 2), [], decoder.layers[2]))
    with as_in_evaluation(host.policy), torch.no_grad():
        found = HalfForward(host)(ids)
        states = trainer.model(torch.tensor([ids[0]]), output_hidden_states=True).hidden_states
    np.testing.assert_allclose(found[0], states[len(states) // 2][0].mean(0).numpy(), atol=1e-6)


def test_every_prompt_goes_through_half_of_the_policy_once_and_not_through_the_head(tmp_path, monkeypatch):
    """But for one beginning of a prompt, on which that is compared with the whole policy."""
    monkeypatch.setattr(measure, "SAMPLE", 20)
    monkeypatch.setattr(forwards, "MOST_TOKENS", 256)
    dataset = of_unequal_lengths(200)
    trainer = make_trainer(tmp_path, dataset=dataset)
    counter = Counter(trainer)
    features(trainer, tmp_path)
    tokens = sum(len(ids) for ids in trainer._tokenize_prompts(list(dataset["prompt"]))[0])
    assert (counter.ends, counter.heads) == (1, 1)
    assert tokens <= counter.tokens <= 1.03 * tokens + 64
    lengths = {len(ids) for ids in trainer._tokenize_prompts(list(dataset["prompt"]))[0]}
    assert counter.forwards <= 2 + 2 * len(lengths) + tokens / 256  # in two windows


def test_they_take_half_of_the_operations_of_the_layers(tmp_path, monkeypatch):
    prompts = [f"{i:03}+{i * 7 % 997:03}=" for i in range(300)]
    trainer = make_trainer(
        tmp_path, dataset=Dataset.from_dict({"prompt": prompts}), model=make_model(num_hidden_layers=4)
    )
    host = find_host(trainer)
    ids = host.prompt_ids([{"prompt": prompt} for prompt in prompts])
    with FlopCounterMode(display=False) as whole, torch.no_grad():
        host.model.get_base_model().model(torch.tensor(ids))
    with FlopCounterMode(display=False) as found:
        features(trainer, tmp_path)
    assert found.get_total_flops() <= 0.51 * whole.get_total_flops()


@pytest.mark.parametrize("fits", [3, 0])
def test_forwards_are_halved_where_memory_is_full(tmp_path, monkeypatch, fits):
    """What fits is found out once."""
    monkeypatch.setattr(measure, "WINDOW", 8)
    trainer = make_trainer(tmp_path, dataset=make_dataset(24))
    expected = features(trainer, tmp_path / "before").values
    decoder, sizes = trainer.model.get_base_model().model, []
    forward = decoder.forward

    def full(*args, input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    decoder.forward = full
    if fits:
        np.testing.assert_allclose(features(trainer, tmp_path / "after").values, expected, atol=2e-3)
        assert sum(size for size in sizes if size <= fits) == 24 + 2  # with those that are compared
        assert [size for size in sizes if size > fits] == [8, 4]
    else:
        with pytest.raises(MemoryError, match="Set `prompt_features=False`"):
            features(trainer, tmp_path / "after")


def test_they_are_read_back_where_data_and_weights_are_the_same(tmp_path):
    trainer = make_trainer(tmp_path, dataset=of_unequal_lengths())
    counter = Counter(trainer)
    first = features(trainer, tmp_path)
    made = counter.forwards
    again = features(trainer, tmp_path)
    assert counter.forwards == made and again.key == first.key and np.array_equal(again.values, first.values)

    path = tmp_path / first.file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a flipped bit
    assert np.array_equal(features(trainer, tmp_path).values, first.values) and counter.forwards == 2 * made
    assert path.read_bytes() == content == first.content()

    with torch.no_grad():
        next(iter(weights_of(trainer))).add_(0.5)
    other = features(trainer, tmp_path)
    assert other.key != first.key and counter.forwards == 3 * made
    assert not np.array_equal(other.values, first.values)
    assert path.read_bytes() == content  # beside the other's


def test_of_some_rows(tmp_path):
    trainer = make_trainer(tmp_path, dataset=of_unequal_lengths())
    rows = np.array([2, 3, 5, 7, 11, 13, 17, 40], dtype=np.int32)
    counter = Counter(trainer)
    found = features(trainer, tmp_path, rows=rows)
    assert found.rows.tolist() == rows.tolist() and counter.tokens < 8 * 20 + 64
    alone = make_trainer(tmp_path, dataset=of_unequal_lengths().select(rows))
    np.testing.assert_allclose(found.values, features(alone, tmp_path / "alone").values, atol=2e-3)
    whole = found.spread(60)
    assert np.array_equal(whole[rows], found.values) and not np.delete(whole, rows, axis=0).any()


@pytest.mark.parametrize("killed_at", [3, 7])
def test_a_killed_run_goes_on_from_the_windows_that_are_done(tmp_path, monkeypatch, killed_at):
    """In the sample, and after it, when what is on disk was projected already."""
    monkeypatch.setattr(measure, "SAMPLE", 20)
    monkeypatch.setattr(measure, "WINDOW", 5)
    trainer = make_trainer(tmp_path, dataset=make_dataset(50))  # ten windows, a forward each
    expected = features(trainer, tmp_path / "whole").values
    call, calls = HalfForward.__call__, []

    def until(self, ids):
        calls.append(len(ids))
        if len(calls) > killed_at:
            raise KeyboardInterrupt
        return call(self, ids)

    path = tmp_path / "run/learnalign"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HalfForward, "__call__", until)
        features(trainer, path)
    monkeypatch.setattr(HalfForward, "__call__", lambda self, ids: calls.append(len(ids)) or call(self, ids))
    del calls[:]
    found = features(trainer, path)
    assert len(calls) == 10 - killed_at
    assert np.array_equal(found.values, expected)
    assert not (tmp_path / "run/_learnalign/hidden_states").exists()


def weights_of(trainer):
    return (parameter for parameter in trainer.model.parameters() if parameter.requires_grad)


def test_a_resumed_run_gets_those_it_began_with_or_an_error(tmp_path):
    """Those of the checkpoint, even where the directory of the run has none; they are put there."""
    trainer = make_trainer(tmp_path, dataset=of_unequal_lengths())
    first = features(trainer, tmp_path / "run")
    first.write(tmp_path / "checkpoint", tmp_path / "run")
    assert (tmp_path / "checkpoint" / first.file).samefile(tmp_path / "run" / first.file)  # no copy
    with torch.no_grad():
        for parameter in weights_of(trainer):
            parameter.add_(0.5)
    counter = Counter(trainer)
    for directory, checkpoint in (("run", None), ("other", tmp_path / "checkpoint"), ("other", None)):
        found = features_again(trainer, tmp_path / directory, first.key, checkpoint)
        assert np.array_equal(found.values, first.values) and found.sha256 == first.sha256
    assert counter.forwards == 0
    with pytest.raises(ValueError, match=r"prompt_features-0{16}\.safetensors.*cannot be computed again"):
        features_again(trainer, tmp_path / "run", "0" * 64)
    (tmp_path / "run" / first.file).unlink()
    with pytest.raises(ValueError, match="is missing or damaged"):
        features_again(trainer, tmp_path / "run", first.key)


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
    for rank in ranks:  # the likelihoods of answers and other judgements, which go round in the same way
        assert all(len(set(values)) > 10 for values in rank["likelihoods"])
        np.testing.assert_allclose(rank["likelihoods"], of_one_process["likelihoods"], rtol=1e-4)
    # The forward of sharded weights takes both; else each process has its own batches
    numbers = [rank["forwards"] for rank in ranks]
    assert all(rank["dimensions"] == [2] for rank in ranks)
    assert numbers[0] == numbers[1] if how else sum(numbers) == of_one_process["forwards"]


def test_a_file_with_other_bytes_under_the_same_name_is_not_linked(tmp_path):
    """As of a run on another machine, whose last digits differ: a checkpoint would never agree with its checksum."""
    rows = np.arange(3, dtype=np.int32)
    ours, theirs = (PromptFeatures(np.full((3, 2), one, np.float16), rows, {}, "k" * 64) for one in (1.0, 2.0))
    theirs.write(tmp_path / "run")
    ours.write(tmp_path / "checkpoint", tmp_path / "run")
    written = (tmp_path / "checkpoint" / ours.file).read_bytes()
    assert hashlib.sha256(written).hexdigest() == ours.sha256 != theirs.sha256
    assert (tmp_path / "run" / theirs.file).read_bytes() == theirs.content()
    ours.write(tmp_path / "again", tmp_path / "checkpoint")
    assert (tmp_path / "again" / ours.file).stat().st_ino == (tmp_path / "checkpoint" / ours.file).stat().st_ino


def test_a_score_may_have_them(tmp_path):
    """As a measure like any other: the same numbers, no rollouts, and no column for each in scores.parquet."""
    trainer = make_trainer(tmp_path, dataset=of_unequal_lengths())
    choice = config(score=lambda table: -table["hidden_0"].abs(), score_measures=["hidden_states"])
    selection = select_prompts(trainer, choice)
    expected = -np.abs(features(trainer, tmp_path / "online").values[:, 0].astype(float))
    assert selection.scores["score"].to_pylist() == expected.tolist() and not trainer._metrics["train"]
    assert "hidden_0" not in selection.scores.column_names and "hidden states" in selection.provenance["seconds"]
