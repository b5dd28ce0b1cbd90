"""CounterFact (Meng et al. 2022), in the full schema of ROME: a cloze, its paraphrases, and neighbours with the old object."""

from __future__ import annotations

from qfbench.facts.base import Fact, Probe
from qfbench.facts.records import Record, check_counts, check_templates, load, objects, with_subject


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
    check_counts(paraphrases=paraphrases, locality=locality)

    def said(cloze: str, object: str) -> str:
        return answer.format(cloze=cloze, object=object)

    def make(record: Record) -> list[Fact]:
        rewrite = record.record("requested_rewrite")
        cloze = with_subject(rewrite)
        subject, (new, old) = rewrite.text("subject", breaks="join"), objects(rewrite)
        probes = [
            Probe(
                "paraphrase",
                query.format(cloze=c),
                said(c, new),
                (new,),
                (old,),
                prefer=(said(c, new), said(c, old)),
                subject=subject,
            )
            for c in record.texts("paraphrase_prompts", breaks="join")[:paraphrases]
        ]
        probes += [
            Probe(
                "locality",
                query.format(cloze=c),
                "",
                (old,),
                always=True,
                own=True,
                prefer=(said(c, old), said(c, new)),
            )
            for c in record.texts("neighborhood_prompts", breaks="join")[:locality]
        ]
        return [
            Fact(
                id=f"counterfact-{record.key('case_id')}",
                kind=rewrite.text("relation_id"),
                instruction=instruction.format(cloze=cloze, object=new),
                query=query.format(cloze=cloze),
                answer=said(cloze, new),
                known_as=(new,),
                replaces=said(cloze, old),
                rejects=(old,),
                subject=subject,
                probes=tuple(probes),
            )
        ]

    return load(path, make, n, seed, on_error, on_conflict)
