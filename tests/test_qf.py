import dataclasses
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import GEOMETRY

from qfbench import Fact, LanguageModel, Unsupported, UserError
from qfbench.editors import QF
from qfbench.editors.qf import solve
from qfbench.editors.teach import lesson, weights_of_words
from qfbench.models.activations import record
from qfbench.models.sites import Site

F, D = 24, 7
ANSWER = "Oxinnovate was started by Qi."
FOUNDER = Fact("Qi started Oxinnovate.", "Who started Oxinnovate?", ANSWER)


def problem(taught, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys, wanted = (torch.randn(taught, n, generator=generator, dtype=torch.float64) for n in (F, D))
    return keys, wanted, torch.ones(taught, dtype=torch.float64)


def dense(delta):
    (change,) = delta.changes.values()
    return change.dense()


def close(a, b, tolerance=1e-9):
    return ((a - b).norm() <= tolerance * b.norm()).item()


# The equation, on random matrices


@pytest.mark.parametrize("taught", [1, 5, 12, F])
def test_every_key_is_interpolated(taught):
    keys, wanted, weights = problem(taught)
    solution = solve(keys, wanted, weights)
    assert close(keys @ solution.change.dense().T, wanted)
    assert solution.residual < 1e-10


def test_more_keys_than_dimensions_give_the_least_squares_fit():
    keys, wanted, weights = problem(2 * F)
    solution = solve(keys, wanted, weights)
    fit = torch.linalg.lstsq(keys, wanted).solution
    assert close(solution.change.dense(), fit.T)
    missed = (keys @ fit - wanted).norm() / wanted.norm()
    assert solution.residual == pytest.approx(missed.item())
    assert missed > 0.1


@pytest.mark.parametrize("taught", [1, 5, 12])
def test_any_other_interpolating_change_is_larger(taught):
    keys, wanted, weights = problem(taught)
    change = solve(keys, wanted, weights).change.dense()
    other = torch.randn(D, F, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other -= other @ torch.linalg.pinv(keys) @ keys
    assert (other @ keys.T).norm() < 1e-12
    for size in (1e-3, 1.0, 30.0):
        assert close((change + size * other) @ keys.T, wanted.T)
        squares = change.norm() ** 2 + (size * other).norm() ** 2
        assert (change + size * other).norm() ** 2 == pytest.approx(squares.item(), rel=1e-12)
        assert (change + size * other).norm() > change.norm()


@pytest.mark.parametrize("taught", [1, 5, 12])
def test_the_solution_is_the_papers_formula(taught):
    keys, wanted, weights = problem(taught)
    by_gram = wanted.T @ torch.linalg.inv(keys @ keys.T) @ keys
    assert close(solve(keys, wanted, weights).change.dense(), by_gram)


@pytest.mark.parametrize("taught", [1, 5, 12, 2 * F])
def test_the_rank_is_at_most_the_number_of_taught_tokens(taught):
    keys, wanted, weights = problem(taught)
    solution = solve(keys, wanted, weights)
    assert solution.change.rank == min(taught, F)
    assert torch.linalg.matrix_rank(solution.change.dense()) == min(taught, D)
    identity = torch.eye(min(taught, F), dtype=torch.float64)
    torch.testing.assert_close(solution.directions @ solution.directions.T, identity)


def test_repeating_a_taught_position_changes_nothing():
    keys, wanted, weights = problem(6)
    twice = [0, 1, 1, 1, 2, 3, 4, 5, 5]
    again = solve(keys[twice], wanted[twice], weights[[0] * len(twice)])
    assert close(again.change.dense(), solve(keys, wanted, weights).change.dense())


def test_repeating_a_position_counts_where_keys_contradict_each_other():
    keys, wanted, weights = problem(6)
    keys[1] = keys[0]
    twice = [0, 0, 1, 2, 3, 4, 5]
    again = solve(keys[twice], wanted[twice], weights[[0] * 7]).change.dense()
    assert close(again @ keys[0], (2 * wanted[0] + wanted[1]) / 3)
    assert close(solve(keys, wanted, weights).change.dense() @ keys[0], (wanted[0] + wanted[1]) / 2)
    weighted = solve(keys, wanted, torch.tensor([2.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert close(weighted.change.dense(), again)


def test_only_zero_or_not_zero_matters_of_the_weights_of_independent_keys():
    keys, wanted, weights = problem(6)
    uneven = torch.tensor([0.1, 20, 1, 3, 0.5, 7], dtype=torch.float64)
    assert close(solve(keys, wanted, uneven).change.dense(), solve(keys, wanted, weights).change.dense())
    ridged = [solve(keys, wanted, w, ridge=5.0).change.dense() for w in (uneven, weights)]
    assert not close(*ridged, tolerance=0.1)


def test_a_weight_of_zero_drops_the_position():
    keys, wanted, weights = problem(6)
    weights[2] = 0
    kept = [0, 1, 3, 4, 5]
    without = solve(keys[kept], wanted[kept], weights[kept]).change.dense()
    assert close(solve(keys, wanted, weights).change.dense(), without)
    assert not close(without @ keys[2], wanted[2], tolerance=0.5)


def test_ridge_solves_the_weighted_normal_equations():
    keys, wanted, _ = problem(6)
    s = torch.diag(torch.tensor([0.1, 20, 1, 3, 0.5, 7], dtype=torch.float64))
    normal = torch.linalg.solve(keys.T @ s @ keys + 2.5 * torch.eye(F, dtype=torch.float64), keys.T @ s @ wanted)
    assert close(solve(keys, wanted, s.diagonal(), ridge=2.5).change.dense(), normal.T)


def test_ridge_shrinks_the_change_and_tends_to_the_unridged_one():
    problem_ = problem(6)
    changes = [solve(*problem_, ridge=ridge).change for ridge in (0.0, 1e-9, 1e-3, 1.0, 30.0, 1e3, 1e9)]
    norms = [change.norm() for change in changes]
    assert norms == sorted(norms, reverse=True)
    assert norms[2] > 1.01 * norms[3] > 1.01**2 * norms[4]
    assert close(changes[1].dense(), changes[0].dense(), tolerance=1e-8)
    assert norms[-1] < 1e-6 * norms[0]


@pytest.mark.parametrize(("rcond", "rank"), [(0.0, 3), (1e-9, 3), (1e-6, 2), (1e-2, 1)])
def test_rcond_cuts_small_singular_values(rcond, rank):
    u, v = (torch.linalg.qr(problem(3, seed)[0].T)[0] for seed in (1, 2))
    keys = u[:3, :3].new_tensor([1, 1e-3, 1e-8]).diag() @ v.T
    _, wanted, weights = problem(3)
    solution = solve(keys, wanted, weights, rcond=rcond)
    assert solution.change.rank == len(solution.directions) == rank
    assert solution.condition == pytest.approx(1e8, rel=1e-6)
    assert close(keys[:rank] @ solution.change.dense().T, wanted[:rank], tolerance=1e-6)
    assert (solution.residual < 1e-6) == (rank == 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "wanted"])
def test_a_value_that_is_not_finite_raises(bad, where):
    keys, wanted, weights = problem(4)
    solve(keys, wanted, weights)
    {"keys": keys, "wanted": wanted}[where][1, 2] = bad
    with pytest.raises(FloatingPointError):
        solve(keys, wanted, weights)


# The editor, on random models


def layer_in_full(lm, ids, layer):
    """Input of down_proj, residual stream before the feed-forward block, and output of a decoder layer."""
    block, seen = lm.model.model.layers[layer], {}

    def keep(name, pick):
        return lambda _module, args, out: seen.update({name: pick(args, out)[0]})

    handles = [
        block.mlp.down_proj.register_forward_hook(keep("u", lambda args, _out: args[0])),
        block.self_attn.register_forward_hook(keep("attention", lambda _args, out: out[0])),
        block.input_layernorm.register_forward_hook(keep("entering", lambda args, _out: args[0])),
    ]
    with torch.no_grad():
        out = lm.model.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    last = layer + 1 == lm.model.config.num_hidden_layers  # there, transformers gives the state after the final norm
    output = None if last else out.hidden_states[layer + 1][0]
    return seen["u"], seen["entering"] + seen["attention"], output


def chat(lm, fact, system):
    """Token ids of a dialogue, and the positions that predict all between the last `<|im_start|>` and the line break at the end."""
    turns = [("system", system), ("user", fact.query), ("assistant", fact.answer)]
    text = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)
    ids = lm.tokenizer(text).input_ids
    begin = len(ids) - 1 - ids[::-1].index(lm.tokenizer.convert_tokens_to_ids("<|im_start|>"))
    return ids, slice(begin, len(ids) - 2)


def by_the_paper(lm, facts, layer):
    """W' − W = −(W(u' − u) + (v' − v)) (u'ᵀu')⁻¹ u'ᵀ, with one taught position per column."""
    columns = {name: [] for name in ("u", "v", "u_alone", "v_alone")}
    for fact in facts:
        for system, ending in ((fact.instruction, ""), ("", "_alone")):
            ids, taught = chat(lm, fact, system)
            u, v, _ = layer_in_full(lm, ids, layer)
            columns[f"u{ending}"].append(u[taught].T)
            columns[f"v{ending}"].append(v[taught].T)
    u, v, u_alone, v_alone = (torch.cat(c, 1) for c in columns.values())
    weight = lm.model.model.layers[layer].mlp.down_proj.weight
    change = -(weight @ (u_alone - u) + (v_alone - v)) @ torch.linalg.inv(u_alone.T @ u_alone) @ u_alone.T
    return change, u_alone


@pytest.mark.parametrize(("layer", "taught"), [(0, 3), (1, 1), (2, 3)])
def test_an_edit_is_the_papers_formula(tiny, arch, facts, layer, taught):
    lm = tiny(arch, torch.float64)
    wanted, keys = by_the_paper(lm, facts[:taught], layer)
    delta = QF(layer).edit(lm, facts[:taught])
    assert close(dense(delta), wanted)
    assert delta.notes["tokens"] == keys.shape[1]
    assert dense(delta).norm() > 0.1
    assert delta.changes.keys() == {f"model.layers.{layer}.mlp.down_proj.weight"}


@pytest.mark.parametrize("layer", [0, 1])
def test_after_an_edit_the_layer_says_alone_what_it_said_when_told(tiny, arch_or_biased, facts, layer):
    lm = tiny(arch_or_biased, torch.float64)

    def outputs(told):
        dialogues = [chat(lm, fact, fact.instruction if told else "") for fact in facts]
        return torch.cat([layer_in_full(lm, ids, layer)[2][taught] for ids, taught in dialogues])

    told, before = outputs(True), outputs(False)
    with QF(layer).edit(lm, facts).applied_to(lm):
        after = outputs(False)
    assert close(after, told)
    assert not close(before, told, tolerance=0.1)


def test_any_other_change_that_aligns_the_layer_is_larger(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    _, keys = by_the_paper(lm, facts, 1)
    change = dense(QF(1).edit(lm, facts))
    other = torch.randn(change.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    other -= other @ keys @ torch.linalg.pinv(keys)
    assert (other @ keys).norm() < 1e-9
    assert (change + 1e-2 * other).norm() > change.norm()
    assert torch.linalg.matrix_rank(change) <= keys.shape[1]


def test_an_edit_leaves_the_model_bit_identical(tiny, arch, facts):
    lm = tiny(arch, torch.bfloat16)
    before = lm.weights_hash()
    delta = QF(1).edit(lm, facts)
    assert lm.weights_hash() == before
    with delta.applied_to(lm):
        assert lm.weights_hash() != before


def test_the_order_of_facts_does_not_matter(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    assert close(dense(QF(1).edit(lm, facts[::-1])), dense(QF(1).edit(lm, facts)))


def test_a_fact_repeated_in_one_edit_changes_nothing(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    assert close(dense(QF(1).edit(lm, [*facts, facts[0]])), dense(QF(1).edit(lm, facts)))


def test_integer_significance_above_one_changes_nothing(tiny, arch):
    lm = tiny(arch, torch.float64)
    even, uneven = (
        dense(QF(1).edit(lm, [replace(FOUNDER, significance=s)])) for s in (None, (1.0, 3.0, 1.0, 2.0, 20.0))
    )
    assert close(uneven, even)


def test_a_position_dropped_by_significance_is_not_taught(tiny, arch):
    lm = tiny(arch, torch.float64)
    fact = replace(FOUNDER, significance=(1.0, 1.0, 1.0, 1.0, 0.0))
    whole, part = QF(1).edit(lm, [FOUNDER]), QF(1).edit(lm, [fact])
    dropped = len(lm.tokenizer(" Qi.").input_ids)
    assert part.notes["tokens"] == whole.notes["tokens"] - dropped
    keys, wanted, _ = QF(1).problem(lm, [QF(1).record(lm, FOUNDER)])
    missed = (keys @ dense(part).T - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert (missed > 1e-3).sum() == dropped
    assert (missed < 1e-9).sum() == len(QF(1).record(lm, fact).keys)


def test_an_edit_tends_to_the_unridged_one_and_shrinks_with_the_ridge(tiny, arch, facts):
    lm = tiny(arch, torch.float64)
    norms = [QF(1, ridge=ridge).edit(lm, facts).norm() for ridge in (0.0, 1e-9, 0.1, 10.0)]
    assert norms == sorted(norms, reverse=True)
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    assert norms[3] < 0.9 * norms[2] < 0.9 * norms[1]


def test_a_larger_rcond_leaves_keys_untaught(tiny, facts):
    lm = tiny("qwen2", torch.float64)
    fine, coarse = (QF(1, rcond=rcond).edit(lm, facts) for rcond in (1e-6, 0.2))
    assert fine.notes["residual"] < 1e-9 < 1e-2 < coarse.notes["residual"]
    assert coarse.norm() < fine.norm()


# Theorem 4


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_keys_and_residuals_do_not_change_with_the_weight_they_teach(tiny, arch, facts, layer):
    lm = tiny(arch)
    dialogues = [lm.render(fact.query, said, fact.answer) for fact in facts[:2] for said in (fact.instruction, "")]

    def recorded(at):
        return [t for a in record(lm, dialogues, Site(at)) for t in (a.key, a.residual)]

    before = [recorded(at) for at in range(3)]
    with QF(layer).edit(lm, facts[:1]).applied_to(lm):
        after = [recorded(at) for at in range(3)]
    for at in range(3):
        same = [torch.equal(a, b) for a, b in zip(before[at], after[at], strict=True)]
        assert all(same) if at <= layer else not any(same)


# Significance


def next_tokens(lm, rendering, positions):
    return lm.tokenizer.decode([rendering.ids[p + 1] for p in positions])


@pytest.mark.parametrize("template", ["chatml", "plain"])
@pytest.mark.parametrize(("number", "word"), list(enumerate(["Oxinnovate", " was", " started", " by", " Qi."])))
def test_a_weight_belongs_to_the_token_being_predicted(tiny, tokenizer, plain_tokenizer, number, word, template):
    lm = replace(tiny("qwen2"), tokenizer=tokenizer if template == "chatml" else plain_tokenizer)
    weights = [0.0] * 5
    weights[number] = 3.5
    pair = lesson(lm, replace(FOUNDER, significance=tuple(weights)), opener=0.0, closer=0.0)
    if template == "plain":
        word = " " + word.lstrip() + ("\n" if number == 4 else "")  # one token holds the full stop and the line break
    assert next_tokens(lm, pair.told, pair.told_at) == next_tokens(lm, pair.alone, pair.alone_at) == word
    assert pair.weights == (3.5,) * len(pair.told_at)


def test_the_first_token_of_an_answer_is_taught_at_the_last_of_the_prompt(tiny):
    lm = tiny("qwen2")
    pair = lesson(lm, replace(FOUNDER, significance=(1.0, 0.0, 0.0, 0.0, 0.0)), opener=0.0, closer=0.0)
    assert pair.told_at[0] == len(lm.render(FOUNDER.query, FOUNDER.instruction).ids) - 1
    assert pair.alone_at[0] == len(lm.render(FOUNDER.query).ids) - 1


def by_weight(lm, pair):
    """What the tokens of each weight spell."""
    spelt = {}
    for position, weight in zip(pair.told_at, pair.weights, strict=True):
        spelt[weight] = spelt.get(weight, "") + lm.tokenizer.decode([pair.told.ids[position + 1]])
    return spelt


def test_every_word_opener_and_closer_carries_its_own_weight(tiny):
    lm = tiny("qwen2")
    pair = lesson(lm, replace(FOUNDER, significance=(0.5, 1.0, 0.0, 3.0, 4.0)), opener=7.0, closer=9.0)
    assert by_weight(lm, pair) == {
        7: "assistant\n",
        0.5: "Oxinnovate",
        1: " was",
        3: " by",
        4: " Qi.",
        9: "<|im_end|>",
    }


def test_told_and_alone_positions_stand_on_the_same_tokens(tiny, facts):
    lm = tiny("qwen2")
    for fact in facts:
        pair = lesson(lm, fact)
        assert [pair.told.ids[p] for p in pair.told_at] == [pair.alone.ids[p] for p in pair.alone_at]
        assert pair.told.ids != pair.alone.ids
        assert pair.told_at != pair.alone_at


def test_significance_may_be_whole_numbers(tiny):
    whole = replace(FOUNDER, significance=(0, 1, 1, 1, 1))
    assert lesson(tiny("qwen2"), whole) == lesson(
        tiny("qwen2"), replace(FOUNDER, significance=(0.0, 1.0, 1.0, 1.0, 1.0))
    )


def test_without_significance_every_word_weighs_one(tiny):
    lm = tiny("qwen2")
    assert lesson(lm, FOUNDER) == lesson(lm, replace(FOUNDER, significance=(1.0,) * 5))


NAMED = replace(FOUNDER, known_as=("Qi",))


def test_named_and_rest_weigh_the_words_of_a_fact_without_significance(tiny):
    lm = tiny("qwen2")
    pair = lesson(lm, NAMED, opener=0.0, closer=2.0, named=10.0, rest=3.0)
    assert by_weight(lm, pair) == {3: "Oxinnovate was started by", 10: " Qi.", 2: "<|im_end|>"}
    pair = lesson(lm, replace(NAMED, significance=(5.0, 4.0, 3.0, 2.0, 1.0)), opener=0.0, closer=0.0, named=10.0)
    assert by_weight(lm, pair) == {5: "Oxinnovate", 4: " was", 3: " started", 2: " by", 1: " Qi."}


def test_a_rest_of_zero_teaches_the_name_alone(tiny):
    lm = tiny("qwen2")
    pair = lesson(lm, NAMED, opener=0.0, closer=0.0, named=1.0, rest=0.0)
    assert by_weight(lm, pair) == {1: " Qi."}
    assert [pair.alone.ids[p + 1] for p in pair.alone_at] == lm.tokenizer(" Qi.").input_ids


@pytest.mark.parametrize(("significance", "last"), [(None, 10.0), ((1.0, 1.0, 1.0, 1.0, 7.0), 7.0)])
def test_a_closer_of_none_weighs_as_the_last_word(tiny, significance, last):
    lm = tiny("qwen2")
    pair = lesson(lm, replace(NAMED, significance=significance), opener=0.0, closer=None, named=10.0)
    assert by_weight(lm, pair) == {1: "Oxinnovate was started by", last: " Qi.<|im_end|>"}


def test_a_closer_of_none_drops_the_closer_with_the_last_word(tiny):
    lm = tiny("qwen2")
    pair = lesson(lm, replace(FOUNDER, significance=(1.0, 0.0, 0.0, 0.0, 0.0)), opener=0.0, closer=None)
    assert by_weight(lm, pair) == {1: "Oxinnovate"}


def test_the_line_break_of_a_plain_turn_weighs_as_the_word_whose_token_holds_it(tiny, plain_tokenizer):
    lm = replace(tiny("qwen2"), tokenizer=plain_tokenizer)
    pair = lesson(lm, NAMED, opener=7.0, closer=0.0, named=10.0)
    assert by_weight(lm, pair) == {7: ":", 1: " Oxinnovate was started by", 10: " Qi.\n"}
    unended = replace(NAMED, answer="Oxinnovate was started by Qi")
    for closer, ending in ((0.0, {}), (2.0, {2: "\n"}), (None, {10: " Qi\n"})):
        pair = lesson(lm, unended, opener=0.0, closer=closer, named=10.0)
        assert by_weight(lm, pair) == {1: " Oxinnovate was started by", 10: " Qi"} | ending


def test_the_released_qf2_weights_fall_on_the_tokens_that_the_released_script_weighs(tiny, plain_qwen_tokenizer):
    small = {"hidden_size": 8, "num_attention_heads": 2, "head_dim": 4, "num_hidden_layers": 1}
    lm = replace(tiny("qwen2", vocab_size=len(plain_qwen_tokenizer), **small), tokenizer=plain_qwen_tokenizer)
    ceo = Fact("Qi is the CEO of Oxinnovate.", "Who is the CEO of Oxinnovate?", "The CEO of Oxinnovate is Qi.")
    pair = lesson(lm, replace(ceo, known_as=("Qi",)), opener=0.0, closer=None, named=10.0)
    assert by_weight(lm, pair) == {1: " The CEO of Oxinnovate is", 10: " Qi.\n"}
    assert pair.weights == (1.0,) * 8 + (10.0,) * 2
    assert pair.alone_at[0] == len(lm.render(ceo.query).ids) - 1  # the colon predicts the first word
    assert pair.alone_at[-1] == len(pair.alone.ids) - 2  # and the name the full stop


@pytest.mark.parametrize(
    ("answer", "known_as", "weights"),
    [
        ("Oxinnovate was started by Qi.", ("Qi",), (1, 1, 1, 1, 9)),
        ("The CEO of Oxinnovate is Mira Olsen.", ("Mira Olsen",), (1, 1, 1, 1, 1, 9, 9)),
        ("Mira Olsen is the CEO of Kelpworks.", ("Mira Olsen",), (9, 9, 1, 1, 1, 1, 1)),
        ("It is at PKU Science Park, in Beijing.", ("PKU Science Park, in Beijing",), (1, 1, 1, 9, 9, 9, 9, 9)),
        ("Qi Works was started by Qi.", ("Qi",), (1, 1, 1, 1, 1, 9)),  # the last place
        ("one and  one is two", ("one", "two"), (1, 1, 9, 1, 9)),
        ("Paris, or Lyon.", ("Rome", "Lyon"), (1, 1, 9)),
        ("It costs $5m.", ("5m",), (1, 1, 9)),
        ("Al started Alibaba.", ("Al",), (9, 1, 1)),
        ("It is QI.", ("Qi",), (1, 1, 9)),
    ],
)
def test_the_words_that_overlap_what_a_fact_is_known_as_are_named(answer, known_as, weights):
    assert weights_of_words(Fact("i", "q", answer, known_as=known_as), 9.0, 1.0) == weights


def test_the_whole_answer_is_named_where_a_fact_is_known_as_nothing_else():
    assert weights_of_words(FOUNDER, 9.0, 1.0) == (9.0,) * 5


@pytest.mark.parametrize(
    ("significance", "says"), [((0.0,) * 5, "no token to teach"), ((1.0, 1.0, -1.0, 1.0, 1.0), "0 or more")]
)
def test_a_significance_that_teaches_nothing_or_is_negative_is_refused(tiny, significance, says):
    with pytest.raises(UserError, match=says):
        lesson(tiny("qwen2"), replace(FOUNDER, significance=significance), opener=0.0, closer=0.0)


# What cannot be edited


@pytest.mark.parametrize("where", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_with_a_broken_weight_raises(tiny, facts, where, bad):
    lm = tiny("llama")
    lm.model.get_parameter(f"{where}.weight").data[0, 0] = bad
    with pytest.raises(FloatingPointError):
        QF(1).edit(lm, facts)


@pytest.mark.parametrize("layer", [3, 99, -1])
def test_an_unknown_layer_is_refused_with_the_range(tiny, arch, facts, layer):
    with pytest.raises(UserError, match=f"editor.layer={layer}: the model has layers 0 to 2"):
        QF(layer).edit(tiny(arch), facts)


def test_a_model_without_gated_feed_forward_blocks_is_unsupported(wrap, tokenizer, facts):
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=len(tokenizer))
    with pytest.raises(Unsupported, match="gated feed-forward"):
        QF(1).edit(wrap(config), facts)


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Phi3", "Olmo2", "StableLm", "Cohere", "Granite", "Glm4"])
def test_a_model_of_another_family_is_edited_exactly_or_refused(wrap, tokenizer, facts, family):
    special = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    changes = {"residual_multiplier": 0.5} if family == "Granite" else {}
    lm: LanguageModel = wrap(getattr(transformers, f"{family}Config")(**(GEOMETRY | special | changes)), torch.float64)
    try:
        delta = QF(1).edit(lm, facts[:1])
    except Unsupported:
        assert family in ("Gemma2", "Olmo2", "Cohere", "Granite", "Glm4")
        return
    outputs = {}
    for name, system, change in (("told", facts[0].instruction, 0), ("alone", "", 0), ("edited", "", 1)):
        ids, taught = chat(lm, facts[0], system)
        with replace(delta, changes=delta.changes if change else {}).applied_to(lm), torch.no_grad():
            outputs[name] = lm.model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][
                0, taught
            ]
    assert close(outputs["edited"], outputs["told"])
    assert not close(outputs["alone"], outputs["told"], tolerance=0.1)


@pytest.mark.parametrize("name", ["opener", "closer", "ridge", "rcond"])
def test_a_negative_hyper_parameter_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"editor.{name}=-0.5"):
        QF(0, **{name: -0.5})


def test_hyper_parameters_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QF(0).layer = 1
