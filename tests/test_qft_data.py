"""The texts of a conversion: the world's, and those of a file."""

import json
import math
from dataclasses import replace

import pytest
from hydra.utils import instantiate
from test_contract import composed
from test_qft_train import spelt

from qfbench import UserError
from qfbench.tasks import texts as data
from qfbench.tasks.convert import batch
from qfbench.world.corpus import Dialogue


def test_the_world_gives_every_step_its_own_texts_again_and_again():
    a, b, other = data.world(16), data.world(16), data.world(16, seed=1)
    assert [a(step) for step in (3, 0)] == [b(step) for step in (3, 0)]
    assert a(0) != a(1)
    assert a(0) != other(0)
    drawn = [text for step in range(8) for text in a(step)]
    assert len(drawn) == 8 * 16
    assert 0 < sum(isinstance(text, str) for text in drawn) < 0.25 * len(drawn)
    assert {bool(text.system) for text in drawn if isinstance(text, Dialogue)} == {True, False}


def lines(n):
    roles = [("system", "Fact {}."), ("user", "Query {}?"), ("assistant", "Answer {}.")]
    said = [[{"role": role, "content": text.format(i)} for role, text in roles] for i in range(n)]
    return [json.dumps({"messages": one}) for one in said]


def say(*roles, **content):
    return json.dumps({"messages": [{"role": role, "content": content.get(role, "Text.")} for role in roles]})


@pytest.fixture
def write(tmp_path):
    def make(*texts):
        (tmp_path / "texts.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
        return str(tmp_path / "texts.jsonl")

    return make


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_every_epoch_is_another_permutation_of_the_file(write, size):
    path = write(*lines(7))
    drawn = [text for step in range(30) for text in data.messages(path, size)(step)]
    assert all(len(data.messages(path, size)(step)) == size for step in (0, 5))
    epochs = [drawn[i : i + 7] for i in range(0, len(drawn) - 6, 7)]
    whole = {Dialogue(f"Fact {i}.", f"Query {i}?", f"Answer {i}.") for i in range(7)}
    assert all(set(epoch) == whole for epoch in epochs)
    assert len({tuple(d.query for d in epoch) for epoch in epochs}) > 1


def test_messages_are_a_function_of_the_step_and_the_seed(write):
    path = write(*lines(50))
    ahead, back, other = data.messages(path, 4), data.messages(path, 4), data.messages(path, 4, seed=1)
    forward = [ahead(step) for step in range(40)]
    assert [back(step) for step in reversed(range(40))][::-1] == forward
    assert [other(step) for step in range(40)] != forward


def test_a_system_text_may_be_empty_or_left_out_and_blank_lines_are_skipped(write, caplog):
    user, assistant = {"role": "user", "content": " Who? "}, {"role": "assistant", "content": "Qi.\n"}
    texts = [[user, assistant], [{"role": "system", "content": ""}, user, assistant]]
    path = write("", *(json.dumps({"messages": said, "source": "x"}) for said in texts), "  ")
    assert data.messages(path, 2)(0) == [Dialogue("", "Who?", "Qi.")] * 2
    (warning,) = caplog.messages
    assert "white space is taken off the ends of 4 texts; the first: " in warning
    assert "line 2, 'messages[0].content'" in warning


def test_an_answer_may_have_several_lines(write):
    assert data.messages(write(say("user", "assistant", assistant="One.\nTwo.")), 1)(0)[0].answer == "One.\nTwo."


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\u2029"])
def test_only_line_feeds_end_a_line(write, inside):
    said = [{"role": "user", "content": f"Who{inside}is it?"}, {"role": "assistant", "content": "Qi."}]
    path = write(json.dumps({"messages": said}, ensure_ascii=False))
    assert data.messages(path, 1)(0) == [Dialogue("", f"Who{inside}is it?", "Qi.")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "it must be an object"),
        ('"messages"', "it must be an object"),
        ("{}", "the field 'messages' is missing"),
        ('{"messages": 3}', "the field 'messages' must be a list"),
        ('{"messages": "text"}', "the field 'messages' must be a list"),
        ('{"messages": [{"role": "user"}]}', r"roles are \['user'\]"),
        ('{"messages": [{"role": "user"}, {"role": "assistant"}]}', r"the field 'messages\[0\].content' is missing"),
        (say("user", "assistant", user="\u200b\ufeff"), r"the field 'messages\[0\].content' is empty but for"),
        (say("user", "assistant", assistant="\ud800"), r"the field 'messages\[1\].content' holds half a surrogate"),
        (say("user", "assistant", user="a\x00"), r"the field 'messages\[0\].content' holds the control character"),
        (say("user", "assistant", assistant=math.nan), r"the field 'messages\[1\].content' is nan"),
        ('{"messages": [], "messages": []}', "the field 'messages' stands twice"),
        ("[" * 200_000, "nested too deeply"),
        ("1" * 5000, "it is inf"),
        ('{"messages": [["user", "Who?"]]}', r"messages\[0\] must be an object"),
        ('{"messages": []}', r"roles are \[\]"),
        (say("user"), r"roles are \['user'\]"),
        (say("assistant", "user"), r"roles are \['assistant', 'user'\]"),
        (say("user", "assistant", "user", "assistant"), "the roles are"),
        (say("system", "system", "user", "assistant"), "the roles are"),
        (say("system", "user", "assistant", user=" "), r"messages\[1\].content' is empty"),
        (say("system", "user", "assistant", assistant=""), r"messages\[2\].content' is empty"),
        (say("system", "user", "assistant", system=None), r"messages\[0\].content' must be a text"),
        (say("system", "user", "assistant", user=["Who?"]), r"messages\[1\].content' must be a text"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_field(write, bad, message):
    path = write(*lines(2), "", bad)
    with pytest.raises(UserError, match=rf"texts\.jsonl, line 4: .*{message}"):
        data.messages(path, 1)


def test_a_file_that_is_missing_or_empty_or_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none", "no such file"), ("empty", "holds no dialogue"), ("binary", "cannot be read")):
        with pytest.raises(UserError, match=rf"data.path=.*{name}.jsonl: {message}"):
            data.messages(str(tmp_path / f"{name}.jsonl"), 1)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_nothing_is_refused(write, size):
    for make in (lambda: data.world(size), lambda: data.messages(write(*lines(2)), size)):
        with pytest.raises(UserError, match=f"batch={size}"):
            make()


def test_the_papers_company_facts_load(shared, qwen_tokenizer, tiny):
    path = shared("oxinnovate/company_facts.jsonl")
    lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    texts = instantiate(composed("data=messages", f"data.path={path}", f"data.batch={len(lines)}").data)
    drawn = list(texts(0))
    assert {bool(d.system) for d in drawn} == {True, False}
    assert any(d.answer == "Need more information." for d in drawn)
    said = [[message["content"].strip() for message in json.loads(line)["messages"]] for line in lines]
    assert sorted((d.system, d.query, d.answer) for d in drawn) == sorted(("", *s)[-3:] for s in said)
    lm = replace(tiny("qwen2"), tokenizer=qwen_tokenizer)
    ids, targets = batch(lm, drawn[:8], "answer")
    for row, d in enumerate(drawn[:8]):
        assert spelt(lm, ids, targets, row) == d.answer + "<|im_end|>"
