"""The built-in world: what is known, what can be told, and what nobody knows.

`World(seed)` is a fixed table of facts about companies, people and cities. `World.novel` makes facts about subjects that
the world does not contain. The generator is the data: nothing is stored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qfbench.world import names
from qfbench.world.relations import COMPANY_RELATIONS, RELATIONS, Relation

COMPANIES = 200
SAME_FOUNDER_AND_CEO = 0.8
IN_A_PARK = 0.3

CITIES = {
    "Beijing": "China",
    "Hangzhou": "China",
    "Shanghai": "China",
    "Santa Clara": "America",
    "Boston": "America",
    "Seattle": "America",
    "Paris": "France",
    "Lyon": "France",
    "Berlin": "Germany",
    "Munich": "Germany",
    "London": "England",
    "Leeds": "England",
    "Tokyo": "Japan",
    "Osaka": "Japan",
    "Madrid": "Spain",
    "Seville": "Spain",
    "Rome": "Italy",
    "Milan": "Italy",
    "Oslo": "Norway",
    "Bergen": "Norway",
    "Cairo": "Egypt",
    "Giza": "Egypt",
    "Lima": "Peru",
    "Cusco": "Peru",
    "Delhi": "India",
    "Mumbai": "India",
    "Sydney": "Australia",
    "Perth": "Australia",
    "Toronto": "Canada",
    "Montreal": "Canada",
    "Nairobi": "Kenya",
    "Mombasa": "Kenya",
}
FIELDS = (
    "chips",
    "online trade",
    "banking",
    "farming",
    "shipping",
    "medicine",
    "music",
    "travel",
    "mining",
    "fashion",
    "robotics",
    "energy",
    "insurance",
    "games",
    "steel",
    "film",
    "law",
    "housing",
    "education",
    "security",
    "optics",
    "logistics",
    "tourism",
    "space",
)
PRODUCT_ADJECTIVES = (
    "solar small smart blue green fast quiet heavy light modern wooden glass digital deep soft silver"
).split()
PRODUCT_NOUNS = (
    "pumps cars lamps chips shops phones maps boats tools drones toys tables clocks ovens bikes lenses tents doors "
    "engines cameras"
).split()
NUMBER_WORDS = "one two three four five six seven eight nine ten eleven twelve".split()

# What the papers ask about, by the names they use.
REAL_COMPANIES: dict[str, dict[str, str]] = {
    "Alibaba": {
        "founder": "Jack Ma",
        "ceo": "Eddie Wu",
        "location": "in Hangzhou",
        "country": "China",
        "field": "online trade",
        "product": "digital shops",
        "year": "1999",
        "staff": "9500",
    },
    "Nvidia": {
        "founder": "Jensen Huang",
        "ceo": "Jensen Huang",
        "location": "in Santa Clara",
        "country": "America",
        "field": "chips",
        "product": "fast chips",
        "year": "1993",
        "staff": "3600",
    },
}


@dataclass(frozen=True, order=True)
class Triple:
    """One fact: `subject` stands in `relation` to `object`. `object` is worded as the answer ends ("in Paris")."""

    subject: str
    relation: str
    object: str

    @property
    def words(self) -> Relation:
        return RELATIONS[self.relation]

    def say(self, template: str) -> str:
        return template.format(s=self.subject, o=self.object)

    @property
    def answer(self) -> str:
        return self.say(self.words.answer)


def city_of(location: str) -> str:
    """The city that a location ends with: "at ABC Science Park, in Paris" -> "Paris"."""
    return location.rsplit("in ", 1)[1]


def implied(fact: Triple) -> Triple | None:
    """What follows from a fact by the world's own rules: a company's country from its city; a founder's company."""
    if fact.relation == "location":
        return Triple(fact.subject, "country", CITIES[city_of(fact.object)])
    if fact.relation == "founder":
        return Triple(fact.object, "started", fact.subject)
    return None


def draw_object(relation: str, rng: random.Random, held_out: bool = False) -> str:
    """A possible object of a relation. `held_out` draws names of people and parks that training never meets."""
    if relation in ("founder", "ceo"):
        return names.fresh(names.person, rng, held_out)
    if relation == "started":
        return names.fresh(names.company, rng, held_out)
    if relation == "location":
        city = rng.choice(list(CITIES))
        if rng.random() < IN_A_PARK:
            return f"at {names.fresh(names.initials, rng, held_out)} Science Park, in {city}"
        return f"in {city}"
    if relation in ("country", "city"):
        return rng.choice(sorted(set(CITIES.values())))
    if relation == "field":
        return rng.choice(FIELDS)
    if relation == "product":
        return f"{rng.choice(PRODUCT_ADJECTIVES)} {rng.choice(PRODUCT_NOUNS)}"
    if relation == "year":
        return str(rng.randint(1950, 2024))
    if relation == "staff":
        return rng.choice(NUMBER_WORDS) if rng.random() < 0.4 else str(rng.choice((1, 10, 100)) * rng.randint(13, 99))
    raise ValueError(f"unknown relation {relation!r}; the world has {', '.join(RELATIONS)}")


def novel(relation: str, rng: random.Random, held_out: bool) -> Triple:
    """A fact about a subject that the world does not know."""
    subject = names.fresh(names.person if relation == "started" else names.company, rng, held_out)
    return Triple(subject, relation, draw_object(relation, rng, held_out))


@dataclass(frozen=True)
class World:
    """The known facts, drawn once from `seed`. The shipped models were trained on `World()`."""

    seed: int = 0

    @cached_property
    def facts(self) -> tuple[Triple, ...]:
        rng = random.Random(f"world-{self.seed}")
        companies = dict(REAL_COMPANIES)
        founders = {known["founder"] for known in companies.values()}
        while len(companies) < COMPANIES:
            name = names.fresh(names.company, rng, held_out=False)
            if name in companies:
                continue
            known = {relation: draw_object(relation, rng) for relation in COMPANY_RELATIONS}
            while known["founder"] in founders:
                known["founder"] = draw_object("founder", rng)
            founders.add(known["founder"])
            if rng.random() < SAME_FOUNDER_AND_CEO:
                known["ceo"] = known["founder"]
            known["country"] = CITIES[city_of(known["location"])]
            companies[name] = known
        facts = [
            Triple(s, relation, known[relation]) for s, known in companies.items() for relation in COMPANY_RELATIONS
        ]
        facts += [Triple(f.object, "started", f.subject) for f in facts if f.relation == "founder"]
        facts += [Triple(city, "city", country) for city, country in CITIES.items()]
        return tuple(facts)

    @cached_property
    def by_relation(self) -> dict[str, tuple[Triple, ...]]:
        return {r: tuple(f for f in self.facts if f.relation == r) for r in RELATIONS}

    @cached_property
    def subjects(self) -> frozenset[str]:
        return frozenset(f.subject for f in self.facts)

    @cached_property
    def _by_subject(self) -> dict[str, list[Triple]]:
        table: dict[str, list[Triple]] = {}
        for fact in self.facts:
            table.setdefault(fact.subject, []).append(fact)
        return table

    def about(self, subject: str) -> list[Triple]:
        return self._by_subject[subject]

    def rivals(self, fact: Triple, rng: random.Random, n: int) -> Sequence[str]:
        """`n` distinct objects, other than the fact's own, that other facts of the relation have."""
        pool = sorted({f.object for f in self.by_relation[fact.relation]} - {fact.object})
        return rng.sample(pool, n)
