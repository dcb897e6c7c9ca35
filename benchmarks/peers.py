"""
Ways to the LoRA gradients of every prompt of a microbatch: this package's, and what people would use instead.

A way is a function of (trainer, groups, arguments) that returns a function of nothing, which returns features of shape
(P, d), float32.
"""

import torch
from datasets import Dataset
from policies import GROUP

from trl_learnalign.gradients.engine import PromptGradients
from trl_learnalign.host.objective import policy_objective


LESS_DIM, BERGSON_SIDE, DIM = 8192, 16, 32768


def flat_gradient(model):
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


def plain_way(trainer, groups, arguments):
    rows = [row for group in groups for row in group]

    def run():
        policy_objective(trainer, rows).backward()
        trainer.model.zero_grad()

    return run


def our_way(dim):
    def build(trainer, groups, arguments):
        engine = PromptGradients(trainer.model, dim, 0)
        rows, counts = [row for group in groups for row in group], [len(group) for group in groups]

        def run():
            with engine:
                return engine.collect(counts, arguments.tokens, lambda: policy_objective(trainer, rows))

        return run

    return build


def loop_way(trainer, groups, arguments):
    def run():
        features = []
        for group in groups:
            policy_objective(trainer, group).backward()
            features.append(flat_gradient(trainer.model))
            trainer.model.zero_grad()
        return torch.stack(features)

    return run


def less_way(trainer, groups, arguments):
    """A backward per prompt, then a dense random projection, which LESS makes anew for every 16 gradients."""
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    device = trainer.accelerator.device
    projector = BasicProjector(size, LESS_DIM, 0, ProjectionType.rademacher, device, block_size=128)
    gradients = loop_way(trainer, groups, arguments)

    def run():
        return torch.cat([projector.project(part, model_id=0) for part in gradients().split(16)])

    return run


def vmap_way(trainer, groups, arguments):
    """With an objective of its own, as TRL's cannot be mapped."""
    model, device, start = trainer.model, trainer.accelerator.device, arguments.tokens // 4
    ids = torch.tensor([[[*row.prompt_ids, *row.completion_ids] for row in group] for group in groups], device=device)
    factors = [[row.advantage * row.weight / len(row.completion_ids) for row in group] for group in groups]
    factors = torch.tensor(factors, device=device)[..., None]
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    positions = torch.arange(arguments.tokens, device=ids.device)[None]
    causal = torch.full((arguments.tokens, arguments.tokens), -1e9, device=ids.device).triu(1)[None, None]
    causal = causal.to(arguments.dtype)

    def objective(parameters, ids, factors):
        output = torch.func.functional_call(
            model, parameters, (ids,), {"attention_mask": causal, "position_ids": positions, "use_cache": False}
        )
        logps = output.logits[:, start - 1 : -1].float() / trainer.temperature
        logps = logps.log_softmax(-1).gather(2, ids[:, start:, None])[..., 0]
        return (factors * logps).sum()

    per_prompt = torch.func.vmap(torch.func.grad(objective), in_dims=(None, 0, 0))

    def run():
        gradients = per_prompt(trained, ids, factors)
        return torch.cat([gradients[name].flatten(1).float() for name in trained], 1)

    return run


def opacus_way(trainer, groups, arguments):
    """Its gradients are per row; the rows of a prompt are added."""
    from opacus.grad_sample import GradSampleModule

    rows = [row for group in groups for row in group]
    trained = [p for p in trainer.model.parameters() if p.requires_grad]

    def run():
        wrapped = GradSampleModule(trainer.model, strict=False, loss_reduction="sum")
        policy_objective(trainer, rows).backward()
        parts = [p.grad_sample.view(len(groups), GROUP, -1).sum(1).float() for p in trained]
        for p in trained:
            p.grad = p.grad_sample = None
        wrapped.to_standard_module()
        return torch.cat(parts, 1)

    return run


def bergson_way(dim, target):
    """Its gradients are per row; the rows of a prompt are added, which its linear projections allow."""

    def build(trainer, groups, arguments):
        from bergson.collector.gradient_collectors import GradientCollector
        from bergson.config import IndexConfig
        from bergson.gradients import GradientProcessor

        model = trainer.model
        rows = [row for group in groups for row in group]
        names = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.requires_grad]
        collector = GradientCollector(
            model=model.base_model.model,
            data=Dataset.from_dict({"input_ids": [[0]] * len(rows)}),
            cfg=IndexConfig(run_path=arguments.scratch),
            processor=GradientProcessor(projection_dim=dim, projection_target=target),
            target_modules={name.removeprefix("base_model.model.") for name in names},
            skip_index=True,
        )

        def run():
            with collector:
                policy_objective(trainer, rows).backward()
                collector.finalize_global_projection()
                parts = list(collector.mod_grads.values())
                if dim is None:
                    order = [name.removeprefix("base_model.model.") for name in names]
                    parts = [collector.mod_grads[name] for name in order]
                collector.mod_grads.clear()
            model.zero_grad()
            return torch.cat([part.view(len(groups), GROUP, -1).sum(1).float() for part in parts], 1)

        return run

    return build


OURS = {f"learnalign, d = {DIM:,}": our_way(DIM), "learnalign, exact": our_way(None)}
PEERS = {
    "loop, exact": loop_way,
    f"loop and dense projection as in LESS (traker), d = {LESS_DIM:,}": less_way,
    "torch.func.vmap, exact": vmap_way,
    "opacus, exact": opacus_way,
    "bergson, exact": bergson_way(None, "per_module"),
    f"bergson, per module {BERGSON_SIDE} x {BERGSON_SIDE}": bergson_way(BERGSON_SIDE, "per_module"),
    f"bergson, global, d = {DIM:,}": bergson_way(DIM, "global"),
}
