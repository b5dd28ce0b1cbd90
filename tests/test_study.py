"""The core study: short lists to jobs, what is left out and said, what comes out; and that it goes on where it stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from test_report import run_rows

from qfbench import UserError
from qfbench.analysis.rows import regular
from qfbench.commands import study
from qfbench.commands.settings import CONF
from qfbench.commands.study import passed_on, planned, settings
from qfbench.pages import results
from qfbench.pages.study import core


@pytest.fixture(scope="module")
def composing():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield lambda overrides: compose("config", overrides=[str(one) for one in overrides], return_hydra_config=True)
    GlobalHydra.instance().clear()


def axes(composing, **lists):
    return settings(composing(["experiment=study", *(f"study.{name}={value}" for name, value in lists.items())]))


def plan(composing, common=("experiment=study",), **lists):
    return planned(axes(composing, **lists), common, composing)


def jobs(plan):
    return [(job.model, job.editor, job.layer, job.lr, job.seed) for job in plan.jobs]


def test_the_plan_is_the_product_of_the_lists_but_only_editors_with_rates_have_some(composing):
    got = plan(composing, models="[world-xs]", editors="[qf,finetune]", layers="[1,3]", seeds="[4,5]")
    assert sorted(jobs(got), key=str) == sorted(
        [("world-xs", "qf", layer, None, seed) for layer in (1, 3) for seed in (4, 5)]
        + [("world-xs", "finetune", i, lr, s) for i in (1, 3) for lr in (0.003, 0.01, 0.03) for s in (4, 5)],
        key=str,
    )
    for job in got.jobs:
        cfg = job.config
        assert (cfg.editor.layer, cfg.seed, cfg.edits) == (job.layer, job.seed, 20)
        assert list(cfg.task.retention.every) == [1, 5, 20]
        assert job.lr is None or cfg.editor.lr == job.lr
    assert len({job.folder for job in got.jobs}) == len(got.jobs)
    assert not got.conversions
    assert not got.left_out


def test_a_layer_that_a_model_lacks_is_left_out_and_said(composing):
    got = plan(composing, models="[world-xs,world-s]", editors="[qf]", layers="[2,6]")
    assert jobs(got) == [("world-xs", "qf", 2, None, 5), ("world-s", "qf", 2, None, 5), ("world-s", "qf", 6, None, 5)]
    assert got.left_out == {"world-xs has no layer 6": ["qf"]}


def test_layers_are_converted_where_an_editor_needs_it_and_none_is_shipped(composing, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "CONVERSIONS", str(tmp_path))
    wanted = {"models": "[world-s]", "editors": "[qf2_answer_only]", "layers": "[3,4]"}
    without = plan(composing, **wanted)
    wanted |= {"convert": "true"}
    got = plan(composing, **wanted)
    assert len(got.conversions) == 1
    (folder, overrides), *_ = got.conversions.items()
    assert {"experiment=convert", "model=world-s", "model.layer=3"} <= set(overrides)
    cfg = composing(overrides)
    assert list(cfg.task.convert.conversion.layers) == [3]
    assert Path(folder) == Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir / "model"
    assert {(job.layer, job.config.model.path) for job in got.jobs} == {(3, folder), (4, "world-s-qf2")}
    assert plan(composing, **wanted).conversions == got.conversions  # the same folder, started again
    other = plan(composing, ("experiment=study",), **wanted, conversion='["experiment=convert","seed=3"]')
    assert other.conversions.keys() != got.conversions.keys()
    assert {job.layer for job in without.jobs} == {4}
    assert without.left_out == {"qf2_answer_only needs layers that fire, and study.convert=false": ["world-s layer 3"]}


def test_a_shorter_study_has_the_folders_of_a_longer_one(composing):
    longer = {job.folder for job in plan(composing, models="[world-xs,world-s]", editors="[qf]", layers="[2]").jobs}
    assert {job.folder for job in plan(composing, models="[world-s]", editors="[qf]", layers="[2]").jobs} <= longer


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("editor=qf", "study.editors"),
        ("editor.layer=1,2", "study.layers"),
        ("model=world-s", "study.models"),
        ("edits=5", "study.edits"),
        ("facts.about=novel,known", "one value"),
    ],
)
def test_what_the_lists_are_for_is_refused_elsewhere(argument, remedy):
    with pytest.raises(UserError, match=f"{argument.split('=')[0]}.*give {remedy}"):
        passed_on(["experiment=study", argument])
    assert passed_on(["experiment=study", "threads=1", "study.edits=[1]"]) == ["experiment=study", "threads=1"]


def test_wrong_lists_are_refused_by_name(composing):
    for name, value in (("edits", "[0]"), ("layers", "[]"), ("models", "[]"), ("rates", "{finetune: fast}")):
        with pytest.raises(UserError, match=rf"study\.{name}"):
            axes(composing, **{name: value})
    with pytest.raises(UserError, match=r"study\.rates\.qf=.*has no rate"):
        planned(
            settings(
                composing(
                    ["experiment=study", "+study.rates.qf=[0.1]", "study.models=[world-xs]", "study.editors=[qf]"]
                )
            ),
            [],
            composing,
        )


def test_the_best_setting_is_the_one_that_teaches_and_keeps(drawn):
    rows, about = [], {}
    for run, (layer, lr, lost) in enumerate([(1, 0.1, 0), (1, 0.2, 2), (2, 0.1, 4), (2, 0.2, 3)]):
        rows.append(run_rows(regimes=["sequential"], layer=layer, lost=lost).assign(run=str(run)))
        about[str(run)] = {"model": "small", "editor": "finetune", "layer": layer, "lr": lr}
    frame = regular(pd.concat(rows, ignore_index=True)).assign(run=lambda f: f.run)
    frame.attrs["settings"] = ["editor.layer"]
    got = core(frame, pd.DataFrame(about).T, [1, 4])
    best, whole = got.tables["best"], got.tables["study"]
    assert best[["layer", "lr", "edits", "retention"]].to_numpy().tolist() == [[1, 0.1, 4, 1.0]]
    assert len(whole) == 8
    ends = whole[whole.edits == 4].set_index(["layer", "lr"]).retention
    assert ends.to_dict() == {(1, 0.1): 1.0, (1, 0.2): 0.5, (2, 0.1): 0.0, (2, 0.2): 0.25}
    assert set(got.figures) == {"curves", "finetune_small"}
    texts = {t.get_text() for axes in got.figures["finetune_small"].axes for t in axes.texts}
    assert {"1.00", "0.50", "0.00", "0.25"} <= texts


@pytest.mark.parametrize("deaf", [(), (3,)])
def test_the_last_number_of_edits_is_after_all_facts_that_are_understood(deaf):
    """Of four facts one may not be understood; a model alone is told apart no less than beside others."""
    frame = regular(run_rows(n=4, regimes=["sequential"], deaf=deaf, lost=0)).assign(run="0")
    about = pd.DataFrame({"model": ["small"], "editor": ["qf"], "layer": [2], "lr": [None]}, index=["0"])
    got = core(frame, about, [1, 4]).tables
    assert got["study"].edits.tolist() == [1, 4]
    assert got["best"][["edits", "retention", "retention_n"]].to_numpy().tolist() == [[4, 1.0, 4 - len(deaf)]]


SMALL = ["study.models=[world-xs]", "study.layers=[2]", "study.editors=[qf_answer_only,finetune]", "study.edits=[1,2]"]
SMALL += [
    "study.rates={finetune: [0.01]}",
    "regression=[none]",
    "threads=1",
    "task.retention.orders=1",
    "task.retention.placebo=0",
]


def command(folder, *arguments):
    known = os.environ | {"PYTHONPATH": str(CONF.parent), "COLUMNS": "160"}
    said = subprocess.run(
        [sys.executable, "-m", "qfbench.commands.run", "experiment=study", *SMALL, *arguments],
        cwd=folder, env=known, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return said.returncode, said.stdout, said.stderr


def test_one_command_measures_all_goes_on_where_it_was_and_ends_with_its_tables(tmp_path):
    code, out, err = command(tmp_path, "study.dry=true")
    assert (code, (tmp_path / "outputs/study").exists()) == (0, False), err
    assert "2 jobs, asked after 1, 2 edits" in out
    assert "minutes one after another" in out
    code, out, err = command(tmp_path, "study.reckon=false")
    assert code == 0, err
    folder = tmp_path / "outputs/study"
    table = pd.read_csv(folder / "study/study.csv")
    assert len(table) == 4
    assert set(table.editor) == {"qf_answer_only", "finetune"}
    assert set(table.edits) == {1, 2}
    assert "the page: qfbench-report outputs/study/study\n" in out
    runs = {path: path.stat().st_mtime_ns for path in folder.glob("*/rows.parquet")}
    assert len(runs) == 2
    assert results.folders(folder / "study") == sorted(path.parent for path in runs)
    gone = next(iter(runs)).parent
    progress = json.loads((gone / "progress.json").read_text())
    code, out, err = command(tmp_path, "study.reckon=false")
    assert code == 0, err
    assert "measured already: 2 jobs" in out
    assert runs == {path: path.stat().st_mtime_ns for path in folder.glob("*/rows.parquet")}
    assert progress["finished"]
    assert OmegaConf.load(gone / "config.yaml").task.retention.every == [1, 2]
