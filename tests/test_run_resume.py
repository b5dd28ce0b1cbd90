"""A run's folder: never overwritten, continued where it was killed, shared with what runs elsewhere."""

import hashlib

import pandas as pd
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from test_contract import composed
from test_run import SMALL, run

from qfbench import UserError
from qfbench.commands.execution import execute
from qfbench.editors import QF
from qfbench.runs.folder import contents
from qfbench.runs.store import ParquetStore


def test_a_store_takes_over_the_rows_of_its_folder_only_where_asked_to(tmp_path):
    store = ParquetStore(tmp_path)
    for step in range(4):
        store.log({"step": step, "reply": f"said {step}"})
    store.flush()
    assert ParquetStore(tmp_path).frame().empty
    whole = ParquetStore(tmp_path)
    whole.recover(lambda row: True)
    pd.testing.assert_frame_equal(whole.frame(), store.frame())
    resumed = ParquetStore(tmp_path)
    resumed.recover(lambda row: row["step"] < 2)
    resumed.log({"step": 2, "reply": "said again"})
    assert list(resumed.frame().reply) == ["said 0", "said 1", "said again"]
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == 4  # until it is flushed
    resumed.flush()
    assert list(pd.read_parquet(tmp_path / "rows.parquet").reply) == ["said 0", "said 1", "said again"]
    new = ParquetStore(tmp_path / "none")
    new.recover(lambda row: True)
    assert new.frame().empty


KILLED_AT = []


def counting(run, upto):
    """A task that goes on where its rows end, and is killed once at the step that `KILLED_AT` says."""
    run.store.recover(lambda row: row["task"] == run.task)
    for step in range(len(run.store.frame()), upto):
        if step in KILLED_AT:
            KILLED_AT.remove(step)
            raise KeyboardInterrupt
        run.log({"step": step, "lives": len(KILLED_AT)})


def count(folder, *overrides, upto=4):
    cfg = composed(*SMALL, "experiment=retention", "facts.n=1", *overrides)
    del cfg.hydra
    cfg.task = OmegaConf.create({"counting": {"_target_": "test_run_resume.counting", "_partial_": True, "upto": upto}})
    return execute(cfg, folder, Console(quiet=True))


def test_a_killed_run_continues_with_resume_and_the_same_settings(tmp_path):
    KILLED_AT[:] = [2]
    with pytest.raises(KeyboardInterrupt):
        count(tmp_path)
    assert list(pd.read_parquet(tmp_path / "rows.parquet").step) == [0, 1]
    settings = (tmp_path / "config.yaml").read_text()
    done = count(tmp_path)
    assert list(done.rows("counting").lives) == [1, 1, 0, 0]  # two steps of each life
    assert list(pd.read_parquet(tmp_path / "rows.parquet").step) == [0, 1, 2, 3]
    assert (tmp_path / "config.yaml").read_text() == settings


@pytest.mark.parametrize(
    ("again", "message"),
    [
        ({"overrides": ["seed=1"]}, r"holds a run with other settings \(config\.yaml\); give another"),
        ({"overrides": ["editor.layer=1"]}, r"holds a run with other settings \(config\.yaml\)"),
        ({"overrides": [], "upto": 5}, r"holds a run with other settings \(config\.yaml\)"),
    ],
)
def test_a_run_with_other_settings_does_not_continue_one(tmp_path, again, message):
    count(tmp_path, upto=2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=message) as error:
        count(tmp_path, *again["overrides"], upto=again.get("upto", 2))
    assert str(error.value).startswith(str(tmp_path))
    assert "\n" not in str(error.value)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_killed_retention_run_ends_with_the_same_rows(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole", "experiment=retention", "facts.n=2", "regression=none")[0].store.frame()
    real, calls = QF.together, []

    def poisoned(self, lm, parts):
        calls.append(1)
        if len(calls) == 2:
            parts[0].keys[0, 0] = float("nan")
        return real(self, lm, parts)

    monkeypatch.setattr(QF, "together", poisoned)
    with pytest.raises(FloatingPointError):
        run(tmp_path / "killed", "experiment=retention", "facts.n=2", "regression=none")
    again = run(tmp_path / "killed", "experiment=retention", "facts.n=2", "regression=none")[0].store.frame()
    pd.testing.assert_frame_equal(again.drop(columns="run_id"), whole.drop(columns="run_id"))


def test_rows_that_a_folder_holds_are_not_overwritten(tmp_path):
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"reply": ["earlier"]}).to_parquet(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=rf"{tmp_path} holds a run with other settings .*; give another hydra.run.dir"):
        count(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != ".lock"] == ["rows.parquet"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["rows.parquet", "config.yaml"], "config.yaml, rows.parquet"),
        (["b.csv", "figures/one.png", "deltas/x", "deltas/y"], "b.csv, figures/one.png, deltas/ (2 files)"),
        (["a", "figures/1", "figures/2", "figures/3", "other/z"], "a, figures/ (3 files)"),
        (["deltas/only"], "deltas/only"),
    ],
)
def test_contents_are_one_line(tmp_path, names, line):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert contents(tmp_path) == line
    (tmp_path / "figures").mkdir(exist_ok=True)  # an empty folder is not worth a word
    assert contents(tmp_path) == line


def test_the_same_run_elsewhere_has_another_model_and_editor_and_the_same_store(tmp_path):
    here = count(tmp_path, upto=1)
    lm, editor = here.lm, here.editor
    there = here.elsewhere(OmegaConf.to_container(composed("model=world-s", "model.batch_size=7").model), QF(5))
    assert (there.lm.name, there.lm.batch_size, there.editor) == ("world-s", 7, QF(5))
    assert there.title == "world-s, QF at layer 5"
    assert here.title == "world-xs, QF at layer 2"
    there.log({"step": 1})
    rows = here.rows()
    assert list(rows.model) == ["world-xs", "world-s"]
    assert rows.run_id.nunique() == rows.task.nunique() == rows.editor.nunique() == 1
    assert (there.store, there.folder, there.facts, there.task) == (here.store, here.folder, here.facts, "counting")
    assert here.lm is lm
    assert here.editor is editor
