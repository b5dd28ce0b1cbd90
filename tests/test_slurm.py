"""Slurm, where there is one: `pytest -m slurm`. The shared folder of a checkout says how to start one on a single machine."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from test_study import SMALL

from qfbench.commands.settings import CONF

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(shutil.which("sbatch") is None, reason="there is no Slurm here"),
]
LAUNCH = ["hydra/launcher=slurm_cpu", "hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=null", "threads=1"]
LONG = ["-m", "experiment=retention", "model=world-xs", "regression=[none]", "facts.n=60", "commit_seconds=1"]
LONG += ["task.retention.placebo=0", "task.retention.every=1", "editor.layer=1,2"]


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    known = os.environ | {"PYTHONPATH": str(CONF.parent), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "qfbench.commands.run", *arguments, *LAUNCH]
    return subprocess.Popen(command, cwd=folder, env=known, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def done(process, seconds=550):
    out, _ = process.communicate(timeout=seconds)
    return process.returncode, out


def queued():
    """Jobs of Slurm by id: their state."""
    said = subprocess.run(["squeue", "-h", "-o", "%i %T", "-r"], capture_output=True, text=True, check=True).stdout
    return dict(line.split() for line in said.splitlines())


def running_with_rows(folder, seconds=120):
    """The id of a running job, once both runs below `folder` have rows and none is finished."""
    for _ in range(seconds * 5):
        found = list(folder.glob("outputs/retention/*/rows.parquet"))
        jobs = [job for job, state in queued().items() if state == "RUNNING"]
        if len(found) == 2 and len(jobs) == 2 and not list(folder.glob("outputs/retention/*/retention.csv")):
            return jobs[0]
        time.sleep(0.2)
    raise AssertionError("no job has written rows")


def rows(folder):
    """All rows of all runs, by the name of the run."""
    return {path.parent.name: pd.read_parquet(path) for path in folder.glob("outputs/retention/*/rows.parquet")}


def alike(found, wanted):
    """What is kept of earlier passes decides the last bits of numbers, and a new process has kept nothing: a model that an edit
    has broken may then say other nonsense (one reply of 16,645 was seen to differ)."""
    assert found.keys() == wanted.keys()
    for name, frame in found.items():
        same = frame.reply == wanted[name].reply
        assert (~same).mean() < 1e-3
        pd.testing.assert_frame_equal(frame[same], wanted[name][same], rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    code, out = done(start(folder, *LONG))
    assert code == 0, out
    assert len(rows(folder)) == 2
    return rows(folder)


def test_a_study_is_an_array_and_its_conversions_come_first(tmp_path):
    steps = "task.convert.conversion.steps=460"
    small = [one for one in SMALL if not one.startswith(("study.editors", "study.rates"))]
    code, out = done(
        start(
            tmp_path / "study", "experiment=study", *small, "study.editors=[qf_answer_only,qf2_answer_only]",
            "study.rates={qf2_answer_only: [0.1]}", "study.convert=true", "study.reckon=false",
            "task.retention.not_understood=teach",  # so short a conversion breaks the model
            f'study.conversion=["experiment=convert","data.batch=2","{steps}"]',
        )
    )  # fmt: skip
    assert code == 0, out
    assert "layers to convert first: 1" in out
    made = next((tmp_path / "study/outputs/conversions").glob("*/model/recipe.json"))
    runs = list((tmp_path / "study/outputs/study").glob("*/rows.parquet"))
    assert len(runs) == 2
    assert all(made.stat().st_mtime < path.stat().st_mtime for path in runs)
    table = pd.read_csv(tmp_path / "study/outputs/study/study/study.csv")
    assert set(table.editor) == {"qf_answer_only", "qf2_answer_only"}


@pytest.mark.parametrize("how", [["scontrol", "requeue"], ["scancel", "-s", "USR2"]])
def test_a_job_that_is_killed_and_queued_again_goes_on_from_its_rows(tmp_path, undisturbed, how):
    """`requeue` kills it, as a lost node does; SIGUSR2 is what submitit has Slurm send before the time is up."""
    process = start(tmp_path, *LONG)
    job = running_with_rows(tmp_path)
    time.sleep(2)
    subprocess.run([*how, job], check=True)
    code, out = done(process)
    assert code == 0, out
    alike(rows(tmp_path), undisturbed)
    logs = "".join(path.read_text() for path in tmp_path.rglob("*_log.out"))
    assert "going on in" in logs


def test_after_scancel_the_same_command_goes_on(tmp_path, undisturbed):
    process = start(tmp_path, *LONG)
    running_with_rows(tmp_path)
    time.sleep(2)
    subprocess.run(["scancel", *queued()], check=True)
    if subprocess.run(["sacct"], capture_output=True, check=False).returncode:
        process.send_signal(signal.SIGINT)  # without accounting nobody tells submitit that a job is gone
    code, out = done(process)
    assert code != 0
    assert "Traceback" not in out, out
    code, out = done(start(tmp_path, *LONG))
    assert code == 0, out
    alike(rows(tmp_path), undisturbed)


def test_many_jobs_at_once_share_one_cache(tmp_path):
    swept = [
        "-m",
        "experiment=retention",
        "model=world-xs",
        "regression=[none]",
        "facts.n=1",
        "task.retention.placebo=0",
    ]
    layers, ridges = "editor.layer=1,2", f"editor.ridge={','.join(str(n / 100) for n in range(10))}"
    code, out = done(start(tmp_path, *swept, layers, ridges))
    assert code == 0, out
    runs = list((tmp_path / "outputs/retention").glob("*/rows.parquet"))
    assert len(runs) == 20
    unedited = {pd.read_parquet(path).query("condition == 'unedited'").reply.str.cat() for path in runs}
    assert len(unedited) == 1


def test_an_interrupted_sweep_says_how_to_go_on(tmp_path):
    process = start(tmp_path, *LONG)
    running_with_rows(tmp_path)
    process.send_signal(signal.SIGINT)
    code, out = done(process)
    subprocess.run(["scancel", *queued()], check=False)
    assert code == 130, out
    assert "Traceback" not in out, out
