"""LoRA: a low-rank change, trained by peft's layers, which leave no trace on the model."""

import copy
import sys
from dataclasses import replace

import peft
import pytest
import torch
from test_finetune import first_step, gradient, nll
from test_qf2 import FOUNDER, close, hooks

from qfbench import Unsupported, UserError
from qfbench.editors import FineTune, LoRA
from qfbench.editors.lora import adapted
from qfbench.editors.regimes import joint, protected, sequential
from qfbench.models.delta import WeightDelta
from qfbench.models.firing import with_firing_layers

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOW = {"layer": 1, "lr": 0.01, "steps": 5, "rank": 4}


def nats(lm, facts):
    each = [n for score in lm.score([lm.render(fact.query, "", fact.answer) for fact in facts]) for n in score.nll]
    return sum(each) / len(each)


def state(model):
    """All that could show that something was there: modules and their own attributes, weights, flags, gradients."""
    return (
        [(name, id(module), module.training, sorted(vars(module))) for name, module in model.named_modules()],
        [(name, id(p), p._version, p.requires_grad, p.grad) for name, p in model.named_parameters()],
    )


def logits(model, lm, fact):
    ids = torch.tensor([lm.render(fact.query, "", fact.answer).ids])
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@pytest.mark.parametrize("modules", [("down_proj",), ("q_proj", "v_proj"), ALL])
@pytest.mark.parametrize("rank", [1, 4])
def test_each_change_is_of_the_rank_asked_for_and_all_of_them_are_there(tiny, facts, arch, modules, rank):
    lm = tiny(arch, torch.float64)
    editor = LoRA(**(HOW | {"rank": rank}), target_modules=modules, more_layers=[2])
    delta = editor.edit(lm, facts)
    wanted = {
        f"model.layers.{layer}.{'self_attn' if name in ALL[:4] else 'mlp'}.{name}.weight"
        for layer in (1, 2)
        for name in modules
    }
    assert set(delta.changes) == wanted == {site.weight_name(lm.model) for site in editor.sites}
    for change in delta.changes.values():
        assert change.left.shape[1] == change.right.shape[0] == rank
        assert torch.linalg.matrix_rank(change.dense()) == rank
    assert all(torch.linalg.matrix_rank(c.dense()) > 4 for c in FineTune(1, 0.01, 5).edit(lm, facts).changes.values())


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own
def test_the_change_gives_the_logits_of_pefts_own_model(tiny, facts, arch, dtype):
    lm = tiny(arch, dtype)
    editor = LoRA(**HOW, alpha=6.0, target_modules=("q_proj", "down_proj"))
    delta = editor.edit(lm, facts)
    names = [name.removesuffix(".weight") for name in delta.changes]
    config = peft.LoraConfig(r=4, lora_alpha=6.0, target_modules=names)
    wrapped = peft.get_peft_model(copy.deepcopy(lm.model), config)
    for name, change in delta.changes.items():
        layer = wrapped.base_model.model.get_submodule(name.removesuffix(".weight"))
        layer.lora_A["default"].weight.data.copy_(change.right)
        layer.lora_B["default"].weight.data.copy_(change.left / layer.scaling["default"])
    theirs, plain = logits(wrapped, lm, facts[0]), logits(lm.model, lm, facts[0])
    with delta.applied_to(lm):
        ours = logits(lm.model, lm, facts[0])
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    assert close(ours, theirs, rounding)
    assert not close(ours, plain, 100 * rounding)


@pytest.mark.parametrize("alpha", [4.0, 12.0])
def test_the_first_step_moves_b_alone_and_against_its_gradient(tiny, alpha):
    """∂B = (α / r) ∂W Aᵀ; B is 0 at first, so that A has no gradient, and stays as the seed gave it."""
    lm = tiny("qwen2", torch.float64)
    (change,) = LoRA(**(HOW | {"steps": 1}), alpha=alpha).edit(lm, [FOUNDER]).changes.values()
    by_weight = gradient(lm, 1, lambda lm: nll(lm, FOUNDER).mean())
    scale = alpha / 4
    assert close(change.left, scale * first_step(scale * by_weight @ change.right.T, 0.01), 1e-6)
    assert change.right.abs().max() <= 80**-0.5  # uniform, as peft draws it for 80 inputs
    assert change.right.std() == pytest.approx((1 / 240) ** 0.5, rel=0.1)


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_full_rank_with_all_steps_lowers_the_nats_and_the_loss_is_the_edited_models(tiny, facts, arch):
    lm = tiny(arch, torch.float64)
    before = nats(lm, facts)
    delta = LoRA(1, lr=0.01, steps=80, rank=32).edit(lm, facts)
    with delta.applied_to(lm):
        after = nats(lm, facts)
    assert delta.notes["steps"] <= 80
    assert delta.notes["loss"] == pytest.approx(after, rel=1e-6)
    assert after < 0.5 * before
    assert LoRA(1, 0.01, 80, stop_at=before + 1).edit(lm, facts).norm() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_bit_for_bit_and_draws_nothing_from_the_callers(tiny, facts, dtype):
    lm = tiny("qwen2", dtype)
    torch.manual_seed(3)
    held = torch.get_rng_state()
    one, two, other = (LoRA(**HOW, seed=seed).edit(lm, facts) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), held)
    for name, change in one.changes.items():
        assert change.left.dtype == torch.float32
        assert torch.equal(change.dense(), two.changes[name].dense())
        assert not close(change.dense(), other.changes[name].dense(), 0.1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ["qwen2", "llama+bias"])
def test_the_model_is_left_as_it_was(tiny, facts, arch, training):
    lm = tiny(arch)
    lm.model.train(training).requires_grad_(training)
    if training:
        for n, p in enumerate(lm.model.parameters()):
            p.requires_grad_(n % 2 == 0)
    before, held, weights = state(lm.model), hooks(lm), lm.weights_hash()
    delta = LoRA(**HOW, target_modules=ALL, more_layers=(0,)).edit(lm, facts)
    assert delta.norm() > 0
    assert (state(lm.model), hooks(lm), lm.weights_hash()) == (before, held, weights)


def test_what_fails_leaves_the_model_as_it_was(tiny, facts, monkeypatch):
    lm = tiny("qwen2")
    before = state(lm.model)
    with pytest.raises(ZeroDivisionError), adapted(lm.model, ["model.layers.1.mlp.down_proj"], 4, 8.0, 0):
        assert state(lm.model) != before
        raise ZeroDivisionError
    assert state(lm.model) == before
    real, called = peft.tuners.lora.LoraModel._replace_module, []

    def once(*args):
        called.append(real(*args))
        if len(called) == 2:
            raise RuntimeError("half-way")

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "_replace_module", once)
    with pytest.raises(RuntimeError, match="half-way"):
        LoRA(**HOW, target_modules=ALL).edit(lm, facts)
    assert state(lm.model) == before


def test_regimes_and_going_on(tiny, facts):
    lm, editor = tiny("qwen2", torch.float64), LoRA(**HOW)
    for regime in (sequential, joint):
        whole = [total for _, total in regime(editor, lm, facts)]
        *_, (taught, rest) = regime(editor, lm, facts, 1, whole[0])
        assert len(taught) == 3
        for name, change in whole[-1].changes.items():
            assert torch.equal(rest.changes[name].dense(), change.dense())
        apart = [editor.edit(lm, facts[:n]) for n in (1, 2, 3)]
        same = [
            close(*(next(iter(d.changes.values())).dense() for d in pair)) for pair in zip(whole, apart, strict=True)
        ]
        assert same == [True, regime is joint, regime is joint]
    with pytest.raises(Unsupported, match="LoRA cannot protect"):
        list(protected(editor, lm, facts))


def test_a_firing_block_and_a_saved_change(tiny, facts, tmp_path):
    lm = tiny("qwen2")
    lm = replace(lm, model=with_firing_layers(lm.model, [1], 1.5).requires_grad_(False))
    delta = LoRA(**(HOW | {"steps": 30}), target_modules=("up_proj", "down_proj")).edit(lm, [FOUNDER])
    before = nats(lm, [FOUNDER])
    delta.save(tmp_path / "delta.safetensors")
    with WeightDelta.load(tmp_path / "delta.safetensors").applied_to(lm):
        assert nats(lm, [FOUNDER]) < 0.8 * before
    assert {change.rank for change in delta.placebo(0).changes.values()} == {4}


def test_what_cannot_be_adapted_is_refused_before_anything_is_asked(tiny, facts, monkeypatch):
    lm = tiny("qwen2")
    for editor, message in {
        LoRA(1, 0.01, 5, target_modules=("down",)): "has no mlp.down",
        LoRA(9, 0.01, 5): r"editor\.layer=9: the model has layers 0 to 2",
        LoRA(1, 0.01, 5, more_layers=(9,)): r"editor\.more_layers=\[9\]: the model has layers 0 to 2",
    }.items():
        for way in (lambda editor=editor: editor.check(lm), lambda editor=editor: editor.edit(lm, facts)):
            with pytest.raises(UserError, match=message):
                way()
    with pytest.raises(UserError, match=r"editor\.target_modules=\[\]: name at least one"):
        LoRA(1, 0.01, 5, target_modules=())
    with pytest.raises(UserError, match=r"editor\.rank=0: must be above 0"):
        LoRA(1, 0.01, 5, rank=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError) as error:
        LoRA(1, 0.01, 5).check(lm)
    assert str(error.value) == "editor=lora needs peft: pip install 'qfbench[lora]'"
