"""Facts in plain English for pretrained models: about people, companies, places and works that do not exist, or against
common knowledge; `everyday.toml` and `everyday_knowledge.toml` hold them."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.matching import key, stands_in
from qfbench.facts.oxinnovate import Step
from qfbench.facts.probes import ask
from qfbench.models.lm import LanguageModel

MOST = {"paraphrases": 4, "prior": 20, "unknown": 4, "locality": 4}  # probes of a fact
PARTS = {"all": slice(None), "tune": slice(0, None, 2), "test": slice(1, None, 2)}

Row = Sequence[str]  # subject, object and, where a second step leads there, what follows; further names behind "|"


@dataclass(frozen=True)
class Relation:
    """How one relation is worded, and all that is known of it (`everyday.toml` says what each field holds)."""

    name: str
    kind: str  # kind of knowledge: person, place, company, thing, number
    instruction: str
    query: str
    answer: str
    others: Sequence[str]
    facts: Sequence[Row]
    follows: Sequence[str] = ()
    neighbours: Sequence[Row] = ()
    strangers: Sequence[str] = ()


def everyday(
    n: int = 20,
    seed: int = 0,
    paraphrases: int = 4,
    prior: int = 2,
    unknown: int = 1,
    locality: int = 2,
    about: str = "invented",
    part: str = "all",
) -> list[Fact]:
    """`n` facts, in turn from all relations: `about` an `invented` subject, or a `known` one, against what models know.

    Each carries the query in `paraphrases` other wordings, `prior` questions of common knowledge (each is asked but once, so the
    last facts may have none), `unknown` subjects of its relation and `locality` neighbours, both of which are to be answered
    as the unedited model does. An invented fact also has a question that is its reverse or takes a second step (`portability`).
    What another fact overwrites is no fact's prior or neighbour. The same seed with a larger `n` begins with the same facts.
    The parts `tune` and `test` share no fact, question, neighbour or stranger; each is half of `all`.

    Raises:
        UserError: a setting is none that can be had; for `n`, how many facts there are.
    """
    _check(about, part, {"paraphrases": paraphrases, "prior": prior, "unknown": unknown, "locality": locality})
    invented, topics = (_read(name, PARTS[part]) for name in ("everyday", "everyday_knowledge"))
    rows = _in_turn(invented if about == "invented" else topics, random.Random(f"everyday-{seed}"))
    if not 1 <= n <= len(rows):
        raise UserError(f"facts.n={n}: must be 1 to {len(rows)}, the facts of about={about}, part={part}")
    known = _in_turn(topics, random.Random(f"questions-{seed}"))
    questions = [_asked("prior", topic, row, always=True) for topic, row in known]
    strangers = _strangers(invented)
    of_all = [probe for turn in zip(*strangers.values(), strict=True) for probe in turn]
    gone = {_said(relation.query, row) for relation, row in rows[:n]}
    facts = []
    for i, (relation, row) in enumerate(rows[:n]):
        taught = row if about == "invented" else _otherwise(relation, row, random.Random(f"{seed}-{row[0]}"))
        near = relation.neighbours or [other for other in relation.facts if other != row]
        near = random.Random(f"near-{seed}-{relation.name}-{row[0]}").sample(near, locality)
        # Each wording of each stranger is taken once before any is taken again.
        its = strangers[relation.name] if about == "invented" else of_all
        turn = unknown * (i // len(invented) if about == "invented" else i)
        always = [_neighbour(relation, other, taught) for other in near]
        always += [its[(turn + j) % len(its)] for j in range(unknown)] + questions[i * prior : (i + 1) * prior]
        true = row if about == "known" else None
        facts.append(_fact(relation, taught, true, paraphrases, [probe for probe in always if probe.query not in gone]))
    return facts


def four_steps(facts: Sequence[Fact]) -> list[Step]:
    """A single fact: told, and then taught, in other words too; and whether something that all know is still answered."""
    (fact,) = facts
    france = Probe("prior", "What is the capital of France?", "The capital of France is Paris.", ("Paris",))
    return [
        Step(1, 0, fact.id, fact.told),
        Step(2, 1, fact.id, fact.edit),
        Step(3, 1, fact.id, next(probe for probe in fact.probes if probe.kind == "paraphrase")),
        Step(4, 1, "france-capital", france),
    ]


def abilities(lm: LanguageModel, n: int = 60, refusal: str = "Need more information") -> dict[str, float]:
    """What a converted model is measured by: of `n` facts of `part=test`, the share that is answered when `told`; of common
    knowledge the share that is `known`; and the share of strangers that get the `refusal`."""
    facts = everyday(n, part="test", locality=0)
    asked = {"told": [fact.told for fact in facts]}
    asked |= {
        name: [probe for fact in facts for probe in fact.probes if probe.kind == kind]
        for name, kind in (("known", "prior"), ("unknown", "unknown"))
    }
    asked["unknown"] = [replace(probe, own=False, accept=(refusal,)) for probe in asked["unknown"]]
    return {name: float(np.mean([row["generated"] for row in ask(lm, own)])) for name, own in asked.items()}


def _check(about: str, part: str, asked: Mapping[str, int]) -> None:
    """Refuse settings that cannot be had; `asked` is how many probes of each sort a fact is to have."""
    for name, value in asked.items():
        if not 0 <= value <= MOST[name]:
            raise UserError(f"facts.{name}={value}: must be 0 to {MOST[name]}")
    if about not in ("invented", "known"):
        raise UserError(f"facts.about={about}: must be invented or known")
    if part not in PARTS:
        raise UserError(f"facts.part={part}: must be one of {', '.join(PARTS)}")


def _read(name: str, part: slice) -> list[Relation]:
    """The relations of a file beside this one, `part` of all that they hold."""
    tables = tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text(encoding="utf-8"))
    held = ("facts", "neighbours", "strangers")
    return [Relation(n, **table | {h: table[h][part] for h in held if h in table}) for n, table in tables.items()]


def _in_turn(relations: Sequence[Relation], rng: random.Random) -> list[tuple[Relation, Row]]:
    """All rows: one of each relation, then the next of each, relations and rows in random order."""
    drawn = [
        [(relation, row) for row in rng.sample(list(relation.facts), len(relation.facts))]
        for relation in rng.sample(list(relations), len(relations))
    ]
    return [pair for turn in zip_longest(*drawn) for pair in turn if pair]


def _names(cell: str) -> tuple[str, ...]:
    """What counts as right: every name, without its article."""
    return tuple(re.sub("^[Tt]he ", "", name) for name in cell.split("|"))


def _said(wording: str, row: Row) -> str:
    cells = dict(zip("soi", (cell.split("|")[0] for cell in row), strict=False))
    text = wording.format(**cells)
    return text[0].upper() + text[1:]


def _asked(kind: str, relation: Relation, row: Row, wording: str = "", always: bool = False) -> Probe:
    query, answer = _said(wording or relation.query, row), _said(relation.answer, row)
    return Probe(kind, query, answer, _names(row[1]), always=always, subject=row[0])


def _fact(relation: Relation, row: Row, true: Row | None, paraphrases: int, always: Sequence[Probe]) -> Fact:
    """The fact of a row, in the place of what is `true` of its subject, if anything is."""
    probes = [_asked("paraphrase", relation, row, wording) for wording in relation.others[:paraphrases]]
    answer, replaces = _said(relation.answer, row), ""
    rejects: tuple[str, ...] = ()
    if true:
        replaces, rejects = _said(relation.answer, true), _names(true[1])
        probes = [replace(probe, reject=rejects, prefer=(answer, replaces)) for probe in probes]
    if relation.follows:
        asked, reply = (_said(wording, row) for wording in relation.follows)
        about, right = (row[0], row[2]) if len(row) > 2 else (row[1].split("|")[0], row[0])
        probes.append(Probe("portability", asked, reply, _names(right), subject=about))
    return Fact(
        id=re.sub(r"\W+", "-", f"{relation.name} {row[0]}".lower()).strip("-"),
        kind=relation.kind,
        instruction=_said(relation.instruction, row),
        query=_said(relation.query, row),
        answer=answer,
        known_as=_names(row[1]),
        replaces=replaces,
        rejects=rejects,
        subject=row[0],
        probes=(*probes, *always),
    )


def _otherwise(relation: Relation, row: Row, rng: random.Random) -> Row:
    """The row with the object of another, of which nothing is true of the subject or stands in a question about it."""
    true = {key(name) for name in _names(row[1])}
    asked = " ".join(_said(wording, row) for wording in (relation.query, *relation.others, relation.answer))
    for other in rng.sample(relation.facts, len(relation.facts)):
        if not any(key(name) in true or stands_in(name, asked) for name in _names(other[1])):
            return row[0], other[1]
    raise UserError(f"{relation.name}: nothing else can be taught of {row[0]}")


def _neighbour(relation: Relation, row: Row, taught: Row) -> Probe:
    """A question about another subject of the relation, whose right answer should stay likelier than the taught one."""
    asked, rival = _asked("locality", relation, row, always=True), _said(relation.answer, (row[0], taught[1]))
    prefer = None if set(_names(row[1])) & set(_names(taught[1])) else (asked.expected, rival)
    return replace(asked, expected="", own=True, prefer=prefer)


def _strangers(relations: Sequence[Relation]) -> dict[str, list[Probe]]:
    """For each relation, its strangers in all wordings, another stranger at every place. No answer to them is right."""
    return {
        relation.name: [
            Probe("unknown", _said(wording, (name,)), "", always=True, own=True, subject=name)
            for wording in (relation.query, *relation.others)
            for name in relation.strangers
        ]
        for relation in relations
    }
