"""Probes that need several facts: asked once all of them are taught, whatever the order."""

from dataclasses import replace
from itertools import permutations

import pytest
from notebook import Notebook, prepared, untabled
from test_mquake import mquake_record

from qfbench import Probe
from qfbench.editors.regimes import joint, sequential, single
from qfbench.tasks.baseline import baseline
from qfbench.tasks.retention import in_order
from qfbench.tasks.teaching import Teaching

QUERY = "Who started Firm0 and Firm1?"


def needing(run, holder="1", needs=("0",)):
    """A question that follows from the first two facts; the third is apart."""
    probe = Probe("portability", QUERY, "Ada and Bo.", needs=needs)
    run.facts[:] = [replace(f, probes=(*f.probes, probe)) if f.id == holder else f for f in run.facts]
    return run


def asked(rows):
    """At which steps the question is asked, and whether as a fresh one."""
    own = rows[(rows.condition == "edited") & (rows["query"] == QUERY)]
    return dict(zip(own.step, own.fresh, strict=True))


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("holder", ["0", "1"])
def test_it_is_asked_when_all_are_taught_and_fresh_where_the_newest_is_one_of_them(tmp_path, holder, every):
    for order in map("".join, permutations("012")):
        (tmp_path / order).mkdir()
        run = needing(prepared(tmp_path / order), holder, ("1",) if holder == "0" else ("0",))
        facts, always = baseline(run)
        by_id = {f.id: f for f in facts}
        at = {*range(every, 4, every)}
        Teaching(run, "sequential", sequential, [by_id[i] for i in order], always, at).run(lambda *about, **more: None)
        complete = max(order.index("0"), order.index("1")) + 1  # the edit that brings the last of the two
        assert asked(run.rows()) == {complete: True} | ({3: False} if complete < 3 else {}), order


def test_of_single_edits_it_is_never_asked_and_of_joint_ones_it_is(tmp_path):
    run = needing(prepared(tmp_path))
    untabled(run, single, joint)
    rows = run.rows()
    assert asked(rows[rows.regime == "single"]) == {}
    assert asked(rows[rows.regime == "joint"]) == {2: True, 3: False}
    before = rows[rows["query"] == QUERY].groupby("condition").size()
    assert before[["unedited", "in_context"]].tolist() == [1, 1]


def test_in_context_it_is_told_the_instructions_of_all_and_others_their_own(tmp_path):
    run = needing(prepared(tmp_path), "1", ("0",))
    untabled(run, sequential)
    rows = run.rows()
    told = rows[rows.condition == "in_context"]
    assert list(told.system[told["query"] == QUERY]) == ["Ada started Firm0. Bo started Firm1."]
    assert set(told.system[told["query"] != QUERY]) == {f.instruction for f in run.facts}
    assert set(rows.system[rows.condition != "in_context"]) == {""}


def test_what_needs_a_fact_that_is_left_out_is_not_asked(tmp_path):
    run = needing(prepared(tmp_path, deaf=("0",)))
    untabled(run, sequential)
    assert asked(run.rows()) == {}


def test_the_questions_of_an_mquake_case_wait_for_all_of_it_in_every_order(tmp_path, suite, write):
    facts = suite("mquake", write([mquake_record(1), mquake_record(2)]))
    run = replace(prepared(tmp_path), facts=facts, lm=Notebook(facts))
    untabled(run, sequential, orders=6)
    rows = run.rows()
    hops = rows[(rows.condition == "edited") & (rows.kind == "portability")]
    ends = set()
    for order in range(6):
        ids = [f.id for f in in_order(facts, order)]
        own = hops[hops.order == order]
        for case in ("mquake-201", "mquake-202"):
            complete = max(step for step, i in enumerate(ids, 1) if i.startswith(case))
            of_case = own[own.fact_id == f"{case}-1"]
            assert set(of_case.step) == {complete, 4}
            assert set(of_case.step[of_case.fresh]) == {complete}
            assert of_case.groupby("step").size().tolist() == [2] * of_case.step.nunique()
            ends.add((complete, ids.index(f"{case}-1") + 1 == complete))
    assert {fresh for _, fresh in ends} == {True, False}  # the carrier of the questions came last, and did not
