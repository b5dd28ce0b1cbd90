"""Activations at a site, read through hooks that never outlive the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

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


@torch.no_grad()
def record(
    lm: LanguageModel, dialogues: Sequence[Rendering], site: Site, at: Sequence[Sequence[int]] | None = None
) -> list[Activations]:
    """Activations of each dialogue at the positions `at` (all of them by default), in order, by teacher-forced passes that stop
    behind the site's layer.

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

    def run(batch: list[Question]) -> list[Activations]:
        rows = [question.prompt for question in batch]
        return _pass(lm, site, rows, [wanted[row] for row in rows])

    asked = [Question(ids, reply=False) for ids in wanted]
    found = {question.prompt: read for question, read in in_batches(run, asked, lm.batch_size, TOKENS)}
    out = []
    for dialogue, own in zip(dialogues, positions, strict=True):
        places = torch.tensor([wanted[dialogue.ids].index(position) for position in own], dtype=torch.long)
        out.append(Activations(**{name: tensor[places] for name, tensor in vars(found[dialogue.ids]).items()}))
    return out


def _pass(
    lm: LanguageModel, site: Site, rows: Sequence[Tokens], positions: Sequence[Sequence[int]]
) -> list[Activations]:
    """One forward pass over token sequences, read at some positions of each."""

    def stop(*_: object) -> None:
        raise _Done

    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(lm.device)
    at = torch.tensor([(r, position) for r, own in enumerate(positions) for position in own]).view(-1, 2).long()
    with reading(lm, site, lambda tensor: tensor[at[:, 0], at[:, 1]]) as seen:
        handle = site.block(lm.model).register_forward_hook(stop)
        try:
            lm.model(input_ids=ids, use_cache=False)
        except _Done:
            pass
        finally:
            handle.remove()
    split = {name: tensor.split([len(own) for own in positions]) for name, (tensor,) in seen.items()}
    return [Activations(**{name: parts[r] for name, parts in split.items()}) for r in range(len(rows))]
