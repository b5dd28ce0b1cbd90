"""General ability in whole runs: rows, tables, figures, what is remembered, refused, shipped and shown."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from notebook import prepared
from pandas.testing import assert_frame_equal
from quiz import layout
from test_run import run as execute
from test_tracking import points, row

from qfbench import UserError
from qfbench.analysis.drops import by_subject, drops
from qfbench.analysis.measures import summary
from qfbench.analysis.plots import forgetting_curves
from qfbench.analysis.rows import regular
from qfbench.analysis.sequences import forgetting
from qfbench.editors import QF
from qfbench.editors.regimes import joint, sequential
from qfbench.pages import results
from qfbench.pages.report import page
from qfbench.regression import Questions
from qfbench.runs.folder import check_questions
from qfbench.tasks.retention import retention


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return layout(tmp_path_factory.mktemp("data") / "mmlu", ["anatomy", "virology"])


def run(folder, data, *more):
    of_mmlu = (f"regression.mmlu.path={data}", "regression.mmlu.subjects=[anatomy,virology]", "regression.mmlu.shots=1")
    few = (
        "regression.world_mc.limit=2",
        "regression.perplexity.n=4",
        "facts.n=2",
        "regime=[sequential]",
        "commit_seconds=0",
    )
    return execute(folder, "experiment=retention", "regression=[world_mc,perplexity,mmlu]", *of_mmlu, *few, *more)


@pytest.fixture(scope="module")
def done(tmp_path_factory, data):
    return run(tmp_path_factory.mktemp("runs") / "one", data, "seed=0")


class Quiz:
    """Four questions about each of two subjects; every fact that is written in the model's weight costs the answer to one."""

    def __init__(self, fingerprint="quiz"):
        self.fingerprint = fingerprint

    def __call__(self, lm):
        lost = int((lm.model.weight[0, :-1] > 0.5).sum())
        return [
            {"kind": "question", "query": f"{n}?", "fact_id": f"a/{n}", "fact_kind": "", "subject": "ab"[n % 2]}
            | {"group": "", "correct": float(n >= lost), "gold_logprob": -1.0 - lost, "chance": 0.25}
            for n in range(8)
        ]


def test_tables_and_rows_hold_what_was_asked(done):
    finished, text = done
    rows = pd.read_parquet(finished.folder / "rows.parquet")
    asked = rows[rows.kind == "question"]
    assert set(asked.suite) == {"world_mc", "mmlu"}
    assert asked.logprobs.map(len).eq(4).all()
    assert (asked.correct.eq(1) == (asked.logprobs.map(max) == asked.gold_logprob)).all()
    assert list(zip(asked.condition, asked.step, strict=True))[-1] == ("placebo", 2)
    assert not asked[asked.condition != "placebo"].duplicated(["suite", "condition", "step", "fact_id"]).any()
    for _, own in asked[asked.condition != "placebo"].groupby(["suite", "condition", "step"]):
        assert {*own.fact_id} == {*asked.fact_id[asked.suite == own.suite.iloc[0]]}
    table = pd.read_csv(finished.folder / "regression.csv")
    assert_frame_equal(table, drops(finished.rows("retention")), check_dtype=False)
    assert list(zip(table.suite, table.regime, strict=True)) == [
        (suite, regime) for regime in ("sequential", "placebo") for suite in ("world_mc", "mmlu")
    ]
    own = asked[(asked.suite == "world_mc") & (asked.condition == "edited") & (asked.step == 2)]
    assert table.after[0] == own.correct.mean()
    accuracy = pd.read_csv(finished.folder / "retention.csv").set_index("regime").accuracy
    assert accuracy["sequential"] == table.after[0]
    assert accuracy["unedited"] == table.before[0] == 1
    parts = pd.read_csv(finished.folder / "regression_subjects.csv")
    assert {"anatomy", "virology", "founder"} <= {*parts.subject.dropna()}
    assert parts.questions[parts.subject.isna() & parts.group.isna()].tolist() == list(table.questions)
    said = " ".join(text.split())
    assert "General ability: world_mc (chat), 20 questions, which cannot show a drop under" in said
    assert "regression_subjects.csv" in said
    known = json.loads((finished.folder / "provenance.json").read_text())["regression"]
    assert known == {name: suite.fingerprint for name, suite in finished.regression.items()}
    assert set(known) == {"world_mc", "perplexity", "mmlu"}


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_rows(done, data, tmp_path, monkeypatch):
    real, calls = QF.together, []

    def killed(self, lm, parts):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, lm, parts)

    monkeypatch.setattr(QF, "together", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", data, "seed=0")
    assert pd.read_parquet(tmp_path / "killed" / "rows.parquet").kind.eq("question").any()
    run(tmp_path / "killed", data, "seed=0")
    again, whole = (pd.read_parquet(folder / "rows.parquet") for folder in (tmp_path / "killed", done[0].folder))
    assert_frame_equal(again.drop(columns="run_id"), whole.drop(columns="run_id"))


@pytest.mark.slow
def test_other_questions_are_not_mixed_into_a_run(data, tmp_path, monkeypatch):
    mine = layout(tmp_path / "mine", ["anatomy", "virology"])
    real, calls = Questions.__call__, []

    def killed(self, lm):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, lm)

    monkeypatch.setattr(Questions, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", mine)
    path = mine / "test" / "anatomy_test.csv"
    path.write_text(path.read_text() + "One more?,a,b,c,d,A\n")
    before = (tmp_path / "run" / "rows.parquet").read_bytes()
    with pytest.raises(UserError, match=r"holds a run with another mmlu \(regression\); rerun=true measures it anew"):
        run(tmp_path / "run", mine)
    assert (tmp_path / "run" / "rows.parquet").read_bytes() == before
    finished, _ = run(tmp_path / "run", mine, "rerun=true")
    assert finished.rows("retention")["query"].str.startswith("One more?").any()


@pytest.mark.slow
def test_what_an_unedited_model_answered_is_not_asked_again(data, tmp_path, monkeypatch):
    real, calls = Questions.__call__, []
    monkeypatch.setattr(Questions, "__call__", lambda self, lm: calls.append(lm.weights_hash()) or real(self, lm))
    rows = []
    for place, setting in (("a", "seed=0"), ("b", "task.retention.placebo=0"), ("c", "regression.world_mc.limit=1")):
        calls.clear()
        finished, _ = run(tmp_path / place, data, f"cache={tmp_path / 'kept'}", setting)
        unedited = finished.lm.weights_hash()
        rows.append((calls.count(unedited), len(calls) > 2, finished.store.frame()))
    assert [(again, edited) for again, edited, _ in rows] == [(2, True), (0, True), (1, True)]
    first, second = (frame[(frame.condition == "unedited") & (frame.kind == "question")] for _, _, frame in rows[:2])
    assert_frame_equal(*(frame.dropna(axis=1).drop(columns="run_id") for frame in (first, second)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("regression.world_mc.form=words", "regression.world_mc.form=words: must be one of"),
        ("regression.mmlu.subjects=[anatomy,botany]", "subjects=botany"),
        ("regression.mmlu.subjects=[anatomy,sociology]", "dev/sociology_dev.csv: there is no such file"),
    ],
)
def test_a_mistake_is_found_before_anything_is_measured(data, tmp_path, setting, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", data, setting)
    assert not (tmp_path / "run" / "rows.parquet").exists()


def test_a_shipped_copy_has_the_same_tables_figures_and_page(done, tmp_path):
    folder = done[0].folder
    (copy,) = results.ship(tmp_path / "ship", folder)
    ours, theirs = results.retention(folder), results.retention(copy)
    assert "logprobs" not in theirs
    for measure in (summary, drops, by_subject):
        assert_frame_equal(results.pooled(ours, measure), results.pooled(theirs, measure))
    assert shown(ours) == shown(theirs)
    said = section(page(copy))
    for part in ("world_mc", "mmlu", "sequential", "placebo", "on the same questions"):
        assert part in said
    assert said == section(page(folder))


def shown(rows):
    figure = forgetting_curves(forgetting(rows), rows)
    return [[(line.get_label(), line.get_xydata().tolist()) for line in axes.lines] for axes in figure.axes]


def section(text):
    return text.partition('<section id="ability">')[2].partition("</section>")[0]


@pytest.fixture
def quizzed(tmp_path):
    def make(name="run", fingerprint="quiz", **regimes):
        (tmp_path / name).mkdir()
        run = prepared(tmp_path / name)
        run = replace(run, regression={"quiz": Quiz(fingerprint)})
        retention(run, regimes or {"sequential": sequential, "joint": joint}, every=2)
        return run

    return make


def test_a_drop_of_known_size(quizzed):
    run = quizzed()
    lost = pd.read_csv(run.folder / "regression.csv").set_index("regime")
    assert lost["drop"]["sequential"] == lost["drop"]["joint"] == 3 / 8
    assert (lost.before["joint"], lost.after["joint"], lost["shift"]["joint"]) == (1, 5 / 8, -3)
    table = pd.read_csv(run.folder / "retention.csv").set_index("regime")
    assert table.accuracy["joint"] == 5 / 8
    parts = pd.read_csv(run.folder / "regression_subjects.csv")
    parts = parts[parts.regime == "joint"]
    assert parts.questions[parts.subject.isna()].tolist() == [8]  # they are in no group
    parts = parts.dropna(subset="subject").set_index("subject")
    assert parts["drop"].to_dict() == {"a": 2 / 4, "b": 1 / 4}  # questions 0 and 2, and 1


def test_a_third_panel_shows_accuracy_over_edits_and_chance(quizzed):
    rows = quizzed().rows()
    figure = forgetting_curves(forgetting(rows), rows)
    *_, axes = figure.axes
    assert len(figure.axes) == 3
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    for regime in ("sequential", "joint"):
        (label,) = [name for name in lines if regime in name]
        assert lines[label] == [[0, 1], [2, 6 / 8], [3, 5 / 8]]
    assert [0.25, 0.25] in [list(line.get_ydata()) for line in axes.lines]
    assert "quiz" in axes.get_title()
    silent = rows[rows.kind != "question"]
    assert len(forgetting_curves(forgetting(silent), silent).axes) == 2
    exact = regular(rows.drop(columns="chance"))  # of tasks without choices
    assert len(forgetting_curves(forgetting(exact), exact).axes[2].lines) == 2


def test_log_probabilities_behind_a_measure_are_shipped_also_where_a_sequence_ended_early(tmp_path, done):
    rows = results.retention(done[0].folder)
    rows = rows[rows.step <= 1].drop(columns=["run"])
    later = rows[(rows.condition == "edited") & (rows.kind == "edit")].assign(step=2.0, taught=2.0, checkpoint=False)
    folder = tmp_path / "ended"
    folder.mkdir()
    for name in ("config.yaml", "provenance.json"):
        (folder / name).write_text((done[0].folder / name).read_text())
    pd.concat([rows, later], ignore_index=True).to_parquet(folder / "rows.parquet")
    (copy,) = results.ship(tmp_path / "ship", folder)
    ours, theirs = (results.pooled(results.retention(path), drops) for path in (folder, copy))
    assert ours["shift"].notna().all()
    assert_frame_equal(ours, theirs)


def test_runs_that_were_not_asked_the_same_are_not_compared(done, tmp_path):
    folder, other = (shutil.copytree(done[0].folder, tmp_path / name) for name in ("one", "other"))
    assert len(results.compare(folder, other)) == 1
    known = json.loads((folder / "provenance.json").read_text())
    known["regression"]["mmlu"] = "another"
    (other / "provenance.json").write_text(json.dumps(known))
    (other / "checksums.json").unlink()  # or it would be damage
    with pytest.raises(UserError, match=r"differ in what mmlu asks \(regression\); they cannot be compared"):
        results.compare(folder, other)
    assert "The runs were not asked the same by mmlu (regression)." in page(tmp_path)
    del known["regression"]["mmlu"]  # what only one was asked is no difference
    (other / "provenance.json").write_text(json.dumps(known))
    assert len(results.compare(folder, other)) == 1


def test_a_run_goes_on_with_the_questions_it_began_with(tmp_path):
    check_questions(tmp_path, {"quiz": "a"})
    (tmp_path / "provenance.json").write_text(json.dumps({"regression": {"quiz": "a"}}))
    check_questions(tmp_path, {"quiz": "b"})  # nothing is measured yet
    (tmp_path / "progress.json").write_text("{}")
    check_questions(tmp_path, {"quiz": "a", "another": "c"})
    with pytest.raises(UserError, match=r"holds a run with another quiz \(regression\); rerun=true measures it anew"):
        check_questions(tmp_path, {"quiz": "b"})


def test_a_tracker_has_the_accuracy_of_each_suite():
    asked = [row("question", None, suite="quiz", correct=float(n > 0)) for n in range(4)]
    asked += [row("question", None, suite="other", correct=1.0), row("prior", True)]
    ((_, values),) = points(*asked)
    assert (values["t_sequential/quiz"], values["t_sequential/other"], values["t_sequential/prior"]) == (0.75, 1, 1)
    assert not [name for name in values if "question" in name]
