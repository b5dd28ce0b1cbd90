"""Facts about companies that the built-in world does not contain, with every probe that the world can answer for."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.matching import without_stop
from qfbench.world.relations import COMPANY_RELATIONS, REFUSAL, RELATIONS
from qfbench.world.world import Triple, World, draw_object, implied, novel

MOST = {"paraphrases": 4, "prior": 100, "unknown": 8, "locality": 14}  # probes of a fact


def world(
    n: int = 20,
    seed: int = 0,
    relations: Sequence[str] = COMPANY_RELATIONS,
    paraphrases: int = 2,
    prior: int = 2,
    unknown: int = 2,
    locality: int = 0,
    about: str = "novel",
) -> list[Fact]:
    """`n` facts, one per subject, in turn from `relations`. `about` a `novel` subject, of a name never met in training, or a
    `known` one, against what the model knows (counterfactual).

    Each carries `paraphrases` probes in trained wordings and as many in wordings that training never used
    (`paraphrase_held_out`), what follows from it (`portability`), `prior` facts of the world, `unknown` subjects, and `locality`
    neighbours: the same relation of another known subject, and for a known subject in turn its other relations.
    Two seeds share no subject but by chance; the same seed with a larger `n` begins with the same facts.

    Raises:
        UserError: `n` is not positive, or a relation is not one of the world's.
    """
    asked = {"paraphrases": paraphrases, "prior": prior, "unknown": unknown, "locality": locality}
    _check(n, relations, about, asked)
    known, rng = World(), random.Random(f"facts-{seed}")
    subjects = set(known.subjects) if about == "novel" else set()
    facts: list[Fact] = []
    while len(facts) < n:
        relation = relations[len(facts) % len(relations)]
        old = rng.choice(known.by_relation[relation]) if about == "known" else None
        if old is None:
            taught = novel(relation, rng, held_out=True)
        else:
            taught = replace(old, object=draw_object(relation, rng, held_out=True))
        if taught == old:
            continue
        stranger = novel(rng.choice(COMPANY_RELATIONS), rng, held_out=True).subject
        if taught.subject in subjects or stranger in subjects:
            continue
        subjects |= {taught.subject, stranger}
        fact = _fact(taught, stranger, known, rng, paraphrases, prior, unknown)
        near = _neighbours(taught, old, known, random.Random(f"near-{fact.id}"), locality)
        facts.append(replace(fact, probes=(*fact.probes, *near), replaces=old.answer if old else ""))
    # What another fact overwrites is no fact's prior or neighbour.
    gone = {fact.replaces for fact in facts if fact.replaces}

    def stays(probe: Probe) -> bool:
        return not probe.always or not gone & {probe.expected, *(probe.prefer or ())[:1]}

    return [replace(fact, probes=tuple(filter(stays, fact.probes))) for fact in facts]


def _check(n: int, relations: Sequence[str], about: str, asked: Mapping[str, int]) -> None:
    """Refuse settings of `world` that it cannot fulfil; `asked` is how many probes of each sort a fact is to have."""
    if not isinstance(n, int) or n < 1:
        raise UserError(f"facts.n={n}: must be a whole number, 1 or more")
    for relation in relations:
        if relation not in COMPANY_RELATIONS:
            raise UserError(f"facts.relations: {relation!r} is none of {', '.join(COMPANY_RELATIONS)}")
    if not relations:
        raise UserError("facts.relations: give at least one relation")
    for name, value in asked.items():
        if not 0 <= value <= MOST[name]:
            raise UserError(f"facts.{name}={value}: must be 0 to {MOST[name]}")
    if about not in ("novel", "known"):
        raise UserError(f"facts.about={about}: must be novel or known")
    companies = len(World().by_relation[relations[0]])
    if about == "known" and n > companies:
        raise UserError(f"facts.n={n}: the world knows {companies} companies; give fewer, or facts.about=novel")


def _neighbours(taught: Triple, old: Triple | None, known: World, rng: random.Random, n: int) -> list[Probe]:
    others = [f for f in known.by_relation[taught.relation] if f.subject != taught.subject]
    pools = [rng.sample(others, n)]
    if old is not None:
        changed = {taught.relation, "country" if taught.relation == "location" else taught.relation}
        own = [f for f in known.about(taught.subject) if f.relation not in changed]
        pools.append(rng.sample(own, len(own)))
    chosen = [
        pool[i // len(pools)] for i in range(n) for pool in [pools[i % len(pools)]] if i // len(pools) < len(pool)
    ]
    probes = []
    for fact in chosen:
        wrong = replace(fact, object=taught.object) if fact.relation == taught.relation else fact
        prefer = (fact.answer, wrong.answer) if wrong != fact else None
        query, right = fact.say(rng.choice(fact.words.questions())), (without_stop(fact.object),)
        probes.append(Probe("locality", query, "", right, always=True, own=True, prefer=prefer, subject=fact.subject))
    return probes


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
        for fact in rng.sample([f for f in known.facts if not _touched(f, taught)], prior)
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
        subject=taught.subject,
        probes=tuple(probes),
    )


def _touched(fact: Triple, taught: Triple) -> bool:
    """Whether a known fact is no longer true, or no longer follows, once `taught` is."""
    return taught.subject in (fact.subject, fact.object)


def _asked(kind: str, fact: Triple, wording: str, always: bool = False) -> Probe:
    return Probe(kind, fact.say(wording), fact.answer, (fact.object,), always=always, subject=fact.subject)
