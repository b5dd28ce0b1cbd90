"""General ability, asked of the edited model at every checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

from qfbench.errors import UserError
from qfbench.lm import LanguageModel
from qfbench.probes import Row
from qfbench.world.corpus import plain
from qfbench.world.world import World


def perplexity(lm: LanguageModel, path: str | None = None, n: int = 40) -> list[Row]:
    """How a model rates held plain text: one row a passage, with `nll` (nats per token, mean) and `tokens`.

    `path` is a text file, one passage a line; by default statements about the built-in world. The first `n` passages
    are taken; a passage's first token has nothing before it and is not rated.

    Raises:
        UserError: the file cannot be read, or holds no passage of two tokens.
    """
    if n < 1:
        raise UserError(f"regression.perplexity.n={n}: must be 1 or more")
    passages = _statements(n) if path is None else _lines(path)[:n]
    rows: list[Row] = []
    for k, (passage, nll) in enumerate(zip(passages, lm.nll(passages), strict=True)):
        if nll:
            row = {"kind": "perplexity", "query": passage, "fact_id": f"passage-{k}", "fact_kind": ""}
            rows.append(row | {"nll": sum(nll) / len(nll), "tokens": len(nll)})
    if not rows:
        raise UserError(f"regression.perplexity.path={path}: holds no passage of two tokens or more")
    return rows


def _statements(n: int) -> list[str]:
    world, rng = World(), random.Random("held-text")
    return [plain(world, rng) for _ in range(n)]


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"regression.perplexity.path={path}: cannot be read as text ({error})") from error
    return [line.strip() for line in text.split("\n") if line.strip()]
