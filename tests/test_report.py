import base64
import json
import re
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest
from omegaconf import OmegaConf

from qfbench import UserError
from qfbench.analysis.catalogue import MEASURES, Measure
from qfbench.analysis.comparisons import over_settings
from qfbench.analysis.measures import compared, summary
from qfbench.analysis.rows import regular
from qfbench.analysis.tables import laid_out
from qfbench.commands.report import main
from qfbench.pages import results
from qfbench.pages.cautions import cautions
from qfbench.pages.legend import columns
from qfbench.pages.report import page
from qfbench.runs.ledger import Ledger

VOID = {"meta", "img", "br", "hr", "link", "input"}
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text, and the cells of each section's tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.tables, self.words = [], [], [], {}, {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.tables[self.section], self.words[self.section] = [], ""
        if tag == "table":
            self.tables[self.section].append([])
        if tag == "tr":
            self.tables[self.section][-1].append([])
        if tag in ("td", "th"):
            self.tables[self.section][-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.section and "section" in self.open:
            self.words[self.section] += data
            if {"td", "th"} & set(self.open):
                self.tables[self.section][-1][-1][-1] += data

    def lines(self, section, table=0):
        """A table's lines as dictionaries."""
        head, *rest = self.tables[section][table]
        return [dict(zip(head, line, strict=True)) for line in rest]


def asked(condition, kind, passed, fact, reply="", **more):
    row = {"task": "retention", "model": "tiny", "editor": "QF", "condition": condition, "kind": kind, "step": 0}
    row |= {"system": "", "query": f"{kind} {fact}?", "expected": f"It is {fact}.", "fact_id": f"fact-{fact}"}
    row |= {"reply": reply or (f"It is {fact}." if passed else "No."), "stopped": True, "generated": passed}
    row |= {"exact": passed, "forced": 1.0 if passed else 0.5, "nll": 0.1, "preferred": None, "gold": None}
    return row | {"fact_kind": "thing", "leaked": False} | more


def run_rows(n=4, regimes=("sequential", "joint"), layer=2, deaf=(), lost=1, orders=(0,)):
    """A run in which sequential edits lose the first `lost` facts at the end, and prior knowledge after half."""
    rows = []
    for k in range(n):
        rows.append(asked("unedited", "edit", False, k))
        rows += [asked("unedited", kind, True, f"{kind}{k}") for kind in ("prior", "unknown")]
        rows.append(asked("in_context", "edit", k not in deaf, k))
    facts = [k for k in range(n) if k not in deaf]
    for order in orders:
        taught = facts if not order else facts[::-1]
        for regime in regimes:
            for step in range(1, len(facts) + 1):
                same = {"regime": regime, "step": step, "layer": layer, "order": order, "checkpoint": True}
                same |= {"taught": 1 if regime == "single" else step, "relative_norm": 0.1 * step, "overlap": 0.5}
                same |= {"top": 0.05 * step, "rounding_loss": 0.0, "solve_condition": 10.0 * step}
                last = step == len(facts)
                own = [taught[step - 1]] if regime == "single" else taught[:step]
                for place, k in enumerate(own):
                    kept = not (regime == "sequential" and last and place < lost)
                    reply = f"said in order {order} after {step} of {k}"
                    rows.append(asked("edited", "edit", kept, k, reply, fresh=k == own[-1], **same))
                for k in range(n):
                    kept = regime != "sequential" or step <= len(facts) / 2
                    rows.append(asked("edited", "prior", kept or k == 0, f"prior{k}", fresh=False, **same))
                    rows.append(asked("edited", "unknown", True, f"unknown{k}", fresh=False, **same))
                    if last and regime != "single":
                        for kind in ("edit", "prior", "unknown"):
                            about = k if kind == "edit" else f"{kind}{k}"
                            passed = kind != "edit"
                            rows.append(asked("placebo", kind, passed, about, fresh=False, draw=0, **same))
    return pd.DataFrame(rows)


def stored(folder, rows, finished=True, layer=2, seed=0, n=4, **known):
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / "rows.parquet", index=False)
    (folder / "progress.json").write_text(json.dumps({"rows": len(rows), "tasks": [], "finished": finished}))
    config = f"editor: {{layer: {layer}}}\nseed: {seed}\nfacts: {{_target_: qfbench.facts.world.world}}\n"
    (folder / "config.yaml").write_text(config)
    provenance = {"model": "tiny", "model_hash": "0123abcd", "suite_hash": "feed", "dtype": "float32", "device": "cpu"}
    provenance |= {
        "command": ["experiment=retention", "regime=[sequential,joint]"],
        "seed": seed,
        "git_commit": "c0ffee",
    }
    provenance |= {"facts": [f"fact-{k}" for k in range(n)], "versions": {"qfbench": "0.1.0"}, "torch": "2.9"} | known
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("runs") / "one", run_rows(orders=(0, 1)))


@pytest.fixture(scope="module")
def text(run, drawing):
    with drawing():
        return page(run)


def test_the_page_has_every_section_and_needs_nothing_but_itself(text):
    shown = Page(text)
    assert list(shown.words) == [
        *("question", "cautions", "main-table", "differences", "sequences", "legend", "figures", "replies"),
        *("questions", "health", "provenance"),
    ]
    assert all(words.strip() for words in shown.words.values())
    assert not {"script", "link", "iframe", "object", "form"} & set(shown.tags)
    assert len(shown.links) == 2
    assert all(link.startswith("data:image/svg+xml;base64,") for link in shown.links)
    assert all(b"<svg" in base64.b64decode(link.split(",")[1]) for link in shown.links)
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_what_was_done_is_said(text):
    said = Page(text).words["question"]
    for part in ("4 facts", "suite world", "tiny", "QF (layer 2)", "sequential, joint", "each: 2;", "seed: 0"):
        assert part in said


def printed(line, name):
    """A share of a few questions as the page shows it."""
    value, low, high, n, same = (line.get(f"{name}{beside}") for beside in ("", "_low", "_high", "_n", "_same"))
    text = f"{value:.2f}" + (f" ± {max(high - value, value - low):.2f}" if high > low else "")
    return text.replace("-0.00", "0.00").replace("-", "−") + " ~" * (same is True) + f" n {n:g}"


@pytest.mark.parametrize(("section", "measure"), [("main-table", summary), ("differences", compared)])
def test_the_numbers_are_those_of_the_measures(tmp_path, section, measure):
    run = stored(tmp_path, run_rows(9, lost=7))
    table, seen = measure(results.rows_of(run)), set()
    lines = Page(page(run)).lines(section)
    assert len(lines) == len(table) > 0
    for line, want in zip(lines, table.to_dict("records"), strict=True):
        assert line["regime"] == (f"placebo of {want['of']}" if want["regime"] == "placebo" else want["regime"])
        for name in ("efficacy", "forced", "inflation", "retention", "prior", "refused", "leakage"):
            if pd.isna(want.get(name, float("nan"))):
                assert not line.get(name)
            else:
                same = want.get(f"{name}_same")
                seen.add((same is True, "±" in line[name]))
                assert line[name] == printed(want, name)
    assert seen == {(False, True), (True, True)}


def test_differences_count_facts_and_not_texts_of_perplexity():
    rows = run_rows()
    texts = [rows[rows.kind == "prior"].assign(kind="perplexity", fact_id=str(n), tokens=5.0) for n in range(9)]
    assert compared(regular(pd.concat([rows, *texts]))).facts.tolist() == [4]


def test_every_measure_that_is_shown_is_explained_with_how_many_questions_it_rests_on(text):
    shown = Page(text)
    meaning = {line["column"]: line for line in shown.lines("legend")}
    for section in ("main-table", "differences", "sequences", "health"):
        assert set(shown.lines(section)[0]) - {"regime"} <= set(meaning)
    assert meaning["half life"]["meaning"] == columns()["half_life"]
    assert [meaning[name]["questions"] for name in ("efficacy", "prior", "norm")] == ["4", "4", ""]
    assert "a random change of the same rank" in shown.words["main-table"]


def test_a_new_measure_is_one_entry(tmp_path, monkeypatch):
    new = Measure("exactly", "fresh", "edit", "exact", "word for word", header="word for\nword")
    monkeypatch.setitem(MEASURES, new.name, new)
    folder = stored(tmp_path, run_rows())
    table = summary(results.rows_of(folder))
    (line,) = table[table.regime == "joint"].to_dict("records")
    assert line["exactly"] == line["efficacy"]
    assert {"exactly", "exactly_low", "exactly_high"} <= set(table.to_csv(index=False).splitlines()[0].split(","))
    assert "word for\nword" in [column.header for column in laid_out(table, "").columns]
    shown = Page(page(folder))
    assert [line["exactly"] for line in shown.lines("main-table")] == [
        line["efficacy"] for line in shown.lines("main-table")
    ]
    (line,) = [line for line in shown.lines("legend") if line["column"] == "exactly"]
    assert (line["meaning"], line["questions"]) == ("word for word", "4")


def test_a_measure_without_a_legend_is_none():
    with pytest.raises(ValueError, match="measure exactly: needs a legend"):
        Measure("exactly", "fresh", "edit", "exact", "")


def test_replies_are_the_first_facts_of_order_0_with_passes_and_failures(text):
    shown = Page(text)
    assert "the first 12 facts of order 0" in shown.words["replies"]
    lines = shown.lines("replies")
    assert [line["query"] for line in lines] == [f"edit {k}?" for k in range(4)]
    first, second = lines[:2]
    assert first["expected"] == "It is 0."
    assert re.sub(r"\s+", " ", first["unedited"]) == "✗ No.generated ✗ exact ✗ forced 0.50 "
    assert first["in context"].startswith("✓ It is 0.")
    assert first["right after its edit"].startswith("✓ said in order 0 after 1 of 0")
    assert first["at the end"].startswith("✗ said in order 0 after 4 of 0")
    assert second["at the end"].startswith("✓ said in order 0 after 4 of 1")
    assert "order 1" not in shown.words["replies"]


def test_a_sample_has_twelve_facts_and_single_edits_have_no_end(tmp_path):
    rows = run_rows(14, regimes=("single",), deaf=(1,))
    stored(
        tmp_path, rows.replace({"fact_id": {"fact-prior1": "fact-1"}}), n=14
    )  # prior knowledge is asked all the same
    shown = Page(page(tmp_path))
    lines = shown.lines("replies")
    assert [line["query"] for line in lines] == ["edit 0?", "edit 1? (not understood)"] + [
        f"edit {k}?" for k in range(2, 12)
    ]
    assert lines[1]["right after its edit"] == "–"
    assert "at the end" not in lines[0]
    assert "13 of 14 facts" in shown.words["question"]
    assert "1 of 14 facts are not understood by tiny" in shown.words["cautions"]
    assert "not taught, and not in the numbers: edit 1?" in shown.words["cautions"]
    assert "not taught" in shown.words["cautions"]
    assert "No edits accumulate" in shown.words["health"]
    assert "sequences" not in shown.words


def test_a_reply_that_did_not_end_says_so(tmp_path):
    rows = run_rows(regimes=("joint",))
    rows["stopped"] = ~((rows.condition == "edited") & (rows.fact_id == "fact-2"))
    lines = Page(page(stored(tmp_path, rows))).lines("replies")
    assert ["(did not end by itself)" in line["at the end"] for line in lines] == [False, False, True, False]


def test_what_a_model_says_stays_text(tmp_path):
    rows = run_rows()
    rows.loc[rows.condition == "edited", "reply"] = EVIL + "\"'&amp;"
    rows["query"] = "<b>who?</b>" + rows["query"]
    rows["model"] = "<i>tiny</i>"
    rows = pd.concat([rows, rows[-1:].assign(condition="unsupported", regime="<u>", kind=None, reply=EVIL)])
    stored(tmp_path, rows, command=["<img src=x onerror=alert(1)>"], device="</td><script>")
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "layers.csv").write_text(f"<s>,name\n1,{EVIL}\n")
    text = page(tmp_path)
    shown = Page(text)
    assert not {"script", "b", "i", "u", "s"} & set(shown.tags)
    assert "<script" not in text
    assert EVIL + "\"'&amp;" in shown.words["replies"]
    assert EVIL in shown.words["cautions"]
    assert EVIL in shown.words["stored"]
    assert "<img src=x onerror=alert(1)>" in shown.words["provenance"]
    assert "</td><script>" in shown.words["provenance"]


def test_weight_health_is_shown_at_some_of_the_checkpoints(tmp_path):
    stored(tmp_path, run_rows(20, regimes=("sequential",), orders=(0, 1)), n=20)
    lines = Page(page(tmp_path)).lines("health")
    steps = [int(line["edits"]) for line in lines]
    assert steps[0] == 1
    assert steps[-1] == 20
    assert len(steps) == 8
    assert [(line["relative norm"], line["top"], line["overlap"]) for line in lines[1:2]] == [
        ("0.400", "0.200", "0.500")
    ]


def test_an_unfinished_run_says_so(tmp_path, text):
    assert "Not finished" not in text
    rows = run_rows(regimes=("sequential",))
    stored(tmp_path / "cut", rows[rows.step < 3], finished=False)
    said = Page(page(tmp_path / "cut")).words["cautions"]
    assert "Not finished: 1 of 1 runs were stopped or still run" in said
    assert "ends after 2 of 4 edits" in said
    stored(tmp_path / "two" / "done", rows[rows.step == 0])
    stored(tmp_path / "two" / "empty", rows)
    (tmp_path / "two" / "empty" / "rows.parquet").unlink()
    said = Page(page(tmp_path / "two")).words["cautions"]
    assert "Not finished: 1 of 2 runs have measured nothing yet: empty" in said


def test_a_run_that_has_edited_nothing_yet_has_a_page(tmp_path):
    rows = run_rows()
    rows = rows[rows.condition.isin(["unedited", "in_context"])].dropna(axis=1, how="all")
    shown = Page(page(stored(tmp_path, rows, finished=False)))
    assert "Nothing has been written into tiny so far" in shown.words["question"]
    assert [line["regime"] for line in shown.lines("main-table")] == ["unedited", "in_context"]
    assert "No edits so far" in shown.words["replies"]


def warned(folder):
    """The cautions about the runs in a folder."""
    rows = results.retention(folder)
    return "\n".join(cautions(rows, results.pooled(rows), list(map(results.provenance_of, results.folders(folder)))))


def test_cautions_name_what_applies_and_nothing_else(tmp_path):
    assert "Collapse" not in warned(stored(tmp_path / "few", run_rows(lost=4)))
    rows = run_rows(12, lost=12)
    rows.loc[(rows.regime == "joint") & (rows.step == 4), "rounding_loss"] = 0.25
    folder = stored(tmp_path / "bad", rows, git_commit="c0ffee-dirty")
    said = warned(folder)
    assert set(said.splitlines()) <= set(Page(page(folder)).words["cautions"].splitlines())
    for part in (
        "Only 12 facts stand behind each line",
        "a true share of 0.78 would still give 12 of 12",
        "One seed only",
        "Only 1 sequence (",
        "Collapse of QF sequential on tiny: prior under half of its start after 7 edits, in 1 of 1 sequences",
        "QF sequential on tiny is not shown to retain more taught facts than its placebo: it has shown nothing",
        "QF sequential on tiny is not shown to keep more prior knowledge than its placebo",
        "QF joint on tiny: rounding loses up to 25.0% of the change",
        "no commit holds",
    ):
        assert part in said
    assert said.count("Collapse") == said.count("rounding loses") == 1
    assert said.count("shown nothing") == 1  # twelve facts tell all from none
    for seed in range(3):
        rows = run_rows(30, regimes=("joint",))
        stored(tmp_path / "good" / str(seed), rows, seed=seed, n=30, suite_hash=str(seed))
    assert warned(tmp_path / "good") == ""


def test_runs_that_were_not_measured_alike_are_named(tmp_path):
    for seed, dtype in enumerate(("float32", "bfloat16")):
        stored(tmp_path / dtype, run_rows(), seed=seed, dtype=dtype, model_hash=f"hash{seed}")
    said = warned(tmp_path)
    assert "differ in dtype: bfloat16, float32" in said
    assert "The runs of tiny differ in model_hash: hash0, hash1" in said


def test_a_sequence_without_a_placebo_says_so(tmp_path):
    rows = run_rows()
    assert "No placebo was measured" not in warned(stored(tmp_path, rows))
    assert "No placebo was measured" in warned(stored(tmp_path, rows[rows.condition != "placebo"]))
    single = run_rows(regimes=("single",))
    assert "No placebo was measured" not in warned(stored(tmp_path, single))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two layers, two seeds, and what a study left beside them."""
    folder = tmp_path_factory.mktemp("outputs") / "layers"
    for layer in (1, 2):
        for seed in (0, 1):
            rows = run_rows(layer=layer, lost=layer)
            stored(folder / f"run-{layer}{seed}", rows, layer=layer, seed=seed)
    (folder / "study").mkdir()
    (folder / "study" / "layers.csv").write_text("layer,prior,prior_low,prior_high\n1,0.5,0.25,1.0\n")
    (folder / "study" / "layers.png").write_bytes(b"\x89PNG drawn by the study")
    return folder


def test_a_study_is_one_page_with_its_own_tables_and_figures(study):
    shown = Page(page(study))
    lines = shown.lines("main-table")
    table = results.pooled(results.rows_of(study))
    assert [(int(line["editor.layer"]), line["prior"]) for line in lines] == [
        (line["editor.layer"], "" if pd.isna(line["prior"]) else printed(line, "prior"))
        for line in table.to_dict("records")
    ]
    differences = [
        (line["editor.layer"], line["against"], line["retention"][:4]) for line in shown.lines("differences")
    ]
    assert differences == [("1", "QF sequential", "0.25"), ("2", "QF sequential", "0.50")]
    assert shown.lines("stored") == [{"layer": "1", "prior": "0.50 ± 0.50"}]
    picture, *drawn = shown.links
    assert base64.b64decode(picture.split(",")[1]) == b"\x89PNG drawn by the study"
    assert len(drawn) == 4  # curves and heat map of each layer
    assert "QF (layer 1, 2)" in shown.words["question"]
    assert "seed: 0, 1" in shown.words["question"]
    assert "the first 6 facts of order 0 of the first run" in shown.words["replies"]
    runs = shown.lines("provenance", 1)
    assert [line["run"] for line in runs] == ["run-10", "run-11", "run-20", "run-21"]
    assert [line["seed"] for line in runs] == ["0", "1", "0", "1"]


def test_the_page_of_a_sweep_shows_its_own_runs_alone(study):
    own = study / "study"
    (own / "runs.txt").write_text("../run-10\n../run-21\n")
    assert results.folders(own) == [study / "run-10", study / "run-21"]
    shown = Page(page(own))
    assert [line["run"] for line in shown.lines("provenance", 1)] == ["run-10", "run-21"]
    assert shown.lines("stored") == [{"layer": "1", "prior": "0.50 ± 0.50"}]
    (own / "runs.txt").write_text("../run-10\n../run-30\n")
    with pytest.raises(UserError, match=r"runs.txt: names .*run-30, which holds no run"):
        results.folders(own)


def test_provenance_says_how_to_measure_it_again(text):
    said = Page(text)
    assert "qfbench experiment=retention 'regime=[sequential,joint]'" in said.words["provenance"]
    known = dict(said.tables["provenance"][0])
    assert known["model hash"] == "0123abcd"
    assert known["suite hash"] == "feed"
    assert (known["dtype"], known["device"], known["git commit"]) == ("float32", "cpu", "c0ffee")
    assert known["qfbench version"] == "0.1.0"
    assert known["facts"] == "4"


def test_other_tasks_have_a_page_of_what_they_stored(tmp_path):
    stored(tmp_path, run_rows().assign(task="capacity"))
    (tmp_path / "capacity.csv").write_text("facts,prior\n4,0.5\n")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "capacity.png").write_bytes(b"drawn")
    shown = Page(page(tmp_path))
    assert "no rows of the task retention" in shown.words["question"]
    assert shown.lines("stored") == [{"facts": "4", "prior": "0.50"}]
    assert len(shown.links) == 1
    assert "None of the checks" not in shown.words["cautions"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["qfbench-report", *map(str, arguments)])
    main()


def test_the_command_writes_the_same_page_every_time(run, text, drawn, tmp_path, monkeypatch, capsys):
    command(monkeypatch, run)
    assert (run / "report.html").read_text(encoding="utf-8") == text
    assert capsys.readouterr().out == f"wrote {run / 'report.html'}\n"
    rows = run_rows()
    other = stored(tmp_path / "other", rows[rows.step == 0])
    command(monkeypatch, other, "--out", tmp_path / "a.html")
    assert "Nothing has been written" in (tmp_path / "a.html").read_text(encoding="utf-8")
    assert not (other / "report.html").exists()


def test_errors_are_one_line(tmp_path, run, monkeypatch, capsys):
    broken = stored(tmp_path / "broken", run_rows())
    (broken / "provenance.json").write_text("{")
    table = stored(tmp_path / "table", run_rows())
    (table / "study").mkdir()
    (table / "study" / "empty.csv").write_text("")
    cases = [
        ((tmp_path / "nowhere",), "holds no run"),
        ((run, "--out", tmp_path / "none" / "a.html"), "cannot be written"),
        ((broken,), "provenance.json: cannot be read"),
        ((table,), "empty.csv: cannot be read"),
    ]
    for arguments, message in cases:
        with pytest.raises(SystemExit) as stop:
            command(monkeypatch, *arguments)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert message in said.err
        assert said.err.count("\n") == 1
        assert not said.out
    with pytest.raises(UserError):
        page(tmp_path / "nowhere")


AXES = {
    "edits": (3, 4),
    "seed": (0, 1),
    "threads": (1, 2),
    "editor.layer": (1, 2),
    "editor.lr": (0.125, None),
    "facts.n": (3, 4),
    "facts.about": ("novel", "known"),
    "model.path": ("a", "b/c"),
    "model.told": ("system", "user"),
    "regime.single._target_": ("x.single", None),
    "task.retention.every": (1, [1, 4]),
    "task.retention.orders": (1, 2),
}


@pytest.mark.parametrize("setting", AXES)
def test_runs_may_differ_in_any_setting(tmp_path, setting):
    for n, value in enumerate(AXES[setting]):
        folder = tmp_path / f"run{n}"
        stored(folder, run_rows(), seed=0)
        config = OmegaConf.load(folder / "config.yaml")
        OmegaConf.update(config, setting, value, force_add=True)
        OmegaConf.save(config, folder / "config.yaml")
        Ledger(folder).write("config.yaml", lambda path, held=config: OmegaConf.save(held, path))
    shown = Page(page(tmp_path))
    lines = [line for table in shown.tables["main-table"] for line in table]
    if setting != "seed":
        said = {str(value) if isinstance(value, int | float | str) else "" for value in AXES[setting]}
        assert all(any(value in line for line in lines) for value in said - {""}), lines


def test_a_figure_of_settings_has_a_panel_for_each_regime_that_was_run():
    shares = {"": 0.5, "_low": 0.4, "_high": 0.6}
    line = {f"{measure}{end}": share for measure in ("efficacy", "retention") for end, share in shares.items()}
    for regimes, panels in ((["single"], 1), (["single", "sequential"], 2), (["joint"], 2)):
        table = pd.DataFrame([line | {"regime": regime, "layer": layer} for regime in regimes for layer in range(30)])
        figure = over_settings(table, "layer", "edited layer")
        assert len(figure.axes) == panels
        assert all(len(axes.get_xticks()) <= 15 for axes in figure.axes)
