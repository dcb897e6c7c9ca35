"""The worth of prompts as worked examples of others: greedy answers in context, and attention (Data Whisperer)."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from ..choice.candidates import left_of
from ..data.columns import candidate_rows, row_index
from ..data.prompts import prompt_text
from ..data.reading import read_prompts
from ..ground.hashing import stable_hash
from ..host import Host
from .base import Context, Finding
from .forwards import MOST_SHARDED, Forward, chat_text, evaluating, in_rounds, most_tokens, windows_of
from .half_forward import base_of, layers_of
from .likelihood import Answered, Likelihood, answer_ids, answer_logits, tokens_with_logits


if TYPE_CHECKING:
    from ..config import LearnAlignConfig


EXAMPLES = 5  # of a context, as in the code of the paper
QUERIES = 2  # contexts with the same examples
PASSES = 3  # times that each prompt is one of the examples of a draw
WINDOW = 64  # contexts that a process sorts by length, and keeps on disk when they are done
_MARK = "\ue000"  # stands for the content of a message in a chat template
_BETWEEN = "\n\n"  # follows an answer where prompts are texts


class Demonstration(Likelihood):
    """
    The worth of a prompt and its answer as a worked example: the mean, over the contexts that it is an example in, of
    c w, with c = 1 if the policy's greedy answer to the query after the examples is the right one, else 0, and w the
    example's share of the attention that the query pays to the examples (Data Whisperer, arXiv 2505.12212, as its code
    has it). The attention to an example is that of one layer in the middle, summed over the heads, and the mean over
    the tokens of the query and of the example.

    The pool is drawn in random order `PASSES` times. Each `EXAMPLES` prompts are the examples of `QUERIES` contexts,
    with one of the prompts after them as the query. One forward over a context with the right answer tells whether
    greedy decoding would write it: each of its tokens, and then the end, must be the likeliest one.
    """

    name = "demonstration"
    columns: tuple[str, ...] = ("demonstration_value",)
    forwards = round(PASSES * QUERIES * (1 + 1 / EXAMPLES))

    def check(self, host: Host, config: "LearnAlignConfig") -> None:
        """Raise a `ValueError` for what [`Likelihood`] refuses, for a small pool, and for a model without layers."""
        super().check(host, config)
        size = left_of(config, len(candidate_rows(host.dataset, config)))
        if size < EXAMPLES + QUERIES:
            raise ValueError(
                f"The pool has {size} prompts, but the score needs {EXAMPLES + QUERIES}: worked examples and queries "
                "after them. Add prompts, or use another score."
            )
        if not layers_of(host.model)[1]:
            raise ValueError(f"The score needs attention weights, but {_hidden(host)}.")

    def key(self, context: Context, rows: Sequence[int]) -> dict[str, Any]:
        """Return the column of the answers, the seed of the draws, and all sizes."""
        sizes = [EXAMPLES, QUERIES, PASSES, WINDOW, _tokens(context.host)]
        return {**super().key(context, rows), "seed": context.seed, "sizes": sizes}

    def run(self, context: Context, rows: Sequence[int], log: Any) -> Finding:
        """Run the policy over all contexts, with the weights of one layer's attention."""
        host, started = context.host, time.perf_counter()
        drawn = draw_contexts(np.array(rows), context.seed)
        written = _Contexts(host, context.config, rows, drawn)
        windows = windows_of(range(len(drawn)), WINDOW)
        with evaluating(host, "demonstrations", len(drawn)) as bar, _attention(host) as weights:
            forward = _ContextForward(host, weights)
            found = in_rounds(
                *(host, context.peers, bar, log, forward, lambda part: [written.context(i) for i in part]),
                *(windows, np.float64),
            )
        log.close()
        context.clock("demonstrations", started)
        places = np.searchsorted(rows, drawn[:, :-1]).ravel()
        total = np.bincount(places, (found[:, :1] * found[:, 1:]).ravel(), len(rows))
        values = total / np.bincount(places, minlength=len(rows))
        return Finding(pd.DataFrame({"demonstration_value": values}, index=row_index(rows)))


def draw_contexts(rows: np.ndarray, seed: int) -> np.ndarray:
    """
    Draw the rows of contexts from a pool of n rows, at least `EXAMPLES + QUERIES`: an array of shape
    `(contexts, EXAMPLES + 1)`, with the query last. A row is an example of `PASSES` draws or a few more.
    """
    generator = np.random.Generator(np.random.Philox(stable_hash(seed, "demonstrations")))
    found = []
    for _ in range(PASSES):
        order = generator.permutation(rows)
        draws = np.arange(0, len(rows), EXAMPLES)[:, None] + np.arange(EXAMPLES + QUERIES)
        taken = order[draws % len(rows)]
        found += [taken[:, [*range(EXAMPLES), EXAMPLES + query]] for query in range(QUERIES)]
    return np.concatenate(found)


@dataclass(frozen=True)
class _Drawn(Answered):
    """
    A context with the right answer to its query.

    Attributes:
        spans: first token of each example, and the one after its last.
        ends: tokens that end an answer.
    """

    spans: list[tuple[int, int]]
    ends: set[int]


class _Contexts:
    """
    Contexts as tokens: messages through the chat template, one example after another as turns, with the system message
    of the query; or texts with an empty line after each answer.
    """

    def __init__(self, host, config, rows, drawn):
        self._host, self._drawn = host, drawn
        tokenizer = host.tokenizer
        # A processor may have the chat template
        self._template = tokenizer if tokenizer.chat_template else host.trainer.processing_class
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and host.tokenize(["a"])[0][:1] == [bos] else []
        policy: Any = host.model
        generation = getattr(policy, "generation_config", None)
        ends = getattr(generation, "eos_token_id", None)
        self._eos = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        prompts = read_prompts(host.dataset, rows)
        # Of each prompt its roles and the tokens of its messages; a text has no role
        texts = [[prompt] if isinstance(prompt, str) else [prompt_text([one]) for one in prompt] for prompt in prompts]
        roles = [[""] if isinstance(prompt, str) else [one["role"] for one in prompt] for prompt in prompts]
        self._turns = {
            row: list(zip(own, host.text_ids(parts), strict=True))
            for row, own, parts in zip(rows, roles, texts, strict=True)
        }
        self._answers = dict(zip(rows, answer_ids(host, config, rows), strict=True))
        self._between = cache(self._made_between)
        self._check()

    def context(self, number: int) -> _Drawn:
        """Write a context of the draw."""
        *examples, query = self._drawn[number].tolist()
        parts = [(role, ids, -1) for role, ids in self._turns[query] if role == "system"]
        for place, row in enumerate(examples):
            parts += [(role, ids, place) for role, ids in self._turns[row] if role != "system"]
            parts.append(("assistant", self._answers[row], place))
        parts += [(role, ids, -1) for role, ids in self._turns[query] if role != "system"]
        between = self._between(tuple(role for role, _, _ in parts))
        tokens, ends = list(between[0]), set(self._eos)
        spans: dict[int, tuple[int, int]] = {}
        for (_, ids, place), after in zip(parts, between[1:], strict=True):
            begin = len(tokens)
            tokens += ids
            if place >= 0:
                spans[place] = (spans.get(place, (begin,))[0], len(tokens))
            tokens += after
        # What follows the answers of examples ends that to the query as well
        ends |= {tokens[end] for _, end in spans.values()}
        return _Drawn(query, tokens, self._answers[query], [spans[place] for place in range(len(examples))], ends)

    def _made_between(self, roles):
        """Return the tokens before, between and after the messages of a context."""
        if "" in roles:
            return [self._start, *self._host.text_ids([_BETWEEN if role == "assistant" else "" for role in roles])]
        pieces = chat_text(self._template, [{"role": role, "content": _MARK} for role in roles]).split(_MARK)
        if len(pieces) != len(roles) + 1:
            raise ValueError(
                "The chat template does not write each message once, so worked examples cannot be told apart "
                f"(messages: {', '.join(roles)}). Use another score, or another template."
            )
        return self._host.text_ids(pieces)

    def _check(self):
        """Refuse contexts that the policy cannot read."""
        most = most_tokens(self._host.model.config)
        lengths = [len(self.context(number)) for number in range(len(self._drawn))]
        longest = max(lengths)
        if longest > most:
            rows = self._drawn[int(np.argmax(lengths))].tolist()
            raise ValueError(
                f"{EXAMPLES} worked examples and a query with its answer take up to {longest:,} tokens (rows "
                f"{', '.join(map(str, rows))}), but the policy's context has {most:,}. Leave out the longest prompts "
                "(`where`, or `dataset.filter`), or use another score."
            )


class _ContextForward(Forward):
    """Right greedy answers, 0 or 1, and each example's share of the attention: `(n, 1 + EXAMPLES)`, float64."""

    remedy = "Leave out the longest prompts (`where`), or use another score."

    def __init__(self, host, weights):
        super().__init__(host, _tokens(host))
        self._weights = weights

    def run(self, sequences):
        """Run the policy."""
        found = np.empty((len(sequences), 1 + EXAMPLES))
        self._weights.clear()
        logits = answer_logits(self.host, sequences)
        if not self._weights:
            raise ValueError(f"The score needs attention weights, but {_hidden(self.host)}.")
        for place, (one, own) in enumerate(zip(sequences, logits, strict=True)):
            *likeliest, last = own.argmax(1).tolist()
            query = slice(one.spans[-1][1], len(one.prompt))
            to = self._weights[-1][place, :, query].float().sum(0).mean(0)
            attention = torch.stack([to[begin:end].mean() for begin, end in one.spans]).double()
            found[place, 0] = likeliest == one.answer and last in one.ends
            found[place, 1:] = (attention / attention.sum()).tolist()
        self._weights.clear()
        if not np.isfinite(found).all():
            raise ValueError(
                "The policy's attention to worked examples is not a number: its numbers are not finite, or the layer "
                "does not see the examples. Train in another precision, or use another score."
            )
        return found

    def filler(self):
        """Return the shortest context: each example is its only token."""
        token = list(self.host.filler().prompt_ids)
        return _Drawn(-1, token * 2, token, [(0, 1)] * EXAMPLES, set())


@contextmanager
def _attention(host: Host) -> Iterator[list[torch.Tensor]]:
    """
    Give a list, to which every forward of the policy appends the attention weights of a layer in the middle, of shape
    `(rows, heads, tokens, tokens)`. Meanwhile attention is computed by plain products, which alone have weights.
    """
    base: Any = host.model
    base = base_of(base)
    config, layers = base.config, layers_of(base)[1]
    kinds = getattr(config.get_text_config(), "layer_types", None) or ["full_attention"] * len(layers)
    whole = [place for place, kind in enumerate(kinds) if kind == "full_attention"] or range(len(layers))
    layer: nn.Module = layers[min(whole, key=lambda place: abs(place - len(layers) // 2))]
    weights: list[torch.Tensor] = []

    def note(module, args, output):
        if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
            weights.append(output[1])

    before = {"": config._attn_implementation} | {
        name: part._attn_implementation
        for name in config.sub_configs
        if (part := getattr(config, name, None)) is not None
    }
    hooks = [part.register_forward_hook(note) for part in layer.modules()]
    try:
        base.set_attn_implementation("eager")
        yield weights
    finally:
        for hook in hooks:
            hook.remove()
        base.set_attn_implementation(before)


def _hidden(host) -> str:
    return f"a {type(host.model).__name__} does not show them. Use another score, such as 'confidence'"


def _tokens(host):
    return min(tokens_with_logits(host), MOST_SHARDED)  # the attention of several contexts must fit as well
