"""Weights that do not belong to their configuration, code in a folder, and what else must not be loaded in silence."""

import json
import os
import pickle
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GPT2Config

from qfbench import LanguageModel, UserError
from qfbench.models import difference
from qfbench.models.firing import with_firing_layers
from qfbench.models.loading import firing_layers
from qfbench.models.weights import check_device

load = partial(LanguageModel.load, device="cpu")
LAYER = "model.layers.1.mlp.down_proj"


def saved(lm, folder, **options):
    lm.model.save_pretrained(folder, **options)
    lm.tokenizer.save_pretrained(folder)
    return folder


def spoil(folder, weights=None, **config):
    """Change the tensors of a folder, or its configuration."""
    path = folder / "model.safetensors"
    if weights:
        tensors = load_file(path)
        weights(tensors)
        save_file(tensors, path, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))


def refused(folder, **how):
    with pytest.raises(UserError) as error:
        load(folder, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def layers(n):
    return {"num_hidden_layers": n, "layer_types": ["full_attention"] * n}


@pytest.mark.parametrize(
    ("spoilt", "config", "says"),
    [
        (without(f"{LAYER}.weight"), {}, rf"lack {LAYER}.weight; config"),
        (without("lm_head.weight"), {}, r"lack lm_head.weight; config"),
        (without("model.norm.weight", f"{LAYER}.weight"), {}, rf"lack {LAYER}.weight, model.norm.weight;"),
        (None, layers(5), r"lack model.layers.3.* and 21 more;"),
        (None, layers(2), r"no place for: model.layers.2.* and 9 more;"),
        (
            None,
            {"intermediate_size": 81},
            r"another shape .*down_proj.weight \(\[32, 80\], not \[32, 81\]\).* and 6 more;",
        ),
        (None, {"vocab_size": 10}, r"another shape .*lm_head.weight .*, model.embed_tokens.weight"),
        (lambda t: t.update({f"{LAYER}.bias": torch.ones(32)}), {}, rf"no place for: {LAYER}.bias;"),
        (lambda t: t.update({f"{LAYER}.lora_A.weight": torch.ones(2, 80)}), {}, r"no place for: .*lora_A"),
        (lambda t: t[f"{LAYER}.weight"].fill_(torch.nan), {}, rf"{LAYER}.weight of .* holds a NaN or an infinity"),
        (
            lambda t: t[f"{LAYER}.weight"][3, 5].fill_(-torch.inf),
            {},
            rf"{LAYER}.weight of .* holds a NaN or an infinity",
        ),
    ],
)
def test_weights_that_do_not_fit_their_configuration_are_refused_by_name(tiny, tmp_path, spoilt, config, says):
    lm = tiny("qwen2")
    saved(lm, tmp_path)
    assert load(tmp_path).weights_hash() == lm.weights_hash()
    spoil(tmp_path, spoilt, **config)
    with pytest.raises(UserError, match=says):
        load(tmp_path)


def test_weights_too_large_for_their_dtype_are_refused(tiny, tmp_path):
    saved(tiny("qwen2"), tmp_path)
    spoil(tmp_path, lambda t: t[f"{LAYER}.weight"][0, 0].fill_(1e5))
    load(tmp_path, dtype="bfloat16")
    assert "in torch.float16: the file is spoilt, or model.dtype too narrow" in refused(tmp_path, dtype="float16")


def test_what_follows_from_the_configuration_may_lie_in_the_folder(tiny, tmp_path):
    lm = tiny("llama")
    saved(lm, tmp_path)
    angles = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(3)}
    spoil(tmp_path, lambda t: t.update(angles | {"model.layers.0.attn.masked_bias": torch.ones(())}))
    assert load(tmp_path).weights_hash() == lm.weights_hash()


def test_a_tied_head_may_be_left_out_or_stored_but_not_differ(tiny, tmp_path):
    lm = tiny("llama", tie_word_embeddings=True)
    saved(lm, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert load(tmp_path).weights_hash() == lm.weights_hash()
    spoil(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load(tmp_path).weights_hash() == lm.weights_hash()
    spoil(tmp_path, lambda t: t["lm_head.weight"][0, 0].add_(1))
    assert "config.json ties lm_head to the embedding" in refused(tmp_path)


def test_a_folder_in_parts_must_have_them_all(tiny, tmp_path):
    lm = tiny("llama")
    saved(lm, tmp_path, max_shard_size="100KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert load(tmp_path).weights_hash() == lm.weights_hash()
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[: len(content) // 2])
    assert "cannot load the model" in refused(tmp_path)
    parts[1].unlink()
    assert parts[1].name in refused(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_opened(tiny, tmp_path, name):
    class Mark:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marked"),)

    saved(tiny("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Mark()))
    assert f"{name}, which is not opened" in refused(tmp_path)
    assert not (tmp_path / "marked").exists()
    pickle.loads((tmp_path / name).read_bytes())
    assert (tmp_path / "marked").exists()


def test_an_adapter_is_refused(tiny, tmp_path):
    saved(tiny("llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert "it holds an adapter; merge it" in refused(tmp_path)


@pytest.mark.parametrize("which", ["config", "tokenizer", "difference"])
def test_no_code_of_a_folder_is_run_whatever_is_answered(tiny, tmp_path, which, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, mark = saved(tiny("llama"), tmp_path / "model"), tmp_path / "marked"
    (folder / f"own_{which}.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).write_text('ran')\n")
    own = f"own_{which}.Own"
    if which == "tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [own, own]}}))
    else:
        spoil(folder, model_type="own", auto_map={"AutoConfig": own, "AutoModelForCausalLM": own})
    if which == "difference":
        base = saved(tiny("llama"), tmp_path / "base")
        save_file({"x": torch.ones(1)}, folder / difference.FILE, {"base": str(base), "tensors": "1"})
    assert "wants code of its own to be run, which qfbench never does" in refused(folder)
    assert not mark.exists()
    with pytest.raises(AttributeError):  # the control: the file has no class Own
        (AutoTokenizer if which == "tokenizer" else AutoConfig).from_pretrained(folder)
    assert mark.exists()


def test_a_gate_that_no_firing_layer_uses_may_be_missing(tiny, tmp_path):
    lm = tiny("qwen2")
    saved(lm, tmp_path)
    spoil(tmp_path, without("model.layers.1.mlp.gate_proj.weight"))
    fired = load(tmp_path, firing={"layers": [1], "beta": 10})
    assert not fired.model.model.layers[1].mlp.gate_proj.weight.any()
    assert fired.weights_hash() == load(tmp_path, firing={"layers": [1], "beta": 10}).weights_hash()
    assert "lack model.layers.1.mlp.gate_proj.weight" in refused(tmp_path, firing={"layers": [2], "beta": 10})
    expected = with_firing_layers(lm.model, [1]).lm_head.weight
    assert torch.equal(fired.model.lm_head.weight, expected)


def test_a_difference_must_have_all_its_tensors_and_a_base(tiny, tmp_path):
    base = saved(tiny("llama"), tmp_path / "base")
    model = with_firing_layers(load(base).model, [1])
    names = [f"{LAYER}.weight", "model.layers.1.mlp.up_proj.weight"]
    difference.save(model, str(base), {n: model.get_parameter(n) + 1 for n in names}, tmp_path / "diff")
    assert torch.equal(load(tmp_path / "diff").model.get_parameter(names[0]), model.get_parameter(names[0]) + 1)
    path = tmp_path / "diff" / difference.FILE
    tensors = load_file(path)
    save_file(tensors | {names[0]: tensors[names[0]] * torch.nan}, path, {"base": str(base), "tensors": "2"})
    assert f"{names[0]} of" in refused(tmp_path / "diff")
    save_file({names[0]: tensors[names[0]]}, path, {"base": str(base), "tensors": "2"})
    assert "lacks tensors" in refused(tmp_path / "diff")
    save_file(tensors, path)
    assert "names no base" in refused(tmp_path / "diff")


@pytest.mark.parametrize(
    "content", ["", "{}", "null", "[]", "[1]", '"x"', '{"model_type": "nosuch"}', '{"model_type": 5}']
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_an_emptied_file_is_one_line(tiny, tmp_path, file, content):
    folder = saved(tiny("llama"), tmp_path / "m[/x]")
    (folder / file).write_text(content)
    assert str(folder) in refused(folder)


def test_a_folder_without_a_tokenizer_is_one_line(tiny, tmp_path):
    folder = saved(tiny("llama"), tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert f"{str(folder)!r}: the folder has no tokenizer (tokenizer.json)" in refused(folder)


@pytest.mark.parametrize(
    "firing", [5, {}, [], {"layers": [1]}, {"beta": 10}, {"layers": 1, "beta": 10}, {"layers": [1.0], "beta": 1}]
)
def test_a_firing_setting_that_is_none_is_refused(firing):
    with pytest.raises(UserError, match=r"model.firing=.*must be null or like \{layers: \[23\], beta: 10\}"):
        firing_layers(firing)
    assert firing_layers({"layers": [1, 2], "beta": 10}) == [1, 2]


def test_a_device_is_looked_for_before_a_model_is_read():
    check_device("cpu")
    for device in (None, 5, "cuda:99", "nonsense", "meta"):
        with pytest.raises(UserError, match=f"model.device={device}: torch sees no such device"):
            check_device(device)


SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("kind", ["mamba", "recurrent_gemma"])
def test_a_recurrent_model_is_refused(wrap, tokenizer, kind):
    more = {"lru_width": 32} if kind == "recurrent_gemma" else {}
    with pytest.raises(UserError, match=f"tiny-{kind} is a recurrent model"):
        wrap(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SMALL, **more))


def test_a_tensor_without_dimensions_is_hashed(wrap, tokenizer):
    lm = wrap(AutoConfig.for_model("apertus", vocab_size=len(tokenizer), **SMALL))
    assert any(tensor.dim() == 0 for tensor in lm.model.state_dict().values())
    before = lm.weights_hash()
    next(tensor for tensor in lm.model.state_dict().values() if tensor.dim() == 0).add_(1)
    assert lm.weights_hash() != before


def test_the_hash_of_weights_is_what_it_was(tmp_path):
    """A hash that changed would part runs from those before them."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    model.weight.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    model.bias.data = torch.tensor([5.0, 6.0])
    lm = object.__new__(LanguageModel)
    lm.model = model
    assert lm.weights_hash() == "88be5607d01f7131"


def test_positions_are_those_of_the_text(wrap, tokenizer):
    gpt2 = GPT2Config(
        n_layer=1, n_embd=32, n_head=4, n_positions=64, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None
    )
    assert wrap(gpt2).positions == 64
