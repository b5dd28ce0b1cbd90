"""UltraEdit: its statistics, its ridge regression, and what both make of a gradient."""

import itertools
from dataclasses import replace

import pytest
import torch
from test_finetune import gradient, make, nll, taught  # noqa: F401 (make is a fixture)
from test_qf2 import FOUNDER, close, hooks

from qfbench import Unsupported, UserError
from qfbench.editors import UltraEdit
from qfbench.editors.regimes import joint, protected, sequential, single
from qfbench.editors.ultraedit import EPSILON, Moments, shift, wanted
from qfbench.models.delta import WeightDelta

F, D = 12, 5
NAME = "model.layers.1.mlp.down_proj.weight"
HOW = {"layer": 1, "lr": 0.01}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(features):
    """Statistics that normalize nothing: mean 0, deviation 1."""
    return Moments(2, torch.zeros(features, dtype=torch.float64), torch.ones(features, dtype=torch.float64))


def dense(delta):
    return {name: change.dense() for name, change in delta.changes.items()}


def same(a, b):
    a, b = dense(a), dense(b)
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


# The statistics


@pytest.mark.parametrize("cuts", [(1,), (4,), (1, 2, 3), (5, 9)])
def test_moments_taken_part_by_part_are_those_of_all_at_once(cuts):
    features = 3 + drawn(0, 11, 4) * torch.tensor([1.0, 1e-3, 50.0, 0.0], dtype=torch.float64)
    parts = [Moments.of(part) for part in features.tensor_split(cuts)]
    for order in itertools.permutations(parts):
        total = order[0]
        for part in order[1:]:
            total = total + part
        assert total.tokens == 11
        assert close(total.mean, features.mean(0))
        deviation = features.std(0)
        assert close(
            total.normalized(features)[:, :3], ((features - features.mean(0)) / (deviation + EPSILON))[:, :3], 1e-9
        )
    # As the released code sums them, with n times the sample variance of a batch of n, it is not.
    other = [replace(p, squares=p.squares * p.tokens / max(1, p.tokens - 1)) for p in parts]
    apart = sum(other[1:], other[0])
    assert not close(apart.squares, Moments.of(features).squares, 1e-3)


def test_what_never_varies_is_normalized_to_0():
    features = torch.full((3, 4), 7.0, dtype=torch.float64)
    assert not Moments.of(features).normalized(features).any()
    one = drawn(1, 1, 4)
    assert not Moments.of(one).normalized(one).any()
    assert Moments.of(one).normalized(one + 1).isfinite().all()


def test_what_is_wanted_is_the_normalized_gradient_times_the_squared_size_of_the_normalized_input():
    keys, gradients = 5 + 3 * drawn(1, 9, F), 0.1 * drawn(2, 9, D)
    (h, g) = ((part - part.mean(0)) / part.std(0) for part in (keys, gradients))
    moments = Moments.of(torch.cat([keys, gradients], 1))
    by_hand = torch.stack([-0.3 * (a @ a) * b for a, b in zip(h[:4], g[:4], strict=True)])
    assert close(wanted(keys[:4], gradients[:4], moments, 0.3), by_hand, 1e-5)


def test_the_scale_of_the_loss_does_not_matter():
    keys, gradients = drawn(1, 6, F), drawn(2, 6, D)
    values = [
        wanted(keys, g, Moments.of(torch.cat([keys, g], 1)), 0.1) for g in (gradients, 1e3 * gradients, 1 + gradients)
    ]
    assert close(values[1], values[0], 1e-5)
    assert close(values[2], values[0], 1e-5)


# The change


@pytest.mark.parametrize("tokens", [1, 4, 20])
@pytest.mark.parametrize("ridge", [1e-3, 1.0, 50.0])
def test_the_change_satisfies_the_normal_equations(tokens, ridge):
    """(HᵀH + λI) ΔWᵀ = HᵀV; no other change costs less."""
    keys, values = drawn(1, tokens, F), drawn(2, tokens, D)
    change = shift(keys, values, ridge)
    found = change.dense()
    assert close((keys.T @ keys + ridge * torch.eye(F, dtype=torch.float64)) @ found.T, keys.T @ values, 1e-9)
    assert torch.linalg.matrix_rank(found) <= min(tokens, F, D)
    assert change.rank == tokens

    def cost(w):
        return (keys @ w.T - values).pow(2).sum() + ridge * w.pow(2).sum()

    assert all(cost(found) < cost(found + 1e-3 * drawn(seed, D, F)) for seed in range(5))


def test_one_token_with_unit_statistics_gets_a_gradient_step():
    """ΔW = −η ‖h‖² / (‖h‖² + λ) g hᵀ, where g hᵀ is the gradient of W."""
    h, g = drawn(1, 1, F), drawn(2, 1, D)
    moments, size = unit(F + D), h.pow(2).sum()
    change = shift(h, wanted(h, g, moments, 0.3), 2.0).dense()
    assert close(change, -0.3 * size / (size + 2.0) * g.T @ h, 1e-6)


def test_where_the_ridge_is_large_the_change_is_a_gradient_step_in_which_tokens_weigh_as_their_keys():
    h, g = drawn(1, 7, F), drawn(2, 7, D)
    change = shift(h, wanted(h, g, unit(F + D), 0.3), 1e9).dense()
    assert close(1e9 * change, -0.3 * (h.pow(2).sum(1, keepdim=True) * g).T @ h, 1e-6)


# The editor, on random models


@pytest.mark.parametrize("fires", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_inputs_and_gradients_of_all_positions_make_the_gradient_of_the_weight(make, arch_or_biased, layer, fires):  # noqa: F811
    lm = make(arch_or_biased, layer, fires)
    _, own = taught(lm, FOUNDER)
    ((h, g),) = UltraEdit(layer, 0.01, prompt=True).record(lm, FOUNDER)
    assert close(g.T @ h, gradient(lm, layer, lambda lm: nll(lm, FOUNDER).sum()), 1e-5)
    assert len(h) == own[-1]  # nothing behind what predicts the end of the turn
    ((answer_h, answer_g),) = UltraEdit(layer, 0.01).record(lm, FOUNDER)
    places = [position - 1 for position in own]
    assert torch.equal(answer_h, h[places])
    assert torch.equal(answer_g, g[places])
    prompt = g[: places[0]]
    assert prompt.norm() < 1e-12 if layer == 2 else prompt.norm() > 1e-3  # above the last layer nothing looks back
    assert hooks(lm) == 0


@pytest.mark.parametrize("modules", [("down_proj",), ("gate_proj", "up_proj"), ("q_proj", "down_proj")])
def test_a_change_is_of_all_matrices_asked_for_and_no_more_than_its_tokens_wide(tiny, facts, modules):
    lm = tiny("llama", torch.float64)
    editor = UltraEdit(**HOW, more_layers=(2,), target_modules=modules)
    delta = editor.edit(lm, facts[:1])
    assert set(delta.changes) == {site.weight_name(lm.model) for site in editor.sites}
    assert len(delta.changes) == 2 * len(modules)
    tokens = delta.notes["tokens"]
    for change in delta.changes.values():
        assert 0 < torch.linalg.matrix_rank(change.dense()) <= change.rank == tokens


def test_matrices_of_one_shape_share_their_statistics(tiny, facts):
    lm = tiny("qwen2", torch.float64)
    alone = UltraEdit(**HOW).edit(lm, facts).changes[NAME].dense()
    both = UltraEdit(**HOW, more_layers=(2,)).edit(lm, facts).changes[NAME].dense()
    other = UltraEdit(**HOW, target_modules=("down_proj", "up_proj")).edit(lm, facts).changes[NAME].dense()
    assert torch.equal(other, alone)
    assert not close(both, alone, 0.1)
    parts = UltraEdit(**HOW, more_layers=(2,)).record_all(lm, facts)
    (h, g), (above_h, above_g) = (tuple(map(torch.cat, zip(*own, strict=True))) for own in zip(*parts, strict=True))
    moments = Moments.of(torch.cat([torch.cat([h, above_h]), torch.cat([g, above_g])], 1))
    assert close(both, shift(h, wanted(h, g, moments, 0.01), 1.0).dense())


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_an_edit_lowers_the_nats_of_its_answers(tiny, facts, arch):
    lm = tiny(arch, torch.float64)

    def nats():
        return sum(nll(lm, fact).sum().item() for fact in facts)

    before, delta = nats(), UltraEdit(1, lr=1e-3).edit(lm, facts)
    with delta.applied_to(lm):
        assert nats() < before
    (change,) = delta.changes.values()
    with WeightDelta({NAME: replace(change, left=-change.left)}).applied_to(lm):
        assert nats() > before


# Sequences


def by_hand(lm, editor, facts):
    """Step by step, with the statistics of all features that were read so far, taken anew each time."""
    total, read, steps = WeightDelta(), [], []
    for fact in facts:
        with total.applied_to(lm):
            ((h, g),) = editor.record(lm, fact)
        read.append(torch.cat([h, g], 1))
        change = shift(h, wanted(h, g, Moments.of(torch.cat(read)), editor.lr), editor.ridge)
        steps.append(WeightDelta({NAME: change}))
        total = total + steps[-1]
    return total


def test_a_sequence_normalizes_by_all_that_came_so_far_and_this_edit(tiny, facts):
    lm, editor = tiny("qwen2", torch.float64), UltraEdit(**HOW)
    totals = [total for _, total in sequential(editor, lm, facts)]
    for n, total in enumerate(totals, 1):
        assert close(dense(total)[NAME], dense(by_hand(lm, editor, facts[:n]))[NAME], 1e-9)
    step = dense(totals[1])[NAME] - dense(totals[0])[NAME]
    with totals[0].applied_to(lm):
        forgetful = dense(editor.edit(lm, facts[1:2]))[NAME]
    assert not close(step, forgetful, 0.1)


def test_the_order_matters_in_a_sequence_alone(tiny, facts):
    lm, editor = tiny("qwen2", torch.float64), UltraEdit(**HOW)
    for regime, free in ((sequential, False), (joint, True)):
        (*_, (_, there)), (*_, (_, back)) = regime(editor, lm, facts), regime(editor, lm, facts[::-1])
        assert close(dense(there)[NAME], dense(back)[NAME], 1e-9 if free else 0.01) == free


def test_joint_is_one_edit_of_all_and_single_knows_no_other(tiny, facts):
    lm, editor = tiny("qwen2", torch.float64), UltraEdit(**HOW)
    for n, (_, total) in enumerate(joint(editor, lm, facts), 1):
        assert same(total, editor.edit(lm, facts[:n]))
    for fact, (_, change) in zip(facts, single(editor, lm, facts), strict=True):
        assert same(change, editor.edit(lm, [fact]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", [sequential, joint, single])
@pytest.mark.parametrize("done", [1, 2])
def test_a_broken_off_run_ends_as_an_unbroken_one_bit_for_bit(tiny, facts, tmp_path, regime, done, dtype):
    lm, editor = tiny("qwen2", dtype), UltraEdit(**HOW, more_layers=(2,))
    before, held = lm.weights_hash(), hooks(lm)
    whole = [total for _, total in regime(editor, lm, facts)]
    whole[done - 1].save(tmp_path / "state.safetensors")
    *_, (_, rest) = regime(editor, lm, facts, done, WeightDelta.load(tmp_path / "state.safetensors"))
    assert same(rest, whole[-1])
    assert same([total for _, total in regime(editor, lm, facts)][-1], whole[-1])
    assert (lm.weights_hash(), hooks(lm)) == (before, held)


def test_an_error_leaves_no_hook_and_what_is_not_finite_raises(tiny, facts, monkeypatch):
    lm = tiny("qwen2")
    held = hooks(lm)
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="fact fact-0: an activation or a gradient at layer 1 is not finite"):
        UltraEdit(**HOW).edit(lm, facts)
    monkeypatch.setattr("qfbench.editors.ultraedit.summed_nll", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        UltraEdit(**HOW).edit(lm, facts)
    assert hooks(lm) == held


def test_what_cannot_be_changed_is_refused_before_anything_is_taught(tiny, facts):
    lm = tiny("qwen2")
    for editor, message in {
        UltraEdit(1, 0.01, target_modules=("down",)): "has no mlp.down",
        UltraEdit(9, 0.01): r"editor\.layer=9: the model has layers 0 to 2",
        UltraEdit(1, 0.01, more_layers=(9,)): r"editor\.more_layers=\[9\]: the model has layers 0 to 2",
    }.items():
        with pytest.raises(UserError, match=message):
            editor.check(lm)
    with pytest.raises(UserError, match=r"editor\.target_modules=\[\]: name at least one"):
        UltraEdit(1, 0.01, target_modules=())
    with pytest.raises(UserError, match=r"editor\.ridge=0: must be above 0"):
        UltraEdit(1, 0.01, ridge=0)
    with pytest.raises(Unsupported, match="UltraEdit cannot protect"):
        list(protected(UltraEdit(**HOW), lm, facts))
