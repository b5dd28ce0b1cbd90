"""Neighbours, whose reference is what the unedited model itself says: unedited they all pass, whatever it says."""

import math
from dataclasses import dataclass, replace

import pytest
from notebook import Note, Notebook, prepared, suite, untabled
from rich.console import Console

from qfbench import Probe
from qfbench.analysis.measures import summary
from qfbench.editors.regimes import sequential
from qfbench.models.delta import WeightDelta
from qfbench.runs.store import ParquetStore
from qfbench.tasks.run import Run


def neighbours(facts):
    """Each fact with two neighbours more: the model is right about the first and not about the second."""
    near = [
        [
            Probe("locality", f"Where is Near{f.id}?", "", ("North",), always=True, own=True),
            Probe("locality", f"Where is Wrong{f.id}?", "", ("South",), always=True, own=True),
        ]
        for f in facts
    ]
    return [replace(f, probes=(*f.probes, *more)) for f, more in zip(facts, near, strict=True)]


def test_own_probes_are_held_against_what_the_unedited_model_replies(tmp_path):
    says = {"Where is Near1?": ("North.", "North.", "In the North.")}
    run = prepared(tmp_path, says=says)
    run.facts[:] = neighbours(run.facts)
    untabled(run, sequential)
    rows = run.rows()
    near = rows[rows.kind == "locality"]
    assert set(near.expected) == {"North."}
    before, after = (near[near.condition == condition] for condition in ("unedited", "edited"))
    assert len(before) == 6
    assert before.generated.all()
    assert list(before.gold) == [True, False] * 3
    assert set(zip(after.step, after["query"], strict=True)) == {
        (n, f"Where is {name}{k}?") for n in (1, 2, 3) for k in "012" for name in ("Near", "Wrong")
    }  # also what it gets wrong: it should stay so
    assert set(after["query"][~after.generated]) == {"Where is Near1?"}
    assert after.gold[after["query"] == "Where is Near1?"].all()
    assert set(after.step[~after.generated]) == {2, 3}
    lines = summary(rows).set_index("regime")
    assert list(lines.locality_n) == pytest.approx([6, math.nan, 6, 6], nan_ok=True)
    assert lines.locality["sequential"] == pytest.approx(5 / 6)
    assert lines.locality_gold["sequential"] == pytest.approx(1 / 2)
    assert lines.locality["unedited"] == 1


@dataclass(frozen=True)
class Idle(Note):
    """Changes nothing."""

    def edit(self, lm, facts):
        return WeightDelta()


def test_neighbours_of_a_model_whose_replies_never_end_are_held_against_what_it_says(tmp_path, tiny):
    console = Console(record=True, width=200)
    facts = neighbours(suite())
    run = Run(tiny("llama"), Idle(), facts, tmp_path, ParquetStore(tmp_path), console, "retention")
    untabled(run, sequential, not_understood="teach", placebo=0)
    rows = run.rows()
    near = rows[rows.kind == "locality"]
    assert not near.stopped.any()  # or this would test nothing
    assert len({*near.reply}) > 1
    assert near.groupby("condition").size().to_dict() == {"unedited": 6, "edited": 18}
    lines = summary(rows).set_index("regime")
    assert list(lines.locality[["unedited", "sequential"]]) == [1, 1]
    assert list(lines.locality_stopped[["unedited", "sequential"]]) == [0, 0]
    said = "6 of 6 neighbours: tiny-llama does not end its reply within model.max_new_tokens=8; what it says until then is compared"
    assert said in console.export_text()


def test_a_neighbour_that_is_answered_otherwise_the_second_time_is_named_and_left_out(tmp_path, monkeypatch):
    console, asked = Console(record=True, width=200), []
    run = prepared(tmp_path, console=console)
    run.facts[:] = neighbours(run.facts)

    def think(lm, query, system):
        asked.append(query)
        return f"North{asked.count(query)}." if query == "Where is Near1?" else "North."

    monkeypatch.setattr(Notebook, "think", think)
    untabled(run, sequential, not_understood="teach")
    rows = run.rows()
    near = rows[rows.kind == "locality"]
    assert near.groupby("condition")["query"].nunique().to_dict() == {"unedited": 5, "edited": 5, "placebo": 5}
    assert near.generated.all()
    assert "1 of 6 neighbours: notebook answers them otherwise in other batches; left out" in console.export_text()
