"""Whether a name stands in a reply: whole words in any script, case and form."""

import json
from unicodedata import normalize

import pytest

from qfbench import Fact, Probe, UserError
from qfbench.editors.teach import weights_of_words
from qfbench.facts.matching import key, places, stands_in, visible

# By rule: the name, a reply that holds it, one that does not.
RULES = {
    "letters": [("Qi", "oxinnovate was started by QI.", "It was Qian."), ("Москва", "Это москва.", "Москвач.")],
    "accents": [
        ("José", "It was Jose\u0301.", "It was Jose."),
        ("Jose\u0301", "It was JOSÉ.", "It was Josée."),
        ("Jose", "It was Jose.", "It was José."),
        ("Jose", "Jose?", "It was Jose\u0301."),
        ("Škoda", "S\u030ckoda made it.", "Skoda made it."),
        ("दिल", "यह दिल है।", "यह दिल्ली में है।"),
        ("İstanbul", "It is in İSTANBUL.", "It is in Istanbul."),
        ("ガム", "ｶﾞﾑです", "ｶﾑです"),
    ],
    "forms": [
        ("Qi", "它是Ｑｉ。", "它是Ｑｉｎ。"),
        ("office", "The oﬃce.", "The oﬃcer."),
        ("Straße", "Die STRASSE.", "Die STRASSEN."),
        ("102", "It is １０２.", "It is 10²."),
        ("CO2", "It is CO₂.", "It is CO²."),
        ("1", "It is ١.", "It is ①."),
        ("Kelp", "It is Kelp™.", "It is Kelptm."),
    ],
    "quotes and spaces": [
        ("O'Brien", "It was O’Brien.", "It was OBrien."),
        ("New York", "In New\u00a0York.", "In NewYork."),
        ("New York", "In\nNew\n\tYork.", "In New, York."),
        ("New York", "In New\u200b Yo\u00adrk.", "In New Jersey, York."),
        ("Qi", "Qi's company.", "Qis company."),
    ],
    "numbers": [
        ("1000", "It has 1,000 people.", "It has 1,0000 people."),
        ("2,000", "It has 2000.", "It has 12,000."),
        ("1000000", "It has 1,000,000, or so.", "It has 1,000,00."),
        ("100000", "It has 1,00,000.", "It has 1,00,0000."),
        ("1000", "It has 1\u202f000.", "It has 1 000."),
        ("1000", "有１，０００人。", "有１１，０００人。"),
        ("1", "It has 1, 000 or 2.", "It has 1,000."),
        ("12", "It has 12, 500 of them.", "It has 12,500."),
        ("3", "It has 3.", "It has 3.5 million."),
        ("3", "It has 3, 5 or 6.", "It has 3,5 million."),
        ("5", "It is 5%.", "It is -5%."),
        ("5", "See no.5", "It is \u22125."),
        ("5", "$5!", "It is .5"),
        ("-5", "It is \u22125.", "It is 5."),
        ("2", "1 or 2", "1/2"),
        ("30", "30: none", "At 3:30."),
    ],
    "names with signs": [
        ("Qi", "Qi - Lin started it.", "Qi-Lin started it."),
        ("Lin", "It was Lin.", "It was Qi\u2011Lin."),
        ("C++", "It is written in C++.", "It is written in C++11."),
        ("C", "It is C, or D.", "It is C++."),
        ("C", "In *C*.", "In C#."),
        (".NET", "It uses .NET.", "It uses ASP.NET."),
        ("Node", "It is Node.", "It is Node.js."),
        ("U.S.", "In the U.S.", "In the U.S.A."),
        ("AT&T", "It was AT&T.", "It was AT&TX."),
        ("AT", "It was AT & T.", "It was AT&T."),
        ("Qi", "_Qi_ did.", "Qi_2 did."),
        ("Washington, D.C.", "In Washington, D.C.", "In Washington, D.D."),
        ("Yahoo!", "Yahoo! made it.", "Yahoos! made it."),
    ],
    "scripts without spaces": [
        ("东京", "它在东京。", "它在西京。"),
        ("東京", "東京都にあります", "京都にあります"),
        ("กรุงเทพ", "อยู่ที่กรุงเทพ", "อยู่ที่กรุง"),
        ("กา", "มีกาแฟ", "มีก้า"),
        ("서울", "서울에 있다", "남서울에 있다"),
        ("서울", normalize("NFD", "서울은 크다"), normalize("NFD", "설은 크다")),
        ("Qi", "由Qi创立", "由Qin创立"),
        ("3", "第3章", "第13章"),
    ],
}


@pytest.mark.parametrize("rule", RULES)
def test_a_name_stands_as_whole_words(rule):
    for name, holds, lacks in RULES[rule]:
        for form in ("NFC", "NFD"):
            assert stands_in(normalize(form, name), holds), (name, holds)
            assert not stands_in(normalize(form, name), lacks), (name, lacks)
            assert stands_in(name, normalize(form, holds)), (name, holds)
        assert stands_in(name, name)


def test_the_replies_that_went_wrong_have_the_right_verdict(shared):
    for case in json.loads(shared("cases/writing.json").read_text(encoding="utf-8")):
        probe = Probe("edit", "?", "", tuple(case["accept"]), tuple(case["reject"]))
        assert probe.passes(case["reply"]) is case["right"], case


def test_places_are_those_of_the_text_as_it_is_written():
    text = "Ｑｉ, 1,000 \u200bQI; Jose\u0301 and Qi\u0301, ﬁ fi"
    assert [text[a:b] for a, b in places("qi", text)] == ["Ｑｉ", "QI"]
    assert [text[a:b] for a, b in places("1000", text)] == ["1,000"]
    assert [text[a:b] for a, b in places("José", text)] == ["Jose\u0301"]
    assert [text[a:b] for a, b in places("fi", text)] == ["ﬁ", "fi"]
    spaced = "New \n York"
    assert places("New York", spaced) == [(0, len(spaced))]


def test_nothing_is_found_nowhere_and_the_empty_string_everywhere():
    assert stands_in("", "x")
    assert not places("\u200b", "x\u200b")
    assert not places("x", "")


def test_what_says_the_same_has_the_same_key():
    for a, b in (
        ("Qi.", " qi"),
        ("José", "JOSE\u0301"),
        ("1,000", "1000"),
        ("New  York", "new\u00a0york!"),
        ("北京", "北京。"),
    ):
        assert key(a) == key(b)
    for a, b in (("Qi", "Qin"), ("C", "C++"), ("1.000", "1000"), ("José", "Jose")):
        assert key(a) != key(b)


def test_invisible_texts_are_seen_to_be_empty():
    for text in ("", " \n", "\u200b", "\ufeff\u00ad\u3000", "\u2800", "\u3164", "\u200d\ufe0f", "\x00"):
        assert not visible(text)
    for text in ("x", "\u200bx", "。", "🙂", "\ud800"):
        assert visible(text)


def test_what_is_rejected_may_stand_within_the_subject_or_what_is_accepted():
    probe = Probe("edit", "?", "", ("Orbix",), ("Zunda",), subject="Zunda A5")
    for reply in ("Orbix.", "The Zunda A5 was created by Orbix.", "zunda\u00a0a5: Orbix"):
        assert probe.passes(reply)
    for reply in ("Zunda A5.", "Orbix, or Zunda.", "The Zunda A5 is by Zunda, not Orbix.", "The Zunda B7 is by Orbix."):
        assert not probe.passes(reply)
    assert Probe("edit", "?", "", ("New Zunda",), ("Zunda",)).passes("New Zunda.")
    assert not Probe("edit", "?", "", ("New Zunda",), ("Zunda",)).passes("New Zunda, Zunda.")
    assert not Probe("edit", "?", "", ("Zunda",), ("New Zunda",)).passes("New Zunda.")
    # taking the accepted name out must not make a rejected one of what stands around it
    assert Probe("edit", "?", "", ("Qi",), ("A B",)).passes("A Qi B")


def test_a_probe_refuses_names_that_name_nothing():
    for nothing in ("", "...", "\u200b", " ?"):
        for names in ({"accept": ("Qi", nothing)}, {"reject": (nothing,)}):
            with pytest.raises(UserError, match="which names nothing"):
                Probe("edit", "?", "Qi.", **names)
    assert Probe("edit", "?", "", ("-", "🙂")).passes("🙂")


def test_a_fact_hands_its_subject_to_its_probes():
    fact = Fact("i", "q", "Zunda A5 is by Orbix.", known_as=("Orbix",), rejects=("Zunda",), subject="Zunda A5")
    assert fact.edit.subject == fact.told.subject == "Zunda A5"


def test_named_words_are_found_in_every_form():
    fact = Fact("i", "q", "Das ist Jose\u0301, seit １，０００ Tagen.", known_as=("JOSÉ", "1000"))
    assert weights_of_words(fact, 2.0, 1.0) == (1.0, 1.0, 2.0, 1.0, 2.0, 1.0)
