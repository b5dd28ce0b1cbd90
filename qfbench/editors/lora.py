"""LoRA (Hu et al. 2021): fine-tuning of a low-rank change of one or several matrices, by the library peft."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qfbench.editors.base import Editor, check_layers, matrices
from qfbench.editors.finetune import answers, batched, descend, summed_nll
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models.delta import LowRank, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site


@dataclass(frozen=True)
class LoRA(Editor):
    """Low-rank adaptation: W + (α / r) B A, where A and B are trained by Adam and W stays.

    The loss is that of `FineTune`, all facts in one batch: the answers and the ends of their turns, without the instruction. As
    peft has them, B begins at 0 and A at random; each edit begins anew, on the model as the edits before it left it.

    Args:
        layer: the decoder layer that is changed, from 0.
        lr: the learning rate of Adam.
        steps: the most steps to take.
        stop_at: stop once the loss, in nats per token, is below this; 0 never stops.
        more_layers: further layers that are changed as well.
        target_modules: which matrices of these layers, by name: of the feed-forward block (`down_proj`, `up_proj`, `gate_proj`) and
            of the attention (`q_proj`, `k_proj`, `v_proj`, `o_proj`).
        rank: r, the rank of each change.
        alpha: α.
        seed: of A, together with the newest fact's id.
    """

    layer: int
    lr: float
    steps: int
    stop_at: float = 0.01
    more_layers: Sequence[int] = ()
    target_modules: Sequence[str] = ("down_proj",)
    rank: int = 8
    alpha: float = 16.0
    seed: int = 0

    above_zero: ClassVar[tuple[str, ...]] = ("lr", "steps", "rank", "alpha")
    not_negative: ClassVar[tuple[str, ...]] = ("stop_at",)

    def __post_init__(self) -> None:
        super().__post_init__()
        matrices((self.layer,), self.target_modules)

    @property
    def sites(self) -> tuple[Site, ...]:
        return matrices((self.layer, *self.more_layers), self.target_modules)

    def check(self, lm: LanguageModel) -> None:
        library()
        check_layers(lm, self.more_layers)
        super().check(lm)

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        self.check(lm)
        names = [site.weight_name(lm.model).removesuffix(".weight") for site in self.sites]
        dialogues = answers(lm, facts)
        tokens = sum(len(dialogue.reply) for dialogue in dialogues)
        seed = random.Random(f"{self.seed}-{facts[-1].id}").getrandbits(63)
        with adapted(lm.model, names, self.rank, self.alpha, seed), torch.enable_grad():
            fixed = {n: p.detach() for n, p in lm.model.named_parameters()}
            begin = {key: fixed[key] for name in names for key in factors(name)}
            dtype = torch.promote_types(lm.dtype, torch.float32)  # bfloat16 would swallow small steps

            def losses(flat: Tensor) -> Iterator[Tensor]:
                for batch in batched(dialogues, lm.batch_size):
                    yield summed_nll(lm, batch, fixed | shaped(flat, begin)) / tokens

            start = torch.cat([p.to(lm.device, dtype).flatten() for p in begin.values()])
            flat, steps, loss = descend(losses, start, self.lr, self.steps, self.stop_at)
        found, changes = shaped(flat, begin), {}
        for site, name in zip(self.sites, names, strict=True):
            a, b = (found[key].to(site.home(lm.model)) for key in factors(name))
            changes[f"{name}.weight"] = LowRank(self.alpha / self.rank * b, a)
        return WeightDelta(changes, {"tokens": float(tokens), "steps": float(steps), "loss": loss})


def factors(name: str) -> tuple[str, str]:
    """What peft calls A and B of the module `name`."""
    return f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"


def shaped(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that were laid end to end, each in the shape and place that it has in `like`."""
    parts = flat.split([p.numel() for p in like.values()])
    return {name: part.view_as(p).to(p.device) for part, (name, p) in zip(parts, like.items(), strict=True)}


@contextmanager
def adapted(model: nn.Module, names: Iterable[str], rank: int, alpha: float, seed: int) -> Iterator[None]:
    """While open, peft's layers stand around the modules of these `names`; on exit the model is as it was, flags included.

    peft's own `unload` would leave all weights frozen, and does not run where an injection fails half-way.
    """
    peft, names = library(), list(names)
    held = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    modules = [getattr(parent, name) for parent, name in held]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, model)
        yield
    finally:
        for (parent, name), module in zip(held, modules, strict=True):
            setattr(parent, name, module)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        vars(model).pop("peft_config", None)


def library() -> Any:
    """peft, which not every installation has.

    Raises:
        UserError: it is missing.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError("editor=lora needs peft: pip install 'qfbench[lora]'") from error
    return peft
