"""Look at a suite without a model: `qfbench-facts counterfact facts.path=counterfact.json`."""

from __future__ import annotations

import sys
from collections import Counter

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from qfbench.commands.settings import CONF, build
from qfbench.errors import UserError

USAGE = (
    "usage: qfbench-facts SUITE [facts.path=FILE] [facts.on_error=skip] ...   (any setting of conf/facts/SUITE.yaml)"
)


def check(suite: str, *overrides: str) -> str:
    """What a suite holds, in a few lines.

    Raises:
        UserError: the suite, a setting or a record is wrong; file, record and field are named.
    """
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("config", overrides=[f"facts={suite}", *overrides])
    except HydraException as error:
        raise UserError(f"{error}".split("\n")[0]) from error
    if "path" in cfg.facts and "n" in cfg.facts and not any(o.startswith("facts.n=") for o in overrides):
        cfg.facts.n = None  # all that the file holds
    facts = build(cfg, "facts")
    probes = Counter(probe.kind for fact in facts for probe in (fact.edit, *fact.probes))
    kinds = Counter(fact.kind for fact in facts if fact.kind)
    first = facts[0]
    lines = [
        f"{len(facts)} facts" + (f" of {len(kinds)} kinds, most often {_most(kinds)}" if kinds else ""),
        f"probes: {_most(probes, 20)}",
        f"the first, {first.id}:",
        f"  told      {first.instruction}",
        f"  asked     {first.query}",
        f"  answer    {first.answer}   (right if it has: {', '.join(first.known_as)})",
        *(f"  {probe.kind:9} {probe.query}   {probe.expected}" for probe in first.probes),
    ]
    return "\n".join(lines)


def _most(counts: Counter[str], n: int = 5) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(n))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(USAGE)
    try:
        encoding = sys.stdout.encoding  # a terminal that cannot show a letter shows its number
        print(check(*sys.argv[1:]).encode(encoding, "backslashreplace").decode(encoding))
    except UserError as error:
        print(f"qfbench-facts: {error}", file=sys.stderr)
        sys.exit(2)
