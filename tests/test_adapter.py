"""LoRA adapters: written for peft, read from it, and refused where they are no plain LoRA."""

import json

import pytest
import torch
from conftest import CONFIGS
from safetensors.torch import load_file, save_file
from test_contract import composed

from qfbench import Unsupported, UserError
from qfbench.commands.settings import build
from qfbench.editors import QF, Adapter, FineTune, QFStream
from qfbench.editors.regimes import sequential
from qfbench.models import lora
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.sites import Site
from qfbench.runs.identity import identity


def drawn(lm, ranks, dtype=torch.float64):
    """A random change of the given rank of the matrices of these sites, as large as they are."""
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for site, rank in ranks.items():
        rows, cols = site.linear(lm.model).weight.shape
        left, right = (torch.randn(s, generator=generator, dtype=dtype) for s in ((rows, rank), (rank, cols)))
        changes[site.weight_name(lm.model)] = LowRank(0.1 * left, right)
    return WeightDelta(changes)


SITES = {Site(0, "down_proj"): 2, Site(1, "gate_proj"): 5, Site(2, "q_proj"): 3}
IDS = torch.tensor([[3, 14, 15, 92, 65]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("arch", list(CONFIGS))
def test_peft_gives_the_logits_of_the_edited_model(tiny, facts, arch, tmp_path):
    peft = pytest.importorskip("peft")
    lm = tiny(arch, torch.float64)
    one, other = QF(1).edit(lm, facts), QFStream(0, (2,), penalty=1.0).edit(lm, facts)
    delta = one + other + drawn(lm, SITES)
    assert max(lora.write(delta, tmp_path, "tiny").values()) < 1e-12
    with delta.applied_to(lm):
        wanted = logits(lm.model)
    plain = logits(lm.model)
    found = peft.PeftModel.from_pretrained(lm.model, tmp_path, autocast_adapter_dtype=False)
    assert len(found.peft_config["default"].rank_pattern) >= 2
    assert apart(logits(found.double()), wanted) < 1e-5
    assert apart(plain, wanted) > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_trains_is_read_as_it_applies_it(tiny, tmp_path, rslora):
    peft = pytest.importorskip("peft")
    lm = tiny("llama")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 5, "q_proj": 2},
        alpha_pattern={r"layers\.[02]\.mlp\.down_proj": 11},
        use_rslora=rslora,
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(lm.model, config)
    model.save_pretrained(tmp_path)
    wanted = logits(model)
    lm.model = model.unload()
    plain = logits(lm.model)
    editor = Adapter(str(tmp_path))
    assert [(site.layer, site.module) for site in editor.sites[:2]] == [(0, "down_proj"), (0, "q_proj")]
    editor.check(lm)
    with editor.edit(lm, []).applied_to(lm):
        assert apart(logits(lm.model), wanted) < 1e-5
    assert apart(plain, wanted) > 1e-2


def test_an_adapter_written_and_read_is_the_change(tiny, tmp_path):
    lm = tiny("qwen2")
    delta = drawn(lm, SITES)
    lora.write(delta, tmp_path, "tiny")
    again = Adapter(str(tmp_path)).edit(lm, [])
    assert again.changes.keys() == delta.changes.keys()
    for name, change in delta.changes.items():
        assert apart(again.changes[name].dense(), change.dense()) < 1e-6
        assert again.changes[name].rank == change.rank


@pytest.mark.parametrize("dense", [False, True])
def test_a_smaller_rank_is_the_nearest_and_what_it_cuts_off_is_told(tiny, tmp_path, dense):
    lm = tiny("qwen2")
    delta = drawn(lm, {Site(1): 6})
    ((name, change),) = delta.changes.items()
    if dense:
        delta = WeightDelta({name: LowRank(change.dense())})
    cut = lora.write(delta, tmp_path, "tiny", rank=2)
    values = torch.linalg.svdvals(change.dense())
    missing = (values[2:].norm() / values.norm()).item()
    assert cut[name] == pytest.approx(missing, rel=1e-9)
    assert cut[""] == pytest.approx(missing, rel=1e-9)
    near = Adapter(str(tmp_path)).edit(lm, []).changes[name]
    assert near.rank == 2
    assert apart(near.dense(), change.dense()) == pytest.approx(missing, rel=1e-5)
    assert missing > 0.1
    with pytest.raises(UserError, match="--rank 0: must be 1 or more"):
        lora.write(delta, tmp_path, "tiny", rank=0)


def test_of_several_matrices_the_shares_add_up_as_norms_do(tiny, tmp_path):
    lm = tiny("qwen2")
    delta = drawn(lm, SITES)
    cut = lora.write(delta, tmp_path, "tiny", rank=2)
    lost = sum((cut[name] * change.norm()) ** 2 for name, change in delta.changes.items()) ** 0.5
    assert cut[""] == pytest.approx(lost / delta.norm())
    assert cut["model.layers.0.mlp.down_proj.weight"] < 1e-12


def test_singular_values_and_truncation_of_factors_are_those_of_the_matrix():
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(9, 4, generator=generator), torch.randn(4, 30, generator=generator)
    change = LowRank(left, right)
    wanted = torch.linalg.svdvals(change.dense().double())[:4]
    assert torch.allclose(change.singular_values(), wanted, rtol=1e-5)
    assert change.truncated().rank == LowRank(change.dense()).truncated().rank == 4
    assert LowRank(torch.zeros(3, 5)).truncated().dense().norm() == 0
    near = change.truncated()
    assert torch.allclose(near.left.T @ near.left, near.right @ near.right.T)  # balanced


def test_the_adapter_is_there_after_the_first_edit_and_once(tiny, facts, tmp_path):
    lm = tiny("qwen2")
    delta = drawn(lm, {Site(1): 2})
    lora.write(delta, tmp_path, "tiny")
    editor = Adapter(str(tmp_path))
    totals = [total for _, total in sequential(editor, lm, facts)]
    assert len(totals) == len(facts)
    assert all(total.norm() == pytest.approx(delta.norm(), rel=1e-6) for total in totals)
    rest = list(sequential(editor, lm, facts, 1, totals[0]))
    assert [total.norm() for _, total in rest] == [total.norm() for total in totals[1:]]


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"peft_type": "IA3"}, "of the kind IA3; only LORA is read"),
        ({"use_dora": True}, "only plain LoRA is read here, .* use_dora=True; merge it with peft"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"a_setting_of_tomorrow": 1}, "a_setting_of_tomorrow=1"),
        ({"r": 4}, "not of the rank 4"),
        ({"lora_alpha": None}, "neither rank nor alpha"),
    ],
)
def test_other_adapters_are_refused(tiny, tmp_path, setting, error):
    lora.write(drawn(tiny("qwen2"), {Site(1): 2}), tmp_path, "tiny")
    assert Adapter(str(tmp_path)).sites == (Site(1),)
    path = tmp_path / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(UserError, match=error):
        Adapter(str(tmp_path))


def test_other_tensors_and_files_are_refused(tiny, tmp_path):
    lm = tiny("qwen2")
    lora.write(drawn(lm, {Site(1): 2}), tmp_path, "tiny")
    path = tmp_path / lora.FILE
    tensors = load_file(path)
    a, _ = sorted(tensors)
    for changed, error in (
        (tensors | {"base_model.model.lm_head.lora_embedding_A": tensors[a].clone()}, "is no LoRA of a linear layer"),
        ({a: tensors[a]}, "are not both there"),
        (tensors | {a: tensors[a] * float("nan")}, "NaN"),
        ({}, "changes nothing"),
    ):
        save_file(changed, path)
        with pytest.raises(UserError, match=error):
            Adapter(str(tmp_path))
    save_file({name.replace("layers.1.mlp.down_proj", "embed_tokens"): held for name, held in tensors.items()}, path)
    with pytest.raises(UserError, match="stands in no layer"):
        Adapter(str(tmp_path)).check(lm)
    path.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="weights must be safetensors"):
        Adapter(str(tmp_path))
    with pytest.raises(UserError, match="give the folder of a LoRA adapter"):
        Adapter(str(tmp_path / "none"))


def test_another_adapter_in_the_same_folder_makes_another_run(tiny, tmp_path):
    lm = tiny("qwen2")
    lora.write(drawn(lm, {Site(1): 2}), tmp_path, "tiny")
    cfg = composed("editor=adapter", f"editor.path={tmp_path}")
    before, editor = identity(cfg), build(cfg, "editor")
    assert editor == Adapter(str(tmp_path), lora.fingerprint(tmp_path))
    assert identity(cfg) == before
    lora.write(drawn(lm, {Site(1): 3}), tmp_path, "tiny")
    assert identity(cfg) != before
    with pytest.raises(UserError, match="is another one now"):
        Adapter(str(tmp_path), editor.files)


def test_an_adapter_of_another_model_is_refused(tiny, tmp_path):
    lora.write(drawn(tiny("qwen2"), {Site(1): 2, Site(2): 2}), tmp_path, "tiny")
    editor = Adapter(str(tmp_path))
    with pytest.raises(UserError, match=r"another model: .* is \[32, 80\] there, and \[32, 64\] in"):
        editor.check(tiny("qwen2", intermediate_size=64))
    with pytest.raises(UserError, match="layers 0 to 1"):
        editor.check(tiny("qwen2", num_hidden_layers=2))


def test_a_site_may_be_in_the_attention(tiny):
    lm = tiny("llama")
    assert Site(1, "v_proj").weight_name(lm.model) == "model.layers.1.self_attn.v_proj.weight"
    with pytest.raises(Unsupported, match="no mlp.none"):
        Site(1, "none").linear(lm.model)


def test_a_full_matrix_keeps_its_rank(tiny, facts, tmp_path):
    lm = tiny("qwen2")
    delta = FineTune(1, lr=0.05, steps=3).edit(lm, facts)
    assert lora.write(delta, tmp_path, "tiny")[""] < 1e-5
