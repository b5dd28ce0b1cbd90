"""Retrieval: no weight changes; what is taught is told where a question names its subject."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_run import run

from qfbench import Fact, LanguageModel, UserError
from qfbench.editors import QF, PromptRetrieval
from qfbench.editors.regimes import joint, sequential
from qfbench.facts.world import world
from qfbench.models.delta import WeightDelta


def about(subject, verb="started"):
    return Fact(f"Qi {verb} {subject}.", f"Who {verb} {subject}?", f"{subject} was {verb} by Qi.", subject=subject)


ZUNDA, LODZ, LED = about("Zunda"), about("Łódź A.B. (old)"), about("Zunda", "led")


def test_what_is_kept_is_told_where_its_subject_is_named_and_nowhere_else(tiny):
    lm, editor = tiny("qwen2"), PromptRetrieval()
    plain = {
        q: lm.render(q) for q in ("Who runs Zundas?", "Who runs it?", "Who runs ŁÓDŹ A.B. (OLD)?", "Is it zunda's?")
    }
    delta = editor.edit(lm, [ZUNDA, LODZ]) + editor.edit(lm, [LED])
    with delta.applied_to(lm):
        told = {q: lm.render(q) for q in plain}
        own = lm.render("Who runs Zunda?", "Be brief.", "Qi.")
    assert told["Who runs Zundas?"] == plain["Who runs Zundas?"]
    assert told["Who runs it?"] == plain["Who runs it?"]
    assert told["Who runs ŁÓDŹ A.B. (OLD)?"] == lm.render("Who runs ŁÓDŹ A.B. (OLD)?", LODZ.instruction)
    assert told["Is it zunda's?"] == lm.render("Is it zunda's?", f"{ZUNDA.instruction} {LED.instruction}")
    assert own == lm.render("Who runs Zunda?", "Be brief.", "Qi.")  # a system text of its own stays alone
    assert {q: lm.render(q) for q in plain} == plain


def test_it_is_taken_back_whatever_happens_and_changes_within_each_other_add_up(tiny):
    lm, editor = tiny("qwen2"), PromptRetrieval()
    one, two = editor.edit(lm, [ZUNDA]), editor.edit(lm, [LED])
    before, weights = lm.render("Zunda?"), lm.weights_hash()
    with pytest.raises(ZeroDivisionError), one.applied_to(lm):
        with two.applied_to(lm):
            assert lm.render("Zunda?") == replace(lm, told_of=[]).render(
                "Zunda?", f"{ZUNDA.instruction} {LED.instruction}"
            )
        assert lm.render("Zunda?") == replace(lm, told_of=[]).render("Zunda?", ZUNDA.instruction)
        assert lm.weights_hash() == weights
        raise ZeroDivisionError
    assert lm.render("Zunda?") == before


def test_it_is_a_change_of_no_weight(tiny, facts, tmp_path):
    lm = tiny("qwen2")
    delta = PromptRetrieval().edit(lm, [ZUNDA, LODZ])
    assert (delta.norm(), delta.changes, delta.rounding_loss(lm)) == (0.0, {}, 0.0)
    assert delta.placebo(0).told == ()
    delta.save(tmp_path / "told.safetensors")
    assert WeightDelta.load(tmp_path / "told.safetensors").told == delta.told
    both = QF(1).edit(lm, facts) + delta
    both.save(tmp_path / "both.safetensors")
    loaded = WeightDelta.load(tmp_path / "both.safetensors")
    assert loaded.told == list(both.told)
    assert loaded.norm() == both.norm() > 0


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs", device="cpu")


def test_replies_are_those_of_the_told_model_and_no_kept_state_is_mistaken_for_another(xs):
    facts = world(3, seed=5)
    queries = [fact.query for fact in facts]

    def asked(lm, told=False):
        dialogues = [lm.render(f.query, f.instruction if told else "", f.answer) for f in facts]
        replies, scores = lm.answer(dialogues, dialogues)
        return [r.text for r in replies], torch.tensor([n for s in scores for n in s.nll])

    change = QF(2).edit(xs, [about("Zunda")])
    for weights in (WeightDelta(), change):  # under a change of weights, states of the layers below it are kept
        fresh = replace(xs, states=type(xs.states)())
        with weights.applied_to(fresh):
            wanted, unsaid = asked(fresh, told=True), asked(fresh)
        with weights.applied_to(xs):
            assert asked(xs)[0] == unsaid[0]
            with PromptRetrieval().edit(xs, facts).applied_to(xs):
                found = asked(xs)
                assert asked(xs)[0] == found[0]
            assert asked(xs)[0] == unsaid[0]
        assert found[0] == wanted[0] != unsaid[0]
        assert torch.allclose(found[1], wanted[1], atol=1e-4)
    assert [xs.reply(query) for query in queries] != found[0]


@pytest.mark.parametrize("regime", [joint, sequential])
def test_regimes_and_going_on(tiny, regime):
    lm, editor, facts = tiny("qwen2"), PromptRetrieval(), [ZUNDA, LODZ, LED]
    whole = [total.told for _, total in regime(editor, lm, facts)]
    assert [list(told) for told in whole] == [[(f.subject, f.instruction) for f in facts[:n]] for n in (1, 2, 3)]
    *_, (_, rest) = regime(editor, lm, facts, 1, editor.edit(lm, facts[:1]))
    assert list(rest.told) == list(whole[-1])


@pytest.mark.parametrize("subject", ["", "Zun"])
def test_a_fact_that_its_own_question_would_not_find_is_refused(tiny, subject):
    with pytest.raises(UserError, match=rf"fact z: the field 'subject' \('{subject}'\) names nothing in the query"):
        PromptRetrieval().edit(tiny("qwen2"), [replace(ZUNDA, id="z", subject=subject)])


def same(run, other):
    one, two = (pd.read_parquet(r.folder / "rows.parquet").drop(columns="run_id") for r in (run, other))
    return one.equals(two)


def test_a_run_gives_the_replies_of_the_told_model_and_says_what_it_is(tmp_path, monkeypatch):
    how = ("editor=retrieval", "experiment=retention", "regime=[sequential,joint]", f"cache={tmp_path / 'cache'}")
    how += (
        "regression=none",
        "commit_seconds=0",
        "task.retention.placebo=1",
        "facts.n=4",
        "facts.prior=1",
        "facts.unknown=1",
    )
    done, text = run(tmp_path / "whole", *how)
    rows = done.rows("retention")
    assert "world-xs, PromptRetrieval in the prompt (no weights are changed)" in " ".join(text.split())
    key = ["kind", "fact_id", "query"]
    by = {c: own.drop_duplicates(key).set_index(key).reply.sort_index() for c, own in rows.groupby("condition")}
    told = by["in_context"][by["in_context"].index.get_level_values("kind") == "edit"]
    assert (by["edited"].reindex(told.index) == told).all()
    always = by["unedited"][by["unedited"].index.get_level_values("kind").isin(["prior", "unknown"])]
    assert (by["edited"].reindex(always.index).dropna() == always).all()
    assert (by["placebo"] == by["unedited"].reindex(by["placebo"].index)).all()
    assert (rows.relative_norm.dropna() == 0).all()
    # Another run takes what the unedited model said from the cache: what was told is not in it.
    again, _ = run(tmp_path / "again", *how)
    assert same(again, done)
    # Killed at the third edit of the first sequence, it ends with the same rows.
    real, calls = WeightDelta.save, []

    def killed(self, path, keys=False):
        real(self, path, keys)
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(WeightDelta, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", *how)
    resumed, _ = run(tmp_path / "killed", *how)
    assert len(calls) > 3
    assert same(resumed, done)
