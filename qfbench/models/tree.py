"""What is asked of a model in one forward pass: prompts, and replies that are tried after them, as branches of trees of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Tokens = tuple[int, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A prompt, replies to rate after it (the token that ends the turn included), and whether its greedy reply is wanted.

    `change` says under which of several changes of weights it is asked (`each.each_applied_to`).
    """

    prompt: Tokens
    rated: tuple[Tokens, ...] = ()
    reply: bool = True
    change: int = 0


@dataclass(frozen=True)
class Answer:
    """Of each rated reply its nats and hits, token by token; of the greedy reply its tokens, and whether it ended its turn."""

    rated: list[tuple[list[float], list[bool]]]
    said: Tokens = ()
    ended: bool = False


@dataclass
class Tree:
    """A prompt, and branches after it that share what they begin with: a row of one forward pass.

    `tokens` are those of the prompt, and then one for each node; `parents` the place of what stands before each node,
    `paths` the places along each branch, and `new` how many nodes each branch added.
    """

    prompt: Tokens
    branches: tuple[Tokens, ...] = ()

    def __post_init__(self) -> None:
        self.tokens, self.parents, self.paths, self.new = list(self.prompt), [], [], []
        known: dict[tuple[int, int], int] = {}
        for branch in self.branches:
            at, path, before = len(self.prompt) - 1, [], len(self.tokens)
            for token in branch:
                if (at, token) not in known:
                    known[at, token] = len(self.tokens)
                    self.tokens.append(token)
                    self.parents.append(at)
                at = known[at, token]
                path.append(at)
            self.paths.append(path)
            self.new.append(len(self.tokens) - before)
        self.forks = any(parent != len(self.prompt) - 1 + i for i, parent in enumerate(self.parents))


@dataclass(frozen=True)
class Ending:
    """The tokens that end a turn, those of them whose text belongs to the reply, and the most tokens that a reply may have."""

    stops: frozenset[int]
    spoken: frozenset[int]
    most: int


def laid_out(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token ids and positions, `[rows, tokens]`, and what each token may look at, `[rows, tokens, tokens]`.

    None instead of the last: each token may look at all before it.
    """
    width = max(len(tree.tokens) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    positions = torch.arange(width).repeat(len(trees), 1)
    for r, tree in enumerate(trees):
        ids[r, : len(tree.tokens)] = torch.tensor(tree.tokens)
    if not any(tree.forks for tree in trees):
        return ids, positions, None
    allowed = np.tril(np.ones((width, width), bool))[None].repeat(len(trees), 0)
    for r, tree in enumerate(trees):
        for slot, parent in enumerate(tree.parents, start=len(tree.prompt)) if tree.forks else ():
            allowed[r, slot, :slot] = allowed[r, parent, :slot]
            positions[r, slot] = positions[r, parent] + 1
    return ids, positions, torch.from_numpy(allowed)


def walk(greedy: Sequence[Sequence[int]], branches: Sequence[Tokens], ending: Ending) -> tuple[list[int], bool | None]:
    """Follow what is said next as far as branches go: the reply so far, and whether it has ended its turn.

    `greedy[0]` is what is said after the prompt; `greedy[i]` that again, and what is said after each token of branch i.
    None instead of an end: no branch goes on as the reply does.
    """
    path: list[int] = []
    following = [(branch, said) for branch, said in zip(branches, greedy[1:], strict=True)]
    token = greedy[0][0]
    while token not in ending.stops:
        path.append(token)
        if len(path) == ending.most:
            return path, False
        following = [(b, said) for b, said in following if len(b) >= len(path) and b[len(path) - 1] == token]
        if not following:
            return path, None
        token = following[0][1][len(path)]
    return ([*path, token] if token in ending.spoken else path), True


def guess(path: Sequence[int], heard: Sequence[Tokens], most: int) -> Sequence[int]:
    """Up to `most` tokens that may follow: those that followed the same two tokens in what was said or heard before."""
    for text in (path[:-1], *heard):
        for at in range(len(text) - 1, 0, -1):
            if text[at] == path[-1] and [text[at - 1]] == path[-2:-1]:
                return text[at + 1 : at + 1 + max(0, most)]
    return ()


def in_batches(
    run: Callable[[list[Question]], Iterable[T]], questions: Sequence[Question], most: int, tokens: float = math.inf
) -> Iterator[tuple[Question, T]]:
    """What `run` gives for each question, by `batches`; half of one at a time where memory is short."""
    for batch in batches(questions, most, tokens):
        try:
            found = list(run(batch))
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            yield from in_batches(run, batch, (len(batch) + 1) // 2, tokens)
        else:
            yield from zip(batch, found, strict=True)


def batches(questions: Sequence[Question], most: int, tokens: float = math.inf) -> Iterator[list[Question]]:
    """Questions of like length, up to `most` and up to so many `tokens`, padding included, at once.

    Where no reply is wanted, a batch ends before padding is a third of it; replies are decoded together, since a step costs
    hardly less for half of them.
    """

    def length(question: Question) -> int:
        return len(question.prompt) + sum(map(len, question.rated))

    batch: list[Question] = []
    held = 0
    for question in sorted(questions, key=length):
        longest = length(question)
        padded = not question.reply and longest * (len(batch) + 1) > 1.5 * (held + longest)
        if batch and (len(batch) == most or padded or longest * (len(batch) + 1) > tokens):
            yield batch
            batch, held = [], 0
        batch.append(question)
        held += longest
    if batch:
        yield batch
