"""A run that is killed anywhere, and started again in its folder, ends with the same rows and tables as an unbroken one."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import notebook
import pandas as pd
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from test_contract import composed
from test_run import SMALL

import qfbench.commands.execution
import qfbench.tasks.retention
import qfbench.tasks.run
from qfbench import UserError
from qfbench.commands.execution import execute
from qfbench.models.delta import WeightDelta
from qfbench.runs import store
from qfbench.runs.ledger import Ledger
from qfbench.tasks.run import Run

NAME = Path("outputs") / "run"  # run_id holds the names of the folder and of its parent


class Killed(BaseException):
    """What stands for SIGKILL: nothing may happen on the disk after it."""


class Note(notebook.Note):
    """The notebook's editor at a place that every model has."""

    @property
    def sites(self):
        return (
            type(
                "Place",
                (),
                {
                    "layer": self.layer,
                    "block": lambda *_: None,
                    "home": lambda *_: "cpu",
                    "weight_name": lambda *_: "weight",
                },
            )(),
        )


def settings(**task):
    """Three facts taught to the notebook in two orders, with two placebos, under every regime; protected is unsupported."""
    cfg = composed(*SMALL, "experiment=retention", "regime=[sequential,single,joint,protected]", "commit_seconds=0")
    del cfg.hydra
    cfg.model.path = "notebook"
    cfg.facts = OmegaConf.create({"_target_": "notebook.suite"})
    cfg.editor = OmegaConf.create({"_target_": "test_kill.Note"})
    cfg.regression = {}
    cfg.task.retention.update(orders=2, placebo=2)
    cfg.task.retention.update(task)
    return cfg


@pytest.fixture(scope="module")
def plain():
    return settings()


@contextmanager
def without(tables):
    """The notebook instead of a model, no figures, and no tables unless `tables`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(qfbench.tasks.run, "load", lambda model: notebook.Notebook(notebook.suite()))
        patched.setattr(Run, "figure", lambda self, figure, name: None)
        patched.setattr(qfbench.tasks.retention, "OF_SEQUENCES", {})
        patched.setattr(qfbench.runs.provenance, "_commit", lambda: "")
        if not tables:
            patched.setattr(qfbench.tasks.retention, "report", lambda *about: None)
        yield


@pytest.fixture
def tabled():
    with without(tables=True):
        yield


@pytest.fixture
def quick():
    """Tables take most of the time, and follow from the rows."""
    with without(tables=False):
        yield


def start(cfg, folder):
    return execute(copy.deepcopy(cfg), folder, Console(quiet=True), brief=True)


def kept(folder):
    """What a run is judged by, byte for byte: its rows and tables, and what it says it has done; and its changes of weights."""
    files = sorted([folder / "rows.parquet", folder / "progress.json", *folder.glob("*.csv"), *folder.glob("deltas/*")])
    return {path.name: path.read_bytes() for path in files}


def watched(monkeypatch, write):
    """Call `write(path, torn)` after all that changes the disk: `torn` where a file might be half written there."""

    def watch(owner, name, file):
        real = getattr(owner, name)

        def patched(*args, **kwargs):
            given = real(*args, **kwargs)
            path = Path(args[file])
            if name in ("replace", "unlink", "mkdir"):
                write(path, False)
            else:
                write(path, True)
                write(path, False)
            return given

        monkeypatch.setattr(owner, name, staticmethod(patched) if owner is OmegaConf else patched)

    for owner, name, file in (
        (Path, "replace", 0),
        (Path, "unlink", 0),
        (Path, "write_text", 0),
        (pd.DataFrame, "to_parquet", 1),
        (pd.DataFrame, "to_csv", 1),
        (WeightDelta, "save", 1),
    ):
        watch(owner, name, file)


# Files that a start writes in place; a test below is about them. Changes of weights are renamed into place by safetensors.
IN_PLACE = ("config.yaml", "provenance.json")


def moments(cfg, tmp_path):
    """The unbroken run of `cfg`, and a copy of its folder for every moment at which it might have been killed.

    What a run does between two changes of its folder (rows that it logs, replies) is lost with the process, so that no more
    than these moments can be told apart.
    """
    folder, copies = tmp_path / "whole" / NAME, []

    def keep(path, torn):
        if not path.is_relative_to(folder) or (torn and (path.name in IN_PLACE or path.suffix == ".safetensors")):
            return
        copied = tmp_path / f"moment{len(copies)}" / NAME
        shutil.copytree(folder, copied)
        if torn:
            target = copied / path.relative_to(folder)
            target.write_bytes(target.read_bytes()[: target.stat().st_size // 2])
        copies.append((copied, f"{'half of ' if torn else ''}{path.relative_to(folder)}"))

    with pytest.MonkeyPatch.context() as monkeypatch:
        watching = [True]

        def write(path, torn):
            if watching[0]:
                watching[0] = False  # what `keep` itself writes
                keep(path, torn)
                watching[0] = True

        watched(monkeypatch, write)
        start(cfg, folder)
    return folder, copies


def differing(cfg, whole, copies):
    """The moments from which a new process does not come to what the unbroken run kept."""
    wanted, wrong = kept(whole), []
    for copied, what in copies:
        again = copied.parents[1] / "again" / NAME
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(copied, again)
        try:
            start(cfg, again)
            found = kept(again)
            if found != wanted:
                wrong.append((what, [n for n in {**found, **wanted} if found.get(n) != wanted.get(n)]))
        except Exception as error:
            wrong.append((what, repr(error)))
    return wrong


EDITORS = ({}, {"broken": "2"})


def with_editor(cfg, editor):
    cfg = copy.deepcopy(cfg)
    cfg.editor = OmegaConf.create({"_target_": "test_kill.Note", **editor})
    return cfg


@pytest.mark.slow
@pytest.mark.parametrize("editor", [EDITORS[0], EDITORS[1]])
def test_a_run_that_is_killed_at_any_of_many_moments_ends_as_the_unbroken_one(tmp_path, plain, tabled, editor):
    cfg = with_editor(plain, editor)
    whole, copies = moments(cfg, tmp_path)
    assert len(copies) > 150
    assert differing(cfg, whole, random.Random(1).sample(copies, 150)) == []


@pytest.fixture(scope="module")
def anywhere(plain, tmp_path_factory):
    """The configuration with one of `EDITORS`, and its `moments`, without tables."""

    @cache
    def make(n):
        cfg = with_editor(plain, EDITORS[n])
        with without(tables=False):
            return cfg, *moments(cfg, tmp_path_factory.mktemp("anywhere"))

    return make


@pytest.fixture(scope="module")
def unbroken(plain, tmp_path_factory):
    """What an unbroken run keeps, and its rows, without tables."""
    folder = tmp_path_factory.mktemp("unbroken") / NAME
    with without(tables=False):
        return start(plain, folder).store.frame(), kept(folder)


@pytest.mark.parametrize("editor", range(len(EDITORS)))
def test_a_run_that_is_killed_ends_with_the_same_rows(anywhere, quick, editor):
    """Some of the moments that the slow test above tries."""
    cfg, whole, copies = anywhere(editor)
    assert differing(cfg, whole, random.Random(0).sample(copies, 5)) == []


def test_a_run_that_is_killed_between_a_commit_and_the_removal_of_old_states_has_no_row_twice(anywhere, quick):
    cfg, whole, copies = anywhere(1)
    two = [(c, what) for c, what in copies if what == "progress.part" and len(list(c.glob("state/*"))) > 1]
    assert differing(cfg, whole, two) == []


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_rows(tmp_path, plain, quick, unbroken, monkeypatch):
    folder = tmp_path / NAME
    draw, lives, ended = random.Random(1), 0, False
    while not ended:
        left, lives = draw.randrange(12, 80), lives + 1

        def write(path, torn):
            nonlocal left
            left -= 1
            if left <= 0 and not (torn and (path.name in IN_PLACE or path.suffix == ".safetensors")):
                raise Killed  # and so at every attempt to write after it

        with monkeypatch.context() as patched:
            watched(patched, write)
            patched.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                start(plain, folder)
                ended = True
            except Killed:
                pass
        assert lives < 60
    assert lives > 5
    assert kept(folder) == unbroken[1]


def killed_at_row(cfg, folder, monkeypatch, which):
    """A run that was killed as it logged the first row that is so; what it had committed is on the disk, and rows behind it."""
    real = store.ParquetStore.log

    def log(self, row):
        if which(row):
            raise Killed
        real(self, row)

    with monkeypatch.context() as patched:
        patched.setattr(store.ParquetStore, "log", log)
        with pytest.raises(Killed):
            start(cfg, folder)


@pytest.mark.parametrize("condition", ["edited", "placebo"])
def test_a_run_that_is_killed_at_a_row_ends_with_the_same_rows(
    tmp_path, plain, quick, unbroken, monkeypatch, condition
):
    """`execute` itself sees to the rows that were logged before an exception: here they are on the disk, uncommitted."""
    (rows, wanted), folder = unbroken, tmp_path / NAME
    at = [n for n, row in enumerate(rows.condition) if row == condition]
    for n in random.Random(2).sample(at, 2):
        shutil.rmtree(folder, ignore_errors=True)
        left = iter(range(n + 1))
        killed_at_row(plain, folder, monkeypatch, lambda row, left=left, n=n: next(left) == n)
        assert len(pd.read_parquet(folder / "rows.parquet")) == n
        start(plain, folder)
        assert kept(folder) == wanted


def test_a_rerun_that_is_killed_while_it_empties_the_folder_is_not_finished(tmp_path, plain, quick, monkeypatch):
    folder = tmp_path / NAME
    start(plain, folder)
    again = copy.deepcopy(plain)
    again.rerun = True
    real = Path.unlink

    def unlink(path, *args):
        if path.name == "rows.parquet":
            raise Killed
        real(path, *args)

    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=True)))  # rows.parquet first
    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            start(again, folder)
    assert not (folder / "progress.json").exists()
    assert start(plain, folder) is not None  # None: "measured already"


def test_a_killed_run_still_knows_the_models_beside_of_its_finished_tasks(tmp_path, plain, quick):
    cfg = copy.deepcopy(plain)
    target = {"_partial_": True, "_target_": "test_kill.beside"}
    cfg.task = OmegaConf.create({"first": target, "second": {"_partial_": True, "_target_": "test_kill.killed_once"}})
    folder = tmp_path / NAME
    LIVES[:] = [1]
    with pytest.raises(Killed):
        start(cfg, folder)
    assert "models_beside" in json.loads((folder / "provenance.json").read_text())
    start(cfg, folder)
    assert "models_beside" in json.loads((folder / "provenance.json").read_text())


LIVES = []


def beside(run):
    run.elsewhere({}, Note(1)).log({"step": 0})


def killed_once(run):
    if LIVES:
        LIVES.pop()
        raise Killed
    run.log({"step": 0})


def test_a_run_whose_end_could_not_be_noted_loses_no_rows(tmp_path, plain, quick, unbroken, monkeypatch):
    folder = tmp_path / NAME
    real, calls = Ledger.write, []

    def full(self, name, write):
        calls.append(name)
        return not (name == "progress.json" and calls.count("progress.json") > 3) and real(self, name, write)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "write", full)
        with pytest.raises(UserError, match="cannot be written to"):
            start(plain, folder)
    start(plain, folder)
    assert kept(folder) == unbroken[1]


def command(*overrides):
    few = (
        "facts.n=2",
        "task.retention.orders=2",
        "task.retention.placebo=2",
        "commit_seconds=0",
        "threads=1",
        "cache=null",
    )
    regimes = "regime=[sequential,joint,protected]"
    own = ("experiment=retention", "model=world-xs", regimes, *few, "hydra.run.dir=run")
    return [sys.executable, "-m", "qfbench.commands.run", *own, *overrides]


def begun(cwd, errors="errors"):
    cwd.mkdir(parents=True, exist_ok=True)
    root = str(Path(qfbench.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    env = os.environ | {"PYTHONPATH": path}
    with (cwd / errors).open("w") as stderr:
        return subprocess.Popen(command(), cwd=cwd, env=env, stdout=subprocess.DEVNULL, stderr=stderr)


def newer(cwd, pattern, since):
    """Whether a file of the run was written since then."""
    try:
        return any(path.stat().st_mtime > since for path in (cwd / "run").rglob(pattern))
    except FileNotFoundError:  # gone meanwhile
        return True


def wait_for(process, cwd, pattern):
    since = time.time()
    while process.poll() is None and not newer(cwd, pattern, since):
        time.sleep(0.0005)


@pytest.mark.slow
def test_a_process_that_is_killed_and_started_again_ends_with_the_same_files(tmp_path):
    whole = begun(tmp_path / "whole" / "work")
    wait_for(whole, tmp_path / "whole" / "work", "provenance.json")
    began = time.monotonic()
    assert whole.wait(300) == 0
    works = time.monotonic() - began
    cwd, draw, kills = tmp_path / "killed" / "work", random.Random(0), 0
    # So long after it began to work, or as soon as such a file is written.
    when = [draw.uniform(0, 0.2) * works for _ in range(7)] + ["*-1.safetensors", "rows.part"]
    draw.shuffle(when)
    for moment in [*when, "*.csv"]:
        process = begun(cwd)
        wait_for(process, cwd, moment if isinstance(moment, str) else "provenance.json")
        if not isinstance(moment, str):
            time.sleep(moment)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        assert process.wait(60) in (0, -signal.SIGKILL), (cwd / "errors").read_text()
    last = begun(cwd)
    assert last.wait(300) == 0, (cwd / "errors").read_text()
    assert kills >= 6
    assert kept(cwd / "run") == kept(tmp_path / "whole" / "work" / "run")


@pytest.mark.slow
def test_a_folder_is_free_again_when_the_process_that_holds_it_is_killed(tmp_path):
    first = begun(tmp_path)
    wait_for(first, tmp_path, "rows.parquet")
    first.send_signal(signal.SIGSTOP)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.*") if p.is_file()}
    second = begun(tmp_path, "second")
    assert second.wait(120) == 2
    said = (tmp_path / "second").read_text()
    assert said.count("\n") == 1
    assert "another process is working on this run; let it finish, or stop it" in said
    assert {p: p.read_bytes() for p in (tmp_path / "run").glob("*.*") if p.is_file()} == before
    first.send_signal(signal.SIGKILL)
    first.wait(60)
    with store.alone(tmp_path / "run"):
        pass


def test_a_folder_that_a_process_holds_is_refused_until_that_is_killed(tmp_path, plain, quick):
    folder = tmp_path / NAME
    hold = "import sys, time, pathlib; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); time.sleep(60)"
    folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", hold, str(folder / ".lock")], stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with pytest.raises(
            UserError, match="another process is working on this run; let it finish, or stop it"
        ) as error:
            start(plain, folder)
        assert "\n" not in str(error.value)
        assert [p.name for p in folder.iterdir()] == [".lock"]
        holder.kill()
    start(plain, folder)
