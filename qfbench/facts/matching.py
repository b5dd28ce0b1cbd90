"""Whether a name stands in a reply: whole words, in any script, case and form of writing.

Two texts are compared as `folded` leaves them. The same then are: upper and lower case; composed and decomposed accents
("é" in one character or two); full-width and other compatibility forms ("１０００", "ﬁ"), but not superscripts, fractions
and circled numbers ("10²" is not "102"); decimal digits of every script; typographic quotes, hyphens and minus signs and the
plain ones; any run of white space and one space; grouped digits and plain ones ("1,000", "1 000" with a no-break space,
"1000"; "1.000" is a decimal). Invisible characters (zero-width, soft hyphens) do not count.

A name stands where no word goes on before or after it:

* A letter, digit or accent next to it goes on: "Qi" is not in "Qian", nor "Jose" in "José".
* "-", "_" and "&" between two words join them ("Qi" is not in "Qi-Lin"), "." between two letters ("ASP.NET") or two digits, and
  "," ":" "/" between two digits ("3" is not in "3.5" or "3:30"). An apostrophe joins nothing ("Qi's").
* "+" and "#" go on after a word ("C" is not in "C++"), a minus sign and a decimal point before a number ("5" is not in "-5", ".5").
* Scripts that put no spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) contain it anywhere, but not
  within a character; Korean endings may follow it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from unicodedata import category, decimal, decomposition, normalize

ALIKE = str.maketrans("‘’ʼ‛“”„‟‐‑−", "''''\"\"\"\"---")
APART = ("<super>", "<circle>", "<fraction>")  # compatibility forms that mean something else than what they are made of
GROUPED = re.compile(r"(?<![\d.,'])\d{1,3}(?:([,'\u00a0\u2009\u202f])(?:\d\d\1)*\d{3}(?!\d))+")
STOPS = ".!?。！？｡।؟ "
BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters by their category, and nothing to see
SPACE, SPACES = re.compile(r"\s"), re.compile(r"\s{2,}")
SPACELESS = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
HANGUL = re.compile("[\u1100-\u11ff\uac00-\ud7a3]")


def stands_in(words: str, text: str) -> bool:
    """Whether `words` stand in `text` as whole words. The empty string stands everywhere."""
    return not words or bool(places(words, text))


def places(words: str, text: str) -> list[tuple[int, int]]:
    """Where `words` stand in `text` as whole words: (start, end) of each place, in characters of `text`."""
    wanted, _ = folded(words.strip())
    found, at = folded(text)
    spans, start = [], found.find(wanted) if wanted else -1
    while start >= 0:
        end = start + len(wanted)
        if not (_goes_on_before(found, start) or _goes_on_after(found, end)):
            spans.append((at[start], at[end]))
        start = found.find(wanted, start + 1)
    return spans


def key(text: str) -> str:
    """What two texts share that say the same: folded, without the stop at the end and the spaces around."""
    return folded(without_stop(text.strip()))[0]


def without_stop(text: str) -> str:
    return text.rstrip(STOPS)


def visible(text: str) -> bool:
    """Whether anything is left of a text once white space and invisible characters are taken off."""
    return not all(c.isspace() or c in BLANK or category(c) in ("Cf", "Cc", "Mn") for c in text)


@lru_cache(maxsize=1024)  # a reply is compared with all names that were taught
def folded(text: str) -> tuple[str, Sequence[int]]:
    """A text as it is compared, and for each of its characters, and its end, the place in `text` that it comes from."""
    at: Sequence[int]
    if text.isascii():
        plain, at = text.lower(), range(len(text) + 1)
    else:
        starts = [i for i, letter in enumerate(text) if not i or not _continues(letter)]
        letters = [_folded(text[i:j]) for i, j in zip(starts, [*starts[1:], len(text)], strict=True)]
        plain = "".join(letters)
        at = (*(i for i, letter in zip(starts, letters, strict=True) for _ in letter), len(text))
    left_out = {i for m in GROUPED.finditer(plain) for i in range(*m.span()) if not plain[i].isdigit()}
    left_out |= {i for m in SPACES.finditer(plain) for i in range(m.start() + 1, m.end())}
    plain = SPACE.sub(" ", plain)
    if left_out:
        at = tuple(place for i, place in enumerate(at) if i not in left_out)
        plain = "".join(letter for i, letter in enumerate(plain) if i not in left_out)
    return plain, at


def _continues(letter: str) -> bool:
    """Whether a reader takes a letter for a part of the one before it: an accent, the further parts of a Korean syllable."""
    return _accent(letter) or "\u1160" <= letter <= "\u11ff" or letter in "\uff9e\uff9f"


def _folded(character: str) -> str:
    if character.isascii():
        return character.lower()
    if character.isspace():
        return character
    plain = "".join(_plain(letter) for letter in normalize("NFC", character) if category(letter) != "Cf")
    return normalize("NFC", plain.casefold())


def _plain(letter: str) -> str:
    if letter.isdecimal():
        return str(decimal(letter))
    letter = letter.translate(ALIKE)
    form = decomposition(letter).partition(" ")[0]
    return normalize("NFKC", letter) if form.startswith("<") and form not in APART else letter


def _accent(letter: str) -> bool:
    return category(letter).startswith("M")


def _of_word(letter: str) -> bool:
    return letter.isalnum() or (letter != "" and _accent(letter))


def _goes_on_before(text: str, start: int) -> bool:
    first, before, further = text[start], text[start - 1 : start], text[start - 2 : start - 1] if start > 1 else ""
    if _accent(first):
        return True
    if first.isdigit() and not _of_word(further) and (before == "-" or (before == "." and further in ("", " "))):
        return True
    if HANGUL.match(before):
        return bool(HANGUL.match(first))
    return _goes_on(first, before, further)


def _goes_on_after(text: str, end: int) -> bool:
    last, after, further = text[end - 1], text[end : end + 1], text[end + 1 : end + 2]
    if after and (_accent(after) or after in "+#"):
        return True
    return not HANGUL.match(after) and _goes_on(last, after, further)


def _goes_on(edge: str, beside: str, further: str) -> bool:
    """Whether the word whose last (or first) letter is `edge` goes on with the next two letters outwards."""
    if SPACELESS.match(edge) or SPACELESS.match(beside):
        return False
    if _of_word(beside):
        return True
    if beside in ("-", "_", "&"):
        return _of_word(further)
    if beside == "." and edge.isalpha() and further.isalpha():
        return not SPACELESS.match(further)
    return beside in (".", ",", ":", "/") and edge.isdigit() and further.isdigit()
