"""Generation in halves where memory is full."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.utils.rnn import pad_sequence

from ..ground.memory import attempt
from ..ground.randomness import random_state, set_random_state
from .generation import replaced


logger = logging.getLogger(__name__)


class Halving:
    """
    Limit on the rows that a model generates at once: no more than fit into the memory of this process. A limit that
    was found stays for later calls.

    Attributes:
        rows (`float`): the most rows that may fit.
    """

    def __init__(self):
        self.rows = math.inf

    @contextmanager
    def __call__(self, host) -> Iterator[None]:
        """
        Let the policy's `generate` take its rows in parts that fit while the context is open. It is a local operation,
        so other processes need not know.
        """
        original = host.model.generate

        def generate(*args, **inputs):
            # A user's own call, and images, which are not a row each, are left alone
            if args or set(inputs) != {*_BY_ROW, "generation_config"}:
                return original(*args, **inputs)
            return self._generate(original, inputs, not host.is_sharded)

        with replaced(host.model, generate=generate):
            yield

    def _generate(self, original, inputs, parts):
        """
        Generate in one call, or, if the call may be cut into `parts`, in several. Random numbers that a failed call
        drew are drawn again.

        Raises:
            `MemoryError`: not even one row fits, or the weights are sharded, so that others take part in the call.
        """
        size = len(inputs["input_ids"])
        if size > self.rows and parts:
            return self._in_parts(original, inputs)
        state = random_state()

        def refuse(error):
            return MemoryError(
                f"{size} rollouts at once do not fit into the memory ({error}). Lower `rollout_batch_prompts` or "
                "`max_completion_length`, or generate with vLLM."
            )

        found = attempt(lambda: original(**inputs), refuse if size == 1 or not parts else None)
        if found is not None:
            return found
        self.rows = size // 2
        logger.warning(
            f"{size} rollouts at once do not fit into the memory, so they are generated in halves. Lower "
            "`rollout_batch_prompts` to avoid the retry."
        )
        set_random_state(state)
        return self._in_parts(original, inputs)

    def _in_parts(self, original, inputs):
        sequences, start, size = [], 0, len(inputs["input_ids"])
        while start < size:
            end = min(size, start + int(self.rows))  # fewer once a part did not fit
            part = {name: value[start:end] if name in _BY_ROW else value for name, value in inputs.items()}
            sequences += self._generate(original, part, True)
            start = end
        # Rows of a shorter part have all ended, so what follows is not looked at
        return pad_sequence(sequences, batch_first=True, padding_value=inputs["generation_config"].pad_token_id)


_BY_ROW = {"input_ids", "attention_mask"}
