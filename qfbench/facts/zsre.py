"""zsRE in the schema of MEND's evaluation set (Mitchell et al. 2022): a question, another wording, an unrelated question."""

from __future__ import annotations

from dataclasses import replace

from qfbench.facts.base import Fact, Probe
from qfbench.facts.collection import collect
from qfbench.facts.matching import key
from qfbench.facts.records import Record
from qfbench.facts.rewrites import check_templates, filled

PREFIX = "nq question:"  # what the released files put before an unrelated question


def zsre(
    path: str,
    instruction: str,
    query: str,
    answer: str,
    n: int | None = None,
    seed: int | None = None,
    on_error: str = "stop",
    on_conflict: str = "stop",
) -> list[Fact]:
    """One fact a record: `alt`, the counterfactual answer to `src`. In the templates `{question}` is asked, `{object}` answers.

    `answers` are the true ones: a reply that names one is wrong, and `preferred` compares with the first. A record whose
    `alt` is among them is refused. `pred`, what a model of MEND's replied, is not used: mostly it is not true.

    The unrelated question (`loc`, of Natural Questions) is a locality probe: the reference is what the unedited model
    itself replies, and `loc_ans` is its gold.

    Raises:
        UserError: naming file, record and field.
    """
    check_templates("question", "object", needs="object", instruction=instruction, answer=answer)
    check_templates("question", needs="question", query=query)

    def make(record: Record) -> list[Fact]:
        question, new, true = record.text("src"), record.text("alt"), tuple(record.texts("answers"))
        if key(new) in map(key, true):
            raise record.error("alt", f"is {new!r}, which 'answers' hold too: it is true, and nothing is rewritten")
        fact = Fact(
            id=f"zsre-{record.number}",
            instruction=filled(instruction, new, question=question),
            query=query.format(question=question),
            answer=filled(answer, new, question=question),
            known_as=(new,),
            replaces=filled(answer, true[0], question=question) if true else "",
            rejects=true,
            subject=record.text("subject") if "subject" in record.fields() else "",
        )
        paraphrase = replace(fact.edit, kind="paraphrase", query=query.format(question=record.text("rephrase")))
        elsewhere = query.format(question=_unrelated(record))
        locality = Probe("locality", elsewhere, "", (record.text("loc_ans"),), always=True, own=True)
        return [replace(fact, probes=(paraphrase, locality))]

    return collect(path, make, n, seed, on_error, on_conflict)


def _unrelated(record: Record) -> str:
    """The question of Natural Questions: a sentence with its question mark."""
    question = record.text("loc").removeprefix(PREFIX).strip().removesuffix("?")
    if not question:
        raise record.error("loc", "holds no question")
    return question[0].upper() + question[1:] + "?"
