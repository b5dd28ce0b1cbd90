"""A language model with its tokenizer: loading, greedy replies, and scores of given replies, batched."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from qfbench.errors import UserError
from qfbench.models import difference
from qfbench.models.dialogue import Rendering, chosen, dated, render, settled
from qfbench.models.firing import with_firing_layers
from qfbench.models.weights import (
    check_device,
    first_line,
    load_weights,
    quiet,
    refuse_not_finite,
    refuse_offloaded,
    refuse_recurrent,
)

BUILT_IN = Path(__file__).parents[1] / "world" / "models"
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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
    ) -> LanguageModel:
        """Load a built-in model by name, a folder in Hugging Face form, or a model of the hub by its id.

        No code of the folder is run, and nothing is unpickled.

        Args:
            device: `auto` takes CUDA where it is, `balanced` spreads the layers over all GPUs.
            dtype: `auto` is bfloat16 on CUDA and float32 on a CPU.
            firing: `{"layers": [23], "beta": 10}` runs layers as firing blocks that the folder stores under a stock family's
                name, as the published QF2 weights do; models converted here say so themselves.
            plain: render dialogues as plain `role: text` lines, though the tokenizer has a chat template.
            template: the name of the chat template, where the tokenizer has several.
            told: where an instruction stands: in a `system` turn, or in the `user` turn, before the query; `auto` is `system`
                unless the template refuses that.

        Raises:
            UserError: there is no such model, device or dtype; its files cannot be read, lack weights or hold others than
                the configuration says; its chat template cannot be used; or the GPUs do not hold it.
        """
        if not (_whole(batch_size) and _whole(max_new_tokens)):
            raise UserError(
                f"model.batch_size={batch_size} and model.max_new_tokens={max_new_tokens} must be whole numbers, 1 or more"
            )
        source = find(str(name))
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        spread = device == "balanced"
        if not spread:
            check_device(device)
        if dtype == "auto":
            on_cuda = torch.cuda.is_available() if spread else device.startswith("cuda")
            dtype = "bfloat16" if on_cuda else "float32"
        if dtype not in tuple(FLOATS):
            raise UserError(f"model.dtype={dtype}: a model runs in one of auto, {', '.join(FLOATS)}")
        fires = () if firing is None else firing_layers(firing)
        if plain and template is not None:
            raise UserError(
                f"model.template={template}: with model.plain=true there is no chat template; leave one of them out"
            )
        try:
            with quiet():
                base = difference.base_of(source)
                whole = find(base) if base else source
                if Path(whole).is_dir() and not [*Path(whole).glob("tokenizer*"), *Path(whole).glob("vocab*")]:
                    raise UserError("the folder has no tokenizer (tokenizer.json); copy the model's own into it")
                tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=False)
                if not tokenizer.is_fast:
                    raise UserError(
                        f"{name}: its tokenizer has no tokenizer.json, by which tokens are found in a text; make one"
                    )
                tokenizer.chat_template = (
                    None if plain else dated(chosen(tokenizer.chat_template, template), datetime.now())
                )
                told, system_turn = settled(tokenizer, told)
                model: Any = load_weights(whole, FLOATS[dtype], device if spread else None, fires)
                if base:
                    model = difference.apply(model, source)
                if firing is not None:
                    model = with_firing_layers(model, fires, firing["beta"])
                model = (model if spread else model.to(device)).eval()
        except UserError as error:
            raise UserError(f"cannot load the model {source!r}: {error}") from error
        except Exception as error:  # of transformers and what it reads with; files may be spoilt in any way
            what = f"cannot load the model {source!r} on {device}"
            if not Path(source).is_dir():
                what += ", which is no folder here and was looked for on the hub"
            if "trust_remote_code" in str(error):
                what += ", since it wants code of its own to be run, which qfbench never does"
            raise UserError(f"{what}: {first_line(error)}") from error
        refuse_not_finite(model, str(name))
        return cls(
            model.requires_grad_(False), tokenizer, str(name), batch_size, max_new_tokens, told, system_turn, template
        )

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
        """SHA-256 over the names and bytes of all parameters, first 16 hex digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def render(self, query: str, system: str = "", answer: str = "") -> Rendering:
        return render(self.tokenizer, query, system, answer, self.told, self.system_turn)

    def reply(self, query: str, system: str = "") -> str:
        """The greedy reply to one query."""
        return self.replies([self.render(query, system)])[0].text

    @torch.no_grad()
    def replies(self, prompts: Sequence[Rendering]) -> list[Reply]:
        """Greedy replies, in order. The model's own generation settings (sampling, penalties) are not used."""
        self.check_lengths([r.prompt for r in prompts], self.max_new_tokens)
        out: dict[int, Reply] = {}
        for chunk in self._chunks([r.prompt for r in prompts]):
            for i, reply in zip(chunk, self._decode([prompts[i].prompt for i in chunk]), strict=True):
                out[i] = reply
        return [out[i] for i in range(len(prompts))]

    @torch.no_grad()
    def score(self, dialogues: Sequence[Rendering], at_once: int | None = None) -> list[Score]:
        """Scores of the answers of complete dialogues, in order, by one teacher-forced pass."""
        self.check_lengths([r.ids for r in dialogues])
        out: dict[int, Score] = {}
        for chunk in self._chunks([r.ids for r in dialogues], at_once):
            rows = [dialogues[i] for i in chunk]
            ids, _ = self._padded([r.ids for r in rows], side="right")
            first = min(r.answer for r in rows) - 1
            kept = list(range(first, ids.shape[1] - 1))  # no tensor: the head may be on another device
            # Padding stands at the right of causal attention: no mask is needed.
            logits = self._finite(self.model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits).float()
            for row, (i, r) in enumerate(zip(chunk, rows, strict=True)):
                wanted = torch.tensor(r.reply, device=self.device)
                at = logits[row, r.answer - 1 - first :][: len(r.reply)].log_softmax(-1)
                nll = -at.gather(1, wanted[:, None])[:, 0]
                out[i] = Score(tuple(nll.tolist()), tuple((at.argmax(-1) == wanted).tolist()))
        return [out[i] for i in range(len(dialogues))]

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

    @cached_property
    def cache_argument(self) -> str:
        """What the forward pass calls its key-value cache: `cache` from transformers 5.24 on, `past_key_values` before."""
        return "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

    @cached_property
    def _line_ends(self) -> frozenset[int]:
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return frozenset(i for i, text in enumerate(texts) if "\n" in text)

    def _decode(self, prompts: list[tuple[int, ...]]) -> list[Reply]:
        stops, plain = self.stops(), self.tokenizer.chat_template is None
        ids, mask = self._padded(prompts, side="left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        said: list[list[int]] = [[] for _ in prompts]
        ended = [False] * len(prompts)
        for _ in range(self.max_new_tokens):
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                logits_to_keep=1,
                **{self.cache_argument: cache},
            ).logits
            chosen = self._finite(logits)[:, -1].argmax(-1)
            for row, token in enumerate(chosen.tolist()):
                if ended[row]:
                    continue
                ended[row] = token in stops
                if not ended[row] or (plain and token in self._line_ends):  # ".\n" ends a line with text of its own
                    said[row].append(token)
            if all(ended):
                break
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
            positions = positions[:, -1:] + 1
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [Reply(text.strip(), end) for text, end in zip(texts, ended, strict=True)]

    def _finite(self, logits: Tensor) -> Tensor:
        if not torch.isfinite(logits).all():
            raise FloatingPointError(f"{self.name} gives logits that are not finite")
        return logits

    def _padded(self, rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
        """Token ids and mask, `[rows, longest]`, on the model's device."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            at = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
            ids[i, at] = torch.tensor(row)
            mask[i, at] = 1
        return ids.to(self.device), mask.to(self.device)

    def _chunks(self, rows: Sequence[Sequence[int]], size: int | None = None) -> list[list[int]]:
        """Indices of rows of like length, `size` (by default `batch_size`) at a time."""
        order, size = sorted(range(len(rows)), key=lambda i: len(rows[i])), size or self.batch_size
        return [order[i : i + size] for i in range(0, len(order), size)]


def find(name: str) -> str:
    """Where a model is: a built-in model's folder, a folder as given, or a hub id as given.

    Raises:
        UserError: it is none of them.
    """
    built_in = sorted(p.name for p in BUILT_IN.glob("*") if (p / "config.json").exists())
    if name in built_in:
        return str(BUILT_IN / name)
    path = Path(name).expanduser()
    if (path / "config.json").exists():
        return str(path)
    if path.is_dir():
        raise UserError(f"{name}: the folder has no config.json; give a folder in Hugging Face form")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    raise UserError(
        f"{name}: no such model. Give model.path=FOLDER, a hub id (owner/name), or a built-in: {', '.join(built_in)}"
    )


def _whole(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n > 0


def firing_layers(firing: Any) -> list[int]:
    """The layers that a setting `model.firing` names.

    Raises:
        UserError: it is no such setting.
    """
    layers, beta = (firing.get("layers"), firing.get("beta")) if isinstance(firing, Mapping) else (None, None)
    numbers = isinstance(layers, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in layers)
    if not (numbers and layers and isinstance(beta, int | float) and not isinstance(beta, bool) and len(firing) == 2):
        raise UserError(f"model.firing={firing}: must be null or like {{layers: [23], beta: 10}}")
    return list(layers)
