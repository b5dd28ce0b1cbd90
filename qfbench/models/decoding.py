"""Greedy decoding from prompts whose keys and values are known, several guessed tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from qfbench.models.cut import Cut
from qfbench.models.tree import Ending, Tokens, guess, walk

GUESS = 2  # tokens that are guessed at first; twice as many each time all were right, half as many when none was
MOST = 16  # tokens that are guessed at once


@dataclass
class Decoded:
    """A reply while it is decoded: `path` is what is said so far, of which `fed` tokens are in the cache."""

    prompt: Tokens
    path: list[int]
    heard: Sequence[Tokens]  # what may be said again
    change: int  # of weights, under which it is decoded
    ended: bool | None = None  # None: it goes on
    fed: int = 0
    trust: int = GUESS
    entered: list[Tensor] = field(default_factory=list)  # the states of the tokens fed, at the cut

    def tried(self, ending: Ending) -> list[int]:
        """What is said, and a guess of what follows."""
        room = ending.most - 1 - len(self.path)
        return [*self.path, *guess(self.path, self.heard, min(self.trust, room))]

    def take(self, tried: list[int], next_token: Iterator[int], ending: Ending) -> int:
        """Go on as far as what was tried is right, given what is said after each token that was fed: how many of those hold."""
        before, feed = len(self.path), tried[self.fed :]
        greedy = [*self.path[: self.fed + 1], *(next(next_token) for _ in feed)]
        self.path, self.ended = walk([[self.path[0]], greedy], [tuple(tried)], ending)
        right = sum(a == b for a, b in zip(self.path[self.fed :], feed, strict=False))
        self.fed += right
        if len(tried) > before:
            met = self.fed - before
            self.trust = min(MOST, 2 * self.trust) if met == len(tried) - before else max(1, met or self.trust // 2)
        return right


def decode(cut: Cut, replies: Sequence[Decoded], cache: DynamicCache, ending: Ending, rows: list[int]) -> None:
    """Decode all to their ends. `cache` holds the prompts, padded at the right, in all layers; `rows` is given the change of
    each row of a pass.

    Slots of keys that stand for nothing (padding, guesses that were wrong) stay in the cache, and are masked.

    Raises:
        FloatingPointError: a logit is not finite.
    """
    left = list(replies)
    lengths = torch.tensor([[len(reply.prompt)] for reply in left])
    valid = torch.arange(int(lengths.max()))[None] < lengths
    while left:
        rows[:] = [reply.change for reply in left]
        tried = [reply.tried(ending) for reply in left]
        feeds = [tokens[reply.fed :] for tokens, reply in zip(tried, left, strict=True)]
        width = max(map(len, feeds))
        ids = torch.tensor([feed + [0] * (width - len(feed)) for feed in feeds], device=cut.device)
        starts = torch.tensor([[len(reply.prompt) + reply.fed] for reply in left])
        positions = (starts + torch.arange(width)).to(cut.device)
        new = torch.ones(width, width, dtype=torch.bool).tril().expand(len(left), -1, -1)
        mask = cut.mask(torch.cat([valid[:, None].expand(-1, width, -1), new], 2))
        below = cut.below(ids, positions, mask, cache)
        normed = cut.above(below, positions, mask, cache)
        at = torch.tensor([(i, j) for i, feed in enumerate(feeds) for j in range(len(feed))], device=normed.device)
        next_token = iter(cut.read(normed[at[:, 0], at[:, 1]], [], [])[0])
        accepted = torch.zeros(len(left), width, dtype=torch.bool)
        for i, reply in enumerate(left):
            right = reply.take(tried[i], next_token, ending)
            accepted[i, :right] = True
            reply.entered.append(below[i, :right])
        stay = torch.tensor([i for i, reply in enumerate(left) if reply.ended is None], dtype=torch.long)
        valid = torch.cat([valid, accepted], 1)[stay]
        if 0 < len(stay) < len(left):
            cache.batch_select_indices(stay.to(cut.device))
        left = [reply for reply in left if reply.ended is None]
