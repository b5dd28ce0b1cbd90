"""Where rivals look a fact up: the last token of its subject."""

from dataclasses import replace

import pytest

from qfbench import Fact, UserError
from qfbench.editors.teach import subject_at
from qfbench.models.dialogue import render

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
