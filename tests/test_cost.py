"""What an edit costs: the clock is a fake one, so that every figure is known."""

import math
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch
from notebook import Note, Notebook, prepared, suite
from rich.console import Console

from qfbench import LanguageModel, UserError
from qfbench.analysis.plots import cost as figure_of
from qfbench.editors import QF, FineTune
from qfbench.editors.base import Recorder
from qfbench.facts.world import world
from qfbench.models.delta import WeightDelta
from qfbench.tasks.cost import cost, medians, timed


@pytest.fixture
def clock(monkeypatch):
    """Hands that stand still: `clock(3)` is work that takes three seconds. Asking takes 100, writing 0.5, putting back 0.25."""
    time = [0.0]

    def work(seconds):
        time[0] += seconds

    class Slow(WeightDelta):
        def applied_to(self, lm):
            work(0.5)
            return self

        def __enter__(self):
            return None

        def __exit__(self, *error):
            work(0.25)

    work.slow = lambda delta: Slow(delta.changes)
    monkeypatch.setattr("qfbench.tasks.cost.now", lambda lm: time[0])
    monkeypatch.setattr("qfbench.tasks.cost.ask", lambda lm, probes: work(100))
    return work


def editors(clock):
    """One that records for 2 s and solves for 10; one that has no such split."""

    @dataclass(frozen=True)
    class Both(Recorder):
        sites = property(lambda self: Note().sites)

        def record(self, lm, fact):
            clock(2)
            return fact

        def together(self, lm, parts):
            clock(10)
            return clock.slow(Note().edit(lm, parts))

    @dataclass(frozen=True)
    class Whole(Note):
        def edit(self, lm, facts):
            clock(12)
            return clock.slow(super().edit(lm, facts))

    return Both(), Whole()


def test_each_part_has_its_own_time_and_evaluation_stands_apart(clock):
    both, whole = editors(clock)
    facts = suite()
    lm = Notebook(facts)
    split = timed(lm, both, facts[0], facts[0].probes)
    assert [split[name] for name in ("record", "solve", "write", "evaluation")] == [2, 10, 0.75, 100]
    assert timed(lm, both, facts[0])["evaluation"] == 0
    all_of_it = timed(lm, whole, facts[0], facts[0].probes)
    assert math.isnan(all_of_it["record"])
    assert [all_of_it[name] for name in ("solve", "write", "evaluation")] == [12, 0.75, 100]


def test_a_real_edit_is_timed_its_tokens_counted_and_its_weights_put_back():
    lm, (fact,) = LanguageModel.load("world-xs", device="cpu"), world(1)
    before, alone = lm.weights_hash(), lm.render(fact.query, "", fact.answer)
    told = lm.render(fact.query, fact.instruction, fact.answer)
    recorded = timed(lm, QF(2), fact, [fact.edit])
    assert recorded["tokens"] == 2 * len(told.ids) > len(told.ids) + len(alone.ids)  # one padded pass
    assert all(recorded[name] >= 0 for name in ("record", "solve", "write", "evaluation"))
    assert recorded["peak_gib"] > 0
    steps = timed(lm, FineTune(2, lr=0.01, steps=3, stop_at=0.0), fact)
    assert steps["tokens"] == 4 * (alone.answer - 1 + len(alone.reply))  # the loss is taken after the last step as well
    assert lm.weights_hash() == before
    assert not lm.model._forward_pre_hooks


def timed_run(folder, clock, monkeypatch, console=None, **entries):
    both, whole = editors(clock)
    monkeypatch.setattr("qfbench.tasks.run.load", lambda model: Notebook(suite()))
    run = replace(prepared(folder, editor=both, console=console), task="cost")
    (folder / "provenance.json").write_text("{}")
    entries = {"other": whole} | entries
    cost(run, {name: {"model": {}, "editor": editor} for name, editor in entries.items()})
    return run


def test_every_fact_but_the_first_is_timed_by_each_editor_and_never_twice(tmp_path, clock, monkeypatch):
    console = Console(record=True, width=200)
    run = timed_run(tmp_path, clock, monkeypatch, console)
    rows = run.rows()
    assert list(zip(rows.editor, rows.fact_id, strict=True)) == [(e, n) for n in "12" for e in ("Both", "Whole")]
    table = pd.read_csv(tmp_path / "cost.csv").set_index("editor")
    assert list(table.total_ms) == [12750, 12750]
    assert list(table.record_ms.fillna(0) + table.solve_ms + table.write_ms) == [12750, 12750]
    assert set(table.evaluation_ms) == {100_000}
    assert set(table.probes) == {4}
    said = " ".join(console.export_text().split())
    assert "medians of 2" in said
    assert "The first edit by each is left out." in said
    assert (tmp_path / "figures" / "cost.png").stat().st_size > 0

    run.store.commit()
    again = []
    monkeypatch.setattr("qfbench.tasks.cost.timed", lambda lm, editor, fact, probes: again.append(fact.id))
    assert timed_run(tmp_path, clock, monkeypatch).rows().equals(rows)
    assert again == ["0", "0"]  # the first call of a process is left out in any case


def test_an_editor_that_cannot_run_is_a_row_and_one_fact_is_too_few(tmp_path, clock, monkeypatch):
    rows = timed_run(tmp_path, clock, monkeypatch, broken=Note(broken="0")).rows()
    assert rows[rows.condition == "unsupported"].reply.tolist() == ["no room for fact 0"]
    assert set(medians(rows).editor) == {"Both", "Whole"}
    run = prepared(tmp_path)
    del run.facts[1:]
    with pytest.raises(UserError, match="2 facts or more"):
        cost(run)


def test_medians_and_quartiles_are_of_edits_and_bars_are_as_long_as_them():
    rows = pd.DataFrame({"record": [1, 2, 3, 4, 5], "solve": [0.5] * 5, "write": [0.25] * 5, "evaluation": [9.0] * 5})
    rows = rows.assign(
        condition="edited", model="m", editor="QF", tokens=7, probes=4, peak_gib=[1.0, 2.0, 3.0, 2.0, 1.0]
    )
    table = medians(pd.concat([rows, rows.assign(editor="FineTune", record=math.nan)]))
    line = table.iloc[0]
    assert (line.record_ms, line.record_ms_iqr) == (3000, 2000)
    assert (line.total_ms, line.tokens, line.probes, line.peak_gib) == (3750, 7, 4, 3)
    time, share = figure_of(table).axes
    assert [[bar.get_width() for bar in bars] for bars in time.containers] == [[3000, 0], [500, 500], [250, 250]]
    assert time.containers[2][0].get_x() == 3500
    ends = torch.tensor([[bar.get_x() + bar.get_width() for bar in bars] for bars in share.containers])
    assert ends[-1].tolist() == pytest.approx([1, 1])
