"""Dialogues as token ids: where the answer stands, which word each of its tokens belongs to.

A dialogue is rendered by the tokenizer's own chat template, or, where there is none, as plain `role: text` lines. The
whole text is tokenised once and positions are found by character offsets: tokenising an answer alone gives other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qfbench.errors import UserError


@dataclass(frozen=True)
class Rendering:
    """One dialogue as token ids. Token indices: prompt < `opener` <= opener tokens < `answer` <= answer < `closer` <= rest.

    The opener is what the template puts before an answer (`<|im_start|>assistant`), the closer what it puts after it.
    `words[i]` is the index of the answer's word (by white space) that answer token i belongs to.
    """

    ids: tuple[int, ...]
    opener: int
    answer: int
    closer: int
    words: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ids[: self.answer]

    @property
    def reply(self) -> tuple[int, ...]:
        """The answer's tokens and the token that ends the turn: what a model must produce to give exactly this reply."""
        return self.ids[self.answer : self.closer + 1]


def render(tokenizer: PreTrainedTokenizerBase, query: str, system: str = "", answer: str = "") -> Rendering:
    """Render one dialogue. An empty `answer` gives the prompt, ready for a reply.

    Raises:
        UserError: the template rewrites the answer or its tokens, so that no span can be found in it.
    """
    before, opener, lead, after = _pieces(tokenizer, query, system, answer)
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
    return Rendering(tuple(ids), opener_at, answer_at, closer_at, tuple(_words(spans, answer)))


def _pieces(tokenizer: PreTrainedTokenizerBase, query: str, system: str, answer: str) -> tuple[str, str, str, str]:
    """The text before the opener, the opener, what leads into the answer, and the text after the answer."""
    if tokenizer.chat_template is None:
        start = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids else ""
        return f"{start}system: {system}\nuser: {query}\n", "assistant:", " ", "\n"
    asked = [{"role": "system", "content": system}, {"role": "user", "content": query}]

    def rendered(messages: list[dict[str, str]], prompt: bool = False) -> str:
        # `enable_thinking` is Qwen3's switch; templates without it ignore it.
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=False)
        )

    try:
        before, prompt = rendered(asked), rendered(asked, prompt=True)
    except TemplateError as error:
        raise UserError(f"the chat template cannot render a system text and a query: {error}") from error
    if not answer:
        return before, prompt[len(before) :], "", ""
    full = rendered([*asked, {"role": "assistant", "content": answer}])
    follows = full.startswith(prompt)
    place = full.find(answer, len(prompt) if follows else len(before))
    if place < 0 or not prompt.startswith(before):
        raise UserError(f"the chat template does not show the answer {answer!r} verbatim after its prompt")
    lead = full[len(prompt) : place] if follows else ""
    return before, prompt[len(before) :], "" if lead.strip() else lead, full[place + len(answer) :]


def _first_token(offsets: list[tuple[int, int]], place: int) -> int:
    """The first token that starts at or after a character."""
    return next((i for i, (start, _) in enumerate(offsets) if start >= place), len(offsets))


def _words(spans: list[tuple[int, int]], answer: str) -> list[int]:
    """The word of each token: the one its last character stands in, or for white space the one that follows."""
    ends, cursor = [], 0
    for word in answer.split():
        cursor = answer.index(word, cursor) + len(word)
        ends.append(cursor)
    return [min(sum(end < e for end in ends), len(ends) - 1) for _, e in spans]
