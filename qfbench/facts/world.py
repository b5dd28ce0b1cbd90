"""Facts about companies that the built-in world does not contain, with every probe that the world can answer for."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe, without_stop
from qfbench.world.relations import COMPANY_RELATIONS, REFUSAL, RELATIONS
from qfbench.world.world import Triple, World, implied, novel


def world(
    n: int = 20,
    seed: int = 0,
    relations: Sequence[str] = COMPANY_RELATIONS,
    paraphrases: int = 2,
    prior: int = 2,
    unknown: int = 2,
) -> list[Fact]:
    """`n` novel facts, one per subject, in turn from `relations`; names and subjects were never met in training.

    Each carries `paraphrases` probes in trained wordings and as many in wordings that training never used
    (`paraphrase_held_out`), what follows from it (`portability`), `prior` facts of the world and `unknown` subjects.
    Two seeds share no subject but by chance; the same seed with a larger `n` begins with the same facts.

    Raises:
        UserError: `n` is not positive, or a relation is not one of the world's.
    """
    if not isinstance(n, int) or n < 1:
        raise UserError(f"facts.n={n}: must be a whole number, 1 or more")
    for relation in relations:
        if relation not in COMPANY_RELATIONS:
            raise UserError(f"facts.relations: {relation!r} is none of {', '.join(COMPANY_RELATIONS)}")
    if not relations:
        raise UserError("facts.relations: give at least one relation")
    for name, value, most in (("paraphrases", paraphrases, 4), ("prior", prior, 100), ("unknown", unknown, 8)):
        if not 0 <= value <= most:
            raise UserError(f"facts.{name}={value}: must be 0 to {most}")
    known, rng = World(), random.Random(f"facts-{seed}")
    subjects = set(known.subjects)
    facts: list[Fact] = []
    while len(facts) < n:
        taught = novel(relations[len(facts) % len(relations)], rng, held_out=True)
        stranger = novel(rng.choice(COMPANY_RELATIONS), rng, held_out=True).subject
        if taught.subject in subjects or stranger in subjects:
            continue
        subjects |= {taught.subject, stranger}
        facts.append(_fact(taught, stranger, known, rng, paraphrases, prior, unknown))
    return facts


def _fact(
    taught: Triple, stranger: str, known: World, rng: random.Random, paraphrases: int, prior: int, unknown: int
) -> Fact:
    query, *others = rng.sample(taught.words.questions(), paraphrases + 1)
    held_out = rng.sample(taught.words.questions(held_out=True), paraphrases)
    probes = [_asked("paraphrase", taught, wording) for wording in others]
    probes += [_asked("paraphrase_held_out", taught, wording) for wording in held_out]
    follows = implied(taught)
    if follows is not None:
        probes.append(_asked("portability", follows, rng.choice(follows.words.questions())))
    probes += [
        _asked("prior", fact, rng.choice(fact.words.questions()), always=True)
        for fact in rng.sample(known.facts, prior)
    ]
    probes += [
        Probe("unknown", rng.choice(RELATIONS[relation].questions()).format(s=stranger), REFUSAL, always=True)
        for relation in rng.sample(COMPANY_RELATIONS, unknown)
    ]
    return Fact(
        id=f"{taught.subject.lower()}-{taught.relation}",
        kind=taught.words.kind,
        instruction=taught.say(rng.choice(taught.words.statements)),
        query=taught.say(query),
        answer=taught.answer,
        known_as=(without_stop(taught.object),),
        probes=tuple(probes),
    )


def _asked(kind: str, fact: Triple, wording: str, always: bool = False) -> Probe:
    return Probe(kind, fact.say(wording), fact.answer, (fact.object,), always=always)
