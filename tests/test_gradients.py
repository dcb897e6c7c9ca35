"""Per-prompt gradients against autograd run prompt by prompt, row by row, without padding."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import (
    assert_same_weights,
    config,
    graded_reward,
    lora,
    make_dataset,
    make_model,
    online,
    parity_reward,
    peak_bytes,
    weights,
)
from tiny import make_trainer as make_any_trainer
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from trl_learnalign import LearnAlignConfig, select_prompts
from trl_learnalign.gradients.engine import PROBE_RANK, PromptGradients
from trl_learnalign.gradients.layers import UnseenParametersError
from trl_learnalign.gradients.modes import checkpoints, dropout_off
from trl_learnalign.ground.hashing import stable_hash
from trl_learnalign.ground.store import Log, prepare
from trl_learnalign.host import find_host, objective
from trl_learnalign.host.groups import Row
from trl_learnalign.host.objective import policy_objective
from trl_learnalign.measures.gradients import GradientFeatures
from trl_learnalign.measures.packing import WINDOW, pack
from trl_learnalign.scores.maths import scores_of_batches


def make_trainer(*args, **changes):
    """With the loss whose gradient is Eq. 7 as printed."""
    return make_any_trainer(*args, **({"loss_type": "grpo", "use_bias_correction_kl": False} | changes))


def random_tasks(num=5, seed=0):
    """Groups of 1 to 4 rows with prompts and completions of different lengths; some tokens masked."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=()):
        return torch.randint(low, high, size, generator=generator)

    tasks = {}
    for index in range(num):
        prompt = draw(3, 20, (int(draw(2, 9)),)).tolist()
        rows = []
        for _ in range(size := int(draw(1, 5))):
            completion = draw(3, 20, (int(draw(1, 8)),)).tolist()
            mask = [1] * len(completion)
            if len(mask) > 3:
                mask[1] = 0
            rows.append(Row(prompt, completion, mask, float(draw(-20, 20)) / 7, 1 / size))
        tasks[10 * index] = rows
    return tasks


def oracle(trainer, rows):
    """The gradient of Eq. 7 for one prompt, straight from the logits, in the order of `named_parameters`."""
    model = trainer.model
    model.zero_grad()
    with dropout_off(model):
        for row in rows:
            ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
            start = len(row.prompt_ids)

            def logps(ids=ids, start=start):
                logits = model(input_ids=ids).logits[0, start - 1 : -1].float() / trainer.temperature
                return logits.log_softmax(1).gather(1, ids[0, start:, None])[:, 0]

            coefficient = torch.full((len(row.completion_ids),), row.advantage)
            ours = logps()
            if trainer.beta:
                if trainer.ref_model is None:
                    with torch.no_grad(), model.disable_adapter():
                        reference = logps()
                else:
                    with torch.no_grad():
                        logits = trainer.ref_model(input_ids=ids).logits[0, start - 1 : -1] / trainer.temperature
                        reference = logits.log_softmax(1).gather(1, ids[0, start:, None])[:, 0]
                coefficient = coefficient + trainer.beta * ((reference - ours.detach()).exp() - 1)
            mask = torch.tensor(row.loss_mask)
            (row.weight * (coefficient * ours * mask).sum() / mask.sum()).backward()
    gradient = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return gradient


def lengths_of(tasks):
    return {index: np.array([len(row) for row in rows], int) for index, rows in tasks.items()}


def source_of(trainer, dim, tasks, path, max_tokens=None, moments=None):
    prepare(path, key := f"{dim} {max_tokens}")
    log, host = Log(path, key, trainer.accelerator.process_index), find_host(trainer)
    lengths, rows = lengths_of(tasks), tasks.__getitem__
    return GradientFeatures(host, dim, 0, lengths, rows, log, max_tokens, moments=moments)


def features_of(trainer, tasks, tmp_path, dim=None, max_tokens=None):
    source = source_of(trainer, dim, tasks, tmp_path / "log", max_tokens)
    with dropout_off(trainer.model):
        source.weighted_sum(torch.ones(max(tasks) + 1))
        return {
            index: feature for indices, features in source for index, feature in zip(indices, features, strict=True)
        }


def assert_equal_to_oracle(trainer, tasks, features, rtol=1e-4, atol=1e-6):
    for index, rows in tasks.items():
        expected = torch.cat([gradient.flatten() for gradient in oracle(trainer, rows).values()])
        torch.testing.assert_close(features[index], expected, rtol=rtol, atol=atol)
        assert expected.norm() > 0


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("batch", [4, 16])
def test_gradients_equal_autograd_prompt_by_prompt(tmp_path, beta, batch):
    """With a LoRA B that is not zero; a batch of 4 spreads groups over microbatches."""
    trainer = make_trainer(tmp_path, beta=beta, per_device_train_batch_size=batch, temperature=0.7)
    tasks = random_tasks()
    features = features_of(trainer, tasks, tmp_path)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert_equal_to_oracle(trainer, tasks, features)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_gradient_is_the_one_that_the_trainer_itself_takes(tmp_path, beta):
    trainer = make_trainer(tmp_path, beta=beta)
    trainer.current_gradient_accumulation_steps = 1
    prompt, completions = [5, 6, 7], [[8, 9, 10, 3], [4, 5, 6, 7]]
    rows = [Row(prompt, ids, [1] * 4, a, 0.5) for ids, a in zip(completions, (0.8, -1.1), strict=True)]
    inputs = {
        "prompt_ids": torch.tensor([prompt] * 2),
        "prompt_mask": torch.ones(2, 3, dtype=torch.long),
        "completion_ids": torch.tensor(completions),
        "completion_mask": torch.ones(2, 4, dtype=torch.long),
        "advantages": torch.tensor([0.8, -1.1]),
    }
    arguments = torch.tensor([prompt + ids for ids in completions]), torch.ones(2, 7, dtype=torch.long), 4
    if beta:
        with torch.no_grad():
            inputs["ref_per_token_logps"] = objective._reference_logps(trainer, arguments)
    trainer.model.train()
    trainer.compute_loss(trainer.model, inputs).backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])
    trainer.model.zero_grad()
    feature = features_of(trainer, {0: rows}, tmp_path)[0]
    torch.testing.assert_close(feature, -expected, rtol=1e-4, atol=1e-6)  # the loss falls where the objective rises


def test_sketches_equal_sketched_gradients(tmp_path):
    trainer = make_trainer(tmp_path, per_device_train_batch_size=4)
    tasks = random_tasks()
    exact = features_of(trainer, tasks, tmp_path)
    engine = PromptGradients(trainer.model, 256, 0)
    for index, feature in features_of(trainer, tasks, tmp_path, dim=256).items():
        expected = torch.zeros(1, 256)
        start = 0
        for tap in engine._taps:
            engine._sink.add_(expected, tap.name, slice(None), exact[index][None, start : start + tap.size])
            start += tap.size
        torch.testing.assert_close(feature, expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bfloat16 base"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_more_memory_than_a_plain_backward(tmp_path, checkpointing, precision):
    model = make_model(hidden_size=64, intermediate_size=176, vocab_size=64, num_hidden_layers=6)
    if precision == "bfloat16 base":  # and a LoRA in float32, as Trainer has it on GPUs
        model.to(torch.bfloat16)
    trainer = make_trainer(tmp_path, model=model)
    assert {parameter.dtype for parameter in weights(trainer).values()} == {torch.float32}
    if checkpointing:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = [Row([3, 4, 5] * 5, [6 + i, 7, 8, 9] * 10, [1] * 40, 1.0, 0.25) for i in range(16)]

    def plain():
        policy_objective(trainer, rows).backward()
        trainer.model.zero_grad()

    def ours():
        with PromptGradients(trainer.model, 4096, 0) as engine:
            engine.collect([4, 8, 4], 55, lambda: policy_objective(trainer, rows))

    with dropout_off(trainer.model), torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        plain()
        assert peak_bytes(ours) <= 1.05 * peak_bytes(plain)


def test_memory_of_large_exact_gradients_does_not_grow_with_the_pool(tmp_path, monkeypatch):
    """The mean in float64, and at most two gradients: four vectors of the LoRA's size, and the backward's own."""
    monkeypatch.setattr("trl_learnalign.measures.gradients.EXACT_BYTES", 0)
    trainer = make_trainer(tmp_path, model=make_model(hidden_size=64, intermediate_size=256), peft=lora(r=32))
    size = 4 * sum(parameter.numel() for parameter in weights(trainer).values())
    rows = [Row([3], [6, 7], [1, 1], 1.0, 0.5)]

    def plain():
        policy_objective(trainer, rows).backward()
        trainer.model.zero_grad()

    def ours(num):
        source = source_of(trainer, None, dict.fromkeys(range(num), rows), tmp_path / "log")
        mean = source.weighted_sum(torch.ones(num))
        indices, *_ = scores_of_batches(source, torch.ones(num), mean)
        assert indices.tolist() == list(range(num))

    with dropout_off(trainer.model):
        plain()
        few, many = peak_bytes(lambda: ours(4)), peak_bytes(lambda: ours(32))
        assert many <= 1.01 * few
        assert many <= peak_bytes(plain) + 4 * size


def test_exact_gradients_computed_again_equal_those_kept(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    tasks = random_tasks()
    kept = features_of(trainer, tasks, tmp_path)
    monkeypatch.setattr("trl_learnalign.measures.gradients.EXACT_BYTES", 1000)
    again = features_of(trainer, tasks, tmp_path)
    for index in tasks:
        torch.testing.assert_close(kept[index], again[index], rtol=1e-4, atol=1e-6)


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=22, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": {"lora_dropout": 0.5}},
        {"lora": {"use_rslora": True, "rank_pattern": {"q_proj": 2}}},
        {"lora": {"target_modules": ["q_proj", "down_proj"]}},
        {"args": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}},
        {"args": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}},
        {"model": llama},
        {"model": lambda: make_model(tie_word_embeddings=False)},
    ],
)
def test_gradients_of_many_kinds_of_model(tmp_path, changes):
    model = changes.get("model", make_model)()
    trainer = make_trainer(tmp_path, model=model, peft=lora(**changes.get("lora", {})), **changes.get("args", {}))
    tasks = random_tasks(3)
    modes = [module.training for module in trainer.model.modules()]
    features = features_of(trainer, tasks, tmp_path)
    assert modes == [module.training for module in trainer.model.modules()]
    assert_equal_to_oracle(trainer, tasks, features)


@pytest.mark.parametrize("dim", [256, None])
def test_a_prompt_without_a_trained_token_has_a_feature_of_zeros(tmp_path, dim):
    trainer = make_trainer(tmp_path)
    features = features_of(trainer, random_tasks(2) | {5: []}, tmp_path, dim=dim)
    assert set(features) == {0, 10, 5} and features[5].norm() == 0 < features[0].norm()


def test_only_the_active_adapter_counts(tmp_path):
    model = get_peft_model(make_model(), lora())
    model.add_adapter("other", lora(r=2))
    model.set_adapter("default")
    trainer = make_trainer(tmp_path, model=model, peft=False)
    tasks = random_tasks(2)
    assert_equal_to_oracle(trainer, tasks, features_of(trainer, tasks, tmp_path))


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_probe_equals_a_real_lora_adapter(tmp_path, beta, reentrant):
    """Full fine-tuning: the probe's gradient is that of LoRA B beside an A with the probe's values, B = 0."""
    args = {"beta": beta}
    if reentrant is not None:
        args |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    make_model().save_pretrained(tmp_path / "model")  # TRL makes its reference model from the path of the policy
    model = Qwen2ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    trainer = make_trainer(tmp_path, model=model, peft=False, **args)
    if beta:  # a policy that has moved away from its reference
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.02)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    modules = [type(module) for module in trainer.model.modules()]
    tasks = random_tasks(3)
    features = features_of(trainer, tasks, tmp_path)
    assert [type(module) for module in trainer.model.modules()] == modules
    assert all(
        "forward" not in vars(module) for module in trainer.model.modules() if isinstance(module, torch.nn.Linear)
    )
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None

    adapter = LoraConfig(r=PROBE_RANK, lora_alpha=PROBE_RANK, target_modules="all-linear")
    peft_model = get_peft_model(trainer.model, adapter)
    for name, module in peft_model.named_modules():
        if name.endswith("lora_A.default"):
            layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
            generator = torch.Generator().manual_seed(stable_hash("probe", 0, layer))
            bound = module.in_features**-0.5
            module.weight.data.uniform_(-bound, bound, generator=generator)
    trainer.model = peft_model
    for index, rows in tasks.items():
        gradients = oracle(trainer, rows)
        expected = torch.cat([g.flatten() for name, g in gradients.items() if "lora_B" in name])
        torch.testing.assert_close(features[index], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["autocast", "bf16", "bf16 base"])
@pytest.mark.parametrize("hidden", [16, 64])
def test_low_precision(tmp_path, precision, hidden):
    """
    The engine adds nothing to what bfloat16 does to a backward: it agrees with autograd in the same precision, and is
    no farther from float32. (Autograd itself is not within .9999 of float32 here.)
    """
    trainer = make_trainer(tmp_path, model=make_model(hidden_size=hidden))
    trainer.model.to(torch.bfloat16).float()  # weights that both precisions can hold
    tasks = random_tasks(6)
    exact = features_of(trainer, tasks, tmp_path)
    if precision != "autocast":
        for parameter in trainer.model.parameters():
            if precision == "bf16" or not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    engine = PromptGradients(trainer.model, None, 0)
    names = [tap.name + ".weight" for tap in engine._taps]

    def cosine(a, b):
        return torch.cosine_similarity(a, b, dim=0).item()

    for index, rows in tasks.items():
        with dropout_off(trainer.model), torch.autocast("cpu", torch.bfloat16, enabled=precision != "bf16"):
            with engine:
                ours = engine.collect(
                    [len(rows)], max(map(len, rows)), lambda rows=rows: policy_objective(trainer, rows)
                )
            policy_objective(trainer, rows).backward()
        gradients = dict(trainer.model.named_parameters())
        autograd = torch.cat([gradients[name].grad.flatten().float() for name in names])
        trainer.model.zero_grad()
        assert cosine(ours[0], autograd) >= 0.9999
        assert 1e-7 < 1 - cosine(ours[0], exact[index]) <= 1.1 * (1 - cosine(autograd, exact[index])) + 1e-5


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"bias": "lora_only", "target_modules": ["q_proj"]}, "q_proj.base_layer.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        ({"modules_to_save": ["norm"]}, "norm"),
        ({"target_modules": [], "target_parameters": ["mlp.gate_proj.weight"]}, "gate_proj"),
    ],
)
def test_tensors_that_would_be_missed_are_named(tmp_path, settings, name):
    peft = lora(**({"init_lora_weights": True} | settings))
    with pytest.raises(UnseenParametersError, match=f"{name}.*score='learnability'"):
        make_trainer(tmp_path, config(), peft=peft, reward=parity_reward)


def test_a_weight_used_without_its_layer_is_noticed(tmp_path):
    """The check of the first backward: here the adapter of one layer is multiplied in by hand."""
    trainer = make_trainer(tmp_path, reward=parity_reward)
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    layer.forward = lambda x: base(x) + x @ a.weight.T @ b.weight.T
    with pytest.raises(UnseenParametersError, match="q_proj.lora_A.*q_proj.lora_B.*score='learnability'"):
        features_of(trainer, random_tasks(2), tmp_path)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_model_without_linear_layers_gets_a_clear_error(tmp_path):
    class Empty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(2))

        def get_output_embeddings(self):
            return None

    with pytest.raises(UnseenParametersError, match="Empty has no LoRA adapter and no `nn.Linear`"):
        PromptGradients(Empty(), 64, 0, probe=True)
    with pytest.raises(UnseenParametersError, match="no trainable parameter"):
        PromptGradients(make_model().requires_grad_(False), 64, 0)


def test_no_backward_for_prompts_without_learnability(tmp_path, monkeypatch):
    """Rows that enter a gradient pass: those of learnable prompts, less those of zero advantage."""
    seen = []
    original = objective.policy_objective
    monkeypatch.setattr(
        objective, "policy_objective", lambda trainer, rows: (seen.extend(rows), original(trainer, rows))[1]
    )
    trainer = make_trainer(tmp_path, reward=graded_reward, dataset=make_dataset(16))
    selection = select_prompts(trainer, LearnAlignConfig(num_prompts=8, learnability="variance", save_rollouts=True))
    import pyarrow.parquet as pq

    table = pq.read_table(tmp_path / "_learnalign/rollouts/step-000000/rollouts.parquet").to_pylist()
    carrying = [row for row in table if row["advantage"] != 0]
    assert len(seen) == len(carrying) < len(table)
    learnable = dict(
        zip(selection.scores["index"].to_pylist(), selection.scores["learnability"].to_pylist(), strict=True)
    )
    assert all(learnable[row["index"]] > 0 for row in carrying)


@pytest.mark.parametrize("counts", [[4, 4], [3, 5]])
@pytest.mark.parametrize("dim", [1024, 65536, None])
def test_no_more_work_than_a_plain_backward(tmp_path, counts, dim):
    trainer = make_trainer(tmp_path)
    rows = [Row([3, 4, 5], [6 + i, 7, 8, 9], [1] * 4, 1.0, 0.25) for i in range(8)]

    def loss():
        return policy_objective(trainer, rows)

    with dropout_off(trainer.model):
        with FlopCounterMode(display=False) as plain:
            loss().backward()
        trainer.model.zero_grad()
        with PromptGradients(trainer.model, dim, 0) as engine, FlopCounterMode(display=False) as ours:
            engine.collect(counts, 7, loss)
    assert 0 < ours.get_total_flops() <= 1.001 * plain.get_total_flops()


def moe(cls, config_cls, **sizes):
    torch.manual_seed(0)
    settings = {"vocab_size": 22, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return cls(config_cls(**settings, **sizes))


def test_mixture_of_experts(tmp_path):
    """A block that flattens rows and tokens, with LoRA on its shared expert and on the attention."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "intermediate_size": 16}
    model = moe(Qwen2MoeForCausalLM, Qwen2MoeConfig, shared_expert_intermediate_size=8, **sizes)
    targets = ["q_proj", "v_proj", "o_proj", "shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"]
    trainer = make_trainer(tmp_path, model=model, peft=lora(target_modules=targets))
    assert sum("shared_expert" in name for name in weights(trainer)) == 12
    tasks = random_tasks(3)
    assert_equal_to_oracle(trainer, tasks, features_of(trainer, tasks, tmp_path))


def test_layers_whose_tokens_are_mixed_are_refused(tmp_path):
    trainer = make_trainer(tmp_path)
    layer = trainer.model.base_model.model.model.layers[0].mlp.up_proj
    adapted = layer.forward
    # As an expert that got six of the ten tokens of two rows
    layer.forward = lambda x: adapted(x.flatten(0, 1)[:6]).sum() + x.new_zeros(*x.shape[:2], 32)
    with pytest.raises(RuntimeError, match="layers.0.mlp.up_proj.lora_.*cannot be assigned to prompts"):
        features_of(trainer, {0: [Row([3, 4], [5, 6, 7], [1] * 3, 1.0, 0.5)] * 2}, tmp_path)


def test_fully_sharded_weights(tmp_path):
    """`fully_shard` on two gloo processes: each process's prompts have the gradients of the unsharded model."""
    script = Path(__file__).with_name("sharded_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    for rank in range(2):
        assert (tmp_path / f"pass-{rank}").read_text() == "2"
        ours, expected = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert ours.norm() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_layers_on_two_devices(tmp_path):
    """
    A selection with half of the model on another device, which has no float64, is that with all of it on the CPU.
    """
    command = [sys.executable, str(Path(__file__).with_name("two_devices_run.py")), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]
    assert (tmp_path / "done").exists()


def test_microbatches_hold_little_padding_and_every_row_once():
    """Lengths like those of GSM8K: prompts of 30 to 230 tokens, completions of 60 to 400 that vary within a group."""
    generator = torch.Generator().manual_seed(0)
    tasks = {}
    for index in range(300):
        prompt = int(30 + 200 * torch.rand((), generator=generator) ** 2)
        typical = 60 + 250 * torch.rand((), generator=generator)
        lengths = (typical * (1 + 0.25 * torch.randn(8, generator=generator))).clamp(20, 400).int().tolist()
        tasks[index] = [Row([1] * prompt, [2] * length, [1] * length, 1.0, 1 / 8) for length in lengths]
    tasks[7] = []
    for max_tokens in (4096, 16384):
        windows = pack(lengths_of(tasks), max_tokens)
        chosen = [microbatch for window in windows for microbatch in window.microbatches()]
        microbatches = [(counts, [tasks[index][row] for index, row in places]) for counts, places in chosen]
        seen = [id(row) for _, rows in microbatches for row in rows]
        assert sorted(seen) == sorted(id(row) for rows in tasks.values() for row in rows)
        computed = useful = 0
        for counts, rows in microbatches:
            assert sum(counts.values()) == len(rows)
            owners = [index for index, count in counts.items() for _ in range(count)]
            assert all(any(row is own for own in tasks[index]) for index, row in zip(owners, rows, strict=True))
            assert len(rows) * max(map(len, rows)) <= max_tokens
            computed += len(rows) * max(map(len, rows))
            useful += sum(map(len, rows))
        assert (computed - useful) / computed <= 0.1
        for window in windows:  # groups stay within a window, which is all that is under way at a time
            assert len(window.indices) <= WINDOW
            assert {index for counts, _ in window.microbatches() for index in counts} == set(window.indices)
        assert sum(len(window.indices) for window in windows) == 299
        assert len({window.name for window in windows}) == len(windows)


def test_a_row_longer_than_the_budget_goes_alone(tmp_path):
    trainer = make_trainer(tmp_path)
    tasks = random_tasks()
    alone = features_of(trainer, tasks, tmp_path, max_tokens=1)
    together = features_of(trainer, tasks, tmp_path, max_tokens=10_000)
    assert all(len(rows) == 1 for window in pack(lengths_of(tasks), 1) for _, rows in window.microbatches())
    for index in tasks:
        torch.testing.assert_close(alone[index], together[index], rtol=1e-4, atol=1e-6)


def test_a_pass_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """To the last bit, and at most one microbatch is computed again, wherever it stops."""
    monkeypatch.setattr("trl_learnalign.measures.gradients.pack", lambda *args: pack(*args[:2], size=5))
    trainer = make_trainer(tmp_path)
    tasks = random_tasks(12)
    collected = count_calls(monkeypatch, PromptGradients, "collect")
    whole = features_of(trainer, tasks, tmp_path / "whole", dim=256, max_tokens=40)
    total = len(collected)
    assert total > 6
    for stop in range(1, total):
        collected.clear()
        with monkeypatch.context() as patch:
            stop_at(patch, PromptGradients, "collect", stop)
            with pytest.raises(KeyboardInterrupt):
                features_of(trainer, tasks, tmp_path / str(stop), dim=256, max_tokens=40)
        resumed = features_of(trainer, tasks, tmp_path / str(stop), dim=256, max_tokens=40)
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[index], resumed[index]) for index in tasks)
        assert len(collected) == total  # each of those once, less the one that was stopped
    log = Log(tmp_path / "1" / "log", "256 40", 0)
    assert all(window.name in log for window in pack(lengths_of(tasks), 40, size=5))
    assert not len(log.inside("parts")) and not sum(file.stat().st_size for file in log.path.glob("parts/*"))


def test_microbatches_of_another_budget_do_not_stay_in_the_log(tmp_path, monkeypatch):
    """A run that ran out of memory is often run again with another `max_tokens_per_batch`."""
    trainer, tasks = make_trainer(tmp_path), random_tasks(12)
    prepare(path := tmp_path / "log", "key")

    def compute(budget):
        log = Log(path, "key", 0)
        source = GradientFeatures(find_host(trainer), 256, 0, lengths_of(tasks), tasks.__getitem__, log, budget)
        with dropout_off(trainer.model):
            source.compute()

    with monkeypatch.context() as patch:
        stop_at(patch, PromptGradients, "collect", 3)
        with pytest.raises(KeyboardInterrupt):
            compute(40)
    assert sum(file.stat().st_size for file in path.glob("parts/*"))
    compute(60)
    assert not sum(file.stat().st_size for file in path.glob("parts/*"))


def count_calls(monkeypatch, owner, name):
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: (calls.append(args), original(*args, **kwargs))[1])
    return calls


def stop_at(patch, owner, name, number):
    """The call after `number` ends as if the user had interrupted it."""
    left, original = [number], getattr(owner, name)

    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    patch.setattr(owner, name, call)


def test_out_of_memory_halves_the_microbatch(tmp_path, monkeypatch, caplog):
    trainer = make_trainer(tmp_path)
    tasks = random_tasks(8)
    expected = features_of(trainer, tasks, tmp_path / "whole", dim=256)
    sizes, original = [], objective.policy_objective

    def too_large(trainer, rows):
        sizes.append(len(rows))
        if len(rows) > 3:
            original(trainer, rows)  # the memory ends after the forward
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(trainer, rows)

    monkeypatch.setattr(objective, "policy_objective", too_large)
    features = features_of(trainer, tasks, tmp_path / "halves", dim=256)
    for index in tasks:
        torch.testing.assert_close(features[index], expected[index], rtol=1e-4, atol=1e-6)
    assert "taken in halves" in caplog.text and "max_tokens_per_batch" in caplog.text
    assert sizes[0] > 3 and sum(size for size in sizes if size <= 3) == sum(map(len, tasks.values()))


def test_out_of_memory_with_a_single_rollout_names_the_remedies(tmp_path, monkeypatch):
    def never(trainer, rows):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(objective, "policy_objective", never)
    with pytest.raises(MemoryError, match="1 rollouts of .* tokens does not fit.*gradient_checkpointing"):
        features_of(make_trainer(tmp_path), random_tasks(2), tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_end_the_selection(tmp_path, monkeypatch, value):
    original = objective.policy_objective
    monkeypatch.setattr(objective, "policy_objective", lambda *args: original(*args) * value)
    with pytest.raises(FloatingPointError, match="training prompts .* are not finite.*lower the learning rate"):
        features_of(make_trainer(tmp_path), random_tasks(2), tmp_path)


@pytest.mark.parametrize("dim", [256, None])
def test_the_same_inputs_give_the_same_bits(tmp_path, dim):
    tasks = random_tasks(8)
    first = features_of(make_trainer(tmp_path), tasks, tmp_path / "first", dim=dim, max_tokens=60)
    second = features_of(make_trainer(tmp_path), tasks, tmp_path / "second", dim=dim, max_tokens=60)
    assert all(torch.equal(first[index], second[index]) for index in tasks)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_inputs_give_the_same_bits_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    tasks = random_tasks(8)
    cpu = features_of(make_trainer(tmp_path), tasks, tmp_path / "cpu", dim=256, max_tokens=60)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            features_of(make_trainer(tmp_path, use_cpu=False), tasks, tmp_path / name, dim=256, max_tokens=60)
            for name in ("first", "second")
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for index in tasks:
        assert torch.equal(first[index], second[index])
        torch.testing.assert_close(first[index], cpu[index], rtol=1e-3, atol=1e-5)


def test_groups_of_one_size_are_computed_together(tmp_path):
    """Packed rows take one product per number of rows in a layer, not one per prompt."""

    def row(g, length):
        return Row(np.full(4, 3, np.int32), np.full(length, 5 + g, np.int32), np.ones(length, np.int8), 1.0, 1.0)

    tasks = {index: [row(g, 6 + index % 2) for g in range(1 + index % 3)] for index in range(12)}
    trainer = make_trainer(tmp_path)
    engine = PromptGradients(trainer.model, 64, seed=0)
    (window,) = pack(lengths_of(tasks), max_tokens=10**6)
    ((counts, places),) = window.microbatches()
    rows = [tasks[index][row] for index, row in places]
    assert sorted(counts.values()) == list(counts.values()) == [1] * 4 + [2] * 4 + [3] * 4
    calls = []
    add = engine._sink.add_
    engine._sink.add_ = lambda *args: calls.append(args) or add(*args)
    with engine:
        engine.collect(list(counts.values()), max(map(len, rows)), lambda: policy_objective(trainer, rows))
    assert len(calls) == 3 * len(engine._taps)


class PacksItsWeight(torch.nn.Linear):
    """A layer like bitsandbytes' Linear4bit on some CPUs: eval mode packs its weight for good, without a gradient."""

    packed = False

    def forward(self, x):
        self.packed = self.packed or not self.training
        return super().forward(x.detach() if self.packed else x)


def with_dropout():
    return make_model(attention_dropout=0.3)


def quantized():
    model = with_dropout()
    for module in model.model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = PacksItsWeight
    return model


def test_layers_that_drop_nothing_stay_in_their_mode(tmp_path):
    """A selection with and without gradients, and training after each."""
    expected = {}
    for make in (with_dropout, quantized):
        for score in ("learnalign", "learnability"):
            trainer = make_any_trainer(
                tmp_path / f"{make.__name__}-{score}",
                config(score=score, warmup_prompts=0),
                model=make(),
                reward=parity_reward,
                max_steps=3,
            )
            trainer.train()
            packing = [module for module in trainer.model.modules() if isinstance(module, PacksItsWeight)]
            assert not any(module.packed for module in packing)
            assert_same_weights(weights(trainer), expected.setdefault(score, weights(trainer)))
    assert packing


def test_hidden_states_leave_such_layers_as_they_are(tmp_path):
    trainer = make_any_trainer(tmp_path, online(prompt_features=True), model=quantized(), max_steps=2)
    trainer.train()
    packing = [module for module in trainer.model.modules() if isinstance(module, PacksItsWeight)]
    assert packing and not any(module.packed for module in packing)
    features = trainer.learnalign.schedule.curriculum.features
    assert features.shape[1] > 2  # more than a constant and the length


class OfALibrary(torch.nn.Module):
    """A layer for quantized weights that is no `nn.Linear`."""

    def __init__(self, kind):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4).to(kind))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_quantized_layers_of_any_kind_stay_in_their_mode(kind):
    model = torch.nn.Sequential(
        OfALibrary(kind), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4)
    )
    with dropout_off(model):
        assert [module.training for module in model] == [True, False, False, True]
    assert all(module.training for module in model.modules())


class Recomputes(torch.nn.Module):
    """A model of one block that computes its activations again in the backward pass, in train mode."""

    def __init__(self, name):
        super().__init__()
        self.embed, self.block, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)
        setattr(self.block, name, True)

    def forward(self, ids):
        x = self.embed(ids)
        if self.block.training:
            x = torch.utils.checkpoint.checkpoint(lambda x: self.block(x), x, use_reentrant=True)
        return self.head(x)

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_blocks_that_checkpoint_are_known_by_either_name(name):
    """transformers 6 has the second. The block must stay in train mode, and the probe must get a graph."""
    model, ids = Recomputes(name), torch.tensor([[1, 2, 3], [4, 5, 6]])
    model.block.register_module("drop", torch.nn.Dropout(0.5))
    with dropout_off(model), PromptGradients(model, None, 0, probe=True) as gradients:
        assert checkpoints(model.block) and not model.block.drop.training and not model.embed.training
        found = gradients.collect([1, 1], 3, lambda: model(ids)[:, :, 0].sum())
    assert found.shape == (2, 4 * PROBE_RANK) and (found.norm(dim=1) > 0).all()
