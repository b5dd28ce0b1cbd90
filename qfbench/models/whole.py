"""Greedy replies and scores by plain forward passes of the whole model: for models that `suffix` does not cut, and to test it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from qfbench.models.cut import cache_argument
from qfbench.models.tree import Answer, Ending, Question, Tokens, walk


class Whole:
    """Answers as `Suffix` gives them, by one teacher-forced pass for rated replies and one pass for each token of a reply."""

    def __init__(self, model: Any, ending: Ending, rows: list[int] | None = None):
        self.model, self.ending = model, ending
        self.rows = [] if rows is None else rows  # as in `Suffix`

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to one batch, in order.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        pairs = [(q.prompt, reply) for q in questions for reply in q.rated]
        self.rows[:] = [q.change for q in questions for _ in q.rated]
        scores = iter(self._rate(pairs) if pairs else [])
        rated = [[next(scores) for _ in q.rated] for q in questions]
        said: list[tuple[Tokens, bool]] = [((), False)] * len(questions)
        rest = []
        for i, q in enumerate(questions):
            if not q.reply:
                continue
            # A reply all of whose tokens are likeliest is what decoding would say.
            exact = next((reply for reply, (_, hit) in zip(q.rated, rated[i], strict=True) if all(hit)), None)
            path, ended = walk([exact[:1], exact], [exact[:-1]], self.ending) if exact else ([], None)
            if ended is None:
                rest.append(i)
            else:
                said[i] = tuple(path), ended
        if rest:
            self.rows[:] = [questions[i].change for i in rest]
            for i, reply in zip(rest, self._decode([questions[i].prompt for i in rest]), strict=True):
                said[i] = reply
        return [Answer(r, *s) for r, s in zip(rated, said, strict=True)]

    def _rate(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[tuple[list[float], list[bool]]]:
        ids, _ = padded([prompt + reply for prompt, reply in pairs], "right", self.model.device)
        first = min(len(prompt) for prompt, _ in pairs) - 1
        kept = list(range(first, ids.shape[1] - 1))  # no tensor: the head may be on another device
        # Padding stands at the right of causal attention: no mask is needed.
        logits = _finite(self.model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits).float()
        out = []
        for row, (prompt, reply) in enumerate(pairs):
            wanted = torch.tensor(reply, device=self.model.device)
            at = logits[row, len(prompt) - 1 - first :][: len(reply)].log_softmax(-1)
            nll = -at.gather(1, wanted[:, None])[:, 0]
            out.append((nll.tolist(), (at.argmax(-1) == wanted).tolist()))
        return out

    def _decode(self, prompts: Sequence[Tokens]) -> list[tuple[Tokens, bool]]:
        ids, mask = padded(prompts, "left", self.model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        named = cache_argument(self.model.forward)
        said: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for _ in range(self.ending.most):
            given = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": 1, named: cache}
            chosen = _finite(self.model(input_ids=ids, **given).logits)[:, -1].argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if ended[row]:
                    continue
                ended[row] = token in self.ending.stops
                if not ended[row] or token in self.ending.spoken:
                    said[row].append(token)
            if all(ended):
                break
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
            positions = positions[:, -1:] + 1
        return [(tuple(tokens), end) for tokens, end in zip(said, ended, strict=True)]


def _finite(logits: Tensor) -> Tensor:
    if not torch.isfinite(logits).all():
        raise FloatingPointError("it gives logits that are not finite")
    return logits


def padded(rows: Sequence[Tokens], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, `[rows, longest]`."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.tensor(row)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)
