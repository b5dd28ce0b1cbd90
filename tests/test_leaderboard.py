"""The page of results: it is what its command makes of the stored runs, and says nothing else."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from qfbench import UserError
from qfbench.commands.results import main
from qfbench.pages.leaderboard import MOST, editor_settings, layers, leaderboard, set_apart

ROOT = Path(__file__).parent.parent


def test_the_page_is_what_its_command_makes_of_the_stored_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = Path("docs/results.md")
    (command,) = re.findall(r"^qfbench-results (.*) --leaderboard docs/results.md$", page.read_text(), re.MULTILINE)
    assert page.read_text() == leaderboard(command.split(), page)


def asked(condition, regime, step, kind, n, passes, **more):
    """`n` questions of a kind, of which the first `passes` pass."""
    frame = pd.DataFrame({"fact_id": [f"{kind}{i}" for i in range(n)], "generated": np.arange(n) < passes})
    about = {"condition": condition, "regime": regime, "step": step, "taught": step, "kind": kind, "fresh": False}
    return frame.assign(query=frame.fact_id, checkpoint=True, leaked=False, **about | more)


def store(folder, parts, command=("a=1",), editor=None, model="m", label="QF", beside=None):
    folder.mkdir(parents=True)
    rows = pd.concat(parts, ignore_index=True).assign(task="retention", model=model, editor=label)
    rows.to_parquet(folder / "rows.parquet")
    settings = {"_target_": "qfbench.editors.QF", "layer": 4, "lr": 0.5} | (editor or {})
    config = {"editor": settings, "seed": 0, "task": {"retention": {"beside": beside or {}}}}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "provenance.json").write_text(json.dumps({"command": list(command)}))
    return folder


def sequence(taught, prior, refused, step=10):
    kinds = {"edit": taught, "prior": prior, "unknown": refused}
    return [asked("edited", "sequential", step, kind, 10, passes) for kind, passes in kinds.items()]


def lines(text, heading):
    """The lines of the table under a heading, each as a dictionary by column."""
    body = text.partition(f"### {heading}\n")[2].partition("\n#")[0]
    head, _, *rest = [line.strip("| ").split(" | ") for line in body.split("\n") if line.startswith("|")]
    return [dict(zip(head, line, strict=True)) for line in rest]


def test_lines_are_sorted_by_the_harmonic_mean_and_lead_to_their_run_and_command(tmp_path):
    store(tmp_path / "x/runs/a", sequence(10, 5, 1), ["editor=qf"])
    store(tmp_path / "x/runs/b", sequence(6, 6, 6), ["editor=qf", "editor.layer=7"], {"layer": 7, "lr": 0.25})
    page = tmp_path / "docs/results.md"
    text = leaderboard([str(tmp_path)], page)
    best, other = lines(text, "10 edits in sequence")
    assert (best["layer"], best["set"], best["mean"], best["facts"]) == ("7", "lr=0.25", "0.60", "10")
    assert (other["layer"], other["set"], other["mean"]) == ("4", "lr=0.5", "0.23")  # 3 / (1 + 2 + 10)
    assert other["taught"].startswith("1.00 ± ")
    assert best["run"] == "[x](../x/runs/b)"
    assert f"| {best['command']} | `qfbench editor=qf editor.layer=7` |" in text


def test_seeds_are_one_line_and_a_run_that_lies_in_two_studies_stands_once(tmp_path):
    for study in ("x", "y"):
        store(tmp_path / study / "runs/same", sequence(5, 5, 5))
    other = store(tmp_path / "x/runs/other", sequence(7, 5, 5))
    config = json.loads((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(json.dumps(config | {"seed": 1}))
    (line,) = lines(leaderboard([str(tmp_path)], tmp_path / "p.md"), "10 edits in sequence")
    assert (line["taught"][:4], line["facts"], line["orders"]) == ("0.60", "20", "2")
    assert line["run"] == "[x](x/runs/other) [2](x/runs/same)"


def test_trials_of_a_search_are_left_out(tmp_path):
    store(tmp_path / "tuning/runs/a", sequence(10, 10, 10))
    with pytest.raises(UserError, match="holds no rows of the task retention"):
        leaderboard([str(tmp_path)], tmp_path / "p.md")


def test_a_table_shows_its_best_lines_and_says_of_how_many(tmp_path):
    for n in range(MOST + 1):
        store(tmp_path / f"x/runs/{n}", sequence(1, 1, 1 + n), editor={"layer": n})
    text = leaderboard([str(tmp_path)], tmp_path / "p.md")
    shown = [line["layer"] for line in lines(text, "10 edits in sequence")]
    assert sorted(map(int, shown)) == list(range(1, MOST + 1))
    assert f"The best {MOST} of {MOST + 1} lines." in text


def test_single_edits_and_the_unedited_model_have_tables_of_their_own(tmp_path):
    single = [
        asked("edited", "single", step, kind, 4, 3, taught=0, fresh=True)
        for step in (1, 2)
        for kind in ("edit", "paraphrase", "prior", "unknown")
    ]
    before = asked("unedited", None, 0, "edit", 4, 0)
    for n in range(2):  # the unedited model is the same in both
        store(tmp_path / f"x/runs/{n}", [before, *single], editor={"layer": n})
    text = leaderboard([str(tmp_path)], tmp_path / "p.md")
    (line,) = lines(text, "Not edited")
    assert (line["by"], line["taught"][:4]) == ("unedited", "0.00")
    assert [line["other wordings"][:4] for line in lines(text, "Single edits")] == ["0.75", "0.75"]
    assert "in sequence" not in text


def test_a_line_has_the_settings_of_its_own_editor(tmp_path):
    beside = {
        name: {"editor": {"_target_": f"qfbench.editors.{kind}", "layer": layer, "more_layers": [5]}}
        for name, kind, layer in (("first", "Other", 7), ("second", "QF", 8))
    }
    folder = store(tmp_path / "a", sequence(1, 1, 1), beside=beside)
    found = {label: editor_settings(folder, label) for label in ("QF", "Other", "QF second", "None")}
    assert {label: layers(own, pd.DataFrame()) for label, own in found.items()} == {
        "QF": "4",
        "Other": "5, 7",
        "QF second": "5, 8",
        "None": "",
    }


def test_settings_that_tell_lines_of_a_class_apart():
    settings = [{"opener": 0.0, "ridge": 1}, {"opener": 1.0, "ridge": 1}, {"lr": 0.01, "opener": 2}]
    table = pd.DataFrame({"by": ["QF", "QF released", "FineTune"], "settings": settings})
    assert set_apart(table) == ["opener=0", "opener=1", "lr=0.01"]


def test_the_command_writes_the_page_and_refuses_what_would_do_nothing(tmp_path, monkeypatch, capsys):
    store(tmp_path / "x/runs/a", sequence(1, 1, 1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qfbench-results", "x", "--leaderboard", "p.md"])
    main()
    assert Path("p.md").read_text().startswith("# Results\n")
    for option in (["--holm"], ["--sort", "prior"], ["--ship", "s"], ["--against", "x"], ["--across", "dtype"]):
        monkeypatch.setattr(sys, "argv", ["qfbench-results", "x", "--leaderboard", "p.md", *option])
        with pytest.raises(SystemExit):
            main()
        assert f"--leaderboard and {option[0]} cannot be given together" in capsys.readouterr().err
