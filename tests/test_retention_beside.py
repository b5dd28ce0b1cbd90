"""What stands beside a run: another model, another editor, over the same facts."""

from dataclasses import dataclass

import pandas as pd
import pytest
from notebook import Note, Notebook, prepared, suite, untabled
from rich.console import Console

from qfbench.analysis.sequences import forgetting
from qfbench.editors.regimes import joint, sequential, single
from qfbench.models.delta import WeightDelta
from qfbench.tasks.retention import retention


@dataclass(frozen=True)
class Margin(Note):
    """Another editor; at layer 1 it writes nothing, so that nothing is learnt."""

    def edit(self, lm, facts):
        return WeightDelta() if self.layer else super().edit(lm, facts)


def side_by_side(folder, monkeypatch, console=None, entrants=(("other", Margin(layer=1), sequential),), **other):
    """The rows of a run with others beside it, each a notebook of the name that its model's path gives.

    Without a `console` there are no tables and figures.
    """

    def load(model):
        lm = Notebook(suite(), **other)
        lm.name = model["path"]
        return lm

    monkeypatch.setattr("qfbench.tasks.run.load", load)
    run = prepared(folder, console=console)
    (folder / "provenance.json").write_text("{}")
    beside = {
        f"entry{n}": {"model": {"path": path}, "editor": editor, "regimes": {"sequential": regime}}
        for n, (path, editor, regime) in enumerate(entrants)
    }
    if console:
        retention(run, {"sequential": sequential, "joint": joint}, beside=beside)
    else:
        untabled(run, sequential, joint, beside=beside)
    run.store.flush()
    return run.rows()


def test_what_stands_beside_a_run_shares_its_rows_its_table_and_its_figure(tmp_path, drawn, monkeypatch):
    console = Console(record=True, width=200)
    rows = side_by_side(tmp_path, monkeypatch, console)
    columns = ["model", "editor", "regime"]
    own = [("notebook", "Note", regime) for regime in ("unedited", "in_context", "sequential", "joint")]
    others = [("other", "Margin", regime) for regime in ("unedited", "in_context", "sequential")]
    table = pd.read_csv(tmp_path / "retention.csv")
    table = table[table.regime != "placebo"]
    assert list(table[columns].itertuples(index=False, name=None)) == own + others
    lines = table.set_index(columns)
    assert lines.retention["notebook", "Note", "sequential"] == 1
    assert lines.retention["other", "Margin", "sequential"] == 0
    assert lines.efficacy["other", "Margin", "in_context"] == 1
    said = " ".join(console.export_text().split())
    assert "3 facts, one after another: notebook, Note at layer 0; other, Margin at layer 1" in said
    curves = forgetting(rows).set_index(columns)["mean"]
    assert set(curves.index) == {*own[2:], *others[2:]}
    assert set(curves["other"]) == {0.0}
    assert set(curves["notebook"]) == {1.0}
    assert {p.stem for p in tmp_path.glob("figures/*.png")} == {"forgetting_curves", "retention_matrix"}
    assert {p.stem for p in tmp_path.glob("deltas/*")} == {
        "Note-sequential-layer0",
        "Note-joint-layer0",
        "other-Margin-sequential-layer1",
    }
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "rows.parquet")[columns], rows[columns].reset_index(drop=True)
    )


def test_every_row_names_its_model_and_its_editor(tmp_path, monkeypatch):
    entrants = (("second", Note(), single), ("third", Margin(), sequential))
    rows = side_by_side(tmp_path, monkeypatch, entrants=entrants)
    assert rows.groupby(["model", "editor"], sort=False).condition.agg(lambda c: list(c.unique())).to_dict() == {
        ("notebook", "Note"): ["unedited", "in_context", "edited", "placebo"],
        ("second", "Note"): ["unedited", "in_context", "edited"],  # single edits leave nothing to compare it with
        ("third", "Margin"): ["unedited", "in_context", "edited", "placebo"],
    }
    assert rows.groupby("model").taught.max().to_dict() == {"notebook": 3, "second": 1, "third": 3}  # its own regime
    assert set(rows.run_id) == {f"{tmp_path.parent.name}-{tmp_path.name}"}
    assert set(rows.task) == {"retention"}


def test_what_stands_beside_a_run_is_asked_what_it_understands_itself(tmp_path, monkeypatch):
    says = {"Where is Town0?": ("South.",)}
    rows = side_by_side(tmp_path, monkeypatch, entrants=(("other", Note(), sequential),), deaf=("1",), says=says)
    edited = rows[rows.condition == "edited"]
    own, other = (edited[edited.model == name] for name in ("notebook", "other"))
    assert set(own.fact_id[own.kind == "edit"]) == {"0", "1", "2"}
    assert set(other.fact_id[other.kind == "edit"]) == {"0", "2"}
    assert "Where is Town0?" in set(own["query"]) - set(other["query"])


@pytest.mark.parametrize(
    ("entrants", "printed"),
    [
        ((), set()),
        ((("other", Margin(), sequential),), {"editor"}),  # each editor has one model, which the title names
        ((("other", Note(), sequential),), {"model", "editor"}),
    ],
    ids=["alone", "another_editor", "another_model"],
)
def test_what_tells_the_lines_of_a_table_apart_is_printed_and_all_is_kept(tmp_path, monkeypatch, entrants, printed):
    console = Console(record=True, width=200)
    side_by_side(tmp_path, monkeypatch, console, entrants=entrants)
    assert {"model", "editor"} <= set(pd.read_csv(tmp_path / "retention.csv").columns)
    words = set(console.export_text().replace("by ", "editor ").split())
    assert {"model", "editor"} & words == printed


def test_one_editor_may_stand_beside_itself_with_another_setting(tmp_path, monkeypatch):
    rows = side_by_side(tmp_path, monkeypatch, entrants=(("notebook", Note(layer=1), sequential),))
    assert set(rows.layer.dropna()) == {0, 1}
