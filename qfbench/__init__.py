"""qfbench: measure what knowledge editing teaches a language model, and what it costs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qfbench.commands.library import edit
    from qfbench.editors.edits import Edits
    from qfbench.errors import Unsupported, UserError
    from qfbench.facts.base import Fact, Probe
    from qfbench.models.lm import LanguageModel

__all__ = ["Edits", "Fact", "LanguageModel", "Probe", "Unsupported", "UserError", "edit"]

# Imported when first asked for: torch and transformers take seconds, and most of the package works without them.
_HOMES = {
    "Edits": "qfbench.editors.edits",
    "Fact": "qfbench.facts.base",
    "LanguageModel": "qfbench.models.lm",
    "Probe": "qfbench.facts.base",
    "Unsupported": "qfbench.errors",
    "UserError": "qfbench.errors",
    "edit": "qfbench.commands.library",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
