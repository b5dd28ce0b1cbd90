"""Fact suites: each is a function that returns a list of facts."""

from qfbench.facts.base import Fact, Probe

__all__ = ["Fact", "Probe"]
