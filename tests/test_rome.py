"""ROME: constrained least squares, and what all locate-and-edit editors share: contexts, sequences, refusals."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import GEOMETRY

from qfbench import Fact, Unsupported, UserError
from qfbench.editors import MEMIT, ROME, AlphaEdit
from qfbench.editors.locate import looked_up, moments_of
from qfbench.editors.recursive import least
from qfbench.editors.regimes import joint, sequential, single
from qfbench.editors.stays import staying
from qfbench.models.activations import record_many
from qfbench.models.firing import with_firing_layers
from qfbench.models.sites import Site

F, D = 12, 5
QUICK = {"steps": 12, "contexts": 1}
EACH = [
    ROME(1, **QUICK),
    MEMIT(1, **QUICK, more_layers=(0,), penalty=0.5, past=True),
    AlphaEdit(1, **QUICK, more_layers=(0,), threshold=0.3, ridge=0.1),
]


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(seed, rows=40):
    keys = drawn(seed, rows, F)
    return keys.T @ keys / rows


def close(a, b, tolerance=1e-8):
    return (a - b).norm() <= tolerance * b.norm()


@pytest.fixture(scope="session")
def known(facts):
    """The fixture's facts, with their subjects."""
    names = ("Oxinnovate", "Zenvora", "Kelpworks")
    return [replace(fact, subject=name) for fact, name in zip(facts, names, strict=True)]


def exactly(inverse, keys, wanted):
    return least(inverse, keys, wanted, torch.full((len(keys),), torch.inf, dtype=torch.float64))[0].dense()


# The equation


@pytest.mark.parametrize("n", [1, 3])
def test_the_keys_give_the_values_and_no_change_that_does_costs_less(n):
    c, keys, wanted = moment(0), drawn(1, n, F), drawn(2, n, D)
    change = exactly(torch.linalg.inv(c), keys, wanted)
    assert close(keys @ change.T, wanted)

    def cost(delta):
        return torch.trace(delta @ c @ delta.T).item()

    off = torch.eye(F, dtype=torch.float64) - torch.linalg.pinv(keys) @ keys
    for seed in range(5):
        other = change + 0.1 * drawn(10 + seed, D, F) @ off
        assert close(keys @ other.T, wanted)
        assert cost(other) > cost(change)
    smallest = exactly(torch.eye(F, dtype=torch.float64), keys, wanted)
    assert smallest.norm() < change.norm()
    assert cost(smallest) > cost(change)


def test_of_one_fact_it_is_romes_outer_product():
    c, key, wanted = moment(0), drawn(1, F), drawn(2, D)
    right = torch.linalg.solve(c, key)
    assert close(exactly(torch.linalg.inv(c), key[None], wanted[None]), torch.outer(wanted, right) / (key @ right))


@pytest.mark.parametrize("arch", ["qwen2", "llama", "llama+bias"])
def test_written_into_a_model_the_mean_key_gives_the_value(tiny, known, arch):
    lm = tiny(arch, torch.float64)
    editor = ROME(1, keep=known[1:], **QUICK)
    asked, scene = editor._begin(lm, known[:1])
    assert len(scene.contexts) == 1
    assert len(asked[0].dialogues) == 2
    (found,) = editor._values(lm, asked)
    keys, _ = looked_up(lm, asked, *[Site(1)] * 2)
    alone, output = looked_up(lm, [asked[0].alone()], *[Site(1)] * 2)
    assert not close(keys, alone, 1e-3)
    linear = Site(1).linear(lm.model)
    wanted = alone @ linear.weight.T + found.change
    assert close(output[0], found.output)
    delta = editor.edit(lm, known[:1])
    assert close(delta.keys[0].double(), keys, 1e-6)
    with delta.applied_to(lm):
        assert close(keys @ linear.weight.T, wanted)


def test_c_is_of_all_tokens_of_what_the_model_says(tiny, known):
    lm = tiny("qwen2", torch.float64)
    said = staying(lm, known[1:], known[:1])
    sites = [Site(0), Site(2)]
    for site, found in zip(sites, moments_of(lm, said, sites), strict=True):
        keys = torch.cat([one.key for one in record_many(lm, said, [site])[0]])
        assert len(keys) == sum(len(dialogue.ids) for dialogue in said)
        assert close(found, keys.T @ keys / len(keys))
    assert [c.abs().sum().item() for c in moments_of(lm, [], sites)] == [0, 0]


def test_what_is_to_stay_is_moved_less(tiny, known):
    """By the same values, with C of it and without."""
    lm = tiny("qwen2", torch.float64)
    taught, kept = known[:2], known[2:]
    keys = torch.cat([one.key for one in record_many(lm, staying(lm, kept, taught), [Site(1)])[0]])

    def moved(keep):
        editor = ROME(1, keep=keep, contexts=0, steps=5, floor=1e-2)
        change = editor.edit(lm, taught).changes["model.layers.1.mlp.down_proj.weight"].dense()
        return (keys @ change.T).norm()

    assert moved(kept) < 0.7 * moved([])


def nats(lm, facts):
    return [sum(score.nll) for score in lm.score([lm.render(fact.query, "", fact.answer) for fact in facts])]


# All of them


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_it_teaches_and_leaves_the_model_bit_identical(tiny, known, editor, arch):
    lm = tiny(arch)
    before = {name: p.clone() for name, p in lm.model.state_dict().items()}
    editor = replace(editor, keep=known[2:])
    untaught = nats(lm, known[:2])
    delta = editor.edit(lm, known[:2])
    assert set(delta.changes) == {site.weight_name(lm.model) for site in editor.sites}
    with delta.applied_to(lm):
        assert sum(nats(lm, known[:2])) < sum(untaught)
    assert all(torch.equal(p, before[name]) for name, p in lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
@pytest.mark.parametrize("regime", [sequential, joint, single])
def test_a_run_that_goes_on_is_as_an_unbroken_one(tiny, known, editor, regime):
    """With contexts, and with keys that are to stay."""
    lm = tiny("qwen2")
    editor = replace(editor, keep=[Fact("A.", "Where is Qi?", "Here.", subject="Qi")])
    _, scene = editor._begin(lm, known)
    assert scene.contexts
    whole = [delta for _, delta in regime(editor, lm, known)]
    assert len(whole) == 3
    for done in (1, 2):
        rest = [delta for _, delta in regime(editor, lm, known, done, whole[done - 1])]
        for mine, its in zip(rest, whole[done:], strict=True):
            assert all(torch.equal(mine.changes[name].dense(), change.dense()) for name, change in its.changes.items())


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
def test_alone_a_fact_is_taught_as_in_a_sequence_of_one_and_jointly_as_all_at_once(tiny, known, editor):
    lm = tiny("qwen2", torch.float64)
    alone = [delta for _, delta in single(editor, lm, known)]
    for fact, delta in zip(known, alone, strict=True):
        (first,) = (delta for _, delta in sequential(editor, lm, [fact]))
        assert all(close(delta.changes[name].dense(), change.dense(), 1e-6) for name, change in first.changes.items())
    *_, (_, last) = joint(editor, lm, known)
    at_once = editor.edit(lm, known)
    assert all(close(last.changes[name].dense(), change.dense(), 1e-6) for name, change in at_once.changes.items())


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
def test_a_fact_without_a_subject_is_refused_before_anything_is_asked(tiny, known, editor, monkeypatch):
    lm = tiny("qwen2")
    editor = replace(editor, keep=known[2:])
    monkeypatch.setattr(type(lm), "replies", None)
    for subject in ("", "Nobody"):
        bad = [known[0], replace(known[1], subject=subject)]
        for run in (
            editor.edit,
            lambda *given: next(editor.one_by_one(*given)),
            lambda *given: next(editor.joint(*given)),
        ):
            with pytest.raises(UserError, match=r"fact fact-1: the field 'subject' .* names nothing in the query"):
                run(lm, bad)


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
def test_what_is_not_finite_names_the_fact(tiny, known, editor):
    lm = tiny("qwen2")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layer 1, fact fact-0: an activation is not finite"):
        editor.edit(lm, known)


def test_a_loss_that_is_not_finite_names_the_fact(tiny, known):
    lm = tiny("qwen2")
    with torch.no_grad():
        lm.model.model.layers[2].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layer 1, fact fact-0: the loss of its value is not finite"):
        ROME(1).edit(lm, known)


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
def test_a_firing_block_is_taught_as_well(tiny, known, editor):
    lm = tiny("qwen2", torch.float64)
    lm = replace(lm, model=with_firing_layers(lm.model, [1], beta=3.0))
    editor.check(lm)
    before = nats(lm, known[:1])
    with editor.edit(lm, known[:1]).applied_to(lm):
        assert nats(lm, known[:1]) < before


@pytest.mark.parametrize("editor", EACH, ids=lambda editor: type(editor).__name__)
def test_a_model_whose_layer_is_no_w_u_plus_v_and_a_layer_that_is_not_there_are_refused(
    wrap, tiny, tokenizer, known, editor
):
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    lm = wrap(transformers.Gemma2Config(**(GEOMETRY | special)), torch.float64)
    for run in (lambda: editor.check(lm), lambda: editor.edit(lm, known)):
        with pytest.raises(Unsupported):
            run()
    with pytest.raises(UserError, match="the model has layers 0 to 2"):
        replace(editor, layer=9).check(tiny("qwen2"))


def test_contexts_are_different_things_that_the_model_says(tiny, known):
    lm = tiny("qwen2")
    said = Fact("A.", "Where is Qi?", "Here.", subject="Qi")
    _, scene = ROME(1, keep=[*known[1:], said], contexts=2)._begin(lm, known[:1])
    assert len(set(scene.contexts)) == len(scene.contexts) == 2
    assert all(scene.contexts)
    assert ROME(1, keep=known, contexts=0)._begin(lm, known[:1])[1].contexts == ()
