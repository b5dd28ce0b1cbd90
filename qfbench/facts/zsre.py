"""zsRE in the schema of MEND's evaluation set (Mitchell et al. 2022): a question, another wording, an unrelated question."""

from __future__ import annotations

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

    What it replaces is the first of `answers`, which are the truth. `pred` is not used: it is what some model said.

    The unrelated question (`loc`, of Natural Questions) is a locality probe: the reference is what the unedited model
    itself replies, and `loc_ans` is its gold.

    Raises:
        UserError: naming file, record and field.
    """
    check_templates("question", "object", needs="object", instruction=instruction, answer=answer)
    check_templates("question", needs="question", query=query)

    def make(record: Record) -> list[Fact]:
        question, new = record.text("src"), record.text("alt")
        rephrased, unrelated = record.text("rephrase"), _unrelated(record)
        rejects = tuple(record.texts("answers"))
        if key(new) in map(key, rejects):
            raise record.error("alt", f"is {new!r}, which 'answers' say too: nothing is rewritten")
        subject = record.text("subject") if "subject" in record.fields() else ""
        said, *old = (filled(answer, question=question, object=name) for name in (new, *rejects[:1]))
        other, elsewhere = query.format(question=rephrased), query.format(question=unrelated)
        paraphrase = Probe(
            "paraphrase", other, said, (new,), rejects, prefer=(said, old[0]) if old else None, subject=subject
        )
        locality = Probe("locality", elsewhere, "", (record.text("loc_ans"),), always=True, own=True)
        fact = Fact(
            id=f"zsre-{record.number}",
            instruction=filled(instruction, question=question, object=new),
            query=query.format(question=question),
            answer=said,
            known_as=(new,),
            replaces="".join(old),
            rejects=rejects,
            subject=subject,
            probes=(paraphrase, locality),
        )
        return [fact]

    return collect(path, make, n, seed, on_error, on_conflict)


def _unrelated(record: Record) -> str:
    """The question of Natural Questions: a sentence with its question mark."""
    question = record.text("loc").removeprefix(PREFIX).strip().removesuffix("?")
    if not question:
        raise record.error("loc", "holds no question")
    return question[0].upper() + question[1:] + "?"
