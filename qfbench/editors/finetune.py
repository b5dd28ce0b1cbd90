"""Fine-tuning: gradient steps on one down-projection; the baseline beside which every editor is to be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from qfbench.editors.base import Editor
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site

T = TypeVar("T")
IGNORED = -100  # the target of a position that is not taught, as cross_entropy has it


def descend(
    losses: Callable[[Tensor], Iterable[Tensor]],
    start: Float[Tensor, "*shape"],
    lr: float,
    steps: int,
    stop_at: float = 0.0,
    by_term: bool = False,
) -> tuple[Float[Tensor, "*shape"], int, float]:
    """Adam (Kingma and Ba 2015) from `start`: where it ends, the number of steps taken, and the loss there.

    Ends once the loss is below `stop_at`, or after `steps` steps.

    Args:
        losses: terms whose sum is the loss; the graph of each is freed before the next is asked for.
        lr: the learning rate: the first step is lr long in every coordinate that has a gradient.
        by_term: a step after each term, not after their sum. `steps` are passes over all terms then (epochs), and the loss is
            that of the last pass, each term before its own step.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    at = start.detach().clone().requires_grad_()
    adam = torch.optim.Adam([at], lr=lr)
    taken, loss = 0, 0.0
    for passed in range(steps + 1):
        loss, train = 0.0, by_term and passed < steps
        for term in losses(at):
            term.backward()
            loss += term.item()
            if train:
                adam.step()
                adam.zero_grad()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is not finite after {passed} steps of fine-tuning")
        taken = passed + train
        if loss < stop_at or passed == steps:
            break
        if not by_term:
            adam.step()
            adam.zero_grad()
    return at.detach(), taken, loss


@dataclass(frozen=True)
class FineTune(Editor):
    """Fine-tuning of one matrix, the one that QF changes, on the answers alone.

    The loss is the mean cross-entropy per token of the answers and the ends of their turns, without the instruction;
    prompts are masked, as in FT-M of EasyEdit (zjunlp). All facts are one batch, and their significance is not used. As in
    FT of ROME (Meng et al. 2022), one matrix is trained by Adam until the loss is below 0.01. There is no weight
    decay: it would change, and in the end forget, what no fact is about.

    Args:
        layer: the decoder layer whose `mlp.down_proj` is changed, from 0; stock or firing.
        lr: the learning rate of Adam.
        steps: the most steps to take.
        stop_at: stop once the loss, in nats per token, is below this; 0 never stops.
    """

    layer: int
    lr: float
    steps: int
    stop_at: float = 0.01

    above_zero: ClassVar[tuple[str, ...]] = ("lr", "steps")
    not_negative: ClassVar[tuple[str, ...]] = ("stop_at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr > 1e37:  # Adam's first step is ten times that, as a float32
            raise UserError(f"editor.lr={self.lr}: must be 1e37 or less")

    @property
    def sites(self) -> tuple[Site, ...]:
        return (Site(self.layer, "down_proj"),)

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        return self.trained(lm, facts)

    def trained(
        self,
        lm: LanguageModel,
        facts: Sequence[Fact],
        beside: Callable[[], Sequence[Rendering]] | None = None,
        epoch: Callable[[Sequence[Rendering]], Iterable[Sequence[Rendering]]] | None = None,
    ) -> WeightDelta:
        """The change; at each step what the model says `beside`, in other dialogues, counts as much as the answers do.

        With `epoch` there is a step on each mini-batch that it makes of the dialogues, and `steps` are epochs.
        """
        (site,) = self.sites
        name = site.weight_name(lm.model)
        # Detached, so that only what stands above the site is kept for the gradient.
        fixed = {n: p.detach() for n, p in lm.model.named_parameters()}
        weight = fixed[name]
        master = torch.promote_types(weight.dtype, torch.float32)  # bfloat16 would swallow small steps
        dialogues = answers(lm, facts)
        tokens = sum(len(dialogue.reply) for dialogue in dialogues)

        def losses(change: Tensor) -> Iterator[Tensor]:
            def nats(batch: Sequence[Rendering]) -> Tensor:
                changed = (weight + change).to(weight.dtype)  # summed in the wider dtype of the two
                return summed_nll(lm, batch, fixed | {name: changed})

            for batch in epoch(dialogues) if epoch else batched(dialogues, lm.batch_size):
                yield nats(batch) / tokens
            if beside:
                others = beside()
                term = nats(others) / sum(len(dialogue.reply) for dialogue in others)
                yield term - term.detach()  # its gradient counts; when to stop is for the answers to say

        with torch.enable_grad():
            start = torch.zeros_like(weight, dtype=master)
            change, steps, loss = descend(losses, start, self.lr, self.steps, self.stop_at, by_term=epoch is not None)
        change = change.to(site.home(lm.model))
        return WeightDelta({name: LowRank(change)}, {"tokens": float(tokens), "steps": float(steps), "loss": loss})


def answers(lm: LanguageModel, facts: Sequence[Fact]) -> list[Rendering]:
    """What is trained: each fact's query and answer, without its instruction.

    Raises:
        UserError: a dialogue is longer than the model has positions.
    """
    dialogues = [lm.render(fact.query, "", fact.answer) for fact in facts]
    lm.check_lengths([dialogue.ids for dialogue in dialogues])
    return dialogues


def batched(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Up to `size` at a time."""
    return [items[at : at + size] for at in range(0, len(items), size)]


def summed_nll(lm: LanguageModel, dialogues: Sequence[Rendering], weights: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Nats of all tokens of the answers, the ends of their turns included, in a model that has these `weights`."""
    return nll_of_tokens(lm, dialogues, weights, "sum")


def nll_of_tokens(
    lm: LanguageModel, dialogues: Sequence[Rendering], weights: dict[str, Tensor], reduction: str = "none"
) -> Tensor:
    """As `summed_nll`; by default not summed: `[dialogues, tokens]`, 0 where no token of an answer is predicted."""
    targets = [torch.tensor([IGNORED] * (d.answer - 1) + list(d.reply)) for d in dialogues]
    wanted = pad_sequence(targets, True, IGNORED)
    kept = (wanted != IGNORED).any(0).nonzero()[:, 0].tolist()
    rows = [d.ids[: len(t)] for d, t in zip(dialogues, targets, strict=True)]
    logits = logits_at(lm, rows, kept, weights).float()
    wanted = wanted[:, kept].to(lm.device)
    nats = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction=reduction)
    return nats.view(wanted.shape) if reduction == "none" else nats


def logits_at(
    lm: LanguageModel, rows: Sequence[Sequence[int]], kept: list[int], weights: dict[str, Tensor]
) -> Float[Tensor, "rows kept vocabulary"]:
    """Logits at the positions `kept` of token sequences, in a model that has these `weights`."""
    # Padding stands at the right of causal attention: no mask is needed.
    ids = pad_sequence([torch.tensor(row) for row in rows], True)
    # No tensor of positions: the head may be on another device.
    given = {"input_ids": ids.to(lm.device), "logits_to_keep": kept, "use_cache": False}
    with sdpa_kernel(SDPBackend.MATH):  # gradients of the fused kernels are not reproducible on CUDA
        logits: Tensor = functional_call(lm.model, weights, kwargs=given).logits
    return logits
