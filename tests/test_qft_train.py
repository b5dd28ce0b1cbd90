"""The conversion: its settings, what is learnt, and the training."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from rich.console import Console
from test_qft_layer import FOUNDER, PLAIN, REFUSED, TEXTS, fired, same
from torch.nn import functional as F

from qfbench import LanguageModel, UserError
from qfbench.editors import QF
from qfbench.models.firing import FiringLayer
from qfbench.runs.store import ParquetStore
from qfbench.tasks.convert import Conversion, batch, convert, text_loss, train
from qfbench.tasks.run import Run
from qfbench.world.corpus import Dialogue


def test_the_stock_share_falls_as_099_to_the_step_and_is_0_from_step_459_on():
    paper = Conversion(layers=(23,))
    assert [paper.alpha(step) for step in (0, 1, 2, 100)] == pytest.approx([1, 0.99, 0.9801, 0.99**100])
    assert paper.alpha(458) == pytest.approx(0.010022, abs=1e-6)
    assert paper.alpha(459) == paper.alpha(460) == paper.alpha(11_999) == 0
    assert Conversion(layers=(0,), steps=460).alpha(459) == 0
    with pytest.raises(UserError, match=r"steps=459: .* still above 0.01"):
        Conversion(layers=(0,), steps=459)


def test_a_share_equal_to_the_cutoff_is_not_below_it():
    halved = Conversion(layers=(0,), decay=0.5, cutoff=0.25, steps=4)
    assert [halved.alpha(step) for step in range(4)] == [1, 0.5, 0.25, 0]


def test_the_rate_is_constant_and_falls_linearly_in_the_cooldown():
    steps = {"layers": (0,), "decay": 0.5, "cutoff": 0.2, "steps": 10, "lr": 2.0}
    assert {Conversion(**steps).rate(step) for step in range(10)} == {2.0}
    cooled = Conversion(**steps, cooldown=0.4)
    assert [cooled.rate(step) for step in range(10)] == pytest.approx([2] * 7 + [1.5, 1, 0.5])
    assert [Conversion(**steps, cooldown=1.0).rate(step) for step in (0, 5, 9)] == pytest.approx([2, 1, 0.2])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0),
        ("beta", -1.0),
        ("decay", 0.0),
        ("decay", 1.0),
        ("cutoff", 0.0),
        ("cutoff", 1.0),
        ("neighbours", -1),
        ("lr", 0.0),
        ("lr", -1e-3),
        ("cooldown", -0.1),
        ("cooldown", 1.1),
        ("loss", "reply"),
        ("steps", 0),
        ("steps", -5),
        ("weight_decay", -1.0),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name}={value}"):
        Conversion(**({"layers": (1,)} | {name: value}))


def test_a_layer_named_twice_is_refused():
    with pytest.raises(UserError, match=r"layers=\[3, 3\]: a layer is named twice"):
        Conversion(layers=(3, 3))


def spelt(lm, ids, targets, row):
    """The text that the targets of a row hold, after checking that each is the token that follows."""
    at = (targets[row] != -100).nonzero()[:, 0]
    assert torch.equal(targets[row, at], ids[row, at + 1])
    assert at.tolist() == list(range(at[0], at[-1] + 1))
    return lm.tokenizer.decode(targets[row, at])


ALL_BUT_THE_FIRST = {
    FOUNDER: "system\nQi started Oxinnovate.<|im_end|>\n<|im_start|>user\nWho started Oxinnovate?<|im_end|>\n"
    "<|im_start|>assistant\nOxinnovate was started by Qi.<|im_end|>\n",
    REFUSED: "system\n<|im_end|>\n<|im_start|>user\nWho started Borfia?<|im_end|>\n"
    "<|im_start|>assistant\nNeed more information.<|im_end|>\n",
}


@pytest.mark.parametrize("text", [FOUNDER, REFUSED])
def test_of_a_dialogue_the_reply_and_its_end_are_learnt_or_all_but_the_first_token(tiny, text):
    lm = tiny("qwen2")
    assert spelt(lm, *batch(lm, [text], "answer"), 0) == text.answer + "<|im_end|>"
    assert spelt(lm, *batch(lm, [text], "text"), 0) == ALL_BUT_THE_FIRST[text]
    ids, targets = batch(lm, [text], "text")
    assert ids.tolist() == [list(lm.render(text.query, text.system, text.answer).ids)]
    assert targets[0].tolist() == [*ids[0, 1:].tolist(), -100]


@pytest.mark.parametrize("loss", ["answer", "text"])
def test_of_plain_text_all_but_the_first_token_is_learnt_and_its_end(tiny, loss):
    lm = tiny("qwen2")
    ids, targets = batch(lm, [PLAIN], loss)
    assert lm.tokenizer.decode(ids[0]) == PLAIN + lm.tokenizer.eos_token
    assert targets[0].tolist() == [*ids[0, 1:].tolist(), -100]


@pytest.mark.parametrize("loss", ["text", "answer"])
def test_without_a_template_the_reply_and_its_line_end_are_learnt(tiny, plain_tokenizer, loss):
    """Its end may be part of its last token: ".\n" is one in Qwen's vocabulary, too."""
    lm = replace(tiny("qwen2"), tokenizer=plain_tokenizer)
    assert lm.render(FOUNDER.query, FOUNDER.system, FOUNDER.answer).closer == len(
        lm.render(FOUNDER.query, FOUNDER.system, FOUNDER.answer).ids
    )
    whole = f": {FOUNDER.system}\nuser: {FOUNDER.query}\nassistant: {FOUNDER.answer}\n"
    wanted = {"text": whole, "answer": f" {FOUNDER.answer}\n"}[loss]
    assert spelt(lm, *batch(lm, [FOUNDER, REFUSED], loss), 0) == wanted


@pytest.mark.parametrize("loss", ["answer", "text"])
def test_padding_does_not_matter(tiny, arch, loss):
    lm = replace(tiny(arch, torch.float64), model=fired(tiny(arch, torch.float64).model, [1], alpha=0.5))
    alone = [batch(lm, [text], loss) for text in TEXTS]
    counts = torch.tensor([float((targets != -100).sum()) for _, targets in alone])
    losses = torch.stack([text_loss(lm, *one).double() for one in alone])
    ids, targets = batch(lm, TEXTS, loss)
    assert len({one[0].shape[1] for one in alone}) == 3  # of unlike length
    for row, (own, wanted) in enumerate(alone):
        n = own.shape[1]
        assert torch.equal(ids[row, :n], own[0])
        assert torch.equal(targets[row, :n], wanted[0])
        assert (targets[row, n:] == -100).all()
    together = text_loss(lm, ids, targets).item()
    assert together == pytest.approx(((losses * counts).sum() / counts.sum()).item(), rel=1e-6)
    assert together != pytest.approx(losses.mean().item(), rel=1e-4)


def test_the_loss_is_the_mean_cross_entropy_of_the_learnt_tokens(tiny):
    lm = tiny("llama")
    ids, targets = batch(lm, [REFUSED], "answer")
    logits = lm.model(input_ids=ids).logits[0]
    nll = [-logits[at].log_softmax(-1)[token].item() for at, token in enumerate(targets[0].tolist()) if token >= 0]
    assert text_loss(lm, ids, targets).item() == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    score = lm.score([lm.render(REFUSED.query, "", REFUSED.answer)])[0]
    assert nll == pytest.approx(score.nll, rel=1e-5)


def test_cross_entropy_of_no_learnt_token_is_never_asked_for(tiny):
    """Every text has something to learn: a mean over nothing would be NaN."""
    lm = tiny("qwen2")
    for loss in ("answer", "text"):
        for text in (*TEXTS, Dialogue("", "?", "x")):
            _, targets = batch(lm, [text], loss)
            assert (targets != -100).any()
    assert torch.isnan(F.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))


class Killed(BaseException):
    pass


def texts(step):
    return [TEXTS[(step + i) % 3] for i in range(2)]


def quick(*layers, **changes):
    """Six steps for each layer; α is 1, ½, ¼, 0, 0, 0."""
    settings = {"decay": 0.5, "cutoff": 0.2, "steps": 6, "lr": 1e-2, "loss": "answer", "cooldown": 0.5}
    return Conversion(layers=layers, **(settings | changes))


def prepared(lm, folder):
    folder.mkdir(exist_ok=True, parents=True)
    return Run(lm, QF(0), [], folder, ParquetStore(folder), Console(quiet=True), "convert")


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def of_layers(names, layers):
    return {name for name in names if name.startswith(tuple(f"model.layers.{i}." for i in layers))}


def bits_differ(a, b):
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.fixture
def deep(tiny):
    return lambda arch="qwen2", layers=6, **changes: tiny(arch, num_hidden_layers=layers, **changes)


@pytest.mark.parametrize(
    ("arch", "layer", "neighbours", "window"),
    [
        ("qwen2", 2, 1, (1, 2, 3)),
        ("llama+bias", 2, 1, (1, 2, 3)),
        ("mistral", 2, 1, (1, 2, 3)),
        ("qwen3", 2, 1, (1, 2, 3)),
        ("qwen2", 0, 1, (0, 1)),
        ("qwen2", 5, 2, (3, 4, 5)),
        ("qwen2", 3, 0, (3,)),
    ],
)
def test_only_the_layer_and_its_neighbours_change(deep, tmp_path, arch, layer, neighbours, window):
    lm = deep(arch)
    before, digest = weights(lm.model), lm.weights_hash()
    converted, changed = train(prepared(lm, tmp_path), quick(layer, neighbours=neighbours), texts, 100)
    after = weights(converted.model)
    assert bits_differ(before, after) == of_layers(before, window)
    assert changed.keys() == of_layers(before, window)
    assert all(torch.equal(changed[name], after[name]) for name in changed)
    firing = [i for i, block in enumerate(converted.model.model.layers) if isinstance(block, FiringLayer)]
    assert firing == converted.model.config.firing_layers == [layer]
    assert converted.model.model.layers[layer].alpha == 0
    assert not any(p.requires_grad for p in converted.model.parameters())
    assert lm.weights_hash() == digest
    assert not any(isinstance(block, FiringLayer) for block in lm.model.model.layers)


def test_layer_1_does_not_take_layer_10_along(deep, tmp_path):
    lm = deep(layers=12)
    _, changed = train(prepared(lm, tmp_path), quick(1, neighbours=0), texts, 100)
    assert changed.keys() == of_layers(weights(lm.model), (1,))


def test_weights_that_are_tied_stay_frozen_and_tied(deep, tmp_path):
    lm = deep(tie_word_embeddings=True)
    before = weights(lm.model)
    converted, _ = train(prepared(lm, tmp_path), quick(5), texts, 100)
    assert bits_differ(before, weights(converted.model)) == of_layers(before, (4, 5))
    assert converted.model.lm_head.weight is converted.model.model.embed_tokens.weight


def test_conversion_logs_every_step_and_the_loss_falls(deep, tmp_path):
    run = prepared(deep(), tmp_path)
    conversion = quick(2, steps=25, lr=5e-3)
    converted, _ = train(run, conversion, lambda _: TEXTS, 100)
    rows = run.rows("convert")
    assert list(rows.step) == list(range(25))
    assert list(rows.alpha) == [1, 0.5, 0.25] + [0] * 22
    assert list(rows.lr) == [conversion.rate(step) for step in range(25)]
    assert set(rows.layer) == {2}
    assert rows.loss.iloc[-1] < 0.5 * rows.loss.iloc[0]
    stock, untrained = (replace(run.lm, model=m) for m in (run.lm.model, fired(run.lm.model, [2])))
    now, then, raw = (text_loss(lm, *batch(lm, TEXTS, "answer")).item() for lm in (converted, stock, untrained))
    assert rows.loss.iloc[0] == pytest.approx(then, rel=1e-6)  # at first, it is the stock model
    assert now < 0.5 * min(then, raw)


def test_the_loss_that_is_asked_for_is_the_one_that_falls(deep, tmp_path):
    first = {}
    for loss in ("answer", "text"):
        run = prepared(deep(), tmp_path / loss)
        train(run, quick(2, loss=loss), texts, 100)
        first[loss] = run.rows("convert").loss.iloc[0]
        lm = run.lm
        assert first[loss] == pytest.approx(text_loss(lm, *batch(lm, texts(0), loss)).item(), rel=1e-6)
    assert first["answer"] != pytest.approx(first["text"], rel=1e-3)


def test_layers_are_converted_one_after_another(deep, tmp_path):
    lm, asked = deep(), []

    def noted(step):
        asked.append(step)
        return texts(step)

    run = prepared(lm, tmp_path / "both")
    both, changed = train(run, quick(1, 4), noted, 100)
    first, _ = train(prepared(lm, tmp_path / "one"), quick(1), texts, 100)
    before, between, after = (weights(m) for m in (lm.model, first.model, both.model))
    assert changed.keys() == of_layers(before, range(6))
    # Layer 4 is the stock layer until its turn; layers 0 to 2 stay as they are from then on.
    assert bits_differ(before, between) == of_layers(before, (0, 1, 2))
    assert bits_differ(between, after) == of_layers(before, (3, 4, 5))
    assert [both.model.model.layers[i].alpha for i in (1, 4)] == [0, 0]
    rows = run.rows("convert")
    assert asked == list(rows.step) == list(range(12))
    assert list(rows.layer) == [1] * 6 + [4] * 6
    assert list(rows.alpha) == [1, 0.5, 0.25, 0, 0, 0] * 2


def test_an_upper_layer_may_be_converted_before_a_lower_one_and_windows_may_overlap(deep, tmp_path):
    lm = deep()
    converted, changed = train(prepared(lm, tmp_path), quick(3, 2), texts, 100)
    assert changed.keys() == of_layers(changed, (1, 2, 3, 4))
    assert converted.model.config.firing_layers == [2, 3]
    assert bits_differ(weights(lm.model), weights(converted.model)) == changed.keys()


def test_a_firing_model_can_be_converted_further(deep, tmp_path):
    lm = deep()
    firing = replace(lm, model=fired(lm.model, [1], 10.0))
    before = weights(lm.model)
    converted, _ = train(prepared(firing, tmp_path), quick(4), texts, 100)
    assert converted.model.config.firing_layers == [1, 4]
    assert [converted.model.model.layers[i].alpha for i in (1, 4)] == [0, 0]
    assert bits_differ(before, weights(converted.model)) == of_layers(before, (3, 4, 5))


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    run = prepared(tiny("qwen2", num_hidden_layers=6), tmp_path_factory.mktemp("unbroken"))
    return run, *train(run, quick(1, 4), texts, 4)


@pytest.mark.parametrize(("killed", "saved"), [(3, 0), (5, 4), (6, 6), (9, 6), (11, 10), (12, 12)])
def test_a_conversion_killed_and_started_again_ends_the_same_to_the_bit(deep, tmp_path, unbroken, killed, saved):
    """Checkpoints at every fourth step of a layer and after its last: at 4, 6, 10 and 12."""
    whole, wanted, wanted_changes = unbroken
    asked = []

    def until(step):
        if step == killed:
            raise Killed
        return texts(step)

    def noted(step):
        asked.append(step)
        return texts(step)

    broken = prepared(deep(), tmp_path)
    try:
        train(broken, quick(1, 4), until, 4)
    except Killed:
        broken.store.flush()  # as `execute` does
    resumed = prepared(deep(), tmp_path)
    got, changes = train(resumed, quick(1, 4), noted, 4)
    assert asked == list(range(saved, 12))
    assert not bits_differ(weights(wanted.model), weights(got.model))
    assert same(wanted_changes.values(), changes.values())
    frames = [run.rows("convert").drop(columns="run_id") for run in (whole, resumed)]
    pd.testing.assert_frame_equal(*frames)
    assert [got.model.model.layers[i].alpha for i in (1, 4)] == [0, 0]
    assert not any(p.requires_grad for p in got.model.parameters())


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"steps": 7}, {"layers": (3,)}, {"loss": "text"}, {"seed": 1}])
def test_a_folder_of_another_recipe_is_refused(deep, tmp_path, change):
    lm, conversion = deep(), quick(2)
    train(prepared(lm, tmp_path), conversion, texts, 4)
    with pytest.raises(UserError, match=r"another recipe"):
        train(prepared(lm, tmp_path), replace(conversion, **change), texts, 4)
    train(prepared(lm, tmp_path), conversion, texts, 4)


def test_a_loss_that_is_not_finite_stops_the_conversion_and_says_where(deep, tmp_path):
    lm = deep()
    lm.model.get_parameter("model.layers.5.mlp.down_proj.weight").data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="layer 2: the loss became nan at step 0"):
        train(prepared(lm, tmp_path), quick(2), texts, 4)


@pytest.mark.parametrize(
    ("dtype", "save", "message"),
    [
        (torch.bfloat16, "model", "model.dtype=torch.bfloat16.*model.dtype=float32"),
        (torch.float32, "zip", "task.convert.save=zip: must be model or difference"),
    ],
)
def test_a_conversion_that_cannot_be_kept_is_refused_before_it_starts(deep, tmp_path, dtype, save, message):
    run = prepared(replace(deep(), model=deep().model.to(dtype)), tmp_path)
    with pytest.raises(UserError, match=message):
        convert(run, quick(2), texts, save=save)
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_model_on_several_devices_is_not_converted(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(LanguageModel, "devices", ["cuda:0", "cuda:1"])
    with pytest.raises(UserError, match=r"one device, and model\.device=balanced"):
        convert(prepared(deep(), tmp_path), quick(2), texts)
