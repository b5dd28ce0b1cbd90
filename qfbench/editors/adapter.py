"""Anyone's LoRA adapter as an editor, so that what it changed can be measured as edits are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from qfbench.editors.base import Editor
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.models import lora
from qfbench.models.delta import WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.sites import Site

PLACE = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:mlp|self_attn)\.(\w+)\.weight")


@dataclass(frozen=True)
class Adapter(Editor):
    """What a trained adapter changes, whatever the facts are. It is there after the first edit; later ones add nothing.

    Args:
        path: the folder of a plain LoRA adapter (`lora.read`) of linear layers of feed-forward blocks and attention.
        files: `lora.fingerprint` of it, which tells runs of different adapters in one folder apart; "" is not compared.

    Raises:
        UserError: there is no adapter, one of another kind, or one of other files.
    """

    path: str
    files: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.files not in ("", now := lora.fingerprint(self._folder)):
            raise UserError(f"editor.files={self.files}: the adapter in {self.path} is another one now, {now}")
        if not self._delta.changes:
            raise UserError(f"editor.path={self.path}: the adapter changes nothing")

    @cached_property
    def _delta(self) -> WeightDelta:
        return lora.read(self._folder)

    @property
    def _folder(self) -> Path:
        return Path(self.path).expanduser()

    @property
    def sites(self) -> tuple[Site, ...]:
        places = [PLACE.fullmatch(name) for name in self._delta.changes]
        if None in places:
            name = next(n for n, place in zip(self._delta.changes, places, strict=True) if place is None)
            raise UserError(f"editor.path={self.path}: {name} stands in no layer's feed-forward block or attention")
        return tuple(sorted((Site(int(p[1]), p[2]) for p in places if p), key=lambda site: (site.layer, site.module)))

    def check(self, lm: LanguageModel) -> None:
        self.edit(lm, [])

    def edit(self, lm: LanguageModel, facts: Sequence[Fact]) -> WeightDelta:
        parameters = dict(lm.model.named_parameters())
        if {site.weight_name(lm.model) for site in self.sites} != set(self._delta.changes):
            raise UserError(f"editor.path={self.path}: the adapter was trained on another model than {lm.name}")
        for name, change in self._delta.changes.items():
            shape = (change.left.shape[0], change.right.shape[1] if change.right is not None else 0)
            if parameters[name].shape != shape:
                raise UserError(
                    f"editor.path={self.path}: the adapter was trained on another model: {name} is "
                    f"{list(shape)} there, and {list(parameters[name].shape)} in {lm.name}"
                )
        return self._delta.to(self.sites[0].home(lm.model))

    def one_by_one(
        self, lm: LanguageModel, facts: Sequence[Fact], done: int = 0
    ) -> Iterator[Callable[[], WeightDelta]]:
        for n in range(done, len(facts)):
            yield WeightDelta if n else partial(self.edit, lm, facts)
