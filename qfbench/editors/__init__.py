"""Editors: each turns facts into a change of weights."""

from qfbench.editors.adapter import Adapter
from qfbench.editors.alphaedit import AlphaEdit
from qfbench.editors.base import Editor
from qfbench.editors.edits import Edits
from qfbench.editors.finetune import FineTune
from qfbench.editors.locft import LocFT
from qfbench.editors.lora import LoRA
from qfbench.editors.memit import MEMIT
from qfbench.editors.patch import QFPatch
from qfbench.editors.qf import QF
from qfbench.editors.qf2 import QF2
from qfbench.editors.replay import Replay
from qfbench.editors.retrieval import PromptRetrieval
from qfbench.editors.rome import ROME
from qfbench.editors.stream import QFStream
from qfbench.editors.ultraedit import UltraEdit

__all__ = [
    "MEMIT",
    "QF",
    "QF2",
    "ROME",
    "Adapter",
    "AlphaEdit",
    "Editor",
    "Edits",
    "FineTune",
    "LoRA",
    "LocFT",
    "PromptRetrieval",
    "QFPatch",
    "QFStream",
    "Replay",
    "UltraEdit",
]
