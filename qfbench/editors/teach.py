"""The told/alone pair: one answer forced after a prompt with its instruction, and after the same prompt without it."""

from __future__ import annotations

from dataclasses import dataclass

from qfbench.dialogue import Rendering
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.lm import LanguageModel


@dataclass(frozen=True)
class Lesson:
    """Two dialogues that end in the same tokens, and the positions where their activations are compared.

    `told_at[t]` and `alone_at[t]` are the input positions from which the same taught token is predicted; `weights[t]` is
    the significance of that token, never 0.
    """

    told: Rendering
    alone: Rendering
    told_at: tuple[int, ...]
    alone_at: tuple[int, ...]
    weights: tuple[float, ...]


def lesson(lm: LanguageModel, fact: Fact, opener: float = 1.0, closer: float = 1.0) -> Lesson:
    """Align the passes QF-instruct ("told") and QF-update ("alone", empty system text) of one fact.

    A weight belongs to the token *being predicted*: the activation read at position p carries the weight of token p + 1.
    Tokens of weight 0 are dropped. `opener` and `closer` weigh the template's tokens around the answer (the released QF
    code teaches them too, with weight 1).

    Raises:
        UserError: nothing is left to teach, or the template renders the answer differently after the instruction.
    """
    told = lm.render(fact.query, fact.instruction, fact.answer)
    alone = lm.render(fact.query, "", fact.answer)
    if told.ids[told.opener :] != alone.ids[alone.opener :]:
        raise UserError(f"fact {fact.id}: the template renders the answer differently with and without the instruction")
    significance = fact.significance or (1.0,) * len(fact.answer.split())
    weights = [opener] * (told.answer - told.opener)
    weights += [significance[word] for word in told.words]
    weights += [closer] * (len(told.ids) - told.closer)
    taught = [t for t, weight in enumerate(weights) if weight != 0]
    if not taught:
        raise UserError(f"fact {fact.id}: the field 'significance' leaves no token to teach")
    return Lesson(
        told,
        alone,
        tuple(told.opener + t - 1 for t in taught),
        tuple(alone.opener + t - 1 for t in taught),
        tuple(weights[t] for t in taught),
    )
