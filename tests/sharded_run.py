"""The engine on a model whose layers are `fully_shard`ed, on two processes, for test_gradients.py."""

import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from test_gradients import features_of, random_tasks
from tiny import lora, make_model, make_trainer
from torch import distributed
from torch.distributed.fsdp import fully_shard

from trl_learnalign.gradients.engine import PromptGradients


def objective(model, ids):
    logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])
    return (logps[..., 0] * torch.linspace(-1, 1, len(ids))[:, None]).sum()


def main(path):
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    ids = torch.randint(3, 20, (4, 9))  # other rows on each process
    counts = [[1, 3], [2, 2]][rank]

    def features(model):
        with PromptGradients(model, None, 0) as engine:
            return engine.collect(counts, ids.shape[1], lambda: objective(model, ids))

    torch.manual_seed(0)
    whole, model = (get_peft_model(make_model(), lora(init_lora_weights=True)) for _ in range(2))
    with torch.no_grad():
        for a, b in zip(whole.parameters(), model.parameters(), strict=True):
            if a.requires_grad:
                a.copy_(torch.randn(a.shape) * 0.1)
            b.copy_(a)
    expected = features(whole)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    ours = features(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.save((ours, expected), f"{path}/rank-{rank}.pt")

    # All features, of one microbatch on a process and of several on the other, the second time with some finished
    # before
    tasks = dict(list(random_tasks(8).items())[: [1, 8][rank]])
    # With a processor, whose tokenizer the filler rows need, and with entropies, which take forwards of their own
    trainer = make_trainer(f"{path}/plain", processor=True, top_entropy_quantile=0.5)
    expected = features_of(trainer, tasks, Path(path) / f"plain-{rank}", dim=256, max_tokens=30)
    for layer in trainer.model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    trainer.model_wrapped, trainer.is_fsdp_enabled = trainer.model, True
    ours = features_of(trainer, tasks, Path(path) / f"sharded-{rank}", dim=256, max_tokens=30)
    if rank:
        os.truncate(next((Path(path) / f"sharded-{rank}" / "log").glob("*.log")), 100)
    again = features_of(trainer, tasks, Path(path) / f"sharded-{rank}", dim=256, max_tokens=30)
    for index in tasks:
        torch.testing.assert_close(ours[index], expected[index], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(again[index], expected[index], rtol=1e-4, atol=1e-6)
    Path(path, f"pass-{rank}").write_text(str(trainer.accelerator.num_processes))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
