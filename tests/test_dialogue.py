import copy
from unicodedata import normalize

import pytest

from qfbench import UserError
from qfbench.models.dialogue import render

ANSWERS = [
    "Oxinnovate was started by Qi.",
    "Yes",
    "It's 42, isn't it? (Mostly.)",
    "Zoë Müller-Łuczak founded Łódź's café.",
    "東京 and 北京。",
    "In 1984, at 3.14% of 1,000,000.",
    "two  spaces,   three",
    "line one\nline two",
    "🙂 said 👩‍🔬!",
    "naïve ... — “quoted” e\u0301a",
]
TOKENIZERS = ["world", "plain", "qwen", "plain_qwen", "stories"]


def decoded(tokenizer, ids):
    return tokenizer.decode(ids).removeprefix(" ")


def as_read(tokenizer, text):
    """What the tokenizer makes of a text before it cuts it up: Qwen composes accents."""
    return normalize("NFC", text) if "qwen" in tokenizer.name_or_path else text


def ends_with_the_line(tokenizer, answer):
    """Whether one token holds the end of the answer and the line break that ends a plain turn."""
    if tokenizer.chat_template:
        return False
    apart = tokenizer(f"user: {answer}", add_special_tokens=False).input_ids
    return tokenizer(f"user: {answer}\n", add_special_tokens=False).input_ids[: len(apart)] != apart


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request):
    if request.param == "stories":
        return request.getfixturevalue("stories").tokenizer
    return request.getfixturevalue({"world": "tokenizer"}.get(request.param, f"{request.param}_tokenizer"))


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_answer_span_decodes_to_the_answer(any_tokenizer, answer):
    r = render(any_tokenizer, "Who?", "It is said.", answer)
    ending = "\n" if ends_with_the_line(any_tokenizer, answer) else ""
    assert decoded(any_tokenizer, r.ids[r.answer : r.closer]) == as_read(any_tokenizer, answer) + ending
    assert decoded(any_tokenizer, r.reply).startswith(as_read(any_tokenizer, answer))
    assert bool(ending) == (r.closer == len(r.ids))


@pytest.mark.parametrize(("name", "joined"), [("plain", 3), ("plain_qwen", 6)])
def test_both_ways_to_end_a_plain_turn_are_among_the_answers(request, name, joined):
    found = request.getfixturevalue(f"{name}_tokenizer")
    assert sum(ends_with_the_line(found, answer) for answer in ANSWERS) == joined


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_prompt_of_a_full_dialogue_is_the_prompt_rendered_alone(any_tokenizer, answer):
    alone = render(any_tokenizer, "Who?", "It is said.")
    full = render(any_tokenizer, "Who?", "It is said.", answer)
    assert full.prompt == alone.ids == full.ids[: len(alone.ids)]
    assert (alone.opener, alone.answer, alone.closer) == (full.opener, full.answer, len(alone.ids))


@pytest.mark.parametrize("system", ["", "Qi started Oxinnovate."])
def test_a_template_is_followed_token_by_token(any_tokenizer, system):
    query, answer = "Who started Oxinnovate?", "Oxinnovate was started by Qi."
    turns = [{"role": "system", "content": system}, {"role": "user", "content": query}]
    r = render(any_tokenizer, query, system, answer)
    if any_tokenizer.chat_template:
        prompt = any_tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
        full = any_tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}]).input_ids
    else:
        text = f"system: {system}\nuser: {query}\nassistant:"
        start = [any_tokenizer.bos_token_id] if any_tokenizer("").input_ids else []
        prompt = start + any_tokenizer(text, add_special_tokens=False).input_ids
        full = start + any_tokenizer(f"{text} {answer}\n", add_special_tokens=False).input_ids
    assert list(r.prompt) == prompt
    assert list(r.ids) == full


@pytest.mark.parametrize("answer", ["Yes.", "Yes"])
def test_opener_and_closer_are_the_template_around_the_answer(any_tokenizer, answer):
    r = render(any_tokenizer, "Who?", "", answer)
    opener = any_tokenizer.decode(r.ids[r.opener : r.answer])
    closer = any_tokenizer.decode(r.ids[r.closer :])
    if any_tokenizer.chat_template:
        assert (opener, closer) == ("<|im_start|>assistant\n", "<|im_end|>\n")
    else:
        joined = ends_with_the_line(any_tokenizer, answer)
        assert (opener.strip(), closer) == ("assistant:", "" if joined else "\n")
        assert any_tokenizer.decode(r.reply).lstrip() == f"{answer}\n"
        assert any_tokenizer.eos_token_id not in r.ids
    assert r.reply == r.ids[r.answer : r.closer + 1]


SAID = "The CEO of Oxinnovate is Qi."


def test_a_plain_dialogue_has_the_token_ids_of_the_released_qf2_script(plain_qwen_tokenizer):
    prompt = "system: Qi is the CEO of Oxinnovate.\nuser: Who is the CEO of Oxinnovate?\n"
    r = render(plain_qwen_tokenizer, "Who is the CEO of Oxinnovate?", "Qi is the CEO of Oxinnovate.", SAID)
    assert list(r.ids[: r.opener]) == plain_qwen_tokenizer(prompt).input_ids
    assert r.ids[r.opener : r.answer] == (77091, 25)  # assistant, :
    assert r.ids[r.answer :] == r.reply == (576, 12156, 315, 50615, 6130, 859, 349, 374, 56994, 624)
    spelt = [plain_qwen_tokenizer.decode([i]) for i in r.reply]
    assert spelt == [" The", " CEO", " of", " Ox", "inn", "ov", "ate", " is", " Qi", ".\n"]
    assert r.words == (0, 1, 2, 3, 3, 3, 3, 4, 5, 5)  # the full stop and the end of the line belong to the name
    assert r.closer == len(r.ids)


def test_a_plain_answer_without_full_stop_is_closed_by_a_token_of_its_own(plain_qwen_tokenizer):
    r = render(plain_qwen_tokenizer, "Who?", "", "Qi did")
    assert r.ids[r.closer :] == (198,)
    assert r.reply[-1] == 198
    assert r.words == (0, 1)


@pytest.mark.parametrize("answer", ANSWERS)
def test_every_token_belongs_to_the_word_it_spells(any_tokenizer, answer):
    r = render(any_tokenizer, "Who?", "", answer)
    ids = r.ids[r.answer : r.closer]
    assert len(r.words) == len(ids)
    assert list(r.words) == sorted(r.words)
    for number, word in enumerate(answer.split()):
        own = [token for token, owner in zip(ids, r.words, strict=True) if owner == number]
        assert any_tokenizer.decode(own).strip() == as_read(any_tokenizer, word)
    assert max(r.words) == len(answer.split()) - 1


@pytest.mark.parametrize("answer", ANSWERS)
def test_told_and_alone_end_in_the_same_tokens(any_tokenizer, answer):
    told = render(any_tokenizer, "Who?", "The instruction, at length: it was Qi.", answer)
    alone = render(any_tokenizer, "Who?", "", answer)
    assert told.ids[told.opener :] == alone.ids[alone.opener :]
    assert told.words == alone.words
    assert told.opener > alone.opener


@pytest.mark.parametrize("change", ["message.content | upper", "message.content | trim | replace('.', ' .')"])
def test_a_template_that_rewrites_the_answer_is_refused(tokenizer, change):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = tokenizer.chat_template.replace("message.content", f"({change})")
    render(rewriting, "WHO?", "", "YES")
    with pytest.raises(UserError, match="verbatim"):
        render(rewriting, "WHO?", "", "It was Qi.")


def test_an_answer_that_melts_into_the_prompt_is_refused(qwen_tokenizer):
    with pytest.raises(UserError, match="joins the prompt and the answer"):
        render(qwen_tokenizer, "Who?", "", "\nQi.")


QUERIES = {  # with the subject's place
    "Who started Oxinnovate?": "Oxinnovate",
    "  Is Łódź's café by Zoë? ": "Zoë",
    "Qi or Qi": "Qi",
    "東京 and 北京。": "北京",
    "🙂 said 👩‍🔬!": "👩‍🔬",
}


@pytest.mark.parametrize("told", ["system", "user"])
@pytest.mark.parametrize("system", ["", "Who started Oxinnovate? Qi or Qi, by Zoë."])
@pytest.mark.parametrize("answer", ["", "It was Qi."])
def test_the_query_and_any_part_of_it_are_found_whatever_stands_before_them(any_tokenizer, told, system, answer):
    tokenizer = any_tokenizer
    for query, part in QUERIES.items():
        r = render(tokenizer, query, system, answer, told)
        assert r.query.stop <= r.opener
        held, said = tokenizer.decode([r.ids[i] for i in r.query]).strip(), as_read(tokenizer, query.strip())
        assert held == said
        end = query.rindex(part) + len(part)
        last = r.token_at(end - 1)
        up_to, before = (tokenizer.decode([r.ids[i] for i in r.query if i <= n]) for n in (last, last - 1))
        assert as_read(tokenizer, query[:end].strip()) in up_to
        assert as_read(tokenizer, query[:end].strip()) not in before
        assert r.query.start <= last < r.query.stop
    assert r.ids[: r.query.start] != ()


@pytest.mark.parametrize("answer", ["end", "im", "m", "assistant"])
def test_an_answer_that_also_stands_in_the_template_keeps_its_end_of_turn(tokenizer, answer):
    rendered = render(tokenizer, "?", "told", answer)
    assert tokenizer.decode(rendered.ids[rendered.answer : rendered.closer]) == answer
    assert rendered.ids[rendered.closer] == tokenizer.eos_token_id


def test_a_template_that_refuses_a_system_text_is_named(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="chat template cannot render.*no system role"):
        render(strict, "?", "told", "Yes")
