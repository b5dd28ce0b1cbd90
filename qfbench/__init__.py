"""qfbench: measure what knowledge editing teaches a language model, and what it costs."""

from qfbench.errors import Unsupported, UserError
from qfbench.facts import Fact, Probe
from qfbench.lm import LanguageModel

__all__ = ["Fact", "LanguageModel", "Probe", "Unsupported", "UserError"]
