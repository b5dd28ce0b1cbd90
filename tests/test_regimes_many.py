"""Joint equals protected over many facts of models that ship, up to rounding; beyond the width they part."""

import pytest
import torch

from qfbench import LanguageModel
from qfbench.editors import QF
from qfbench.editors.regimes import joint, protected
from qfbench.facts.world import world
from qfbench.models.sites import Site

SHORT = ["country", "field", "product", "staff"]  # answers of 8 tokens or so: 50 facts stay below a width of 480


@pytest.mark.parametrize(
    ("model", "layer", "below", "above"),
    [("world-xs", 2, 28, 40), pytest.param("world-m", 5, 50, 66, marks=pytest.mark.slow)],
)
def test_joint_equals_protected_up_to_rounding_over_many_facts_and_not_beyond_the_width(model, layer, below, above):
    """Both are the least-norm change ΔW U'ᵀ = Rᵀ as long as the keys U' are independent. Either solve is backward stable, and a
    relative error ε of U' moves its pseudo-inverse by cond(U')·ε relatively: the bound is a hundred times that."""
    lm, editor = LanguageModel.load(model, device="cpu"), QF(layer, opener=0.0, closer=0.0)
    matrix = Site(layer).weight_name(lm.model)
    facts = world(above, relations=SHORT, paraphrases=0, prior=0, unknown=0)
    keys = [part.keys.double() for part in editor.recorded(lm, facts)]
    width = keys[0].shape[1]
    steps = [delta.changes[matrix].dense() for _, delta in protected(editor, lm, facts)]
    for n, (_, delta) in zip(range(1, below + 1), joint(editor, lm, facts), strict=False):
        together, far = delta.changes[matrix].dense(), torch.linalg.svdvals(torch.cat(keys[:n]))
        assert sum(map(len, keys[:n])) == len(far) < width
        condition = (far[0] / far[-1]).item()
        assert condition < 1e3  # independent, and far from the cut-off
        missed = ((steps[n - 1] - together).norm() / together.norm()).item()
        assert missed <= 100 * condition * torch.finfo(torch.float64).eps < 1e-8, n
    assert n == below
    assert sum(map(len, keys)) > width
    beyond = editor.edit(lm, facts).changes[matrix].dense()
    assert (steps[-1] - beyond).norm() > 0.1 * beyond.norm()


def test_facts_recorded_in_one_go_give_the_change_of_facts_recorded_one_by_one():
    """Rounding moves activations by some 1e-6 and the change by the condition of the keys times that, 24 facts being near the width."""
    lm, facts = LanguageModel.load("world-s", device="cpu"), world(24, paraphrases=0, prior=0, unknown=0)
    for editor in (QF(4), QF(4, opener=0.0, closer=0.0)):
        together, one_by_one = editor.record_all(lm, facts), [editor.record(lm, fact) for fact in facts]
        for a, b in zip(together, one_by_one, strict=True):
            assert ((a.keys - b.keys).norm(dim=1) < 1e-5 * b.keys.norm(dim=1)).all()
        assert not all(torch.equal(a.keys, b.keys) for a, b in zip(together, one_by_one, strict=True))
        (many,), (one,) = (editor.together(lm, parts).changes.values() for parts in (together, one_by_one))
        assert (many.dense() - one.dense()).norm() < 1e-4 * one.norm()
