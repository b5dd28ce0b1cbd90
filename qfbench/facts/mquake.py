"""MQuAKE (Zhong et al. 2023): several rewrites that together change the answer to a question of several hops."""

from __future__ import annotations

from qfbench.facts.base import Fact, Probe
from qfbench.facts.records import Record, check_templates, load, with_subject


def mquake(
    path: str,
    instruction: str,
    query: str,
    answer: str,
    n: int | None = None,
    seed: int | None = None,
    on_error: str = "stop",
) -> list[Fact]:
    """A fact for each rewrite of the first `n` cases; the last one of a case carries its multi-hop questions (`portability`),
    which are asked once all of the case is taught.

    In the templates `{question}` is the rewrite's own question, `{cloze}` its statement up to the gap, `{object}` what
    fills it. Aliases count as right.

    Raises:
        UserError: naming file, record and field.
    """

    check_templates("question", "cloze", "object", needs="object", instruction=instruction, answer=answer)
    check_templates("question", needs="question", query=query)

    def make(record: Record) -> list[Fact]:
        aliases = {hop.text("question"): _aliases(hop, "answer_alias") for hop in record.records("new_single_hops")}
        implied = record.text("new_answer")
        accepted = (implied, *_aliases(record, "new_answer_alias"))
        before = tuple(a for a in (record.text("answer"), *_aliases(record, "answer_alias")) if a not in accepted)
        rewrites = record.records("requested_rewrite")
        if not rewrites:
            raise record.error("requested_rewrite", "is empty")
        ids = [f"mquake-{record.key('case_id')}-{i}" for i in range(len(rewrites))]
        hops = tuple(
            Probe("portability", query.format(question=q), implied, accepted, before, needs=tuple(ids[:-1]))
            for q in record.texts("questions")
        )
        facts = []
        for i, rewrite in enumerate(rewrites):
            question, cloze = rewrite.text("question"), with_subject(rewrite)
            new, old = (rewrite.record(f"target_{which}").text("str") for which in ("new", "true"))
            facts.append(
                Fact(
                    id=ids[i],
                    kind=rewrite.text("relation_id"),
                    instruction=instruction.format(question=question, cloze=cloze, object=new),
                    query=query.format(question=question),
                    answer=answer.format(question=question, cloze=cloze, object=new),
                    known_as=(new, *aliases.get(question, ())),
                    replaces=answer.format(question=question, cloze=cloze, object=old),
                    rejects=(old,),
                    probes=hops if i == len(rewrites) - 1 else (),
                )
            )
        return facts

    return load(path, make, n, seed, on_error)


def _aliases(record: Record, field: str) -> tuple[str, ...]:
    """Aliases but for codes of one or two letters ("en"), which stand in replies that mean something else."""
    return tuple(alias for alias in record.texts(field) if len(alias) > 2)
