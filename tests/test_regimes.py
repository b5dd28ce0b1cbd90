from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from qfbench import Fact, LanguageModel, Unsupported
from qfbench.editors import QF, QF2, Editor, base
from qfbench.editors.regimes import joint, protected, sequential, single
from qfbench.models.delta import WeightDelta
from qfbench.models.firing import with_firing_layers
from qfbench.models.sites import Site

LAYER = 1
WEIGHT = f"model.layers.{LAYER}.mlp.down_proj.weight"
REGIMES = [single, sequential, joint, protected]


@dataclass(frozen=True)
class Constant(Editor):
    """Teaches nothing, and has no protected form."""

    sites = (Site(LAYER),)

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        return WeightDelta()


@dataclass(frozen=True)
class Breaking(QF):
    """Fails at the second fact, whichever way it is asked."""

    def record_all(self, lm: LanguageModel, facts: Sequence[Fact]):
        if "fact-1" in {fact.id for fact in facts}:
            raise ZeroDivisionError
        return super().record_all(lm, facts)


def dense(delta):
    return delta.changes[WEIGHT].dense()


def distance(a, b):
    return ((dense(a) - dense(b)).norm() / dense(b).norm()).item()


def totals(regime, editor, lm, facts):
    return [delta for _, delta in regime(editor, lm, facts)]


@pytest.mark.parametrize("template_tokens", [0.0, 1.0])
def test_protected_equals_joint(tiny, arch, facts, template_tokens):
    lm, editor = tiny(arch, torch.float64), QF(LAYER, opener=template_tokens, closer=template_tokens)
    step_by_step, together = (totals(regime, editor, lm, facts) for regime in (protected, joint))
    keys = [editor.record(lm, fact).keys for fact in facts]
    assert sum(map(len, keys)) < keys[0].shape[1] == 80
    for a, b in zip(step_by_step, together, strict=True):
        assert distance(a, b) < 1e-8
    assert distance(together[0], together[-1]) > 0.1


def test_sequential_differs_from_joint_from_the_second_fact_on(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    one_by_one, together = (totals(regime, QF(LAYER), lm, facts) for regime in (sequential, joint))
    assert distance(one_by_one[0], together[0]) < 1e-12
    assert distance(one_by_one[1], together[1]) > 0.01
    assert distance(one_by_one[2], together[2]) > 0.01


def test_sequential_is_a_hand_loop_over_permanent_edits(tiny, arch, facts):
    lm, edited = tiny(arch, torch.float64), tiny(arch, torch.float64)
    weight = edited.model.get_parameter(WEIGHT)
    before = weight.clone()
    for fact, total in zip(facts, totals(sequential, QF(LAYER), lm, facts), strict=True):
        weight.data += dense(QF(LAYER).edit(edited, [fact]))
        assert (dense(total) - (weight - before)).norm() < 1e-10 * dense(total).norm()


def test_joint_is_one_edit_of_all_facts_so_far(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    for n, total in enumerate(totals(joint, QF(LAYER), lm, facts), start=1):
        assert distance(total, QF(LAYER).edit(lm, facts[:n])) < 1e-9


def test_single_starts_each_fact_from_the_unedited_model(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    for fact, delta in zip(facts, totals(single, QF(LAYER), lm, facts), strict=True):
        assert distance(delta, QF(LAYER).edit(lm, [fact])) < 1e-9


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_says_which_facts_it_has_taught(tiny, facts, regime):
    taught = [[fact.id for fact in said] for said, _ in regime(QF(LAYER), tiny("qwen2"), facts)]
    ids = [fact.id for fact in facts]
    assert taught == ([[i] for i in ids] if regime is single else [ids[: n + 1] for n in range(len(ids))])
    assert list(regime(QF(LAYER), tiny("qwen2"), [])) == []


def missed(lm, editor, fact, change):
    """How far a change of weights is from what a fact wants of the model as it stands, relative to that."""
    keys, wanted, _ = editor.problem(lm, [editor.record(lm, fact)])
    return ((keys @ change.T - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("regime", [joint, protected])
def test_every_fact_stays_interpolated(tiny, arch, facts, regime):
    lm, editor = tiny(arch, torch.float64), QF(LAYER)
    *_, last = totals(regime, editor, lm, facts)
    assert max(missed(lm, editor, fact, dense(last)) for fact in facts) < 1e-9


def test_sequential_interpolates_the_newest_fact_and_disturbs_the_earlier_ones(tiny, arch, facts):
    lm, editor = tiny(arch, torch.float64), QF(LAYER)
    first, second, last = totals(sequential, editor, lm, facts)
    with second.applied_to(lm):
        assert missed(lm, editor, facts[2], dense(last) - dense(second)) < 1e-9
    with first.applied_to(lm):
        assert missed(lm, editor, facts[1], dense(second) - dense(first)) < 1e-9
        assert missed(lm, editor, facts[1], dense(last) - dense(first)) > 0.01
    assert missed(lm, editor, facts[0], dense(first)) < 1e-9
    assert missed(lm, editor, facts[0], dense(last)) > 0.01


@pytest.mark.parametrize("settings", [{}, {"ridge": 3.0}], ids=["unridged", "ridged"])
def test_a_protected_step_leaves_the_outputs_for_earlier_keys_alone(tiny, arch, facts, settings):
    lm, editor = tiny(arch, torch.float64), QF(LAYER, **settings)
    steps = list(editor.protected(lm, facts))
    for n, fact in enumerate(facts):
        keys = editor.record(lm, fact).keys
        effects = [(keys @ dense(step).T).norm().item() for step in steps]
        assert max(effects[n + 1 :], default=0) < 1e-9 * effects[n]
        assert min(effects[: n + 1]) > 0.01


def test_a_fact_protected_twice_changes_nothing_the_second_time(tiny, arch, facts):
    lm = tiny(arch)
    steps = list(QF(LAYER).protected(lm, [*facts, facts[0], facts[2]]))
    sizes = [step.norm() for step in steps]
    assert min(sizes[:3]) > 0.1
    assert max(sizes[3:]) < 1e-6


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("advances", [0, 1, 2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_unedited_between_steps_and_after_the_last(tiny, facts, regime, advances, dtype):
    lm = tiny("qwen2", dtype)
    before = lm.weights_hash()
    steps = regime(QF(LAYER), lm, facts)
    for _, (_, delta) in zip(range(advances), steps, strict=False):
        assert lm.weights_hash() == before
        with delta.applied_to(lm):
            assert lm.weights_hash() != before
    steps.close()
    assert lm.weights_hash() == before


@pytest.mark.parametrize("regime", REGIMES)
def test_the_model_is_unedited_after_an_editor_has_failed(tiny, facts, regime, monkeypatch):
    monkeypatch.setattr(base, "TOGETHER", 1)
    lm = tiny("qwen2", torch.bfloat16)
    before, steps = lm.weights_hash(), regime(Breaking(LAYER), lm, facts)
    next(steps)
    with pytest.raises(ZeroDivisionError):
        next(steps)
    assert lm.weights_hash() == before


def test_an_editor_without_a_protected_form_says_so(tiny, facts):
    lm = tiny("qwen2")
    assert len(totals(sequential, Constant(), lm, facts)) == 3
    with pytest.raises(Unsupported, match=r"Constant cannot protect.*sequential or joint"):
        next(protected(Constant(), lm, facts))


def counting(editor, monkeypatch):
    """The ids of the facts that are recorded, batch by batch."""
    calls, plain = [], type(editor).record_all
    spy = lambda self, lm, facts: (calls.append([fact.id for fact in facts]), plain(self, lm, facts))[1]  # noqa: E731
    monkeypatch.setattr(type(editor), "record_all", spy)
    return calls


@pytest.mark.parametrize("settings", [{}, {"ridge": 3.0, "opener": 0.0}], ids=["as_released", "ridged"])
def test_joint_is_to_rounding_an_edit_of_all_facts_so_far(tiny, arch, facts, settings):
    lm, editor = tiny(arch, torch.float64), QF(LAYER, **settings)
    at_once = [editor.edit(lm, facts[:n]) for n in (1, 2, 3)]
    for delta, wanted in zip(editor.joint(lm, facts), at_once, strict=True):
        assert distance(delta, wanted) < 1e-9
        assert delta.notes["tokens"] == wanted.notes["tokens"]
    assert distance(at_once[0], at_once[2]) > 0.01


@pytest.mark.parametrize("regime", REGIMES)
def test_facts_are_recorded_once_and_no_more_ahead_than_a_batch(tiny, facts, regime, monkeypatch):
    monkeypatch.setattr(base, "TOGETHER", 2)
    lm, editor = tiny("qwen2"), QF(LAYER)
    calls = counting(editor, monkeypatch)
    batches = [["fact-0", "fact-1"], ["fact-2"]]
    for n, _ in enumerate(regime(editor, lm, facts), start=1):
        assert calls == batches[: 1 + (n > 2)]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("done", [1, 2])
def test_a_regime_that_goes_on_gives_the_same_bit_for_bit(tiny, facts, regime, done, monkeypatch):
    monkeypatch.setattr(base, "TOGETHER", 2)
    lm, editor = tiny("qwen2", torch.bfloat16), QF(LAYER)
    unbroken = totals(regime, editor, lm, facts)
    resumed = [delta for _, delta in regime(editor, lm, facts, done, unbroken[done - 1])]
    assert len(resumed) == len(facts) - done
    for again, delta in zip(resumed, unbroken[done:], strict=True):
        assert torch.equal(dense(again), dense(delta))
    assert not torch.equal(dense(unbroken[0]), dense(unbroken[-1]))


@pytest.mark.parametrize("editor", [QF(LAYER), QF2(LAYER, lr=0.1)], ids=["QF", "QF2"])
def test_facts_recorded_ahead_are_taught_as_if_each_were_recorded_on_the_edited_model(tiny, arch, facts, editor):
    """What is recorded at a layer does not depend on the matrix that is changed there, so that all can be recorded before."""
    lm = tiny(arch, torch.float64)
    lm.model = with_firing_layers(lm.model, [LAYER]).requires_grad_(False)
    name = editor.sites[0].weight_name(lm.model)
    total, alone = WeightDelta(), [editor.edit(lm, [fact]) for fact in facts]
    for fact, unedited, (_, delta) in zip(facts, alone, sequential(editor, lm, facts), strict=True):
        with total.applied_to(lm):
            step = editor.edit(lm, [fact])
        matrices = [each.changes[name].dense() for each in (step, unedited)]
        assert torch.equal(*matrices) == (fact is facts[0])
        total = total + step
        a, b = (each.changes[name].dense() for each in (delta, total))
        assert (a - b).norm() < 1e-9 * b.norm()


def test_an_editor_without_a_joint_form_of_its_own_edits_all_facts_so_far_again(tiny, facts):
    calls = []

    class Listing(Constant):
        def edit(self, lm, facts):
            calls.append([f.id for f in facts])
            return WeightDelta({}, {"facts": float(len(facts))})

    taught = totals(joint, Listing(), tiny("qwen2"), facts)
    ids = [f.id for f in facts]
    assert calls == [ids[:1], ids[:2], ids]
    assert [delta.notes["facts"] for delta in taught] == [1, 2, 3]


def test_an_edit_carries_a_block_of_keys_for_each_fact_and_knows_the_overlap(tiny, facts):
    lm, editor = tiny("qwen2"), QF(LAYER)
    alone = [editor.edit(lm, [fact]).keys for fact in facts]
    assert [len(keys) for keys in alone] == [1, 1, 1]
    for regime in (sequential, joint, protected):
        for n, delta in enumerate(totals(regime, editor, lm, facts), start=1):
            assert len(delta.keys) == n
            for key, (own,) in zip(
                delta.keys, alone, strict=False
            ):  # what is left of them when projected is far from it
                torch.testing.assert_close(key, own, rtol=1e-4, atol=1e-5)
    assert [len(delta.keys) for delta in totals(single, editor, lm, facts)] == [1, 1, 1]
    assert editor.edit(lm, [facts[0], facts[0]]).overlap() == pytest.approx(1, abs=1e-6)
    *_, twice = totals(sequential, editor, lm, [*facts, facts[1]])
    assert twice.overlap() == pytest.approx(1, abs=1e-6)
    answers = QF(LAYER, opener=0.0, closer=0.0).edit(lm, facts[:2])
    assert 0 < answers.overlap() < 1 - 1e-4
