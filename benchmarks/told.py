"""How should a model be told? The facts it answers right when told in each way, with and without a standing instruction.

    python benchmarks/told.py smollm2-135m-instruct
    python benchmarks/told.py FOLDER --preamble "Answer briefly."

Of the invented facts of `facts=everyday`, half `tune`: those whose reply ends by itself within `--tokens` and names the answer, in the
taught wording and in another one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from qfbench import LanguageModel, UserError
from qfbench.facts.everyday import everyday
from qfbench.models.dialogue import TOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--preamble", default="Answer in one short sentence.")
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    facts = everyday(126, part="tune")
    others = [next(probe for probe in fact.probes if probe.kind == "paraphrase") for fact in facts]
    asked = [
        [replace(p, system=f.instruction) for f, p in zip(facts, ps, strict=True)]
        for ps in ([f.edit for f in facts], others)
    ]
    print(f"{'told':10} {'preamble':32} taught wording, another wording, of {len(facts)}; replies that end")
    for told in TOLD[1:]:
        for preamble in dict.fromkeys((args.preamble, "")):
            try:
                lm = LanguageModel.load(args.model, max_new_tokens=args.tokens, told=told, preamble=preamble)
            except UserError as error:
                print(f"{told:10} {error}")
                continue
            right, ended = [], 0
            for probes in asked:
                replies = lm.replies([lm.render(probe.query, probe.system) for probe in probes])
                right.append(sum(r.stopped and p.passes(r.text) for p, r in zip(probes, replies, strict=True)))
                ended += sum(r.stopped for r in replies)
            print(f"{told:10} {preamble!r:32} {right[0]:14} {right[1]:16} {ended:31}", flush=True)


if __name__ == "__main__":
    main()
