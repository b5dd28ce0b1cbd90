"""Edits as things: the change that each fact brought, in order, with what made it: to apply, to undo, to hand on."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from qfbench.editors.base import Editor
from qfbench.editors.regimes import in_turn
from qfbench.errors import UserError
from qfbench.facts.base import Fact, Probe
from qfbench.models import sealed
from qfbench.models.delta import NOTHING, Model, WeightDelta
from qfbench.models.lm import LanguageModel
from qfbench.models.weights import weights_hash

FILE = "edits.safetensors"


@dataclass(frozen=True)
class Source:
    """Which model was edited: how `LanguageModel.load` finds it, and the hash of its weights."""

    name: str
    dtype: str
    batch_size: int
    max_new_tokens: int
    firing: dict[str, Any] | None
    plain: bool
    template: str | None
    told: str
    preamble: str
    weights: str

    @classmethod
    def of(cls, lm: LanguageModel) -> Source:
        return cls(
            lm.name,
            str(lm.dtype).removeprefix("torch."),
            lm.batch_size,
            lm.max_new_tokens,
            _firing(lm.model),
            lm.tokenizer.chat_template is None,
            lm.template,
            lm.told,
            lm.preamble,
            lm.weights_hash(),
        )

    def load(self, name: str | None = None, device: str = "auto") -> LanguageModel:
        """The model; `name` is where it is now, if not where it was.

        Raises:
            UserError: it cannot be loaded, or is another model.
        """
        how = {key: value for key, value in asdict(self).items() if key not in ("name", "weights")}
        lm = LanguageModel.load(name or self.name, device, **how)
        self.check(lm.model)
        return lm

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that is not this one, as it was.

        Raises:
            UserError: with both hashes, and the remedy.
        """
        found = weights_hash(model)
        if (found, _firing(model)) != (self.weights, self.firing):
            raise UserError(
                f"these edits are of the model {self.name} with weights {self.weights} ({self.dtype}), but this one has {found}: "
                "it is another model, or an edited one. Teach the facts there instead: qfbench-edits FOLDER apply --replay --model MODEL"
            )


def _firing(model: PreTrainedModel) -> dict[str, Any] | None:
    layers = getattr(model.config, "firing_layers", None)
    return {"layers": list(layers), "beta": model.config.firing_beta} if layers else None


@dataclass(frozen=True, eq=False)
class Edits:
    """Facts that were taught one after another (regime `sequential`), and the change that each of them brought.

    `sizes` are the Frobenius norms of the changed matrices before. Changes are on the CPU, and so is their sum: it is the same
    wherever the model runs.
    """

    source: Source
    editor: Editor
    facts: Sequence[Fact]
    changes: Sequence[WeightDelta]
    sizes: Mapping[str, float]

    @classmethod
    def teach(
        cls, lm: LanguageModel, editor: Editor, facts: Sequence[Fact], earlier: Sequence[WeightDelta] = ()
    ) -> Edits:
        """Teach all facts; the first have been taught already, by changes `earlier`. `lm` is left as it is.

        Raises:
            UserError: two facts have one id, or the editor refuses the model or changes no weights.
        """
        twice = [id for id, n in Counter(fact.id for fact in facts).items() if n > 1]
        if twice:
            raise UserError(f"several facts have the id {', '.join(twice)}; edits are told apart by it")
        if not editor.sites:
            raise UserError(f"{type(editor).__name__} changes no weights, so that there are no edits to keep")
        if facts:
            editor.check(lm)
        if editor.sees_all:
            earlier = ()
        changes = list(earlier)
        if len(facts) > len(changes):
            home = editor.sites[0].home(lm.model)
            total = sum((change.to(home) for change in changes), NOTHING)
            steps = in_turn(editor, lm, facts, len(changes), total)
            changes += [step.to("cpu") for step, _ in steps]
        parameters = dict(lm.model.named_parameters())
        names = {name for change in changes for name in change.changes}
        sizes = {name: parameters[name].detach().double().norm().item() for name in sorted(names)}
        return cls(Source.of(lm), editor, tuple(facts), tuple(changes), sizes)

    def more(self, lm: LanguageModel, facts: Sequence[Fact]) -> Edits:
        """These, and then further facts, taught by the same editor.

        Raises:
            UserError: `lm` is another model.
        """
        self.source.check(lm.model)
        return self.teach(lm, self.editor, [*self.facts, *facts], self.changes)

    def without(self, lm: LanguageModel, ids: Collection[str]) -> Edits:
        """As if the facts of these ids had never been taught: those after the first of them are taught again, in order.

        Where the editor `sees_all` (a stream, say), all that are left are taught again.

        Raises:
            UserError: an id is unknown, or `lm` is another model.
        """
        known = [fact.id for fact in self.facts]
        unknown = [id for id in ids if id not in known]
        if unknown:
            raise UserError(f"no fact {', '.join(unknown)} was taught; the facts are {', '.join(known)}")
        self.source.check(lm.model)
        first = min((known.index(id) for id in ids), default=len(known))
        left = [fact for fact in self.facts if fact.id not in ids]
        return self.teach(lm, self.editor, left, self.changes[:first])

    @property
    def total(self) -> WeightDelta:
        """The change of weights that all facts brought."""
        return sum(self.changes, NOTHING)

    @contextmanager
    def applied_to(self, model: Model) -> Iterator[Model]:
        """Have the model know the facts while open; on exit its weights are put back bit for bit.

        Raises:
            UserError: it is another model.
        """
        self.source.check(model.model if isinstance(model, LanguageModel) else model)
        with self.total.applied_to(model):
            yield model

    def save(self, folder: str | Path) -> None:
        """Write one file with all of it into a folder, over what stood there before.

        Raises:
            UserError: the editor has a setting that JSON cannot hold, or the folder cannot be written to.
        """
        kind = type(self.editor)
        settings = {field.name: getattr(self.editor, field.name) for field in fields(kind)}  # type: ignore[arg-type]
        about = {
            "source": asdict(self.source),
            "editor": {"class": f"{kind.__module__}.{kind.__qualname__}", "settings": settings},
            "facts": self.facts,
            "sizes": self.sizes,
        }
        tensors = {
            f"{n}/{name}": held for n, change in enumerate(self.changes) for name, held in change.tensors().items()
        }
        metadata = {"format": "qfbench-edits", "about": json.dumps(about, default=_as_json)}
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            sealed.save(tensors, Path(folder) / FILE, metadata)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder}: cannot be written to ({error})") from error

    @classmethod
    def load(cls, folder: str | Path) -> Edits:
        """Read what `save` wrote.

        Raises:
            UserError: there are no edits, the file is damaged, or its editor is not installed here.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise UserError(
                f"{folder}: holds no {FILE}; `qfbench-edits {folder} teach ...` or qfbench.edit(...).save() makes one"
            )
        tensors, metadata = sealed.load(path)
        if metadata.get("format") != "qfbench-edits":
            raise UserError(f"{path}: a safetensors file, but not one written by Edits.save")
        try:
            about = json.loads(metadata["about"], object_hook=_of_json)
            parts: list[dict[str, Any]] = [{} for _ in about["facts"]]
            for name, tensor in tensors.items():
                n, _, rest = name.partition("/")
                parts[int(n)][rest] = tensor
            editor = _editor(about["editor"]["class"], about["editor"]["settings"])
            changes = tuple(WeightDelta.of_tensors(part) for part in parts)
            return cls(Source(**about["source"]), editor, tuple(about["facts"]), changes, about["sizes"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{path}: was written by another version of qfbench ({error})") from error


def _editor(kind: str, settings: Mapping[str, Any]) -> Editor:
    """The editor that a file names. It may name a class of this package or of an installed plug-in, and nothing else."""
    module, _, name = kind.rpartition(".")
    trusted = {"qfbench", *(point.module.split(".")[0] for point in entry_points(group="qfbench"))}
    try:
        found = getattr(importlib.import_module(module), name) if module.split(".")[0] in trusted else None
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Editor) and is_dataclass(found)):
        raise UserError(f"the edits were made by the editor {kind}, which is not installed here")
    return found(**settings)


def _as_json(value: Any) -> Any:
    if isinstance(value, Fact | Probe):
        return {type(value).__name__: vars(value)}
    raise UserError(f"the editor has a setting that no file of edits holds: {value!r:.100}")


def _of_json(values: dict[str, Any]) -> Any:
    """What `_as_json` gave."""
    kinds: dict[str, Any] = {"Fact": Fact, "Probe": Probe}
    if len(values) != 1 or not (kind := kinds.get(next(iter(values)))):
        return values
    (held,) = values.values()
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in held.items()})
