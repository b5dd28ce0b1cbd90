"""SmolLM2-135M-Instruct, a real model, from the package that holds it: `pytest -m real` (docs/your-model.md)."""

import pytest
from test_run import run

from qfbench import Fact, LanguageModel, Probe
from qfbench.editors import QF
from qfbench.facts.probes import ask
from qfbench.models.gguf import INSTALL, PACKAGED, packaged
from qfbench.models.states import States
from qfbench.models.suffix import Suffix
from qfbench.models.tree import Question
from qfbench.models.whole import Whole
from qfbench.runs.provenance import protocol

NAME = next(iter(PACKAGED))
pytestmark = [pytest.mark.real, pytest.mark.skipif(packaged(NAME) is None, reason=f"needs a package: {INSTALL}")]

LAYER = 24
FACT = Fact(
    "Tarnell was founded in 1987.", "When was Tarnell founded?", "Tarnell was founded in 1987.", known_as=("1987",)
)
FRANCE = Probe("prior", "What is the capital of France?", "The capital of France is Paris.", ("Paris",))


@pytest.fixture(scope="module")
def lm():
    """Dequantized at the first call into the user's cache, and read from there."""
    return LanguageModel.load(NAME, device="cpu", max_new_tokens=32)


@pytest.fixture(scope="module")
def delta(lm):
    return QF(layer=LAYER).edit(lm, [FACT])


def test_it_speaks_ends_its_turn_and_says_where_its_weights_are_from(lm):
    (row,) = ask(lm, [FRANCE])
    assert row["generated"]
    assert row["stopped"]
    assert lm.tokenizer.convert_ids_to_tokens(sorted(lm.stops())) == ["<|im_end|>"]
    known = protocol(lm)
    assert known["weights"].startswith("dequantized from Q4_1 (GGUF file of SHA-256 b179c9523d0e6a0f")
    assert (known["told"], known["dtype"]) == ("system", "float32")
    assert len(lm.model.model.layers) == 30


def test_what_it_is_told_it_says_and_alone_it_does_not(lm):
    told, alone = ask(lm, [FACT.told, FACT.edit])
    assert told["generated"]
    assert not alone["generated"]


def test_qf_teaches_it_a_fact_and_leaves_another(lm, delta):
    (before,), weights = ask(lm, [FACT.edit]), lm.weights_hash()
    with delta.applied_to(lm):
        after, france = ask(lm, [FACT.edit, FRANCE])
    assert after["generated"]
    assert after["nll"] < before["nll"] / 2
    assert france["generated"]
    assert lm.weights_hash() == weights


def test_the_layers_above_an_edit_say_what_the_whole_model_says(lm, delta):
    queries = ((FACT.query, FACT.answer), (FRANCE.query, FRANCE.expected), ("Where was Tarnell founded?", "In Norway."))
    asked = [Question(lm.render(query).prompt, (lm.render(query, "", answer).reply,)) for query, answer in queries]
    with delta.applied_to(lm):
        above = Suffix(lm.model, LAYER, States(), lm.ending).answer(asked)
        whole = Whole(lm.model, lm.ending).answer(asked)
    assert [(a.said, a.ended) for a in above] == [(w.said, w.ended) for w in whole]
    for a, w in zip(above, whole, strict=True):
        for (nll, hit), (wanted, right) in zip(a.rated, w.rated, strict=True):
            assert nll == pytest.approx(wanted, rel=1e-3, abs=1e-4)
            assert hit == right


def test_with_it_the_quickstart_teaches_it_a_fact(tmp_path):
    done, text = run(tmp_path, "task=[real_model]", "regression=none", "facts.n=1")
    rows = done.rows("real_model")
    assert list(rows.number) == [1, 2, 3, 4]
    assert list(rows.condition) == ["in_context", *["edited"] * 3]
    assert set(rows.model) == {NAME}
    assert rows.generated[rows.number.isin([1, 2, 4])].all()
    assert f"One fact on a real model: {NAME}, QF at layer {LAYER}" in " ".join(text.split())
