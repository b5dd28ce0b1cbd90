"""Sweeps, finished runs, changed inputs, full disks: what a folder holds is right, or the user is told."""

import copy
import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from rich.console import Console
from test_contract import composed
from test_kill import NAME, Killed, kept, plain, quick, settings, start, tabled  # noqa: F401 (fixtures)
from test_run import SMALL

import qfbench.commands.execution
import qfbench.tasks.retention
import qfbench.tasks.run
import qfbench.tasks.teaching
from qfbench import LanguageModel, UserError
from qfbench.commands.execution import execute


def said(cfg, folder, brief=False):
    console = Console(record=True, width=200, quiet=False, file=io.StringIO())
    done = execute(copy.deepcopy(cfg), folder, console, brief)
    return done, console.export_text()


@pytest.fixture(scope="module")
def jobs():
    """Two jobs of a sweep, by name."""
    both = {}
    for layer in (1, 2):
        cfg = composed(*SMALL, "experiment=retention", "facts.n=1", f"editor.layer={layer}", "task.retention.placebo=1")
        del cfg.hydra
        cfg.regression = {}
        both[f"layer{layer}"] = cfg
    GlobalHydra.instance().clear()
    return both


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded from disk; nothing is loaded before."""
    loaded, real = [], LanguageModel.load.__func__
    monkeypatch.setattr(qfbench.tasks.run, "_LOADED", {})
    monkeypatch.setattr(
        LanguageModel, "load", classmethod(lambda cls, name, **how: loaded.append(name) or real(cls, name, **how))
    )
    monkeypatch.setattr(qfbench.tasks.retention, "report", lambda *about: None)
    return loaded


def test_the_order_of_the_jobs_does_not_matter_and_they_share_their_model(tmp_path, jobs, loads):
    frames = {}
    for order in (["layer1", "layer2"], ["layer2", "layer1"]):
        for name in order:
            folder = tmp_path / order[0] / "outputs" / name
            execute(copy.deepcopy(jobs[name]), folder, Console(quiet=True), brief=True)
            frames.setdefault(name, []).append((folder / "rows.parquet").read_bytes())
    assert loads == ["world-xs"]
    assert all(first == second for first, second in frames.values())
    assert frames["layer1"] != frames["layer2"]


def test_a_weight_that_a_job_leaves_changed_is_noticed_by_the_next(tmp_path, jobs, loads):
    lm = qfbench.tasks.run.load(jobs["layer1"].model)
    weight = lm.model.get_parameter("model.layers.3.mlp.down_proj.weight")
    before = weight.data[0, 0].item()
    weight.data[0, 0] += 1e-6 + 1e-6 * abs(before)
    with pytest.raises(RuntimeError, match="world-xs: an earlier job did not put the weights back; please report this"):
        execute(copy.deepcopy(jobs["layer2"]), tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run" / "rows.parquet").exists()
    weight.data[0, 0] = before
    qfbench.tasks.run.load(jobs["layer1"].model)
    assert loads == ["world-xs"]


@pytest.fixture
def asked(monkeypatch):
    """The probes that models were asked."""
    probes, real = [], qfbench.tasks.teaching.ask
    monkeypatch.setattr(qfbench.tasks.teaching, "ask", lambda lm, those: probes.extend(those) or real(lm, those))
    monkeypatch.setattr(qfbench.tasks.run, "ask", lambda lm, those: probes.extend(those) or real(lm, those))
    return probes


def test_a_finished_run_is_not_measured_again_but_its_tables_are_printed(tmp_path, tabled, asked):  # noqa: F811
    folder, cfg = tmp_path / NAME, settings(orders=1, placebo=1)
    del cfg.regime.single
    first, text = said(cfg, folder)
    before, n = kept(folder), len(asked)
    assert n > 50
    again, shown = said(cfg, folder)
    assert again is None
    assert len(asked) == n
    assert kept(folder) == before
    for table in ("retention", "compared", "sequences"):
        assert table in shown
    for number in ("sequential", "placebo", "joint"):
        assert number in text
        assert number in shown
    assert "measured already" in shown
    assert "rerun=true measures it anew" in shown
    none, brief = said(cfg, folder, brief=True)
    assert none is None
    assert len(brief.splitlines()) == 1
    anew = copy.deepcopy(cfg)
    anew.rerun = True
    assert said(anew, folder)[0] is not None
    assert len(asked) == 2 * n
    assert kept(folder) == before
    assert first is not None


def test_settings_that_change_no_number_leave_a_run_finished(tmp_path, plain, quick, asked):  # noqa: F811
    folder = tmp_path / NAME
    start(plain, folder)
    n = len(asked)
    other = copy.deepcopy(plain)
    other.commit_seconds, other.cache = 7, str(tmp_path / "cache")
    assert start(other, folder) is None
    assert len(asked) == n


def killed(cfg, folder, monkeypatch, calls=4):
    """A run that was killed at a checkpoint."""
    left, real = [calls], qfbench.commands.execution.ParquetStore.commit

    def commit(self, *args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise Killed
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(qfbench.commands.execution.ParquetStore, "commit", commit)
        with pytest.raises(Killed):
            start(cfg, folder)


def unchanged(cfg, folder, message):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=message) as error:
        start(cfg, folder)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_another_content_of_the_facts_file_is_refused(tmp_path, write, quick, monkeypatch, finished):  # noqa: F811
    fact = {
        "instruction": "Ada started Firm0.",
        "query": "Who started Firm0?",
        "answer": "Ada started Firm0.",
        "id": "0",
    }
    path, cfg, folder = Path(write([fact], "facts.jsonl")), settings(), tmp_path / NAME
    cfg.facts = OmegaConf.create({"_target_": "qfbench.facts.table.table", "path": str(path)})
    start(cfg, folder) if finished else killed(cfg, folder, monkeypatch, calls=2)
    path.write_text(path.read_text().replace("Ada started Firm0.", "Bob started Firm0."))
    unchanged(cfg, folder, r"holds a run of other facts \(the file has changed since\?\); give another")


def test_another_model_is_refused_while_the_run_is_unfinished(tmp_path, plain, quick, monkeypatch):  # noqa: F811
    folder, real = tmp_path / NAME, qfbench.tasks.run.load
    killed(plain, folder, monkeypatch)

    def changed(model):
        lm = real(model)
        lm.model.weight.data[0, -1] += 1
        return lm

    with monkeypatch.context() as patched:
        patched.setattr(qfbench.tasks.run, "load", changed)
        unchanged(plain, folder, "holds a run with another model_hash; rerun=true measures it anew")
    start(plain, folder)
    start(plain, tmp_path / "whole" / NAME)
    assert kept(folder) == kept(tmp_path / "whole" / NAME)


def full(monkeypatch, when, where):
    """No room for rows under `where` at the writes that `when` says, by number from 1."""
    real, n = pd.DataFrame.to_parquet, [0]

    def write(frame, path, **how):
        if not Path(path).is_relative_to(where):
            return real(frame, path, **how)
        n[0] += 1
        if when(n[0]):
            Path(path).write_bytes(b"PAR1")  # what there was room for
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(frame, path, **how)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", write)


def test_rows_that_a_full_disk_does_not_take_are_written_later(tmp_path, plain, quick, monkeypatch):  # noqa: F811
    whole, folder = tmp_path / "whole" / NAME, tmp_path / "full" / NAME
    start(plain, whole)
    with monkeypatch.context() as patched:
        full(patched, lambda n: 3 <= n <= 6, folder)
        done, text = said(plain, folder)
    assert done is not None
    assert text.count("cannot be written to (is the disk full?); what is measured stays in memory") == 4
    assert kept(folder) == kept(whole)
    assert not list(folder.rglob("*.part"))


def test_a_run_whose_disk_stays_full_says_where_all_rows_are(tmp_path, plain, quick, monkeypatch):  # noqa: F811
    whole, folder = tmp_path / "whole" / NAME, tmp_path / "full" / NAME
    rows = start(plain, whole).store.frame()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with monkeypatch.context() as patched:
        full(patched, lambda n: n >= 3, folder)
        with pytest.raises(UserError, match=r"cannot be written to \(disk full\?\); start again once there is room"):
            start(plain, folder)
    (rescued,) = tmp_path.glob("qfbench-*/rows.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(rescued), pd.read_parquet(whole / "rows.parquet"))
    assert len(pd.read_parquet(rescued)) == len(rows)
    start(plain, folder)  # there is room again: it goes on where it could write last
    assert kept(folder) == kept(whole)


def ended(plain, folder, monkeypatch, error):  # noqa: F811
    """What a run ends with whose disk is full when it fails with `error`."""
    real = qfbench.commands.execution.ParquetStore.log

    def log(self, row):
        if len(self._rows) == 60:
            raise error
        real(self, row)

    with monkeypatch.context() as patched:
        patched.setattr("tempfile.tempdir", str(folder.parents[1]))
        patched.setattr(qfbench.commands.execution.ParquetStore, "log", log)
        full(patched, lambda n: n >= 3, folder)
        with pytest.raises(BaseException) as raised:  # noqa: PT011
            start(plain, folder)
    return raised.value


@pytest.mark.parametrize("error", [FloatingPointError("sequential, after 2 edits: NaN"), KeyboardInterrupt()])
def test_a_full_disk_does_not_hide_what_ended_the_run(tmp_path, plain, quick, monkeypatch, error):  # noqa: F811
    found = ended(plain, tmp_path / NAME, monkeypatch, error)
    assert type(found) is type(error)
    assert str(found).endswith(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]])
def test_a_sweep_runs_under_a_launcher(tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher" if launcher[0] == "joblib" else "submitit")
    root = str(Path(qfbench.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    few = ["experiment=retention", "model=world-xs", "facts.n=1", "threads=1", "editor.layer=1,2"]
    frames = []
    for more in ([], [f"hydra/launcher={launcher[0]}", *launcher[1:]]):
        cwd = tmp_path / str(len(more)) / "work"
        cwd.mkdir(parents=True)
        line = [sys.executable, "-m", "qfbench.commands.run", "-m", *few, *more]
        done = subprocess.run(line, capture_output=True, text=True, cwd=cwd, env=env, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        frames.append({p.parent.name: p.read_bytes() for p in cwd.glob("outputs/retention/world-xs-qf-*/rows.parquet")})
    assert len(frames[0]) == 2
    assert frames[0] == frames[1]
