"""Edits as things: what is saved is what was taught, what is undone was never taught, and no other model is touched."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import CONFIGS
from hydra import compose, initialize_config_dir

import qfbench
from qfbench import Edits, Fact, LanguageModel, UserError
from qfbench.commands.settings import CONF
from qfbench.editors import MEMIT, QF, ROME, AlphaEdit, FineTune, QFStream, Replay
from qfbench.editors.edits import FILE
from qfbench.editors.recursive import Stream
from qfbench.editors.regimes import sequential
from qfbench.models.delta import WeightDelta
from qfbench.models.firing import with_firing_layers


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edited(edits, lm):
    with edits.applied_to(lm):
        return weights(lm.model)


def close(a, b, tolerance=1e-8):
    assert a.total.changes.keys() == b.total.changes.keys()
    pairs = [(a.total.changes[name].dense(), b.total.changes[name].dense()) for name in a.total.changes]
    return all((x - y).norm() <= tolerance * y.norm() for x, y in pairs)


EDITORS = [QF(1), FineTune(1, lr=0.05, steps=3), QFStream(1, penalty=1.0), QFStream(1, (0, 2), penalty=1.0, refresh=2)]


@pytest.fixture(params=EDITORS, ids=lambda editor: f"{type(editor).__name__}-{len(editor.sites)}")
def editor(request):
    return request.param


def test_what_is_saved_and_loaded_gives_the_same_bits(tiny, facts, editor, tmp_path):
    lm = tiny("qwen2")
    before = weights(lm.model)
    edits = Edits.teach(lm, editor, facts)
    assert same(weights(lm.model), before)
    edits.save(tmp_path / "new" / "folder")
    again = Edits.load(tmp_path / "new" / "folder")
    assert (again.facts, again.source, again.sizes) == (edits.facts, edits.source, edits.sizes)
    assert repr(again.editor) == repr(editor).replace("(0, 2)", "[0, 2]").replace("=()", "=[]")
    taught = edited(edits, lm)
    assert same(edited(again, lm), taught)
    assert not same(taught, before)
    assert same(weights(lm.model), before)


def test_edits_are_what_the_regime_gives(tiny, facts, editor):
    lm = tiny("llama")
    *_, (_, total) = sequential(editor, lm, facts)
    with total.applied_to(lm):
        wanted = weights(lm.model)
    assert same(edited(Edits.teach(lm, editor, facts), lm), wanted)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_undone_was_never_taught(tiny, facts, editor, which):
    lm = tiny("qwen2", torch.float64)
    left = [fact for n, fact in enumerate(facts) if n != which]
    edits = Edits.teach(lm, editor, facts).without(lm, [facts[which].id])
    never = Edits.teach(lm, editor, left)
    assert edits.facts == never.facts == tuple(left)
    assert close(edits, never)  # a pass over other company may differ in the last bits
    assert not close(edits, Edits.teach(lm, editor, facts), 1e-3)


SUBJECTS = ("Oxinnovate", "Zenvora", "Kelpworks")
QUICK = {"contexts": 0, "steps": 3}
KEEPING = [
    lambda keep: QFStream(1, keep=keep, penalty=1.0),
    lambda keep: Replay(1, lr=0.05, steps=3, keep=keep, replay=2),
    lambda keep: ROME(1, keep=keep, **QUICK),
    lambda keep: MEMIT(1, keep=keep, **QUICK),
    lambda keep: AlphaEdit(1, keep=keep, threshold=1.0, **QUICK),
]


@pytest.mark.parametrize("made", KEEPING)
def test_what_the_undone_fact_asks_is_kept_again(tiny, facts, made):
    """The last fact asks what is to be kept, so that the changes of those before it are others without it."""
    lm = tiny("qwen2", torch.float64)
    facts = [replace(fact, subject=subject) for fact, subject in zip(facts, SUBJECTS, strict=True)]
    asked = [Fact("Bo leads A.", query, "Bo leads A.", id=query) for query in (facts[-1].query, "Who leads A?")]
    editor = made(asked)
    undone = Edits.teach(lm, editor, facts).without(lm, [facts[-1].id])
    assert close(undone, Edits.teach(lm, editor, facts[:-1]))


def test_the_last_undone_leaves_the_bits_of_those_before(tiny, facts):
    lm = tiny("qwen2")
    edits = Edits.teach(lm, FineTune(1, lr=0.05, steps=3), facts)
    left = edits.without(lm, [facts[-1].id])
    assert list(left.changes) == list(edits.changes[:-1])  # the same values, not taught again
    assert not same(edited(left, lm), edited(edits, lm))
    none = edits.without(lm, [fact.id for fact in facts])
    assert same(edited(none, lm), weights(lm.model))


def test_undone_in_a_stream_is_taken_out_by_a_weight_below_0(tiny, facts, monkeypatch):
    """The other way to the same: recursive least squares run backwards, from what the whole stream left."""
    lm = tiny("qwen2", torch.float64)
    said, streams, teach = [], [], Stream.teach

    def noted(stream, keys, wanted, weights):
        said.append((keys, wanted, weights))
        streams.append(stream)
        return teach(stream, keys, wanted, weights)

    monkeypatch.setattr(Stream, "teach", noted)
    edits = Edits.teach(lm, QFStream(1, penalty=1.0), facts)
    monkeypatch.undo()
    stream = streams[-1]
    keys, wanted, significance = said[0]
    whole = stream.change
    stream.teach(keys, wanted, -significance)
    undone = edits.without(lm, [facts[0].id])
    (change,) = undone.total.changes.values()
    assert (change.dense() - stream.change).norm() <= 1e-8 * stream.change.norm()
    assert (change.dense() - whole).norm() > 1e-3 * whole.norm()


def test_further_facts_go_on_where_the_first_ended(tiny, facts, editor):
    lm = tiny("qwen2", torch.float64)
    some = Edits.teach(lm, editor, facts[:2])
    assert close(some.more(lm, facts[2:]), Edits.teach(lm, editor, facts))
    with pytest.raises(UserError, match=f"several facts have the id {facts[0].id}"):
        some.more(lm, facts[:1])


def test_another_model_is_refused_and_left_alone(tiny, facts):
    lm, other = tiny("qwen2"), tiny("qwen2")
    other.model.get_parameter("model.norm.weight").data[0] += 1
    edits = Edits.teach(lm, QF(1), facts)
    before = weights(other.model)
    for use in (lambda: edits.applied_to(other).__enter__(), lambda: edits.applied_to(other.model).__enter__()):
        with pytest.raises(UserError, match="it is another model, or an edited one.*--replay --model"):
            use()
    with pytest.raises(UserError, match="another model"):
        edits.without(other, [facts[0].id])
    with edits.applied_to(lm), pytest.raises(UserError, match="an edited one"), edits.applied_to(lm):
        pass
    assert same(weights(other.model), before)


def test_firing_layers_make_another_model_of_the_same_weights(tiny, facts):
    lm = tiny("qwen2")
    edits = Edits.teach(lm, QF(1), facts)
    with pytest.raises(UserError, match="another model"):
        edits.source.check(with_firing_layers(lm.model, [1]))


def test_an_unknown_id_is_refused_by_name(tiny, facts):
    lm = tiny("qwen2")
    with pytest.raises(UserError, match="no fact none was taught; the facts are fact-0, fact-1, fact-2"):
        Edits.teach(lm, QF(1), facts).without(lm, ["fact-1", "none"])


def test_a_damaged_missing_or_foreign_file_is_refused(tiny, facts, tmp_path):
    with pytest.raises(UserError, match=rf"holds no {FILE}"):
        Edits.load(tmp_path)
    Edits.teach(tiny("qwen2"), QF(1), facts).save(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b"Oxinnovate", b"Oxinnovata")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"edits\.safetensors: (is damaged|cannot be read)"):
            Edits.load(tmp_path)
    path.write_bytes(whole)
    assert Edits.load(tmp_path).facts == tuple(facts)
    WeightDelta().save(path)
    with pytest.raises(UserError, match=r"not one written by Edits\.save"):
        Edits.load(tmp_path)


@dataclass(frozen=True)
class Foreign(QF):
    """Of no installed package."""


def test_only_editors_that_are_installed_are_built(tiny, facts, tmp_path):
    Edits.teach(tiny("qwen2"), Foreign(1), facts).save(tmp_path)
    with pytest.raises(UserError, match=r"test_edits\.Foreign, which is not installed"):
        Edits.load(tmp_path)


def test_what_is_to_stay_is_kept_with_the_editor(tiny, facts, tmp_path):
    lm = tiny("qwen2")
    edits = Edits.teach(lm, QFStream(1, keep=facts[2:]), facts[:2])
    edits.save(tmp_path)
    again = Edits.load(tmp_path)
    assert list(again.editor.keep) == facts[2:]
    assert same(edited(again.without(lm, [facts[0].id]), lm), edited(edits.without(lm, [facts[0].id]), lm))


# The library


@pytest.mark.parametrize("arch", list(CONFIGS))
def test_a_model_in_memory_is_edited_without_a_command_line(tiny, facts, arch, tmp_path):
    lm = tiny(arch)
    model, tokenizer = lm.model, copy.deepcopy(lm.tokenizer)
    model.requires_grad_(True).train()
    before, template = weights(model), tokenizer.chat_template
    edits = qfbench.edit(model, tokenizer, facts, layer=1, keep=[])
    assert same(weights(model), before)
    assert model.training
    assert all(part.training for part in model.modules())
    assert tokenizer.chat_template == template
    with edits.applied_to(model) as changed:
        assert changed is model
        taught = weights(model)
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 2, 3]]))
    assert same(weights(model), before)
    assert [name for name in before if not torch.equal(before[name], taught[name])] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    edits.save(tmp_path)
    with Edits.load(tmp_path).applied_to(model):
        assert same(weights(model), taught)


def test_an_editor_is_named_with_its_settings_or_given(tiny, facts):
    lm = tiny("qwen2")
    record = {"instruction": facts[0].instruction, "query": facts[0].query, "answer": facts[0].answer, "id": "fact-0"}
    edits = qfbench.edit(lm.model, lm.tokenizer, [record], "finetune", layer=1, lr=0.05, steps=3)
    assert edits.editor == FineTune(1, 0.05, 3)
    given = qfbench.edit(lm.model, lm.tokenizer, facts[:1], FineTune(1, 0.05, 3))
    assert same(edited(edits, lm), edited(given, lm))
    assert qfbench.edit(lm.model, lm.tokenizer, [record], "qf").editor.layer == 2  # round(23 / 28 * 3)
    kept = qfbench.edit(lm.model, lm.tokenizer, [record], keep=facts[1:]).editor.keep
    assert list(kept) == facts[1:]


@pytest.mark.parametrize(
    ("editor", "settings", "error"),
    [
        ("none", {}, "Could not find 'editor/none'"),
        ("qf", {"layers": 2}, "layers: editor=qf has no such setting; it has layer, opener"),
        ("qf", {"layer": "two"}, "editor.layer=two: must be a whole number"),
        ("qf", {"layer": 3}, "editor.layer=3: the model has layers 0 to 2"),
        (QF(1), {"layer": 2}, "layer: an editor has its settings already"),
        ("adapter", {}, "editor.path is needed"),
    ],
)
def test_what_cannot_be_is_refused(tiny, facts, editor, settings, error):
    lm = tiny("qwen2")
    with pytest.raises(UserError, match=error):
        qfbench.edit(lm.model, lm.tokenizer, facts, editor, **settings)


def test_a_fact_that_lacks_a_field_is_named(tiny):
    lm = tiny("qwen2")
    with pytest.raises(UserError, match="facts, record 1: the field 'answer' is missing"):
        qfbench.edit(lm.model, lm.tokenizer, [{"instruction": "Qi started X.", "query": "Who?"}])


def test_a_program_under_hydra_may_call_it(tiny, facts):
    lm = tiny("qwen2")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        qfbench.edit(lm.model, lm.tokenizer, facts, "qf")
        assert compose("config", overrides=["editor=qf2"]).editor._target_.endswith("QF2")


def test_a_trained_model_answers_by_what_it_was_taught():
    lm = LanguageModel.load("world-xs")
    fact = Fact("Qi started Oxinnovate.", "Who started Oxinnovate?", "Oxinnovate was started by Qi.")
    edits = qfbench.edit(lm.model, lm.tokenizer, [fact])
    assert not fact.edit.passes(lm.reply(fact.query))
    with edits.applied_to(lm):
        assert fact.edit.passes(lm.reply(fact.query))
