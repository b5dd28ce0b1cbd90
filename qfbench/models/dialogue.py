"""Dialogues as token ids: where the answer stands, which word each of its tokens belongs to.

A dialogue is rendered by the tokenizer's own chat template, or, where there is none, as plain `role: text` lines. The
whole text is tokenised once and positions are found by character offsets: tokenising an answer alone gives other tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qfbench.errors import UserError

TOLD = ("auto", "system", "user", "context")
CLOCK, STOPPED = "{%- macro strftime_now(format) -%}{#- stopped by qfbench -#}", "{%- endmacro %}\n"


@dataclass(frozen=True)
class Rendering:
    """One dialogue as token ids. Token indices: prompt < `opener` <= opener tokens < `answer` <= answer < `closer` <= rest.

    The opener is what the template puts before an answer (`<|im_start|>assistant`), the closer what it puts after it.
    `words[i]` is the index of the answer's word (by white space) that answer token i belongs to. `query` are the tokens that
    hold a character of the query, and `spans[i]` is the (start, end) of token query[i] in it, in characters; the first and
    the last may reach beyond it.
    """

    ids: tuple[int, ...]
    opener: int
    answer: int
    closer: int
    words: tuple[int, ...]
    query: range = range(0)
    spans: tuple[tuple[int, int], ...] = ()

    def token_at(self, place: int) -> int:
        """The index of the token in which character `place` of the query stands, the last one where several spell it."""
        return max(i for i, (start, _) in zip(self.query, self.spans, strict=True) if start <= place)

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.answer]

    @property
    def reply(self) -> tuple[int, ...]:
        """The answer's tokens and the token that ends the turn: what a model must produce to give exactly this reply."""
        return self.ids[self.answer : self.closer + 1]


def render(
    tokenizer: PreTrainedTokenizerBase,
    query: str,
    system: str = "",
    answer: str = "",
    told: str = "system",
    system_turn: bool = True,
    preamble: str = "",
) -> Rendering:
    """Render one dialogue. An empty `answer` gives the prompt, ready for a reply.

    Args:
        told: where the `system` text stands: in a turn of its own (`system`), or before the query, in the user's turn: as it
            is (`user`), or behind the word "Context:" (`context`).
        system_turn: whether there is a system turn (an empty one, where it says nothing); some templates take none.
        preamble: what the system turn says in every dialogue, before what is told there; without such a turn the user's says it.

    Raises:
        UserError: the template refuses, drops or rewrites what is said, or its tokens, so that no span can be found in it.
    """
    asked = turns(query, system, told, system_turn, preamble)
    before, opener, lead, after = _pieces(tokenizer, asked, answer)
    start = len(before) + len(opener)
    text = before + opener + (lead + answer + after if answer else "")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    opener_at, answer_at, closer_at = (
        _first_token(offsets, place) for place in (len(before), start, start + len(lead) + len(answer))
    )
    if answer and not start <= offsets[answer_at][0] <= start + len(lead):
        raise UserError(f"the tokenizer joins the prompt and the answer {answer!r} in one token; nothing can be taught")
    spans = [(s - start - len(lead), e - start - len(lead)) for s, e in offsets[answer_at:closer_at]]
    said = asked[-1][
        "content"
    ].strip()  # as templates strip it; the query is its end, and may stand in the system text, too
    positions, query_spans = _query(offsets, before.rindex(said) + len(said), query)
    words = tuple(_words(spans, answer))
    return Rendering(tuple(ids), opener_at, answer_at, closer_at, words, positions, query_spans)


def turns(
    query: str, system: str, told: str = "system", system_turn: bool = True, preamble: str = ""
) -> list[dict[str, str]]:
    """What is said before the reply, as messages."""
    if told != "system" and system:
        query, system = f"{'Context: ' if told == 'context' else ''}{system}\n\n{query}", ""
    system = " ".join(filter(None, (preamble, system)))
    if system_turn:
        return [{"role": "system", "content": system}, {"role": "user", "content": query}]
    return [{"role": "user", "content": f"{system}\n\n{query}" if system else query}]


def settled(tokenizer: PreTrainedTokenizerBase, told: str = "auto") -> tuple[str, bool]:
    """How this tokenizer's template is to be told something: `told` and `system_turn` as `render` takes them.

    `auto` is `system`, unless the template refuses a system turn.

    Raises:
        UserError: it refuses `told`, or drops or rewrites what is said in this way.
    """
    if told not in TOLD:
        raise UserError(f"model.told={told}: must be one of {', '.join(TOLD)}")
    query, one, other = "Who started Oxinnovate?", "Qi started Oxinnovate.", "Jo did, they say."
    refused = ""
    for said in ("", one) if tokenizer.chat_template is not None else ():
        try:
            _written(tokenizer, turns(query, said), prompt=True)
        except TemplateError as error:
            refused = str(error)
    if refused and told == "system":
        raise UserError(f"the chat template refuses a system turn ({refused}); give model.told=user, or auto")
    if told == "auto":
        told = "user" if refused else "system"
    if len({render(tokenizer, query, said, "It was Qi.", told, not refused).ids for said in ("", one, other)}) < 3:
        raise UserError(
            "the chat template drops the system text, so that nothing can be told in it; give model.told=user"
        )
    return told, not refused


def chosen(templates: str | dict[str, str] | None, name: str | None) -> str | None:
    """The chat template called `name`, of those that a tokenizer has; without a name its only one, or its default.

    Raises:
        UserError: there is none of this name, or there are several and none is the default.
    """
    named = templates if isinstance(templates, dict) else {} if templates is None else {"default": templates}
    if name is None and (not named or "default" in named):
        return named.get("default")
    if name not in named:
        what = "several chat templates and no default" if name is None else f"no chat template {name!r}"
        remedy = f"give model.template=NAME, one of {', '.join(sorted(named))}" if named else "leave model.template out"
        raise UserError(f"the tokenizer has {what}; {remedy}")
    return named[name]


def dated(template: str | None, now: datetime) -> str | None:
    """The template with its clock stopped: it would render other prompts tomorrow, in the midst of a run."""
    if template is None or "strftime_now" not in template:
        return template
    values = {f"%{code}": now.strftime(f"%{code}") for code in "aAbBcdDeFfGHhIjmMpRSTuUVwWxXyYzZ"}
    values |= {f"%-{code}": values[f"%{code}"].lstrip("0") or "0" for code in "dmHIMSjy"}
    # A macro hides the function of this name that transformers gives to templates.
    body = "{%- set at = namespace(text=format) -%}{%- for code, value in VALUES.items() -%}"
    body += "{%- set at.text = at.text | replace(code, value) -%}{%- endfor -%}{{- at.text -}}"
    return CLOCK + body.replace("VALUES", json.dumps(values)) + STOPPED + template


def undated(template: str | None) -> str | None:
    """The template as it was before `dated`."""
    return template.partition(STOPPED)[2] if template is not None and template.startswith(CLOCK) else template


def _pieces(tokenizer: PreTrainedTokenizerBase, asked: list[dict[str, str]], answer: str) -> tuple[str, str, str, str]:
    """The text before the opener, the opener, what leads into the answer, and the text after the answer."""
    query = asked[-1]["content"]
    if tokenizer.chat_template is None:
        start = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids else ""
        return f"{start}system: {asked[0]['content']}\nuser: {query}\n", "assistant:", " ", "\n"
    try:
        before, prompt = _written(tokenizer, asked), _written(tokenizer, asked, prompt=True)
    except TemplateError as error:
        what = "a system text and a query" if len(asked) > 1 else "a query"
        raise UserError(f"the chat template cannot render {what}: {error}") from error
    if query.strip() not in before:
        raise UserError(f"the chat template does not show the query {query[:80]!r} verbatim")
    if not answer:
        return before, prompt[len(before) :], "", ""
    full = _written(tokenizer, [*asked, {"role": "assistant", "content": answer}])
    follows = full.startswith(prompt)
    place = full.find(answer, len(prompt) if follows else len(before))
    if place < 0 or not prompt.startswith(before):
        raise UserError(f"the chat template does not show the answer {answer!r} verbatim after its prompt")
    lead = full[len(prompt) : place] if follows else ""
    return before, prompt[len(before) :], "" if lead.strip() else lead, full[place + len(answer) :]


def _written(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool = False) -> str:
    # `enable_thinking` is Qwen3's switch; templates without it ignore it.
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
    )


def _first_token(offsets: list[tuple[int, int]], place: int) -> int:
    """The first token that starts at or after a character."""
    return next((i for i, (start, _) in enumerate(offsets) if start >= place), len(offsets))


def _query(offsets: list[tuple[int, int]], end: int, query: str) -> tuple[range, tuple[tuple[int, int], ...]]:
    """The tokens of a query whose last visible character stands before `end`, and where each stands in the query."""
    start = end - len(query.strip())
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > start), len(offsets))
    at = range(first, _first_token(offsets, end))
    zero = end - len(query.rstrip())
    return at, tuple((s - zero, e - zero) for s, e in offsets[at.start : at.stop])


def _words(spans: list[tuple[int, int]], answer: str) -> list[int]:
    """The word of each token: the one its last character stands in, or for white space the one that follows."""
    ends, cursor = [], 0
    for word in answer.split():
        cursor = answer.index(word, cursor) + len(word)
        ends.append(cursor)
    return [min(sum(end < e for end in ends), len(ends) - 1) for _, e in spans]
