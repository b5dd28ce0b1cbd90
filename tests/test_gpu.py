"""What must hold on a GPU as on a CPU: `pytest -m gpu` on a machine that has one; elsewhere the same on the CPU."""

import pytest
import torch

from qfbench import LanguageModel
from qfbench.editors import QF, QF2
from qfbench.editors.regimes import sequential
from qfbench.facts.world import world
from qfbench.models.tree import Question
from qfbench.models.whole import Whole

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FACTS = world(6, paraphrases=0, prior=0, unknown=0)


def load(name="world-xs", dtype="float32", device=DEVICE):
    return LanguageModel.load(name, device=device, dtype=dtype)


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_a_recording_depends_on_its_company_by_rounding_alone(dtype, bound):
    lm, editor = load(dtype=dtype), QF(2)
    for fact, together in zip(FACTS, editor.record_all(lm, FACTS), strict=True):
        alone = editor.record(lm, fact)
        assert together.keys.device.type == DEVICE
        assert ((together.keys - alone.keys).norm(dim=1) < bound * alone.keys.norm(dim=1)).all()
        assert (together.keys[1:] - together.keys[:-1]).norm() > bound * alone.keys.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "editor"), [("world-xs", QF(2)), ("world-s-qf2", QF2(4, lr=1e-3))])
def test_an_edit_is_that_of_a_cpu_and_is_put_back_bit_for_bit(name, editor, dtype):
    lm, other = load(name, dtype), load(name, dtype, "cpu")
    before, bound = lm.weights_hash(), 1e-3 if dtype == "float32" else 0.1
    for (_, there), (_, here) in zip(sequential(editor, lm, FACTS), sequential(editor, other, FACTS), strict=True):
        (a,), (b,) = (delta.changes.values() for delta in (there, here))
        assert (a.dense().cpu() - b.dense()).norm() < bound * b.norm()
        with there.applied_to(lm):
            assert lm.weights_hash() != before
        assert lm.weights_hash() == before


def test_the_cut_model_says_what_the_whole_one_says():
    lm = load()
    prompts = [lm.render(fact.query) for fact in FACTS]
    *_, (_, delta) = sequential(QF(2), lm, FACTS)
    with delta.applied_to(lm):
        replies = [reply.text for reply in lm.replies(prompts)]
        for n in (1, len(prompts)):
            said = [
                answer.said for answer in Whole(lm.model, lm.ending).answer([Question(p.prompt) for p in prompts[:n]])
            ]
            assert replies[:n] == [t.strip() for t in lm.tokenizer.batch_decode(said, skip_special_tokens=True)]
