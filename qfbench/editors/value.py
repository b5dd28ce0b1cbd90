"""What a layer is to give at a fact's subject: the search for v* of ROME (Meng et al. 2022, Eq. 4) and z* of MEMIT (Meng et al. 2023,
Eq. 16), for many facts at once.

Searched is a vector δ, added to the layer's output at the last token of the subject, with which the answer costs least.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from qfbench.editors.finetune import batched, descend, logits_at, nll_of_tokens
from qfbench.editors.qf import check_finite
from qfbench.editors.teach import subject_at
from qfbench.facts.base import Fact
from qfbench.models.activations import record
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class Asked:
    """A fact's query and answer, alone and in contexts, with the place of its subject's last token in each.

    `essence` is a prompt about the subject whose reply is to begin as before (ROME's "{subject} is a").
    """

    fact: Fact
    dialogues: tuple[Rendering, ...]  # alone first
    at: tuple[int, ...]
    essence: Rendering
    essence_at: int

    @classmethod
    def of(cls, lm: LanguageModel, fact: Fact, contexts: Sequence[str] = ()) -> Asked:
        """Contexts stand where an instruction would stand.

        Raises:
            UserError: the fact has no subject, its query does not name it, or a dialogue is too long.
        """
        dialogues = tuple(lm.render(fact.query, context, fact.answer) for context in ("", *contexts))
        about = replace(fact, query=f"{fact.subject} is a")
        essence = lm.render(about.query)
        places = tuple(subject_at(dialogue, fact) for dialogue in dialogues)
        lm.check_lengths([dialogue.ids for dialogue in (*dialogues, essence)])
        return cls(fact, dialogues, places, essence, subject_at(essence, about))

    def alone(self) -> Asked:
        """Without the contexts."""
        return replace(self, dialogues=self.dialogues[:1], at=self.at[:1])


@dataclass(frozen=True)
class Value:
    """What was found for one fact."""

    change: Float[Tensor, " d"]  # δ
    output: Float[Tensor, " d"]  # of the layer, alone and unchanged
    loss: float  # nats, penalties included


def values(
    lm: LanguageModel,
    site: Site,
    asked: Sequence[Asked],
    lr: float,
    steps: int,
    stop_at: float,
    limit: float,
    weight_decay: float,
    kl: float,
) -> list[Value]:
    """δ of each fact, all searched together; each has its own loss and its own end, and does not depend on the others.

    The loss is the nats of the whole answer, the mean over the contexts, + `kl` · KL(now ‖ before) of the first token of the
    reply to `essence` + `weight_decay` · (‖δ‖ / ‖output‖)². Adam (`finetune.descend`) goes in units of the output's norm.

    Args:
        lr: the length of the first step, as a share of the output's norm.
        steps: at most.
        stop_at: a fact's search ends once its loss is below this.
        limit: the longest δ, as a share of the output's norm.

    Raises:
        FloatingPointError: an activation or a loss is not finite; it names the fact.
    """
    facts = [one.fact for one in asked]
    read = record(lm, [one.dialogues[0] for one in asked], site, [one.at[:1] for one in asked])
    check_finite(site, facts, read)
    device = site.linear(lm.model).weight.device
    output = torch.cat([one.output for one in read]).to(device, torch.promote_types(lm.dtype, torch.float32))
    unit = output.norm(dim=1, keepdim=True) / math.sqrt(output.shape[1])
    weights = {name: parameter.detach() for name, parameter in lm.model.named_parameters()}
    found: dict[int, tuple[Tensor, float]] = {}

    def change(at: Tensor, rows: Sequence[int]) -> Tensor:
        own = at[list(rows)]
        share = own.norm(dim=1, keepdim=True) / math.sqrt(own.shape[1])
        return own * unit[list(rows)] * (limit / share.clamp(min=limit))

    def begun(at: Tensor, rows: Sequence[int]) -> Float[Tensor, "rows vocabulary"]:
        """Log probabilities of the reply's first token after each `essence`."""
        prompts = [asked[i].essence.ids for i in rows]
        last = [len(prompt) - 1 for prompt in prompts]
        kept = sorted(set(last))
        with added(lm, site, [asked[i].essence_at for i in rows], change(at, rows)):
            logits = logits_at(lm, prompts, kept, weights)
        return log_softmax(logits[[*range(len(rows))], [kept.index(place) for place in last]].float(), 1)

    def losses(at: Tensor) -> Iterator[Tensor]:
        left = [i for i in range(len(asked)) if i not in found]
        total = torch.zeros(len(asked))

        def of(rows: Sequence[int], terms: Tensor) -> Tensor:
            total.index_add_(0, torch.tensor(rows), terms.detach().float().cpu())
            return terms.sum()

        for batch in batched([(i, k) for i in left for k in range(len(asked[i].at))], lm.batch_size):
            own = [i for i, _ in batch]
            with added(lm, site, [asked[i].at[k] for i, k in batch], change(at, own)):
                nats = nll_of_tokens(lm, [asked[i].dialogues[k] for i, k in batch], weights).sum(1)
            yield of(own, nats / torch.tensor([len(asked[i].at) for i in own], device=nats.device))
        for rows in batched(left, lm.batch_size) if kl else ():
            before = torch.stack([usual[i] for i in rows])
            yield of(rows, kl * kl_div(before, begun(at, rows), reduction="none", log_target=True).sum(1))
        if weight_decay and left:
            size = (change(at, left) / unit[left]).pow(2).mean(1)
            yield of(left, weight_decay * size)
        for i in left:
            loss = total[i].item()
            if not math.isfinite(loss):
                raise FloatingPointError(f"layer {site.layer}, fact {facts[i].id}: the loss of its value is not finite")
            latest[i] = loss
            if loss < stop_at:
                found[i] = change(at.detach(), [i])[0], loss

    start = torch.zeros_like(output)
    latest: dict[int, float] = {}
    with torch.no_grad():
        usual = [row for rows in batched(range(len(asked)), lm.batch_size) if kl for row in begun(start, rows)]
    with torch.enable_grad():
        end, _, _ = descend(losses, start, lr, steps, stop_at)
    ends = [found.get(i, (change(end, [i])[0], latest[i])) for i in range(len(asked))]
    return [Value(delta, there, loss) for there, (delta, loss) in zip(output, ends, strict=True)]


@contextmanager
def added(lm: LanguageModel, site: Site, at: Sequence[int], change: Float[Tensor, "rows d"]) -> Iterator[None]:
    """While open, row r of a batch gets `change[r]` added to the output of the site's matrix at token `at[r]`."""
    rows, places = list(range(len(at))), list(at)

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        here = torch.tensor(rows, device=out.device), torch.tensor(places, device=out.device)
        return out.index_put(here, out[here] + change.to(out.device, out.dtype))

    handle = site.linear(lm.model).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
