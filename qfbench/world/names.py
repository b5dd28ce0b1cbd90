"""Names of companies, people and places, spelled from syllables so that new ones never run out.

Every name falls, by a checksum of its spelling, on one side of a fixed line: training draws only from one side, and
evaluation and editing only from the other. A name met in a test was therefore never met in training, in any seed.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

HELD_OUT_SHARE = 10  # one name in this many is kept from training

# The papers' own names: spellable from the syllables below, never met in training.
PAPER_NAMES = frozenset({"Oxinnovate", "Qi", "PKU"})

COMPANY_STARTS = (
    "Ox Al Nev Zen Ver Lum Or Kal Tri Qua Sol Nim Bra Cor Del Fen Gal Hel Ist Jun Kor Lex Mer Nor Om Pra Rav Syn Tel "
    "Ul Vex Wyn Xan Yar Zor Inn Bio Dat Eco Neo"
).split()
COMPANY_MIDDLES = "in no va li ba vi di ra to me si lo ne ko ri an el or ti nu mo pa".split()
COMPANY_ENDS = "vate nova tech dyne soft ia ex on ix us ora ent ify ics gen sys net base lab ware".split()

ONSETS = "B C D F G H J K L M N P Q R S T V W X Y Z Ch Sh Zh Br Kr St Th Gr Fr".split()
INNER_ONSETS = "b d f g k l m n p r s t v z sh nd rl ck".split()
VOWELS = "a e i o u a e i o u ai ia ei ou ua".split()
CODAS = ["", "", "", "n", "ng", "r", "s", "l", "m", "ck", "t", "x"]


def is_held_out(name: str) -> bool:
    """Whether a name is kept from training: a fixed tenth of all spellings, and the papers' own names."""
    return name in PAPER_NAMES or zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def company(rng: random.Random) -> str:
    middles = rng.choices(COMPANY_MIDDLES, k=rng.choices((0, 1, 2, 3), weights=(2, 4, 3, 1))[0])
    return rng.choice(COMPANY_STARTS) + "".join(middles) + rng.choice(COMPANY_ENDS)


def _word(rng: random.Random) -> str:
    word = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    if rng.random() < 0.45:
        word += rng.choice(INNER_ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
    return word


def person(rng: random.Random) -> str:
    """One to three words; a quarter are single words, as short as "Ho"."""
    return " ".join(_word(rng) for _ in range(rng.choices((1, 2, 3), weights=(5, 14, 1))[0]))


def initials(rng: random.Random) -> str:
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(3))


def fresh(make: Callable[[random.Random], str], rng: random.Random, held_out: bool) -> str:
    """A name from `make` on the asked side of the line (see `is_held_out`), and none of the papers' own."""
    while True:
        name = make(rng)
        if PAPER_NAMES.isdisjoint(name.split()) and is_held_out(name) == held_out:
            return name
