"""Texts for model and dataset cards."""

import re
from pathlib import Path

from ..selection.result import Selection


def dataset_card(selection: Selection, source: str) -> str:
    """
    Write a dataset card: what was chosen from `source`, how, and by what. Files and directories are named without the
    directories that they are in.
    """
    config = selection.provenance["config"] | {"target_dataset": None, "score": None}
    for name in ("target_dataset", "score"):
        value = selection.provenance["config"].get(name)
        config[name] = _public(value) if isinstance(value, str) else value
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in config.items())
    versions = ", ".join(f"{name} {number}" for name, number in selection.provenance["versions"].items())
    rollouts = selection.provenance["num_rollouts"]
    rate = f"of {rollouts} rollouts. Both are of that policy at that step. Select again"
    if "rollouts" not in selection.measures:
        rate = "which is null, as success was not measured. Scores that a policy gave are of that step: select again"
    return f"""# {len(selection.indices):,} prompts of {_stem(source)}, selected for reinforcement learning

{len(selection.indices):,} of {selection.scores.num_rows:,} prompts, chosen with trl-learnalign for
the policy `{_public(selection.provenance["model"])}`. {selection.summary()}.

Rows are as in the source, best first, with two added columns: `learnalign_score`, what they were ranked by, and
`success_rate`, {rate}
for another policy.

| setting | value |
| --- | --- |
{settings}

Seed {selection.provenance["seed"]}; {versions}.

The method: Li et al., *LearnAlign: Data Selection for LLM Reinforcement Learning with Improved Gradient Alignment*,
Findings of ACL 2026, [arXiv:2506.11480](https://arxiv.org/abs/2506.11480).
"""


def _public(name: str) -> str:
    """Shorten a path on this machine, or one with a function, to its last part; keep all else, such as a Hub id."""
    path = name.partition(".py:")[0] + ".py" if ".py:" in name else name
    of_hub = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path) and ".py:" not in name
    return name if of_hub and not Path(path).exists() else re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _stem(source: str) -> str:
    name = _public(source)
    return re.sub(r"(\.(jsonl|json|parquet|csv|gz))+$", "", name) or "rows"


def model_card(summaries: list[str]) -> str:
    """Write the section of a model card about the prompts of a training, with a line for each selection."""
    intro = "The prompts of this training were selected with trl-learnalign; `learnalign/` holds the scores of all."
    return _section(intro, summaries)


def online_model_card(lines: list[str]) -> str:
    """Write the section of a model card about the prompts of an online run."""
    intro = (
        "The prompts of this training were chosen online with trl-learnalign: each chunk by the learnability that the "
        "rewards of training so far predict. Choosing prompts changes the objective, and nothing corrects that. "
        "`learnalign/` holds the report."
    )
    return _section(intro, lines)


def _section(intro, lines):
    return _MODEL_CARD.format(intro=intro, lines="\n".join(f"- {line}" for line in lines))


_MODEL_CARD = """

## Prompts

{intro}

{lines}

```bibtex
@article{{li2025learnalign,
    title   = {{LearnAlign: Data Selection for LLM Reinforcement Learning with Improved Gradient Alignment}},
    author  = {{Li, Shipeng and Yang, Zhiqin and Li, Shikun and Xia, Xiaobo and Liu, Hengyu and Zhang, Xinghua and
               Chen, Gaode and Fang, Dong and Tai, Ying and Peng, Zhe}},
    journal = {{arXiv preprint arXiv:2506.11480}},
    year    = {{2025}},
}}
```
"""
