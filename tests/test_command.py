"""The command `qfbench`: what it says of itself, and of what cannot be run: one line, no traceback, the right exit status."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from hydra.core.global_hydra import GlobalHydra
from test_contract import options

import qfbench
from qfbench.commands import run
from qfbench.commands.settings import CONF

MODELS = Path(qfbench.__file__).parent / "world" / "models"
SMALL = (
    "experiment=retention",
    "model=world-xs",
    "facts.n=1",
    "regression=[none]",
    "task.retention.placebo=0",
    "threads=1",
)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Exit status, output and errors of `qfbench`, in a process that goes on."""

    def call(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["qfbench", *arguments])
            patched.setenv("HYDRA_FULL_ERROR", "1")
            patched.delenv("HYDRA_FULL_ERROR")
            patched.chdir(tmp_path)
            patched.setattr(signal, "signal", lambda *_: None)
            try:
                run.main()
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                GlobalHydra.instance().clear()
                os.environ.pop("HYDRA_FULL_ERROR", None)
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


def test_help_says_what_qfbench_is_and_names_all_there_is(command):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert out.startswith("qfbench: ")
    for group in run.GROUPS:
        for option in options(group):
            assert option in out
    for name in options("experiment"):
        (line,) = [line for line in out.split("\n") if line.startswith(f"  {name} ")]
        assert len(line.split()) > 3
    assert set(run.GROUPS) | {"experiment", "search", "hydra"} == {
        path.name for path in CONF.iterdir() if path.is_dir()
    }
    assert all(f"hydra/launcher={path.stem}" in out for path in (CONF / "hydra/launcher").glob("*.yaml"))
    for other in ("qfbench-facts", "qfbench-results", "qfbench-report", "qfbench-edits"):
        assert other in out


def test_what_looks_at_settings_imports_nothing_heavy(tmp_path):
    """Five seconds of imports are not for a typo."""
    code = (
        "import sys; from qfbench.commands import run\n"
        "try: run.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lm_eval', 'pandas', 'matplotlib', 'rich', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    root = str(Path(qfbench.__file__).parent.parent)
    for arguments in (["--help"], ["--cfg", "job"], ["--info"], ["editor.layr=1"], ["model=nonsense"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (arguments, done.stderr)


WRONG = {
    ("editor.layr=1",): "layr",
    ("model=nonsense",): "nonsense",
    ("-m", "editor.layer=1,2", "--cfg", "hydra"): "Only one of",
    ("seed=9999999999999999999999",): "seed=9999999999999999999999: must be 0 to",
    ("regime=[]",): "regime=[]: choose at least one",
    ("editor.ridge=nan",): "editor.ridge=nan: must be a finite number",
    ("editor=finetune", "editor.lr=1e300"): "editor.lr=1e+300: must be 1e37 or less",
    ("threads=99999",): "threads=99999: must be 0 to 256",
    ("model=world-s", "model.path=/none"): "give model=own",
    ("model.path=/none",): "/none: no such model",
    ("hydra.run.dir=/dev/null",): "/dev/null",
    ("hydra.run.dir=/dev/null/run",): "/dev/null/run",
    ("editor=qf2", "model=world-xs"): "QF2 needs a firing block at layer 2",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_what_cannot_be_run_is_one_message_and_exit_2(command, arguments):
    code, out, err = command(*arguments)
    assert code == 2
    assert err.startswith("qfbench: ")
    assert WRONG[arguments] in err
    assert len(err.strip().split("\n")) == 1
    assert out == ""


def test_a_folder_that_cannot_be_written_to_is_one_line(command, tmp_path, monkeypatch):
    def refused(*_args, **_how):
        raise PermissionError(13, "Permission denied", "run/.lock")

    monkeypatch.setattr("qfbench.runs.store.FileLock.acquire", refused)
    code, _, err = command(*SMALL, "hydra.run.dir=run")
    assert code == 2
    assert "a run cannot be kept there ([Errno 13] Permission denied: 'run/.lock'); give another hydra.run.dir" in err
    assert len(err.strip().split("\n")) == 1


def test_names_are_no_markup(command, tmp_path):
    shutil.copytree(MODELS / "world-xs", tmp_path / "m[" / "x]")
    code, out, err = command(
        "experiment=eight_steps", "regression=[none]", f'model.path="{tmp_path}/m[/x]"', 'hydra.run.dir="out[/b]x"'
    )
    assert (code, err) == (0, "")
    assert f"The eight steps: {tmp_path}/m[/x]" in " ".join(out.split())
    assert "wrote out[/b]x: " in out


def test_a_sweep_whose_job_measures_nothing_ends_with_1_and_says_which(command, tmp_path):
    code, _, err = command("-m", *SMALL, "editor=qf,qf2", "hydra.sweep.dir=sweep")
    assert code == 1
    assert "threads=1 editor=qf2: QF2 needs a firing block at layer 2" in err
    assert len(list((tmp_path / "sweep").glob("*/rows.parquet"))) == 1  # of the other


def test_a_regime_that_an_editor_has_not_measures_nothing_and_says_so_again(command, tmp_path):
    for _ in range(2):
        code, _, err = command(*SMALL, "editor=finetune", "regime=[protected]", "hydra.run.dir=run")
        assert code == 2
        assert (
            err
            == "qfbench: retention measured nothing: FineTune cannot protect earlier keys; use regime=sequential or joint\n"
        )


def test_a_refused_command_leaves_a_finished_run_as_it_was(command, tmp_path):
    assert command(*SMALL, "hydra.run.dir=run")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, err = command(*SMALL, "seed=1", "hydra.run.dir=run")
    assert code == 2
    assert "holds a run with other settings" in err
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    held = "regression=[perplexity]", "regression.perplexity.path=/none.txt"
    late = [["rerun=true", *held], ["rerun=true", "editor.layer=9"], ["rerun=true", "task.retention.every=a"]]
    for wrong in late:  # what may empty the folder comes after all that may be refused
        own = [word for word in SMALL if not (held[0] in wrong and word.startswith("regression"))]
        assert command(*own, *wrong, "hydra.run.dir=run")[0] == 2
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert "measured already" in command(*SMALL, "hydra.run.dir=run")[1]


def test_a_fault_of_ours_is_shown_whole_and_said_to_be_one(tmp_path, monkeypatch, capsys):
    def broken(*_args, **_how):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("qfbench.commands.execution.execute", broken)
    monkeypatch.setattr(sys, "argv", ["qfbench", *SMALL, "hydra.run.dir=run"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        run.main()
    os.environ.pop("HYDRA_FULL_ERROR", None)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" in said
    assert "qfbench: ZeroDivisionError, which is a fault of qfbench or of a library: please report it" in said


def begun(cwd, *arguments, **environment):
    root = str(Path(qfbench.__file__).parent.parent)
    line = [sys.executable, "-m", "qfbench.commands.run", *SMALL, "hydra.run.dir=run", *arguments]
    env = os.environ | {"PYTHONPATH": root} | environment
    return subprocess.Popen(line, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_keeps_its_rows_and_says_how_to_go_on(tmp_path, sent, status):
    process = begun(tmp_path, "facts.n=60", "commit_seconds=1")
    while process.poll() is None and not (tmp_path / "run" / "progress.json").exists():
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(sent)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err == "qfbench: stopped; the same command goes on from what is in run\n"
    rows = pd.read_parquet(tmp_path / "run" / "rows.parquet")
    assert (rows.condition == "edited").any()
    again = begun(tmp_path, "facts.n=60", "commit_seconds=1")
    out, err = again.communicate(timeout=300)
    assert (again.returncode, err) == (0, "")
    assert "going on in run after" in out


@pytest.mark.slow
def test_a_terminal_that_knows_ascii_alone_is_served(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(
        '{"instruction": "\U0001f600 runs Łódź.", "query": "Who runs Łódź?", "answer": "\U0001f600 runs Łódź."}'
    )
    process = begun(
        tmp_path, "facts=table", f"facts.path={path}", "task.retention.not_understood=teach", PYTHONIOENCODING="ascii"
    )
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert process.returncode == 0, err
    assert out.isascii()
