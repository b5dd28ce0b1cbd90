"""General ability, asked unedited and at every checkpoint: held text, and questions through lm-eval."""

from qfbench.regression.harness import Questions, tasks
from qfbench.regression.mmlu import mmlu
from qfbench.regression.perplexity import Perplexity
from qfbench.regression.suite import Suite
from qfbench.regression.world_mc import world_mc

__all__ = ["Perplexity", "Questions", "Suite", "mmlu", "tasks", "world_mc"]
