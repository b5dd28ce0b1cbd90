"""A language model with its tokenizer: greedy replies, and scores of given replies, batched."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qfbench.errors import UserError
from qfbench.models import loading
from qfbench.models.cut import divides
from qfbench.models.dialogue import Rendering, render
from qfbench.models.states import States
from qfbench.models.suffix import Suffix
from qfbench.models.tree import Answer, Ending, Question, Tokens, in_batches
from qfbench.models.weights import refuse_offloaded, refuse_recurrent, weights_hash
from qfbench.models.whole import Whole

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")  # in the name of a weight


@dataclass(frozen=True)
class Reply:
    """A greedy reply. `stopped` says whether the model ended its turn by itself."""

    text: str
    stopped: bool


@dataclass(frozen=True)
class Score:
    """How a model rates a given reply, one value per token of it, the end of the turn included."""

    nll: tuple[float, ...]  # nats
    hit: tuple[bool, ...]  # whether the token is the argmax, given all before it

    @property
    def exact(self) -> bool:
        """Whether free-running greedy decoding gives exactly this reply and stops."""
        return all(self.hit)


@dataclass
class LanguageModel:
    """A causal model, its tokenizer, how many dialogues to run at once, and how they are rendered (`dialogue.render`)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    batch_size: int = 64
    max_new_tokens: int = 48
    told: str = "system"
    system_turn: bool = True
    template: str | None = None  # the name of its chat template, where one was asked for
    preamble: str = ""
    # Weights that hold a change now, what is told now (`WeightDelta.applied_to`), and states of the layers below the change.
    changed: list[str] = field(default_factory=list, repr=False, compare=False)
    # Of several changes that are open side by side (`each.each_applied_to`), the one that each row of a pass is under.
    rows: list[int] = field(default_factory=list, repr=False, compare=False)
    told_of: list[tuple[str, str]] = field(default_factory=list, repr=False, compare=False)
    states: States = field(default_factory=States, repr=False, compare=False)

    def __post_init__(self) -> None:
        refuse_offloaded(self.model, self.name)
        refuse_recurrent(self.model, self.name)

    @classmethod
    def load(
        cls,
        name: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int = 64,
        max_new_tokens: int = 48,
        firing: Mapping[str, Any] | None = None,
        plain: bool = False,
        template: str | None = None,
        told: str = "auto",
        preamble: str = "",
    ) -> LanguageModel:
        """Load a model by its name (built in, or installed), a folder in Hugging Face form, a GGUF file, or a hub id.

        No code of the folder is run, and nothing is unpickled.

        Args:
            device: `auto` takes CUDA where it is, `balanced` spreads the layers over all GPUs.
            dtype: `auto` is bfloat16 on CUDA and float32 on a CPU.
            firing: `{"layers": [23], "beta": 10}` runs layers as firing blocks that the folder stores under a stock family's
                name, as the published QF2 weights do; models converted here say so themselves.
            plain: render dialogues as plain `role: text` lines, though the tokenizer has a chat template.
            template: the name of the chat template, where the tokenizer has several.
            told: where an instruction stands (`dialogue.render`); `auto` is `system` unless the template refuses that.
            preamble: what the system turn says in every dialogue.

        Raises:
            UserError: there is no such model, device or dtype; its files cannot be read, lack weights or hold others than
                the configuration says; its chat template cannot be used; or the GPUs do not hold it.
        """
        if not (_whole(batch_size) and _whole(max_new_tokens)):
            raise UserError(
                f"model.batch_size={batch_size} and model.max_new_tokens={max_new_tokens} must be whole numbers, 1 or more"
            )
        read = loading.load(str(name), device, dtype, firing, plain, template, told)
        rendered = (read.told, read.system_turn, template, preamble)
        return cls(read.model, read.tokenizer, str(name), batch_size, max_new_tokens, *rendered)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, told: str = "auto") -> LanguageModel:
        """A model and a tokenizer that are in memory. The tokenizer is copied, as the clock of its template is stopped.

        Raises:
            UserError: the tokenizer is a slow one, or its chat template cannot be used.
        """
        name = model.config.name_or_path or type(model).__name__
        tokenizer = copy.deepcopy(tokenizer)
        how = loading.prepared(name, tokenizer, told=told)
        return cls(model, tokenizer, name, told=how[0], system_turn=how[1])

    @property
    def device(self) -> torch.device:
        """Where inputs go and logits come back: of a model spread over several devices, that of its embedding."""
        return self.model.device

    @property
    def devices(self) -> list[str]:
        """All that hold weights."""
        return sorted({str(p.device) for p in self.model.parameters()})

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def positions(self) -> int | None:
        """How many tokens a dialogue may have; None where the configuration says nothing of it."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None

    def excess(self, tokens: int, reply: int = 0) -> str:
        """In words, by how much these tokens and a reply of up to `reply` exceed the model's positions; empty if they fit."""
        if self.positions is None or tokens + reply <= self.positions:
            return ""
        also = f", and up to {reply} for the reply (model.max_new_tokens)," if reply else ""
        return f"{tokens} tokens{also} are more than the {self.positions} positions of {self.name}"

    def check_lengths(self, rows: Sequence[Sequence[int]], reply: int = 0) -> None:
        """Refuse token ids that, with a reply of up to `reply`, exceed the model's positions: many models run on, and say nonsense.

        Raises:
            UserError: one does; its beginning and its length are named.
        """
        for row in rows:
            if said := self.excess(len(row), reply):
                raise UserError(
                    f"the text {self.tokenizer.decode(list(row[:24]))!r} ... is too long: {said}; shorten it"
                )

    def weights_hash(self) -> str:
        """`weights.weights_hash` of the model as it is now."""
        return weights_hash(self.model)

    def render(self, query: str, system: str = "", answer: str = "") -> Rendering:
        """The dialogue as tokens. Without a `system` text of its own it is told what is kept of the subjects that the query names."""
        if not system and self.told_of:
            system = " ".join(text for subject, text in self.told_of if names(query, subject))
        return render(self.tokenizer, query, system, answer, self.told, self.system_turn, self.preamble)

    def reply(self, query: str, system: str = "") -> str:
        """The greedy reply to one query."""
        return self.replies([self.render(query, system)])[0].text

    def replies(self, prompts: Sequence[Rendering]) -> list[Reply]:
        """Greedy replies, in order. The model's own generation settings (sampling, penalties) are not used."""
        return self.answer(prompts, [])[0]

    def score(self, dialogues: Sequence[Rendering], at_once: int | None = None) -> list[Score]:
        """Scores of the answers of complete dialogues, in order, by teacher-forced passes of up to `at_once` dialogues."""
        return self.answer([], dialogues, at_once)[1]

    def answer(
        self, prompts: Sequence[Rendering], rated: Sequence[Rendering], at_once: int | None = None
    ) -> tuple[list[Reply], list[Score]]:
        """Greedy replies to the prompts of dialogues, and scores of the answers of complete dialogues, both in order.

        Up to `at_once` (by default `batch_size`) prompts run together, those of like length; half as many where memory is
        short. Where the model can be cut (`cut.divides`), only the layers that changed and those above them are run.

        Raises:
            UserError: a dialogue is longer than the model has positions.
            FloatingPointError: a logit is not finite.
        """
        return self.answer_each([(prompts, rated)], at_once)[0]

    def answer_each(
        self, asked: Sequence[tuple[Sequence[Rendering], Sequence[Rendering]]], at_once: int | None = None
    ) -> list[tuple[list[Reply], list[Score]]]:
        """What `answer` gives of each pair of prompts and complete dialogues: of the i-th under the i-th of the changes that are
        open side by side (`each.each_applied_to`)."""
        questions: dict[tuple[int, Tokens], Question] = {}
        for i, (prompts, rated) in enumerate(asked):
            self.check_lengths([r.prompt for r in prompts], self.max_new_tokens)
            self.check_lengths([r.ids for r in rated])
            questions |= {(i, r.prompt): Question(r.prompt, change=i) for r in prompts}
            for r in rated:
                known = questions.get((i, r.prompt), Question(r.prompt, reply=False, change=i))
                if r.reply not in known.rated:
                    known = replace(known, rated=(*known.rated, r.reply))
                questions[i, r.prompt] = known
        answers = self._answers(list(questions.values()), at_once or self.batch_size)
        out = []
        for i, (prompts, rated) in enumerate(asked):
            said = [answers[i, r.prompt] for r in prompts]
            texts = self.tokenizer.batch_decode([list(a.said) for a in said], skip_special_tokens=True) if said else []
            scores = []
            for r in rated:
                nll, hit = answers[i, r.prompt].rated[questions[i, r.prompt].rated.index(r.reply)]
                scores.append(Score(tuple(nll), tuple(hit)))
            out.append(([Reply(text.strip(), a.ended) for text, a in zip(texts, said, strict=True)], scores))
        return out

    def _answers(self, questions: Sequence[Question], size: int) -> dict[tuple[int, Tokens], Answer]:
        longest = max((len(q.prompt) + sum(map(len, q.rated)) for q in questions), default=0) + self.max_new_tokens
        way: Suffix | Whole
        if divides(self.model, longest):
            way = Suffix(self.model, self._lowest_change(), self.states, self.ending, self.rows)
        else:
            way = Whole(self.model, self.ending, self.rows)
        try:
            return {(q.change, q.prompt): answer for q, answer in in_batches(way.answer, questions, size)}
        except FloatingPointError as error:
            raise FloatingPointError(f"{self.name}: {error}") from error

    def _lowest_change(self) -> int:
        """The lowest layer that holds a change now; 0 where none does, or something beside the layers."""
        places = [LAYER.search(name) for name in self.changed]
        return min((int(place[1]) if place else 0 for place in places), default=0)

    def logits(self, rows: Sequence[Tokens], first: int) -> Float[Tensor, "rows tokens vocabulary"]:
        """Logits at all positions from `first` on, of token sequences of one length, which may be padded at the right."""
        if divides(self.model, len(rows[0])):
            return Suffix(self.model, self._lowest_change(), self.states, self.ending).logits(rows, first)
        ids = torch.tensor(rows, device=self.device)
        with torch.no_grad():
            out: Tensor = self.model(input_ids=ids, logits_to_keep=ids.shape[1] - first, use_cache=False).logits
        return out

    def nll(self, texts: Sequence[str]) -> list[tuple[float, ...]]:
        """Of plain texts: the nats of each token but the first, given all before it."""
        ids = [tuple(self.tokenizer(text).input_ids) for text in texts]
        long = [Rendering(row, 1, 1, len(row) - 1, ()) for row in ids if len(row) > 1]
        # All positions are scored: as many texts at once as keep the logits, in float32, within 1 GiB.
        size = 4 * len(self.tokenizer) * max((len(r.ids) for r in long), default=1)
        scores = iter(self.score(long, min(self.batch_size, max(1, 2**30 // size))))
        return [next(scores).nll if len(row) > 1 else () for row in ids]

    def stops(self) -> set[int]:
        """Tokens that end a turn: the end of text, and what the template puts after an answer.

        Without a chat template that is a line break, alone or as the end of a longer token (".\n").
        """
        declared = self.model.generation_config.eos_token_id
        stops = {self.tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])}
        if self.tokenizer.chat_template is None:
            stops |= self._line_ends
        else:
            answered = self.render("?", answer="Yes")
            stops |= set(answered.ids[answered.closer : answered.closer + 1])
        return {i for i in stops if i is not None}

    @property
    def ending(self) -> Ending:
        """How a greedy reply ends. A token that ends a line with text of its own (".\n") ends a plain turn, and belongs to it."""
        spoken = self._line_ends if self.tokenizer.chat_template is None else frozenset()
        return Ending(frozenset(self.stops()), spoken, self.max_new_tokens)

    @cached_property
    def _line_ends(self) -> frozenset[int]:
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return frozenset(i for i, text in enumerate(texts) if "\n" in text)


def names(query: str, subject: str) -> bool:
    """Whether the query holds the subject as whole words, in capitals or not."""
    return re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", query, re.IGNORECASE) is not None


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0
