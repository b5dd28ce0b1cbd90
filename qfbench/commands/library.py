"""Editing as a library: `qfbench.edit`, for a model in memory. Editors are built as their YAML says, without a command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qfbench.commands.plugins import find_installed
from qfbench.commands.settings import CONF, build, usual_layer
from qfbench.editors.base import Editor
from qfbench.editors.edits import Edits
from qfbench.errors import UserError
from qfbench.facts.base import Fact
from qfbench.facts.records import Record
from qfbench.facts.table import facts_of
from qfbench.models.lm import LanguageModel


def edit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact | Mapping[str, Any]],
    editor: str | Editor = "qf_stream",
    **settings: Any,
) -> Edits:
    """Teach facts to a model in memory, one after another. The model is left as it is: `with edits.applied_to(model):` changes it.

    Args:
        facts: `Fact`s, or mappings with the fields of a file of facts: `instruction`, `query`, `answer` ... (`facts.table.table`).
        editor: the name of a YAML in conf/editor, or an editor.
        settings: of the editor, by name: `layer=12`. Without a `layer` it is the one at the depth of the QF paper.

    Raises:
        UserError: a fact or a setting is wrong, or the editor cannot edit this model.
        FloatingPointError: an activation or the solution is not finite.
    """
    lm = LanguageModel.of(model, tokenizer)
    taught = [
        fact if isinstance(fact, Fact) else facts_of(Record(fact, "facts", n))[0] for n, fact in enumerate(facts, 1)
    ]
    if isinstance(editor, str):
        editor = named(editor, lm, settings)
    elif settings:
        raise UserError(f"{', '.join(settings)}: an editor has its settings already; give its name instead")
    modes = [(part, part.training) for part in model.modules()]
    try:
        model.eval()
        return Edits.teach(lm, editor, taught)
    finally:
        for part, mode in modes:
            part.training = mode


def named(name: str, lm: LanguageModel, settings: Mapping[str, Any]) -> Editor:
    """The editor of conf/editor/NAME.yaml for a model in memory.

    Raises:
        UserError: there is no such editor, or a setting is unknown or wrong.
    """
    cfg = composed(f"editor={name}", "model=own")
    cfg.model.update({"path": lm.name, "layer": usual_layer(lm.model.config.get_text_config()), "layers": ""})
    objects = {}
    for key, value in settings.items():
        if key not in cfg.editor:
            known = ", ".join(str(key) for key in cfg.editor if key != "_target_")
            raise UserError(f"{key}: editor={name} has no such setting; it has {known}")
        try:
            json.dumps(value)
        except TypeError:  # facts, say
            objects[key], value = value, []
        OmegaConf.update(cfg.editor, key, value, merge=False)
    built: Editor = build(cfg, "editor")
    return replace(built, **objects)  # type: ignore[type-var]


def composed(*overrides: str) -> DictConfig:
    """The configuration of a command line of `qfbench`.

    Raises:
        UserError: a group, an option or a setting does not exist.
    """
    find_installed()
    try:
        with _beside_others(), initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose("config", overrides=list(overrides))
    except HydraException as error:
        raise UserError(" ".join(str(error).split("Config search path:")[0].split())) from error


@contextmanager
def _beside_others() -> Iterator[None]:
    """A program that calls us may have been started by Hydra itself, of which there is one a process."""
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(state)
