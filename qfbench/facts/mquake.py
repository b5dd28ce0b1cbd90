"""MQuAKE (Zhong et al. 2023): several rewrites that together change the answer to a question of several hops."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.collection import collect
from qfbench.facts.matching import key, stands_in
from qfbench.facts.records import Record
from qfbench.facts.rewrites import check_templates, filled, objects, with_subject

log = logging.getLogger(__name__)

Chain = Mapping[str, Collection[str]]  # of each hop of a question, by its query's key, the keys of what answers it


def mquake(
    path: str,
    instruction: str,
    query: str,
    answer: str,
    n: int | None = None,
    seed: int | None = None,
    on_error: str = "stop",
    on_conflict: str = "stop",
) -> list[Fact]:
    """A fact for each rewrite of the first `n` cases that no earlier case makes, since cases share them; the last one of a
    case carries its multi-hop questions (`portability`), which are asked once all of the case is taught (`needs`).

    In the templates `{question}` is the rewrite's own question, `{cloze}` its statement up to the gap, `{object}` what
    fills it. Aliases count as right, but for those that the old object has too. A multi-hop question of which another case
    rewrites a hop has no right answer once both are taught: a conflict, like two answers to one query; `on_error=skip` does
    not ask it.

    Raises:
        UserError: naming file, record and field.
    """
    check_templates("question", "cloze", "object", needs="object", instruction=instruction, answer=answer)
    check_templates("question", needs="question", query=query)

    chains: dict[tuple[str, str], Chain] = {}  # by a multi-hop question and its answer

    def make(record: Record) -> list[Fact]:
        hops = record.records("new_single_hops")
        aliases = {hop.text("question"): _aliases(hop, "answer_alias") for hop in hops}
        answered = [hop for hop in hops if "answer" in hop.fields()]
        chain = {key(query.format(question=hop.text("question"))): _answers(hop) for hop in answered}
        questions = _questions(record, query)
        chains.update({(probe.query, probe.expected): chain for probe in questions})

        def rewritten(i: int, rewrite: Record) -> Fact:
            question, cloze = rewrite.text("question"), with_subject(rewrite)
            new, old = objects(rewrite)
            return Fact(
                id=f"mquake-{record.key('case_id')}-{i}",
                kind=rewrite.text("relation_id"),
                instruction=filled(instruction, new, question=question, cloze=cloze),
                query=query.format(question=question),
                answer=filled(answer, new, question=question, cloze=cloze),
                known_as=(new, *_without(aliases.get(question, ()), (old,))),
                replaces=filled(answer, old, question=question, cloze=cloze),
                rejects=(old,),
                subject=rewrite.text("subject", breaks="join"),
            )

        *first, last = (rewritten(i, one) for i, one in enumerate(record.records("requested_rewrite")))
        return [*first, replace(last, probes=questions)]

    facts = collect(path, make, n, seed, on_error, on_conflict, join=_once)
    broken = _broken(facts, chains)
    if not broken:
        return facts
    said = f"{path}: {len(broken)} multi-hop questions are without a right answer; the first: {next(iter(broken.values()))}"
    if on_conflict == "keep":
        log.warning("%s; they are kept", said)
        return facts
    if on_error == "stop":
        raise UserError(f"{said}. facts.on_error=skip leaves them out, facts.on_conflict=keep asks them all the same")
    log.warning("%s; they are left out", said)
    return [replace(fact, probes=tuple(p for p in fact.probes if p.query not in broken)) for fact in facts]


def _questions(record: Record, query: str) -> tuple[Probe, ...]:
    """The multi-hop questions of a case, whose answer all of its rewrites change."""
    implied = record.text("new_answer")
    accepted = (implied, *_aliases(record, "new_answer_alias"))
    before = _without((record.text("answer"), *_aliases(record, "answer_alias")), accepted)
    rewrites = record.records("requested_rewrite")
    if not rewrites:
        raise record.error("requested_rewrite", "is empty")
    subjects = [rewrite.text("subject", breaks="join") for rewrite in rewrites]

    def probe(question: str) -> Probe:
        about = next((subject for subject in subjects if stands_in(subject, question)), "")
        return Probe("portability", query.format(question=question), implied, accepted, before, subject=about)

    return tuple(map(probe, record.texts("questions")))


def _broken(facts: Sequence[Fact], chains: Mapping[tuple[str, str], Chain]) -> dict[str, str]:
    """The multi-hop questions with a hop that a taught fact answers otherwise, and in words which."""
    taught = {key(fact.query): fact for fact in facts}
    return {
        probe.query: f"the question {probe.query!r} of {fact.id!r} has a hop that {taught[hop].id!r} answers otherwise"
        for fact in facts
        for probe in fact.probes
        for hop, names in chains[probe.query, probe.expected].items()
        if hop in taught and not {*names} & {*map(key, taught[hop].known_as)}
    }


def _once(case: Sequence[Fact], earlier: Mapping[str, Fact]) -> list[Fact]:
    """A case without the facts that are taught already. Its questions are the last one's, and need all of them."""
    same = {f.id: earlier[f.id] for f in case if f.id in earlier and key(f.answer) == key(earlier[f.id].answer)}
    new = [replace(fact, probes=()) for fact in case if fact.id not in same]
    last = new.pop() if new else same[case[-1].id]
    needed = dict.fromkeys(same[fact.id].id if fact.id in same else fact.id for fact in case)
    needs = tuple(id for id in needed if id != last.id)
    return [*new, replace(last, probes=(*last.probes, *(replace(p, needs=needs) for p in case[-1].probes)))]


def _answers(hop: Record) -> set[str]:
    """The keys of all that answers a single hop."""
    return {key(name) for name in (hop.text("answer"), *hop.texts("answer_alias"))}


def _aliases(record: Record, field: str) -> tuple[str, ...]:
    """Aliases but for codes of one or two letters ("en"), which stand in replies that mean something else."""
    return tuple(alias for alias in record.texts(field) if len(alias) > 2)


def _without(names: Sequence[str], others: Sequence[str]) -> tuple[str, ...]:
    taken = set(map(key, others))
    return tuple(name for name in names if key(name) not in taken)
