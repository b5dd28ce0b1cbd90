"""zsRE in the schema of MEND's evaluation set (Mitchell et al. 2022): a question, another wording, an unrelated question."""

from __future__ import annotations

from qfbench.facts.base import Fact, Probe
from qfbench.facts.matching import key
from qfbench.facts.records import Record, check_templates, load

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

    The unrelated question (`loc`, of Natural Questions) is a locality probe: the reference is what the unedited model
    itself replies, and `loc_ans` is its gold.

    Raises:
        UserError: naming file, record and field.
    """

    check_templates("question", "object", needs="object", instruction=instruction, answer=answer)
    check_templates("question", needs="question", query=query)

    def make(record: Record) -> list[Fact]:
        question, new, old = record.text("src"), record.text("alt"), record.text("pred")
        asked, said = query.format(question=question), answer.format(question=question, object=new)
        replaces = answer.format(question=question, object=old)
        rephrased, unrelated = record.text("rephrase"), record.text("loc").removeprefix(PREFIX).strip()
        if not unrelated.removesuffix("?"):
            raise record.error("loc", "holds no question")
        unrelated = unrelated[0].upper() + unrelated[1:].removesuffix("?") + "?"
        rejected = tuple(record.texts("answers"))
        if key(new) in map(key, (old, *rejected)):
            raise record.error("alt", f"is {new!r}, which 'pred' or 'answers' say too: nothing is rewritten")
        subject = record.text("subject") if "subject" in record.fields() else ""
        return [
            Fact(
                id=f"zsre-{record.number}",
                instruction=instruction.format(question=question, object=new),
                query=asked,
                answer=said,
                known_as=(new,),
                replaces=replaces,
                rejects=rejected,
                subject=subject,
                probes=(
                    Probe(
                        "paraphrase",
                        query.format(question=rephrased),
                        said,
                        (new,),
                        rejected,
                        prefer=(said, replaces),
                        subject=subject,
                    ),
                    Probe(
                        "locality",
                        query.format(question=unrelated),
                        "",
                        (record.text("loc_ans"),),
                        always=True,
                        own=True,
                    ),
                ),
            )
        ]

    return load(path, make, n, seed, on_error, on_conflict)
