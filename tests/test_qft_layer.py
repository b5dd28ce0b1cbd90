"""The firing layer: its blend with the stock layer, and models that hold it."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
import transformers
from omegaconf import OmegaConf
from safetensors import safe_open
from test_contract import composed
from transformers import AutoConfig, AutoModelForCausalLM

from qfbench import LanguageModel, Unsupported, UserError
from qfbench.models import whole
from qfbench.models.firing import FiringLayer, with_firing_layers
from qfbench.tasks import run as running
from qfbench.tasks.convert import batch, text_loss
from qfbench.world.corpus import Dialogue

FOUNDER = Dialogue("Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi.")
REFUSED = Dialogue("", "Who started Borfia?", "Need more information.")
PLAIN = "Alibaba was started by Jack Ma."
TEXTS = (FOUNDER, REFUSED, PLAIN)


def padded(lm):
    """Three rows of unlike length, padded at the left, as model arguments."""
    rows = [lm.render(d.query, d.system).ids for d in (FOUNDER, REFUSED)] + [(5, 6, 7)]
    ids, mask = whole.padded(rows, "left", lm.device)
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
