"""Several changes of weights side by side: each row of a forward pass under one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import Tensor
from torch.nn import Linear
from torch.nn.functional import linear

from qfbench.errors import UserError
from qfbench.models.delta import WeightDelta, changed_weight
from qfbench.models.lm import LAYER, LanguageModel

ROOM = 2**30  # bytes of changed weights


def side_by_side(lm: LanguageModel, names: Sequence[str]) -> int:
    """How many changes of these weights `each_applied_to` can hold in `ROOM`; 1 where it cannot change them."""
    parameters = dict(lm.model.named_parameters())
    if not names or not all(
        LAYER.search(n) and isinstance(lm.model.get_submodule(n.rpartition(".")[0]), Linear) for n in names
    ):
        return 1
    return max(1, ROOM // sum(parameters[name].numel() * parameters[name].element_size() for name in names))


@contextmanager
def each_applied_to(lm: LanguageModel, deltas: Sequence[WeightDelta]) -> Iterator[LanguageModel]:
    """Let every row of a pass have one of several changes while open (`LanguageModel.answer_each`), with the very weights that
    `applied_to` would write. The model's own are not written to.

    Raises:
        UserError: a change is for another model, or one that does not stand in a linear layer.
        FloatingPointError: a changed weight would be NaN or infinite.
    """
    parameters = dict(lm.model.named_parameters())
    names = list(dict.fromkeys(name for delta in deltas for name in delta.changes))
    handles = []
    before = list(lm.changed)
    try:
        for name in names:
            module = lm.model.get_submodule(name.rpartition(".")[0])
            if not (LAYER.search(name) and isinstance(module, Linear)):
                raise UserError(
                    f"{name}: is no weight of a linear map in a layer; it cannot be changed for each row apart"
                )
            weights = [
                changed_weight(parameters, name, delta.changes[name])
                if name in delta.changes
                else parameters[name].detach()
                for delta in deltas
            ]
            handles.append(module.register_forward_hook(partial(_by_row, lm.rows, weights)))
        lm.changed.extend(names)
        yield lm
    finally:
        lm.changed[:] = before
        for handle in handles:
            handle.remove()


def _by_row(
    rows: Sequence[int], weights: Sequence[Tensor], module: Linear, given: tuple[Tensor], output: Tensor
) -> Tensor:
    """A hook: the output of a linear layer whose weight is another one in each row."""
    (inputs,) = given
    if len(rows) != len(inputs):
        raise RuntimeError(
            "rows of a pass under changes that are open side by side, and nobody said which is under which"
        )
    for change in set(rows):
        own = [r for r, its in enumerate(rows) if its == change]
        output[own] = linear(inputs[own], weights[change], module.bias)
    return output
