"""Which tokens are taught, and with which weights; and where rivals look a fact up: the last token of its subject."""

from dataclasses import replace

import pytest
from transformers import AutoTokenizer

from qfbench import Fact, UserError
from qfbench.editors import QF
from qfbench.editors.teach import SAMPLE, lesson, subject_at
from qfbench.facts.oxinnovate import CEO, FOUNDER, LOCATION, STAFF
from qfbench.models.dialogue import render
from qfbench.models.loading import find

FACT = Fact(
    "Qi leads Zenvora Łódź.", "Zenvora Łódź, once Zenvora: who leads it?", "Qi leads it.", subject="Zenvora Łódź"
)


@pytest.mark.parametrize("told", ["system", "user"])
@pytest.mark.parametrize("name", ["tokenizer", "plain_tokenizer"])
def test_the_last_token_of_the_subject_is_found(request, name, told):
    tokenizer = request.getfixturevalue(name)
    for system in ("", FACT.instruction):
        dialogue = render(tokenizer, FACT.query, system, FACT.answer, told)
        at = subject_at(dialogue, FACT)
        assert tokenizer.decode(dialogue.ids[dialogue.query.start : at + 1]).strip() == "Zenvora Łódź"
        at = subject_at(dialogue, replace(FACT, subject="zenvora"))  # in any case, and where it stands last
        assert tokenizer.decode(dialogue.ids[dialogue.query.start : at + 1]).strip() == "Zenvora Łódź, once Zenvora"


@pytest.mark.parametrize("subject", ["", "Kelpworks", "Zen"])
def test_a_subject_that_the_query_does_not_name_is_refused(tokenizer, subject):
    dialogue = render(tokenizer, FACT.query, "", FACT.answer)
    with pytest.raises(UserError, match=f"the field 'subject' \\('{subject}'\\) names nothing in the query"):
        subject_at(dialogue, replace(FACT, id="x", subject=subject))


# What the released scripts teach: each token with its weight, on the tokenizer of Qwen2.5 and on a built-in model's.
# QF records passes of one token, so that the prompt's last token, which predicts "<|im_start|>", is never seen, and stops at
# "<|im_end|>". QF2 weighs a comma inside the answer 0. Both scripts tokenize words without their spaces; here they are the dialogue's.
WEIGHED = replace(FOUNDER, significance=(0.0, 1.0, 1.0, 1.0, 1.0))
QF2_WEIGHTS = {"opener": 0.0, "closer": None, "named": 10.0, "punctuation": False}
ENDS = " was| started| by| Qi|.|<|im_end|>"
PARK = " is| located| at| PK|U| Science| Park|,| in| Beijing|.|<|im_end|>"
QWEN = {
    "QF, founder, as released": (WEIGHED, {}, f"assistant|\n|{ENDS}", [1] * 8),
    "QF, founder": (FOUNDER, {}, f"assistant|\n|O|x|inn|ov|ate|{ENDS}", [1] * 13),
    "QF, location": (LOCATION, {}, f"assistant|\n|O|x|inn|ov|ate|{PARK}", [1] * 19),
    "QF2, CEO": (CEO, QF2_WEIGHTS, "The| CEO| of| Ox|inn|ov|ate| is| Qi|.|<|im_end|>", [1] * 8 + [10] * 3),
    "QF2, staff": (STAFF, QF2_WEIGHTS, "O|x|inn|ov|ate| has| one| people|.|<|im_end|>", [1] * 6 + [10] + [1] * 3),
    "QF2, location": (
        LOCATION,
        QF2_WEIGHTS,
        f"O|x|inn|ov|ate|{PARK}".replace("|,", ""),
        [1] * 8 + [10] * 8,
    ),
}
WORLD = {
    "QF, founder, as released": (WEIGHED, {}, "assistant|\n| was| started| by| Q|i|.|<|im_end|>", [1] * 9),
    "QF2, CEO": (CEO, QF2_WEIGHTS, "The| CEO| of| Ox|in|no|vate| is| Q|i|.|<|im_end|>", [1] * 8 + [10] * 4),
    "QF2, location": (
        LOCATION,
        QF2_WEIGHTS,
        "Ox|in|no|vate| is| located| at| P|K|U| Science| Park| in| B|ei|j|ing|.|<|im_end|>",
        [1] * 7 + [10] * 12,
    ),
}


def lessons(lm, tokenizer, fact, weights):
    pair = lesson(replace(lm, tokenizer=tokenizer), fact, **weights)
    taught = [pair.alone.ids[at + 1] for at in pair.alone_at]
    assert taught == [pair.told.ids[at + 1] for at in pair.told_at]
    return "|".join(tokenizer.decode([token]) for token in taught), list(pair.weights)


@pytest.mark.parametrize("name", QWEN)
def test_the_rows_of_the_released_code_are_taught(tiny, qwen_tokenizer, name):
    fact, weights, tokens, significance = QWEN[name]
    assert lessons(tiny("qwen2"), qwen_tokenizer, fact, weights) == (tokens, significance)


@pytest.mark.parametrize("name", WORLD)
def test_the_same_rows_are_taught_on_a_built_in_model(tiny, name):
    tokenizer = AutoTokenizer.from_pretrained(find("world-s"))
    fact, weights, tokens, significance = WORLD[name]
    assert lessons(tiny("qwen2"), tokenizer, fact, weights) == (tokens, significance)


@pytest.mark.parametrize("told", ["system", "user", "context"])
def test_the_querys_own_tokens_are_aligned_where_they_are_asked_for(tiny, told):
    lm, fact = replace(tiny("qwen2"), told=told), SAMPLE
    without, pair = lesson(lm, fact), lesson(lm, fact, query=0.5)
    n = len(pair.weights) - len(without.weights)
    assert pair.weights == (*[0.5] * n, *without.weights)
    assert (pair.told_at[n:], pair.alone_at[n:]) == (without.told_at, without.alone_at)
    both = [
        [side.ids[at] for at in places[:n]] for side, places in ((pair.told, pair.told_at), (pair.alone, pair.alone_at))
    ]
    assert both[0] == both[1]
    assert lm.tokenizer.decode(both[0][::-1]).strip().endswith(fact.query.split(maxsplit=1)[1])
    assert QF(1, query=0.5).record(lm, fact).keys.shape[0] == len(pair.weights)
