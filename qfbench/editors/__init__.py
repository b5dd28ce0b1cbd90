"""Editors: each turns facts into a change of weights."""

from qfbench.editors.base import Editor
from qfbench.editors.qf import QF

__all__ = ["QF", "Editor"]
