"""AlphaEdit: what lies in the preserved space is left as it is, exactly, and earlier keys nearly."""

import pytest
import torch
from test_rome import QUICK, close, drawn, known  # noqa: F401 (a fixture)

from qfbench import UserError
from qfbench.editors import MEMIT, AlphaEdit
from qfbench.editors.locate import looked_up, moments_of
from qfbench.editors.recursive import least
from qfbench.editors.regimes import sequential
from qfbench.editors.stays import staying
from qfbench.models.activations import record_many
from qfbench.models.sites import Site

F, D = 12, 5
NAME = "model.layers.1.mlp.down_proj.weight"


def test_it_is_the_papers_formula():
    """R K₁ᵀ P (K_p K_pᵀ P + K₁ K₁ᵀ P + λ I)⁻¹, keys as columns."""
    kept = drawn(0, 7, F)
    keys, wanted, past = drawn(1, 3, F), drawn(2, 3, D), drawn(3, 2, F)
    editor = AlphaEdit(0, threshold=1e-9, ridge=0.7)
    p = editor.inverse(kept.T @ kept, Site(0)) * 0.7
    assert close(p @ p, p)
    assert round(torch.trace(p).item(), 6) == F - 7
    assert (kept @ p).norm() < 1e-8
    taught = torch.cat([past, keys])
    asked = torch.cat([wanted.new_zeros(2, D), wanted])
    change = least(p / 0.7, taught, asked, torch.ones(5, dtype=torch.float64))[0].dense()
    formula = wanted.T @ keys @ p @ torch.linalg.inv(taught.T @ taught @ p + 0.7 * torch.eye(F, dtype=torch.float64))
    assert close(change, formula)
    assert (change @ kept.T).norm() < 1e-8 * change.norm()
    assert (change @ keys.T).norm() > 0.1 * change.norm()


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_in_a_model_no_preserved_direction_is_changed(tiny, known, arch):  # noqa: F811
    lm = tiny(arch, torch.float64)
    taught, kept = known[:2], known[2:]
    said = staying(lm, kept, taught)
    (c,) = moments_of(lm, said, [Site(1)])
    sizes, vectors = torch.linalg.eigh(c)
    threshold = 0.3
    preserved = vectors[:, sizes > threshold * sizes.mean()]
    assert 0 < preserved.shape[1] < len(c)
    editor = AlphaEdit(1, **QUICK, keep=kept, threshold=threshold, ridge=0.1)
    change = editor.edit(lm, taught).changes[NAME].dense()
    assert (change @ preserved).norm() < 1e-8 * change.norm()
    plain = MEMIT(1, **QUICK, keep=kept, penalty=0.1).edit(lm, taught).changes[NAME].dense()
    assert (plain @ preserved).norm() > 1e-3 * plain.norm()


def test_keys_that_span_the_preserved_space_give_what_they_gave(tiny, known):  # noqa: F811
    """Where fewer tokens are kept than there are inputs, every key of them is preserved."""
    lm = tiny("qwen2", torch.float64)
    said = staying(lm, known[2:], known[:2])[:1]
    assert said
    keys = torch.cat([one.key for one in record_many(lm, said, [Site(1)])[0]])
    assert len(keys) < keys.shape[1]
    editor = AlphaEdit(1, **QUICK, keep=known[2:], threshold=1e-9, ridge=0.1)
    with editor.edit(lm, known[:2]).applied_to(lm):
        now = Site(1).linear(lm.model)(keys)
    assert close(now, Site(1).linear(lm.model)(keys))


def test_earlier_keys_are_kept_in_a_sequence(tiny, known):  # noqa: F811
    lm = tiny("qwen2", torch.float64)
    editor = AlphaEdit(1, **QUICK, ridge=0.05)
    (_, one), (_, two) = sequential(editor, lm, known[:2])
    step = two.changes[NAME].dense() - one.changes[NAME].dense()
    asked, _ = editor._begin(lm, known[:2])
    keys, _ = looked_up(lm, asked, Site(1), Site(1))
    with one.applied_to(lm):
        again = editor.edit(lm, known[1:2]).changes[NAME].dense()  # which knows of no earlier key
    assert (step @ keys[0]).norm() < 0.5 * (again @ keys[0]).norm()
    assert (step @ keys[1]).norm() > 0.5 * (again @ keys[1]).norm()


def test_a_threshold_that_leaves_nothing_is_refused(tiny):
    with pytest.raises(UserError, match=r"editor\.threshold=1e-12: leaves no direction of layer 2 to change"):
        AlphaEdit(2, threshold=1e-12).inverse(torch.eye(4, dtype=torch.float64), Site(2))
