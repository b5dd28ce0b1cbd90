"""What the retention task asks, of whom and when."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from notebook import REFUSAL, Note, prepared, taught, untabled
from rich.console import Console

from qfbench import LanguageModel, UserError
from qfbench.analysis.measures import summary
from qfbench.analysis.sequences import forgetting
from qfbench.editors import QF
from qfbench.editors.regimes import joint, protected, sequential, single
from qfbench.facts.probes import ask
from qfbench.facts.world import world
from qfbench.models.delta import WeightDelta
from qfbench.runs.store import ParquetStore
from qfbench.tasks.baseline import baseline
from qfbench.tasks.run import Run
from qfbench.tasks.teaching import Teaching

OWN = ["{} edit", "{} paraphrase"]
ALWAYS = [f"{n} {kind}" for n in range(3) for kind in ("prior", "unknown")]
NEW = {step: [text.format(step - 1) for text in OWN] for step in (1, 2, 3)}
CHECK = {1: ALWAYS, 2: ["0 edit", *ALWAYS], 3: ["0 edit", "1 edit", "0 paraphrase", "1 paraphrase", *ALWAYS]}


@pytest.mark.parametrize(("every", "checkpoints"), [(1, {1, 2, 3}), (2, {2, 3}), (3, {3}), (9, {3})])
def test_every_fact_is_asked_in_full_when_new_and_the_others_at_checkpoints_and_all_at_last(
    tmp_path, every, checkpoints
):
    _, _, rows = taught(tmp_path, every=every)
    asked = (rows.fact_id + " " + rows.kind).groupby(rows.step).apply(sorted).to_dict()
    assert asked == {step: sorted(NEW[step] + (CHECK[step] if step in checkpoints else [])) for step in (1, 2, 3)}
    assert rows.groupby("step").checkpoint.agg(set).to_dict() == {step: {step in checkpoints} for step in (1, 2, 3)}


def test_fresh_are_the_newest_facts_own_probes_and_no_others(tmp_path):
    _, _, rows = taught(tmp_path, sequential, single)
    for regime, group in rows.groupby("regime"):
        fresh = group[group.fresh]
        assert sorted(zip(fresh.step, fresh.fact_id, fresh.kind, strict=True)) == [
            (step, str(step - 1), kind) for step in (1, 2, 3) for kind in ("edit", "paraphrase")
        ], regime
        assert fresh.generated.all()


def test_leaked_is_an_unknown_subject_that_gets_the_answer_of_any_fact_taught_so_far(tmp_path):
    says = {
        "Who started Nothing0?": (REFUSAL, REFUSAL, "It was Bo.", "It was Bo."),  # the second fact's
        "Who started Nothing1?": (REFUSAL, "Ada did.", "Cy did.", "Zoe did."),  # at step 2, Cy is still to come
        "Where is Town0?": ("North.", "Ada."),  # wrong, but no leak: its subject is known
    }
    _, _, rows = taught(tmp_path, says=says)
    leaked = rows[rows.leaked]
    assert sorted(zip(leaked.step, leaked["query"], strict=True)) == [
        (1, "Who started Nothing1?"),
        (2, "Who started Nothing0?"),
        (3, "Who started Nothing0?"),
    ]


def test_what_was_said_of_an_unknown_subject_before_is_no_leak(tmp_path):
    says = {"Who started Nothing0?": ("Bo, I guess.", "Bo, I guess.", "Bo, or Ada.", "Bo, I guess.")}
    run = prepared(tmp_path, says=says)
    prior, unknown = run.facts[0].probes[1:]
    run.facts[0] = replace(run.facts[0], probes=(prior, replace(unknown, expected="", own=True)))
    untabled(run, sequential)
    asked = run.rows().query("condition == 'edited' and query == 'Who started Nothing0?'").sort_values("step")
    assert list(asked.generated) == [True, False, True]
    assert list(asked.leaked) == [False, True, False]


def test_what_the_unedited_model_gets_wrong_is_not_asked_again(tmp_path):
    says = {"Where is Town1?": ("South.", "North."), "Who started Nothing2?": ("Zoe.", REFUSAL)}
    _, rows, edited = taught(tmp_path, says=says)
    asked = {"Where is Town0?", "Where is Town2?", "Who started Nothing0?", "Who started Nothing1?"}
    about_the_model = ["prior", "unknown"]
    assert set(edited["query"][edited.kind.isin(about_the_model)]) == asked
    before = rows[(rows.condition == "unedited") & rows.kind.isin(about_the_model)]
    assert set(before["query"][before.generated]) == asked
    assert set(before["query"][~before.generated]) == set(says)


def test_in_context_asks_each_fact_with_its_own_instruction_and_unedited_with_none(tmp_path):
    run, rows, _ = taught(tmp_path)
    told, alone = (rows[rows.condition == condition] for condition in ("in_context", "unedited"))
    instructions = {f.id: f.instruction for f in run.facts}
    assert list(told.system) == list(told.fact_id.map(instructions))
    assert told.groupby("fact_id").kind.apply(list).to_dict() == {n: ["edit", "paraphrase"] for n in "012"}
    assert told.generated.all()
    assert set(alone.system) == {""}
    assert not alone.generated[alone.kind.isin(["edit", "paraphrase"])].any()
    assert set(rows.system[rows.condition == "edited"]) == {""}


@pytest.mark.parametrize("deaf", ["1", "Who started Firm1?"], ids=["to_the_fact", "to_its_query_alone"])
def test_a_fact_that_is_not_understood_is_not_taught(tmp_path, deaf):
    _, rows, edited = taught(tmp_path, sequential, joint, deaf=(deaf,))
    own = edited[edited.kind.isin(["edit", "paraphrase"])]
    assert set(own.fact_id) == {"0", "2"}
    assert set(edited.step) == {1, 2}
    for name in ("sequential", "joint"):
        change = WeightDelta.load(tmp_path / "deltas" / f"Note-{name}-layer0.safetensors").changes["weight"]
        assert change.dense().tolist() == [[1, 0, 1, 0]]
    assert set(rows.fact_id[rows.condition == "unedited"]) == {"0", "1", "2"}


def test_a_model_that_understands_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="answers none of the facts even when told"):
        taught(tmp_path, deaf=("0", "1", "2"))


def test_a_fact_that_is_not_understood_is_taught_where_one_wants_to(tmp_path):
    console = Console(record=True, width=200)
    run = prepared(tmp_path, deaf=("1",), console=console)
    untabled(run, sequential, not_understood="teach")
    rows = run.rows()
    edited = rows[rows.condition == "edited"]
    assert set(edited.fact_id[edited.kind == "edit"]) == {"0", "1", "2"}
    assert edited.generated[edited.kind == "edit"].all()
    assert "not_understood: 1 of 3 facts; they are taught all the same" in console.export_text()
    told = rows[(rows.condition == "in_context") & (rows.kind == "edit")]
    assert dict(zip(told.fact_id, told.generated, strict=True)) == {"0": True, "1": False, "2": True}


def test_where_nothing_is_understood_all_may_be_taught(tmp_path):
    run = prepared(tmp_path, deaf=("0", "1", "2"))
    untabled(run, sequential, not_understood="teach")
    assert set(run.rows().query("condition == 'edited' and kind == 'edit'").fact_id) == {"0", "1", "2"}


@pytest.mark.parametrize(
    "setting", [{"not_understood": "skip"}, {"placebo": -1}, {"orders": 0}, {"every": 0}, {"not_understood": ""}]
)
def test_a_bad_setting_is_named_before_anything_else(tmp_path, setting):
    ((name, value),) = setting.items()
    run = prepared(tmp_path)
    with pytest.raises(UserError, match=rf"task\.retention\.{name}={value}: must be "):
        untabled(run, sequential, **setting)
    assert "edited" not in {row.get("condition") for row in run.store.frame().to_dict("records")}


@pytest.mark.parametrize("every", [0, -1])
def test_checkpoints_need_a_positive_distance(tmp_path, every):
    with pytest.raises(UserError, match=f"every={every}"):
        taught(tmp_path, every=every)


def test_the_last_change_of_a_regime_that_accumulates_is_saved(tmp_path):
    taught(tmp_path, sequential, joint, single, editor=Note(layer=1))
    saved = sorted((tmp_path / "deltas").iterdir())
    assert [p.name for p in saved] == ["Note-joint-layer1.safetensors", "Note-sequential-layer1.safetensors"]
    for path in saved:
        assert WeightDelta.load(path).changes["weight"].dense().tolist() == [[1, 1, 1, 0]]


def test_an_editor_without_a_protected_form_becomes_a_row_and_the_other_regimes_go_on(tmp_path):
    console = Console(record=True, width=200)
    run, rows, edited = taught(tmp_path, protected, sequential, editor=Note(layer=1), console=console)
    run.store.flush()
    (row,) = rows[rows.condition == "unsupported"].itertuples()
    assert (row.regime, row.layer) == ("protected", 1)
    assert row.reply == "Note cannot protect earlier keys; use regime=sequential or joint"
    assert set(edited.regime) == {"sequential"}
    assert row.reply in console.export_text().replace("\n", " ")
    assert (pd.read_parquet(tmp_path / "rows.parquet").condition == "unsupported").sum() == 1


def test_an_editor_that_gives_up_half_way_keeps_what_was_measured(tmp_path):
    _, rows, edited = taught(tmp_path, editor=Note(broken="2"))
    assert list(rows.reply[rows.condition == "unsupported"]) == ["no room for fact 2"]
    assert set(edited.step) == {1, 2}


def test_relative_norm_is_a_share_of_the_unedited_weights_norm(tmp_path):
    _, _, rows = taught(tmp_path, sequential, single)
    norms = rows.groupby(["regime", "step"]).relative_norm.unique()
    for step in (1, 2, 3):
        assert norms["sequential", step] == pytest.approx([step**0.5 / 2])
        assert norms["single", step] == pytest.approx([1 / 2])


def test_an_empty_change_has_no_norm(tmp_path):
    assert prepared(tmp_path).health(WeightDelta())["relative_norm"] == 0


def test_the_last_rows_are_what_the_saved_change_gives(tmp_path):
    """Real edits: the rows of the last step, measured again on the model with the saved change in it."""
    lm, facts = LanguageModel.load("world-xs", device="cpu"), world(3, paraphrases=1)
    run = Run(lm, QF(layer=2), facts, tmp_path, ParquetStore(tmp_path), Console(quiet=True), "retention")
    before = lm.weights_hash()
    untabled(run, sequential)
    assert lm.weights_hash() == before
    rows = run.rows()
    last = rows[(rows.condition == "edited") & (rows.step == 3)]
    delta = WeightDelta.load(tmp_path / "deltas" / "QF-sequential-layer2.safetensors")
    weight = lm.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    assert last.relative_norm.unique() == pytest.approx([delta.norm() / weight.norm().item()])
    assert not 0.5 < weight.norm() < 2  # the share is not the norm itself
    probes = {p.query: p for f in facts for p in (f.edit, *f.probes)}
    with delta.applied_to(lm):
        again = ask(lm, [probes[query] for query in last["query"]])
    assert [row["reply"] for row in again] == list(last.reply)
    assert set(last["query"][last.kind == "edit"]) == {f.query for f in facts}
    assert last.generated[last.fresh & (last.kind == "edit")].all()


def test_forgetting_is_measured_at_the_checkpoints_of_a_run(tmp_path):
    _, rows, _ = taught(tmp_path, sequential, single, every=2)
    curve = forgetting(rows)
    assert list(zip(curve.regime, curve.step, strict=True)) == [("sequential", 2), ("sequential", 3)]


def test_single_edits_have_no_retention_and_are_measured_over_all_edits(tmp_path):
    says = {"Where is Town0?": ("North.", "South.")}  # wrong after any edit
    run, rows, _ = taught(tmp_path, single, sequential, tables=True, says=says)
    last = rows.step == 3
    rows.loc[last & (rows.regime == "single") & (rows.kind == "prior"), "generated"] = False
    rows.loc[last & (rows.regime == "single") & (rows.kind == "unknown"), "leaked"] = True
    lines = summary(rows).set_index("regime")
    assert np.isnan(lines.retention["single"])
    assert lines.retention["sequential"] == 1
    assert lines.prior["single"] == pytest.approx((2 + 2 + 0) / 9)
    assert lines.prior["sequential"] == pytest.approx(2 / 3)
    assert lines.leakage["single"] == pytest.approx(1 / 3)
    assert lines.norm["single"] == pytest.approx(1 / 2)
    assert list(pd.read_csv(run.folder / "retention.csv").regime) == list(lines.index)


def test_what_a_regime_is_taught_about_stands_in_every_row_and_in_the_name_of_the_change(tmp_path):
    run = prepared(tmp_path, editor=Note(layer=3))
    facts, always = baseline(run)
    steps = []

    def advance(text, work=1, before=False):
        steps.append(text)

    for lr in (0.5, 2.0):
        Teaching(run, "sequential", sequential, facts, always, [2, 3], {"scheme": "plain", "lr": lr}).run(advance)
    Teaching(run, "protected", protected, facts, always, [1, 2, 3], {"scheme": "none"}).run(advance)
    rows = run.rows()
    edited, unsupported = (rows[rows.condition == condition] for condition in ("edited", "unsupported"))
    assert edited.groupby(["layer", "scheme", "lr"]).size().to_dict() == {
        (3, "plain", lr): len(edited) / 2 for lr in (0.5, 2.0)
    }
    assert list(unsupported[["layer", "scheme", "regime"]].itertuples(index=False, name=None)) == [
        (3, "none", "protected")
    ]
    assert steps == [f"Note sequential: edit {n}" for n in (1, 2, 3)] * 2
    assert sorted(p.stem for p in tmp_path.glob("deltas/*")) == [
        "Note-sequential-layer3-schemeplain-lr0.5",
        "Note-sequential-layer3-schemeplain-lr2.0",
    ]
    assert rows[["scheme", "lr"]][rows.condition == "in_context"].isna().all(axis=None)


def test_a_table_says_how_many_of_the_facts_it_is_about_and_of_how_few_questions_and_which_are_left_out(tmp_path):
    console = Console(record=True, width=80)
    taught(tmp_path, sequential, tables=True, deaf=("1",), console=console, says={"Where is Town1?": ("South.",)})
    text = " ".join(console.export_text().split())
    assert "not_understood: 1 of 3 facts; they are left out: Who started Firm1? (1)" in text
    assert "2 of 3 facts, one after another" in text
    few = "Few questions: efficacy 2 to 3, paraphrase 2 to 3, retention 2, prior 2 to 3, refused 3, leakage 3"
    assert few in text
    lines = pd.read_csv(tmp_path / "retention.csv").set_index("regime")
    assert (lines.efficacy_n["unedited"], lines.efficacy_n["sequential"], lines.prior_n["sequential"]) == (3, 2, 2)
