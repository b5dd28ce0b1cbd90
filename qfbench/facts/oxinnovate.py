"""The facts of the QF paper and its released script, and the eight steps that check them (Table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Step:
    """One line of the table: a probe, asked after so many facts have been taught."""

    number: int
    taught: int
    probe: Probe


def oxinnovate(founder_significance: Sequence[float] | None = None) -> list[Fact]:
    """The two facts. The released script weighs the first answer's words [0, 1, 1, 1, 1]; by default all weigh alike."""
    weights = None if founder_significance is None else tuple(founder_significance)
    return [replace(FOUNDER, significance=weights), LOCATION]


def qf_steps(facts: Sequence[Fact]) -> list[Step]:
    """Table 1 of the QF paper, with the queries of the released script, for the two facts of `oxinnovate`."""
    founder, location = facts
    ask_founder, (person_behind,) = founder.edit, founder.probes
    (where,) = location.probes
    alibaba = Probe("prior", "Who started Alibaba?", "Alibaba was started by Jack Ma.", ("Jack Ma",))
    not_yet = Probe("unknown", founder.query, "", reject=founder.known_as)
    return [
        Step(1, 0, not_yet),
        Step(2, 0, founder.told),
        Step(3, 0, alibaba),
        Step(4, 1, ask_founder),
        Step(5, 1, alibaba),
        Step(6, 1, person_behind),
        Step(7, 2, where),
        Step(8, 2, ask_founder),
    ]
