"""Regimes for many facts: generators of (fact, the whole change of weights after it), all relative to the unedited model.

`lm` is unedited whenever a generator is advanced, and is left so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qfbench.delta import WeightDelta
from qfbench.editors.base import Editor
from qfbench.facts.base import Fact
from qfbench.lm import LanguageModel

Taught = Iterator[tuple[Fact, WeightDelta]]


def single(editor: Editor, lm: LanguageModel, facts: Sequence[Fact]) -> Taught:
    """Each fact from the unedited model; nothing accumulates."""
    for fact in facts:
        yield fact, editor.edit(lm, [fact])


def sequential(editor: Editor, lm: LanguageModel, facts: Sequence[Fact]) -> Taught:
    """Each fact on the model as the edits before it left it; nothing else is remembered."""
    total = WeightDelta()
    for fact in facts:
        with total.applied_to(lm):
            step = editor.edit(lm, [fact])
        total = total + step
        yield fact, total


def joint(editor: Editor, lm: LanguageModel, facts: Sequence[Fact]) -> Taught:
    """All facts so far, taught together from the unedited model. Costs n edits at step n; `protected` costs one."""
    for n, fact in enumerate(facts, start=1):
        yield fact, editor.edit(lm, facts[:n])


def protected(editor: Editor, lm: LanguageModel, facts: Sequence[Fact]) -> Taught:
    """Each fact with its keys projected off all earlier keys."""
    total = WeightDelta()
    for fact, step in zip(facts, editor.protected(lm, facts), strict=True):
        total = total + step
        yield fact, total
