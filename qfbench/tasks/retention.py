"""Teach facts one after another; at checkpoints ask again about all of them, about prior knowledge, and about nothing."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pandas as pd

from qfbench.analysis.drops import by_subject, drops, power
from qfbench.analysis.measures import KEPT, compared, summary
from qfbench.analysis.plots import forgetting_curves, retention_matrices
from qfbench.analysis.sequences import COLLAPSED, forgetting, matrices, middle, over_sequence, what_is_left
from qfbench.analysis.tables import HIDDEN
from qfbench.editors.regimes import Regime, accumulates
from qfbench.errors import Unsupported, UserError
from qfbench.facts.base import Fact, Probe
from qfbench.facts.matching import stands_in
from qfbench.facts.probes import Row, ask, instructed
from qfbench.models.delta import WeightDelta
from qfbench.runs.cache import remembered
from qfbench.runs.folder import recorded
from qfbench.tasks.run import Run

Asked = list[tuple[Fact, Probe]]


def retention(
    run: Run,
    regimes: Mapping[str, Regime],
    every: int | None = 1,
    orders: int = 1,
    at_most: int | None = None,
    placebo: int = 1,
    stop_on_collapse: bool = False,
    not_understood: str = "leave_out",
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Run every regime over the run's facts, and over the same facts what is to stand `beside` it.

    Each fact is asked in all its wordings right after its own edit; all facts so far, prior knowledge, neighbours and
    unknown subjects at the checkpoints: at every `every`-th edit and after the last (None: see `checkpoints`).

    Args:
        at_most: how many probes of each kind that do not depend on what is taught (prior knowledge, neighbours, unknown
            subjects) to ask at a checkpoint: the first of each kind; None asks all.
        orders: how many orders of the facts to teach: as given, then permutations seeded 1, 2 ...
        placebo: how many times to ask everything once more after the last edit, under a random change of the same rank and norm.
        stop_on_collapse: end a regime once prior knowledge has fallen under half.
        not_understood: `leave_out` the facts that the model does not answer even when told, or `teach` them as well.
        beside: each entry holds a `model`, an `editor` and its `regimes`.
    """
    if orders < 1:
        raise UserError(f"task.retention.orders={orders}: must be 1 or more")
    if placebo < 0:
        raise UserError(f"task.retention.placebo={placebo}: must be 0 or more")
    if not_understood not in ("leave_out", "teach"):
        raise UserError(f"task.retention.not_understood={not_understood}: must be leave_out or teach")
    beside = beside or {}
    entrants = run.beside(beside)
    for entrant, its_regimes in zip(entrants, [regimes, *(e["regimes"] for e in beside.values())], strict=True):
        facts, always = baseline(entrant, not_understood == "teach")
        always = [pair for n, pair in _numbered(always) if at_most is None or n < at_most]
        at = checkpoints(len(facts), every)
        with run.progress(len(facts) * len(its_regimes) * orders) as advance:
            for order, name in product(range(orders), its_regimes):
                about = {"order": order} if orders > 1 else {}
                # All facts are put in order, so that it is the same for entrants that understand different ones.
                taught, regime = [f for f in in_order(run.facts, order) if f in facts], its_regimes[name]
                teach(entrant, name, regime, taught, always, at, advance, about, placebo, stop_on_collapse)
    rows = run.rows()
    if (rows.condition == "edited").any():
        report(run, rows, "; ".join(entrant.title for entrant in entrants))


def report(run: Run, rows: pd.DataFrame, title: str) -> None:
    """Tables and figures of a run's rows: the summary, differences of regimes and editors, the measures of whole sequences,
    curves and retention matrices."""
    table, against = summary(rows), compared(rows)
    several = len(table[["model", "editor"]].drop_duplicates())
    same = [] if several > table.editor.nunique() else ["model"]
    same += ["editor"] if several == 1 else []
    over = "facts and orders" if "order" in rows else "facts"
    run.table(table, f"{len(run.facts)} facts, one after another: {title} (± 95% over {over})", hidden=[*same, *HIDDEN])
    if len(against):
        first = against.iloc[0]
        printed = against.drop(columns=[c for c in against if c.endswith("_of")])
        run.table(
            against,
            f"Differences from {first.editor_of} {first.regime_of}, same facts and orders (~: may be none)",
            hidden=[*same, *HIDDEN, "facts"],
            name="compared",
            printed=printed,
        )
    lost = drops(rows)
    if len(lost):
        run.table(lost, f"General ability: {power(lost)}", hidden=[*same, "of"], name="regression")
        run.keep(by_subject(rows), "regression_subjects")
    sequences = over_sequence(rows)
    if len(sequences):
        printed = middle(sequences).drop(columns=[*same, "edits", "immediate", "final"])
        run.table(sequences, "", name="sequences", printed=printed)
        run.figure(forgetting_curves(forgetting(rows), rows), "forgetting_curves")
        run.figure(retention_matrices(matrices(rows)), "retention_matrix")


def checkpoints(n: int, every: int | None, dense: int = 50, ratio: float = 1.2) -> set[int]:
    """The edits after which all is asked, of 1 to `n`: each `every`-th and the last; None: each up to `dense`, then ever fewer."""
    if every is not None and every < 1:
        raise UserError(f"task.retention.every={every}: must be 1 or more, or null")
    if every is not None:
        return {*range(every, n + 1, every), n}
    steps, step = set(range(1, min(n, dense) + 1)), float(dense)
    while (step := step * ratio) < n:
        steps.add(round(step))
    return steps | {n}


def _numbered(asked: Asked) -> Iterator[tuple[int, tuple[Fact, Probe]]]:
    """Each probe with its number among those of its kind, from 0."""
    seen: Counter[str] = Counter()
    for fact, probe in asked:
        yield seen[probe.kind], (fact, probe)
        seen[probe.kind] += 1


def in_order(facts: Sequence[Fact], order: int) -> list[Fact]:
    """The facts as given (order 0), or a permutation of them."""
    return list(facts) if order == 0 else random.Random(f"order-{order}").sample(list(facts), len(facts))


def baseline(run: Run, all_of_them: bool = False) -> tuple[list[Fact], Asked]:
    """Ask everything of the unedited model, without and with each fact's instruction (`unedited`, `in_context`).

    Returns the facts that it understands when told, and the probes about the model itself that it passes unedited (in float16 or
    bfloat16 `repeated`), the reference of its `own` ones filled in. A fact that is not understood is reported and, but for `all_of_them`, left out,
    since editing it would measure comprehension.
    """
    own = [(f, p) for f in run.facts for p in (f.edit, *f.probes) if not p.always]
    told = instructed(run.facts)
    always = [(f, p) for f in run.facts for p in f.probes if p.always]
    by_own = iter(run.ask_unedited([replace(p, expected="", prefer=None) for _, p in always if p.own]))
    always = [(f, replace(p, expected=next(by_own)["reply"]) if p.own else p) for f, p in always]
    passed, measured = {}, []
    for condition, asked in (("unedited", own + always), ("in_context", told)):
        rows = run.ask_unedited([p for _, p in asked])
        for (fact, _), row in zip(asked, rows, strict=True):
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
    again = repeated(run, [p for _, p in always], itself)
    understood = {f.id for f, p in passed["in_context"] if p.kind == "edit"}
    facts = [f for f in run.facts if f.id in understood or all_of_them]
    if len(understood) < len(run.facts):
        what = "they are taught all the same" if all_of_them else "they are left out"
        run.warn(f"not_understood: {len(run.facts) - len(understood)} of {len(run.facts)} facts; {what}")
    if not facts:
        run.table(summary(run.rows()), f"{len(run.facts)} facts: {run.lm.name}", hidden=["model", "editor", *HIDDEN])
        raise UserError(f"{run.lm.name} answers none of the facts even when told them: there is nothing to teach")
    return facts, [pair for pair, row, twice in zip(always, itself, again, strict=True) if row["generated"] and twice]


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


def teach(
    run: Run,
    name: str,
    regime: Regime,
    facts: Sequence[Fact],
    always: Asked,
    at: Collection[int],
    advance: Callable[[str], None],
    about: Mapping[str, Any] | None = None,
    placebo: int = 0,
    stop_on_collapse: bool = False,
) -> None:
    """Run one regime, check at its checkpoints, and save its last change. An `Unsupported` becomes a row.

    Collapse (of prior knowledge, neighbours, refusals: under half of what it was) is announced where it is first seen.

    `about` are columns of every row, and part of the name of the file that the change is saved in. What an earlier process did
    of this is not done again.
    """
    editor, about = run.editor, {"layer": run.editor.sites[0].layer} | dict(about or {})
    sequence = accumulates(regime)
    earlier = run.earlier(regime=name, **about)
    edited, draws = earlier[earlier.condition == "edited"], set(earlier.draw[earlier.condition == "placebo"])
    file = run.place + "-".join([run.editor_name, name, *(f"{key}{value}" for key, value in about.items())])
    done = int(edited.step.max()) if len(edited) else 0
    total, state = WeightDelta(), run.state(file, done)
    key = f"{run.task}/{file}"
    if key in run.store.ended:
        return
    if done and sequence:
        try:
            total = WeightDelta.load(state, editor.sites[0].home(run.lm.model))
        except UserError as error:
            run.warn(f"{error}; {name} is measured again")
            run.forget(earlier.index)
            edited, draws, done = edited[:0], set(), 0
    taught = facts[:done]
    fallen = {measure for measure, share in what_is_left(edited).items() if sequence and (share < COLLAPSED).any()}
    for _ in taught:
        advance(f"{name}: done before")
    try:
        rest = facts if not (stop_on_collapse and "prior" in fallen) else taught
        for taught, total in regime(editor, run.lm, rest, done, total):  # noqa: B020 (where it begins)
            step = done + 1
            kept = check(run, name, about, step, taught, total, always, step in at, step == len(facts))
            done = step
            advance(f"{name}: edit {done}")
            for measure, share in kept.items() if sequence else ():
                if share < COLLAPSED and measure not in fallen:
                    fallen.add(measure)
                    run.warn(f"{name}: collapse after {step} edits: {measure} at {share:.2f}")
            if step in at:
                run.commit(file, done, total if sequence else None)
            if stop_on_collapse and "prior" in fallen:
                break
        for draw in range(placebo if done and sequence else 0):
            if draw in draws:
                continue
            other, last = total.placebo(seed=1_000_000 * about.get("order", 0) + 1000 * draw), done == len(facts)
            check(run, name, about | {"draw": draw}, done, taught, other, always, True, last, condition="placebo")
            run.commit(file, done, total)
    except Unsupported as error:
        run.log({"condition": "unsupported", "regime": name, "reply": str(error)} | about)
        run.warn(f"{name}: {error}")
    except FloatingPointError as error:
        raise FloatingPointError(f"{name}, after {done} edits: {error}") from error
    if done and sequence:
        run.save(total, file)
    run.store.ended.append(key)


def check(
    run: Run,
    regime: str,
    about: Mapping[str, Any],
    step: int,
    taught: Sequence[Fact],
    total: WeightDelta,
    always: Asked,
    checkpoint: bool,
    last: bool,
    condition: str = "edited",
) -> dict[str, float]:
    """Ask after one edit: the newest fact in all its wordings, and what follows from it and earlier ones; at a checkpoint all
    taught queries, `always` and general ability; at last all.

    Returns the shares that are left of what the unedited model had (`metrics.KEPT`); nothing of what was not asked.
    """
    newest, ids = taught[-1], {f.id for f in taught}
    own = [(f, p) for f in taught for p in (f.edit, *f.probes) if not p.always and ids.issuperset(p.needs)]
    new = [newest.id in (f.id, *p.needs) for f, p in own]
    asked = [pair for pair, fresh in zip(own, new, strict=True) if fresh]
    n_fresh = len(asked)
    if checkpoint or last:
        asked += [(f, p) for (f, p), fresh in zip(own, new, strict=True) if not fresh and (last or p.kind == "edit")]
        asked += always
    same: dict[str, Any] = {
        "regime": regime,
        "condition": condition,
        "step": step,
        "taught": len(taught),
        "checkpoint": checkpoint or last,
    }
    same |= dict(about) | run.health(total, whole=checkpoint or last)
    with total.applied_to(run.lm):
        rows = ask(run.lm, [p for _, p in asked])
        general = list(run.general()) if checkpoint or last else []
    answers = {known for fact in taught for known in fact.known_as}
    for i, ((fact, probe), row) in enumerate(zip(asked, rows, strict=True)):
        row["fresh"] = i < n_fresh
        row["leaked"] = probe.kind == "unknown" and any(stands_in(known, row["reply"]) for known in answers)
        run.log(row, fact_id=fact.id, fact_kind=fact.kind, **same)
    for row in general:
        run.log(row, fresh=False, leaked=False, **same)
    left: dict[str, list[bool]] = {}
    for (_, probe), row in zip(asked, rows, strict=True):
        if probe.kind in KEPT:
            left.setdefault(KEPT[probe.kind], []).append(row["generated"])
    return {measure: sum(passed) / len(passed) for measure, passed in left.items()}
