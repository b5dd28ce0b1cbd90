"""The search for an editor's settings: what is tried, what a trial is worth, what is reported, and that it goes on where it was killed."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import notebook
import pandas as pd
import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import OmegaConf
from rich.console import Console
from test_contract import CONF, composed
from test_kill import quick, settings, start, tabled  # noqa: F401 (fixtures)

import qfbench.commands.execution
import qfbench.commands.run
from qfbench import Unsupported, UserError
from qfbench.analysis.measures import balance_at_the_end
from qfbench.commands.settings import name_of
from qfbench.editors.regimes import joint, sequential, single
from qfbench.pages.results import rows_of
from qfbench.pages.study import trials

EDITORS = sorted(path.stem for path in (CONF / "search" / "tune").glob("*.yaml"))
OBJECTIVE = {"_target_": "qfbench.analysis.measures.balance_at_the_end", "_partial_": True}


@pytest.fixture(scope="module")
def plugin():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")


@pytest.mark.parametrize("name", EDITORS)
def test_every_editor_has_the_same_budget_on_the_same_held_out_facts(plugin, name):
    cfg, plain = (composed("experiment=tune", f"editor={editor}") for editor in (name, "qf"))
    tried = cfg.hydra.sweeper.params
    target = get_class(cfg.editor._target_)
    assert {key.removeprefix("editor.") for key in tried} <= {field.name for field in fields(target)}
    assert len(tried) > 1
    assert (cfg.hydra.sweeper.n_trials, cfg.hydra.sweeper.sampler.seed) == (60, 0)
    same = [key for key in cfg if key not in ("hydra", "editor")]
    assert OmegaConf.masked_copy(cfg, same) == OmegaConf.masked_copy(plain, same)
    studied = {0, 1, 2}
    for path in (CONF / "experiment").glob("*.yaml"):
        if path.stem != "tune":
            studied.add(OmegaConf.load(path).get("seed", 0))
    assert cfg.seed not in studied


def test_an_editor_without_a_search_of_its_own_is_tried_at_every_layer(plugin):
    cfg = composed("experiment=tune", "editor=qf_answer_only")
    assert cfg.hydra.sweeper.params == {"editor.layer": cfg.model.layers}


@pytest.mark.parametrize(
    ("model", "layer", "spans"),
    [
        ("world-s", 7, "choice([],[6],[5,6],[4,5,6],[2,3,4,5,6])"),
        ("world-m", 11, "choice([],[10],[9,10],[8,9,10],[6,7,8,9,10])"),
        ("world-xs", 2, "choice([],[1],[0,1])"),  # without settings of the stream
    ],
)
def test_the_stream_is_tried_with_layers_below_its_highest_on_any_model(plugin, model, layer, spans):
    tried = composed("experiment=tune", "editor=qf_stream", f"model={model}").hydra.sweeper.params
    assert (int(tried["editor.layer"]), tried["editor.more_layers"]) == (layer, spans)


def test_no_other_experiment_is_searched_nor_named_anew():
    cfg = composed("experiment=retention")
    assert cfg.hydra.sweeper.params is None
    assert cfg.objective is None
    name = name_of(cfg)
    cfg.objective = OBJECTIVE
    assert name_of(cfg) == name


def worth(folder, *regimes, **setting):
    folder.mkdir()
    return balance_at_the_end(notebook.taught(folder, *regimes, **setting)[1])


def test_a_trial_is_worth_what_stays_of_taught_and_of_prior_knowledge(tmp_path, quick):  # noqa: F811
    town = {"Where is Town0?": ("North.", "South.")}  # one of three is wrong once anything is taught
    assert worth(tmp_path / "a", says=town) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert worth(tmp_path / "b", sequential, joint, single, says=town) == pytest.approx(0.8)
    assert worth(tmp_path / "c", editor=notebook.Note(broken="0")) == 0.0  # nothing is taught
    every = {f"Where is Town{n}?": ("North.", "South.") for n in range(3)}
    assert worth(tmp_path / "d", says=every) == 0.0  # nothing is kept


def test_a_trial_may_be_judged_by_other_kinds_and_by_none_that_is_not_asked(tmp_path, quick):  # noqa: F811
    town = {"Where is Town0?": ("North.", "South.")}  # one of three is wrong once anything is taught
    rows = notebook.taught(tmp_path, says=town)[1]
    assert balance_at_the_end(rows, ("edit", "prior")) == balance_at_the_end(rows) == pytest.approx(0.8)
    assert balance_at_the_end(rows, ("prior",)) == pytest.approx(2 / 3)
    assert balance_at_the_end(rows, ("prior", "edit", "edit")) == pytest.approx(0.8)  # a kind counts once
    assert balance_at_the_end(rows, ("unknown", "prior")) == pytest.approx(0.8)
    with pytest.raises(UserError, match="objective.over=.*nothing of the kind refused is asked"):
        balance_at_the_end(rows, ("edit", "refused"))


def value_of(cfg, folder, monkeypatch):
    """What one job of a multirun returns."""
    job = SimpleNamespace(
        runtime=SimpleNamespace(
            output_dir=str(folder), choices={"experiment": "tune", "model": "own"}, config_sources=[]
        )
    )
    job.mode, job.sweep = RunMode.MULTIRUN, SimpleNamespace(dir=str(folder.parent))
    job.overrides = SimpleNamespace(task=["editor.layer=9"])
    monkeypatch.setattr(HydraConfig, "get", lambda: job)
    OmegaConf.set_struct(cfg, False)
    return qfbench.commands.run._hydra_main(OmegaConf.merge(cfg, {"objective": OBJECTIVE}))


def test_a_finished_job_returns_its_value_again(tmp_path, tabled, monkeypatch):  # noqa: F811
    cfg = settings(orders=1)
    first = value_of(cfg, tmp_path / "run", monkeypatch)
    assert first > 0
    monkeypatch.setattr(qfbench.commands.execution.ParquetStore, "commit", None)  # nothing is measured
    assert value_of(cfg, tmp_path / "run", monkeypatch) == first


def test_a_trial_that_diverges_counts_0_and_one_that_cannot_be_run_ends_the_search(tmp_path, monkeypatch, capsys):
    def fail(error):
        monkeypatch.setattr(qfbench.commands.execution, "execute", lambda *args, **kwargs: (_ for _ in ()).throw(error))
        return value_of(settings(), tmp_path, monkeypatch)

    assert fail(FloatingPointError("sequential, after 2 edits: NaN")) == 0.0
    assert capsys.readouterr().err == "qfbench: sequential, after 2 edits: NaN; this trial counts 0\n"
    with pytest.raises(CompactHydraException, match="editor.layer=9$"):  # which Hydra prints without a traceback
        fail(UserError("editor.layer=9"))


def test_the_trials_are_listed_best_first_with_the_overrides_of_the_best(tmp_path, quick):  # noqa: F811
    for layer, broken in ((1, ""), (2, "2"), (3, "0")):
        cfg = settings(orders=1, placebo=0)
        OmegaConf.set_struct(cfg, False)
        del cfg.regime.single, cfg.regime.joint, cfg.regime.protected
        cfg.editor = OmegaConf.merge(cfg.editor, {"layer": layer, "broken": broken})
        if broken == "0":
            with pytest.raises(Unsupported, match="retention measured nothing: no room for fact 0"):
                start(cfg, tmp_path / f"run{layer}")
        else:
            start(cfg, tmp_path / f"run{layer}")
    study = trials(rows_of(tmp_path))
    table = study.tables["trials"]
    assert list(table["editor.layer"]) == [1, 2]  # nothing was taught at 3
    assert list(table.balance) == sorted(table.balance, reverse=True)
    assert study.verdict == "best of 3, balance 1.000: editor.layer=1 editor.broken="
    console = Console(record=True, width=100)
    study.save(tmp_path / "study", console)
    assert study.verdict in console.export_text()
    assert len(pd.read_csv(tmp_path / "study" / "trials.csv")) == 2


SMALL = ["experiment=tune", "editor=finetune", "model=world-xs", "edits=2", "task.retention.orders=1", "threads=1"]
SEARCH = [sys.executable, "-m", "qfbench.commands.run", *SMALL, "editor.lr=0.05,1e37", "hydra.sweeper.n_trials=4"]


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_with_the_same_trials(plugin, tmp_path):
    root = str(Path(qfbench.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    found, ends = [], []
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        runs = tmp_path / name / "outputs" / "tune" / "world-xs-finetune"
        if name == "killed":
            with subprocess.Popen(SEARCH, cwd=tmp_path / name, env=env, stdout=subprocess.DEVNULL) as process:
                while process.poll() is None and len(list(runs.glob("world-xs-*"))) < 4:
                    time.sleep(0.01)
                process.send_signal(signal.SIGKILL)
            assert process.returncode == -signal.SIGKILL
            assert not (runs / "optimization_results.yaml").exists()
        done = subprocess.run(SEARCH, capture_output=True, text=True, cwd=tmp_path / name, env=env, check=False)
        assert done.returncode == 0, done.stderr
        found.append(re.findall(r"#\d+ : (.*)", done.stdout))
        (study,) = runs.glob("study*")
        ends.append([(study / "trials.csv").read_text(), (runs / "optimization_results.yaml").read_text()])
        best = re.search(r"best of 2, balance (\S+): (.*)", done.stdout)
        assert float(best[1]) == pytest.approx(OmegaConf.load(runs / "optimization_results.yaml").best_value, abs=1e-3)
        assert composed("experiment=retention", "editor=finetune", *best[2].split()).editor.lr == 0.05
    assert len(found[0]) == 4
    assert found[0] == found[1]
    assert ends[0] == ends[1]
    assert "measured already" in done.stdout
    assert "editor.lr=1e+37" in "".join(found[0])
    assert "the loss is not finite" in done.stderr
    assert "this trial counts 0" in done.stderr
