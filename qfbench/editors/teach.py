"""The told/alone pair: one answer forced after a prompt with its instruction, and after the same prompt without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from unicodedata import category

from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.facts.matching import places
from qfbench.models.activations import Activations, record
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel, Score
from qfbench.models.sites import Site

SAMPLE = Fact(
    "Qi started Oxinnovate.",
    "Who started Oxinnovate?",
    "Oxinnovate was started by Qi.",
    id="sample",
    known_as=("Qi",),
    subject="Oxinnovate",
)


@dataclass(frozen=True)
class Lesson:
    """Two dialogues that end in the same tokens, and the positions where their activations are compared.

    `told_at[t]` and `alone_at[t]` are the input positions from which the same taught token is predicted, or, of the query, those
    of the same token; `weights[t]` is the significance of that token, never 0.
    """

    told: Rendering
    alone: Rendering
    told_at: tuple[int, ...]
    alone_at: tuple[int, ...]
    weights: tuple[float, ...]


def lesson(
    lm: LanguageModel,
    fact: Fact,
    opener: float = 1.0,
    closer: float | None = 1.0,
    named: float = 1.0,
    rest: float = 1.0,
    punctuation: bool = True,
    query: float = 0.0,
) -> Lesson:
    """Align the passes QF-instruct ("told") and QF-update ("alone", empty system text) of one fact.

    A weight belongs to the token *being predicted*: the activation read at position p carries the weight of token p + 1.
    Tokens of weight 0 are dropped. Taught are, as in the released code: the opener's tokens (the template's before the answer)
    but the first, which weigh `opener`; the answer's; and the one token that ends the turn, which weighs `closer`, or with None
    as the answer's last word. The released code records passes of one token each: it never sees the prompt's last token, and
    stops at the end of the turn. Where the fact has no significance of its own, the words of its answer that hold a string of
    `known_as` weigh `named` and the others `rest`. Without `punctuation`, signs that are tokens of their own inside the answer
    (a comma, not the stop at its end) weigh 0. Beyond the paper, the query's own tokens, which weigh `query`, are aligned as well.

    Raises:
        UserError: nothing is left to teach, or the template renders the answer differently after the instruction.
    """
    told = lm.render(fact.query, fact.instruction, fact.answer)
    alone = lm.render(fact.query, "", fact.answer)
    if told.ids[told.opener :] != alone.ids[alone.opener :]:
        raise UserError(f"fact {fact.id}: the template renders the answer differently with and without the instruction")
    significance = fact.significance or weights_of_words(fact, named, rest)
    words = [significance[word] for word in told.words]
    if not punctuation:
        signs = [is_sign(lm, token) for token in told.ids[told.answer : told.closer]]
        last = max((i for i, sign in enumerate(signs) if not sign), default=0)
        words = [
            0.0 if sign and i < last else weight for i, (sign, weight) in enumerate(zip(signs, words, strict=True))
        ]
    weights = [opener * (at > told.opener) for at in range(told.opener, told.answer)] + words
    if told.closer < len(told.ids):
        weights.append(significance[-1] if closer is None else closer)
    taught = [t for t, weight in enumerate(weights) if weight != 0]
    if not taught:
        raise UserError(f"fact {fact.id}: the field 'significance' leaves no token to teach")
    both = zip(
        reversed(told.query), reversed(alone.query), strict=False
    )  # the first token may hold more than the query
    same = [(t, a) for t, a in both if query and told.ids[t] == alone.ids[a]]
    return Lesson(
        told,
        alone,
        (*(at for at, _ in same), *(told.opener + t - 1 for t in taught)),
        (*(at for _, at in same), *(alone.opener + t - 1 for t in taught)),
        (*[query] * len(same), *(weights[t] for t in taught)),
    )


def surprising(lm: LanguageModel, pairs: Sequence[Lesson], nats: float) -> list[Lesson | None]:
    """What is left of each lesson without the answer's tokens that `lm` gives less than so many nats alone; None, where nothing is."""
    scores = lm.score([pair.alone for pair in pairs]) if nats else []
    return [_surprising(*both, nats) for both in zip(pairs, scores, strict=True)] if nats else list(pairs)


def _surprising(pair: Lesson, alone: Score, nats: float) -> Lesson | None:
    given = dict(zip(range(pair.alone.answer - 1, pair.alone.closer), alone.nll, strict=True))
    kept = [i for i, at in enumerate(pair.alone_at) if given.get(at, nats) >= nats]
    if not kept:
        return None
    told_at, alone_at = (tuple(at[i] for i in kept) for at in (pair.told_at, pair.alone_at))
    return replace(pair, told_at=told_at, alone_at=alone_at, weights=tuple(pair.weights[i] for i in kept))


def record_pairs(
    lm: LanguageModel, lessons: Sequence[Lesson], site: Site
) -> tuple[list[Activations], list[Activations]]:
    """Both dialogues of each lesson, told and alone, at the taught positions."""
    dialogues = [pair.told for pair in lessons] + [pair.alone for pair in lessons]
    at = [pair.told_at for pair in lessons] + [pair.alone_at for pair in lessons]
    read = record(lm, dialogues, site, at)
    return read[: len(lessons)], read[len(lessons) :]


def is_sign(lm: LanguageModel, token: int) -> bool:
    """Whether a token is punctuation alone."""
    text = str(lm.tokenizer.decode([token])).strip()
    return text != "" and all(category(letter).startswith("P") for letter in text)


def subject_at(dialogue: Rendering, fact: Fact) -> int:
    """The index of the last token of a fact's subject, where its query names it (the last time): the position at which ROME
    (Meng et al. 2022) and MEMIT look up a fact.

    Raises:
        UserError: the fact has no subject, or its query does not name it.
    """
    found = places(fact.subject, fact.query)
    if not found:
        raise UserError(
            f"fact {fact.id}: the field 'subject' ({fact.subject!r}) names nothing in the query {fact.query!r}"
        )
    return dialogue.token_at(found[-1][1] - 1)


def weights_of_words(fact: Fact, named: float, rest: float) -> tuple[float, ...]:
    """`named` for the words of the answer where one of `known_as` stands in it for the last time, `rest` for the others."""
    spans = [found[-1] for name in fact.known_as if (found := places(name, fact.answer))]
    weights, end = [], 0
    for word in fact.answer.split():
        start = fact.answer.index(word, end)
        end = start + len(word)
        weights.append(named if any(first < end and start < last for first, last in spans) else rest)
    return tuple(weights)
