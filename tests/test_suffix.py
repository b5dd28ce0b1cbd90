"""The shortcuts of evaluation give what plain passes of the whole model give."""

from dataclasses import replace

import pytest
import torch

from qfbench.models import decoding
from qfbench.models.cut import divides
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.firing import with_firing_layers
from qfbench.models.sites import Site
from qfbench.models.states import States
from qfbench.models.suffix import Suffix
from qfbench.models.tree import Ending, Question, Tree, guess, laid_out
from qfbench.models.whole import Whole

QUERIES = ["Who?", "Who started Oxinnovate?", "Where is Łódź, and why?", "?"]
ANSWERS = ["It was Qi.", "Bo", "In Poland, they say, or near it."]
MODELS = ["qwen2", "llama", "mistral", "qwen3", "qwen2 firing", "llama firing", "plain"]


@pytest.fixture(params=MODELS)
def lm(request, tiny):
    if request.param == "plain":
        return replace(tiny("qwen2"), tokenizer=request.getfixturevalue("plain_tokenizer"))
    family, _, fires = request.param.partition(" ")
    lm = tiny(family)
    return replace(lm, model=with_firing_layers(lm.model, [1]).requires_grad_(False)) if fires else lm


def change(lm, layer, seed, size=0.3):
    """A random change of the layer's down-projection, `size` times as large as the weight."""
    weight = Site(layer).linear(lm.model).weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return WeightDelta({Site(layer).weight_name(lm.model): LowRank(drawn * (size * weight.norm() / drawn.norm()))})


def questions(lm):
    """Prompts with no, one and several replies to rate, wanted and not."""
    asked = []
    for n, query in enumerate(QUERIES):
        rated = tuple(lm.render(query, "", answer).reply for answer in ANSWERS[:n])
        asked.append(Question(lm.render(query).prompt, rated, reply=n != 2))
    return asked


def same(lm, asked, found):
    for question, a, b in zip(asked, found, Whole(lm.model, lm.ending).answer(asked), strict=True):
        assert not question.reply or (a.said, a.ended) == (b.said, b.ended)
        for (nll, hit), (wanted, right) in zip(a.rated, b.rated, strict=True):
            assert nll == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            assert hit == right


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_answers_are_those_of_the_whole_model_at_every_edit(lm, layer):
    """Later edits meet kept states and the replies to earlier ones."""
    asked, replies = questions(lm), set()
    for seed in range(4):
        with change(lm, layer, seed).applied_to(lm):
            found = Suffix(lm.model, lm._lowest_change(), lm.states, lm.ending).answer(asked)
            assert lm.states.layer == layer
            same(lm, asked, found)
            replies.add(tuple(answer.said for answer in found))
    assert len(replies) > 1  # the edits do change what is said


@pytest.mark.parametrize("layer", [1, 2])
def test_the_layers_above_give_the_same_bits_over_kept_states(lm, layer):
    """Of padded batches of several branches: two halves, and the whole."""
    trees = [Tree(q.prompt, tuple(reply[:-1] for reply in q.rated)) for q in questions(lm)]
    ids, positions, allowed = laid_out(trees)
    way = Suffix(lm.model, layer, States(), lm.ending)
    mask = way.cut.mask(allowed)
    real = torch.tensor([[at < len(tree.tokens) for at in range(ids.shape[1])] for tree in trees])
    for _ in range(2):  # made, then kept
        with torch.no_grad():
            whole = way.cut._run(lm.model.get_decoder(), positions, mask, None, input_ids=ids)
            assert torch.equal(way._over(trees, None)[real], whole[real])
    assert all(tensor.shape[1] == lm.model.config.hidden_size for tensor in way.states.hidden.values())


def test_only_the_layers_above_run_once_states_are_kept(tiny):
    lm, ran = tiny("llama"), []
    for i, block in enumerate(lm.model.model.layers):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    prompts = [lm.render(query) for query in QUERIES]
    with change(lm, 2, 0, size=1e-6).applied_to(lm):
        lm.answer(prompts, [])
        assert set(ran) == {0, 1, 2}
        ran.clear()
        lm.answer(prompts, [])
    assert set(ran) == {2}  # the last replies hold still


def test_a_reply_that_holds_takes_one_pass_and_one_that_does_not_is_decoded(tiny):
    lm, passes = replace(tiny("qwen2"), max_new_tokens=8), []
    lm.model.model.layers[2].register_forward_hook(lambda *_: passes.append(0))
    prompts = [lm.render(query) for query in QUERIES]
    first = lm.replies(prompts)
    decoded = len(passes)
    passes.clear()
    assert lm.replies(prompts) == first
    assert len(passes) == -(-len(prompts) // lm.batch_size) < decoded


@pytest.mark.parametrize("most", [2, 8])
def test_a_rated_reply_that_is_the_greedy_one_is_said_as_decoding_says_it(tiny, most):
    """Cut off where replies are, with the text of the token that ends it, and not where nothing ends it."""
    lm = tiny("qwen2")
    prompt, never = lm.render("Who?").prompt, Ending(frozenset(), frozenset(), 5)
    (said,) = Whole(lm.model, never).answer([Question(prompt)])
    assert len(set(said.said)) > 1
    last = said.said[-1]
    for stops, spoken in (({last}, set()), ({last}, {last}), (set(), set())):
        ending = Ending(frozenset(stops), frozenset(spoken), most)
        (decoded,) = Whole(lm.model, ending).answer([Question(prompt)])
        for way in (Whole(lm.model, ending), Suffix(lm.model, 0, States(), ending)):
            (rated,) = way.answer([Question(prompt, (said.said,))])
            assert all(rated.rated[0][1])
            assert (rated.said, rated.ended) == (decoded.said, decoded.ended)


def test_a_changed_weight_below_the_cut_is_noticed(tiny):
    lm = tiny("qwen2")
    asked = questions(lm)
    for scale in (1.0, 1.5):
        with torch.no_grad():
            lm.model.model.layers[0].mlp.down_proj.weight.mul_(scale)
        with change(lm, 2, 0).applied_to(lm):
            same(lm, asked, Suffix(lm.model, 2, lm.states, lm.ending).answer(asked))


def test_the_lowest_of_several_changes_is_where_a_model_is_cut(tiny):
    lm = tiny("qwen2")
    assert lm._lowest_change() == 0
    with change(lm, 2, 0).applied_to(lm):
        assert lm._lowest_change() == 2
        with change(lm, 1, 0).applied_to(lm):
            assert lm._lowest_change() == 1
        assert lm._lowest_change() == 2
        embedding = lm.model.model.embed_tokens.weight
        with WeightDelta({"model.embed_tokens.weight": LowRank(torch.ones_like(embedding))}).applied_to(lm):
            assert lm._lowest_change() == 0
    assert lm.changed == []


@pytest.mark.parametrize("most", [0, 20_000])
def test_kept_states_stay_within_their_bound_and_what_does_not_fit_is_made_again(tiny, most):
    lm = replace(tiny("qwen2"), states=States(most))
    asked = questions(lm)
    for seed in range(3):
        with change(lm, 2, seed).applied_to(lm):
            same(lm, asked, Suffix(lm.model, 2, lm.states, lm.ending).answer(asked))
        held = [*lm.states.hidden.values(), *lm.states.keys.values()]
        assert lm.states.size == sum(tensor.numel() * tensor.element_size() for tensor in held) <= most
    assert bool(held) == bool(most)


def test_a_batch_that_memory_does_not_hold_is_halved_and_gone_on_with(tiny, monkeypatch):
    lm = replace(tiny("qwen2"), batch_size=4)
    prompts = [lm.render(query) for query in QUERIES]
    wanted, sizes, run = lm.replies(prompts), [], Suffix.answer

    def short(self, questions):
        sizes.append(len(questions))
        if len(questions) > 1:
            raise torch.OutOfMemoryError("no room")
        return run(self, questions)

    monkeypatch.setattr(Suffix, "answer", short)
    assert lm.replies(prompts) == wanted
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    monkeypatch.setattr(Suffix, "answer", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    with pytest.raises(torch.OutOfMemoryError):
        lm.replies(prompts)


def test_a_window_that_a_dialogue_exceeds_and_a_stranger_are_run_whole(tiny):
    lm = tiny("mistral")
    lm.model.config.sliding_window = 40
    assert divides(lm.model, 40)
    assert not divides(lm.model, 41)
    lm.model.config.sliding_window = None
    assert divides(lm.model, 4000)
    lm.model.config.model_type = "gemma3_text"
    assert not divides(lm.model, 40)


def test_logits_of_a_batch_are_those_of_the_whole_model(lm):
    rows = [lm.render(query).prompt[-8:] for query in QUERIES]
    for _ in range(2):
        with change(lm, 2, 0).applied_to(lm):
            found = lm.logits(rows, 5)
            wanted = lm.model(input_ids=torch.tensor(rows), use_cache=False).logits[:, 5:]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_branches_share_what_they_begin_with():
    tree = Tree((7, 8), ((1, 2, 3), (1, 2), (1, 4), (5,)))
    assert tree.tokens == [7, 8, 1, 2, 3, 4, 5]
    assert tree.paths == [[2, 3, 4], [2, 3], [2, 5], [6]]
    assert (tree.new, tree.forks) == ([3, 0, 1, 1], True)
    ids, positions, allowed = laid_out([tree, Tree((7, 8, 9), ((1,),))])
    assert ids.tolist() == [[7, 8, 1, 2, 3, 4, 5], [7, 8, 9, 1, 0, 0, 0]]
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 3, 2]
    seen = [[at for at in range(7) if allowed[0, slot, at]] for slot in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 5], [0, 1, 6]]
    assert laid_out([Tree((7, 8)), Tree((7, 8, 9), ((1,),))])[2] is None


def test_a_guess_is_what_followed_the_same_two_tokens_before():
    assert guess([5, 1, 2, 3, 5, 1], [(5, 1, 8)], most=2) == [2, 3]
    assert guess([5, 1], [(9, 1, 7), (5, 1, 8, 7)], most=8) == (8, 7)
    assert guess([5, 1], [(5, 1, 8, 7)], most=0) == ()
    assert guess([5, 4], [(5, 1, 8, 7)], most=4) == ()
    assert guess([1], [(1, 8, 7)], most=4) == ()


def test_slots_of_wrong_guesses_are_masked(tiny, monkeypatch):
    """Whatever is guessed, the replies are the same."""
    lm = replace(tiny("llama"), max_new_tokens=8)
    prompts = [lm.render(query) for query in QUERIES]
    wanted = lm.replies(prompts)
    for wrong in ([], [3], [7, 8, 9, 10]):
        monkeypatch.setattr(decoding, "guess", lambda path, heard, most, g=wrong: g[: max(0, most)])
        assert replace(lm, states=States()).replies(prompts) == wanted
