"""Joint equals protected over fifty facts of a model that ships, up to rounding; beyond the width they part."""

import pytest
import torch

from qfbench import LanguageModel
from qfbench.editors import QF
from qfbench.editors.regimes import protected
from qfbench.facts.world import world

SITE = "model.layers.5.mlp.down_proj.weight"
SHORT = ["country", "field", "product", "staff"]  # answers of 8 tokens or so: 50 facts stay below the width of 480
FACTS, BEYOND = 50, 66


@pytest.fixture(scope="module")
def lm():
    return LanguageModel.load("world-m", device="cpu")


def test_joint_equals_protected_up_to_rounding_over_fifty_facts_and_not_beyond_the_width(lm):
    """Both are the least-norm change ΔW U'ᵀ = Rᵀ as long as the keys U' are independent. Either solve is backward stable, and a
    relative error ε of U' moves its pseudo-inverse by cond(U')·ε relatively: the bound is a hundred times that."""
    editor = QF(layer=5, opener=0.0, closer=0.0)
    facts = world(BEYOND, relations=SHORT, paraphrases=0, prior=0, unknown=0)
    keys = [editor.record(lm, fact).keys for fact in facts]
    width = keys[0].shape[1]
    steps = [delta.changes[SITE].dense() for _, delta in protected(editor, lm, facts)]
    for n in (1, 2, 3, 5, 8, 13, 21, 34, FACTS):
        joint = editor.edit(lm, facts[:n])  # test_regimes.py: bit for bit
        together, far = joint.changes[SITE].dense(), torch.linalg.svdvals(torch.cat(keys[:n]))
        assert sum(map(len, keys[:n])) == len(far) < width
        condition = (far[0] / far[-1]).item()
        assert condition < 1e3  # independent, and far from the cut-off
        missed = ((steps[n - 1] - together).norm() / together.norm()).item()
        assert missed <= 100 * condition * torch.finfo(torch.float64).eps < 1e-8, n
    assert sum(map(len, keys)) > width
    beyond = editor.edit(lm, facts).changes[SITE].dense()
    assert (steps[-1] - beyond).norm() > 0.1 * beyond.norm()
