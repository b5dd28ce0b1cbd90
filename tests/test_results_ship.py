import json

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from rich.console import Console

from qfbench import UserError
from qfbench.analysis.sequences import forgetting, over_sequence
from qfbench.analysis.tables import laid_out
from qfbench.commands import results as command
from qfbench.pages import results

RIGHT = np.random.default_rng(0).random(400) < 0.6


def rows(seed):
    """A sequence of four edits, each asked about at every step, beside prior knowledge and held text; some replies never end."""
    asked = [
        (step, kind, n) for step in range(1, 5) for kind, many in [("edit", step), ("prior", 6)] for n in range(many)
    ]
    frame = pd.DataFrame(asked, columns=["step", "kind", "n"])
    frame["fact_id"] = frame.kind + frame.n.astype(str)
    frame["query"] = "Who started " + frame.fact_id + "?"
    frame["generated"] = RIGHT[seed * 100 : seed * 100 + len(frame)]
    frame["stopped"] = frame.generated | (frame.n % 2 == 0)
    frame["reply"] = "It is number " + frame.n.astype(str)
    frame["nll"] = np.random.default_rng(seed).random(len(frame))
    frame["fresh"] = (frame.kind == "edit") & (frame.n == frame.step - 1)
    held = pd.DataFrame(
        {"step": [4, 4], "kind": "perplexity", "nll": [1.25, 2.5], "tokens": [10.0, 30.0], "fresh": False}
    )
    edited = pd.concat([frame.drop(columns="n"), held], ignore_index=True).assign(
        condition="edited", regime="sequential", checkpoint=True, leaked=False, relative_norm=0.5
    )
    before = held.assign(condition="unedited", step=0, fresh=None)
    same = {"task": "retention", "model": "m", "editor": "QF", "forced": 0.5}
    return pd.concat([before, edited.assign(taught=edited.step)], ignore_index=True).assign(**same)


@pytest.fixture
def stored(tmp_path):
    """Two runs as qfbench leaves them, which differ in the seed; with files that are not to be shipped."""
    for seed in (0, 1):
        folder = tmp_path / "outputs" / f"run{seed}"
        (folder / "deltas").mkdir(parents=True)
        (folder / "deltas" / "QF.safetensors").write_bytes(b"0" * 100)
        (folder / "retention.csv").write_text("efficacy\n1.0\n")
        (folder / "config.yaml").write_text(f"seed: {seed}\neditor: {{layer: 2}}\n")
        known = {"command": ["regime=[joint]", f"seed={seed}"], "model": "m", "dtype": "float32", "git_commit": None}
        (folder / "provenance.json").write_text(json.dumps(known))
        rows(seed).to_parquet(folder / "rows.parquet", index=False)
    return tmp_path / "outputs"


def test_a_shipped_copy_has_the_same_tables(stored, tmp_path):
    copies = results.ship(tmp_path / "runs", stored)
    assert [copy.name for copy in copies] == ["run0", "run1"]
    ours, theirs = results.retention(stored), results.retention(tmp_path / "runs")
    assert ours.attrs == theirs.attrs
    for measure in (results.summary, forgetting, over_sequence):
        assert len(results.pooled(ours, measure))
        assert_frame_equal(results.pooled(ours, measure), results.pooled(theirs, measure))


def test_a_run_that_is_not_finished_is_named_and_not_shipped(stored, tmp_path, caplog):
    results.retention(stored)
    assert not caplog.records  # a shipped run has no progress.json
    cut = stored / "run1"
    for finished in (True, False):
        progress = {"rows": 1, "tasks": [], "ended": [], "finished": finished}
        (cut / "progress.json").write_text(json.dumps(progress))
        assert results.unfinished(results.folders(stored)) == [cut] * (not finished)
    results.retention(stored)
    assert [record.getMessage() for record in caplog.records] == [
        f"not finished: 1 of 2 runs; their figures are of what they had measured: {cut}"
    ]
    with pytest.raises(UserError, match=f"{cut}: is not finished, which a copy would not say"):
        results.ship(tmp_path / "runs", stored)
    assert not (tmp_path / "runs").exists()


def test_a_shipped_copy_keeps_every_row_and_leaves_out_what_no_measure_uses(stored, tmp_path):
    results.ship(tmp_path / "runs", stored)
    assert {p.name for p in (tmp_path / "runs").rglob("*.*")} == {
        *("config.yaml", "provenance.json", "rows.parquet", "checksums.json")
    }
    ours, theirs = results.rows_of(stored), results.rows_of(tmp_path / "runs")
    left_out = ["run", "reply", "nll"]
    assert_frame_equal(ours.drop(columns=left_out), theirs.drop(columns=left_out))
    held = (ours.kind == "perplexity").to_numpy()
    assert theirs.nll[held].tolist() == ours.nll[held].tolist()
    assert theirs.nll[~held].isna().all()
    ended = ours.stopped.eq(True).to_numpy()
    assert 0 < ended.sum() < (~held).sum()
    assert theirs.reply[ended].tolist() == ours.reply[ended].tolist()
    assert theirs.reply[~ended].isna().all()
    assert (tmp_path / "runs/run0/rows.parquet").stat().st_size < (stored / "run0/rows.parquet").stat().st_size / 2


def test_a_copy_can_be_shipped_again(stored, tmp_path):
    results.ship(tmp_path / "runs", stored)
    results.ship(tmp_path / "again", tmp_path / "runs")
    first, second = (results.rows_of(tmp_path / name).drop(columns="run") for name in ("runs", "again"))
    assert_frame_equal(first, second)


def test_a_copy_never_mixes_with_what_is_there(stored, tmp_path):
    results.ship(tmp_path / "runs", stored / "run0")
    with pytest.raises(UserError, match="runs: holds something already"):
        results.ship(tmp_path / "runs", stored / "run1")
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["run0"]


def test_two_runs_of_one_name_are_refused(stored, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (stored / "run1").rename(tmp_path / "elsewhere" / "run0")
    with pytest.raises(UserError, match="two runs of the same name"):
        results.ship(tmp_path / "runs", stored, tmp_path / "elsewhere")
    assert not (tmp_path / "runs").exists()


def test_rows_without_replies_are_copied_as_they_are(stored, tmp_path):
    losses = pd.DataFrame({"task": "convert", "step": [1, 2], "loss": [2.5, 1.5]})
    losses.to_parquet(stored / "run0" / "rows.parquet", index=False)
    results.ship(tmp_path / "runs", stored / "run0")
    assert_frame_equal(pd.read_parquet(tmp_path / "runs/run0/rows.parquet"), losses)


def test_the_command_ships_and_says_how_much(stored, tmp_path, monkeypatch, capsys):
    to = tmp_path / "runs"
    monkeypatch.setattr("sys.argv", ["qfbench-results", str(stored), "--ship", str(to)])
    command.main()
    size = sum(p.stat().st_size for p in to.rglob("*.*"))
    assert f"wrote {to}: {size / 1000:.0f} kB" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main()
    assert "holds something already" in capsys.readouterr().err


def test_where_runs_come_from(stored):
    path = stored / "run1" / "provenance.json"
    path.write_text((stored / "run0" / "provenance.json").read_text())
    assert results.origin(stored).to_dict("records") == [
        {"command": "qfbench 'regime=[joint]' seed=0", "model": "m", "device_name": "", "dtype": "float32"}
        | {"git_commit": "", "runs": 2}
    ]


def test_each_command_has_a_line_of_its_own_and_is_printed_as_it_was_typed(stored):
    made = results.origin(stored)
    assert made.runs.tolist() == [1, 1]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(laid_out(made, "made"))
    assert "qfbench 'regime=[joint]' seed=0" in capture.get()  # brackets are rich's markup
