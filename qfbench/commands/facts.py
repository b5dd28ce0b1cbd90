"""Look at a suite without a model: `qfbench-facts counterfact facts.path=counterfact.json`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException

from qfbench.commands.plugins import find_installed, make_importable, parted
from qfbench.commands.settings import CONF, build
from qfbench.errors import UserError

USAGE = (
    "usage: qfbench-facts [--config-dir FOLDER] SUITE [facts.path=FILE] [facts.on_error=skip] ...   "
    "(any setting of conf/facts/SUITE.yaml)"
)


def check(suite: str, *overrides: str, further: Path | None = None) -> str:
    """What a suite holds, in a few lines. `further` is a folder of settings that the package's own do not have.

    Raises:
        UserError: the suite, a setting or a record is wrong; file, record and field are named.
    """
    found = [f"facts={suite}", *overrides]
    if further is not None:
        make_importable(further, Path.cwd())
        found.append(f"hydra.searchpath=[{json.dumps(f'file://{further}', ensure_ascii=False)}]")
    find_installed()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("config", overrides=found)
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
    try:
        further, arguments = parted(sys.argv[1:])
        if not arguments or arguments[0] in ("-h", "--help"):
            sys.exit(USAGE)
        encoding = sys.stdout.encoding  # a terminal that cannot show a letter shows its number
        print(check(*arguments, further=further).encode(encoding, "backslashreplace").decode(encoding))
    except UserError as error:
        print(f"qfbench-facts: {error}", file=sys.stderr)
        sys.exit(2)
