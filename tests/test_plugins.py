"""Plug-ins from outside of the repository: what docs/plugins.md shows works as it is shown; so does an installed package."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from test_command import command  # noqa: F401 (a fixture)

import qfbench
from qfbench import UserError
from qfbench.commands import facts, plugins

PAGE = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(mine/\S+)`:\n\n```\w+\n(.*?)```", PAGE, re.M | re.S))
(LINE,) = re.findall(r"```bash\nqfbench (.*?)\n```", PAGE)
(TABLE,) = re.findall(r"```text\n(.*?)```", PAGE, re.S)
SWEPT = (
    "experiment=retention",
    "model=world-xs",
    "facts.n=1",
    "regression=[none]",
    "regime=[single]",
    "task.retention.placebo=0",
    "threads=1",
    "cache=null",
    "hydra.sweep.dir=sweep",
)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The page's folder, and nothing kept of what is imported from it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    yield tmp_path / "mine"
    for name in ("descent", "own"):
        sys.modules.pop(name, None)


def test_what_the_page_shows_is_printed(mine, command):  # noqa: F811
    assert len(FILES) == 2
    module = FILES["mine/descent.py"].split("\n")
    assert len([line for line in module if line]) <= 31
    code, out, err = command(*shlex.split(LINE), "threads=1")
    assert (code, err) == (0, "")
    title, *rows = (line.split() for line in TABLE.strip().split("\n"))
    assert " ".join(title) in " ".join(out.split())
    printed = [line.split() for line in out.split("\n")]
    for row in rows:
        assert row in printed


def test_plug_ins_are_listed_and_swept(mine, command, tmp_path):  # noqa: F811
    for line in (("--config-dir", "mine", "--help"), ("--help", "--config-dir=mine/conf")):
        assert "descent" in command(*line)[1]
    assert "descent" not in command("--help")[1]
    code, _, err = command("-cd", "mine", "-m", "editor=descent", "editor.layer=1,2", *SWEPT)
    assert (code, err) == (0, "")
    assert len(list((tmp_path / "sweep").glob("world-xs-descent-*/rows.parquet"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]])
def test_a_plug_in_is_found_by_the_processes_of_a_launcher(mine, tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher" if launcher[0] == "joblib" else "submitit")
    line = ["--config-dir", "mine", "-m", "editor=descent", "editor.layer=1,2", *SWEPT, f"hydra/launcher={launcher[0]}"]
    done = subprocess.run(
        [sys.executable, "-m", "qfbench.commands.run", *line, *launcher[1:]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(qfbench.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "sweep").glob("world-xs-descent-*/rows.parquet"))) == 2


OWN = """\
from qfbench import Fact
def suite(n):
    return [Fact(f"Qi started X{i}.", f"Who started X{i}?", f"X{i} was started by Qi.") for i in range(n)]
"""


def test_a_suite_of_ones_own_is_shown_with_its_module_in_the_current_folder(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "my, own" / "facts"
    folder.mkdir(parents=True)
    (folder / "own.yaml").write_text("_target_: own.suite\nn: 2\n")
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["qfbench-facts", "own", "--config-dir", "my, own", "facts.n=3"])
    facts.main()
    sys.modules.pop("own")
    assert capsys.readouterr().out.startswith("3 facts\n")
    with pytest.raises(UserError, match="facts/own"):
        facts.check("own")


def test_an_installed_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    (tmp_path / "own" / "conf" / "facts").mkdir(parents=True)
    (tmp_path / "own" / "__init__.py").write_text(OWN)
    (tmp_path / "own" / "conf" / "facts" / "own.yaml").write_text("_target_: own.suite\nn: 2\n")
    info = tmp_path / "own-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[qfbench]\nown = own\n")
    assert plugins.installed() == []
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.installed() == [tmp_path / "own" / "conf"]
    assert facts.check("own").startswith("2 facts\n")
    sys.modules.pop("own")
    assert plugins.Installed in Plugins.instance().discover(plugins.SearchPathPlugin)


@pytest.mark.parametrize("given", [["--config-dir", "none"], ["--config-dir"], ["-cd=none"]])
def test_a_folder_that_is_not_there_is_one_line_and_exit_2(command, given):  # noqa: F811
    code, out, err = command(*given)
    assert (code, out) == (2, "")
    assert err.startswith("qfbench: --config-dir ")
    assert err.endswith("no such folder\n")
