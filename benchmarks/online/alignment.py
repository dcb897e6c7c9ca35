"""
Do features of prompts tell which prompts' gradients are aligned with the mean, so that alignments of the prompts that
training has just seen could be shared with others?

    python benchmarks/online/alignment.py --dataset_path DIR

Alignments are those of the selections of docs/evidence.md (benchmarks/results/evidence/scores.parquet), features those
that an online run computes, of the first policy and of one that was warmed up in the same way. A ridge regression is
fitted to the alignments of some learnable prompts and judged on all others. Writes
benchmarks/results/online_alignment.json.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow.parquet as pq
from harness import DATASET, RESULTS, options, report
from pools import make_pool, make_task
from run import Recorder, build_trainer, warm_up

from trl_learnalign import LearnAlignConfig
from trl_learnalign.ground.peers import Peers
from trl_learnalign.host import find_host
from trl_learnalign.measures.hidden_states import hidden_states
from trl_learnalign.schedules.prompt_features import whole_features


SEED, DRAWS, SEEN, RIDGES = 0, 3, (300, 1000, 3000), (3, 10, 30, 100)


def features(task, rows, adapter) -> np.ndarray:
    """What an online run knows of each prompt at its start, shape (N, D)."""
    with TemporaryDirectory() as folder:
        trainer = build_trainer("uniform", task, adapter, rows, Recorder(task.reward), 1, SEED, folder, 1e-3, [])
        host = find_host(trainer)
        with Peers(trainer.accelerator) as peers:
            hidden = hidden_states(host, Path(folder) / "learnalign", peers)
        found, _ = whole_features(host.dataset, LearnAlignConfig(schedule="online"), hidden)
    return found.astype(np.float64)


def explained(x, alignments, seen, others, ridge) -> float:
    """R^2 on the other prompts."""
    precision = ridge * np.diag(np.arange(x.shape[1]) > 0)  # the constant is free
    weights = np.linalg.solve(x[seen].T @ x[seen] + precision, x[seen].T @ alignments[seen])
    errors = alignments[others] - x[others] @ weights
    return 1 - (errors**2).sum() / ((alignments[others] - alignments[seen].mean()) ** 2).sum()


def main():
    arguments = options(__doc__, dataset_path=DATASET, output_dir=(Path("runs/online"), "of the warmed-up policy"))
    if arguments.dataset_path is None:
        sys.exit("Say where GSM8K is, whose prompts were scored: --dataset_path DIR.")
    task = make_task("clean", arguments.dataset_path, arguments.output_dir)
    rows = make_pool("clean", arguments.dataset_path).rows
    rows = rows.add_column("row", list(range(len(rows))))
    scores = pq.read_table(RESULTS / "evidence" / "scores.parquet").to_pandas()
    result = {}
    for name, adapter in (("first policy", None), ("after the warm-up", warm_up(SEED, task, rows, arguments))):
        x = features(task, rows, adapter)
        own, other = (
            scores[(scores["cold"] == (adapter is None)) & (scores["seed"] == seed)]
            .set_index("index")["alignment"]
            .reindex(range(len(rows)))
            .to_numpy()
            for seed in (SEED, SEED + 1)
        )
        known, both = np.flatnonzero(np.isfinite(own)), np.isfinite(own) & np.isfinite(other)
        random = np.random.default_rng(0)
        draws = [random.permutation(known) for _ in range(DRAWS)]
        result[name] = {
            "learnable": len(known),
            "other_seed": float(np.corrcoef(own[both], other[both])[0, 1]),
            "explained": {
                str(seen): float(
                    max(np.mean([explained(x, own, d[:seen], d[seen:], ridge) for d in draws]) for ridge in RIDGES)
                )
                for seen in SEEN
            },
        }
    report(RESULTS / "online_alignment.json", result)


if __name__ == "__main__":
    main()
