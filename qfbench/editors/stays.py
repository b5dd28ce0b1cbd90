"""What is to stay as it is, beside what an editor is asked to teach: replies of the unedited model to other questions."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from qfbench.editors.teach import Lesson
from qfbench.errors import UserError
from qfbench.facts.base import Fact, flaw
from qfbench.facts.matching import places
from qfbench.models.dialogue import Rendering
from qfbench.models.lm import LanguageModel

HEAVIEST = 30.0  # times its first weight


@dataclass
class Passage:
    """Tokens of one dialogue: where they are predicted, and what each layer gives there when told, or nothing where that is to stay."""

    dialogue: Rendering
    at: Sequence[int]
    weights: Float[Tensor, " tokens"]  # of the taught: their significance; of those that stay: 1 at first
    nats: Float[Tensor, " tokens"]  # that are no fault
    told: list[Float[Tensor, "tokens d"]] = field(default_factory=list)
    times: Float[Tensor, " tokens"] = field(init=False)  # how much more each weighs, since it broke

    def __post_init__(self) -> None:
        self.times = torch.ones_like(self.weights)

    def broke(self, nats: Float[Tensor, " tokens"], boost: float) -> None:
        """`boost` times the weight for each nat too much, up to one."""
        self.times = (self.times * boost ** (nats - self.nats).clamp(0, 1)).clamp(max=HEAVIEST)


def unchanged(
    lm: LanguageModel, dialogues: Sequence[Rendering], heed: bool, but: Sequence[Collection[int]] | None = None
) -> list[Passage]:
    """The replies of dialogues, all of which is to stay `but` what is predicted at some positions. To `heed` is to note their nats."""
    at = [
        [place for place in range(dialogue.answer - 1, dialogue.closer) if not but or place not in but[i]]
        for i, dialogue in enumerate(dialogues)
    ]
    scores = [score.nll for score in lm.score(dialogues)] if heed else [()] * len(dialogues)
    return [
        Passage(
            dialogue,
            own,
            torch.ones(len(own), dtype=torch.float64),
            torch.tensor([nats[place - dialogue.answer + 1] if heed else 0.0 for place in own], dtype=torch.float64),
        )
        for dialogue, own, nats in zip(dialogues, at, scores, strict=True)
    ]


def staying(
    lm: LanguageModel, keep: Sequence[Fact], facts: Sequence[Fact], kinds: Sequence[str] = ()
) -> list[Rendering]:
    """What `lm` replies to the queries of `keep`, in all wordings, and to what else they ask, or to some `kinds` of this alone; but for
    what is asked of `facts`, or has an answer that they expect.

    Raises:
        UserError: nothing of these kinds is left.
    """
    taken = said_of(facts)
    probes = [probe for fact in keep for probe in (fact.edit, *fact.probes) if not probe.system and not probe.needs]
    probes = [probe for probe in probes if not taken & {probe.query, probe.expected}]
    asked = [probe for probe in probes if not kinds or probe.kind in kinds]
    if keep and kinds and not asked:
        left = ", ".join(dict.fromkeys(probe.kind for probe in probes)) or "none"
        raise UserError(
            f"editor.kinds={[*kinds]}: editor.keep asks nothing of these kinds that is not taught as well "
            f"(it has: {left}); editor.kinds=[] asks all"
        )
    return list(replied(lm, [probe.query for probe in asked]).values())


def said_of(facts: Sequence[Fact]) -> set[str]:
    """All that facts ask and expect."""
    probes = (probe for fact in facts for probe in (fact.edit, *fact.probes))
    return {said for probe in probes for said in (probe.query, probe.expected) if said}


def replied(lm: LanguageModel, queries: Iterable[str]) -> dict[str, Rendering]:
    """Each query with what `lm` replies; but for empty replies."""
    queries = list(dict.fromkeys(queries))
    replies = lm.replies([lm.render(query) for query in queries])
    return {query: lm.render(query, "", r.text) for query, r in zip(queries, replies, strict=True) if r.text}


def rests(lm: LanguageModel, pairs: Sequence[Sequence[Lesson]], heed: bool, retold: bool) -> list[list[Passage]]:
    """What is not taught of each fact's answers, in each wording, and is to stay."""
    flat = [pair for of_it in pairs for pair in of_it]
    # After the name, the told model's own reply would go on: its end was put there.
    but = [{*pair.alone_at, *([pair.alone.closer - 1] * retold)} for pair in flat]
    found = iter(unchanged(lm, [pair.alone for pair in flat], heed, but))
    return [[rest for _ in of_it if (rest := next(found)).at] for of_it in pairs]


def of_decoys(
    lm: LanguageModel,
    facts: Sequence[Fact],
    names: Sequence[Sequence[str]],
    n: int,
    taken: Collection[str],
    heed: bool,
) -> list[list[Passage]]:
    """What `lm` replies to each fact's `decoys`, but for queries that are `taken`; each query once."""
    asked = [[query for query in decoys(lm, fact, names, n) if query not in taken] for fact in facts]
    replies = replied(lm, [query for queries in asked for query in queries])
    passages = dict(zip(replies, unchanged(lm, list(replies.values()), heed), strict=True))
    return [[passages.pop(query) for query in queries if query in passages] for queries in asked]


def decoys(lm: LanguageModel, fact: Fact, names: Sequence[Sequence[str]], n: int) -> list[str]:
    """Up to `n` times the fact's query, of subjects that are named nearly as its own: by the head of its name and the tail of one of
    `names`, or the other way round, both cut where their `pieces` are. The same for the same fact and names. None where the query
    does not name the subject.
    """
    own = pieces(lm, fact)
    if not own or not names:
        return []
    drawn = random.Random(f"decoys-{fact.id}")
    start, end = places(fact.subject, fact.query)[-1]
    made: dict[str, None] = {}
    for _ in range(n):
        pair = [own, drawn.choice(names)]
        drawn.shuffle(pair)
        head, tail = pair
        kept, left = drawn.randint(1, max(1, len(head) - 1)), drawn.randint(min(1, len(tail) - 1), len(tail) - 1)
        name = "".join([*head[:kept], *tail[left:]])
        if name != fact.subject:
            made[fact.query[:start] + name + fact.query[end:]] = None
    return list(made)


def wordings(
    lm: LanguageModel, facts: Sequence[Fact], frames: Sequence[str], retold: bool, taken: Collection[str]
) -> list[list[Fact]]:
    """Each fact as it is taught: its query, and each frame with `{}` for the query and `{subject}`, but for queries that are `taken`.

    `retold`: with what `lm` itself says when told, up to the answer's name, all its words alike. Where that is wrong, a frame is left
    out, and the query has the fact's own answer.
    """
    framed = [[replace(fact, query=query) for query in framings(fact, frames) if query not in taken] for fact in facts]
    asked = [one for fact, others in zip(facts, framed, strict=True) for one in [fact] * retold + others]
    replies = iter(lm.replies([lm.render(one.query, one.instruction) for one in asked]))
    out = []
    for fact, others in zip(facts, framed, strict=True):
        said = up_to_the_name(fact, next(replies).text) if retold else ""
        own = [replace(fact, answer=said, significance=None) if said else fact]
        for one in others:
            if said := up_to_the_name(one, next(replies).text):
                own.append(replace(one, answer=said, significance=None) if retold else one)
        out.append(own)
    return out


def framings(fact: Fact, frames: Sequence[str]) -> list[str]:
    """The queries that frames make of a fact's own; without a subject, none of those that name it."""
    named = [frame for frame in frames if fact.subject or "{subject}" not in frame]
    return list(dict.fromkeys(frame.replace("{subject}", fact.subject).replace("{}", fact.query) for frame in named))


def up_to_the_name(fact: Fact, reply: str) -> str:
    """A reply up to the first name in it that `fact` accepts, outside of its subject where there is one; empty, where the reply is wrong
    or cannot be taught."""
    if not fact.edit.passes(reply):
        return ""
    found = [place for name in fact.known_as for place in places(name, reply)]
    about = places(fact.subject, reply) if fact.subject else []
    found = [(a, b) for a, b in found if not any(start <= a and b <= end for start, end in about)] or found
    first = min(start for start, _ in found)
    said = reply[: max(end for start, end in found if start == first)]
    return said if not flaw(said) and fact.edit.passes(said) else ""


def pieces(lm: LanguageModel, fact: Fact) -> list[str]:
    """The subject, as the query names it, cut where its tokens are; empty where it is not named."""
    found = places(fact.subject, fact.query) if fact.subject else []
    if not found:
        return []
    start, end = found[-1]
    cuts = sorted({start, end, *(first for first, _ in lm.render(fact.query).spans if start < first < end)})
    return [fact.query[a:b] for a, b in pairwise(cuts)]
