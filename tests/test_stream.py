"""QF as a stream: the theorems of recursive least squares, and what is to stay."""

import weakref

import pytest
import torch
import transformers
from conftest import GEOMETRY

from qfbench import Fact, Unsupported, UserError
from qfbench.editors import QF, QFStream
from qfbench.editors.qf import solve
from qfbench.editors.recursive import Stream
from qfbench.editors.regimes import joint, sequential, single
from qfbench.editors.stays import staying
from qfbench.editors.teach import lesson
from qfbench.models.activations import record
from qfbench.models.sites import Site

F, D = 12, 5


def drawn(seed, facts=6, tokens=3):
    """Random tokens of each fact: keys, what is wanted, and significance."""
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(tokens, F, generator=g, dtype=torch.float64),
            torch.randn(tokens, D, generator=g, dtype=torch.float64),
            torch.rand(tokens, generator=g, dtype=torch.float64) + 0.5,
        )
        for _ in range(facts)
    ]


def moment(seed, rows=40):
    keys = torch.randn(rows, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return keys.T @ keys / rows


def streamed(facts, stay, penalty=2.0, floor=0.1):
    stream = Stream.begin(stay, D, penalty, floor)
    for fact in facts:
        stream.teach(*fact)
    return stream


def at_once(facts, stay, penalty=2.0, floor=0.1):
    """ΔW = B A⁻¹ with A = λ (C + βI) + Σ s k kᵀ and B = Σ s r kᵀ."""
    keys, wanted, weights = (torch.cat(part) for part in zip(*facts, strict=True))
    mean = stay.diagonal().mean().item() or 1.0
    a = penalty * (stay + floor * mean * torch.eye(F, dtype=torch.float64)) + keys.T @ (weights[:, None] * keys)
    return torch.linalg.solve(a, keys.T @ (weights[:, None] * wanted)).T


def close(a, b, tolerance=1e-8):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("stay", [moment(1), torch.zeros(F, F, dtype=torch.float64)])
def test_one_after_another_is_all_at_once_in_any_order(stay):
    facts = drawn(0)
    wanted = at_once(facts, stay)
    assert close(streamed(facts, stay).change, wanted)
    assert close(streamed(facts[::-1], stay).change, wanted)


def test_what_is_taken_out_again_was_never_taught():
    facts, stay = drawn(0), moment(1)
    stream = streamed(facts, stay)
    keys, wanted, weights = facts[2]
    stream.teach(keys, wanted, -weights)
    never = streamed(facts[:2] + facts[3:], stay)
    assert close(stream.change, never.change)
    assert close(stream.inverse, never.inverse)


def test_what_is_taught_again_weighs_the_sum():
    (keys, wanted, weights), *others = facts = drawn(0)
    stream = streamed(facts, moment(1))
    stream.teach(keys, wanted, 2 * weights)
    heavy = streamed([(keys, wanted, 3 * weights), *others], moment(1))
    assert close(stream.change, heavy.change)
    assert close(stream.inverse, heavy.inverse)


def test_without_what_is_to_stay_it_is_qf_with_a_ridge_and_without_a_penalty_qf():
    keys, wanted, weights = (torch.cat(part) for part in zip(*drawn(0, facts=3), strict=True))
    nothing = torch.zeros(F, F, dtype=torch.float64)
    facts = [(keys, wanted, weights)]
    assert close(streamed(facts, nothing, 3.0, 0.2).change, solve(keys, wanted, weights, ridge=0.6).change.dense())
    assert close(streamed(facts, nothing, 1e-9, 1.0).change, solve(keys, wanted, weights).change.dense(), 1e-6)


def test_a_heavier_penalty_leaves_more_as_it_was_and_teaches_less():
    facts, stay = drawn(0), moment(1)
    left, missed = [], []
    for penalty in (0.01, 1.0, 100.0):
        change = streamed(facts, stay, penalty).change
        left.append(torch.trace(change @ stay @ change.T).item())
        missed.append(sum((keys @ change.T - wanted).norm().item() for keys, wanted, _ in facts))
    assert left == sorted(left, reverse=True)
    assert missed == sorted(missed)


def test_a_thousand_facts_need_no_more_memory_than_one_and_do_not_drift():
    facts, stay = drawn(0, facts=1000), moment(1)
    stream = streamed(facts, stay)
    assert (stream.inverse.shape, stream.change.shape) == ((F, F), (D, F))
    assert close(stream.change, at_once(facts, stay), 1e-7)
    assert torch.equal(stream.inverse, stream.inverse.T)


def totals(regime, editor, lm, facts):
    return [{name: change.dense() for name, change in delta.changes.items()} for _, delta in regime(editor, lm, facts)]


@pytest.mark.parametrize(("more", "refresh"), [((), 0), ((0, 2), 0), ((0, 2), 2)])
def test_sequential_is_joint_goes_on_anywhere_and_leaves_the_model_alone(tiny, facts, more, refresh):
    lm = tiny("qwen2", torch.float64)
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    editor = QFStream(1, more, penalty=1.0, refresh=refresh)
    one, other = totals(sequential, editor, lm, facts), totals(joint, editor, lm, facts)
    assert len(one) == len(facts)
    assert len(one[0]) == 1 + len(more)
    for mine, its in zip(one, other, strict=True):
        assert all(close(mine[name], its[name]) for name in its)
    half = list(joint(editor, lm, facts[:2]))[-1][1]
    for regime in (joint, sequential):
        rest = [delta for _, delta in regime(editor, lm, facts, 2, half)]
        assert all(close(rest[-1].changes[name].dense(), other[-1][name]) for name in other[-1])
    assert all(torch.equal(p, before[name]) for name, p in lm.model.state_dict().items())


@pytest.mark.parametrize(("more", "refresh", "free"), [((), 0, 1), ((2,), 0, 1), ((2,), 1, 2)])
def test_the_order_of_facts_does_not_matter_at_the_lowest_layer_nor_above_it_once_all_is_refreshed(
    tiny, facts, more, refresh, free
):
    lm = tiny("llama", torch.float64)
    *facts, kept = facts
    editor = QFStream(1, more, keep=[kept], penalty=1.0, refresh=refresh)
    forth, back = editor.edit(lm, facts), editor.edit(lm, facts[::-1])
    same = [close(forth.changes[name].dense(), back.changes[name].dense()) for name in forth.changes]
    assert same == [True] * free + [False] * (len(same) - free)


def test_a_refreshed_layer_takes_what_is_missing_after_the_changed_ones_below_it(tiny, facts):
    lm = tiny("qwen2", torch.float64)
    editor = QFStream(2, (0,), penalty=1e-9, floor=1.0, refresh=len(facts))
    with editor.edit(lm, facts).applied_to(lm):
        for fact in facts:
            pair = lesson(lm, fact, 0, 0)
            (alone,) = record(lm, [pair.alone], Site(2), [pair.alone_at])
            told = editor_told(tiny("qwen2", torch.float64), pair, Site(2))
            assert close(alone.output, told, 1e-4)


def editor_told(lm, pair, site):
    return record(lm, [pair.told], site, [pair.told_at])[0].output


@pytest.mark.parametrize("arch", ["qwen2", "llama+bias"])
def test_with_next_to_no_penalty_a_fact_alone_is_taught_as_qf_teaches_it(tiny, facts, arch):
    lm = tiny(arch, torch.float64)
    qf = totals(single, QF(1, opener=0, closer=0), lm, facts)
    stream = QFStream(1, penalty=1e-9, floor=1.0)
    for fact, wanted in zip(facts, qf, strict=True):
        assert close(
            stream.edit(lm, [fact]).changes["model.layers.1.mlp.down_proj.weight"].dense(), *wanted.values(), 1e-4
        )


def test_what_is_to_stay_is_changed_less_where_it_is_given(tiny, facts):
    lm = tiny("qwen2", torch.float64)
    *taught, kept = facts
    dialogue = lm.render(kept.query)
    first = lm.logits([dialogue.ids], len(dialogue.ids) - 1)

    def moved(editor):
        with editor.edit(lm, taught).applied_to(lm):
            return (lm.logits([dialogue.ids], len(dialogue.ids) - 1) - first).norm().item()

    assert moved(QFStream(1, keep=[kept], penalty=10.0, floor=0.01)) < 0.5 * moved(
        QFStream(1, penalty=10.0, floor=0.01)
    )


def test_what_the_facts_are_asked_is_not_kept(tiny, facts):
    lm = tiny("qwen2")
    asked = {tuple(d.ids[: d.answer]) for d in staying(lm, facts, facts[:1])}
    assert tuple(lm.render(facts[0].query).ids) not in asked
    assert tuple(lm.render(facts[1].query).ids) in asked
    assert staying(lm, facts[:1], facts[:1]) == []


def test_a_fact_that_surprises_nowhere_is_refused(tiny):
    fact = Fact("Qi started it.", "Who?", "Qi.", id="dull")
    with pytest.raises(UserError, match=r"fact dull: editor.surprise=1000000.0 leaves no token to teach"):
        QFStream(1, surprise=1e6).edit(tiny("qwen2"), [fact])


@pytest.mark.parametrize("family", ["Gemma2", "Olmo2", "Cohere", "Granite", "Glm4"])
def test_a_model_whose_layer_is_no_w_u_plus_v_is_refused(wrap, tokenizer, facts, family):
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    changes = {"residual_multiplier": 0.5} if family == "Granite" else {}
    lm = wrap(getattr(transformers, f"{family}Config")(**(GEOMETRY | special | changes)), torch.float64)
    editor = QFStream(1, (0,))
    with pytest.raises(Unsupported):
        editor.check(lm)
    with pytest.raises(Unsupported):
        editor.edit(lm, facts[:1])


def test_what_is_not_finite_is_named_by_layer_and_fact(tiny, facts):
    lm = tiny("qwen2")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=f"layer 1, fact {facts[0].id}: an activation is not finite"):
        QFStream(1).edit(lm, facts)


def test_a_further_layer_that_is_not_there_is_named_by_its_own_setting(tiny):
    with pytest.raises(UserError, match=r"editor.more_layers=\[0, 7\]: the model has layers 0 to 2"):
        QFStream(1, (0, 7)).check(tiny("qwen2"))


@pytest.mark.parametrize(("more", "refresh", "held"), [((), 2, 1), ((0,), 0, 1), ((0,), 2, 3)])
def test_earlier_facts_are_held_only_where_they_are_to_be_solved_anew(tiny, facts, monkeypatch, more, refresh, held):
    seen = []

    def told(self, lm, said):
        for taught in real(self, lm, said):
            seen.append(weakref.ref(taught))
            yield taught

    real = QFStream._told
    monkeypatch.setattr(QFStream, "_told", told)
    alive = []
    for _ in joint(QFStream(1, more, penalty=1.0, refresh=refresh), tiny("qwen2"), facts[:3]):
        alive.append(sum(one() is not None for one in seen))
    assert alive[-1] == held
