"""How a model rates held plain text."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from qfbench.digest import hashed
from qfbench.errors import UserError
from qfbench.facts.base import flaw
from qfbench.facts.probes import Row
from qfbench.models.lm import LanguageModel
from qfbench.world.corpus import plain
from qfbench.world.world import World

log = logging.getLogger(__name__)

ENGLISH = Path(__file__).with_name("english.txt")


@dataclass(frozen=True)
class Perplexity:
    """One row a passage, with `nll` (nats per token, mean) and `tokens`.

    `path` is a text file, one passage a line. Without one, `text` says which of ours: statements about the built-in `world`,
    or 200 sentences of plain `english`. The first `n` passages are taken; a passage's first token has nothing before it
    and is not rated.

    Raises:
        UserError: there is no such text; the file cannot be read, or holds no passage of two tokens.
    """

    path: str | None = None
    n: int = 40
    text: str = "world"

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"regression.perplexity.n={self.n}: must be 1 or more")
        if self.text not in ("world", "english"):
            raise UserError(f"regression.perplexity.text={self.text}: must be world or english")
        _ = self.passages  # a file that cannot be read is found before anything is computed

    @cached_property
    def passages(self) -> list[str]:
        if self.path is None and self.text == "world":
            return _statements(self.n)
        return _lines(self.path or str(ENGLISH))[: self.n]

    @property
    def fingerprint(self) -> str:
        return hashed(*self.passages)

    def __call__(self, lm: LanguageModel) -> list[Row]:
        rows: list[Row] = []
        for k, (passage, nll) in enumerate(zip(self.passages, lm.nll(self.passages), strict=True)):
            if nll:
                row = {"kind": "perplexity", "query": passage, "fact_id": f"passage-{k}", "fact_kind": ""}
                rows.append(row | {"nll": sum(nll) / len(nll), "tokens": len(nll)})
        if not rows:
            raise UserError(f"regression.perplexity.path={self.path}: holds no passage of two tokens or more")
        return rows


def _statements(n: int) -> list[str]:
    world, rng = World(), random.Random("held-text")
    return [plain(world, rng) for _ in range(n)]


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        raise UserError(f"regression.perplexity.path={path}: cannot be read as text ({error})") from error
    lines = {n: line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
    for n, line in lines.items():
        what = flaw(line)
        if what:
            raise UserError(f"regression.perplexity.path={path}, line {n}: {what}; take it out")
    spaced = [n for n, line in lines.items() if line != line.strip()]
    if spaced:
        log.warning(
            "%s: white space is taken off the ends of %d lines; the first: line %d", path, len(spaced), spaced[0]
        )
    return [line.strip() for line in lines.values()]
