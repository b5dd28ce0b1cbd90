"""Stored runs: their rows in one frame, and the comparison of two."""

import json
import shutil
import sys
from dataclasses import replace
from itertools import product

import pandas as pd
import pytest
from notebook import Note, prepared
from omegaconf import OmegaConf

from qfbench import UserError
from qfbench.analysis.measures import summary
from qfbench.analysis.rows import regular
from qfbench.commands.results import main
from qfbench.editors.regimes import joint, sequential
from qfbench.pages.results import SAME, compare, folders, retention, rows_of
from qfbench.runs.provenance import PROBES, protocol, provenance
from qfbench.tasks.baseline import baseline
from qfbench.tasks.retention import in_order
from qfbench.tasks.teaching import Teaching

FORGETFUL = {f"Where is Town{n}?": ("North.", "Nowhere.") for n in range(3)}


def stored(folder, settings=None, task="retention", editor=None, regimes=(sequential,), orders=1, known=None, **lm):
    """A run in a folder of its own, as `execute` leaves it."""
    folder.mkdir(parents=True)
    run = replace(prepared(folder, editor, **lm), task=task)
    facts, always = baseline(run)
    for order, regime in product(range(orders), regimes):  # as the task does, without its figures
        about = {"order": order} if orders > 1 else {}
        Teaching(run, regime.__name__, regime, in_order(facts, order), always, {1, 2, 3}, about).run(
            lambda *about, **more: None
        )
    run.store.flush()
    config = {"seed": 0, "editor": {"layer": 0, "opener": 1.0}, "regime": {"a": {}}, "beside": None} | (settings or {})
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    found = provenance(0, protocol(run.lm), run.facts) | (known or {})
    (folder / "provenance.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    return stored(folder / "a"), stored(folder / "b", says=FORGETFUL)


@pytest.fixture
def two(tmp_path, measured):
    """A run that spares what was known, and one that does not."""
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in measured)


def test_each_setting_in_which_runs_differ_is_a_column(tmp_path):
    for n, settings in enumerate(
        (
            {"editor": {"layer": 0, "opener": 1.0}, "facts": {"n": 3}, "rates": [1, 2]},
            {"editor": {"layer": 1, "opener": 1.0}, "facts": {"n": 3}, "rates": [1, 3], "task": {"orders": 2}},
        )
    ):
        stored(tmp_path / f"sweep/{n}", settings, editor=Note(layer=n), orders=1 + n)
    rows = rows_of(tmp_path)
    plain = regular(pd.read_parquet(tmp_path / "sweep/1/rows.parquet")).drop(columns="run")
    assert set(rows.columns) - set(plain.columns) == {"run", "editor.layer", "rates", "task.orders"}
    by = rows.groupby("run")[["editor.layer", "rates"]].agg(lambda values: values.unique().tolist())
    assert by.loc[str(tmp_path / "sweep/0")].tolist() == [[0], ["[1, 2]"]]
    assert by.loc[str(tmp_path / "sweep/1")].tolist() == [[1], ["[1, 3]"]]
    assert rows["task.orders"].isna().sum() == (rows.run == str(tmp_path / "sweep/0")).sum()
    own = rows[rows.run == str(tmp_path / "sweep/1")][list(plain.columns)].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, plain, check_dtype=False)


def test_one_run_has_no_settings_beside_it(two):
    rows = rows_of(two[0])
    assert set(rows.columns) == set(regular(pd.read_parquet(two[0] / "rows.parquet")).columns)
    assert set(rows.run) == {str(two[0])}


def test_runs_are_found_below_and_once(tmp_path, two):
    assert folders(tmp_path) == folders(*two, tmp_path) == list(two)
    (tmp_path / "none").mkdir()
    for path in (tmp_path / "none", tmp_path / "nowhere"):
        for paths in ((path,), (two[0], path)):
            with pytest.raises(UserError, match=rf"{path}: holds no run"):
                folders(*paths)


def test_only_rows_of_retention_are_summed_up(tmp_path, two):
    other = stored(tmp_path / "c", task="capacity")
    assert set(retention(two[0], other).run) == {str(two[0])}
    with pytest.raises(UserError, match=rf"{other}: holds no rows of the task retention"):
        retention(other)


def test_two_runs_are_compared_by_hand(two):
    line = compare(*two[::-1]).iloc[0]
    assert (line.regime, line.facts, line.prior, line.efficacy) == ("sequential", 3, -1.0, 0.0)
    assert (line.prior_same, line.efficacy_same) == (True, True)
    assert line.prior_p == pytest.approx(2 / 2**3)  # all of three facts
    assert compare(*two).iloc[0].prior == 1.0
    assert (compare(two[0], two[0]).iloc[0][["prior", "retention", "refused"]] == 0).all()


def test_what_two_runs_must_share_is_named_unless_it_is_what_is_studied(tmp_path, two):
    other = shutil.copytree(two[0], tmp_path / "c")
    known = json.loads((other / "provenance.json").read_text())
    for name in SAME:
        (other / "provenance.json").write_text(json.dumps(known | {name: "other"}))
        message = rf"{two[0]} and {other} differ in {name}: \S+ and other; they cannot be compared.*--across {name}"
        with pytest.raises(UserError, match=message):
            compare(two[0], other)
        assert compare(two[0], other, across=[name]).iloc[0].prior == 0, name
        with pytest.raises(UserError, match=f"differ in {name}"):
            compare(two[0], other, across=[*set(SAME) - {name}])


def test_models_beside_must_be_the_same_as_well(tmp_path, two):
    a, b = (stored(tmp_path / n, known={"models_beside": {"m": {"model": "m", "model_hash": n}}}) for n in "cd")
    with pytest.raises(UserError, match=f"{a} and {b} differ in model_hash of m: c and d; they cannot"):
        compare(a, b)
    assert len(compare(a, b, across=["model_hash"])) == len(compare(a, two[0])) == 1


@pytest.mark.parametrize("name", ["seed", "threads", "git_commit", "python"])
def test_other_differences_do_not_forbid_a_comparison(tmp_path, two, name):
    assert len(compare(two[0], stored(tmp_path / "c", known={name: "other"}))) == 1


def test_a_field_that_one_run_lacks_differs(two):
    path = two[1] / "provenance.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "probes"}))
    with pytest.raises(UserError, match=f"differ in probes: {PROBES} and None"):
        compare(*two)


def test_to_compare_several_runs_at_once_is_refused(tmp_path, two):
    for pair in ((tmp_path, two[0]), (two[0], tmp_path)):
        with pytest.raises(UserError, match=rf"{tmp_path}: holds 2 runs; give one of them, as {two[0]}"):
            compare(*pair)


BROKEN = [
    ("provenance.json", None),
    ("provenance.json", b"{"),
    ("rows.parquet", b"PAR1"),
    ("config.yaml", None),
    ("config.yaml", b"\xff\xfe"),
    ("config.yaml", b"a: ["),
    ("provenance.json", b"[]"),
]


@pytest.mark.parametrize(("name", "content"), BROKEN)
def test_a_file_of_a_run_that_cannot_be_read_is_named(two, name, content):
    path = two[0] / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path}: (cannot be read|is damaged or gone)"):
        compare(two[1], two[0]) if name == "provenance.json" else rows_of(*two)


@pytest.fixture
def command(monkeypatch, capsys):
    """Exit code, output and errors of `qfbench-results`."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["qfbench-results", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "160")
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        done = capsys.readouterr()
        return code, done.out, done.err

    return call


def test_the_command_prints_a_summary_of_runs_that_differ_in_a_setting_and_pools_the_others(command, tmp_path, two):
    code, out, err = command(tmp_path)
    assert (code, err) == (0, "")
    assert "2 runs" in out
    (line,) = (line.split() for line in out.splitlines() if "sequential" in line)
    tables = [summary(regular(pd.read_parquet(folder / "rows.parquet"))) for folder in two]
    wanted = [table.set_index("regime").loc["sequential"] for table in tables]
    assert [w.prior for w in wanted] == [1, 0]
    assert ".50±.50" in line
    stored(tmp_path / "c", {"editor": {"layer": 1, "opener": 1.0}}, editor=Note(layer=1))
    lines = [line.split() for line in command(tmp_path)[1].splitlines() if "sequential" in line]
    assert [line[2] for line in lines] == ["0", "1"]  # the layer
    assert [sum(cell.startswith("1.00") for cell in line) for line in lines] == [4, 5]


def test_the_command_prints_the_differences_of_two_runs(command, two):
    code, out, err = command(two[1], "--against", two[0])
    assert "facts" in out  # how many both were asked about
    assert (code, err) == (0, "")
    assert "Differences from" in out
    (line,) = (line for line in out.splitlines() if "sequential" in line)
    assert "-1.00±1.51~" in line.split()  # of three facts
    assert ".00±.88~" in line.split()
    assert "6 comparisons (~: may be none), at 5% each" in out
    code, out, err = command(two[1], "--against", two[0], "--holm")
    assert (code, err) == (0, "")
    assert "at 5% for all together (Holm)" in out


def test_the_command_says_in_one_line_what_is_wrong(command, tmp_path, two):
    other = stored(tmp_path / "c", known={"dtype": "bfloat16"})
    (tmp_path / "none").mkdir()
    for words, message in (
        ([tmp_path / "none"], "holds no run"),
        ([two[0], "--against", tmp_path / "none"], "holds no run"),
        ([two[0], "--against", other], "differ in dtype: float32 and bfloat16"),
        ([two[0], "--csv", tmp_path / "gone" / "a.csv"], "a.csv: cannot be written (No such file or directory)"),
        ([two[0], "--leaderboard", tmp_path / "gone" / "a.md"], "a.md: cannot be written (No such file or directory)"),
    ):
        code, out, err = command(*words)
        assert code == 2
        assert "--csv" in words or out == ""
        assert err.startswith("qfbench-results: ")
        assert message in err
        assert err.count("\n") == 1
    assert command(two[0], "--against", other, "--across", "dtype")[0] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--flips"], "--flips: needs --against RUN"),
        (["--against", "OTHER", "--rescore"], "--against and --rescore cannot be given together"),
        (["--against", "OTHER", "--flips", "--where", "regime=joint"], "--flips and --where cannot be given together"),
        (["--ship", "OTHER", "--csv", "all.csv"], "--ship and --csv cannot be given together"),
    ],
)
def test_options_that_would_do_nothing_are_refused(command, two, options, said):
    code, out, err = command(two[0], *(str(two[1]) if word == "OTHER" else word for word in options))
    assert (code, out, err) == (2, "", f"qfbench-results: {said}\n")


def test_flips_are_of_two_runs(command, two):
    assert "2 are given beside --against" in command(*two, "--against", two[0], "--flips")[2]
    code, out, err = command(two[0], "--against", two[1], "--flips")
    assert (code, err) == (0, "")
    assert "3 questions that one passes" in out


def test_the_command_refuses_words_it_does_not_know(command, two):
    assert command()[0] == 2
    code, _, err = command(two[0], "--against", two[1], "--across", "seed")
    assert code == 2
    assert "invalid choice: 'seed'" in err


def test_runs_of_several_regimes_and_orders_are_read_together(tmp_path, two):
    other = stored(tmp_path / "c", regimes=(sequential, joint), orders=2)
    rows = rows_of(*two, other)
    assert (rows.order[rows.run == str(two[0])] == 0).all()
    assert list(compare(other, two[0]).regime) == ["sequential"]
