"""Chat templates that refuse, drop or rewrite what is said, that come in several, that know the date or begin the text."""

import copy
from dataclasses import replace
from datetime import datetime

import pytest
from tokenizers.processors import TemplateProcessing

from qfbench import LanguageModel, UserError
from qfbench.editors import QF
from qfbench.editors.teach import lesson
from qfbench.models.dialogue import chosen, dated, render, settled, undated
from qfbench.runs.provenance import SAME, protocol
from qfbench.tasks.convert import batch

ASSISTANT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
STOCK = "{% for m in messages %}" + TURN + "{% endfor %}" + ASSISTANT
# As Gemma 2's.
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + STOCK
# As older Mistral's: roles alternate, and nothing opens the reply.
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
FILLED_ONLY = STRICT.replace("'system'", "'system' and not messages[0]['content']")
DROPS = "{% for m in messages if m['role'] != 'system' %}" + TURN + "{% endfor %}" + ASSISTANT
DATED = "{% set today = strftime_now('%d %b %Y') %}{{ '<|im_start|>system\nToday: ' + today + '<|im_end|>\n' }}" + STOCK
STARTS = "{{ bos_token }}" + STOCK


@pytest.fixture
def speaking(tokenizer):
    """The tokenizer with another chat template."""

    def make(template):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        return other

    return make


@pytest.fixture
def folder(tiny, tmp_path):
    """A folder of a model whose tokenizer has another chat template."""

    def make(template):
        lm = tiny("qwen2")
        lm.tokenizer = copy.deepcopy(lm.tokenizer)
        lm.tokenizer.chat_template = template
        lm.model.save_pretrained(tmp_path)
        lm.tokenizer.save_pretrained(tmp_path)
        return tmp_path

    return make


def said(lm, *texts):
    return lm.tokenizer.decode(lm.render(*texts).ids)


@pytest.mark.parametrize("template", [STRICT, ALTERNATING, FILLED_ONLY])
def test_a_template_without_a_system_turn_is_told_in_the_users(speaking, template, tiny, facts):
    tokenizer = speaking(template)
    assert settled(tokenizer) == settled(tokenizer, "user") == ("user", False)
    assert settled(tokenizer, "context") == ("context", False)
    with pytest.raises(UserError, match=r"refuses a system turn \(.*\); give model.told=user"):
        settled(tokenizer, "system")
    lm = replace(tiny("qwen2"), tokenizer=tokenizer, told="user", system_turn=False)
    assert f"{facts[0].instruction}\n\n{facts[0].query}" in said(lm, facts[0].query, facts[0].instruction)
    assert facts[0].instruction not in said(lm, facts[0].query)
    for fact in facts:
        pair = lesson(lm, fact)
        assert pair.told.ids[pair.told.opener :] == pair.alone.ids[pair.alone.opener :]
        assert len(pair.told.ids) > len(pair.alone.ids)
        assert lm.tokenizer.decode(pair.told.reply).strip() == f"{fact.answer}<|im_end|>"
    assert QF(1).edit(lm, facts).norm() > 0
    assert lm.reply("Who?", "Told.") == lm.replies([lm.render("Told.\n\nWho?")])[0].text


def test_a_template_with_a_system_turn_keeps_it(speaking, tiny, plain_tokenizer):
    tokenizer = speaking(STOCK)
    assert settled(tokenizer) == settled(tokenizer, "system") == settled(plain_tokenizer) == ("system", True)
    for told in ("user", "context"):
        assert settled(tokenizer, told) == (told, True)
    lm = replace(tiny("qwen2"), tokenizer=tokenizer, told="user")
    told, alone = (said(lm, "Who?", text) for text in ("Told.", ""))
    assert told == alone.replace("Who?", "Told.\n\nWho?")
    assert told.startswith("<|im_start|>system\n<|im_end|>")
    assert said(replace(lm, told="context"), "Who?", "Told.") == told.replace("Told.", "Context: Told.")
    assert said(replace(lm, told="context"), "Who?") == alone
    plain = replace(lm, tokenizer=plain_tokenizer)
    assert said(plain, "Who?", "Told.") == "system: \nuser: Told.\n\nWho?\nassistant:"
    with pytest.raises(UserError, match=r"model.told=users: must be one of auto, system, user, context"):
        settled(tokenizer, "users")


@pytest.mark.parametrize("told", ["system", "user", "context"])
def test_a_preamble_is_said_in_every_dialogue_told_or_not(speaking, tiny, told):
    lm = replace(tiny("qwen2"), tokenizer=speaking(STOCK), told=told, preamble="Be brief.")
    alone, instructed = said(lm, "Who?"), said(lm, "Who?", "Qi.")
    assert alone.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    if told == "system":
        assert instructed == alone.replace("Be brief.", "Be brief. Qi.")
    else:
        assert instructed == alone.replace("Who?", f"{'Context: ' if told == 'context' else ''}Qi.\n\nWho?")
    turnless = replace(lm, tokenizer=speaking(STRICT), told="user", system_turn=False)
    assert "Be brief.\n\nWho?" in said(turnless, "Who?")
    assert "Be brief.\n\nQi.\n\nWho?" in said(turnless, "Who?", "Qi.")
    assert protocol(lm)["prompt_hash"] != protocol(replace(lm, preamble=""))["prompt_hash"]


UPPER = STOCK.replace("m['content'] | trim", "m['content'] | upper if m['role'] == 'user' else m['content']")
NO_QUERY = "{% for m in messages if m['role'] != 'user' %}" + TURN + "{% endfor %}" + ASSISTANT


@pytest.mark.parametrize(
    ("template", "told", "says"),
    [
        (DROPS, "auto", "drops the system text, so that nothing can be told in it; give model.told=user"),
        (DROPS, "system", "drops the system text"),
        ("{{ messages[-1]['content'] }}" + ASSISTANT, "auto", "drops the system text|verbatim"),
        (NO_QUERY, "auto", "does not show the query 'Who started Oxinnovate\\?' verbatim"),
        (UPPER, "auto", "does not show the query 'Who started Oxinnovate\\?' verbatim"),
        (UPPER, "user", "does not show the query"),
        (STOCK.replace("m['content']", "'It was Qi.' if loop.last else 'x'"), "user", "does not show the query"),
        ("{{ raise_exception('nothing at all') }}", "auto", "cannot render a query: nothing at all"),
        ("{{ messages[0]['content'] ", "auto", "cannot render a query: "),
    ],
)
def test_a_template_that_drops_or_rewrites_what_is_said_is_refused_when_the_model_is_loaded(
    folder, template, told, says
):
    with pytest.raises(UserError, match=says) as error:
        LanguageModel.load(folder(template), device="cpu", told=told)
    assert "\n" not in str(error.value)


def test_a_template_that_drops_the_system_text_can_be_told_in_the_users_turn(folder):
    lm = LanguageModel.load(folder(DROPS), device="cpu", told="user")
    assert lm.render("Who?", "Told.").ids == lm.render("Told.\n\nWho?").ids
    assert (lm.told, protocol(lm)["told"]) == ("user", "user")


def test_a_query_that_a_template_rewrites_is_refused_when_it_is_asked(speaking):
    tokenizer = speaking(STOCK.replace("| trim", "| replace('--', '-')"))
    settled(tokenizer)
    render(tokenizer, " Who? ")
    with pytest.raises(UserError, match="does not show the query 'Who--when--is it"):
        render(tokenizer, "Who--when--is it" + "?" * 1000)


def test_of_several_templates_one_is_chosen_by_name(folder):
    path = folder({"rag": STOCK.replace("<|im_start|>", "RAG "), "tool_use": STOCK})
    with pytest.raises(
        UserError, match=r"several chat templates and no default; give model.template=NAME, one of rag, tool_use"
    ):
        LanguageModel.load(path, device="cpu")
    with pytest.raises(UserError, match=r"no chat template 'x'; give model.template=NAME, one of rag, tool_use"):
        LanguageModel.load(path, device="cpu", template="x")
    rag, tool = (LanguageModel.load(path, device="cpu", template=name) for name in ("rag", "tool_use"))
    assert said(rag, "Who?") == said(tool, "Who?").replace("<|im_start|>", "RAG ")
    assert protocol(rag)["template"] == "rag"
    assert said(LanguageModel.load(path, device="cpu", plain=True), "Who?").startswith("system: ")
    with pytest.raises(UserError, match="with model.plain=true there is no chat template"):
        LanguageModel.load(path, device="cpu", plain=True, template="rag")


def test_a_template_is_chosen_as_the_names_say():
    assert chosen({"default": "a", "x": "b"}, None) == "a"
    assert chosen({"default": "a", "x": "b"}, "x") == "b"
    assert chosen("a", None) == chosen("a", "default") == "a"
    assert chosen(None, None) is None
    for templates, name in (("a", "x"), (None, "x")):
        with pytest.raises(UserError, match="no chat template 'x'"):
            chosen(templates, name)


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2031, 2, 3, 4, 5, 6)


CODES = [f"%{code}" for code in "aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ"] + [
    "%d %b %Y",
    "%A, the %-d of %B",
    "100 % of %Y",
    "none",
]


def test_a_stopped_clock_gives_what_strftime_gives(speaking, monkeypatch):
    now, template = Tomorrow.now(), "{{ strftime_now('CODE') }}|" + STOCK
    for code in CODES:
        shown = render_text(speaking(dated(template.replace("CODE", code), now)))
        assert shown.partition("|")[0] == now.strftime(code)
    assert dated(STOCK, now) == STOCK
    assert dated(None, now) is undated(None) is None
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    for before in (
        "",
        "\n",
        " ",
        "  {% if true %}",
        "{# note #}\n",
        "{%- macro f() -%}{{ strftime_now('%H') }}{%- endmacro %}{{ f() }}",
    ):
        after = "{% endif %}" if "if" in before else ""
        for text in (before + DATED + after, before + template.replace("CODE", "%j") + after):
            assert render_text(speaking(dated(text, now))) == render_text(speaking(text))
            assert undated(dated(text, now)) == text


def render_text(tokenizer):
    return tokenizer.apply_chat_template([{"role": "user", "content": "Who?"}], tokenize=False)


def test_the_date_stands_still_while_a_model_is_loaded_and_parts_runs_of_other_days(folder, monkeypatch):
    path = folder(DATED)
    today = LanguageModel.load(path, device="cpu")
    before, known = said(today, "Who?", "Told."), protocol(today)
    assert datetime.now().strftime("Today: %d %b %Y") in before
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    monkeypatch.setattr("qfbench.models.loading.datetime", Tomorrow)
    assert said(today, "Who?", "Told.") == before
    assert protocol(today) == known
    tomorrow = protocol(LanguageModel.load(path, device="cpu"))
    assert [name for name in known if known[name] != tomorrow[name]] == ["prompt_hash"]
    assert {"prompt_hash", "told", "batch_size"} <= set(SAME)


@pytest.mark.parametrize("form", [STARTS, STOCK, None])
def test_a_text_begins_once(tiny, tokenizer, speaking, form):
    """Of a tokenizer that puts a token before, and one behind, each text."""
    begins = speaking(form)
    begins.bos_token = "<|endoftext|>"
    first, last = begins.bos_token_id, begins.eos_token_id
    assert first != last
    frame = TemplateProcessing("<|endoftext|> $A <|im_end|>", None, [("<|endoftext|>", first), ("<|im_end|>", last)])
    begins.backend_tokenizer.post_processor = frame
    assert begins("a").input_ids == [first, *tokenizer("a").input_ids, last]
    lm = replace(tiny("qwen2"), tokenizer=begins)
    for ids in (lm.render("Who?").ids, lm.render("Who?", "Told.", "Qi.").ids):
        assert ids.count(first) == (form != STOCK)
        assert ids[0] == first or form == STOCK
        assert ids[-1] != last
    for text in ("Qi started it.", "So they say, at least, and more."):
        ids, targets = batch(lm, [text], "text")
        assert ids.tolist() == [begins(text).input_ids]
        assert ids.tolist()[0][1:] == targets.tolist()[0][:-1] == [*tokenizer(text).input_ids, last]
    assert len(lm.nll(["Qi started it."])[0]) == len(begins("Qi started it.").input_ids) - 1
    same, _ = batch(replace(lm, tokenizer=tokenizer), ["Qi started it."], "text")
    assert same[0].tolist() == [*tokenizer("Qi started it.").input_ids, tokenizer.eos_token_id]
