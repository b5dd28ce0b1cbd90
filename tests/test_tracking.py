import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from test_contract import composed
from test_run import SMALL

from qfbench import UserError
from qfbench.commands.execution import execute
from qfbench.runs.store import ParquetStore
from qfbench.runs.tracking import Mirror, Tracker, curves, last_replies

CALLS = []  # of the tracker of the last run


class Fake:
    """Remembers what it is shown; fails at one method, from its `after`-th call on."""

    def __init__(self, fails_at="", after=0, error="RuntimeError"):
        CALLS.clear()
        self.fails_at, self.left = fails_at, after
        self.error = getattr(builtins, error)

    def _note(self, method, *what):
        CALLS.append((method, *what))
        if method == self.fails_at:
            self.left -= 1
            if self.left < 0:
                raise self.error("no [bold]space[/bold] left\non the device")

    def start(self, about):
        self._note("start", about)
        return "watch it [here]"

    def log(self, values, edit_step):
        self._note("log", edit_step, values)

    def figure(self, name, path):
        self._note("figure", name, path)

    def table(self, name, frame):
        self._note("table", name, frame)

    def close(self, ok):
        self._note("close", ok)


class Writer(Fake):
    """Leaves what it is told of a run in the run's folder."""

    def start(self, about):
        told = {"experiment": about.experiment, "sweep": about.sweep, "tags": list(about.tags)}
        (about.folder / "told.json").write_text(json.dumps(told))
        return "told"


def run(folder, *overrides, **tracker):
    """A small retention run; `tracker` are the settings of a `Fake`."""
    console = Console(record=True, width=120, quiet=False)
    cfg = composed(
        *SMALL, "experiment=retention", "facts.n=2", "commit_seconds=0", "task.retention.placebo=1", *overrides
    )
    del cfg.hydra
    if tracker or not any(o.startswith("tracker") for o in overrides):
        cfg.tracker = {"_target_": "test_tracking.Fake", **tracker}
    return execute(cfg, folder, console), console.export_text()


def called(method):
    return [what for name, *what in CALLS if name == method]


@pytest.fixture(scope="module")
def untracked(tmp_path_factory):
    """The bytes of the rows of a run without a tracker; its folder is called run/one, which is in the rows."""
    folder = tmp_path_factory.mktemp("untracked") / "run" / "one"
    run(folder, "tracker=none")
    return (folder / "rows.parquet").read_bytes()


@pytest.mark.slow
def test_a_tracker_is_shown_the_whole_run_and_changes_no_row(tmp_path, untracked):
    folder = tmp_path / "run" / "one"
    done, text = run(folder, "editor.layer=3")
    assert isinstance(done.tracker.tracker, Tracker)
    assert (folder / "rows.parquet").read_bytes() != untracked
    done, text = run(tmp_path / "again" / "run" / "one")
    assert (tmp_path / "again" / "run" / "one" / "rows.parquet").read_bytes() == untracked
    assert text.count("watch it [here]\n") == 1
    assert "failed" not in text

    assert CALLS[0][0] == "start"
    ((about,),) = called("start")
    assert about.run_id == "run-one" == done.store.frame().run_id.unique().item()
    assert about.config["model"]["path"] == "world-xs"
    assert about.config["provenance"] == json.loads((done.folder / "provenance.json").read_text())
    assert about.tags == ["world-xs", "QF", "world"]

    points = [(step, name, value) for step, values in called("log") for name, value in values.items()]
    assert len(set(points)) == len(points)
    assert {name.split("/")[0] for _, name, _ in points} == {
        "retention_unedited",
        "retention_in_context",
        "retention_sequential",
        "retention_sequential_placebo",
    }
    rows = done.rows()
    edited = rows[rows.condition == "edited"]
    prior = edited[edited.kind == "prior"].groupby("step")
    for name, wanted in (("prior", prior.generated.mean()), ("relative_norm", prior.relative_norm.first())):
        assert {s: v for s, n, v in points if n == f"retention_sequential/{name}"} == pytest.approx(dict(wanted))

    assert [name for name, _ in called("figure")] == ["forgetting_curves", "retention_matrix"]
    assert all(path.suffix == ".png" and path.stat().st_size for _, path in called("figure"))
    tables = dict(called("table"))
    assert list(tables) == ["retention", "sequences", "replies"]
    for name in ("retention", "sequences"):
        assert tables[name].to_csv(index=False) == (done.folder / f"{name}.csv").read_text()
    shown = tables["replies"]
    last = edited[edited.step == 2]
    assert list(shown.reply[shown.series == "retention_sequential"]) == list(last.reply.dropna())
    assert CALLS[-1] == ("close", True)


def test_points_are_shown_while_the_run_goes_on_and_after_their_rows_are_safe(tmp_path, monkeypatch):
    safe = []

    def log(self, values, edit_step):
        frame = pd.read_parquet(tmp_path / "rows.parquet")
        safe.append((edit_step, frame.step.max(), frame.condition.iloc[-1]))

    monkeypatch.setattr(Fake, "log", log)
    run(tmp_path)
    now = [(0, 0, "unedited"), (0, 0, "unedited"), (1, 1, "edited"), (2, 2, "edited"), (2, 2, "placebo")]
    assert safe == now


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "after"),
    [("start", 0), ("log", 0), ("log", 1), ("figure", 0), ("figure", 1), ("table", 1), ("close", 0)],
)
def test_a_failure_is_said_once_and_the_run_is_the_same(tmp_path, untracked, method, after):
    folder = tmp_path / "run" / "one"
    done, text = run(folder, fails_at=method, after=after)
    assert (folder / "rows.parquet").read_bytes() == untracked
    assert (folder / "figures" / "retention_matrix.png").exists()
    assert (folder / "sequences.csv").exists()
    (line,) = [line for line in text.splitlines() if "failed" in line]
    assert line.startswith(f"Fake failed ({method}")
    assert "RuntimeError: no [bold]space[/bold] left)" in line
    assert done.tracker.tracker is None
    assert len(called(method)) == after + (2 if method == "close" else 1)
    assert called("close")[-1] == [False]
    assert CALLS[-1][0] == "close"  # nothing after it


def test_a_tracker_that_would_end_the_process_fails_alone(tmp_path):
    _, text = run(tmp_path, fails_at="log", error="SystemExit")
    assert "Fake failed (log: SystemExit: no [bold]space[/bold] left)" in text
    assert json.loads((tmp_path / "progress.json").read_text())["finished"]


def test_an_interruption_is_no_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fails_at="log", after=2, error="KeyboardInterrupt")
    assert pd.read_parquet(tmp_path / "rows.parquet").step.max() == 1
    assert CALLS[-1] == ("close", False)


def test_a_run_that_ends_early_is_shown_until_then(tmp_path):
    with pytest.raises(UserError, match="orders=0"):
        run(tmp_path, "task.retention.orders=0")
    assert [name for name, *_ in CALLS] == ["start", "table", "close"]
    assert called("table")[0][1].empty
    assert called("close") == [[False]]


def test_a_mirror_of_nothing_takes_everything():
    mirror = Mirror()
    mirror.rows([{"step": 1}])
    mirror.figure("name", Path("none.png"))
    mirror.table("name", pd.DataFrame())
    mirror.replies(pd.DataFrame())


def test_a_store_mirrors_each_row_once_and_what_it_recovers_too(tmp_path):
    seen = []
    store = ParquetStore(tmp_path, mirror=seen.append)
    store.flush()
    assert seen == []
    store.log({"step": 1})
    store.log({"step": 2})
    store.flush()
    store.log({"step": 3})
    store.flush()
    assert seen == [[{"step": 1}, {"step": 2}], [{"step": 3}]]
    again = ParquetStore(tmp_path, mirror=seen.append)
    again.recover(lambda row: row["step"] < 3)
    again.log({"step": 3})
    again.flush()
    assert seen[2] == [{"step": 1}, {"step": 2}, {"step": 3}]


USUAL = {"model": "m", "editor": "QF", "layer": 4, "condition": "edited"}


def row(kind, generated, **more):
    same = {
        "task": "t",
        "model": "m",
        "editor": "QF",
        "regime": "sequential",
        "condition": "edited",
        "layer": 4,
        "step": 2,
    }
    asked = {"kind": kind, "generated": generated, "query": "q", "expected": "e", "reply": "r", "checkpoint": True}
    return same | asked | {"fresh": False, "forced": 0.5, "relative_norm": 0.1, "solve_tokens": 7} | more


def points(*rows):
    return [(step, values) for step, values in curves(pd.DataFrame(rows), USUAL)]


def test_a_point_is_a_share_of_replies_and_the_health_of_the_change():
    ((step, values),) = points(
        row("edit", False), row("edit", True, fresh=True), row("prior", True), row("paraphrase", True, fresh=True)
    )
    assert step == 2
    assert values == {
        "t_sequential/edit": 0.5,
        "t_sequential/prior": 1.0,
        "t_sequential/new_edit": 1.0,
        "t_sequential/new_paraphrase": 1.0,  # of the new fact alone, so no share of all paraphrases
        "t_sequential/relative_norm": pytest.approx(0.1),
        "t_sequential/solve_tokens": 7.0,
    }


def test_between_checkpoints_only_the_new_fact_has_points():
    ((_, values),) = points(row("edit", True, fresh=True, checkpoint=False), row("other", True, checkpoint=False))
    assert {name for name in values if "edit" in name or "other" in name} == {"t_sequential/new_edit"}


def test_steps_and_series_are_apart_and_named_by_what_differs_from_the_run():
    rows = [
        row("edit", True),
        row("edit", False, step=3),
        row("edit", True, model="big/model.v2", editor="QF2"),
        row("edit", True, layer=3, order=1.0, scheme="answer_only", lr=0.05, regime="single"),
        row("edit", True, condition="placebo"),
        row("edit", True, condition="unedited", regime=None, layer=np.nan, checkpoint=None, step=0, fresh=None),
    ]
    found = [(step, next(name for name in values if name.endswith("/edit"))) for step, values in points(*rows)]
    assert found == [
        (2, "t_sequential/edit"),
        (3, "t_sequential/edit"),
        (2, "t_big_model_v2_QF2_sequential/edit"),
        (2, "t_answer_only_single_layer3_lr0_05_order1/edit"),
        (2, "t_sequential_placebo/edit"),
        (0, "t_unedited/edit"),
    ]


def test_rows_that_are_no_replies_give_their_numbers():
    training = [
        {"task": "convert", "step": s, "loss": 2.0 / s, "lr": 0.1 / s, "layer": 4, "model": "m"} for s in (1, 2)
    ]
    assert points(*training) == [
        (1, {"convert/loss": 2.0, "convert/lr": 0.1, "convert/layer": 4.0}),
        (2, {"convert/loss": 1.0, "convert/lr": 0.05, "convert/layer": 4.0}),
    ]
    both = points(*training, row("edit", True, fresh=True))
    assert both[:2] == points(*training)
    assert both[2:] == points(row("edit", True, fresh=True))


def test_a_row_without_a_step_or_a_value_is_no_point():
    assert points({"task": "t", "condition": "unsupported", "reply": "no such layer"}) == []
    ((_, values),) = points(row("edit", True, relative_norm=np.nan))
    assert "t_sequential/relative_norm" not in values


def test_the_last_replies_are_those_of_each_series_last_step():
    rows = [row("edit", step == 3, step=step, reply=f"said at {step}") for step in (1, 2, 3)]
    rows += [row("edit", True, step=1, regime="joint", reply=f"joint {n}") for n in range(4)]
    rows += [{"task": "t", "step": 9, "loss": 1.0}]
    shown = last_replies(pd.DataFrame(rows), USUAL)
    assert list(shown.columns) == ["series", "step", "kind", "query", "expected", "reply", "generated"]
    assert list(shown.reply) == ["said at 3", *(f"joint {n}" for n in range(4))]
    assert list(shown.series.unique()) == ["t_sequential", "t_joint"]
    assert list(last_replies(pd.DataFrame(rows), USUAL, most=4).reply) == ["said at 3", "joint 0", "joint 1"]


@pytest.mark.slow
def test_a_tracker_of_ones_own_is_told_of_experiment_and_sweep(tmp_path):
    where = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    own = "tracker={_target_: test_tracking.Writer}"
    command = [sys.executable, "-m", "qfbench.commands.run"]
    same = ["experiment=retention", "model=world-xs", "facts.n=1", own]
    for more in (["hydra.run.dir=alone"], ["-m", "editor.layer=1,2", "hydra.sweep.dir=many"]):
        done = subprocess.run(
            [*command, *more, *same], capture_output=True, text=True, cwd=tmp_path, check=False, env=os.environ | where
        )
        assert done.returncode == 0, done.stderr
    alone, *many = (
        json.loads(p.read_text()) for p in [tmp_path / "alone/told.json", *tmp_path.glob("many/*/told.json")]
    )
    assert alone == {"experiment": "retention", "sweep": None, "tags": ["world-xs", "QF", "world"]}
    assert many == [alone | {"sweep": "many"}] * 2
