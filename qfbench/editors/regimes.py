"""Regimes for many facts: generators of (the facts taught so far, the change of weights that teaches them).

Every change is relative to the unedited model; `lm` is unedited whenever a generator is advanced, and is left so. A generator
that is given how many facts are `done`, and the change that taught them, goes on from there and gives the same as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from qfbench.editors.base import Editor
from qfbench.facts.base import Fact
from qfbench.models.delta import NOTHING, WeightDelta
from qfbench.models.lm import LanguageModel

Taught = Iterator[tuple[Sequence[Fact], WeightDelta]]
Regime = Callable[..., Taught]  # (editor, lm, facts, done, total)


def accumulates(regime: Regime) -> bool:
    """Whether each change holds all before it."""
    return getattr(regime, "func", regime) is not single


def single(
    editor: Editor, lm: LanguageModel, facts: Sequence[Fact], done: int = 0, total: WeightDelta = NOTHING
) -> Taught:
    """Each fact alone, from the unedited model; nothing accumulates."""
    for fact, change in zip(facts[done:], editor.one_by_one(lm, facts, done), strict=True):
        yield [fact], change()


def sequential(
    editor: Editor, lm: LanguageModel, facts: Sequence[Fact], done: int = 0, total: WeightDelta = NOTHING
) -> Taught:
    """Each fact on the model as the edits before it left it; nothing else is remembered."""
    for n, (_, change) in enumerate(in_turn(editor, lm, facts, done, total), start=done + 1):
        yield facts[:n], change


def in_turn(
    editor: Editor, lm: LanguageModel, facts: Sequence[Fact], done: int = 0, total: WeightDelta = NOTHING
) -> Iterator[tuple[WeightDelta, WeightDelta]]:
    """What `sequential` does, fact by fact: the change that this fact brought, and all so far."""
    for change in editor.one_by_one(lm, facts, done):
        with total.applied_to(lm):
            step = change()
        total = total + step
        yield step, total


def joint(
    editor: Editor, lm: LanguageModel, facts: Sequence[Fact], done: int = 0, total: WeightDelta = NOTHING
) -> Taught:
    """All facts so far, taught together from the unedited model."""
    for n, change in enumerate(editor.joint(lm, facts, done), start=done + 1):
        yield facts[:n], change


def protected(
    editor: Editor, lm: LanguageModel, facts: Sequence[Fact], done: int = 0, total: WeightDelta = NOTHING
) -> Taught:
    """Each fact with its keys projected off all earlier keys."""
    total = NOTHING  # what is to be kept out of the way of is found again
    for n, step in enumerate(editor.protected(lm, facts), start=1):
        total = total + step
        if n > done:
            yield facts[:n], total
