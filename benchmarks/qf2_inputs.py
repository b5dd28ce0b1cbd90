"""How alike are a block's inputs at what is taught and at what decides other answers, and what does an edit move there?

    python benchmarks/qf2_inputs.py model=world-s-qf2
    python benchmarks/qf2_inputs.py model=smollm2-135m-instruct facts=everyday facts@editor.keep=everyday

Further words are settings, as `qfbench` takes them. Both are read at the layer `model.layer`: where the tokens of the facts' answers
are predicted, alone; and where those of the unedited model's replies to other questions are (`editor.keep`). QF2 moves what
the neurons get at an input x by lr · s (y* − ½)(x'·x). Where the layer fires, each fact is also taught alone by QF2's rule and by
`qf2_stop`, and neurons are counted that end on another side of ½.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import normalize

from qfbench import LanguageModel
from qfbench.commands.settings import CONF, build
from qfbench.editors.stream import staying
from qfbench.editors.teach import lesson
from qfbench.models.activations import record
from qfbench.models.sites import Site
from qfbench.tasks.run import LOADED


def settings(editor: str, overrides: Sequence[str]) -> DictConfig:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=[*overrides, f"editor={editor}"], return_hydra_config=True)


def cosines(taught: Tensor, others: Tensor) -> str:
    found = (normalize(taught, dim=1) @ normalize(others, dim=1).T).flatten()
    ranks = torch.quantile(found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[: 10**6]], 0.99)
    return (
        f"mean {found.mean():.3f}, of their size {found.abs().mean():.3f}, 99% {ranks:.3f}, largest {found.max():.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, overrides = parser.parse_known_args()
    torch.set_num_threads(1)
    cfg = settings("qf_stream", ["edits=16", *overrides])
    lm = LanguageModel.load(cfg.model.path, **{key: cfg.model[key] for key in LOADED})
    facts, keep, site = build(cfg, "facts"), build(cfg, "editor").keep, Site(cfg.model.layer, "up_proj")
    pairs = [lesson(lm, fact, opener=0, closer=0) for fact in facts]
    told, alone = (
        [one.input.double() for one in record(lm, [getattr(pair, way) for pair in pairs], site, at)]
        for way, at in (("told", [p.told_at for p in pairs]), ("alone", [p.alone_at for p in pairs]))
    )
    kept = staying(lm, keep, facts)
    at = [range(dialogue.answer - 1, dialogue.closer) for dialogue in kept]
    others = torch.cat([one.input for one in record(lm, kept, site, at)]).double()
    taught, mean = torch.cat(alone), others.mean(0)
    share = (mean @ mean / others.pow(2).sum(1).mean()).item()
    print(f"{lm.name}, layer {site.layer}: {len(taught)} taught inputs of {len(facts)} facts, {len(others)} others")
    print(f"cosine: {cosines(taught, others)}")
    print(f"without the mean input: {cosines(taught - mean, others - mean)} (the mean has {share:.1%} of the power)")
    if not site.fires(lm.model):
        return
    weight = site.linear(lm.model).weight.detach().double()
    differ = torch.cat([(a @ weight.T > 0) != (t @ weight.T > 0) for a, t in zip(alone, told, strict=True)])
    print(f"neurons that fire otherwise when told: {differ.double().mean():.1%}")
    for name in ("qf2_answer_only", "qf2_stop"):
        editor: Any = build(settings(name, overrides), "editor")
        missed, moved, norm = [], [], []
        for fact, x, x_told in zip(facts, alone, told, strict=True):
            (change,) = editor.edit(lm, [fact]).changes.values()
            after = weight + change.dense()
            missed.append(((x @ after.T > 0) != (x_told @ weight.T > 0)).double().mean())
            moved.append(((others @ after.T > 0) != (others @ weight.T > 0)).double().mean())
            norm.append(change.norm())
        print(
            f"{name}: fire otherwise than told {torch.stack(missed).mean():.1%} at what is taught; "
            f"changed sides {torch.stack(moved).mean():.1%} at other inputs; norm {sum(norm) / len(norm):.2f}"
        )


if __name__ == "__main__":
    main()
