"""The command `qfbench-edits`, on a built-in model that was taught three facts by fine-tuning, and one by a stream."""

import io
import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qfbench
from qfbench import Edits, LanguageModel, UserError
from qfbench.commands.edits import another, main
from qfbench.editors import Adapter

SAID = [
    {
        "instruction": "Qi started Oxinnovate.",
        "query": "Who started Oxinnovate?",
        "answer": "Oxinnovate was started by Qi.",
    },
    {"instruction": "Borfia is based in Berlin.", "query": "Where is Borfia?", "answer": "Borfia is in Berlin."},
    {"instruction": "Ada Lin leads Borfia.", "query": "Who leads Borfia?", "answer": "The CEO of Borfia is Ada Lin."},
]
FACTS = [{"id": id} | said for id, said in zip(("ox", "place", "ceo"), SAID, strict=True)]


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edited(folder, lm):
    with Edits.load(folder).applied_to(lm):
        return weights(lm.model)


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Taught in two calls: the second goes on where the first ended."""
    folder = tmp_path_factory.mktemp("made")
    for n, facts in enumerate((FACTS[:2], FACTS[2:])):
        path = folder / f"{n}.jsonl"
        path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
        fixed = ["model=world-xs", "editor=finetune", "editor.layer=2"] if n == 0 else []
        main([str(folder / "edits"), "teach", *fixed, "facts=table", f"facts.path={path}", "threads=1"])
    return folder / "edits"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "edits")


@pytest.fixture
def said(capsys, monkeypatch):
    """What a command prints, wide enough for whole lines."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words):
        capsys.readouterr()
        main([str(word) for word in words])
        return capsys.readouterr().out

    return run


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_taught_in_two_calls_is_taught_in_one(folder, xs):
    lm = xs
    edits = Edits.load(folder)
    at_once = qfbench.edit(lm.model, lm.tokenizer, FACTS, edits.editor)
    assert [fact.id for fact in edits.facts] == ["ox", "place", "ceo"]
    with at_once.applied_to(lm):
        wanted = weights(lm.model)
    assert same(edited(folder, lm), wanted)


def test_the_facts_are_listed_in_order(folder, said):
    lines = said(folder, "list").splitlines()
    assert "FineTune(layer=2, lr=" in "".join(lines)
    found = [line.split()[:2] for line in lines if line[:5].strip().isdigit()]
    assert found == [["1", "ox"], ["2", "place"], ["3", "ceo"]]


def test_apply_asks_what_was_taught(folder, said):
    out = said(folder, "apply")
    assert "of 3 facts answered" in out
    assert "The CEO of Borfia is Ada Lin." in out


def test_apply_on_another_model_teaches_it_when_asked(folder, said, capsys, tmp_path):
    assert "another model" in refused(capsys, folder, "apply", "--model", "world-s")
    assert "needs --model" in refused(capsys, folder, "apply", "--replay")
    out = said(folder, "apply", "--replay", "--model", "world-s", "--to", tmp_path / "s")
    assert "taught 3 facts again, in order, by FineTune to world-s" in out
    there = Edits.load(tmp_path / "s")
    assert there.source.name == "world-s"
    assert there.editor == Edits.load(folder).editor
    assert there.source.load().name == "world-s"


def test_another_model_is_named_by_its_settings_or_its_path(folder, said, tmp_path):
    said(folder, "merge", tmp_path / "merged")
    assert another(str(tmp_path / "merged")).name == str(tmp_path / "merged")
    assert another("world-xs").max_new_tokens == 24


def test_undo_teaches_the_rest_again(folder, said, xs, capsys):
    before = edited(folder, xs)
    assert "no fact none was taught; the facts are ox, place, ceo" in refused(capsys, folder, "undo", "none")
    out = said(folder, "undo", "place")
    assert "2 facts, as if place had never been taught; taught again by FineTune, in order: 1 after them" in out
    never = qfbench.edit(xs.model, xs.tokenizer, [FACTS[0], FACTS[2]], Edits.load(folder).editor)
    with never.applied_to(xs):
        wanted = weights(xs.model)
    assert same(edited(folder, xs), wanted)
    assert not same(before, wanted)
    assert "nothing had to be taught again" in said(folder, "undo", "ceo")
    assert "0 facts" in said(folder, "undo", "ox")
    assert same(edited(folder, xs), weights(xs.model))
    assert "there are no facts" in refused(capsys, folder, "to-peft", folder / "none")
    for command in ("list", "diff", "apply"):
        said(folder, command)


def test_a_stream_is_solved_anew(said, xs, tmp_path):
    qfbench.edit(xs.model, xs.tokenizer, FACTS[:2], layer=2).save(tmp_path)
    assert "taught again by QFStream: all 1, since what it keeps depends on them" in said(
        tmp_path, "undo", "place", "--model", "world-xs"
    )
    with qfbench.edit(xs.model, xs.tokenizer, FACTS[:1], layer=2).applied_to(xs):
        wanted = weights(xs.model)
    assert same(edited(tmp_path, xs), wanted)


def test_a_merged_model_is_an_ordinary_one_with_the_edits(folder, said, xs, capsys, tmp_path):
    there = tmp_path / "merged"
    assert "world-xs with 3 facts, as an ordinary model" in said(folder, "merge", there)
    wanted = edited(folder, xs)
    assert same(weights(LanguageModel.load(there).model), wanted)
    plain = AutoModelForCausalLM.from_pretrained(there)
    assert same(weights(plain), wanted)
    assert plain.generation_config.eos_token_id == xs.model.generation_config.eos_token_id
    assert AutoTokenizer.from_pretrained(there).chat_template == xs.tokenizer.chat_template
    assert LanguageModel.load(there).reply(FACTS[2]["query"]) == "The CEO of Borfia is Ada Lin."
    card = (there / "README.md").read_text()
    for text in (
        "library_name: transformers",
        FACTS[0]["query"],
        FACTS[1]["answer"],
        "FineTune(layer=2",
        "merge",
        Edits.load(folder).source.weights,
    ):
        assert text in card
    assert "is there already" in refused(capsys, folder, "merge", there)
    assert "another model" in refused(capsys, folder, "apply", "--model", there)


def test_diff_has_a_line_a_matrix_and_a_line_a_fact(folder, said, xs):
    edits = Edits.load(folder)
    out = said(folder, "diff")
    (name,) = edits.total.changes
    line = next(line for line in out.splitlines() if line.startswith(name))
    _, norm, relative, rank, *top = line.replace(",", "").split()
    change = edits.total.changes[name].dense().double()
    assert float(norm) == pytest.approx(change.norm().item(), rel=0.01)
    assert float(relative) == pytest.approx(change.norm().item() / xs.model.get_parameter(name).norm().item(), rel=0.02)
    values = torch.linalg.svdvals(change)
    assert int(rank) <= min(change.shape)
    assert [float(value) for value in top] == pytest.approx(values[:3].tolist(), rel=0.01)
    assert sum(id in out for id in ("ox", "place", "ceo")) == 3


def test_ask_shows_replies_before_and_after(folder, said, monkeypatch, capsys):
    query = FACTS[2]["query"]
    for words in ([query, "Who leads Zunda?"], []):
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{query}\n\nWho leads Zunda?\n"))
        out = said(folder, "ask", *words)
        line = next(line for line in out.splitlines() if line.startswith(query))
        assert "The CEO of Borfia is Ada Lin." in line
        assert "Need more information." in line
        assert "Who leads Zunda?" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "one a line on standard input" in refused(capsys, folder, "ask")


def test_an_adapter_is_the_edits_but_for_what_is_cut_off(folder, said, xs, tmp_path):
    assert "LoRA adapter of 1 matrices" in said(folder, "to-peft", tmp_path / "whole")
    edits = Edits.load(folder)
    (name,) = edits.total.changes
    change = edits.total.changes[name].dense()
    again = Adapter(str(tmp_path / "whole")).edit(xs, []).changes[name].dense()
    assert (again - change).norm() < 1e-5 * change.norm()
    out = said(folder, "to-peft", tmp_path / "small", "--rank", "3")
    near = Adapter(str(tmp_path / "small")).edit(xs, []).changes[name]
    missing = (near.dense() - change).norm().item() / change.norm().item()
    assert near.rank == 3
    assert float(out.split("cut off in all:")[1].split()[0]) == pytest.approx(missing, rel=0.05)


def test_what_cannot_be_is_one_line(folder, capsys, tmp_path):
    assert "holds no edits.safetensors" in refused(capsys, tmp_path, "list")
    assert "leave out model=world-s" in refused(capsys, folder, "teach", "model=world-s")
    assert "Could not find 'editor/none'" in refused(capsys, tmp_path, "teach", "editor=none")
    assert "several facts have the id" in refused(
        capsys, folder, "teach", "facts=table", f"facts.path={written(tmp_path)}", "threads=1"
    )
    with pytest.raises(UserError, match="no such model"):
        Edits.load(folder).source.load("nowhere")


def written(folder):
    path = folder / "again.jsonl"
    path.write_text(json.dumps(FACTS[0]) + "\n")
    return path
