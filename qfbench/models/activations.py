"""Activations at a site, read through hooks that never outlive the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from qfbench.models.cut import LOGITS, Cut, divides
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site
from qfbench.models.tree import Question, Tokens, in_batches

TOKENS = 2048  # of one pass, padding included: enough to keep a GPU busy, and little beside a model's weights


@dataclass(frozen=True)
class Activations:
    """What editors read at positions of one dialogue, in the model's dtype."""

    input: Float[Tensor, "tokens d"]  # x: the normalised input of the feed-forward block
    key: Float[Tensor, "tokens f"]  # u: the input of down_proj; in a firing block y = σ(β W x)
    residual: Float[Tensor, "tokens d"]  # v: the residual stream entering the feed-forward block
    output: Float[Tensor, "tokens d"]  # of the decoder layer: W u + v where QF applies


class _Done(Exception):
    """Raised by the hook behind the site's layer: the layers above need not run."""


@contextmanager
def reading(
    lm: LanguageModel, site: Site, kept: Callable[[Tensor], Tensor] = Tensor.clone
) -> Iterator[dict[str, list[Tensor]]]:
    """While open, every forward pass appends what is `kept` of its `input`, `key`, `residual` and `output` at the site's layer.

    They come as `[batch, tokens, .]`; `kept` copies.
    """
    seen: dict[str, list[Tensor]] = {"input": [], "key": [], "residual": [], "output": []}

    def keep_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen[name].append(kept(args[0].detach()))

    def keep_output(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor | tuple[Tensor, ...]], None]:
        return lambda _, args, out: seen[name].append(kept((out[0] if isinstance(out, tuple) else out).detach()))

    norm, down, block = (
        site.residual_norm(lm.model),
        Site(site.layer, "down_proj").linear(lm.model),
        site.block(lm.model),
    )
    handles = [
        norm.register_forward_pre_hook(keep_input("residual")),
        norm.register_forward_hook(keep_output("input")),
        down.register_forward_pre_hook(keep_input("key")),
        block.register_forward_hook(keep_output("output")),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def record(
    lm: LanguageModel, dialogues: Sequence[Rendering], site: Site, at: Sequence[Sequence[int]] | None = None
) -> list[Activations]:
    """`record_many` at one site; the layers above it are not run."""
    return record_many(lm, dialogues, [site], at)[0]


@torch.no_grad()
def record_many(
    lm: LanguageModel, dialogues: Sequence[Rendering], sites: Sequence[Site], at: Sequence[Sequence[int]] | None = None
) -> list[list[Activations]]:
    """For each site the activations of each dialogue at the positions `at` (all of them by default), in order, by
    teacher-forced passes that stop behind the highest site's layer.

    Dialogues of like length run together, each once; half of them at a time where memory is short. They are padded at the
    right, where causal attention does not look: a dialogue depends on its company by rounding alone. Only what is asked for
    outlives a pass.

    Raises:
        UserError: a dialogue is longer than the model has positions.
    """
    lm.check_lengths([dialogue.ids for dialogue in dialogues])
    wanted: dict[Tokens, list[int]] = {}
    positions = [list(range(len(d.ids))) for d in dialogues] if at is None else [list(own) for own in at]
    for dialogue, own in zip(dialogues, positions, strict=True):
        wanted[dialogue.ids] = sorted({*wanted.get(dialogue.ids, ()), *own})

    def run(batch: list[Question]) -> list[list[Activations]]:
        rows = [question.prompt for question in batch]
        return _pass(lm, sites, rows, [wanted[row] for row in rows])

    asked = [Question(ids, reply=False) for ids in wanted]
    found = {question.prompt: read for question, read in in_batches(run, asked, lm.batch_size, TOKENS)}
    out: list[list[Activations]] = [[] for _ in sites]
    for dialogue, own in zip(dialogues, positions, strict=True):
        places = torch.tensor([wanted[dialogue.ids].index(position) for position in own], dtype=torch.long)
        for there, read in zip(out, found[dialogue.ids], strict=True):
            there.append(Activations(**{name: tensor[places] for name, tensor in vars(read).items()}))
    return out


def _pass(
    lm: LanguageModel, sites: Sequence[Site], rows: Sequence[Tokens], positions: Sequence[Sequence[int]]
) -> list[list[Activations]]:
    """One forward pass over token sequences, read at some positions of each: for each row what each site gives."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(lm.device)
    at = torch.tensor([(r, position) for r, own in enumerate(positions) for position in own]).view(-1, 2).long()
    with ExitStack() as open_ones:
        seen = [open_ones.enter_context(reading(lm, site, lambda t: t[at[:, 0], at[:, 1]])) for site in sites]
        open_ones.callback(_stopped(lm, sites).remove)
        with suppress(_Done):
            lm.model(input_ids=ids, use_cache=False)
    split = [
        {name: tensor.split([len(own) for own in positions]) for name, (tensor,) in there.items()} for there in seen
    ]
    return [[Activations(**{name: parts[r] for name, parts in own.items()}) for own in split] for r in range(len(rows))]


def _stopped(lm: LanguageModel, sites: Sequence[Site]) -> RemovableHandle:
    """A hook that ends a pass, by `_Done`, behind the highest site's layer."""

    def stop(*_: object) -> None:
        raise _Done

    return max(sites, key=lambda site: site.layer).block(lm.model).register_forward_hook(stop)


@torch.no_grad()
def climb(
    lm: LanguageModel,
    dialogues: Sequence[Rendering],
    sites: Sequence[Site],
    at: Sequence[Sequence[int]],
    change: Callable[[int, Tensor, Tensor], Tensor],
    entering: dict[Tokens, Tensor],
    rate: bool = False,
) -> Float[Tensor, " tokens"] | None:
    """One pass over all dialogues in which each site is changed on the way, so that the layers above see what comes of it.

    Before the matrix of `sites[i]` is used, `change(i, keys [tokens f], residual [tokens d])`, with what enters it and what its output
    is added to at the positions `at` of each dialogue, in order, gives what is added to it ([d f]) for the rest of the pass. No
    weight is written. The sites must stand from low to high. To `rate` is to run the layers above them as well: the nats, under the
    changed model, of the tokens that follow these positions. `entering` keeps the states that enter the lowest site's layer, for
    passes over the same dialogues; nothing below may change in between.
    """
    lm.check_lengths([dialogue.ids for dialogue in dialogues])
    ids = pad_sequence([torch.tensor(dialogue.ids) for dialogue in dialogues], batch_first=True).to(lm.device)
    places = [(r, place) for r, own in enumerate(at) for place in own]
    rows, columns = torch.tensor(places, dtype=torch.long).view(-1, 2).T
    added: dict[int, Tensor] = {}
    said: list[Tensor] = []  # what enters the head
    head = lm.model.get_output_embeddings()

    def before(i: int, seen: dict[str, list[Tensor]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys = args[0][rows, columns]
            added[i] = change(i, keys, seen["residual"][0]).to(keys.device, keys.dtype)

        return hook

    def behind(i: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda _, args, out: out + args[0] @ added[i].T

    def at_the_head(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        said.append(args[0][rows, columns])
        raise _Done

    with ExitStack() as open_ones:
        for i, site in enumerate(sites):
            seen = open_ones.enter_context(reading(lm, site, lambda t: t[rows, columns]))
            linear = site.linear(lm.model)
            for handle in (linear.register_forward_pre_hook(before(i, seen)), linear.register_forward_hook(behind(i))):
                open_ones.callback(handle.remove)
        end = head.register_forward_pre_hook(at_the_head) if rate else _stopped(lm, sites)
        open_ones.callback(end.remove)
        with suppress(_Done):
            if divides(lm.model, ids.shape[1]):
                cut = Cut(lm.model, sites[0].layer)
                states = _entering(lm, cut, [dialogue.ids for dialogue in dialogues], entering)
                cut.head(cut.above(states, torch.arange(ids.shape[1], device=lm.device).expand_as(ids), None, None))
            else:
                lm.model(input_ids=ids, use_cache=False)
    return _nats(head, said[0], ids[rows, columns + 1]) if rate else None


def _entering(
    lm: LanguageModel, cut: Cut, rows: Sequence[Tokens], known: dict[Tokens, Tensor]
) -> Float[Tensor, "rows tokens d"]:
    """The states that enter the cut, padded at the right; `known` takes those that it lacks."""

    def run(batch: list[Question]) -> list[Tensor]:
        ids = pad_sequence([torch.tensor(question.prompt) for question in batch], batch_first=True).to(lm.device)
        states = cut.below(ids, torch.arange(ids.shape[1], device=lm.device).expand_as(ids), None, None)
        return [state[: len(question.prompt)].clone() for question, state in zip(batch, states, strict=True)]

    missing = [Question(ids, reply=False) for ids in dict.fromkeys(rows) if ids not in known]
    known |= {question.prompt: state for question, state in in_batches(run, missing, lm.batch_size, TOKENS)}
    return pad_sequence([known[ids] for ids in rows], batch_first=True)


def _nats(head: Any, states: Float[Tensor, "tokens d"], wanted: Tensor) -> Float[Tensor, " tokens"]:
    """−log p of the wanted token of each state; in float32, at a bounded number of states at once."""
    size = max(1, LOGITS // (4 * head.weight.shape[0]))
    pairs = zip(states.split(size), wanted.split(size), strict=True)
    logits = ((head(part).float(), own) for part, own in pairs)
    return torch.cat([functional.cross_entropy(of, own.to(of.device), reduction="none") for of, own in logits])
