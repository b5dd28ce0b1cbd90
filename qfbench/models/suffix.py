"""Forward passes that cost what an edit makes necessary: the layers above it, over states that the layers below made once.

A model whose lowest changed layer is i gives, up to there, the states that it gave unedited. They are kept for every prompt,
every rated reply and the last greedy reply, and only the layers from i on are run. One pass rates replies and finds how far a
rated reply, or the last one, still is the greedy reply; only what differs from all of them is decoded token by token.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from qfbench.models.firing import FAMILIES
from qfbench.models.states import States
from qfbench.models.tree import Answer, Ending, Question, Tokens, Tree, guess, laid_out, walk

GUESS = 2  # tokens that are guessed at first; twice as many each time all were right, half as many when none was
MOST = 16  # tokens that are guessed at once
LOGITS = 2**28  # bytes that the logits of one product with the head may take, in float32


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
        trees = [self._tree(q) for q in questions]
        cache = DynamicCache() if any(q.reply for q in questions) else None
        greedy, rated = self._read(self._over(trees, cache), trees, questions)
        answers, unfinished = [], {}
        for r, (q, tree) in enumerate(zip(questions, trees, strict=True)):
            path, ended = walk(greedy[r], tree.branches, self.ending) if q.reply else ([], False)
            if q.reply:
                self.states.hold(q.prompt, path)
            if ended is None:
                unfinished[r] = path
            answers.append((path, ended))
        if cache is not None and unfinished:
            for r, done in self._decode(trees, unfinished, cache).items():
                answers[r] = done
        return [Answer(rated[r], tuple(path), bool(ended)) for r, (path, ended) in enumerate(answers)]

    @torch.no_grad()
    def logits(self, prompts: Sequence[Tokens], first: int) -> Float[Tensor, "rows tokens vocabulary"]:
        """Logits at all positions from `first` on, of token sequences that are padded at the right."""
        out: Tensor = self.head(self._over([Tree(prompt) for prompt in prompts], None)[:, first:])
        return out

    def _tree(self, question: Question) -> Tree:
        """The prompt, and what is tried after it: the rated replies, and how the last reply began."""
        draft = self.states.draft(question.prompt)[: self.ending.most - 1] if question.reply else ()
        tried = [*(reply[:-1] for reply in question.rated), draft]
        return Tree(question.prompt, tuple(dict.fromkeys(branch for branch in tried if branch)))

    def _over(self, trees: Sequence[Tree], cache: DynamicCache | None) -> Float[Tensor, "rows tokens d"]:
        """The normalised output at every token; `cache` takes keys and values of the upper layers."""
        ids, positions, allowed = laid_out(trees)
        mask = None if allowed is None else self._additive(allowed)
        ids, positions = ids.to(self.device), positions.to(self.device)
        below = self._below(trees, ids, positions, mask, keys=cache is not None)
        return self._run(self.top, mask, positions, cache, inputs_embeds=below)

    def _below(
        self,
        trees: Sequence[Tree],
        ids: Int[Tensor, "rows tokens"],
        positions: Int[Tensor, "rows tokens"],
        mask: Tensor | None,
        keys: bool,
    ) -> Float[Tensor, "rows tokens d"]:
        """The states that enter the cut, kept ones where there are; `keys` keeps the prompts' keys and values, too."""
        if not self.layer:
            embedded: Tensor = self.bottom.embed_tokens(ids)
            return embedded
        kept = self.states.hidden
        missing = [r for r, tree in enumerate(trees) if any((tree.prompt, b) not in kept for b in ((), *tree.branches))]
        made = {}
        if missing:
            cache = DynamicCache() if keys else None
            cut = None if mask is None else mask[missing]
            states = self._run(self.bottom, cut, positions[missing], cache, input_ids=ids[missing])
            lower = _stacked(cache) if cache is not None else None
            for i, r in enumerate(missing):
                tree = trees[r]
                for branch, path in zip(((), *tree.branches), (range(len(tree.prompt)), *tree.paths), strict=True):
                    made[tree.prompt, branch] = states[i, list(path)]
                    self.states.keep(kept, (tree.prompt, branch), made[tree.prompt, branch])
                if lower is not None:
                    self.states.keep(self.states.keys, tree.prompt, lower[:, i, :, : len(tree.prompt)])

        def of(tree: Tree) -> Tensor:
            prompt, *branches = (
                made[key] if (key := (tree.prompt, branch)) in made else kept[key] for branch in ((), *tree.branches)
            )
            # A branch adds what it does not share with those before it.
            return torch.cat([prompt, *(b[len(b) - new :] for b, new in zip(branches, tree.new, strict=True))])

        return pad_sequence([of(tree) for tree in trees], batch_first=True)

    def _run(
        self, half: Any, mask: Tensor | None, positions: Tensor, cache: DynamicCache | None, **inputs: Tensor
    ) -> Float[Tensor, "rows tokens d"]:
        given = {self.cache_argument: cache, "use_cache": True} if cache is not None else {"use_cache": False}
        out: Tensor = half(attention_mask=mask, position_ids=positions, **inputs, **given).last_hidden_state
        return out

    def _read(
        self, normed: Float[Tensor, "rows tokens d"], trees: Sequence[Tree], questions: Sequence[Question]
    ) -> tuple[list[list[list[int]]], list[list[tuple[list[float], list[bool]]]]]:
        """Of every row: what is said next, after the prompt, and then for each branch after the prompt and each of its tokens;
        and the rated replies' nats and hits."""
        nodes: list[tuple[int, int]] = []
        wanted: list[int] = []
        targets: list[int] = []
        places: list[list[list[int]]] = []  # of every row, after the prompt and along each branch, as indices of nodes
        for r, (tree, question) in enumerate(zip(trees, questions, strict=True)):
            last = len(tree.prompt) - 1
            start = len(nodes) - last
            nodes += [(r, at) for at in range(last, len(tree.tokens))]
            places.append([[start + at for at in (last, *path)] for path in ((), *tree.paths)])
            for reply in question.rated:
                along = places[r][1 + tree.branches.index(reply[:-1])] if len(reply) > 1 else places[r][0]
                wanted += along
                targets += reply
        at = torch.tensor(nodes, device=normed.device)
        next_token, logprob = self._heads(normed[at[:, 0], at[:, 1]], wanted, targets)
        greedy = [[[next_token[n] for n in along] for along in row] for row in places]
        rated, pair = [], 0
        for question in questions:
            scores = []
            for reply in question.rated:
                span = slice(pair, pair + len(reply))
                hits = [next_token[n] == token for n, token in zip(wanted[span], reply, strict=True)]
                scores.append(([-x for x in logprob[span]], hits))
                pair += len(reply)
            rated.append(scores)
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
        self, trees: Sequence[Tree], paths: dict[int, list[int]], cache: DynamicCache
    ) -> dict[int, tuple[list[int], bool]]:
        """Decode on after what is said already (`paths`, by row), several guessed tokens at a time.

        Slots of keys that stand for nothing (padding, guesses that were wrong) stay in the cache, and are masked.
        """
        left = list(paths)
        prompts = [trees[r].prompt for r in left]
        cache = self._resumed(prompts, left, cache)
        valid = torch.arange(max(map(len, prompts)))[None] < torch.tensor([[len(prompt)] for prompt in prompts])
        fed = [0] * len(left)  # how many tokens of each path are in the cache
        trust = [GUESS] * len(left)
        entered: list[list[Tensor]] = [[] for _ in left]  # their states at the cut
        done: dict[int, tuple[list[int], bool]] = {}
        while left:
            room = self.ending.most - 1
            tried = [
                [*paths[r], *guess(paths[r], self._heard(trees[r]), min(n, room - len(paths[r])))]
                for r, n in zip(left, trust, strict=True)
            ]
            feeds = [tokens[n:] for tokens, n in zip(tried, fed, strict=True)]
            width = max(map(len, feeds))
            ids = torch.tensor([feed + [0] * (width - len(feed)) for feed in feeds], device=self.device)
            starts = torch.tensor([[len(trees[r].prompt) + n] for r, n in zip(left, fed, strict=True)])
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
                paths[r], ended = walk([[path[0]], greedy], [tuple(tried[i])], self.ending)
                right = sum(a == b for a, b in zip(paths[r][fed[i] :], feeds[i], strict=False))
                accepted[i, :right] = True
                entered[i].append(below[i, :right])
                fed[i] += right
                guessed = len(tried[i]) - len(path)
                if guessed:
                    met = fed[i] - len(path)
                    trust[i] = min(MOST, 2 * trust[i]) if met == guessed else max(1, met or trust[i] // 2)
                if ended is None:
                    kept.append(i)
                    continue
                done[r] = paths[r], ended
                states = torch.cat(entered[i]) if self.layer else None
                self.states.say(trees[r].prompt, tuple(paths[r][: fed[i]]), states)
            stay = torch.tensor(kept, dtype=torch.long)
            valid = torch.cat([valid, accepted], 1)[stay]
            if 0 < len(kept) < len(left):
                cache.batch_select_indices(stay.to(self.device))
            left, fed, trust = ([every[i] for i in kept] for every in (left, fed, trust))
            entered = [entered[i] for i in kept]
        return done

    def _heard(self, tree: Tree) -> list[Tokens]:
        """What may be said again: the rated replies, and before them the last reply."""
        return [self.states.said.get(tree.prompt, ()), *tree.branches]

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
            ids, positions, _ = laid_out([Tree(prompt) for prompt in prompts])
            self._run(self.bottom, None, positions.to(self.device), cache, input_ids=ids.to(self.device))
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
        return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)[:, None].to(self.device)


def cache_argument(forward: Any) -> str:
    """What a forward pass calls its key-value cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _kept(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values, each `[rows, heads, tokens, .]`, of the layers that have run."""
    layers: list[Any] = cache.layers
    return [(layer.keys, layer.values) for layer in layers if layer.is_initialized]


def _stacked(cache: DynamicCache) -> Tensor:
    """Keys and values of all layers: `[2 layers, rows, heads, tokens, .]`."""
    return torch.stack([tensor for pair in _kept(cache) for tensor in pair])
