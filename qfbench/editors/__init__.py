"""Editors: each turns facts into a change of weights."""

from qfbench.editors.base import Editor
from qfbench.editors.finetune import FineTune
from qfbench.editors.locft import LocFT
from qfbench.editors.lora import LoRA
from qfbench.editors.patch import QFPatch
from qfbench.editors.qf import QF
from qfbench.editors.qf2 import QF2
from qfbench.editors.replay import Replay
from qfbench.editors.retrieval import PromptRetrieval
from qfbench.editors.stream import QFStream

__all__ = ["QF", "QF2", "Editor", "FineTune", "LoRA", "LocFT", "PromptRetrieval", "QFPatch", "QFStream", "Replay"]
