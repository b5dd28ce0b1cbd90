"""Collapse is announced, measured, and may end a regime."""

from dataclasses import dataclass, replace

import notebook
import pandas as pd
import pytest
from notebook import Note, prepared, taught, untabled
from rich.console import Console

from qfbench import Probe
from qfbench.editors.regimes import joint, sequential, single
from qfbench.models.delta import WeightDelta
from qfbench.tasks.retention import retention

FEW = notebook.suite
FORGETFUL = {
    f"Where is Town{n}?": ("North.", "North.", "Nowhere." if n % 3 else "North.", "Nowhere.") for n in range(12)
}


def many():
    """The three facts with four questions each, not one, about what the unedited model knows."""
    more = [[Probe("prior", f"Where is Town{n + k}?", "North.", always=True) for k in (3, 6, 9)] for n in range(3)]
    return [replace(fact, probes=(*fact.probes, *own)) for fact, own in zip(FEW(), more, strict=True)]


@pytest.fixture(autouse=True)
def enough(monkeypatch):
    monkeypatch.setattr(notebook, "suite", many)


def warnings(console):
    return [line for line in console.export_text().splitlines() if "collapse after" in line]


def test_collapse_is_announced_once_at_the_edit_where_it_is_first_seen(tmp_path):
    console = Console(record=True, width=200)
    _, _, edited = taught(tmp_path, sequential, joint, tables=True, says=FORGETFUL, console=console)
    assert edited.groupby("regime").step.max().to_dict() == {"sequential": 3, "joint": 3}  # nothing is stopped unasked
    assert warnings(console) == [
        f"{regime}: collapse after 2 edits: prior at 0.33" for regime in ("sequential", "joint")
    ]
    assert list(pd.read_csv(tmp_path / "sequences.csv").collapse) == [2, 2]


def test_collapse_is_seen_at_checkpoints_alone(tmp_path):
    console = Console(record=True, width=200)
    taught(tmp_path, says=FORGETFUL, console=console, every=3)
    assert warnings(console) == ["sequential: collapse after 3 edits: prior at 0.00"]


def test_with_half_of_prior_knowledge_left_nothing_has_collapsed(tmp_path):
    says = FORGETFUL | {f"Where is Town{n}?": ("North.",) if n % 3 == 1 else ("South.",) for n in range(12) if n % 3}
    console = Console(record=True, width=200)
    _, _, edited = taught(tmp_path, says=says, console=console)
    assert edited[edited.kind == "prior"].groupby("step").generated.mean().to_dict() == {1: 1, 2: 1, 3: 0.5}
    assert warnings(console) == []


@pytest.mark.parametrize(
    ("stop", "said"), [(False, []), (True, ["sequential: collapse after 2 edits: prior at 0.33 of 3 probes"])]
)
def test_the_collapse_of_a_few_probes_is_no_news_unless_it_ends_the_regime(tmp_path, monkeypatch, stop, said):
    monkeypatch.setattr(notebook, "suite", FEW)
    console = Console(record=True, width=200)
    retention(prepared(tmp_path, says=FORGETFUL, console=console), {"sequential": sequential}, stop_on_collapse=stop)
    assert warnings(console) == said
    assert pd.read_csv(tmp_path / "sequences.csv").collapse.isna().all()


@dataclass(frozen=True)
class Late(Note):
    """What it teaches together does no harm: it writes at most one fact down."""

    def joint(self, lm, facts, done=0):
        for fact in facts[done:]:
            yield self.edit(lm, [fact])


def test_to_stop_on_collapse_ends_that_regime_alone(tmp_path):
    console = Console(record=True, width=200)
    run = prepared(tmp_path, editor=Late(), says=FORGETFUL, console=console)
    retention(run, {"sequential": sequential, "joint": joint}, stop_on_collapse=True)
    rows = run.rows()
    edited = rows[rows.condition == "edited"]
    assert edited.groupby("regime").step.max().to_dict() == {"sequential": 2, "joint": 3}
    assert warnings(console) == ["sequential: collapse after 2 edits: prior at 0.33"]
    assert rows[rows.condition == "placebo"].groupby("regime").step.unique().map(list).to_dict() == {
        "sequential": [2],
        "joint": [3],
    }
    change = WeightDelta.load(tmp_path / "deltas" / "Late-sequential-layer0.safetensors").changes["weight"]
    assert change.dense().tolist() == [[1, 1, 0, 0]]
    sequences = pd.read_csv(tmp_path / "sequences.csv").set_index("regime")
    assert sequences.edits.to_dict() == {"sequential": 2, "joint": 3}


def test_a_placebo_of_a_regime_that_stopped_is_asked_what_its_last_edit_was(tmp_path):
    run = prepared(tmp_path, says=FORGETFUL)
    untabled(run, sequential, stop_on_collapse=True)
    rows = run.rows()
    last, placebo = (rows[(rows.condition == c) & (rows.step == 2)] for c in ("edited", "placebo"))
    assert sorted(last["query"]) == sorted(placebo["query"])


def test_single_edits_do_not_collapse_and_are_not_stopped(tmp_path):
    says = {f"Where is Town{n}?": ("North.", "Nowhere.") for n in range(12)}
    run = prepared(tmp_path, says=says)
    untabled(run, single, stop_on_collapse=True)
    rows = run.rows()
    assert set(rows.step[rows.condition == "edited"]) == {1, 2, 3}
