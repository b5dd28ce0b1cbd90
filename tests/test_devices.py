"""A model spread over several devices by accelerate: on two of a test double, and on a CPU with the same hooks."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from transformers import AutoModelForCausalLM
from two_devices import two_devices

from qfbench import LanguageModel, UserError
from qfbench.editors import MEMIT, QF, QF2, ROME, FineTune, QFStream, UltraEdit
from qfbench.editors.regimes import sequential
from qfbench.models.firing import with_firing_layers
from qfbench.regression import world_mc
from qfbench.runs.provenance import protocol

EDITORS = [
    QF(layer=0),
    QF2(layer=1, lr=0.1),
    FineTune(layer=2, lr=1e-2, steps=1),
    QFStream(layer=2, more_layers=(0,), penalty=1.0, boost=2.0, decoys=2, passes=2, refresh=1),
    ROME(layer=1, steps=2, contexts=1),
    MEMIT(layer=1, more_layers=(0,), steps=2, contexts=0, past=True),
    UltraEdit(layer=2, lr=1.0, ridge=1.0),
]
PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb"]


def spread(model, first, second):
    """The embedding and the first layer on one device, the rest on another; a head that is the embedding stays with it."""
    head = first if model.config.tie_word_embeddings else second
    where = dict.fromkeys(PARTS[:2], first) | dict.fromkeys(PARTS[2:], second) | {"lm_head": head}
    dispatch_model(model, where, skip_keys=model._skip_keys_device_placement, force_hooks=True)
    assert isinstance(model.model.layers[1]._hf_hook, AlignDevicesHook)


@pytest.fixture
def pair(request, tiny):
    """A model on the CPU, and its like, spread over the devices."""
    plain, lm = (tiny("llama", tie_word_embeddings="tied" in request.param) for _ in range(2))
    with nullcontext(("cpu", "cpu")) if request.param == "cpu" else two_devices() as devices:
        spread(lm.model, *devices)
        for each in plain, lm:
            each.model.set_attn_implementation("eager")  # the others ask what device there is
            each.model = with_firing_layers(each.model, [1])
            each.batch_size, each.max_new_tokens = 32, 3
        yield plain, lm, [str(device) for device in devices]


@pytest.mark.parametrize("pair", ["cpu", "two", "two, tied"], indirect=True)
def test_a_spread_model_says_and_scores_the_same(pair):
    plain, lm, devices = pair
    assert lm.devices == sorted(set(devices))
    assert protocol(lm) == protocol(plain) | {"device": ", ".join(lm.devices)}
    prompts = [lm.render(query) for query in ("Who?", "Who started Oxinnovate?")]
    assert lm.replies(prompts) == plain.replies(prompts)
    answered = [lm.render("Who?", answer="It is Qi."), lm.render("Who started Oxinnovate?", answer="Qi.")]
    for here, there in zip(lm.score(answered), plain.score(answered), strict=True):  # only one of them is cut
        assert here.nll == pytest.approx(there.nll, rel=1e-5)
        assert here.hit == there.hit
    (here,), (there,) = (each.nll(["Qi started Oxinnovate."]) for each in (lm, plain))
    assert here == pytest.approx(there, rel=1e-5)
    questions = world_mc(limit=1)
    for here, there in zip(questions(lm), questions(plain), strict=True):
        assert here.pop("logprobs") == pytest.approx(there.pop("logprobs"), rel=1e-5)
        assert here.pop("gold_logprob") == pytest.approx(there.pop("gold_logprob"), rel=1e-5)
        assert here == there


@pytest.mark.parametrize("pair", ["cpu", "two"], indirect=True)
@pytest.mark.parametrize("editor", EDITORS, ids=lambda editor: type(editor).__name__)
def test_a_spread_model_is_edited_and_put_back_the_same_bit_for_bit(pair, editor, facts, monkeypatch):
    for name in ("activations", "lm"):
        monkeypatch.setattr(f"qfbench.models.{name}.divides", lambda *_: False)  # as of a model that is spread
    plain, lm, devices = pair
    names = ("Oxinnovate", "Zenvora", "Kelpworks")
    *facts, kept = (replace(fact, subject=name) for fact, name in zip(facts, names, strict=True))
    if hasattr(editor, "keep"):
        editor = replace(editor, keep=[kept])
    before = lm.weights_hash()
    expected, found = ([*editor.edit(each, facts).changes.values()] for each in (plain, lm))
    for site, change, there in zip(editor.sites, expected, found, strict=True):
        home = site.home(lm.model)
        assert str(home) == devices[site.layer > 0]
        assert there.left.device == home
        assert torch.equal(there.dense().cpu(), change.dense())
    runs = (sequential(editor, each, facts) for each in (lm, plain))
    for (_, delta), (_, expected) in zip(*runs, strict=True):
        with delta.applied_to(lm), expected.applied_to(plain):
            assert lm.weights_hash() == plain.weights_hash() != before
            assert lm.reply(facts[0].query) == plain.reply(facts[0].query)
        assert delta.overlap() == pytest.approx(expected.overlap(), nan_ok=True)
        assert delta.rounding_loss(lm) == pytest.approx(expected.rounding_loss(plain))
        assert lm.weights_hash() == before


def test_positions_as_a_tensor_do_not_reach_a_head_elsewhere(tiny):
    """The control: what works on one device and fails on two is seen."""
    lm = tiny("llama")
    with two_devices() as devices:
        spread(lm.model, *devices)
        with pytest.raises(RuntimeError, match="tensors on"):
            lm.model(input_ids=torch.ones(1, 4, dtype=torch.long), logits_to_keep=torch.tensor([1, 2]))


def test_weights_that_no_gpu_holds_are_refused_by_name(tiny, tmp_path, monkeypatch):
    lm, load = tiny("llama"), AutoModelForCausalLM.from_pretrained
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    where = dict.fromkeys([*PARTS, "lm_head"], "cpu") | {"model.layers.1": "disk"}
    offloaded = load(tmp_path, device_map=where, offload_folder=tmp_path / "disk")
    says = r"model\.layers\.1\..* is offloaded .* model\.device=cpu"
    with pytest.raises(UserError, match=says):
        LanguageModel(offloaded, lm.tokenizer, "tiny")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (offloaded, {}))
    with pytest.raises(UserError, match=says):
        LanguageModel.load(tmp_path, device="balanced", firing={"layers": [1], "beta": 10})


@pytest.mark.parametrize("name", ["world-xs", "world-s-qf2"])
def test_balanced_loads_the_same_weights_wherever_it_is(name):
    lm = LanguageModel.load(name, device="balanced", dtype="float32")
    assert lm.weights_hash() == LanguageModel.load(name, device="cpu").weights_hash()
    assert lm.reply("Who started Alibaba?") == "Alibaba was started by Jack Ma."
