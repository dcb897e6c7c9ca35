"""The likelihood of the right answers: one forward of the policy over each prompt and its answer."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ..data.columns import candidate_rows, check_named, dataset_columns, row_index
from ..data.reading import read_prompts
from ..host import Host
from .base import Context, Finding, Measure
from .forwards import Forward, evaluating, in_rounds, prompt_ids, reason_against, tokens_at_once, windows_of
from .half_forward import last_logits


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


WINDOW = 256  # prompts that a process sorts by length, and keeps on disk when they are done
_LOGITS = 1 << 28  # most logits of a forward: the vocabulary may be large
_FEW, _PARTS = 1000, 25  # answers are checked together up to so many, or in so many parts
_SHOWN = 10  # rows that an error names


class Likelihood(Measure):
    """
    The likelihood s of the answer in `answer_column` after the prompt: exp of the mean log-probability of the answer's
    tokens, in (0, 1], at temperature 1. The prompt becomes tokens as in training, with the chat template and the
    generation prompt; the answer follows as plain text, without an end token.
    """

    name = "likelihood"
    columns: tuple[str, ...] = ("answer_likelihood",)

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """
        Raise a `ValueError` without `answer_column`, for a prompt that has no tokens before its rollouts, and for rows
        without an answer.
        """
        if config.answer_column is None:
            raise ValueError(
                "The score needs the right answers, but `answer_column` is not set. Name the column of the dataset "
                "that holds them."
            )
        if (reason := reason_against(host)) is not None:
            raise ValueError(
                f"The score needs the right answers after their prompts, but {reason}. Use `score='learnability'`, "
                "which generates instead."
            )
        check_named(host.dataset, "answer_column", config.answer_column, [config.answer_column])
        faults: dict[str, list[int]] = {}
        rows = candidate_rows(host.dataset, config)
        for part in windows_of(rows, max(_FEW, len(rows) // _PARTS)):
            for row, answer in zip(part, _column(host, config, part), strict=True):
                if (fault := _fault(answer)) is not None:
                    faults.setdefault(fault, []).append(row)
        if faults:
            named = (f"{fault}: row {', '.join(map(str, rows[:_SHOWN]))}" for fault, rows in faults.items())
            more = " and others" * any(len(rows) > _SHOWN for rows in faults.values())
            raise ValueError(
                f"`answer_column` is {config.answer_column!r}, but not every row has an answer "
                f"({'; '.join(named)}{more}). Correct these rows (counted from 0), or leave them out with "
                "`dataset.filter`."
            )

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return the column of the answers and the sizes of batches, on which the last digits depend."""
        return {
            "`answer_column`": context.config.answer_column,
            "sizes": [WINDOW, tokens_with_logits(context.host)],
            **super().key(context, rows),
        }

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Run the policy over every prompt with its answer, in batches of nearly equal length."""
        host = context.host

        def read(part):
            answers = answer_ids(host, context.config, part)
            pairs = zip(part, self.prompts(host, part), answers, strict=True)
            return [Answered(row, prompt, answer) for row, prompt, answer in pairs]

        started = time.perf_counter()
        with evaluating(host, "likelihoods", len(rows)) as bar:
            windows = windows_of(rows, WINDOW)
            forward = _AnswerForward(host, tokens_with_logits(host))
            means = in_rounds(host, context.peers, bar, log, forward, read, windows, np.float64)
        log.close()
        context.clock("likelihoods", started)
        found = {"answer_likelihood": np.exp(means[:, 0]), "answer_tokens": means[:, 1]}
        return Finding(self.table(context, pd.DataFrame(found, index=row_index(rows))))

    def table(self, context: Context, found: pd.DataFrame) -> pd.DataFrame:
        """Return the columns of this measure; `found` has `answer_likelihood` and `answer_tokens`."""
        return found[["answer_likelihood"]]

    def prompts(self, host: Host, rows: Sequence[int]) -> list[list[int]]:
        """Return the tokens that answers follow, as training makes them."""
        return prompt_ids(host, rows)


class LikelihoodAlone(Likelihood):
    """
    The likelihood s0 of the answer without the prompt, as [`Likelihood`] has it, and the bits that the prompt tells of
    the answer, log2 p(answer after the prompt) - log2 p(answer alone) (PVI, arXiv 2507.00038). Before the answer
    stands what training makes of a prompt without words: the chat template around empty messages, of which a system
    message stays, or the token that begins a text. An answer that is likely then can be guessed.
    """

    name = "likelihood_alone"
    requires = ("likelihood",)
    columns = ("answer_likelihood_alone", "prompt_information")

    def table(self, context: Context, found: pd.DataFrame) -> pd.DataFrame:
        """Return s0, and the bits that the prompt tells of the answer, log2 p(answer, prompt) - log2 p(answer)."""
        given = context.found["likelihood"].table
        assert given is not None  # it has a row for each prompt
        likely = given["answer_likelihood"]
        alone = found["answer_likelihood"]
        bits = found["answer_tokens"] * (np.log2(likely.reindex(found.index)) - np.log2(alone))
        return pd.DataFrame({"answer_likelihood_alone": alone, "prompt_information": bits})

    def prompts(self, host: Host, rows: Sequence[int]) -> list[list[int]]:
        """Return the tokens of prompts without words."""
        empty = [{"prompt": _emptied(prompt)} for prompt in read_prompts(host.dataset, rows)]
        start = host.tokenizer.bos_token_id
        start = host.tokenizer.eos_token_id if start is None else start
        return [tokens or [start] for tokens in host.prompt_ids(empty)]


def _emptied(prompt):
    if isinstance(prompt, str):
        return ""
    return [message if message["role"] == "system" else message | {"content": ""} for message in prompt]


def tokens_with_logits(host: Host) -> int:
    """Return the tokens of a forward at first, padding included, where the logits of many may be needed."""
    model: Any = host.model
    return max(1, min(tokens_at_once(host), _LOGITS // model.config.get_text_config().vocab_size))


def answer_ids(host: Host, config: "LearnAlignConfig", rows: Sequence[int]) -> list[list[int]]:
    """Return the tokens of the answers of rows, as they follow a prompt."""
    return host.text_ids([_text(answer) for answer in _column(host, config, rows)])


def _column(host, config, rows):
    name = config.answer_column
    return dataset_columns(host.dataset, rows, [name], as_stored=True)[name].tolist()


def _fault(answer) -> str | None:
    if answer is not None and not isinstance(answer, str | int | float):
        return "neither a text nor a number"
    if answer is None or answer != answer:
        return "missing"
    return None if _text(answer) else "empty"


def _text(answer) -> str:
    return answer.strip() if isinstance(answer, str) else str(answer)


@dataclass(frozen=True)
class Answered:
    """The tokens of a prompt and of its answer, which may have none."""

    row: int
    prompt: list[int]
    answer: list[int]

    def __len__(self):
        return len(self.prompt) + len(self.answer)


def answer_logits(host: Host, sequences: Sequence[Answered], model: nn.Module | None = None) -> Iterator[torch.Tensor]:
    """
    Run the policy, or another causal language model in its own precision, over prompts with their answers, with a head
    for the columns of the answers alone.

    Returns:
        of each sequence the logits of its answer's tokens and of the token after them, of shape
        `(tokens + 1, vocabulary)`, float32.
    """
    device = host.accelerator.device
    # Padded on the right, where causal attention keeps it out whatever a model makes of the mask
    input_ids = pad_sequence([torch.tensor(one.prompt + one.answer) for one in sequences], True).to(device)
    mask = torch.arange(input_ids.shape[1], device=device) < torch.tensor(
        [[len(one)] for one in sequences], device=device
    )
    keep = input_ids.shape[1] - min(len(one.prompt) for one in sequences) + 1
    whole: Any = host.model if model is None else model
    some = last_logits(whole, keep)
    run = host.policy if model is None else model
    with host.accelerator.autocast() if model is None else nullcontext():
        logits = run(input_ids=input_ids, attention_mask=mask.long(), use_cache=False, **some).logits
    first = input_ids.shape[1] - logits.shape[1]
    # One by one, so that the logits of one answer alone are in float32
    return (
        logits[place, len(one.prompt) - 1 - first : len(one) - first].float() for place, one in enumerate(sequences)
    )


class _AnswerForward(Forward):
    """Mean log-probabilities of answers, and the numbers of their tokens, of shape `(n, 2)`, float64."""

    def run(self, sequences):
        """Run the policy."""
        means = np.empty((len(sequences), 2))
        for place, (one, logits) in enumerate(zip(sequences, answer_logits(self.host, sequences), strict=True)):
            own, tokens = logits[:-1], torch.tensor(one.answer, device=logits.device)[:, None]
            mean = (own.gather(1, tokens)[:, 0] - own.logsumexp(1)).double().mean().item()
            means[place] = mean, len(one.answer)
        wrong = [one.row for one, mean in zip(sequences, means[:, 0], strict=True) if not np.isfinite(mean)]
        if wrong:
            raise ValueError(
                f"The likelihood of the answers of rows {wrong[:_SHOWN]} is not a number: the answer has no token, or "
                "the policy's numbers are not finite. Correct the answers, or train in another precision."
            )
        return means

    def filler(self):
        """Return a prompt and an answer of one token each."""
        row = self.host.filler()
        return Answered(-1, list(row.prompt_ids), list(row.completion_ids))
