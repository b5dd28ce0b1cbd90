"""What the layers below an edit made of token sequences, kept from one pass to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qfbench.models.tree import Tokens

FEW = 4  # tokens that are tried of a reply of which none held last time


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
    tried: dict[Tokens, int] = field(default_factory=dict)  # how much of it is tried, where not all

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

    def draft(self, prompt: Tokens) -> Tokens:
        """The last reply, or its beginning where it did not hold last time."""
        said = self.said.get(prompt, ())
        return said[: self.tried.get(prompt, len(said))]

    def hold(self, prompt: Tokens, path: Sequence[int]) -> None:
        """Note how far a draft held: twice as much of the next is tried."""
        draft = self.draft(prompt)
        held = next(
            (i for i, (a, b) in enumerate(zip(draft, path, strict=False)) if a != b), min(len(draft), len(path))
        )
        if held < len(draft):
            self.tried[prompt] = FEW + 2 * held
        else:
            self.tried.pop(prompt, None)

    def say(self, prompt: Tokens, said: Tokens, hidden: Tensor | None) -> None:
        """Remember a reply and the states of what is tried of it next; those of the one before are forgotten."""
        before = self.draft(prompt)
        if before and (old := self.hidden.pop((prompt, before), None)) is not None:
            self.size -= old.numel() * old.element_size()
        self.said[prompt] = said
        draft = self.draft(prompt)
        if hidden is not None and draft:
            self.keep(self.hidden, (prompt, draft), hidden[: len(draft)])
