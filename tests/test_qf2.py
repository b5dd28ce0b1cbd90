from contextlib import ExitStack
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hydra.utils import instantiate
from test_contract import composed

from qfbench import Fact, Unsupported, UserError
from qfbench.editors import QF, QF2
from qfbench.editors.qf2 import hebbian
from qfbench.editors.regimes import joint, protected, sequential, single
from qfbench.models.activations import record
from qfbench.models.firing import with_firing_layers
from qfbench.models.sites import Site

F, D = 24, 7
FOUNDER = Fact(
    "Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi.", id="founder", known_as=("Qi",)
)


def problem(taught, seed=0):
    """What fired when told, the inputs alone, and a weight for each token, none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    fired, inputs = (torch.randn(taught, n, generator=generator, dtype=torch.float64) for n in (F, D))
    return fired.sigmoid(), inputs, torch.rand(taught, generator=generator, dtype=torch.float64) + 0.1


def orthogonal(taught, seed=0):
    """The same with inputs that are orthogonal, and not of one length."""
    fired, inputs, weights = problem(taught, seed)
    lengths = torch.linspace(0.5, 3, taught, dtype=torch.float64)[:, None]
    return fired, lengths * torch.linalg.qr(inputs.T)[0].T, weights


def dense(delta):
    (change,) = delta.changes.values()
    return change.dense()


def close(a, b, tolerance=1e-12):
    return ((a - b).norm() <= tolerance * b.norm()).item()


# The equation, on random matrices


@pytest.mark.parametrize("taught", [1, 3, 12])
def test_the_change_is_the_sum_of_outer_products(taught):
    fired, inputs, weights = problem(taught)
    by_hand = torch.zeros(F, D, dtype=torch.float64)
    for t in range(taught):
        for neuron in range(F):
            by_hand[neuron] += 0.3 * weights[t] * (fired[t, neuron] - 0.5) * inputs[t]
    change = hebbian(fired, inputs, weights, 0.3)
    assert close(change.dense(), by_hand)
    assert not close(hebbian(1 - fired, inputs, weights, 0.3).dense(), by_hand, 0.1)


@pytest.mark.parametrize("taught", [1, 3, 12])
def test_the_rank_is_at_most_the_number_of_taught_tokens(taught):
    change = hebbian(*problem(taught), 1.0)
    assert change.rank == taught
    assert torch.linalg.matrix_rank(change.dense()) == min(taught, D)


def test_only_the_product_of_rate_and_significance_matters():
    fired, inputs, weights = problem(5)
    once = hebbian(fired, inputs, weights, 0.2).dense()
    assert close(hebbian(fired, inputs, weights, 0.6).dense(), 3 * once)
    assert close(hebbian(fired, inputs, 3 * weights, 0.2).dense(), 3 * once)
    assert close(hebbian(fired, inputs, weights / 8, 1.6).dense(), once)
    uneven = weights * torch.tensor([3, 1, 1, 1, 1])
    assert not close(hebbian(fired, inputs, uneven, 0.2).dense(), once, 0.1)


def test_tokens_add_up_one_by_one():
    fired, inputs, weights = problem(6)
    parts = [hebbian(fired[t : t + 1], inputs[t : t + 1], weights[t : t + 1], 0.2).dense() for t in range(6)]
    assert close(hebbian(fired, inputs, weights, 0.2).dense(), sum(parts))


def test_a_weight_of_zero_drops_the_token():
    fired, inputs, weights = problem(5)
    weights[2], kept = 0, [0, 1, 3, 4]
    without = hebbian(fired[kept], inputs[kept], weights[kept], 1.0).dense()
    assert close(hebbian(fired, inputs, weights, 1.0).dense(), without)


def test_a_neuron_at_one_half_stays_as_it_is():
    fired, inputs, weights = problem(5)
    fired[:, 3] = 0.5
    change = hebbian(fired, inputs, weights, 1.0).dense()
    assert (change.norm(dim=1) == 0).nonzero().flatten().tolist() == [3]


def moved(fired, inputs, weights, lr=0.3):
    """How far each neuron's pre-activation moves at each taught input, and to which side it should."""
    change = hebbian(fired, inputs, weights, lr).dense()
    return inputs @ change.T, fired - 0.5, change


@pytest.mark.parametrize("taught", [1, 2, D])
def test_with_orthogonal_inputs_every_neuron_moves_to_its_targets_side(taught):
    fired, inputs, weights = orthogonal(taught)
    moves, sides, _ = moved(fired, inputs, weights)
    assert (moves.sign() == sides.sign()).all()
    assert close(moves, 0.3 * weights[:, None] * sides * inputs.pow(2).sum(1, keepdim=True))


def test_with_inputs_that_overlap_some_neuron_may_move_to_the_wrong_side():
    """Two tokens of nearly one input, of which the heavier wants the neuron off and the lighter wants it on."""
    inputs = torch.tensor([[1.0, 0.0], [0.9, 0.1]], dtype=torch.float64)
    fired, weights = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).double(), torch.tensor([1.0, 5.0]).double()
    moves, sides, _ = moved(fired, inputs, weights)
    wrong = moves.sign() != sides.sign()
    assert wrong.tolist() == [[True, False], [False, False]]
    assert (weights[:, None] * sides * moves).sum() > 0  # but not on the whole


@pytest.mark.parametrize("taught", [1, 3, 12, 3 * D])
@pytest.mark.parametrize("lr", [1e-3, 2.0])
def test_on_the_whole_moves_are_aligned_by_the_squared_norm_over_the_rate(taught, lr):
    fired, inputs, weights = problem(taught, seed=taught)
    moves, sides, change = moved(fired, inputs, weights, lr)
    alignment = (weights[:, None] * sides * moves).sum().item()
    assert alignment == pytest.approx((change.norm() ** 2 / lr).item(), rel=1e-12)
    assert alignment > 0


@pytest.mark.parametrize("taught", [1, 4])
def test_a_steep_block_comes_to_fire_as_it_did_when_told(taught):
    """σ(β (W + ΔW) x') tends to the rounded target as the rate grows, whatever W is."""
    fired, inputs, weights = orthogonal(taught)
    weight = torch.randn(F, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    target, beta = fired.round(), 1000.0
    misses = []
    for lr in (0.0, 1.0, 100.0, 1e4):
        change = hebbian(target, inputs, weights, lr).dense()
        misses.append((torch.sigmoid(beta * inputs @ (weight + change).T) - target).abs().max().item())
    assert misses[0] > 0.99
    assert misses[-1] < 1e-12
    assert misses == sorted(misses, reverse=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_a_value_that_is_not_finite_raises(bad, where):
    given = problem(4)
    hebbian(*given, 1.0)
    given[where][1, 2] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        hebbian(*given, 1.0)


# The editor, on random models with a firing block


BETA = 1.5  # gentle, so that random neurons are not saturated


@pytest.fixture
def firing(tiny):
    def make(arch, layer=1, dtype=torch.float64, beta=BETA, **alpha):
        lm = tiny(arch, dtype)
        return replace(lm, model=with_firing_layers(lm.model, [layer], beta, **alpha).requires_grad_(False))

    return make


def spoken(lm, fact, system):
    """Token ids of a dialogue, and of every token the word of the answer that it belongs to, `opener`, `closer` or None: the
    opener's first token is not taught, nor what follows the end of the turn."""
    parts = [(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{fact.query}<|im_end|>\n", None)]
    parts.append(("<|im_start|>assistant\n", "opener"))
    first, *others = fact.answer.split(" ")
    parts += [(word, n) for n, word in enumerate([first, *(f" {word}" for word in others)])]
    parts.append(("<|im_end|>\n", "closer"))
    ids, owners = [], []
    for text, owner in parts:
        piece = lm.tokenizer(text).input_ids
        ids += piece
        owners += [owner] * len(piece)
    assert ids == lm.tokenizer("".join(text for text, _ in parts)).input_ids
    owners[owners.index("opener")] = owners[-1] = None
    return ids, owners


@torch.no_grad()
def block_at(lm, layer, ids):
    """The input of the block, what its neurons do, the residual stream that enters it, and the layer's output."""
    block, seen = lm.model.model.layers[layer], {}
    with ExitStack() as hooks:
        for name, module, pick in (
            ("x", block.mlp.up_proj, lambda args, out: args[0]),
            ("y", block.mlp.up_proj, lambda args, out: torch.sigmoid(BETA * out)),
            ("attended", block.self_attn, lambda args, out: out[0]),
            ("entering", block.input_layernorm, lambda args, out: args[0]),
            ("output", block, lambda args, out: out),
        ):
            handle = module.register_forward_hook(
                lambda _m, args, out, n=name, p=pick: seen.update({n: p(args, out)[0]})
            )
            hooks.callback(handle.remove)
        lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    return seen["x"], seen["y"], seen["entering"] + seen["attended"], seen["output"]


def by_word(lm, layer, fact):
    """Sum of (y* − ½) x'ᵀ over the tokens of each word; the state that predicts a token counts for that token."""
    told, told_owners = spoken(lm, fact, fact.instruction)
    alone, alone_owners = spoken(lm, fact, "")
    y, x = block_at(lm, layer, told)[1], block_at(lm, layer, alone)[0]
    ends = list(zip(reversed(range(len(told))), reversed(range(len(alone))), strict=False))
    sums = {}
    for at, back in ends[: len(alone) - alone_owners.index("opener")]:
        assert (told[at], told_owners[at]) == (alone[back], alone_owners[back])
        if told_owners[at] is None:
            continue
        sums[told_owners[at]] = sums.get(told_owners[at], 0) + torch.outer(y[at - 1] - 0.5, x[back - 1])
    return sums


def by_hand(sums, lr, weights):
    """Eq. (3)."""
    return lr * sum(weights[owner] * change for owner, change in sums.items())


RELEASED = {"opener": 0, 0: 1, 1: 1, 2: 1, 3: 1, 4: 10, "closer": 10}  # the closer weighs as much as the last word
OWN = {"opener": 2, 0: 0, 1: 0.5, 2: 3, 3: 0, 4: 20, "closer": 7}


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_an_edit_is_the_papers_formula_with_the_released_significance(firing, arch_or_biased, layer):
    lm = firing(arch_or_biased, layer)
    delta = QF2(layer, lr=0.2).edit(lm, [FOUNDER])
    sums = by_word(lm, layer, FOUNDER)
    assert close(dense(delta), by_hand(sums, 0.2, RELEASED))
    assert delta.changes.keys() == {f"model.layers.{layer}.mlp.up_proj.weight"}
    assert dense(delta).shape == lm.model.model.layers[layer].mlp.up_proj.weight.shape
    for other in RELEASED:
        assert not close(dense(delta), by_hand(sums, 0.2, RELEASED | {other: 5}), 1e-3)


def test_significance_of_the_facts_own_and_of_the_template_weigh_the_token_being_predicted(firing, arch):
    lm = firing(arch)
    fact = replace(FOUNDER, significance=(0, 0.5, 3, 0, 20))
    delta = QF2(1, lr=0.2, opener=2.0, closer=7.0).edit(lm, [fact])
    assert close(dense(delta), by_hand(by_word(lm, 1, FOUNDER), 0.2, OWN))
    owners = spoken(lm, fact, "")[1]
    assert delta.notes["tokens"] == len(owners) - sum(owner in (None, 0, 3) for owner in owners)
    shifted = dict(zip(OWN, [0, *list(OWN.values())[:-1]], strict=True))
    assert not close(dense(delta), by_hand(by_word(lm, 1, FOUNDER), 0.2, shifted), 0.1)


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({}, RELEASED),
        ({"named": 4.0, "rest": 0.5}, {"opener": 0} | dict.fromkeys(range(4), 0.5) | {4: 4, "closer": 4}),
        ({"closer": 0.0}, RELEASED | {"closer": 0}),
        ({"opener": 3.0, "closer": 1.0}, RELEASED | {"opener": 3, "closer": 1}),
        ({"named": 1.0, "closer": 0.0}, {"opener": 0} | dict.fromkeys(range(5), 1) | {"closer": 0}),
        ({"rest": 0.0}, {"opener": 0} | dict.fromkeys(range(4), 0) | {4: 10, "closer": 10}),
    ],
)
def test_words_that_name_the_new_object_weigh_more(firing, settings, weights):
    lm = firing("qwen2")
    assert close(dense(QF2(1, lr=0.1, **settings).edit(lm, [FOUNDER])), by_hand(by_word(lm, 1, FOUNDER), 0.1, weights))


@pytest.mark.parametrize(("name", "heavy"), [("Mira Olsen", (5, 6)), ("Olsen", (6,)), ("Olsen Co", (0, 1))])
def test_the_last_place_where_the_name_stands_weighs_more_in_all_its_words(firing, name, heavy):
    lm = firing("qwen2")
    fact = Fact("Mira Olsen leads Olsen Co.", "Who is it?", "Olsen Co is led by Mira Olsen.", known_as=(name,))
    weights = {"opener": 0} | {word: 10 if word in heavy else 1 for word in range(7)}
    weights["closer"] = weights[6]
    assert close(dense(QF2(1, lr=0.1).edit(lm, [fact])), by_hand(by_word(lm, 1, fact), 0.1, weights))


def test_the_edit_is_linear_in_the_rate(firing, facts):
    lm = firing("qwen2")
    assert close(dense(QF2(1, lr=0.6).edit(lm, facts)), 3 * dense(QF2(1, lr=0.2).edit(lm, facts)))


def test_facts_taught_together_are_the_sum_of_each_alone(firing, arch, facts):
    lm = firing(arch)
    editor = QF2(1, lr=0.2)
    apart = [editor.edit(lm, [fact]) for fact in facts]
    together = editor.edit(lm, facts)
    assert close(dense(together), sum(dense(delta) for delta in apart))
    assert close(dense(editor.edit(lm, facts[::-1])), dense(together))
    assert together.notes["tokens"] == sum(delta.notes["tokens"] for delta in apart)
    assert close(dense(editor.edit(lm, [facts[0], facts[0]])), 2 * dense(apart[0]))  # unlike QF's


def test_inputs_of_the_block_do_not_change_with_the_weight_they_teach_but_what_fires_does(firing, arch, facts):
    lm = firing(arch)
    dialogues = [lm.render(fact.query, said, fact.answer) for fact in facts[:2] for said in (fact.instruction, "")]
    before = record(lm, dialogues, Site(1, "up_proj"))
    with QF2(1, lr=0.2).edit(lm, facts).applied_to(lm):
        after = record(lm, dialogues, Site(1, "up_proj"))
        above = record(lm, dialogues, Site(2, "up_proj"))
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old.input, new.input)
        assert torch.equal(old.residual, new.residual)
        assert not torch.equal(old.key, new.key)
    assert not torch.equal(record(lm, dialogues, Site(2, "up_proj"))[0].input, above[0].input)


def test_taught_alone_the_block_fires_more_as_it_did_when_told(firing, arch):
    """One token of one fact, so that nothing interferes; a larger rate comes nearer to the rounded target."""
    lm = firing(arch)
    fact = replace(FOUNDER, significance=(1, 0, 0, 0, 0))
    first = replace(fact, answer="Ox", significance=(1,), known_as=())
    assert QF2(1, lr=1.0, closer=0.0).edit(lm, [first]).notes["tokens"] == 1
    told, owners = spoken(lm, first, first.instruction)
    alone, own = spoken(lm, first, "")
    target = block_at(lm, 1, told)[1][owners.index(0) - 1]
    misses = []
    for lr in (1e-9, 1.0, 100.0):
        with QF2(1, lr=lr, closer=0.0).edit(lm, [first]).applied_to(lm):
            misses.append((block_at(lm, 1, alone)[1][own.index(0) - 1] - target.round()).norm().item())
    assert misses[0] > misses[1] > misses[2]
    assert misses[2] < 0.1 * misses[0]


def hooks(lm):
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in lm.model.modules() for kind in kinds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_leaves_the_model_bit_identical_and_without_hooks(firing, arch, facts, dtype):
    lm = firing(arch, dtype=dtype)
    before, held = lm.weights_hash(), hooks(lm)
    delta = QF2(1, lr=0.2).edit(lm, facts)
    assert lm.weights_hash() == before
    assert hooks(lm) == held
    assert not any(p.requires_grad for p in lm.model.parameters())
    with delta.applied_to(lm):
        assert lm.weights_hash() != before
    assert lm.weights_hash() == before
    assert dense(delta).dtype == torch.float64


def test_the_slope_is_the_blocks_own(firing):
    gentle, steep = (dense(QF2(1, lr=0.2).edit(firing("qwen2", beta=beta), [FOUNDER])) for beta in (0.01, 1e6))
    assert gentle.norm() < 0.1 * steep.norm()


# Regimes


def test_sequential_edits_are_recorded_on_what_the_edits_before_them_left(firing, facts):
    lm, editor = firing("qwen2"), QF2(1, lr=0.2)
    at_once = [dense(delta) for _, delta in joint(editor, lm, facts)]
    one_by_one = [dense(delta) for _, delta in sequential(editor, lm, facts)]
    assert close(at_once[0], one_by_one[0])
    assert not close(at_once[2], one_by_one[2], 1e-3)
    with editor.edit(lm, facts[:1]).applied_to(lm):
        second = dense(editor.edit(lm, facts[1:2]))
    assert close(one_by_one[1] - one_by_one[0], second)
    assert [len(taught) for taught, _ in single(editor, lm, facts)] == [1, 1, 1]


def test_joint_is_to_rounding_an_edit_of_all_facts_so_far(firing, facts):
    lm, editor = firing("qwen2"), QF2(1, lr=0.2)
    at_once = [editor.edit(lm, facts[:n]) for n in (1, 2, 3)]
    edits = [dense(edit) for edit in at_once]
    for done in (0, 2):
        for delta, edit in zip(editor.joint(lm, facts, done), at_once[done:], strict=True):
            assert close(dense(delta), dense(edit), 1e-9)
            assert delta.notes == edit.notes
            assert len(delta.keys) == len(edit.keys)
    with editor.edit(lm, facts[:1]).applied_to(lm):  # where the model is edited, the record is another one
        assert not close(dense(editor.edit(lm, facts[:2])), edits[1], 1e-3)


def test_earlier_keys_cannot_be_protected(firing, facts):
    with pytest.raises(Unsupported, match="QF2 cannot protect earlier keys; use regime=sequential or joint"):
        list(protected(QF2(1, lr=0.2), firing("qwen2"), facts))


# What cannot be edited


def test_a_stock_layer_is_unsupported_and_the_message_says_how_to_convert_it(tiny, firing, arch, facts):
    with pytest.raises(Unsupported, match=r"firing block at layer 1.*experiment=convert"):
        QF2(1, lr=0.2).edit(tiny(arch), facts)
    lm = firing(arch, layer=2)
    with pytest.raises(Unsupported, match=r"firing block at layer 1.*experiment=convert"):
        QF2(1, lr=0.2).edit(lm, facts)
    QF2(2, lr=0.2).edit(lm, facts)


@pytest.mark.parametrize("editor", [QF2(1, lr=0.2), QF(1)])
def test_a_half_converted_layer_is_unsupported(firing, facts, editor):
    for alpha in (0.01, 0.5, 0.999):
        with pytest.raises(Unsupported, match=r"layer 1 is half converted \(α = "):
            editor.edit(firing("qwen2", alpha=alpha), facts)
    editor.edit(firing("qwen2"), facts)


def test_a_layer_that_has_not_begun_to_be_converted_is_a_stock_one(tiny, firing, facts):
    whole = firing("qwen2", alpha=1.0)
    with pytest.raises(Unsupported, match=r"firing block at layer 1"):
        QF2(1, lr=0.2).edit(whole, facts)
    assert close(dense(QF(1).edit(whole, facts)), dense(QF(1).edit(tiny("qwen2", torch.float64), facts)), 1e-9)


@pytest.mark.parametrize("layer", [3, -1])
def test_an_unknown_layer_is_refused_with_the_range(firing, facts, layer):
    with pytest.raises(UserError, match=f"editor.layer={layer}: the model has layers 0 to 2"):
        QF2(layer, lr=0.2).edit(firing("qwen2"), facts)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 0.0), ("lr", -1e-3), ("lr", float("nan"))]
    + [(name, -0.5) for name in ("named", "rest", "opener", "closer")],
)
def test_a_hyper_parameter_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"editor.{name}={value}"):
        QF2(**({"layer": 1, "lr": 0.1} | {name: value}))


def test_hyper_parameters_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        QF2(1, lr=0.1).lr = 1.0


@pytest.mark.parametrize("where", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"])
def test_a_model_with_a_broken_weight_raises(firing, facts, where):
    lm = firing("llama", dtype=torch.float32)
    lm.model.get_parameter(f"{where}.weight").data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError):
        QF2(1, lr=0.2).edit(lm, facts)


def test_a_significance_that_leaves_nothing_to_teach_is_refused(firing):
    with pytest.raises(UserError, match="fact founder: .*no token to teach"):
        QF2(1, lr=0.2).edit(firing("qwen2"), [replace(FOUNDER, significance=(0,) * 5)])


def test_the_configurations_are_the_released_scheme_and_the_answer_alone(firing):
    lm, made = firing("qwen2"), {}
    for name in ("qf2", "qf2_answer_only"):
        editor = instantiate(composed(f"editor={name}", "model=world-xs", "editor.layer=1").editor)
        made[name] = dense(replace(editor, lr=0.2).edit(lm, [FOUNDER]))
        assert editor.lr == 4e-4  # the released rate, where the model's own settings name none
    assert close(made["qf2"], by_hand(by_word(lm, 1, FOUNDER), 0.2, RELEASED))
    plain = {"opener": 0} | dict.fromkeys(range(5), 1) | {"closer": 0}
    assert close(made["qf2_answer_only"], by_hand(by_word(lm, 1, FOUNDER), 0.2, plain))


# QF on a firing block, whose output is W u alone


def at_taught(lm, layer, facts, told):
    """Neurons, residual stream and layer output at all positions that predict the opener, the answer and the closer."""
    parts = []
    for fact in facts:
        ids, owners = spoken(lm, fact, fact.instruction if told else "")
        taught = [i - 1 for i, owner in enumerate(owners) if owner is not None]
        _, y, residual, output = block_at(lm, layer, ids)
        parts.append((y[taught], residual[taught], output[taught]))
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_after_qf_a_firing_layer_says_alone_what_it_said_when_told(firing, arch_or_biased, facts, layer):
    lm = firing(arch_or_biased, layer)
    _, _, told = at_taught(lm, layer, facts, True)
    _, _, before = at_taught(lm, layer, facts, False)
    with QF(layer).edit(lm, facts).applied_to(lm):
        _, _, after = at_taught(lm, layer, facts, False)
    assert close(after, told, 1e-8)
    assert not close(before, told, 0.01)


def test_qf_on_a_firing_block_is_the_least_norm_change_without_the_residual_term(firing, arch, facts):
    lm = firing(arch)
    (u, v, told), (keys, v_alone, alone) = (at_taught(lm, 1, facts, said) for said in (True, False))
    weight = lm.model.model.layers[1].mlp.down_proj.weight
    assert close(told, u @ weight.T)
    wanted = (u - keys) @ weight.T
    delta = QF(1).edit(lm, facts)
    assert close(dense(delta), (torch.linalg.pinv(keys) @ wanted).T, 1e-7)
    assert delta.changes.keys() == {"model.layers.1.mlp.down_proj.weight"}
    assert delta.notes["tokens"] == len(keys)
    assert torch.linalg.matrix_rank(dense(delta)) <= len(keys) < min(80, 3 * 32)
    with_residual = (torch.linalg.pinv(keys) @ (wanted + v - v_alone)).T
    missed = keys @ (weight + with_residual).T - told
    assert missed.norm() > 0.1 * (told - alone).norm()


def test_any_other_change_that_aligns_a_firing_layer_is_larger(firing, facts):
    lm = firing("qwen2")
    keys = at_taught(lm, 1, facts[:1], False)[0]
    change = dense(QF(1).edit(lm, facts[:1]))
    other = torch.randn(change.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other -= other @ torch.linalg.pinv(keys) @ keys
    assert (other @ keys.T).norm() < 1e-9
    assert (change + 1e-2 * other).norm() > change.norm()
    assert torch.linalg.matrix_rank(change) <= len(keys)


def test_qf_protects_on_a_firing_block_as_it_does_on_a_stock_one(firing, facts):
    lm = firing("qwen2")
    streamed = [delta for _, delta in protected(QF(1), lm, facts)]
    assert close(dense(streamed[-1]), dense(QF(1).edit(lm, facts)), 1e-6)


def test_an_edit_of_several_facts_carries_a_block_of_keys_for_each(firing, facts):
    lm, editor = firing("qwen2"), QF2(1, lr=0.2)
    together, alone = editor.edit(lm, facts), [editor.edit(lm, [fact]) for fact in facts]
    assert len(together.keys) == len(facts) == 3
    for key, own in zip(together.keys, alone, strict=True):
        assert torch.equal(key, own.keys[0])
        assert len(key) == own.notes["tokens"]
    assert editor.edit(lm, [facts[0], facts[1], facts[0]]).overlap() == pytest.approx(1, abs=1e-6)
    assert 0 < editor.edit(lm, facts[:2]).overlap() < 1 - 1e-4
