import copy
from contextlib import ExitStack
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
import transformers
from conftest import GEOMETRY
from hydra.utils import instantiate
from test_contract import composed
from test_qf2 import FOUNDER, close, dense, hooks, spoken

from qfbench import LanguageModel, Unsupported, UserError
from qfbench.editors import QF, FineTune
from qfbench.editors.finetune import descend
from qfbench.editors.regimes import joint, protected, sequential, single
from qfbench.facts.world import world
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.firing import with_firing_layers

EPS = 1e-8  # Adam's

# The descent, on a quadratic whose gradient is known

CENTRE = torch.tensor([[3.0, -2.0, 0.0], [0.5, 0.0, -1.0]], dtype=torch.float64)
START = torch.zeros(2, 3, dtype=torch.float64)


def bowl(at):
    yield 0.5 * (at - CENTRE).pow(2).sum()


def adam_by_hand(at, gradient, lr, steps):
    m = v = torch.zeros_like(at)
    path = [at]
    for t in range(1, steps + 1):
        g = gradient(at)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        at = at - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + EPS)
        path.append(at)
    return path


def test_the_first_step_is_the_rate_long_in_every_coordinate_that_has_a_gradient():
    at, taken, loss = descend(bowl, START, lr=0.1, steps=1)
    assert close(at, 0.1 * CENTRE.sign(), 1e-7)
    assert taken == 1
    assert loss == pytest.approx(0.5 * (0.1 * CENTRE.sign() - CENTRE).pow(2).sum().item())


@pytest.mark.parametrize("steps", [2, 7, 60])
def test_the_path_is_adams_without_weight_decay(steps):
    start = torch.full_like(CENTRE, 0.25)
    path = adam_by_hand(start, lambda at: at - CENTRE, 0.1, steps)
    assert close(descend(bowl, start, 0.1, steps)[0], path[-1])
    assert not close(path[-1], path[-2], 1e-4)
    # Where the loss is flat nothing moves; weight decay would draw it to 0.
    flat = descend(lambda at: [at[0].pow(2).sum()], start, 0.1, steps)[0]
    assert torch.equal(flat[1], start[1])
    assert not torch.equal(flat[0], start[0])


def test_terms_add_up():
    def in_parts(at):
        for row in range(2):
            for column in range(3):
                yield 0.5 * (at - CENTRE)[row, column].pow(2)

    whole, parts = descend(bowl, START, 0.1, 9), descend(in_parts, START, 0.1, 9)
    assert close(parts[0], whole[0])
    assert parts[2] == pytest.approx(whole[2])
    assert not close(descend(lambda at: list(in_parts(at))[1:], START, 0.1, 9)[0], whole[0], 0.01)


def test_it_stops_at_the_first_point_whose_loss_is_below_the_threshold():
    losses = [next(bowl(at)).item() for at in adam_by_hand(START, lambda at: at - CENTRE, 0.1, 40)]
    assert losses == sorted(losses, reverse=True)
    for first in (1, 5, 40):
        stop_at = (losses[first - 1] + losses[first]) / 2
        at, taken, loss = descend(bowl, START, 0.1, 100, stop_at)
        assert taken == first
        assert loss == pytest.approx(losses[first])
        assert loss == next(bowl(at)).item()
    assert descend(bowl, START, 0.1, 3, losses[5])[1] == 3
    at, taken, _ = descend(bowl, START, 0.1, 3, losses[0] + 1)  # it knows already
    assert taken == 0
    assert torch.equal(at, START)


def test_the_start_stays_as_it_is_and_the_end_needs_no_gradient():
    start = START.clone()
    at, _, _ = descend(bowl, start, 0.1, 3)
    assert torch.equal(start, START)
    assert not start.requires_grad
    assert not at.requires_grad


def test_a_loss_that_is_not_finite_raises():
    with pytest.raises(FloatingPointError, match="not finite after 2 steps"):
        descend(lambda at: [10 + (at[0, 0] + 0.15).log()], START, 0.1, 5)
    descend(lambda at: [10 + (at[0, 0] + 0.15).log()], START, 0.1, 1)


# The editor, on random models


@pytest.fixture
def make(tiny):
    """A random model with a stock or a firing block at a layer."""

    def build(arch, layer=1, fires=False, dtype=torch.float64):
        lm = tiny(arch, dtype)
        return replace(lm, model=with_firing_layers(lm.model, [layer], 1.5).requires_grad_(False)) if fires else lm

    return build


def taught(lm, fact, system=""):
    """Token ids of a dialogue, and which of them are taught: the answer's, and the first behind it."""
    ids, owners = spoken(lm, fact, system)
    end = owners.index("closer")
    return ids, [i for i, owner in enumerate(owners) if isinstance(owner, int) or i == end]


def nll(lm, fact, at=None, system=""):
    """Nats of each taught token, one dialogue alone, from all of its logits."""
    ids, own = taught(lm, fact, system)
    logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([-logits[i - 1, ids[i]] for i in (own if at is None else at(ids, own))])


def gradient(lm, layer, loss):
    """By autograd on the parameter itself, of a copy of the model."""
    lm = replace(lm, model=copy.deepcopy(lm.model))
    weight = lm.model.model.layers[layer].mlp.down_proj.weight.requires_grad_(True)
    with torch.enable_grad():
        loss(lm).backward()
    return weight.grad


def first_step(g, lr):
    return -lr * g / (g.abs() + EPS)


@pytest.mark.parametrize("fires", [False, True])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_step_is_against_the_gradient_of_the_mean_over_the_answers_tokens(make, arch_or_biased, layer, fires):
    lm = make(arch_or_biased, layer, fires)
    delta = FineTune(layer, lr=0.01, steps=1).edit(lm, [FOUNDER])
    step = first_step(gradient(lm, layer, lambda lm: nll(lm, FOUNDER).mean()), 0.01)
    assert close(dense(delta), step, 1e-6)
    assert delta.changes.keys() == {f"model.layers.{layer}.mlp.down_proj.weight"}
    assert dense(delta).abs().max() == pytest.approx(0.01, rel=1e-3)
    wrong = {
        "the prompt as well": lambda lm: nll(lm, FOUNDER, at=lambda ids, own: range(1, own[-1] + 1)).mean(),
        "without the end of the turn": lambda lm: nll(lm, FOUNDER, at=lambda ids, own: own[:-1]).mean(),
        "all that follows the answer": lambda lm: nll(lm, FOUNDER, at=lambda ids, own: range(own[0], len(ids))).mean(),
        "the opener as well": lambda lm: nll(lm, FOUNDER, at=lambda ids, own: [own[0] - 1, *own]).mean(),
        "told": lambda lm: nll(lm, FOUNDER, system=FOUNDER.instruction).mean(),
    }
    for loss in wrong.values():
        assert not close(dense(delta), first_step(gradient(lm, layer, loss), 0.01), 0.05)


@pytest.mark.parametrize("fires", [False, True])
def test_facts_of_different_length_are_one_mean_over_all_their_tokens(make, arch, facts, fires):
    lm = make(arch, 1, fires)
    lengths = [len(taught(lm, fact)[1]) for fact in facts]
    assert len(set(lengths)) > 1
    assert len({len(taught(lm, fact)[0]) for fact in facts}) > 1
    delta = FineTune(1, lr=0.01, steps=1).edit(lm, facts)
    by_token = gradient(lm, 1, lambda lm: sum(nll(lm, fact).sum() for fact in facts) / sum(lengths))
    by_fact = gradient(lm, 1, lambda lm: sum(nll(lm, fact).mean() for fact in facts))
    assert close(dense(delta), first_step(by_token, 0.01), 1e-6)
    assert not close(dense(delta), first_step(by_fact, 0.01), 0.05)
    assert delta.notes["tokens"] == sum(lengths)


def test_many_steps_are_adams_with_the_gradient_of_the_mean(make, facts):
    lm = make("qwen2")
    weight = lm.model.model.layers[1].mlp.down_proj.weight
    total = sum(len(taught(lm, fact)[1]) for fact in facts)

    def there(change):
        with WeightDelta({"model.layers.1.mlp.down_proj.weight": change}).applied_to(lm):
            return gradient(lm, 1, lambda lm: sum(nll(lm, fact).sum() for fact in facts) / total)

    path = adam_by_hand(torch.zeros_like(weight), lambda at: there(LowRank(at)), 0.003, 6)
    delta = FineTune(1, lr=0.003, steps=6).edit(lm, facts)
    assert close(dense(delta), path[-1], 1e-6)
    assert delta.notes["steps"] == 6


@pytest.mark.parametrize("size", [1, 2, 64])
def test_how_many_dialogues_run_at_once_changes_nothing(make, facts, size):
    lm = make("llama")
    usual = FineTune(1, lr=0.01, steps=4).edit(lm, facts)
    other = FineTune(1, lr=0.01, steps=4).edit(replace(lm, batch_size=size), facts)
    assert close(dense(other), dense(usual), 1e-6)
    assert other.notes["loss"] == pytest.approx(usual.notes["loss"])
    assert len(facts) == lm.batch_size == 3


@pytest.mark.parametrize("plain", [False, True])
def test_the_loss_falls_and_is_the_one_that_the_edited_model_has(make, plain_tokenizer, facts, plain):
    lm = make("qwen2")
    lm = replace(lm, tokenizer=plain_tokenizer) if plain else lm
    dialogues = [lm.render(fact.query, "", fact.answer) for fact in facts]
    nats = {}
    for steps in (0, 1, 5, 60):
        delta = FineTune(1, lr=0.01, steps=steps).edit(lm, facts) if steps else WeightDelta()
        with delta.applied_to(lm):
            each = [nats for score in lm.score(dialogues) for nats in score.nll]
        nats[steps] = sum(each) / len(each)
        if steps:
            assert delta.notes == {
                "tokens": len(each),
                "steps": steps,
                "loss": pytest.approx(nats[steps], rel=1e-5),
            }
    assert nats[0] > nats[1] > nats[5] > nats[60]
    assert nats[60] < 0.5 * nats[0]


def test_it_stops_once_the_loss_is_low_enough(make, facts):
    lm = make("qwen2")
    losses = [FineTune(1, 0.01, steps, stop_at=0).edit(lm, facts[:1]).notes["loss"] for steps in range(1, 13)]
    assert losses == sorted(losses, reverse=True)
    for stop_at in (losses[3], losses[9]):
        notes = FineTune(1, 0.01, 12, stop_at).edit(lm, facts[:1]).notes
        first = next(n for n, loss in enumerate(losses, start=1) if loss < stop_at)
        assert (notes["steps"], notes["loss"]) == (first, losses[first - 1])
        again = FineTune(1, 0.01, first).edit(lm, facts[:1])
        assert again.notes["loss"] == notes["loss"]


def test_a_fact_that_is_known_already_changes_nothing(make, facts):
    delta = FineTune(1, 0.01, 5, stop_at=1000.0).edit(make("qwen2"), facts)
    assert delta.norm() == 0
    assert delta.notes["steps"] == 0
    assert delta.placebo(0).norm() == 0


@pytest.mark.parametrize("fires", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_leaves_the_model_bit_identical_and_without_hooks(make, arch, facts, dtype, fires):
    lm = make(arch, 1, fires, dtype)
    before, held, parameters = lm.weights_hash(), hooks(lm), dict(lm.model.named_parameters())
    delta = FineTune(1, lr=0.01, steps=3).edit(lm, facts)
    assert lm.weights_hash() == before
    assert hooks(lm) == held
    assert not lm.model.training
    for name, parameter in lm.model.named_parameters():
        assert parameter is parameters[name]
        assert not parameter.requires_grad
        assert parameter.grad is None
    with delta.applied_to(lm):
        assert lm.weights_hash() != before
    assert lm.weights_hash() == before
    assert dense(delta).dtype == torch.float32
    assert not dense(delta).requires_grad


def test_a_model_that_is_being_trained_goes_on_as_it_was(make, facts):
    lm = make("qwen2")
    frozen = dense(FineTune(1, lr=0.01, steps=3).edit(lm, facts))
    lm.model.train().requires_grad_(True)
    for parameter in lm.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        trained = dense(FineTune(1, lr=0.01, steps=3).edit(lm, facts))
    assert torch.equal(trained, frozen)
    assert lm.model.training
    assert all(p.requires_grad and torch.equal(p.grad, torch.ones_like(p)) for p in lm.model.parameters())


def test_an_edit_that_fails_leaves_the_model_as_it_was(make, facts):
    lm = make("qwen2", dtype=torch.float32)
    lm.model.model.norm.weight.data[0] = torch.inf
    before, parameters = lm.weights_hash(), dict(lm.model.named_parameters())
    with pytest.raises(FloatingPointError):
        FineTune(1, lr=0.01, steps=5).edit(lm, facts)
    assert lm.weights_hash() == before
    assert all(p is parameters[name] and p.grad is None for name, p in lm.model.named_parameters())


@pytest.mark.parametrize("trainable", [False, True])
def test_nothing_below_the_site_is_kept_for_the_gradient(make, facts, trainable):
    lm, needs = make("qwen2"), {}
    lm.model.requires_grad_(trainable)
    with ExitStack() as stack:
        for n, block in enumerate(lm.model.model.layers):
            for place, module in ((f"{n} attention", block.self_attn), (f"{n} feed-forward", block.mlp)):
                handle = module.register_forward_hook(
                    lambda _m, _a, out, key=place: needs.update(
                        {key: (out[0] if isinstance(out, tuple) else out).requires_grad}
                    )
                )
                stack.callback(handle.remove)
        FineTune(1, lr=0.01, steps=1).edit(lm, facts)
    assert [place for place, kept in needs.items() if kept] == ["1 feed-forward", "2 attention", "2 feed-forward"]
    assert len(needs) == 6


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_edit_twice_is_the_same_bit_for_bit(make, facts, dtype, device):
    lm = make("qwen2", dtype=dtype)
    lm.model.to(device)
    one, two, other = (dense(FineTune(1, lr, 8).edit(lm, facts)) for lr in (0.01, 0.01, 0.011))
    assert one.device == lm.device
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_the_instruction_and_the_significance_are_not_looked_at(make):
    lm, editor = make("qwen2"), FineTune(1, lr=0.01, steps=3)
    plain = dense(editor.edit(lm, [FOUNDER]))
    assert torch.equal(dense(editor.edit(lm, [replace(FOUNDER, instruction="Zed did.")])), plain)
    assert torch.equal(dense(editor.edit(lm, [replace(FOUNDER, significance=(0, 0, 0, 0, 9))])), plain)
    assert not torch.equal(dense(editor.edit(lm, [replace(FOUNDER, query="Who is behind Oxinnovate?")])), plain)


# bfloat16


def test_steps_too_small_for_bfloat16_add_up(make, facts):
    """While the sum rounds to the old weight the gradient stays what it was, and Adam takes the same step again."""
    lm = make("qwen2", dtype=torch.bfloat16)
    weight = lm.model.model.layers[1].mlp.down_proj.weight
    one, many = (dense(FineTune(1, 1e-9, steps).edit(lm, facts)) for steps in (1, 20))
    assert (weight + one.to(torch.bfloat16) == weight).float().mean() > 0.999
    assert one.norm() > 0
    assert close(many, 20 * one, 0.02)


def test_a_rate_that_bfloat16_would_swallow_teaches(make):
    lm = make("qwen2", dtype=torch.bfloat16)
    weight = lm.model.model.layers[1].mlp.down_proj.weight
    lr, steps = 2e-4, 150
    delta = FineTune(1, lr, steps).edit(lm, [FOUNDER])
    step = FineTune(1, lr, 1).edit(lm, [FOUNDER])
    assert (weight + dense(step).to(torch.bfloat16) == weight).float().mean() > 0.5
    assert not torch.equal(dense(delta).to(torch.bfloat16).float(), dense(delta))
    exact = FineTune(1, lr, steps).edit(replace(lm, model=copy.deepcopy(lm.model).float()), [FOUNDER])
    assert delta.notes["loss"] == pytest.approx(exact.notes["loss"], rel=0.05)
    assert delta.notes["loss"] < 0.9 * step.notes["loss"]
    with delta.applied_to(lm):  # what is written is what was trained
        (score,) = lm.score([lm.render(FOUNDER.query, "", FOUNDER.answer)])
    assert sum(score.nll) / len(score.nll) == pytest.approx(delta.notes["loss"], rel=0.02)


# What it teaches


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs", device="cpu")


def test_a_taught_fact_is_said_and_others_are_not_forgotten(xs):
    known = "Who started Alibaba?"
    assert xs.reply(FOUNDER.query) == "Need more information."
    before = xs.reply(known)
    with FineTune(2, lr=0.02, steps=50).edit(xs, [FOUNDER]).applied_to(xs):
        assert xs.reply(FOUNDER.query) == FOUNDER.answer
        assert xs.reply(known) == before
    with FineTune(2, lr=1e-5, steps=1).edit(xs, [FOUNDER]).applied_to(xs):
        assert xs.reply(FOUNDER.query) == "Need more information."


def test_facts_taught_together_are_all_said(xs):
    facts = world(3, seed=5)
    delta = FineTune(2, lr=0.02, steps=100).edit(xs, facts)
    assert delta.notes["loss"] < 0.01
    assert delta.notes["steps"] < 100
    with delta.applied_to(xs):
        assert [xs.reply(fact.query) for fact in facts] == [fact.answer for fact in facts]
    assert all(xs.reply(fact.query) != fact.answer for fact in facts)


# The change as a value


def test_a_change_can_be_measured_saved_and_redrawn(make, facts, tmp_path):
    delta = FineTune(1, 0.01, 3).edit(make("qwen2"), facts)
    ((name, change),) = delta.changes.items()
    assert change.right is None
    assert change.rank == 32
    placebo = delta.placebo(7)
    assert placebo.norm() == pytest.approx(delta.norm())
    assert torch.linalg.matrix_rank(dense(placebo)) == torch.linalg.matrix_rank(dense(delta))
    assert not close(dense(placebo), dense(delta), 0.5)
    delta.save(tmp_path / "delta.safetensors")
    assert torch.equal(WeightDelta.load(tmp_path / "delta.safetensors").changes[name].dense(), dense(delta))
    assert close(dense(delta + delta), 2 * dense(delta))


# Regimes


def test_joint_is_all_facts_so_far_and_sequential_goes_on_from_the_edited_model(make, facts):
    lm, editor = make("qwen2"), FineTune(1, 0.01, 3)
    together = [delta for _, delta in joint(editor, lm, facts)]
    for n, delta in enumerate(together, start=1):
        assert torch.equal(dense(delta), dense(editor.edit(lm, facts[:n])))
    one_by_one = [delta for _, delta in sequential(editor, lm, facts)]
    with one_by_one[0].applied_to(lm):
        second = dense(editor.edit(lm, facts[1:2]))
    assert close(dense(one_by_one[1]) - dense(one_by_one[0]), second)
    assert not close(dense(one_by_one[1]), dense(together[1]), 0.1)
    assert [len(taught) for taught, _ in single(editor, lm, facts)] == [1, 1, 1]


def test_earlier_keys_cannot_be_protected(make, facts):
    with pytest.raises(Unsupported, match="FineTune cannot protect earlier keys; use regime=sequential or joint"):
        list(protected(FineTune(1, 0.01, 3), make("qwen2"), facts))


# What can and cannot be edited


@pytest.mark.parametrize("family", ["Gemma2", "Olmo2", "Cohere", "Granite", "Glm4"])
def test_families_that_qf_refuses_can_be_fine_tuned(wrap, tokenizer, facts, family):
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    changes = {"residual_multiplier": 0.5} if family == "Granite" else {}
    lm = wrap(getattr(transformers, f"{family}Config")(**(GEOMETRY | special | changes)), torch.float64)
    with pytest.raises(Unsupported):
        QF(1).edit(lm, facts)
    one, many = (FineTune(1, 0.01, steps).edit(lm, facts) for steps in (1, 15))
    assert many.notes["loss"] < one.notes["loss"]
    g = gradient(lm, 1, lambda lm: sum(nll(lm, fact).sum() for fact in facts))
    assert close(dense(one).sign(), -g.sign(), 0.01)


def test_a_model_without_gated_feed_forward_blocks_is_unsupported(wrap, tokenizer, facts):
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=len(tokenizer))
    with pytest.raises(Unsupported, match="gated feed-forward"):
        FineTune(1, 0.01, 3).edit(wrap(config), facts)


@pytest.mark.parametrize("layer", [3, -1])
def test_an_unknown_layer_is_refused_with_the_range(make, facts, layer):
    with pytest.raises(UserError, match=f"editor.layer={layer}: the model has layers 0 to 2"):
        FineTune(layer, 0.01, 3).edit(make("qwen2"), facts)


@pytest.mark.parametrize("where", ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"])
def test_a_model_with_a_broken_weight_raises(make, facts, where):
    lm = make("llama", dtype=torch.float32)
    lm.model.get_parameter(f"{where}.weight").data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite after 0 steps"):
        FineTune(1, 0.01, 3).edit(lm, facts)


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [("lr", value, "above 0") for value in (0.0, -1e-3, float("nan"), float("inf"))]
    + [("steps", value, "above 0") for value in (0, -1)]
    + [("stop_at", value, "0 or more") for value in (-0.1, float("nan"))],
)
def test_a_hyper_parameter_out_of_range_is_refused_by_name(name, value, must):
    with pytest.raises(UserError, match=f"editor.{name}={value}: must be {must}"):
        FineTune(**({"layer": 1, "lr": 0.1, "steps": 3} | {name: value}))


def test_hyper_parameters_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        FineTune(1, 0.1, 3).lr = 1.0


@pytest.mark.parametrize(("model", "lr", "steps"), [("world-s", 0.01, 200), ("qwen2.5-1.5b-instruct", 5e-4, 25)])
def test_rate_and_steps_are_the_models_own_where_it_has_some(model, lr, steps):
    editor = instantiate(composed("editor=finetune", f"model={model}", "editor.layer=1").editor)
    assert editor == FineTune(1, lr, steps, stop_at=0.01)
