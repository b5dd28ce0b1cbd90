"""Forward passes that cost what an edit makes necessary: the layers above it, over states that the layers below made once.

A model whose lowest changed layer is i gives, up to there, the states that it gave unedited. They are kept for every prompt,
every rated reply and the last greedy reply, and only the layers from i on are run. One pass rates replies and finds how far a
rated reply, or the last one, still is the greedy reply; only what differs from all of them is decoded token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from qfbench.models.cut import Cut, held, stacked
from qfbench.models.decoding import Decoded, decode
from qfbench.models.states import States
from qfbench.models.tree import Answer, Ending, Question, Tokens, Tree, laid_out, walk


class Suffix:
    """A model cut below `layer`, run over what `states` keeps. `layer` 0 keeps nothing: the whole model is run.

    The `_version` of a weight counts its changes in place; states of weights that have changed since are not used.
    """

    def __init__(self, model: Any, layer: int, states: States, ending: Ending, rows: list[int] | None = None):
        self.cut, self.layer, self.states, self.ending = Cut(model, layer), layer, states, ending
        self.rows = [] if rows is None else rows  # under which change each row of the pass that runs now is asked
        if layer:
            states.valid_for(layer, list(self.cut.bottom.parameters()))

    @torch.no_grad()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """The answers to one batch, in order. A row depends on the others by rounding alone.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        trees = [self._tree(q) for q in questions]
        self.rows[:] = [q.change for q in questions]
        cache = DynamicCache() if any(q.reply for q in questions) else None
        greedy, rated = self._read(self._over(trees, cache), trees, questions)
        answers: list[tuple[list[int], bool | None]] = []
        for q, tree, said in zip(questions, trees, greedy, strict=True):
            path, ended = walk(said, tree.branches, self.ending) if q.reply else ([], False)
            if q.reply:
                self.states.hold(q.prompt, path)
            answers.append((path, ended))
        unfinished = {r: path for r, (path, ended) in enumerate(answers) if ended is None}
        if cache is not None and unfinished:
            for r, reply in self._decode(questions, trees, unfinished, cache).items():
                answers[r] = reply.path, reply.ended
        return [Answer(rated[r], tuple(path), bool(ended)) for r, (path, ended) in enumerate(answers)]

    @torch.no_grad()
    def logits(self, prompts: Sequence[Tokens], first: int) -> Float[Tensor, "rows tokens vocabulary"]:
        """Logits at all positions from `first` on, of token sequences that are padded at the right."""
        out: Tensor = self.cut.head(self._over([Tree(prompt) for prompt in prompts], None)[:, first:])
        return out

    def _tree(self, question: Question) -> Tree:
        """The prompt, and what is tried after it: the rated replies, and how the last reply began."""
        draft = self.states.draft(question.prompt)[: self.ending.most - 1] if question.reply else ()
        tried = [*(reply[:-1] for reply in question.rated), draft]
        return Tree(question.prompt, tuple(dict.fromkeys(branch for branch in tried if branch)))

    def _over(self, trees: Sequence[Tree], cache: DynamicCache | None) -> Float[Tensor, "rows tokens d"]:
        """The normalised output at every token; `cache` takes keys and values of the upper layers."""
        ids, positions, allowed = laid_out(trees)
        mask = None if allowed is None else self.cut.mask(allowed)
        ids, positions = ids.to(self.cut.device), positions.to(self.cut.device)
        below = self._below(trees, ids, positions, mask, keys=cache is not None)
        return self.cut.above(below, positions, mask, cache)

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
            return self.cut.below(ids, positions, mask, None)
        kept = self.states.hidden
        once = {(tree.prompt, tree.branches): r for r, tree in enumerate(trees)}
        missing = [r for (prompt, branches), r in once.items() if any((prompt, b) not in kept for b in ((), *branches))]
        made = {}
        if missing:
            cache = DynamicCache() if keys else None
            some = None if mask is None else mask[missing]
            states = self.cut.below(ids[missing], positions[missing], some, cache)
            lower = stacked(cache) if cache is not None else None
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
        next_token, logprob = self.cut.read(normed[at[:, 0], at[:, 1]], wanted, targets)
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

    def _decode(
        self, questions: Sequence[Question], trees: Sequence[Tree], paths: dict[int, list[int]], cache: DynamicCache
    ) -> dict[int, Decoded]:
        """Decode on after what is said already (`paths`, by row); each reply is the next draft."""
        replies = {}
        for r, path in paths.items():
            prompt, branches = trees[r].prompt, trees[r].branches
            replies[r] = Decoded(prompt, path, [self.states.said.get(prompt, ()), *branches], questions[r].change)
        resumed = self._resumed([reply.prompt for reply in replies.values()], list(paths), cache)
        decode(self.cut, list(replies.values()), resumed, self.ending, self.rows)
        for reply in replies.values():
            states = torch.cat(reply.entered) if self.layer else None
            self.states.say(reply.prompt, tuple(reply.path[: reply.fed]), states)
        return replies

    def _resumed(self, prompts: Sequence[Tokens], rows: Sequence[int], upper: DynamicCache) -> DynamicCache:
        """Keys and values of these rows' prompts alone, in all layers: kept ones below the cut, and those of the pass above it."""
        longest = max(map(len, prompts))
        chosen = torch.tensor(rows, device=self.cut.device)
        layers = []
        if self.layer and all(prompt in self.states.keys for prompt in prompts):
            each = [self.states.keys[prompt].movedim(2, 0) for prompt in prompts]  # tokens first
            below = pad_sequence(each, batch_first=True).permute(2, 0, 3, 1, 4)  # [2 layers, rows, heads, tokens, .]
            layers = [(below[2 * i], below[2 * i + 1]) for i in range(self.layer)]
        elif self.layer:
            cache = DynamicCache()
            ids, positions, _ = laid_out([Tree(prompt) for prompt in prompts])
            self.cut.below(ids.to(self.cut.device), positions.to(self.cut.device), None, cache)
            layers, lower = held(cache), stacked(cache)
            for i, prompt in enumerate(prompts):
                self.states.keep(self.states.keys, prompt, lower[:, i, :, : len(prompt)])
        above = [(keys[chosen, :, :longest], values[chosen, :, :longest]) for keys, values in held(upper)]
        return DynamicCache([*layers, *above])
