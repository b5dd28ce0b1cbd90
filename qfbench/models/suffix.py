"""Forward passes that cost what an edit makes necessary: the layers above it, over states that the layers below made once.

A model whose lowest changed layer is i gives, up to there, the states that it gave unedited. They are kept for every prompt,
every rated reply and the last greedy reply, and only the layers from i on are run. One pass rates replies and finds how far a
rated reply, or the last one, still is the greedy reply; only what differs from all of them is decoded token by token.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from qfbench.models.firing import FAMILIES

Tokens = tuple[int, ...]
GUESS = 8  # tokens that are guessed at once where the last reply says no more
LOGITS = 2**28  # bytes that the logits of one product with the head may take, in float32


@dataclass(frozen=True)
class Question:
    """A prompt, replies to rate after it (the token that ends the turn included), and whether its greedy reply is wanted."""

    prompt: Tokens
    rated: tuple[Tokens, ...] = ()
    reply: bool = True


@dataclass(frozen=True)
class Answer:
    """Of each rated reply its nats and hits, token by token; of the greedy reply its tokens, and whether it ended its turn."""

    rated: list[tuple[list[float], list[bool]]]
    said: Tokens = ()
    ended: bool = False


@dataclass(frozen=True)
class Ending:
    """The tokens that end a turn, those of them whose text belongs to the reply, and the most tokens that a reply may have."""

    stops: frozenset[int]
    spoken: frozenset[int]
    most: int


def divides(model: Any, tokens: int) -> bool:
    """Whether a model can be run in two parts here, on dialogues of up to so many `tokens`."""
    if not isinstance(model, PreTrainedModel) or getattr(model, "hf_device_map", None):
        return False
    config = model.config
    if config.model_type.removeprefix("firing_") not in FAMILIES:
        return False
    window = getattr(config, "sliding_window", None) or tokens
    return config._attn_implementation in ("sdpa", "eager") and tokens <= window


def part(decoder: Any, start: int, stop: int | None = None) -> Any:
    """The decoder with its layers from `start` to before `stop` alone; up to there its output is not normalised. Weights are shared."""
    some = copy.copy(decoder)
    some._modules = dict(decoder._modules)
    some.layers = nn.ModuleList(list(decoder.layers)[start:stop])
    some.config = copy.copy(decoder.config)
    some.config.num_hidden_layers = len(some.layers)
    if getattr(decoder.config, "layer_types", None):
        some.config.layer_types = decoder.config.layer_types[start:stop]
    if stop is not None:
        some.norm = nn.Identity()
    return some


@dataclass
class States:
    """What the layers below `layer` made of token sequences, within a bound of `most` bytes; what does not fit is made again.

    They hold for the `weights` of these layers as they were: where a weight is another, or has been written to, all is forgotten.
    """

    most: int = 2**31
    layer: int = 0
    weights: list[tuple[Tensor, int]] = field(default_factory=list)  # with the number of times each was written to
    size: int = 0
    # By prompt and continuation: states [tokens, d]; of a prompt also keys and values [2 layers, heads, tokens, .]
    hidden: dict[tuple[Tokens, Tokens], Tensor] = field(default_factory=dict)
    keys: dict[Tokens, Tensor] = field(default_factory=dict)
    said: dict[Tokens, Tokens] = field(default_factory=dict)  # the last reply to a prompt, as far as it was an input

    def valid_for(self, layer: int, weights: Sequence[Tensor]) -> None:
        known = [(id(weight), version) for weight, version in self.weights]
        if layer != self.layer or [(id(weight), weight._version) for weight in weights] != known:
            self.hidden.clear()
            self.keys.clear()
            self.layer, self.size = layer, 0
            self.weights = [(weight, weight._version) for weight in weights]

    def keep(self, kept: dict[Any, Tensor], key: Any, tensor: Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if key not in kept and self.size + size <= self.most:
            kept[key] = tensor.clone()
            self.size += size

    def say(self, prompt: Tokens, said: Tokens) -> None:
        """Remember a reply; the states of the one before are forgotten."""
        before = self.said.get(prompt)
        if before is not None and before != said and (old := self.hidden.pop((prompt, before), None)) is not None:
            self.size -= old.numel() * old.element_size()
        self.said[prompt] = said


class Suffix:
    """A model cut below `layer`, run over what `states` keeps. `layer` 0 keeps nothing: the whole model is run.

    The `_version` of a weight counts its changes in place; states of weights that have changed since are not used.
    """

    def __init__(self, model: Any, layer: int, states: States, ending: Ending):
        decoder = model.get_decoder()
        self.bottom, self.top = part(decoder, 0, layer), part(decoder, layer)
        self.layer, self.states, self.ending = layer, states, ending
        self.head, self.device = model.get_output_embeddings(), model.device
        self.cache_argument = cache_argument(decoder.forward)
        if layer:
            states.valid_for(layer, list(self.bottom.parameters()))

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to one batch, in order. A row depends on the others by rounding alone.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        rows = [self._row(q) for q in questions]
        asking = any(q.reply for q in questions)
        cache = DynamicCache() if asking else None
        normed = self._over(rows, cache)
        greedy, rated = self._read(normed, rows, questions)
        answers, open_rows = [], {}
        for r, (q, row) in enumerate(zip(questions, rows, strict=True)):
            path, ended = _walk(greedy[r], row[1:], self.ending) if q.reply else ([], False)
            if ended is None:
                open_rows[r] = path
            answers.append((path, ended))
        if cache is not None and open_rows:
            for r, done in self._decode(rows, open_rows, cache).items():
                answers[r] = done
        return [Answer(rated[r], tuple(path), bool(ended)) for r, (path, ended) in enumerate(answers)]

    @torch.no_grad()
    def logits(self, prompts: Sequence[Tokens], first: int) -> Float[Tensor, "rows tokens vocabulary"]:
        """Logits at all positions from `first` on, of token sequences that are padded at the right."""
        return self.head(self._over([[prompt] for prompt in prompts], None)[:, first:])

    def _row(self, question: Question) -> list[Tokens]:
        """The prompt, and what is tried after it, each beside the others: the rated replies and the last reply."""
        draft = self.states.said.get(question.prompt, ()) if question.reply else ()
        tried = [*(reply[:-1] for reply in question.rated), draft[: self.ending.most - 1]]
        return [question.prompt, *dict.fromkeys(branch for branch in tried if branch)]

    def _over(self, rows: Sequence[Sequence[Tokens]], cache: DynamicCache | None) -> Float[Tensor, "rows tokens d"]:
        """The normalised output at every token; `cache` takes keys and values of the upper layers."""
        ids, positions, branch = laid_out(rows, self.device)
        mask = None if all(len(row) <= 2 for row in rows) else self._additive(seen(branch))
        below = self._below(rows, ids, positions, mask, keys=cache is not None)
        return self._run(self.top, mask, positions, cache, inputs_embeds=below)

    def _below(
        self,
        rows: Sequence[Sequence[Tokens]],
        ids: Int[Tensor, "rows tokens"],
        positions: Int[Tensor, "rows tokens"],
        mask: Tensor | None,
        keys: bool,
    ) -> Float[Tensor, "rows tokens d"]:
        """The states that enter the cut, kept ones where there are; `keys` keeps the prompts' keys and values, too."""
        if not self.layer:
            return self.bottom.embed_tokens(ids)
        found = self.states.hidden
        missing = [
            r
            for r, (prompt, *branches) in enumerate(rows)
            if any((prompt, branch) not in found for branch in ((), *branches))
        ]
        made = {}
        if missing:
            cache = DynamicCache() if keys else None
            cut = None if mask is None else mask[missing]
            states = self._run(self.bottom, cut, positions[missing], cache, input_ids=ids[missing])
            lower = _stacked(cache) if cache is not None else None
            for i, r in enumerate(missing):
                prompt, *branches = rows[r]
                at = 0
                for branch in ((), *branches):
                    length = len(branch) or len(prompt)
                    made[prompt, branch] = states[i, at : at + length]
                    self.states.keep(found, (prompt, branch), made[prompt, branch])
                    at += length
                if lower is not None:
                    self.states.keep(self.states.keys, prompt, lower[:, i, :, : len(prompt)])
        whole = [
            torch.cat([made[k] if (k := (row[0], branch)) in made else found[k] for branch in ((), *row[1:])])
            for row in rows
        ]
        return pad_sequence(whole, batch_first=True)

    def _run(
        self, half: Any, mask: Tensor | None, positions: Tensor, cache: DynamicCache | None, **inputs: Tensor
    ) -> Float[Tensor, "rows tokens d"]:
        given = {self.cache_argument: cache, "use_cache": True} if cache is not None else {"use_cache": False}
        out: Tensor = half(attention_mask=mask, position_ids=positions, **inputs, **given).last_hidden_state
        return out

    def _read(
        self, normed: Float[Tensor, "rows tokens d"], rows: Sequence[Sequence[Tokens]], questions: Sequence[Question]
    ) -> tuple[list[list[list[int]]], list[list[tuple[list[float], list[bool]]]]]:
        """Of every row: after the prompt and after each token of each branch, what is said next (a list for each branch, the
        prompt's own token first); and the rated replies' nats and hits."""
        nodes: list[tuple[int, int]] = []
        wanted: list[int] = []
        targets: list[int] = []
        start = 0
        for r, ((prompt, *branches), question) in enumerate(zip(rows, questions, strict=True)):
            nodes += [(r, at) for at in range(len(prompt) - 1, len(prompt) + sum(map(len, branches)))]
            for reply in question.rated:
                place = start + 1 + sum(map(len, branches[: branches.index(reply[:-1])])) if len(reply) > 1 else 0
                wanted += [start, *range(place, place + len(reply) - 1)]
                targets += reply
            start = len(nodes)
        at = torch.tensor(nodes, device=normed.device)
        next_token, logprob = self._heads(normed[at[:, 0], at[:, 1]], wanted, targets)
        greedy: list[list[list[int]]] = []
        rated: list[list[tuple[list[float], list[bool]]]] = []
        node = pair = 0
        for (_, *branches), question in zip(rows, questions, strict=True):
            first, node = next_token[node], node + 1
            said = [[first]]
            for branch in branches:
                said.append([first, *next_token[node : node + len(branch)]])
                node += len(branch)
            greedy.append(said)
            rated.append([])
            for reply in question.rated:
                span = slice(pair, pair + len(reply))
                hits = [next_token[n] == token for n, token in zip(wanted[span], reply, strict=True)]
                rated[-1].append(([-x for x in logprob[span]], hits))
                pair += len(reply)
        return greedy, rated

    def _heads(
        self, normed: Float[Tensor, "nodes d"], wanted: list[int], targets: list[int]
    ) -> tuple[list[int], list[float]]:
        """The likeliest next token at each node; the log-probability of `targets[i]` at the node `wanted[i]`.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        size = max(1, LOGITS // (4 * self.head.weight.shape[0]))
        at = torch.tensor(wanted, device=normed.device, dtype=torch.long)
        target = torch.tensor(targets, device=normed.device, dtype=torch.long)
        logprob = torch.zeros(len(wanted), device=normed.device)
        likeliest = []
        for start in range(0, len(normed), size):
            logits = self.head(normed[start : start + size]).float()
            if not torch.isfinite(logits).all():
                raise FloatingPointError("logits are not finite")
            likeliest.append(logits.argmax(-1))
            here = ((at >= start) & (at < start + size)).nonzero()[:, 0]
            rows = at[here] - start
            logprob[here] = logits[rows, target[here]] - logits.logsumexp(-1)[rows]
        return torch.cat(likeliest).tolist(), logprob.tolist()

    def _decode(
        self, rows: Sequence[Sequence[Tokens]], paths: dict[int, list[int]], cache: DynamicCache
    ) -> dict[int, tuple[list[int], bool]]:
        """Decode on after what is said already (`paths`, by row), several guessed tokens at a time.

        Slots of keys that stand for nothing (padding, guesses that were wrong) stay in the cache, and are masked.
        """
        left = list(paths)
        prompts = [rows[r][0] for r in left]
        cache = self._resumed(prompts, left, cache)
        valid = torch.arange(max(map(len, prompts)))[None] < torch.tensor([[len(prompt)] for prompt in prompts])
        fed = [0] * len(left)  # how many tokens of each path are in the cache
        entered: list[list[Tensor]] = [[] for _ in left]  # their states at the cut
        done: dict[int, tuple[list[int], bool]] = {}
        while left:
            tried = [_guessed(paths[r], rows[r], self.ending.most) for r in left]
            feeds = [tokens[n:] for tokens, n in zip(tried, fed, strict=True)]
            width = max(map(len, feeds))
            ids = torch.tensor([feed + [0] * (width - len(feed)) for feed in feeds], device=self.device)
            starts = torch.tensor([[len(rows[r][0]) + n] for r, n in zip(left, fed, strict=True)])
            positions = starts + torch.arange(width)
            new = torch.ones(width, width, dtype=torch.bool).tril().expand(len(left), -1, -1)
            mask = self._additive(torch.cat([valid[:, None].expand(-1, width, -1), new], 2))
            places = positions.to(self.device)
            below = (
                self._run(self.bottom, mask, places, cache, input_ids=ids)
                if self.layer
                else self.bottom.embed_tokens(ids)
            )
            normed = self._run(self.top, mask, places, cache, inputs_embeds=below)
            real = [(i, j) for i, feed in enumerate(feeds) for j in range(len(feed))]
            at = torch.tensor(real, device=normed.device)
            next_token = iter(self._heads(normed[at[:, 0], at[:, 1]], [], [])[0])
            accepted = torch.zeros(len(left), width, dtype=torch.bool)
            kept = []
            for i, r in enumerate(left):
                path = paths[r]
                greedy = [*path[: fed[i] + 1], *(next(next_token) for _ in feeds[i])]
                paths[r], ended = _walk([[path[0]], greedy], [tuple(tried[i])], self.ending)
                right = sum(a == b for a, b in zip(paths[r][fed[i] :], feeds[i], strict=False))
                accepted[i, :right] = True
                entered[i].append(below[i, :right])
                fed[i] += right
                if ended is None:
                    kept.append(i)
                    continue
                done[r] = paths[r], ended
                self._remember(rows[r][0], tuple(paths[r][: fed[i]]), entered[i])
            stay = torch.tensor(kept, dtype=torch.long)
            valid = torch.cat([valid, accepted], 1)[stay]
            if 0 < len(kept) < len(left):
                cache.batch_select_indices(stay.to(self.device))
            left, fed, entered = [left[i] for i in kept], [fed[i] for i in kept], [entered[i] for i in kept]
        return done

    def _remember(self, prompt: Tokens, said: Tokens, entered: Sequence[Tensor]) -> None:
        self.states.say(prompt, said)
        if self.layer and said:
            self.states.keep(self.states.hidden, (prompt, said), torch.cat(list(entered)))

    def _resumed(self, prompts: Sequence[Tokens], rows: Sequence[int], upper: DynamicCache) -> DynamicCache:
        """Keys and values of these rows' prompts alone, in all layers: kept ones below the cut, and those of the pass above it."""
        longest = max(map(len, prompts))
        chosen = torch.tensor(rows, device=self.device)
        layers = []
        if self.layer and all(prompt in self.states.keys for prompt in prompts):
            each = [self.states.keys[prompt].movedim(2, 0) for prompt in prompts]  # tokens first
            below = pad_sequence(each, batch_first=True).permute(2, 0, 3, 1, 4)  # [2 layers, rows, heads, tokens, .]
            layers = [(below[2 * i], below[2 * i + 1]) for i in range(self.layer)]
        elif self.layer:
            cache = DynamicCache()
            ids, positions, _ = laid_out([[prompt] for prompt in prompts], self.device)
            self._run(self.bottom, None, positions, cache, input_ids=ids)
            layers = _kept(cache)
            lower = _stacked(cache)
            for i, prompt in enumerate(prompts):
                self.states.keep(self.states.keys, prompt, lower[:, i, :, : len(prompt)])
        above = [(keys[chosen, :, :longest], values[chosen, :, :longest]) for keys, values in _kept(upper)]
        return DynamicCache([*layers, *above])

    def _additive(self, allowed: Bool[Tensor, "rows queries keys"]) -> Float[Tensor, "rows 1 queries keys"]:
        """0 where a token may look, and the lowest number elsewhere."""
        dtype = self.head.weight.dtype
        lowest = torch.finfo(dtype).min
        mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed.cpu(), lowest)
        return mask[:, None].to(self.device)


def cache_argument(forward: Any) -> str:
    """What a forward pass calls its key-value cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def laid_out(rows: Sequence[Sequence[Tokens]], device: Any = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, positions, and the branch of each token (0 the prompt, -1 padding), each `[rows, tokens]`.

    Of a row, the prompt stands first, and then every branch, each at the positions behind the prompt.
    """
    width = max(sum(map(len, row)) for row in rows)
    ids, positions, branches = [], [], []
    for prompt, *others in rows:
        tokens, places, branch = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for n, other in enumerate(others, start=1):
            tokens += other
            places += range(len(prompt), len(prompt) + len(other))
            branch += [n] * len(other)
        room = width - len(tokens)
        ids.append(tokens + [0] * room)
        positions.append(places + list(range(places[-1] + 1, places[-1] + 1 + room)))
        branches.append(branch + [-1] * room)
    return torch.tensor(ids, device=device), torch.tensor(positions, device=device), torch.tensor(branches)


def seen(branch: Int[Tensor, "rows tokens"]) -> Bool[Tensor, "rows tokens tokens"]:
    """What each token may look at: itself and what stands before it in the prompt and in its own branch."""
    before = torch.ones(branch.shape[1], branch.shape[1], dtype=torch.bool).tril()
    return before & ((branch[:, None] == 0) | (branch[:, None] == branch[:, :, None]))


def _kept(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, each `[rows, heads, tokens, .]`, of the layers that have run."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def _stacked(cache: DynamicCache) -> Tensor:
    """Keys and values of all layers: `[2 layers, rows, heads, tokens, .]`."""
    return torch.stack([tensor for pair in _kept(cache) for tensor in pair])


def _walk(greedy: Sequence[Sequence[int]], branches: Sequence[Tokens], ending: Ending) -> tuple[list[int], bool | None]:
    """Follow what is said next as far as branches go: the reply so far, and whether it has ended its turn.

    `greedy[0]` is what is said after the prompt; `greedy[i]` that again, and what is said after each token of branch i.
    None instead of an end: no branch goes on as the reply does.
    """
    path: list[int] = []
    following = [(branch, said) for branch, said in zip(branches, greedy[1:], strict=True)]
    token = greedy[0][0]
    while token not in ending.stops:
        path.append(token)
        if len(path) == ending.most:
            return path, False
        following = [(b, said) for b, said in following if len(b) >= len(path) and b[len(path) - 1] == token]
        if not following:
            return path, None
        token = following[0][1][len(path)]
    return ([*path, token] if token in ending.spoken else path), True


def _guessed(path: Sequence[int], row: Sequence[Tokens], most: int) -> list[int]:
    """What is said so far, and a guess of what follows: what followed the same token in what was said before."""
    for text in (path[:-1], *reversed(row[1:])):
        for at in range(len(text) - 1, -1, -1):
            if text[at] == path[-1]:
                return [*path, *text[at + 1 : at + 1 + GUESS]][: max(len(path), most - 1)]
    return list(path)
