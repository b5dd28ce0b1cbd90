"""What all published suites have in common: CounterFact, zsRE, MQuAKE and QFt's company facts."""

import importlib.util
import sys
from functools import partial
from types import SimpleNamespace
from unicodedata import normalize

import pytest
from test_company import company_record
from test_counterfact import counterfact_record, rewrite
from test_mquake import mquake_record
from test_zsre import zsre_record

from qfbench.editors import teach
from qfbench.facts.matching import stands_in
from qfbench.facts.rewrites import filled
from qfbench.models import dialogue as dialogue_module

RECORD = {
    "counterfact": counterfact_record,
    "zsre": zsre_record,
    "mquake": mquake_record,
    "company": company_record,
}
SUITES = tuple(RECORD)


@pytest.mark.parametrize("name", [s for s in SUITES if s != "company"])
def test_the_shipped_templates_tell_the_new_object_and_ask_without_it(suite, write, name):
    for fact in suite(name, write([RECORD[name](1)])):
        new = fact.known_as[0]
        assert stands_in(new, fact.instruction)
        assert stands_in(new, fact.answer)
        assert fact.answer.endswith(f"{new}.")
        assert not stands_in(new, fact.query)
        assert not stands_in(new, fact.replaces)
        assert fact.instruction != fact.query
        assert "{" not in fact.instruction + fact.query + fact.answer + fact.replaces


def new_object(name, record, new, old):
    """The record with another new object and old one."""
    if name == "zsre":
        return record | {"alt": new, "answers": [old]}
    own = record["requested_rewrite"]
    first = (own[0] if name == "mquake" else own) | {"target_new": {"str": new}, "target_true": {"str": old}}
    return record | {"requested_rewrite": [first, *own[1:]] if name == "mquake" else first}


@pytest.mark.parametrize("name", ["counterfact", "zsre", "mquake"])
@pytest.mark.parametrize(
    ("new", "said"),
    [
        ("Varn Inc.", "Varn Inc."),
        ("Varn & Sons, Ltd.", "Varn & Sons, Ltd."),
        ("Varnby!", "Varnby!"),
        ("Who?", "Who?"),
        ("城。", "城。"),
        ("Inc. Varn", "Inc. Varn."),
        ("Varn (Inc.)", "Varn (Inc.)."),
        ("3", "3."),
    ],
)
def test_an_object_with_a_stop_of_its_own_takes_no_second_one(suite, write, name, new, said):
    for pair in ((new, "Ostrel"), ("Ostrel", new)):
        fact = suite(name, write([new_object(name, RECORD[name](1), *pair)]))[0]
        text = fact.answer if pair[0] == new else fact.replaces
        assert text == said
        assert fact.instruction.endswith((f" {said}", " Ostrel."))
        assert fact.known_as[0] == pair[0]
        assert fact.rejects == (pair[1],)
        assert fact.edit.passes(fact.answer)
        assert not fact.edit.passes(fact.replaces)


@pytest.mark.parametrize(
    ("template", "said"),
    [("{object}.", "Inc."), ("{object}...", "Inc...."), ("({object}).", "(Inc.)."), ("{object}. {cloze}", "Inc. x")],
)
def test_only_one_stop_after_the_object_goes(template, said):
    assert filled(template, "Inc.", cloze="x") == said


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("counterfact", {"requested_rewrite": rewrite(1, new="West Varnby", old="Varnby")}),
        ("zsre", {"alt": "lord of Varnby", "answers": ["lord"]}),
        ("zsre", {"alt": "Varnby", "answers": ["New Varnby", "Varn"]}),
        ("mquake", {"new_answer": "Una Klee"}),
    ],
)
def test_a_reference_passes_its_own_probe(suite, write, name, change):
    for fact in suite(name, write([RECORD[name](1) | change])):
        assert fact.edit.passes(fact.answer)
        assert all(p.passes(p.expected) for p in fact.probes if p.expected)


@pytest.mark.parametrize(("name", "old"), [("counterfact", "Ostrel"), ("zsre", "Ostrel Town"), ("mquake", "Ostrel")])
def test_the_old_object_fails_an_edit_and_what_the_model_is_told(suite, write, name, old):
    fact = suite(name, write([RECORD[name](1)]))[0]
    assert old in fact.rejects
    for probe in (fact.edit, fact.told):
        assert probe.passes("It is Varnby.")
        assert not probe.passes(f"It is Varnby, once {old}.")
        assert probe.passes("It is Varnby, once Ostrelia.")


def spells(tokenizer, rendered, answer):
    """Check that the answer's span spells the answer, and that every word of it has a token."""
    spelt = tokenizer.decode(rendered.ids[rendered.answer : rendered.closer])
    composed = normalize("NFC", answer)  # Qwen's tokenizer composes accents
    if tokenizer.chat_template:
        assert spelt == composed
        assert rendered.ids[rendered.closer] == tokenizer.eos_token_id
    else:
        joined = rendered.closer == len(rendered.ids)  # the last token is the answer's and the line break
        assert spelt == f" {composed}" + ("\n" if joined else "")
        assert tokenizer.decode(rendered.reply) == f" {composed}\n"
    assert sorted(set(rendered.words)) == list(range(len(answer.split())))
    assert list(rendered.words) == sorted(rendered.words)


@pytest.fixture(scope="module")
def unchecked():
    """Modules without the tests' run-time type checks, which compile a nested function anew at each of 10,000 calls."""
    with pytest.MonkeyPatch.context() as patch:

        def load_again(module):
            spec = importlib.util.spec_from_file_location(f"unchecked_{module.__name__}", module.__file__)
            again = importlib.util.module_from_spec(spec)
            patch.setitem(sys.modules, spec.name, again)
            spec.loader.exec_module(again)
            return again

        yield SimpleNamespace(render=load_again(dialogue_module).render, lesson=load_again(teach).lesson)


@pytest.mark.parametrize("form", ["qwen", "plain_qwen"])
@pytest.mark.parametrize("name", SUITES)
def test_every_real_answer_can_be_found_in_its_dialogue(request, real, unchecked, name, form):
    try:
        tokenizer = request.getfixturevalue(f"{form}_tokenizer")
    except pytest.skip.Exception:  # without the shared data the suite is a sample, and the tokenizer the built-in one
        tokenizer = request.getfixturevalue(f"{form}_tokenizer".replace("qwen_", ""))
    assert bool(tokenizer.chat_template) == (form == "qwen")
    render = partial(unchecked.render, tokenizer)
    lm = SimpleNamespace(render=render, tokenizer=tokenizer)  # no more of a language model is used: nothing is run
    for fact in real(name):
        aligned = unchecked.lesson(lm, fact)
        told, alone = aligned.told, aligned.alone
        spells(tokenizer, told, fact.answer)
        spells(tokenizer, alone, fact.answer)
        taught = [told.ids[at + 1] for at in aligned.told_at]
        assert (
            taught
            == [alone.ids[at + 1] for at in aligned.alone_at]
            == list(told.ids[told.opener + 1 : told.closer + 1])
        )
        for probe in fact.probes:
            if probe.expected:
                spells(tokenizer, render(probe.query, probe.system, probe.expected), probe.expected)


@pytest.mark.parametrize(
    "name",
    ["counterfact", "zsre", "mquake", "company"],
)
def test_every_real_reference_passes_its_own_probe(real, name):
    for fact in real(name):
        assert fact.edit.passes(fact.answer)
        assert all(p.passes(p.expected) for p in fact.probes if p.expected)


@pytest.mark.parametrize("name", SUITES)
def test_real_locality_is_the_models_own_and_the_rest_has_a_reference(real, name):
    for fact in real(name):
        for probe in fact.probes:
            assert probe.own == probe.always == (probe.kind == "locality") == (probe.expected == "")
            assert probe.accept
