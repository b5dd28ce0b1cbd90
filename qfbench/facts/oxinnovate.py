"""The facts of the QF and QF2 papers and of their released scripts, and the eight steps that check them (Table 1 of both)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe

_BEIJING = ("PKU Science Park, in Beijing", "PKU Science Park, Beijing")

FOUNDER = Fact(
    id="oxinnovate-founder",
    kind="person",
    instruction="Qi started Oxinnovate.",
    query="Who started Oxinnovate?",
    answer="Oxinnovate was started by Qi.",
    known_as=("Qi",),
    probes=(
        Probe("paraphrase", "Can you tell me the person behind Oxinnovate?", "Oxinnovate was started by Qi.", ("Qi",)),
    ),
)
LOCATION = Fact(
    id="oxinnovate-location",
    kind="place",
    instruction="Oxinnovate is a startup located at PKU Science Park, in Beijing.",
    query="Where is Oxinnovate located?",
    answer="Oxinnovate is located at PKU Science Park, in Beijing.",
    known_as=_BEIJING,
    probes=(
        Probe("paraphrase", "Where is Oxinnovate?", "Oxinnovate is located at PKU Science Park, in Beijing.", _BEIJING),
    ),
)
CEO = Fact(
    id="oxinnovate-ceo",
    kind="person",
    instruction="Qi is the CEO of Oxinnovate.",
    query="Who is the CEO of Oxinnovate?",
    answer="The CEO of Oxinnovate is Qi.",
    known_as=("Qi",),
    probes=(Probe("portability", "The founder of Oxinnovate?", "The founder of Oxinnovate is Qi.", ("Qi",)),),
)
STAFF = Fact(
    id="oxinnovate-staff",
    kind="number",
    instruction="Oxinnovate has one people",
    query="How many people in Oxinnovate?",
    answer="Oxinnovate has one people.",
    known_as=("one",),
)


@dataclass(frozen=True)
class Step:
    """One line of the table: a probe, asked after so many facts have been taught."""

    number: int
    taught: int
    fact_id: str
    probe: Probe


def oxinnovate(founder_significance: Sequence[float] | None = None) -> list[Fact]:
    """The two facts of QF. The released script weighs the first answer's words [0, 1, 1, 1, 1]; by default all weigh alike."""
    weights = None if founder_significance is None else tuple(founder_significance)
    return [replace(FOUNDER, significance=weights), LOCATION]


def oxinnovate_qf2(significance: Sequence[Sequence[float]] | None = None) -> list[Fact]:
    """The two facts of QF2. `significance` weighs the words of both answers; by default the editor does.

    The released script has [1, 1, 1, 1, 1, 10] at lr 4e-4, then [1, 1, 20, 20] at lr 1e-4: at one rate of 4e-4 the second
    is [0.25, 0.25, 5, 5], since only lr times significance matters.
    """
    if significance is None:
        return [CEO, STAFF]
    return [replace(f, significance=tuple(w)) for f, w in zip((CEO, STAFF), significance, strict=True)]


def qf2_steps(facts: Sequence[Fact]) -> list[Step]:
    """Table 1 of the QF2 paper, with the queries of the released script, for the two facts of `oxinnovate_qf2`."""
    if len(facts) != 2 or not facts[0].probes:
        raise UserError("the eight steps of QF2 need facts=oxinnovate_qf2: two facts, the first with a probe")
    ceo, staff = facts
    nvidia = Probe("prior", "Who is the CEO of Nvidia?", "The CEO of Nvidia is Jensen Huang.", ("Jensen Huang",))
    return [
        Step(1, 0, ceo.id, Probe("unknown", ceo.query, "Need more information.", reject=ceo.known_as)),
        Step(2, 0, ceo.id, ceo.told),
        Step(3, 0, "nvidia-ceo", nvidia),
        Step(4, 1, ceo.id, ceo.edit),
        Step(5, 1, "nvidia-ceo", nvidia),
        Step(6, 1, ceo.id, ceo.probes[0]),
        Step(7, 2, staff.id, staff.edit),
        Step(8, 2, ceo.id, ceo.probes[0]),
    ]


def qf_steps(facts: Sequence[Fact]) -> list[Step]:
    """Table 1 of the QF paper, with the queries of the released script, for the two facts of `oxinnovate`."""
    if len(facts) != 2 or not all(f.probes for f in facts):
        raise UserError("the eight steps need facts=oxinnovate: two facts, each with one paraphrase")
    founder, location = facts
    alibaba = Probe("prior", "Who started Alibaba?", "Alibaba was started by Jack Ma.", ("Jack Ma",))
    not_yet = Probe("unknown", founder.query, "", reject=founder.known_as)
    return [
        Step(1, 0, founder.id, not_yet),
        Step(2, 0, founder.id, founder.told),
        Step(3, 0, "alibaba-founder", alibaba),
        Step(4, 1, founder.id, founder.edit),
        Step(5, 1, "alibaba-founder", alibaba),
        Step(6, 1, founder.id, founder.probes[0]),
        Step(7, 2, location.id, location.probes[0]),
        Step(8, 2, founder.id, founder.edit),
    ]
