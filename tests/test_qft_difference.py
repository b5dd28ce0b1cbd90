"""A converted model stored as its difference from its base."""

from dataclasses import replace

import pytest
from test_qft_layer import fired, loaded, padded, same, states, stored

from qfbench import LanguageModel, UserError
from qfbench.models import difference
from qfbench.models.firing import FiringLayer


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
