"""The search for a value: each fact its own descent, whatever is searched beside it; what its loss is; its limits."""

from itertools import pairwise

import pytest
import torch
from test_rome import close, known, nats  # noqa: F401 (a fixture)

from qfbench.editors.value import Asked, values
from qfbench.models.sites import Site

SEARCH = {"lr": 0.2, "steps": 10, "stop_at": 0.05, "limit": 4.0, "weight_decay": 0.1, "kl": 0.1}


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_values_that_are_searched_together_are_those_searched_alone(tiny, known, arch):  # noqa: F811
    lm = tiny(arch, torch.float64)
    asked = [Asked.of(lm, fact, ["Qi is here."]) for fact in known]
    together = values(lm, Site(1), asked, **SEARCH)
    for one, mine in zip(asked, together, strict=True):
        (its,) = values(lm, Site(1), [one], **SEARCH)
        assert close(mine.change, its.change, 1e-6)
        assert mine.loss == pytest.approx(its.loss, rel=1e-6)
    assert together[0].loss != pytest.approx(together[1].loss, rel=1e-2)


def test_a_fact_whose_search_is_over_waits_for_the_others_unchanged(tiny, known):  # noqa: F811
    lm = tiny("qwen2", torch.float64)
    asked = [Asked.of(lm, fact) for fact in known]
    steep = SEARCH | {"lr": 0.05}
    third = values(lm, Site(1), asked, **(steep | {"steps": 3}))
    easiest = min(one.loss for one in third)
    ended = values(lm, Site(1), asked, **(steep | {"stop_at": easiest * (1 + 1e-6)}))
    last = values(lm, Site(1), asked, **steep)
    i = [one.loss for one in third].index(easiest)
    for k in range(len(asked)):
        assert close(ended[k].change, (third if k == i else last)[k].change, 1e-6)
        assert not close(third[k].change, last[k].change, 0.1)


def test_the_search_lowers_nats_more_the_longer_and_stays_within_its_limit(tiny, known):  # noqa: F811
    lm = tiny("qwen2", torch.float64)
    asked = [Asked.of(lm, fact) for fact in known]
    plain = SEARCH | {"weight_decay": 0.0, "kl": 0.0}
    costs = [nats(lm, known)]
    for steps in (1, 5, 20):
        found = values(lm, Site(1), asked, **(plain | {"steps": steps}))
        costs.append([one.loss for one in found])
    assert all(a > b for before, after in pairwise(costs) for a, b in zip(before, after, strict=True))
    for one in values(lm, Site(1), asked, **(plain | {"lr": 1.0, "limit": 0.3})):
        assert one.change.norm() / one.output.norm() == pytest.approx(0.3)
    heavy = values(lm, Site(1), asked, **(SEARCH | {"weight_decay": 1e4}))
    for one, other in zip(heavy, found, strict=True):
        assert one.change.norm() < 0.5 * other.change.norm()


def test_the_loss_is_nats_and_divergence_and_size(tiny, known):  # noqa: F811
    """At the first step nothing is added: no divergence, no size. With steps: by hand."""
    lm = tiny("llama", torch.float64)
    one = Asked.of(lm, known[0], ["Qi is here."])
    two = [sum(score.nll) for score in lm.score(one.dialogues)]
    (start,) = values(lm, Site(1), [one], **(SEARCH | {"stop_at": 1e6}))
    assert start.loss == pytest.approx(sum(two) / 2, rel=1e-5)
    assert start.change.norm() == 0
    weighed = SEARCH | {"kl": 3.0, "weight_decay": 7.0}
    (found,) = values(lm, Site(1), [one], **weighed)
    linear = Site(1).linear(lm.model)

    def said(dialogue, at):
        def hook(_, args, out):
            out = out.clone()
            out[0, at] += found.change
            return out

        handle = linear.register_forward_hook(hook)
        logits = lm.model(input_ids=torch.tensor([dialogue.ids])).logits[0]
        handle.remove()
        return logits.log_softmax(1)

    cost = 0.0
    for dialogue, at in zip(one.dialogues, one.at, strict=True):
        logs = said(dialogue, at)
        cost -= sum(logs[dialogue.answer - 1 + i, token].item() for i, token in enumerate(dialogue.reply)) / 2
    now, before = (
        said(one.essence, one.essence_at)[-1],
        lm.model(input_ids=torch.tensor([one.essence.ids])).logits[0, -1],
    )
    cost += 3.0 * (now.exp() * (now - before.log_softmax(0))).sum().item()
    cost += 7.0 * (found.change.norm() / found.output.norm()).item() ** 2
    assert found.loss == pytest.approx(cost, rel=1e-4)
