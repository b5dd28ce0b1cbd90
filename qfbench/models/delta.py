"""Changes of weights as values. This is the only file that writes weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from qfbench.errors import UserError
from qfbench.models import sealed
from qfbench.models.lm import LanguageModel

Model = TypeVar("Model", bound=LanguageModel | PreTrainedModel)
KEYS = 2**30  # bytes of keys that a sum of changes keeps: those of some 2,000 facts in Qwen2.5-1.5B


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix as a product, `left @ right`. A dense one has `right = None`."""

    left: Float[Tensor, "rows rank"]
    right: Float[Tensor, "rank cols"] | None = None

    def dense(self) -> Float[Tensor, "rows cols"]:
        return self.left if self.right is None else self.left @ self.right

    @property
    def rank(self) -> int:
        """The width of the product: an upper bound of the rank."""
        return self.left.shape[1] if self.right is not None else min(self.left.shape)

    def norm(self) -> float:
        """Frobenius norm, from the factors' Gram matrices where that is cheaper."""
        if self.right is None:
            return self.left.norm().item()
        gram = (self.left.T @ self.left) * (self.right @ self.right.T)
        return gram.sum().clamp(min=0).sqrt().item()

    def top(self) -> float:
        """The largest singular value, from the factors where that is cheaper."""
        return torch.linalg.matrix_norm(self._core(), 2).item()

    def singular_values(self) -> Float[Tensor, " least"]:
        """From the largest, in float64; of factors as many as they are wide. Their squares sum to that of `norm`."""
        return torch.linalg.svdvals(self._core())

    def truncated(self, rank: int | None = None) -> LowRank:
        """The nearest matrix of at most this rank (Eckart and Young 1936), in float64; None: the rank that it has.

        Its factors are balanced: both have the square roots of the singular values.
        """
        if self.right is None:
            outer, core, inner = None, self.left.double(), None
        else:
            outer, left = torch.linalg.qr(self.left.double())
            inner, right = torch.linalg.qr(self.right.double().T)
            core = left @ right.T
        u, s, v = torch.linalg.svd(core, full_matrices=False)
        least = s[:1] * max(core.shape) * torch.finfo(self.left.dtype).eps
        kept = max(1, min(int((s > least).sum()), rank or len(s)))
        left, right = u[:, :kept] * s[:kept].sqrt(), s[:kept].sqrt()[:, None] * v[:kept]
        return LowRank(left if outer is None else outer @ left, right if inner is None else right @ inner.T)

    def _core(self) -> Tensor:
        """A matrix with the singular values of this one, in float64, as small as the factors allow."""
        if self.right is None:
            return _triangle(self.left if self.left.shape[0] > self.left.shape[1] else self.left.T)
        return _triangle(self.left) @ _triangle(self.right.T).T

    def placebo(self, seed: int) -> LowRank:
        """A random matrix of the same shape, rank and Frobenius norm."""
        generator = torch.Generator().manual_seed(seed)
        rows, cols = self.left.shape[0], (self.left if self.right is None else self.right).shape[1]
        rank = max(1, int(torch.linalg.matrix_rank(self._core())))
        factors = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((rows, rank), (rank, cols)))
        drawn = LowRank(*(factor.to(self.left.device, self.left.dtype) for factor in factors))
        return LowRank(drawn.left * (self.norm() / drawn.norm()), drawn.right)

    def __add__(self, other: LowRank) -> LowRank:
        """Factors are put side by side up to a quarter of the matrix's width: a wider product costs as much as the passes of an
        edit each time that it is applied, and is made dense."""
        a, b = self, other
        if a.right is None or b.right is None or 4 * (a.rank + b.rank) > min(a.left.shape[0], a.right.shape[1]):
            return LowRank(a.dense() + b.dense())
        return LowRank(torch.cat([a.left, b.left], 1), torch.cat([a.right, b.right], 0))


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """A change of named weights. A value: adding, measuring and saving it touch no model.

    `notes` are figures that the editor found on the way (tokens taught, condition of the keys ...), for the log; `keys` are,
    for each fact in the order of teaching, the inputs of the changed matrix at its taught tokens, `[taught, cols]`, where the
    editor has such. Notes are not saved, keys if asked. `told` are no weights: (subject, instruction), which is put into the
    prompt of a dialogue whose query names the subject (`LanguageModel.render`).
    """

    changes: Mapping[str, LowRank] = field(default_factory=dict)
    notes: Mapping[str, float] = field(default_factory=dict)
    keys: Sequence[Tensor] = ()
    told: Sequence[tuple[str, str]] = ()

    def __add__(self, other: WeightDelta) -> WeightDelta:
        merged = dict(self.changes)
        for name, change in other.changes.items():
            merged[name] = merged[name] + change if name in merged else change
        keys: list[Tensor] = []
        size = 0
        for key in reversed((*self.keys, *other.keys)):
            size += key.numel() * key.element_size()
            if keys and size > KEYS:
                break
            keys.append(key)
        return WeightDelta(merged, other.notes, keys[::-1], (*self.told, *other.told))

    def norm(self) -> float:
        """Frobenius norm over all changed weights."""
        return sum(change.norm() ** 2 for change in self.changes.values()) ** 0.5

    def overlap(self) -> float:
        """The largest |cosine| between a key of the newest fact and one of any earlier fact, 0 to 1; NaN without earlier ones.

        A sum keeps `KEYS` bytes of keys: of very many facts the first are left out.
        """
        if len(self.keys) < 2:
            return math.nan
        *earlier, newest = self.keys
        known = torch.cat([*earlier]).float()
        cosines = normalize(newest.float(), dim=1) @ known.T / known.norm(dim=1).clamp(min=1e-12)
        return cosines.abs().max().item()

    def placebo(self, seed: int) -> WeightDelta:
        """A random change of the same weights, each of the rank and Frobenius norm that it has here."""
        return WeightDelta({name: change.placebo(seed + i) for i, (name, change) in enumerate(self.changes.items())})

    def to(self, device: torch.device | str) -> WeightDelta:
        """The changes alone, on another device."""
        moved = {
            n: LowRank(c.left.to(device), None if c.right is None else c.right.to(device))
            for n, c in self.changes.items()
        }
        return WeightDelta(moved)

    @contextmanager
    def applied_to(self, lm: Model) -> Iterator[Model]:
        """Add the change to the model's weights while open, and tell what is `told`; on exit the saved weights are put back bit
        for bit.

        The sum is formed in float64 and then rounded to the model's dtype.

        Raises:
            UserError: the change is for another model (a weight is missing, or has another shape).
            FloatingPointError: a changed weight would be NaN or infinite; nothing is written.
        """
        if isinstance(lm, LanguageModel):
            model, changed, told_of = lm.model, lm.changed, lm.told_of
        elif self.told:
            raise UserError("nothing can be told to a bare model; LanguageModel.of(model, tokenizer) takes it")
        else:
            model, changed, told_of = lm, [], []
        parameters = dict(model.named_parameters())
        written = {name: changed_weight(parameters, name, change) for name, change in self.changes.items()}
        saved = {name: parameters[name].detach().clone() for name in written}
        before, told_before = list(changed), list(told_of)
        try:
            changed.extend(written)
            told_of.extend(self.told)
            with torch.no_grad():  # not through `.data`, which would hide the change from the weight's version
                for name, tensor in written.items():
                    parameters[name].copy_(tensor)
            yield lm
        finally:
            changed[:], told_of[:] = before, told_before
            with torch.no_grad():
                for name, tensor in saved.items():
                    parameters[name].copy_(tensor)

    def rounding_loss(self, lm: LanguageModel) -> float:
        """How much of the change is lost when written in the model's dtype: ‖written − wanted‖ / ‖wanted‖, 0 to 1 or so."""
        parameters = dict(lm.model.named_parameters())
        lost = 0.0
        for name, change in self.changes.items():
            stored = changed_weight(parameters, name, change)
            wanted = change.dense().double().to(stored.device)
            lost += (stored.double() - parameters[name].double() - wanted).norm().item() ** 2
        return lost**0.5 / self.norm() if self.norm() else 0.0

    def save(self, path: str | Path, keys: bool = False) -> None:
        """Write to one safetensors file, if asked with the `keys`."""
        held = {f":{i}:key": key for i, key in enumerate(self.keys if keys else ())}
        told = {"told": json.dumps(self.told)} if self.told else {}
        sealed.save(held | self.tensors(), Path(path), {"format": "qfbench-delta"} | told)

    def tensors(self) -> dict[str, Tensor]:
        """The factors of all changes, by name."""
        factors = [
            (f"{n}:{side}", factor)
            for n, c in self.changes.items()
            for side, factor in (("left", c.left), ("right", c.right))
        ]
        return {name: factor for name, factor in factors if factor is not None}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], **more: Any) -> WeightDelta:
        """What `tensors` gave."""
        names = sorted({name.rsplit(":", 1)[0] for name in tensors})
        return cls({n: LowRank(tensors[f"{n}:left"], tensors.get(f"{n}:right")) for n in names}, **more)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> WeightDelta:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or no delta.
        """
        tensors, metadata = sealed.load(Path(path), device)
        if metadata.get("format") != "qfbench-delta":
            raise UserError(f"{path}: a safetensors file, but not one written by WeightDelta.save")
        told = [(subject, text) for subject, text in json.loads(metadata.get("told", "[]"))]
        keys = [tensors.pop(f":{i}:key") for i in range(sum(name.endswith(":key") for name in tensors))]
        return cls.of_tensors(tensors, keys=keys, told=told)


NOTHING = WeightDelta()


def _triangle(matrix: Float[Tensor, "rows cols"]) -> Float[Tensor, "least cols"]:
    """R of A = QR, in float64: a matrix with the singular values of A, much faster to take them of where A is tall."""
    return torch.linalg.qr(matrix.double(), mode="r").R


def changed_weight(parameters: Mapping[str, Tensor], name: str, change: LowRank) -> Tensor:
    """The changed weight in the model's dtype and place."""
    if name not in parameters:
        raise UserError(f"the delta changes {name}, which this model does not have; it was made for another model")
    weight = parameters[name].detach()
    dense = change.dense().to(weight.device)
    if dense.shape != weight.shape:
        raise UserError(
            f"the delta changes {name} as {list(dense.shape)}, but this model has it as {list(weight.shape)}; "
            "it was made for another model"
        )
    written = (weight.double() + dense.double()).to(weight.dtype)
    if not torch.isfinite(written).all():
        raise FloatingPointError(
            f"{name} plus its change holds a NaN or an infinity in {weight.dtype}; nothing was written"
        )
    return written
