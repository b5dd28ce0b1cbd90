"""What the unedited model says: the floor, the ceiling, what it understands when told, and what it knows and may lose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from qfbench.analysis.measures import summary
from qfbench.analysis.tables import HIDDEN, named
from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.probes import Row, ask, instructed
from qfbench.runs.cache import remembered
from qfbench.runs.folder import recorded
from qfbench.tasks.run import Run

Asked = list[tuple[Fact, Probe]]


def baseline(run: Run, all_of_them: bool = False) -> tuple[list[Fact], Asked]:
    """Ask everything of the unedited model, without and with each fact's instruction (`unedited`, `in_context`).

    Returns the facts that it understands when told, and the probes about the model itself that it passes unedited (in float16 or
    bfloat16 `repeated`), the reference of its `own` ones filled in. A fact that is not understood is named and, but for
    `all_of_them`, left out, since editing it would measure comprehension. An `own` probe that is answered otherwise the second
    time has no row.
    """
    own = [(f, p) for f in run.facts for p in (f.edit, *f.probes) if not p.always]
    told = instructed(run.facts)
    always = [(f, p) for f in run.facts for p in f.probes if p.always]
    by_own = iter(run.ask_unedited([replace(p, expected="", prefer=None) for _, p in always if p.own]))
    always = [(f, replace(p, expected=next(by_own)["reply"]) if p.own else p) for f, p in always]
    passed, measured = {}, []
    for condition, asked in (("unedited", own + always), ("in_context", told)):
        rows = run.ask_unedited([p for _, p in asked])
        for (fact, probe), row in zip(asked, rows, strict=True):
            if row["generated"] or not probe.own:
                measured.append(row | {"condition": condition, "step": 0, "fact_id": fact.id, "fact_kind": fact.kind})
        passed[condition] = [pair for pair, row in zip(asked, rows, strict=True) if row["generated"]]
        if condition == "unedited":
            itself = rows[len(own) :]
    if run.earlier(condition="unedited").empty:
        for row in measured:
            run.log(row)
        for row in run.general(unedited=True):
            run.log(row, condition="unedited", step=0)
        run.commit()
    _tell_of_own([row for (_, p), row in zip(always, itself, strict=True) if p.own], run)
    again = repeated(run, [p for _, p in always], itself)
    understood = {f.id for f, p in passed["in_context"] if p.kind == "edit"}
    facts = [f for f in run.facts if f.id in understood or all_of_them]
    if len(understood) < len(run.facts):
        what = "they are taught all the same" if all_of_them else "they are left out"
        lost = [f"{f.query} ({f.id})" for f in run.facts if f.id not in understood]
        run.warn(f"not_understood: {len(lost)} of {len(run.facts)} facts; {what}: {named(lost)}")
    if not facts:
        run.table(summary(run.rows()), f"{len(run.facts)} facts: {run.lm.name}", hidden=["model", "editor", *HIDDEN])
        raise UserError(f"{run.lm.name} answers none of the facts even when told them: there is nothing to teach")
    return facts, [pair for pair, row, twice in zip(always, itself, again, strict=True) if row["generated"] and twice]


def _tell_of_own(rows: Sequence[Row], run: Run) -> None:
    """What a user should know of replies that neighbours are held against."""
    cut, changed = (sum(not row[column] for row in rows) for column in ("stopped", "generated"))
    if cut:
        run.warn(
            f"{cut} of {len(rows)} neighbours: {run.lm.name} does not end its reply within model.max_new_tokens="
            f"{run.lm.max_new_tokens}; what it says until then is compared (locality_stopped)"
        )
    if changed:
        run.warn(
            f"{changed} of {len(rows)} neighbours: {run.lm.name} answers them otherwise in other batches; left out"
        )


def repeated(run: Run, probes: Sequence[Probe], before: Sequence[Row]) -> list[bool]:
    """Of each probe about the model itself, whether it passes in other batches as well; `before` are its replies so far.

    In two bytes a number, what else stands in the batch decides a reply here and there. Where it decides whether a probe passes,
    the probe measures no edit, and would count against each; the share of replies that stay the same is kept in the provenance.
    """
    if run.lm.dtype.itemsize > 2 or run.lm.batch_size == 1 or not probes:
        return [True] * len(probes)
    other = replace(run.lm, batch_size=run.lm.batch_size // 2)
    protocol = dict(run.protocol) | {"batch_size": other.batch_size}
    rows = remembered(run.cache, protocol, probes, lambda: ask(other, probes))
    share = sum(a["reply"] == b["reply"] for a, b in zip(before, rows, strict=True)) / len(rows)
    lost = sum(a["generated"] and not b["generated"] for a, b in zip(before, rows, strict=True))
    run.warn(
        f"{run.lm.name} in {str(run.lm.dtype).removeprefix('torch.')}, asked again in batches of {other.batch_size}: {share:.1%} "
        f"of its replies are the same; left out, since it fails them then: {lost}"
    )
    known = recorded(run.folder)
    known.setdefault("self_agreement", {})[run.lm.name] = share
    run.store.ledger.write_json("provenance.json", known)
    return [row["generated"] for row in rows]
