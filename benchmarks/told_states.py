"""Where does a told model have its answer: at the subject, in the query, or only where it says it?

    python benchmarks/told_states.py model=smollm2-135m-instruct facts=everyday facts.part=test edits=18
    python benchmarks/told_states.py model=world-s edits=18 --csv FILE

Further words are settings, as `qfbench` takes them. In the pass without the instruction (alone), what one layer gives at some tokens
is replaced by what it gives there when told; the layers above run on. Printed is, for each layer, how much of what the instruction
does for the answer comes back: (nats alone - nats now) / (nats alone - nats told), of all tokens of all answers. Places: the last
token of the `subject`; the `query` from there on; the `answer`, from the token that predicts its first. One minute on a busy core.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qfbench import LanguageModel
from qfbench.commands.library import composed
from qfbench.commands.settings import build
from qfbench.editors.teach import subject_at
from qfbench.models.activations import record_many
from qfbench.models.dialogue import Rendering
from qfbench.models.sites import Site
from qfbench.tasks.run import LOADED

PLACES = ("subject", "query", "answer")


@contextmanager
def replaced(block: nn.Module, at: Sequence[int], states: Tensor) -> Iterator[None]:
    """While open, the block gives these states at these tokens."""

    def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        first, *others = out if isinstance(out, tuple) else (out,)
        first = first.clone()
        first[0, at] = states.to(first)
        return (first, *others) if isinstance(out, tuple) else first

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def nats(lm: LanguageModel, dialogue: Rendering) -> float:
    """Of all tokens of the answer."""
    ids = torch.tensor(dialogue.ids, device=lm.device)
    said = lm.model(input_ids=ids[None], use_cache=False).logits[0, dialogue.answer - 1 : dialogue.closer - 1].float()
    return cross_entropy(said, ids[dialogue.answer : dialogue.closer], reduction="sum").item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="a row for each layer")
    args, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    cfg = composed(*overrides)
    lm = LanguageModel.load(cfg.model.path, **{key: cfg.model[key] for key in LOADED})
    named = [fact for fact in build(cfg, "facts") if fact.subject and fact.subject in fact.query]
    understood = lm.replies([lm.render(fact.query, fact.instruction) for fact in named])
    facts = [fact for fact, reply in zip(named, understood, strict=True) if fact.edit.passes(reply.text)]
    told = [lm.render(fact.query, fact.instruction, fact.answer) for fact in facts]
    alone = [lm.render(fact.query, "", fact.answer) for fact in facts]
    sites = [Site(layer, "down_proj") for layer in range(lm.model.config.num_hidden_layers)]
    given = record_many(lm, told, sites)
    at_most, at_least = (sum(nats(lm, dialogue) for dialogue in way) for way in (alone, told))
    print(
        f"{lm.name}, {len(facts)} facts: nats of an answer {at_most / len(facts):.2f} alone, {at_least / len(facts):.2f} told"
    )
    rows = []
    for site, states in zip(sites, given, strict=True):
        left = dict.fromkeys(PLACES, 0.0)
        for fact, other, dialogue, state in zip(facts, told, alone, states, strict=True):
            subject = subject_at(dialogue, fact)
            tokens = [subject], range(subject, dialogue.opener), range(dialogue.answer - 1, dialogue.closer)
            for place, own in zip(PLACES, tokens, strict=True):
                there = [at + len(other.ids) - len(dialogue.ids) for at in own]
                with replaced(site.block(lm.model), list(own), state.output[there]):
                    left[place] += nats(lm, dialogue)
        rows.append({"layer": site.layer} | {place: (at_most - left[place]) / (at_most - at_least) for place in PLACES})
        print(" ".join(f"{name} {value:.2f}" if value % 1 else f"{name} {value}" for name, value in rows[-1].items()))
    if args.csv:
        pd.DataFrame(rows).to_csv(args.csv, index=False, float_format="%.4f")


if __name__ == "__main__":
    main()
