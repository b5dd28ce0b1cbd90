"""The model in memory as lm-eval asks it."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor

from qfbench.errors import UserError
from qfbench.models.lm import LanguageModel

LOGITS = 2**31  # bytes that the logits of one batch may take, in float32


def live(lm: LanguageModel, chat: bool = False) -> Any:
    """The model in memory as lm-eval asks it, but for what costs much and changes no number, and one token in a `chat`."""
    from copy import deepcopy

    from lm_eval.models.huggingface import HFLM

    class Live(HFLM):
        tail = 0  # the tokens of the longest answer

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> Any:
            for request in requests:
                context, how = request.args
                room = int(how.get("max_gen_toks", self.max_gen_toks))
                self._check_length(len(self.tok_encode(context)) + room, f"with room for {room} tokens of a reply")
            with greedy(lm.model):
                return super().generate_until(requests, disable_tqdm=True)

        def _check_length(self, tokens: int, what: str) -> None:
            # lm-eval cuts what is too long at the left, and says so where nobody reads it.
            if tokens > self.max_length:
                raise UserError(
                    f"a question (regression) has {tokens} tokens {what}, and {lm.name} has {self.max_length} positions; "
                    "show fewer examples (shots), or leave the task out"
                )

        def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> Any:
            self.tail = max(len(answer) for _, _, answer in requests)
            self._check_length(max(len(before) + len(answer) - 1 for _, before, answer in requests), "with its answer")
            inputs = {(*before, *answer[:-1]) for _, before, answer in requests}  # those that agree are run once
            lengths = sorted(map(len, inputs), reverse=True)
            self.batch_size_per_gpu = fitting(lengths, self.tail, len(lm.tokenizer), lm.batch_size)
            return super()._loglikelihood_tokens(requests, **options)

        def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
            # Logits of all positions of a long prompt over a large vocabulary would cost more than the model itself. lm-eval
            # counts positions from the end of what is returned. It pads with 0 at the right, which may also be a token: the
            # shortest input is at least as long as this.
            places = torch.arange(1, inps.shape[1] + 1, device=inps.device)
            shortest = int(((inps != 0) * places).amax(1).min())
            return lm.logits([tuple(row) for row in inps.tolist()], max(0, shortest - self.tail))

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            # lm-eval scores the white space that a prompt ends with as part of the answer: in a dialogue that is the template's own
            # line break, which no model was taught to expect.
            whole, before = self.tok_encode(context + continuation), self.tok_encode(context)
            if chat and whole[: len(before)] == before:
                return before, whole[len(before) :]
            pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
            return pair

    # A tokenizer without a padding token is given one.
    tokenizer = lm.tokenizer if lm.tokenizer.pad_token_id is not None else deepcopy(lm.tokenizer)
    with quiet():
        return Live(pretrained=lm.model, tokenizer=tokenizer, backend="causal", batch_size=lm.batch_size)


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Without the model's own settings of generation (penalties, sampling, forced or forbidden tokens ...), but for the tokens
    that end a text: `LanguageModel.answer` knows none of them, and no hash of a run holds them."""
    from transformers import GenerationConfig

    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        yield
    finally:
        model.generation_config = own


def fitting(lengths: Sequence[int], tail: int, vocabulary: int, most: int) -> int:
    """How many requests of these `lengths` (in tokens, longest first) fit in one batch, if logits from the shortest one's answer on
    are to stay within `LOGITS`."""
    batch = most
    while batch > 1:
        spread = max(
            (a - b for a, b in zip(lengths, lengths[batch - 1 :], strict=False)), default=lengths[0] - lengths[-1]
        )
        if 4 * vocabulary * min(batch, len(lengths)) * (spread + tail) <= LOGITS:
            break
        batch //= 2
    return max(1, batch)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and warnings of lm-eval."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
