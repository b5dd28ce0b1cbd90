"""Ours, beyond the paper: a firing block in closed form, and a conversion that keeps what the base model says."""

from dataclasses import replace

import notebook
import pytest
import torch
from hydra.utils import instantiate
from test_contract import composed
from test_qft_layer import PLAIN, REFUSED, TEXTS, fired
from test_qft_train import Killed, bits_differ, prepared, quick, texts, weights

from qfbench import UserError
from qfbench.facts.everyday import abilities, everyday
from qfbench.models.activations import record
from qfbench.models.sites import Site
from qfbench.tasks import texts as data
from qfbench.tasks.convert import batch, convert, divergence, rendered, text_loss, train
from qfbench.tasks.solved import down_proj
from qfbench.world.corpus import Dialogue

LAYER = 2
MANY = [Dialogue("", f"Who is number {n} of {n * 7 % 23}?", f"It is {n * n % 97}.") for n in range(40)]


@pytest.fixture
def deep(tiny):
    return lambda arch="qwen2", dtype=torch.float64: tiny(arch, dtype, num_hidden_layers=4)


def firing(lm):
    return replace(lm, model=fired(lm.model, [LAYER], alpha=0.0))


def apart(base, lm, down, dialogues):
    """Σ ‖D y − o‖² / ‖o‖²."""
    y, o = (
        torch.cat([getattr(read, name) for read in record(of, dialogues, Site(LAYER, "up_proj"))])
        for of, name in ((lm, "key"), (base, "output"))
    )
    return ((y @ down.T - o).norm(dim=1) / o.norm(dim=1)).square().sum()


def test_a_block_that_fires_already_is_found_again(deep, arch):
    base = firing(deep(arch))
    lm = firing(deep(arch))
    down = base.model.model.layers[LAYER].mlp.down_proj.weight
    lm.model.model.layers[LAYER].mlp.down_proj.weight = torch.nn.Parameter(torch.zeros_like(down), requires_grad=False)
    seen = [rendered(base, text) for text in MANY]
    found = down_proj(base, lm, LAYER, [seen[:15], seen[15:]])
    assert apart(base, lm, found, seen) < 1e-9
    assert apart(base, lm, torch.zeros_like(found), seen) > 1


def test_no_other_block_is_nearer_to_the_stock_layer_and_batches_do_not_matter(deep):
    base, lm = deep(), firing(deep())
    seen = [rendered(base, text) for text in (*MANY, *TEXTS)]
    found = down_proj(base, lm, LAYER, [seen])
    assert torch.allclose(found, down_proj(base, lm, LAYER, [seen[:9], seen[9:]]), atol=1e-8)
    least = apart(base, lm, found, seen)
    assert least < 0.5 * apart(base, lm, base.model.model.layers[LAYER].mlp.down_proj.weight, seen)
    for seed in range(5):
        step = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed), dtype=found.dtype)
        for sign in (1e-2, -1e-2):
            assert apart(base, lm, found + sign * step / step.norm(), seen) > least * (1 - 1e-9)


def test_a_conversion_that_is_solved_first_has_no_share_of_the_stock_layer(deep, tmp_path):
    lm = deep(dtype=torch.float32)
    before = weights(lm.model)
    run = prepared(lm, tmp_path)
    converted, _ = train(run, quick(LAYER, solved_on=4, lr=1e-9), lambda step: MANY[step::4], 100)
    assert set(run.rows("convert").alpha) == {0.0}
    nearest = down_proj(lm, firing(lm), LAYER, [[rendered(lm, text) for text in MANY]])
    assert torch.allclose(converted.model.model.layers[LAYER].mlp.down_proj.weight, nearest, atol=1e-4)
    assert bits_differ(before, weights(lm.model)) == set()


def test_the_divergence_of_a_model_from_itself_is_0_and_it_is_that_of_the_learnt_tokens(deep):
    base, lm = deep(), firing(deep())
    ids, targets = batch(base, TEXTS, "text")
    assert divergence(base, base, ids, targets).item() == pytest.approx(0, abs=1e-9)
    stock, now = (of.model(input_ids=ids).logits.float().log_softmax(-1) for of in (base, lm))
    each = (stock.exp() * (stock - now)).sum(-1)[targets != -100]
    assert divergence(base, lm, ids, targets).item() == pytest.approx(each.mean().item(), rel=1e-4)
    assert each.mean() > 0.001


def test_what_is_kept_is_learnt_beside_the_texts(deep, tmp_path):
    def kept(step):
        return [PLAIN, MANY[step % 40]]

    lm = deep(dtype=torch.float32)
    ids, targets = batch(lm, [PLAIN, *MANY], "text")
    ends = {}
    for distill in (0.0, 30.0):
        run = prepared(lm, tmp_path / str(distill))
        conversion = quick(LAYER, distill=distill, steps=30, lr=3e-3)
        converted, _ = train(run, conversion, lambda _: [REFUSED], 100, kept)
        ends[distill] = divergence(lm, converted, ids, targets).item()
    # At the first step the model is the stock one, which is no way from itself.
    assert run.rows("convert").loss.iloc[0] == pytest.approx(
        text_loss(lm, *batch(lm, [REFUSED], "answer")).item(), 1e-5
    )
    assert ends[30.0] < 0.5 * ends[0.0]
    apart = run.rows("convert").divergence
    assert apart.iloc[0] == pytest.approx(0, abs=1e-6)
    assert apart.max() > 1e-3


def test_a_token_whose_output_is_0_is_no_measure_of_nearness(deep):
    base, lm = deep(), firing(deep())
    for p in base.model.parameters():
        p.data = torch.zeros_like(p)
    with pytest.raises(FloatingPointError, match="layer 2: an output is 0"):
        down_proj(base, lm, LAYER, [[rendered(base, text) for text in TEXTS]])


def test_killed_it_goes_on_with_the_same_block(deep, tmp_path):
    def until(step, asked=[]):  # noqa: B006 (counts calls)
        asked.append(step)
        if len(asked) > 9:
            raise Killed
        return texts(step)

    settings = {"solved_on": 4, "distill": 1.0}
    whole, _ = train(prepared(deep(), tmp_path / "whole"), quick(1, **settings), texts, 2, texts)
    broken = prepared(deep(), tmp_path / "broken")
    with pytest.raises(Killed):
        train(broken, quick(1, **settings), until, 2, texts)
    broken.store.flush()
    again, _ = train(prepared(deep(), tmp_path / "broken"), quick(1, **settings), texts, 2, texts)
    assert bits_differ(weights(whole.model), weights(again.model)) == set()


@pytest.mark.parametrize(("name", "value"), [("distill", -1.0), ("solved_on", -1)])
def test_a_setting_out_of_range_is_refused(name, value):
    with pytest.raises(UserError, match=f"^{name}={value}"):
        quick(1, **{name: value})


@pytest.mark.parametrize(("keep", "distill"), [(None, 1.0), (texts, 0.0)])
def test_texts_to_keep_and_their_weight_come_together(deep, tmp_path, keep, distill):
    with pytest.raises(UserError, match="task.convert.keep"):
        convert(prepared(deep(dtype=torch.float32), tmp_path), quick(1, distill=distill), texts, keep)


def test_plain_english_is_told_facts_common_questions_and_sentences_of_one_part():
    drawn = [text for step in range(200) for text in data.everyday(3)(step)]
    assert drawn == [text for step in range(200) for text in data.everyday(3)(step)]
    assert drawn[:3] != data.everyday(3, seed=1)(0)
    told, known, plain = drawn[::3], drawn[1::3], drawn[2::3]
    assert all(isinstance(text, str) for text in plain)
    assert all(text.system for text in told)
    assert not any(text.system for text in known)
    other = everyday(126, part="test")
    asked = {fact.query for fact in other} | {p.query for fact in other for p in fact.probes}
    assert not asked & {text.query for text in (*told, *known)}
    with pytest.raises(UserError, match="batch=0"):
        data.everyday(0)


def test_what_a_converted_model_is_measured_by():
    facts = everyday(6, part="test", locality=0)
    known = [probe for fact in facts for probe in fact.probes if probe.kind == "prior"]
    lm = notebook.Notebook(facts[:3], {known[0].query: (known[0].expected,)}, deaf={facts[0].id})
    shares = abilities(lm, n=6)
    strangers = [probe.query for fact in facts for probe in fact.probes if probe.kind == "unknown"]
    where = sum(query.startswith("Where") for query in strangers)  # to which this model says "North."
    assert shares == {"told": 2 / 6, "known": 1 / len(known), "unknown": 1 - where / len(strangers)}


def test_the_real_conversion_is_composed():
    cfg = composed("experiment=convert_smollm2", "data.path=x.jsonl")
    assert instantiate(cfg.task.convert.keep)(0)
    assert cfg.task.convert.conversion.solved_on > 0
