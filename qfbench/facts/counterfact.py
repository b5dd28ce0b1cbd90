"""CounterFact (Meng et al. 2022), in the full schema of ROME: a cloze, its paraphrases, and neighbours with the old object."""

from __future__ import annotations

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.collection import collect
from qfbench.facts.records import Record
from qfbench.facts.rewrites import check_templates, filled, objects, with_subject


def counterfact(
    path: str,
    instruction: str,
    query: str,
    answer: str,
    n: int | None = None,
    seed: int | None = None,
    paraphrases: int = 2,
    locality: int = 5,
    on_error: str = "stop",
    on_conflict: str = "stop",
) -> list[Fact]:
    """One fact a record. In the templates `{cloze}` is a text with a gap at its end and `{object}` what fills it.
    Clozes are put on one line: paraphrases have line breaks, at which a prompt without a chat template would end the turn.

    Neighbours (`neighborhood_prompts`) share the relation and have the old object: after the edit the model should say of
    them what it said before. `generation_prompts` are not used: they have no right answer.

    Raises:
        UserError: naming file, record and field.
    """
    check_templates("cloze", "object", needs="object", instruction=instruction, answer=answer)
    check_templates("cloze", needs="cloze", query=query)
    for name, count in (("paraphrases", paraphrases), ("locality", locality)):
        if count < 0:
            raise UserError(f"facts.{name}={count}: must be 0 or more")

    def said(cloze: str, object: str) -> str:
        return filled(answer, object, cloze=cloze)

    def make(record: Record) -> list[Fact]:
        rewrite = record.record("requested_rewrite")
        statement = with_subject(rewrite)
        subject, (new, old) = rewrite.text("subject", breaks="join"), objects(rewrite)

        def paraphrase(cloze: str) -> Probe:
            asked, right, wrong = query.format(cloze=cloze), said(cloze, new), said(cloze, old)
            return Probe("paraphrase", asked, right, (new,), (old,), prefer=(right, wrong), subject=subject)

        def neighbour(cloze: str) -> Probe:
            asked, right, wrong = query.format(cloze=cloze), said(cloze, old), said(cloze, new)
            return Probe("locality", asked, "", (old,), always=True, own=True, prefer=(right, wrong))

        others = record.texts("paraphrase_prompts", breaks="join")[:paraphrases]
        neighbours = record.texts("neighborhood_prompts", breaks="join")[:locality]
        fact = Fact(
            id=f"counterfact-{record.key('case_id')}",
            kind=rewrite.text("relation_id"),
            instruction=filled(instruction, new, cloze=statement),
            query=query.format(cloze=statement),
            answer=said(statement, new),
            known_as=(new,),
            replaces=said(statement, old),
            rejects=(old,),
            subject=subject,
            probes=(*map(paraphrase, others), *map(neighbour, neighbours)),
        )
        return [fact]

    return collect(path, make, n, seed, on_error, on_conflict)
