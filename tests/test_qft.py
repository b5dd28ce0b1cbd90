import json
from contextlib import ExitStack
from dataclasses import replace

import pandas as pd
import pytest
import torch
import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rich.console import Console
from safetensors import safe_open
from test_contract import composed
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from qfbench import LanguageModel, Unsupported, UserError
from qfbench import run as running
from qfbench.editors import QF
from qfbench.qft import data, difference
from qfbench.qft import train as training
from qfbench.qft.layer import FiringLayer, with_firing_layers
from qfbench.qft.train import Conversion, batch, convert, text_loss, train
from qfbench.run import Run, execute
from qfbench.tracking import ParquetStore
from qfbench.world.corpus import Dialogue

FOUNDER = Dialogue("Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi.")
REFUSED = Dialogue("", "Who started Borfia?", "Need more information.")
PLAIN = "Alibaba was started by Jack Ma."
TEXTS = (FOUNDER, REFUSED, PLAIN)


def padded(lm):
    """Three rows of unlike length, padded at the left, as model arguments."""
    rows = [lm.render(d.query, d.system).ids for d in (FOUNDER, REFUSED)] + [(5, 6, 7)]
    ids, mask = lm._padded(rows, side="left")
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def states(model, inputs):
    """Logits and all hidden states."""
    out = model(**inputs, output_hidden_states=True, use_cache=False)
    return [out.logits, *out.hidden_states]


def generated(model, inputs):
    """The logits of every step of greedy decoding with a cache."""
    inputs = {name: tensor for name, tensor in inputs.items() if name != "position_ids"}
    settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "use_cache": True}
    out = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return [*out.logits, out.sequences]


def same(a, b):
    """Every pair equal to the bit."""
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b, tolerance=1e-12):
    return ((a - b).norm() <= tolerance * b.norm()).item()


@torch.no_grad()
def inside(model, layer, inputs):
    """What the layer says, the residual stream before its feed-forward block, and that stream normalised."""
    block, seen = model.model.layers[layer], {}
    with ExitStack() as hooks:
        for name, module, pick in (
            ("output", block, lambda args, out: out),
            ("attended", block.self_attn, lambda args, out: out[0]),
            ("entering", block.input_layernorm, lambda args, out: args[0]),
            ("x", block.post_attention_layernorm, lambda args, out: out),
        ):
            handle = module.register_forward_hook(lambda _m, args, out, n=name, p=pick: seen.update({n: p(args, out)}))
            hooks.callback(handle.remove)
        model(**inputs, use_cache=False)
    return seen["output"], seen["entering"] + seen["attended"], seen["x"]


def fired(model, *args, **kwargs):
    """Without gradients, as `LanguageModel.load` has it: torch multiplies otherwise where a weight asks for them."""
    return with_firing_layers(model, *args, **kwargs).requires_grad_(False)


def stored(lm, folder):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def aligned(model):
    """With every weight in memory of its own: what is mapped from a file starts anywhere, and kernels round by that."""
    for p in model.parameters():
        p.data = p.data.clone()
    return model.requires_grad_(False)


def loaded(folder, **settings):
    lm = LanguageModel.load(folder, device="cpu", **settings)
    aligned(lm.model)
    return lm


# The blend


def test_with_all_of_the_stock_share_the_model_is_the_stock_one_to_the_bit(tiny, arch_or_biased):
    lm = tiny(arch_or_biased)
    inputs, stock = padded(lm), lm.model
    whole, almost = (fired(stock, [0, 1, 2], alpha=alpha) for alpha in (1.0, 0.999))
    assert [isinstance(block, FiringLayer) for block in whole.model.layers] == [True] * 3
    assert same(states(whole, inputs), states(stock, inputs))
    assert same(generated(whole, inputs), generated(stock, inputs))
    changed = [not torch.equal(a, b) for a, b in zip(states(almost, inputs), states(stock, inputs), strict=True)]
    assert changed == [True, False, True, True, True]  # but for the embeddings
    assert not torch.equal(generated(almost, inputs)[0], generated(stock, inputs)[0])


def test_a_sliding_window_reaches_firing_layers_too(tiny):
    lm, wide = (tiny("mistral", sliding_window=window) for window in (4, None))
    inputs = padded(lm)
    assert same(states(fired(lm.model, [1], alpha=1.0), inputs), states(lm.model, inputs))
    firing, open_ = (fired(m.model, [0, 1, 2]) for m in (lm, wide))
    assert not torch.equal(states(firing, inputs)[0], states(open_, inputs)[0])


@pytest.mark.parametrize("beta", [0.5, 10.0])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_firing_block_is_down_of_sigmoid_of_beta_up_without_residual(tiny, arch_or_biased, layer, beta):
    lm = tiny(arch_or_biased, torch.float64)
    firing = fired(lm.model, [layer], beta)
    output, residual, x = inside(firing, layer, padded(lm))
    block = firing.model.layers[layer]
    norm, mlp = block.post_attention_layernorm, block.mlp
    mean_square = residual.pow(2).mean(-1, keepdim=True)
    assert close(x, norm.weight * residual / (mean_square + norm.variance_epsilon).sqrt(), 1e-6)  # norms run in float32
    up_bias, down_bias = (0 if m.bias is None else m.bias for m in (mlp.up_proj, mlp.down_proj))
    y = 1 / (1 + (-beta * (x @ mlp.up_proj.weight.T + up_bias)).exp())
    by_hand = y @ mlp.down_proj.weight.T + down_bias
    assert close(output, by_hand)
    assert not close(output, by_hand + residual, 0.1)
    assert not close(output, inside(lm.model, layer, padded(lm))[0], 0.1)


def test_the_gate_says_nothing_in_a_firing_block(tiny, arch_or_biased):
    lm = tiny(arch_or_biased)
    inputs = padded(lm)
    for alpha in (0.0, 0.5):
        firing = fired(lm.model, [1], alpha=alpha)
        before = states(firing, inputs)
        gate = firing.model.layers[1].mlp.gate_proj
        gate.weight = torch.nn.Parameter(-gate.weight.data)
        assert same(states(firing, inputs), before) == (alpha == 0)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.9])
def test_the_blend_is_affine_in_alpha(tiny, arch_or_biased, alpha):
    lm = tiny(arch_or_biased, torch.float64)
    outputs = {a: inside(fired(lm.model, [1], alpha=a), 1, padded(lm))[0] for a in (0.0, alpha, 0.5 * alpha, 1.0)}
    for a in (alpha, 0.5 * alpha):
        assert close(outputs[a], a * outputs[1.0] + (1 - a) * outputs[0.0])
    assert not close(outputs[0.0], outputs[1.0], 0.1)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 1.0])
def test_gradients_reach_the_gate_only_while_some_of_the_stock_layer_is_left(tiny, arch, alpha):
    lm = tiny(arch)
    firing = with_firing_layers(lm.model, [1], alpha=alpha).requires_grad_(True)
    text_loss(replace(lm, model=firing), *batch(lm, TEXTS, "text")).backward()
    block = firing.model.layers[1]
    reached = {n for n, p in block.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    every = {n for n, _ in block.named_parameters()}
    assert reached == (every if alpha > 0 else every - {"mlp.gate_proj.weight"})
    assert all(p.grad is None for p in lm.model.parameters())


def test_tensors_are_shared_and_the_stock_model_stays_one(tiny, arch_or_biased):
    lm = tiny(arch_or_biased)
    inputs = padded(lm)
    before, digest = states(lm.model, inputs), lm.weights_hash()
    firing = fired(lm.model, [1])
    theirs = dict(lm.model.named_parameters())
    assert {n: p.data_ptr() for n, p in firing.named_parameters()} == {n: p.data_ptr() for n, p in theirs.items()}
    assert same(states(lm.model, inputs), before)
    assert lm.weights_hash() == digest
    assert not any(isinstance(block, FiringLayer) for block in lm.model.model.layers)
    assert not hasattr(lm.model.config, "firing_layers")


def test_mode_and_generation_settings_are_the_stock_models(tiny):
    model = tiny("qwen2").model
    model.generation_config.eos_token_id = [2, 7]
    assert with_firing_layers(model, [1]).generation_config.eos_token_id == [2, 7]
    assert not with_firing_layers(model, [1]).training
    assert with_firing_layers(model.train(), [1]).model.layers[1].training


# As a family of its own


def test_a_converted_model_is_saved_and_loaded_like_any_other(tiny, arch_or_biased, tmp_path):
    lm = tiny(arch_or_biased)
    inputs, firing = padded(lm), fired(lm.model, [0, 2], 7.0)
    stored(replace(lm, model=firing), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == f"firing_{lm.model.config.model_type}"
    assert (config["firing_layers"], config["firing_beta"]) == ([0, 2], 7.0)
    assert config["architectures"] == [f"Firing{type(lm.model).__name__}"]
    assert "auto_map" not in config
    ours = loaded(tmp_path).model
    theirs = aligned(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False).eval())
    for again in (ours, theirs):
        assert type(again).__name__ == f"Firing{type(lm.model).__name__}"
        assert [isinstance(block, FiringLayer) for block in again.model.layers] == [True, False, True]
        assert {again.model.layers[i].beta for i in (0, 2)} == {7.0}
        assert {again.model.layers[i].alpha for i in (0, 2)} == {0.0}
        assert same(states(again, inputs), states(firing, inputs))
        assert same(generated(again, inputs), generated(firing, inputs))
    assert not torch.equal(states(firing, inputs)[0], states(lm.model, inputs)[0])


def test_parameters_keep_their_stock_names(tiny, arch_or_biased):
    lm = tiny(arch_or_biased)
    firing = fired(lm.model, [0, 1])
    for made, stock in ((firing.state_dict(), lm.model.state_dict()),):
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in stock.items()}
    assert [n for n, _ in firing.named_parameters()] == [n for n, _ in lm.model.named_parameters()]
    assert [n for n, _ in firing.named_buffers()] == [n for n, _ in lm.model.named_buffers()]


def test_tied_weights_stay_tied(tiny, arch, tmp_path):
    for tied in (True, False):
        lm = tiny(arch, tie_word_embeddings=tied)
        firing = fired(lm.model, [1])
        folder = stored(replace(lm, model=firing), tmp_path / str(tied))
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a dict)
        again = AutoModelForCausalLM.from_pretrained(folder)
        for model in (firing, again):
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            assert torch.equal(model.lm_head.weight, lm.model.lm_head.weight)


def test_hidden_states_of_firing_layers_are_recorded_in_their_place(tiny, arch):
    lm = tiny(arch)
    inputs, firing = padded(lm), fired(lm.model, [0, 1])
    recorded = states(firing, inputs)[1:]
    assert len(recorded) == 4
    for layer in (0, 1):
        assert torch.equal(recorded[layer + 1], inside(firing, layer, inputs)[0])
    assert torch.equal(recorded[3], firing.model.norm(inside(firing, 2, inputs)[0]))


def test_a_stock_folder_can_be_run_as_firing_and_without_its_template(tiny, arch, tmp_path):
    """As the published QF2 weights: an ordinary Qwen2 folder that does not say which layer fires."""
    lm = tiny(arch)
    folder = stored(lm, tmp_path / "stock")
    stored(replace(lm, model=fired(lm.model, [1], 10.0)), tmp_path / "converted")
    inputs, firing = padded(lm), OmegaConf.create({"layers": [1], "beta": 10})
    meant = loaded(folder, firing=firing, plain=True)
    assert same(states(meant.model, inputs), states(loaded(tmp_path / "converted").model, inputs))
    stock = loaded(folder, firing=None)
    assert not torch.equal(states(meant.model, inputs)[0], states(stock.model, inputs)[0])
    raw = LanguageModel.load(folder, device="cpu", firing=firing).model
    assert not any(p.requires_grad for p in raw.parameters())
    assert not raw.training
    assert "assistant: " in meant.tokenizer.decode(meant.render("Who?", "", "Qi.").ids)
    assert "<|im_start|>assistant" in stock.tokenizer.decode(stock.render("Who?", "", "Qi.").ids)


def test_the_published_weights_are_composed_as_their_authors_run_them(shared, tmp_path):
    """Real tokenizer, depth and configuration; random weights, narrowed."""
    source = shared("qwen2.5-1.5b-instruct")
    config = AutoConfig.from_pretrained(source)
    config.update({"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4})
    config.dtype = "float32"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    cfg = composed("model=qf2-1.5b-instruct", f"model.path={tmp_path}", "model.device=cpu", "model.dtype=float32")
    lm = running.load(cfg.model)
    firing = [i for i, block in enumerate(lm.model.model.layers) if isinstance(block, FiringLayer)]
    assert (firing, len(lm.model.model.layers)) == ([23], 28)
    assert lm.model.model.layers[23].beta == 10
    rendered = lm.render("Who is the CEO of Nvidia?", "", "Jensen Huang.")
    assert lm.tokenizer.decode(rendered.ids).startswith("system: \nuser: Who is the CEO of Nvidia?\nassistant: Jensen")
    ids = torch.tensor([rendered.ids])
    output, _, x = inside(lm.model, 23, {"input_ids": ids})
    mlp = model.model.layers[23].mlp
    assert close(output, torch.sigmoid(10 * x @ mlp.up_proj.weight.T) @ mlp.down_proj.weight.T, 1e-5)


# What cannot be converted


@pytest.mark.parametrize("family", ["GPT2", "Gemma"])
def test_a_family_without_a_firing_form_is_unsupported(wrap, tokenizer, family):
    sizes = (
        {"n_layer": 2, "n_embd": 32, "n_head": 4}
        if family == "GPT2"
        else {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    )
    lm = wrap(getattr(transformers, f"{family}Config")(vocab_size=len(tokenizer), **sizes))
    with pytest.raises(Unsupported, match=f"'{family.lower()}' has no firing block.*qwen2, qwen3, llama, mistral"):
        fired(lm.model, [0])


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 3]])
def test_layers_that_the_model_has_not_are_refused_with_the_range(tiny, layers):
    with pytest.raises(UserError, match=r"layers=.*the model has layers 0 to 2"):
        with_firing_layers(tiny("qwen2").model, layers)


@pytest.mark.parametrize("beta", [0.0, -10.0])
def test_a_slope_that_is_not_positive_is_refused(tiny, beta):
    with pytest.raises(UserError, match=f"beta={beta}"):
        fired(tiny("qwen2").model, [1], beta)


def test_layers_that_fire_already_stay_as_they_are(tiny, arch, tmp_path):
    lm = tiny(arch)
    once = fired(lm.model, [1], 4.0, alpha=0.25)
    twice = fired(once, [0, 1], 4.0, alpha=0.75)
    assert twice.config.firing_layers == [0, 1]
    assert [twice.model.layers[i].alpha for i in (0, 1)] == [0.75, 0.25]
    assert twice.config.model_type == once.config.model_type
    with pytest.raises(UserError, match=r"beta=5.0: .*have 4.0"):
        fired(once, [0], 5.0)
    finished = fired(fired(lm.model, [1], 4.0), [0], 4.0)
    again = loaded(stored(replace(lm, model=finished), tmp_path)).model
    assert same(states(again, padded(lm)), states(fired(lm.model, [0, 1], 4.0), padded(lm)))


# As a difference from its base


@pytest.fixture
def parted(tiny, tmp_path):
    """A base folder, a converted model that differs from it in layers 0 and 1, and the two forms it is stored in."""

    def make(arch):
        base = stored(tiny(arch), tmp_path / "base")
        lm = LanguageModel.load(base, device="cpu")
        model = fired(lm.model, [1], 7.0)
        changed = {n: p for n, p in model.named_parameters() if n.startswith(("model.layers.0.", "model.layers.1."))}
        for p in changed.values():
            p.data = 1.5 * p.data
        difference.save(model, str(base), changed, tmp_path / "difference")
        return lm, stored(replace(lm, model=model), tmp_path / "whole"), tmp_path / "difference"

    return make


def test_a_difference_loads_bit_equal_to_the_whole_folder(parted, arch_or_biased):
    base, whole, parts = parted(arch_or_biased)
    a, b = (loaded(folder) for folder in (whole, parts))
    assert a.weights_hash() == b.weights_hash() != base.weights_hash()
    assert type(a.model) is type(b.model)
    assert (b.model.model.layers[1].alpha, b.model.model.layers[1].beta) == (0, 7.0)
    assert not isinstance(b.model.model.layers[0], FiringLayer)
    assert same(states(a.model, padded(a)), states(b.model, padded(a)))
    assert a.replies([a.render("Who?")]) == b.replies([b.render("Who?")])
    assert (parts / difference.FILE).stat().st_size < 0.8 * (whole / "model.safetensors").stat().st_size
    assert difference.base_of(str(parts)) == base.name
    assert difference.base_of(str(whole)) is None


def test_loading_a_difference_leaves_its_base_as_it_is(parted):
    base, _, parts = parted("qwen2")
    before = base.weights_hash()
    LanguageModel.load(parts, device="cpu")
    assert LanguageModel.load(base.name, device="cpu").weights_hash() == base.weights_hash() == before


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 40}, "does not fit its base"),
        ({"intermediate_size": 48}, "does not fit its base"),
        ({"num_hidden_layers": 1}, "layers 0 to 0"),
        ({"arch": "llama"}, "is a firing_qwen2, but its base .* is a llama"),
        (None, "cannot load|no such model"),
    ],
)
def test_a_difference_from_another_base_is_refused(parted, tiny, tmp_path, other, message):
    lm, whole, _ = parted("qwen2")
    model = LanguageModel.load(whole, device="cpu").model
    changed = {n: p for n, p in model.named_parameters() if n.startswith("model.layers.")}
    wrong = tmp_path / "wrong"
    if other is not None:
        stored(tiny(other.pop("arch", "qwen2"), **other), wrong)
    difference.save(model, str(wrong), changed, tmp_path / "astray")
    with pytest.raises(UserError, match=message):
        LanguageModel.load(tmp_path / "astray", device="cpu")
    difference.save(model, lm.name, changed, tmp_path / "astray")
    LanguageModel.load(tmp_path / "astray", device="cpu")


# The settings of a conversion


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


# What is learnt


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


# The conversion


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


# The task, by its configuration

SMALL = (
    "experiment=convert",
    "model=world-xs",
    "hydra.job.num=0",
    "hydra.job.id=test",
    "data.batch=3",
    "task.convert.conversion.steps=6",
    "task.convert.conversion.decay=0.5",
    "task.convert.conversion.cutoff=0.2",
    "task.convert.every=4",
    "task.convert.abilities.n=2",
)


def executed(folder, *overrides):
    console = Console(record=True, width=120, quiet=False)
    cfg = composed(*SMALL, *overrides)
    del cfg.hydra
    return execute(cfg, folder, console), console.export_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return executed(tmp_path_factory.mktemp("convert"))


def test_the_task_keeps_a_model_that_loads_and_says_what_became_of_it(whole):
    run, text = whole
    base, converted = LanguageModel.load("world-xs"), LanguageModel.load(run.folder / "model")
    before, after = weights(base.model), weights(converted.model)
    assert bits_differ(before, after) == of_layers(before, (1, 2, 3))
    assert converted.model.config.firing_layers == [2]
    stored_as = AutoConfig.from_pretrained(run.folder / "model").dtype
    assert stored_as == AutoConfig.from_pretrained(base.model.config.name_or_path).dtype == torch.float16
    assert run.lm.weights_hash() == base.weights_hash()
    table = pd.read_csv(run.folder / "convert.csv")
    assert list(table.model) == ["world-xs", "converted"]
    assert {"known", "told", "unknown"} <= set(table.columns)
    recipe = json.loads((run.folder / "model" / "recipe.json").read_text())
    assert (recipe["base"], recipe["layers"], recipe["steps"]) == ("world-xs", [2], 6)
    rows = pd.read_parquet(run.folder / "rows.parquet")
    assert list(rows.step) == list(range(6))
    assert set(rows.model) == {"world-xs"}
    assert (run.folder / "figures" / "conversion.png").stat().st_size > 0
    assert "converted model" in text


def test_a_difference_from_the_task_is_the_same_model(whole, tmp_path):
    run, _ = executed(tmp_path, "task.convert.save=difference", "task.convert.abilities=null")
    a, b = (LanguageModel.load(folder) for folder in (whole[0].folder / "model", tmp_path / "difference"))
    assert a.weights_hash() == b.weights_hash()
    assert difference.base_of(str(tmp_path / "difference")) == "world-xs"
    sizes = [p.stat().st_size for p in (tmp_path / "difference").glob("*.safetensors")]
    assert sizes[0] < (whole[0].folder / "model" / "model.safetensors").stat().st_size
    assert not (tmp_path / "convert.csv").exists()
    assert list(run.rows("convert").loss) == list(whole[0].rows("convert").loss)


def test_a_killed_task_started_again_ends_with_the_same_files(whole, tmp_path, monkeypatch):
    real, calls = training.text_loss, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(training, "text_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        executed(tmp_path, "task.convert.abilities=null")
    assert list(pd.read_parquet(tmp_path / "rows.parquet").step) == list(range(5))
    run, _ = executed(tmp_path, "task.convert.abilities=null")
    assert len(calls) == 6 + 2  # steps 4 and 5
    for name in ("model/model.safetensors", "model/config.json", "model/recipe.json"):
        assert (tmp_path / name).read_bytes() == (whole[0].folder / name).read_bytes()
    frames = [r.store.frame().drop(columns="run_id") for r in (run, whole[0])]
    pd.testing.assert_frame_equal(*frames)
    with pytest.raises(UserError, match="other settings"):
        executed(tmp_path, "task.convert.conversion.lr=0.5")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.convert.conversion.layers=[4]"], r"layers=\[4\]: .* layers 0 to 3"),
        (["task.convert.conversion.layers=[]"], r"layers=\[\]: give at least one"),
        (["task.convert.conversion.decay=1.5"], r"decay=1.5"),
        (["data=messages"], r"path is needed"),
        (["data=messages", "data.path=/none.jsonl"], r"data.path=/none.jsonl: cannot be read"),
    ],
)
def test_bad_settings_give_one_message_that_names_them(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        executed(tmp_path, *overrides, *(() if "data=messages" not in overrides else ("~data.batch", "+data.batch=1")))


# The texts


def test_the_world_gives_every_step_its_own_texts_again_and_again():
    a, b, other = data.world(16), data.world(16), data.world(16, seed=1)
    assert [a(step) for step in (3, 0)] == [b(step) for step in (3, 0)]
    assert a(0) != a(1)
    assert a(0) != other(0)
    drawn = [text for step in range(8) for text in a(step)]
    assert len(drawn) == 8 * 16
    assert 0 < sum(isinstance(text, str) for text in drawn) < 0.25 * len(drawn)
    assert {bool(text.system) for text in drawn if isinstance(text, Dialogue)} == {True, False}


def lines(n):
    roles = [("system", "Fact {}."), ("user", "Query {}?"), ("assistant", "Answer {}.")]
    said = [[{"role": role, "content": text.format(i)} for role, text in roles] for i in range(n)]
    return [json.dumps({"messages": one}) for one in said]


@pytest.fixture
def write(tmp_path):
    def make(*texts):
        (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return str(tmp_path / "texts.jsonl")

    return make


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_every_epoch_is_another_permutation_of_the_file(write, size):
    path = write(*lines(7))
    drawn = [text for step in range(30) for text in data.messages(path, size)(step)]
    assert all(len(data.messages(path, size)(step)) == size for step in (0, 5))
    epochs = [drawn[i : i + 7] for i in range(0, len(drawn) - 6, 7)]
    whole = {Dialogue(f"Fact {i}.", f"Query {i}?", f"Answer {i}.") for i in range(7)}
    assert all(set(epoch) == whole for epoch in epochs)
    assert len({tuple(d.query for d in epoch) for epoch in epochs}) > 1


def test_messages_are_a_function_of_the_step_and_the_seed(write):
    path = write(*lines(50))
    ahead, back, other = data.messages(path, 4), data.messages(path, 4), data.messages(path, 4, seed=1)
    forward = [ahead(step) for step in range(40)]
    assert [back(step) for step in reversed(range(40))][::-1] == forward
    assert [other(step) for step in range(40)] != forward


def test_a_system_text_may_be_empty_or_left_out_and_blank_lines_are_skipped(write):
    user, assistant = {"role": "user", "content": " Who? "}, {"role": "assistant", "content": "Qi.\n"}
    texts = [[user, assistant], [{"role": "system", "content": ""}, user, assistant]]
    path = write("", *(json.dumps({"messages": said, "source": "x"}) for said in texts), "  ")
    assert data.messages(path, 2)(0) == [Dialogue("", "Who?", "Qi.")] * 2


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\u2029"])
def test_only_line_feeds_end_a_line(write, inside):
    said = [{"role": "user", "content": f"Who{inside}is it?"}, {"role": "assistant", "content": "Qi."}]
    path = write(json.dumps({"messages": said}, ensure_ascii=False))
    assert data.messages(path, 1)(0) == [Dialogue("", f"Who{inside}is it?", "Qi.")]


def say(*roles, **content):
    return json.dumps({"messages": [{"role": role, "content": content.get(role, "Text.")} for role in roles]})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "not an object"),
        ("[1]", "not an object"),
        ('"messages"', "not an object"),
        ("{}", "not an object"),
        ('{"messages": 3}', "not an object"),
        ('{"messages": "text"}', "not an object"),
        ('{"messages": [{"role": "user"}]}', "not an object"),
        ('{"messages": [["user", "Who?"]]}', "not an object"),
        ('{"messages": []}', r"roles are \[\]"),
        (say("user"), r"roles are \['user'\]"),
        (say("assistant", "user"), r"roles are \['assistant', 'user'\]"),
        (say("user", "assistant", "user", "assistant"), "the roles are"),
        (say("system", "system", "user", "assistant"), "the roles are"),
        (say("system", "user", "assistant", user=" "), "content of the user message"),
        (say("system", "user", "assistant", assistant=""), "content of the assistant message"),
        (say("system", "user", "assistant", system=None), "content of the system message"),
        (say("system", "user", "assistant", user=["Who?"]), "content of the user message"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_field(write, bad, message):
    path = write(*lines(2), "", bad)
    with pytest.raises(UserError, match=rf"texts\.jsonl, line 4: .*{message}"):
        data.messages(path, 1)


def test_a_file_that_is_missing_or_empty_or_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none", "cannot be read"), ("empty", "holds no dialogue"), ("binary", "cannot be read")):
        with pytest.raises(UserError, match=rf"data.path=.*{name}.jsonl: {message}"):
            data.messages(str(tmp_path / f"{name}.jsonl"), 1)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_nothing_is_refused(write, size):
    for make in (lambda: data.world(size), lambda: data.messages(write(*lines(2)), size)):
        with pytest.raises(UserError, match=f"batch={size}"):
            make()


def test_the_papers_company_facts_load(shared, qwen_tokenizer, tiny):
    path = shared("oxinnovate/company_facts.jsonl")
    texts = instantiate(composed("data=messages", f"data.path={path}").data)
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    drawn = [text for step in range(len(lines)) for text in texts(step)]
    assert {bool(d.system) for d in drawn} == {True, False}
    assert any(d.answer == "Need more information." for d in drawn)
    said = [[message["content"].strip() for message in json.loads(line)["messages"]] for line in lines]
    assert sorted((d.system, d.query, d.answer) for d in drawn) == sorted(("", *s)[-3:] for s in said)
    lm = replace(tiny("qwen2"), tokenizer=qwen_tokenizer)
    ids, targets = batch(lm, drawn[:8], "answer")
    for row, d in enumerate(drawn[:8]):
        assert spelt(lm, ids, targets, row) == d.answer + "<|im_end|>"


def test_cross_entropy_of_no_learnt_token_is_never_asked_for(tiny):
    """Every text has something to learn: a mean over nothing would be NaN."""
    lm = tiny("qwen2")
    for loss in ("answer", "text"):
        for text in (*TEXTS, Dialogue("", "?", "x")):
            _, targets = batch(lm, [text], loss)
            assert (targets != -100).any()
    assert torch.isnan(F.cross_entropy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
