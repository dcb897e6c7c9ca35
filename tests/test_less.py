"""LESS with several checkpoints and Adam's direction, against the trainer's own loss and PyTorch's own Adam."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from peft import load_peft_weights, set_peft_model_state_dict
from test_gradients import oracle, random_tasks, source_of
from test_losses import gradient_of_training
from test_target import table_of, target_rows
from tiny import assert_same_weights, config, lora, make_dataset, make_trainer, parity_reward, weights

from trl_learnalign import Selection, select_prompts
from trl_learnalign.gradients.engine import PromptGradients
from trl_learnalign.gradients.modes import dropout_off
from trl_learnalign.host import find_host
from trl_learnalign.measures import alignments
from trl_learnalign.measures import target as of_target
from trl_learnalign.measures.policies import Policy
from trl_learnalign.selection.dry_run import plan_selection


def trainer_in(path, **changes):
    settings = {"reward": parity_reward, "dataset": make_dataset(12), "max_steps": 5} | changes
    return make_trainer(path, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer after five steps, with checkpoints after two and four."""
    path = tmp_path_factory.mktemp("run")
    trainer = trainer_in(path, save_strategy="steps", save_steps=2, loss_type="dapo")
    trainer.train()
    return trainer, [path / "checkpoint-2", path / "checkpoint-4"]


def for_target(**settings):
    return config(score="target", target_dataset=target_rows(), target_column="task", projection_dim=None, **settings)


def adams_step(parameters, saved, gradient):
    """How PyTorch's AdamW moves the parameters from where it was saved, uphill, at a learning rate of 1."""
    moved = [parameter.detach().clone().requires_grad_(True) for parameter in parameters]
    numbers = [len(group["params"]) for group in saved["param_groups"]]
    optimizer = torch.optim.AdamW([{"params": list(part)} for part in _parts(moved, numbers)])
    optimizer.load_state_dict(deepcopy(saved))
    for group in optimizer.param_groups:
        group.update(lr=1.0, weight_decay=0.0)
    for parameter, part in zip(moved, gradient.split([one.numel() for one in moved]), strict=True):
        parameter.grad = -part.view_as(parameter)
    before = torch.cat([parameter.detach().flatten() for parameter in moved])
    optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in moved]) - before


def _parts(values, numbers):
    values = iter(values)
    return [[next(values) for _ in range(number)] for number in numbers]


@pytest.mark.parametrize("dim", [None, 256])
def test_the_step_is_that_of_adam_for_the_whole_gradient_of_a_prompt(tmp_path, run, dim):
    """Though its rows are in several microbatches: the step of a sum is not the sum of steps."""
    trainer, _ = run
    was, trainer.loss_type = trainer.loss_type, "grpo"
    tasks, parameters = random_tasks(), [p for p in trainer.model.parameters() if p.requires_grad]
    plain = source_of(trainer, dim, tasks, tmp_path / "plain", max_tokens=20)
    source = source_of(trainer, dim, tasks, tmp_path / "adam", 20, Policy(find_host(trainer)).moments())
    assert max(len(window.microbatches()) for window in source.windows) > 1
    with dropout_off(trainer.model):
        source.compute()
        found = {index: row for indices, features in source for index, row in zip(indices, features, strict=True)}
    for index, rows in tasks.items():
        gradient = torch.cat([part.flatten() for part in oracle(trainer, rows).values()])
        step = adams_step(parameters, trainer.optimizer.state_dict(), gradient)[None]
        expected = torch.zeros(1, plain.feature_dim)
        sizes = plain.engine.sizes
        for name, part in zip(sizes, step.split(list(sizes.values()), 1), strict=True):
            plain.engine._sink.add_(expected, name, slice(None), part)
        torch.testing.assert_close(found[index], expected[0], rtol=1e-3, atol=1e-4)
    trainer.loss_type = was


@pytest.mark.parametrize("direction", ["plain", "adam"])
def test_alignments_are_weighted_sums_over_checkpoints(tmp_path, run, monkeypatch, direction):
    """And the policy is as before. The largest over subtasks is taken of the sums."""
    trainer, checkpoints = run
    rows, original = {"pool": {}, "target": {}}, alignments.features_of

    def seen(context, rolled_out, log, moments=None):
        source = original(context, rolled_out, log, moments)
        kind = "target" if log.path.parent.name == "target-gradients" else "pool"
        rows[kind] = {row: source.rows(row) for row in source.lengths}
        assert moments is None or (kind, direction) == ("pool", "adam")
        return source

    for module in (alignments, of_target):
        monkeypatch.setattr(module, "features_of", seen)
    before = weights(trainer)
    settings = for_target(target_checkpoints=list(map(str, checkpoints)), gradient_direction=direction)
    selection = select_prompts(trainer, settings)
    assert_same_weights(before, weights(trainer))
    state = json.loads((checkpoints[1] / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"]]
    shares = [sum(rates[:2]) / sum(rates), sum(rates[2:]) / sum(rates)]
    assert list(selection.provenance["target"]["checkpoints"].values()) == pytest.approx(shares) and shares[0] > 0.6
    other, sums = trainer_in(tmp_path, loss_type="dapo"), {row: torch.zeros(2) for row in rows["pool"]}
    for checkpoint, share in zip(checkpoints, shares, strict=True):
        set_peft_model_state_dict(other.model, load_peft_weights(str(checkpoint)))
        parameters = [parameter for parameter in other.model.parameters() if parameter.requires_grad]
        means = [[], []]
        for row, own in rows["target"].items():
            gradient = gradient_of_training(other, own)
            means["ab".index(target_rows()[row]["task"])].append(gradient / gradient.norm())
        means = torch.stack([torch.stack(units).mean(0) for units in means])
        for row, own in rows["pool"].items():
            feature = gradient_of_training(other, own)
            if direction == "adam":
                feature = adams_step(parameters, torch.load(checkpoint / "optimizer.pt"), feature)
            sums[row] += share * torch.cosine_similarity(feature[None], means)
    table = table_of(selection)
    assert len(sums) >= 8
    for row, expected in sums.items():
        assert table.loc[row, "alignment"] == pytest.approx(expected.max().item(), abs=1e-4)
        assert table.loc[row, "score"] == table.loc[row, "learnability"] * table.loc[row, "alignment"]


def test_what_the_gradients_are_known_by(tmp_path, run, monkeypatch):
    """Another score takes none again; another state of Adam takes the pool's, and a checkpoint all."""
    trainer, checkpoints = run
    counted, collect = [], PromptGradients.collect
    monkeypatch.setattr(PromptGradients, "collect", lambda *args: (counted.append(1), collect(*args))[1])

    def taken(score, settings):
        counted.clear()
        settings = {"target_dataset": target_rows(), "projection_dim": 64} | settings
        selection = select_prompts(trainer, config(score=score, **settings))
        return len(counted), table_of(selection)["alignment"]

    adam, path = {"gradient_direction": "adam"}, shutil.copytree(checkpoints[0], tmp_path / "copy")
    (first, plain), (of_pool, ours) = taken("target", {}), taken("target", adam)
    assert 0 < of_pool < first and not ours.equals(plain)
    assert taken("target_alignment", adam)[0] == 0
    trainer.optimizer.optimizer.state[next(p for p in trainer.model.parameters() if p.requires_grad)]["exp_avg"] += 1
    again, changed = taken("target_alignment", adam)
    assert again == of_pool and not changed.equals(ours)
    with_checkpoint = {"target_checkpoints": [str(path)]}
    assert taken("target", with_checkpoint)[0] > of_pool and taken("target_alignment", with_checkpoint)[0] == 0
    shutil.copy(checkpoints[1] / "adapter_model.safetensors", path)
    assert taken("target", with_checkpoint)[0] > of_pool


def test_a_run_that_is_resumed_into_its_selection_makes_the_same(tmp_path):
    """With checkpoints of its own, one of which is the one that it is resumed from."""
    own = [str(tmp_path / f"checkpoint-{step}") for step in (1, 2)]
    choice = for_target(warmup_prompts=8, gradient_direction="adam", target_checkpoints=own)
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    trainer = trainer_in(tmp_path, config=choice, **changes)
    trainer.train()
    (path,) = (tmp_path / "learnalign").glob("step-*")
    first, trained = Selection.load(path), weights(trainer)
    assert path.name == "step-000002" and list(first.provenance["target"]["checkpoints"]) == own
    shutil.rmtree(tmp_path / "learnalign")
    resumed = trainer_in(tmp_path, config=choice, **changes)
    resumed.train(resume_from_checkpoint=own[1])
    assert Selection.load(path).scores.equals(first.scores)
    assert_same_weights(trained, weights(resumed))
    text, _ = plan_selection(resumed, choice)
    assert " prompts, at 2 checkpoints\n" in text


def test_a_dry_run_before_the_warmup_needs_no_state_of_adam(tmp_path):
    text, _ = plan_selection(trainer_in(tmp_path), for_target(warmup_prompts=8, gradient_direction="adam"))
    assert "gradients: about " in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": None}, "but the optimizer is not made yet. Train with `optim='adamw_torch'`"),
        ({"optimizer": torch.optim.AdamW}, "but the optimizer has taken no step yet"),
        ({"optimizer": torch.optim.RAdam}, "but the optimizer is a RAdam"),
        ({"peft": False}, "but the weights of this trainer are not those of an adapter"),
        ({"change": lambda path: shutil.rmtree(path)}, "but there is no such directory"),
        ({"change": lambda path: (path / "trainer_state.json").unlink()}, "not complete: trainer_state.json cannot"),
        ({"change": lambda path: (path / "adapter_model.safetensors").unlink()}, "and is missing there"),
        ({"peft": lora(r=2)}, r"has the shape \(2, 16\) here and \(4, 16\) there"),
        ({"change": lambda path: (path / "optimizer.pt").unlink()}, "but '.*optimizer.pt' is missing"),
        (
            {"change": lambda path: (path / "trainer_state.json").write_text('{"global_step": 2}')},
            "names no learning rate above 0 of the steps 1 to 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_generated(tmp_path, run, settings, message):
    path = shutil.copytree(run[1][0], tmp_path / "saved" / "checkpoint-2")
    trainer = trainer_in(tmp_path / "out", peft=settings.get("peft", True))
    if "change" in settings:
        settings["change"](path)
    if kind := settings.get("optimizer"):
        trainer.optimizer = kind([p for p in trainer.model.parameters() if p.requires_grad])
    choice = for_target(gradient_direction="adam", target_checkpoints=None if "optimizer" in settings else [str(path)])
    with pytest.raises(ValueError, match=message):
        select_prompts(trainer, choice)
