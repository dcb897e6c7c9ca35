"""The judgement of a model on prompts: one forward over a question about each, answered by yes or no (Ask-LLM)."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..data.columns import row_index
from ..data.prompts import prompt_text
from ..data.reading import read_prompts
from ..host import Host
from .base import Context, Finding, Measure
from .forwards import Forward, chat_text, evaluating, in_rounds, most_tokens, reason_against, windows_of
from .likelihood import Answered, answer_logits, tokens_with_logits


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


WINDOW = 256  # prompts that a process sorts by length, and keeps on disk when they are done
# The prompt of the paper, page 4, with "training" for "pre-training", and with the last line for models that go on
QUESTION = (
    "###\n",
    "\n###\n\nDoes the previous paragraph demarcated within ### and ### contain informative signal for training a "
    "large-language model? An informative datapoint should be well-formatted, contain some usable knowledge of the "
    "world, and strictly NOT have any harmful, racist, sexist, etc. content.\n\nOPTIONS:\n- yes\n- no\n\nANSWER:",
)
_SHOWN = 10  # rows that an error names


class Ask(Measure):
    """
    The share of "yes" in a judge's answer to a question about the quality of a prompt: p(yes) / (p(yes) + p(no)), of
    the first tokens of yes, Yes, YES and of the same after a space, in [0, 1] (Ask-LLM, arXiv 2402.09668, which takes
    p(yes)). The judge is the policy or `judge_model`, asked through its chat template if it has one. Prompts that make
    the question longer than the judge's context are left out.
    """

    name = "ask"
    columns: tuple[str, ...] = ("ask_yes",)

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """
        Raise a `ValueError` for a prompt that is not known before its rollouts, for a judge without configuration or
        tokenizer, and for one that cannot say yes or no.
        """
        if (reason := reason_against(host)) is not None:
            raise ValueError(
                f"The score asks a judge about each prompt, but {reason}. Use a score that needs rollouts alone."
            )
        _context_of(host, config)
        _options(_tokenizer(host, config), config)

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return what tells the judge from others, and the sizes of batches, on which the last digits depend."""
        return {
            "judge": _identity(context.config.judge_model),
            "sizes": [WINDOW, tokens_with_logits(context.host)],
            **super().key(context, rows),
        }

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Ask the judge about every prompt."""
        host, config, started = context.host, context.config, time.perf_counter()
        tokenizer, most = _tokenizer(host, config), _context_of(host, config)

        def read(part):
            texts = [prompt_text(prompt).join(QUESTION) for prompt in read_prompts(host.dataset, part)]
            if tokenizer.chat_template:
                texts = [chat_text(tokenizer, [{"role": "user", "content": text}]) for text in texts]
            asked = tokenizer(texts, add_special_tokens=not tokenizer.chat_template)["input_ids"]
            pairs = zip(part, asked, strict=True)
            return [Answered(row, ids, []) if len(ids) <= most else _LEFT_OUT for row, ids in pairs]

        with evaluating(host, "judgements", len(rows)) as bar:
            forward = _AskForward(host, config.judge_model, _options(tokenizer, config))
            shares = in_rounds(host, context.peers, bar, log, forward, read, windows_of(rows, WINDOW), np.float64)
        log.close()
        context.clock("judgements", started)
        return Finding(pd.DataFrame({"ask_yes": shares[:, 0]}, index=row_index(rows)).dropna())


_LEFT_OUT = Answered(-1, [0], [])


class _AskForward(Forward):
    """Shares of "yes", of shape `(n, 1)`, float64. The judge is loaded at the first forward."""

    def __init__(self, host, name, options):
        super().__init__(host, tokens_with_logits(host))
        self._name, self._options, self._judge = name, options, None

    def run(self, sequences):
        """Run the judge."""
        device = self.host.accelerator.device
        if self._name is not None and self._judge is None:
            loaded: Any = _loaded(AutoModelForCausalLM, self._name, dtype="auto")
            self._judge = loaded.to(device).eval()
        yes, no = (torch.tensor(tokens, device=device) for tokens in self._options)
        found = np.empty((len(sequences), 1))
        for place, logits in enumerate(answer_logits(self.host, sequences, self._judge)):
            last = logits[-1].double()
            found[place] = (last[yes].logsumexp(0) - last[no].logsumexp(0)).sigmoid().item()
        wrong = [one.row for one, share in zip(sequences, found[:, 0], strict=True) if not np.isfinite(share)]
        if wrong:
            raise ValueError(
                f"The judge's answers about rows {wrong[:_SHOWN]} are not numbers: its numbers are not finite. Use "
                "another `judge_model`, or train in another precision."
            )
        found[[one is _LEFT_OUT for one in sequences]] = np.nan
        return found

    def filler(self):
        """Return a question of one token."""
        return _LEFT_OUT


def _tokenizer(host, config) -> Any:
    return host.tokenizer if config.judge_model is None else _loaded(AutoTokenizer, config.judge_model)


def _context_of(host, config) -> float:
    judge = config.judge_model
    return most_tokens(host.model.config if judge is None else _loaded(AutoConfig, judge))


def _options(tokenizer, config) -> tuple[list[int], list[int]]:
    """Return the first tokens of yes and those of no, in several spellings, without those that both have."""
    first = [
        {
            ids[0]
            for text in (word, word.title(), word.upper())
            for ids in tokenizer([text, f" {text}"], add_special_tokens=False)["input_ids"]
            if ids and ids[0] != tokenizer.unk_token_id
        }
        for word in ("yes", "no")
    ]
    yes, no = sorted(first[0] - first[1]), sorted(first[1] - first[0])
    if not yes or not no:
        raise ValueError(
            f"`judge_model` is {config.judge_model!r}, and the judge's tokenizer has no tokens that yes and no begin "
            "with, so it cannot answer. Use another `judge_model`."
        )
    return yes, no


def _loaded(kind, name, **settings):
    """Load a part of the judge by a class of transformers."""
    try:
        return kind.from_pretrained(name, **settings)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"`judge_model` is {name!r}, which cannot be loaded ({type(error).__name__}: {reason}). Name a causal "
            "language model and its tokenizer, by a path or as on the Hub."
        ) from error


def _identity(name):
    """Return the judge's revision on the Hub, or the sizes and times of its files."""
    if name is None:
        return None
    if (commit := getattr(_loaded(AutoConfig, name), "_commit_hash", None)) is not None:
        return [name, commit]
    files = [(path.name, path.stat()) for path in sorted(Path(name).iterdir())]
    return [name, [[file, state.st_size, state.st_mtime_ns] for file, state in files]]
