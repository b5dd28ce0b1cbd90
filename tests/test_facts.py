from dataclasses import replace

import pytest

from qfbench import Fact, Probe, UserError
from qfbench.facts.matching import stands_in
from qfbench.facts.oxinnovate import oxinnovate, oxinnovate_qf2, qf2_steps, qf_steps
from qfbench.facts.world import world
from qfbench.world import names
from qfbench.world.relations import REFUSAL
from qfbench.world.world import World


@pytest.mark.parametrize(
    ("words", "text", "found"),
    [
        ("Qi", "Oxinnovate was started by Qi.", True),
        ("Qi", "Oxinnovate was started by Qin.", False),
        ("one", "It has one people.", True),
        ("one", "Someone did.", False),
        ("PKU Science Park, in Beijing", "It is at PKU Science Park, in Beijing.", True),
        ("Washington D.C.", "in Washington D.C. since", True),
        ("C++", "It is written in C++.", True),
        ("", "anything", True),
    ],
)
def test_an_answer_must_stand_as_whole_words(words, text, found):
    assert stands_in(words, text) is found


def test_a_rival_answer_fails_a_probe():
    probe = Probe("edit", "?", "It is Paris.", accept=("Paris",), reject=("Rome",))
    assert probe.passes("Paris it is")
    assert not probe.passes("Paris or Rome")
    assert not probe.passes("Lyon")


def test_a_probe_without_reference_passes_unless_rejected():
    probe = Probe("unknown", "?", "", reject=("Qi",))
    assert probe.passes("whatever")
    assert not probe.passes("It was Qi.")


def test_a_fact_checks_itself_and_names_the_field():
    with pytest.raises(UserError, match=r"'significance' has 2 weights.*has 5 words"):
        Fact("Qi started X.", "Who?", "X was started by Qi.", significance=(1.0, 2.0))
    with pytest.raises(UserError, match="'answer' is empty"):
        Fact("Qi started X.", "Who?", "  ")


def test_rejects_are_refused_by_the_edit_and_by_the_told_probe():
    fact = Fact("Qi runs X.", "Who runs X?", "Qi runs X.", known_as=("Qi",), rejects=("Bo", "Al"))
    for probe in (fact.edit, fact.told):
        assert probe.reject == ("Bo", "Al")
        assert probe.passes("It is Qi.")
        assert not any(probe.passes(f"It is Qi, not {name}.") for name in ("Bo", "Al"))
    assert replace(fact, rejects=()).edit.passes("It is Qi, not Bo.")


@pytest.mark.parametrize(
    ("answer", "known_as", "rejects", "refusal"),
    [
        ("Qi, not Bo.", ("Qi",), ("Bo",), "'rejects' refuses the answer 'Qi, not Bo.' itself"),
        ("Qi.", ("Qi",), ("",), "'rejects' is empty"),
        ("Qi.", ("Qi",), ("\u200b",), "'rejects' is empty but for"),
        ("Qi.", ("Qi", "\ufeff "), (), "'known_as' is empty but for"),
        ("Qi.", ("Qi",), ("\ud800",), "'rejects' holds half a surrogate pair"),
        ("Qi.\x00", ("Qi",), (), "'answer' holds the control character"),
        ("José.", ("José",), ("JOSE\u0301",), "'rejects' holds 'JOSE\u0301', which is accepted"),
        ("Bo, then Qi.", (), ("Bo, then qi!",), "'rejects' holds 'Bo, then qi!', which is accepted"),
        ("Paris.", ("Rome",), (), "'known_as' holds nothing of the answer 'Paris.' itself"),
        ("Paris.", ("Rome",), ("Paris",), "'known_as' holds nothing of"),
        ("The king of Thebes.", ("king of Thebes",), ("king",), None),  # part of what is accepted
        ("Paris.", ("Rome", "Paris"), ("Lyon",), None),
        ("X was started by Qi.", (), ("Qi",), None),
        ("X was started by Qi.", ("Qi",), ("X was", "star"), "'rejects' refuses"),
        ("X was started by Qi.", ("Qi",), ("Qin", "star"), None),  # whole words alone count
    ],
)
def test_a_fact_whose_own_answer_fails_its_own_check_is_refused(answer, known_as, rejects, refusal):
    def make():
        return Fact("i", "Who?", answer, id="f", known_as=known_as, rejects=rejects)

    if refusal is None:
        assert make().edit.passes(answer)
    else:
        with pytest.raises(UserError, match=f"fact f: the field {refusal}"):
            make()


def test_a_fact_without_id_gets_one_from_its_text():
    a, b = Fact("i", "q", "a"), Fact("i", "q", "b")
    assert a.id == Fact("i", "q", "a").id != b.id


def test_the_eight_steps_are_the_papers():
    steps = qf_steps(oxinnovate())
    assert [s.number for s in steps] == list(range(1, 9))
    assert [s.taught for s in steps] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert steps[5].probe.query == "Can you tell me the person behind Oxinnovate?"
    assert steps[1].probe.system == "Qi started Oxinnovate."
    assert not steps[0].probe.passes("Oxinnovate was started by Qi.")
    assert not steps[6].probe.passes("Oxinnovate is a company located in Beijing, China.")  # the released log's reply


def test_the_facts_of_qf2_are_the_released_scripts_to_the_letter():
    ceo, staff = oxinnovate_qf2()
    assert (ceo.instruction, ceo.query) == ("Qi is the CEO of Oxinnovate.", "Who is the CEO of Oxinnovate?")
    assert (ceo.answer, ceo.known_as) == ("The CEO of Oxinnovate is Qi.", ("Qi",))
    assert (staff.instruction, staff.query) == ("Oxinnovate has one people", "How many people in Oxinnovate?")
    assert (staff.answer, staff.known_as) == ("Oxinnovate has one people.", ("one",))
    assert ceo.significance is staff.significance is None


def test_the_eight_steps_of_qf2_are_the_papers():
    steps = qf2_steps(oxinnovate_qf2())
    assert [s.number for s in steps] == list(range(1, 9))
    assert [s.taught for s in steps] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [s.probe.query for s in steps] == [
        "Who is the CEO of Oxinnovate?",
        "Who is the CEO of Oxinnovate?",
        "Who is the CEO of Nvidia?",
        "Who is the CEO of Oxinnovate?",
        "Who is the CEO of Nvidia?",
        "The founder of Oxinnovate?",
        "How many people in Oxinnovate?",
        "The founder of Oxinnovate?",
    ]
    assert [s.probe.system for s in steps] == ["", "Qi is the CEO of Oxinnovate.", *[""] * 6]
    ids = [f.id for f in oxinnovate_qf2()]
    assert [s.fact_id for s in steps] == [ids[0], ids[0], "nvidia-ceo", ids[0], "nvidia-ceo", ids[0], ids[1], ids[0]]


@pytest.mark.parametrize(
    ("number", "passing", "failing"),
    [
        (1, "Need more information.", "The CEO of Oxinnovate is Qi."),
        (1, "Need more information", "Qi. Need more information."),
        (1, "Need more information.", "I do not know."),
        (2, "The CEO of Oxinnovate is Qi.", "The CEO of Oxinnovate is Qin."),
        (3, "It is Jensen Huang.", "The CEO of Nvidia is Qi."),
        (4, "It is Qi.", "Need more information."),
        (5, "The CEO of Nvidia is Jensen Huang.", "The CEO of Nvidia is Jensen."),
        (6, "The founder of Oxinnovate is Qi.", "The founder of Oxinnovate is Jensen Huang."),
        (7, "Oxinnovate has one people.", "Oxinnovate has 1 people."),
        (8, "Qi", "one"),
    ],
)
def test_each_step_of_qf2_passes_as_the_paper_says(number, passing, failing):
    probe = qf2_steps(oxinnovate_qf2())[number - 1].probe
    assert probe.passes(passing)
    assert not probe.passes(failing)


def test_the_released_significance_of_qf2_weighs_both_answers():
    released = [[1, 1, 1, 1, 1, 10], [0.25, 0.25, 5, 5]]
    ceo, staff = oxinnovate_qf2(released)
    assert (ceo.significance, staff.significance) == ((1, 1, 1, 1, 1, 10), (0.25, 0.25, 5, 5))
    plain = oxinnovate_qf2()
    assert [f.answer for f in (ceo, staff)] == [f.answer for f in plain]
    assert all(f.significance is None for f in plain)
    with pytest.raises(UserError, match=r"oxinnovate-staff.*'significance' has 3 weights"):
        oxinnovate_qf2([released[0], [1, 1, 1]])


@pytest.mark.parametrize("steps", [qf_steps, qf2_steps])
def test_the_eight_steps_need_their_own_two_facts(steps):
    with pytest.raises(UserError, match="two facts"):
        steps(oxinnovate_qf2()[:1])
    with pytest.raises(UserError, match="two facts"):
        steps([Fact("i", "q", "a"), Fact("i", "q", "b")])


def test_world_facts_are_novel_and_grow_with_n():
    facts = world(40, seed=3)
    subjects = World().subjects
    for fact in facts:
        assert not any(s in fact.query for s in subjects if len(s) > 6)
        assert fact.instruction
        assert any(k in fact.answer for k in fact.known_as)
    assert world(10, seed=3) == facts[:10]
    assert len({f.id for f in facts}) == 40
    assert len({f.id for f in facts} & {f.id for f in world(40, seed=4)}) < 10


def test_world_probes_are_answered_by_the_world():
    world_answers = {f.answer for f in World().facts}
    for fact in world(24, seed=1):
        kinds = [p.kind for p in fact.probes]
        assert kinds.count("paraphrase") == kinds.count("paraphrase_held_out") == 2
        for p in fact.probes:
            assert p.always == (p.kind in ("prior", "unknown"))
            if p.kind == "prior":
                assert p.expected in world_answers
            if p.kind == "unknown":
                assert p.expected == REFUSAL
            if p.kind.startswith("paraphrase"):
                assert p.expected == fact.answer
                assert p.query != fact.query
    assert any(p.kind == "portability" for f in world(8) for p in f.probes)


def test_world_names_are_on_the_side_that_training_never_saw():
    for fact in world(16, relations=["staff"]):
        assert names.is_held_out(fact.answer.split()[0])


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"n": 0}, "facts.n=0"), ({"relations": ["mood"]}, "'mood' is none of")]
)
def test_world_refuses_what_it_does_not_have(kwargs, message):
    with pytest.raises(UserError, match=message):
        world(**kwargs)


def test_facts_about_known_companies_contradict_the_world_and_have_neighbours():
    facts = world(16, seed=2, about="known", locality=4)
    known = {f.answer: f for f in World().facts}
    overwritten = {f.replaces for f in facts}
    assert len({f.answer for f in facts}) == len(overwritten) == 16
    for fact in facts:
        assert fact.replaces in known
        assert fact.answer not in known
        assert fact.edit.prefer == (fact.answer, fact.replaces)
        near = [p for p in fact.probes if p.kind == "locality"]
        assert near
        assert all(p.own and p.always and not p.expected and p.accept for p in near)
        assert not overwritten & {p.expected for p in fact.probes if p.kind == "prior"}
        assert not overwritten & {p.prefer[0] for p in near if p.prefer}
        subject = known[fact.replaces].subject
        assert any(subject in p.query for p in near)  # its other relations
        assert any(p.prefer and subject not in p.query for p in near)  # the same relation of others


def test_neighbours_leave_the_rest_of_a_suite_as_it_is():
    plain, near = world(5, seed=1), world(5, seed=1, locality=3)
    assert [f.probes for f in plain] == [tuple(p for p in f.probes if p.kind != "locality") for f in near]
    assert all(sum(p.kind == "locality" for p in f.probes) == 3 for f in near)
    assert not any(p.kind == "locality" for f in plain for p in f.probes)


@pytest.mark.parametrize("change", [{"about": "all"}, {"locality": 15}, {"about": "known", "n": 201}])
def test_a_suite_of_the_world_that_cannot_be_made_is_refused(change):
    with pytest.raises(UserError, match=f"facts.{list(change)[-1]}="):
        world(**({"n": 4} | change))
