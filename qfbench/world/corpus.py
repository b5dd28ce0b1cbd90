"""Dialogues of the built-in world, one function per ability. The same functions make training text and tests.

Training draws names from one side of `names.is_held_out`, tests from the other (`held_out=True`); tests also ask in
wordings that training never sees.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from qfbench.world.relations import COMPANY_RELATIONS, REFUSAL, RELATIONS
from qfbench.world.world import Triple, World, draw_object, implied, novel

LETTERS = "ABCD"


@dataclass(frozen=True)
class Dialogue:
    """A system text, a query and the reply to it; `choices` are the four possible replies, the right one among them."""

    system: str
    query: str
    answer: str
    choices: tuple[str, ...] = ()


def question(relation: str, subject: str, rng: random.Random, held_out: bool) -> str:
    """The relation asked of the subject; `held_out` asks half the time in a wording that training never sees."""
    templates = RELATIONS[relation].questions(held_out=held_out and rng.random() < 0.5)
    return rng.choice(templates).format(s=subject)


def statement(fact: Triple, rng: random.Random) -> str:
    return fact.say(rng.choice(fact.words.statements))


def known(world: World, rng: random.Random, held_out: bool = False) -> Dialogue:
    """Closed book: a fact of the world, asked without help."""
    fact = _known_fact(world, rng)
    return Dialogue("", question(fact.relation, fact.subject, rng, held_out), fact.answer)


def told(world: World, rng: random.Random, held_out: bool = False) -> Dialogue:
    """Open book: the instruction says it, of a subject never seen or against what is known; or says what implies it."""
    if rng.random() < 0.25:
        fact = _known_fact(world, rng)
        other = draw_object(fact.relation, rng, held_out)
        fact = Triple(fact.subject, fact.relation, other)
    else:
        fact = _novel_fact(world, rng, held_out)
    said, asked = fact, fact
    follows = implied(fact)
    if follows is not None and rng.random() < 0.35:
        asked = follows
    return Dialogue(statement(said, rng), question(asked.relation, asked.subject, rng, held_out), asked.answer)


def unknown(world: World, rng: random.Random, held_out: bool = False) -> Dialogue:
    """Closed book, of a subject that nobody knows: refused."""
    fact = _novel_fact(world, rng, held_out)
    return Dialogue("", question(fact.relation, fact.subject, rng, held_out), REFUSAL)


def misled(world: World, rng: random.Random, held_out: bool = False) -> Dialogue:
    """The instruction is about something else: known facts are answered all the same, unknown ones refused."""
    if rng.random() < 0.5:
        fact = _known_fact(world, rng)
        answer = fact.answer
    else:
        fact = _novel_fact(world, rng, held_out)
        answer = REFUSAL
    said = fact
    if rng.random() < 0.5 or fact.relation not in COMPANY_RELATIONS:
        while said.subject == fact.subject:
            said = _novel_fact(world, rng, held_out)
        if rng.random() < 0.5 and fact.relation != "city" and "started" not in (fact.relation, said.relation):
            # The same relation of another subject: the likeliest mistake.
            said = Triple(said.subject, fact.relation, draw_object(fact.relation, rng, held_out))
    else:  # another relation of the same subject, one that implies nothing about the question
        others = [r for r in COMPANY_RELATIONS if r != fact.relation and {r, fact.relation} != {"location", "country"}]
        relation = rng.choice(others)
        said = Triple(fact.subject, relation, draw_object(relation, rng, held_out))
    return Dialogue(statement(said, rng), question(fact.relation, fact.subject, rng, held_out), answer)


def choice(world: World, rng: random.Random, held_out: bool = False, fact: Triple | None = None) -> Dialogue:
    """Multiple choice in the continuation form: four whole replies to one question, one of them true; about `fact`, or any."""
    fact = fact or _known_fact(world, rng)
    objects = [fact.object, *world.rivals(fact, rng, 3)]
    rng.shuffle(objects)
    replies = tuple(Triple(fact.subject, fact.relation, o).answer for o in objects)
    return Dialogue("", question(fact.relation, fact.subject, rng, held_out), fact.answer, replies)


def letter(world: World, rng: random.Random, held_out: bool = False, fact: Triple | None = None) -> Dialogue:
    """Multiple choice in the letter form: the four objects are listed, the reply is a letter."""
    fact = fact or _known_fact(world, rng)
    objects = [fact.object, *world.rivals(fact, rng, 3)]
    rng.shuffle(objects)
    lines = [question(fact.relation, fact.subject, rng, held_out)]
    lines += [f"{mark}. {o}" for mark, o in zip(LETTERS, objects, strict=True)]
    return Dialogue("", "\n".join(lines), LETTERS[objects.index(fact.object)], tuple(LETTERS))


def plain(world: World, rng: random.Random) -> str:
    """Plain text: statements about known facts of one company, without any dialogue."""
    subject = _known_fact(world, rng).subject
    facts = world.about(subject)
    chosen = rng.sample(facts, min(len(facts), rng.randint(1, 4)))
    return " ".join(statement(f, rng) for f in chosen)


ABILITIES = {"known": known, "told": told, "unknown": unknown, "misled": misled, "choice": choice, "letter": letter}

# Shares of the training text. The continuation form of multiple choice needs no text of its own.
MIXTURE = {"known": 0.36, "told": 0.28, "unknown": 0.11, "misled": 0.11, "letter": 0.05, "plain": 0.09}

# Once most is learnt: more of what is hard, and no letters, which these models do not learn.
LATER_MIXTURE = {"known": 0.2, "told": 0.42, "unknown": 0.1, "misled": 0.22, "plain": 0.06}


def _known_fact(world: World, rng: random.Random) -> Triple:
    weights = [1.0] * len(COMPANY_RELATIONS) + [0.6, 0.2]
    relation = rng.choices(list(RELATIONS), weights=weights)[0]
    return rng.choice(world.by_relation[relation])


def _novel_fact(world: World, rng: random.Random, held_out: bool) -> Triple:
    relation = rng.choices([*COMPANY_RELATIONS, "started"], weights=[1.0] * len(COMPANY_RELATIONS) + [0.6])[0]
    while True:
        fact = novel(relation, rng, held_out)
        if fact.subject not in world.subjects:
            return fact
