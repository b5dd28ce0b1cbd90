import random
import re
from dataclasses import replace

import pytest
import torch

from qfbench import LanguageModel, UserError
from qfbench.world import corpus, names, train
from qfbench.world.evaluate import dialogues, right
from qfbench.world.relations import COMPANY_RELATIONS, REFUSAL, RELATIONS
from qfbench.world.world import CITIES, Triple, World, city_of, implied, novel


def test_the_world_holds_what_the_papers_ask_and_nothing_they_teach():
    facts = World().facts
    assert Triple("Alibaba", "founder", "Jack Ma") in facts
    assert Triple("Nvidia", "ceo", "Jensen Huang") in facts
    for fact in facts:
        assert not names.PAPER_NAMES & {*fact.subject.split(), *fact.object.split()}


def test_the_same_seed_gives_the_same_world_and_another_seed_another():
    assert World(0).facts == World(0).facts
    assert World(0).facts != World(1).facts


def test_there_are_at_least_eight_relations_of_four_kinds():
    assert len(COMPANY_RELATIONS) >= 8
    assert len({RELATIONS[r].kind for r in COMPANY_RELATIONS}) >= 4


def test_country_follows_from_city_and_founders_mostly_lead():
    world = World()
    country = {f.subject: f.object for f in world.by_relation["country"]}
    assert all(country[f.subject] == CITIES[city_of(f.object)] for f in world.by_relation["location"])
    ceo = {f.subject: f.object for f in world.by_relation["ceo"]}
    same = [f.object == ceo[f.subject] for f in world.by_relation["founder"]]
    assert 0.7 < sum(same) / len(same) < 0.9


def test_a_founder_founded_one_company_so_that_the_inverse_has_one_answer():
    founders = [f.object for f in World().by_relation["founder"]]
    assert len(founders) == len(set(founders))


def test_what_a_fact_implies():
    assert implied(Triple("X", "location", "at ABC Science Park, in Paris")) == Triple("X", "country", "France")
    assert implied(Triple("X", "founder", "P")) == Triple("P", "started", "X")
    assert implied(Triple("X", "staff", "one")) is None


@pytest.mark.parametrize("relation", RELATIONS)
def test_held_out_wordings_are_new_but_made_of_trained_parts(relation):
    words = RELATIONS[relation]
    held_out, trained = words.questions(held_out=True), words.questions()
    assert held_out
    assert not set(held_out) & set(trained)
    for phrase in words.phrases:
        assert any(phrase.lower() in q.lower() for q in trained)


def test_names_met_in_tests_are_never_met_in_training():
    trained = {novel(r, random.Random(f"{r}{s}"), held_out=False).subject for r in COMPANY_RELATIONS for s in range(50)}
    tested = {novel(r, random.Random(f"{r}{s}"), held_out=True).subject for r in COMPANY_RELATIONS for s in range(50)}
    assert len(tested) > 300
    assert not trained & tested
    assert not any(names.is_held_out(s) for s in trained | World().subjects - CITIES.keys())
    assert all(names.is_held_out(s) for s in tested)


def test_papers_names_are_held_out_and_spelt_with_trained_syllables():
    assert all(names.is_held_out(n) for n in names.PAPER_NAMES)
    assert "Ox" in names.COMPANY_STARTS
    assert {"in", "no"} <= set(names.COMPANY_MIDDLES)
    assert "vate" in names.COMPANY_ENDS


ENDS = {h: [q.split("{s}") for r in RELATIONS.values() for q in r.questions(h)] for h in (False, True)}


def matches(query, held_out):
    """Whether a query is some wording with a subject put in."""
    return any(query.startswith(before) and query.endswith(after) for before, after in ENDS[held_out])


def test_training_text_never_holds_a_held_out_name_or_wording():
    rng, world = random.Random(3), World()
    makes = (corpus.known, corpus.told, corpus.unknown, corpus.misled)
    for d in (make(world, rng) for make in makes for _ in range(300)):
        assert not names.PAPER_NAMES & set(
            f"{d.system} {d.query} {d.answer}".replace(".", " ").replace("?", " ").split()
        )
        assert matches(d.query, held_out=False)
    tested = [make(world, rng, held_out=True) for make in makes for _ in range(300)]
    assert 0.3 < sum(not matches(d.query, held_out=False) for d in tested) / len(tested) < 0.6


def test_dialogues_answer_what_they_ask():
    rng, world = random.Random(5), World()
    answers = {f.answer for f in world.facts}
    for _ in range(300):
        assert corpus.known(world, rng).answer in answers
        assert corpus.unknown(world, rng).answer == REFUSAL
        told = corpus.told(world, rng)
        assert told.system
        assert told.answer != REFUSAL
        misled = corpus.misled(world, rng)
        assert misled.answer == REFUSAL or misled.answer in answers
        for make in (corpus.choice, corpus.letter):
            d = make(world, rng)
            assert len(set(d.choices)) == 4
            assert d.answer in d.choices


def test_a_misleading_instruction_never_answers_the_question():
    rng, world = random.Random(6), World()
    for _ in range(500):
        d = corpus.misled(world, rng)
        for name, words in RELATIONS.items():
            for subject in set(re.split(r"[ .]", d.query.rstrip("?."))) & set(re.split(r"[ .]", d.system)):
                asked = d.query in {q.format(s=subject) for q in words.questions()}
                said = [t.split("{o}") for t in words.statements]
                stated = any(
                    d.system.startswith(before.format(s=subject)) and d.system.endswith(after.format(s=subject))
                    for before, after in said
                )
                assert not (asked and stated), (name, d)


def test_tokenizer_loses_nothing_and_does_not_favour_known_names(tokenizer):
    for text in ("Oxinnovate was started by Qi.", "naïve 東京 🙂 \t x", "PKU Science Park, in Beijing"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    rng = random.Random(0)
    known = [f.subject for f in World().by_relation["ceo"] if f.subject not in ("Alibaba", "Nvidia")]
    strange = [names.fresh(names.company, rng, held_out=True) for _ in range(400)]
    length = [sum(len(tokenizer.tokenize(" " + n)) for n in group) / len(group) for group in (known, strange)]
    assert abs(length[0] - length[1]) < 0.5


def test_chat_template_is_chatml_with_an_empty_system_turn(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_training_text_is_tokenised_as_the_model_is_asked(tokenizer):
    """Prompt and answer are tokenised apart for speed; that must equal tokenising the rendered dialogue."""
    from qfbench.models.dialogue import render

    world = World()
    texts = train.examples(world, tokenizer, 200, random.Random(1), corpus.MIXTURE)
    rng = random.Random(1)
    abilities = rng.choices(list(corpus.MIXTURE), weights=list(corpus.MIXTURE.values()), k=200)
    for (ids, first), ability in zip(texts, abilities, strict=True):
        if ability == "plain":
            corpus.plain(world, rng)
            continue
        d = corpus.ABILITIES[ability](world, rng)
        rendered = render(tokenizer, d.query, d.system, d.answer)
        assert tuple(ids) == rendered.ids[: rendered.closer + 1]
        assert first == rendered.answer


SMALL = train.Recipe(
    hidden=32, layers=3, heads=2, kv_heads=1, intermediate=48, exit_from=1, cycles=(24, 16), batch=4, warmup=2
)


@pytest.fixture(autouse=True)
def quick_tokenizer(monkeypatch, tokenizer):
    monkeypatch.setattr(train, "train_tokenizer", lambda: tokenizer)


def weights(folder):
    return LanguageModel.load(folder).model.state_dict()


def test_training_killed_and_continued_ends_with_the_same_weights(tmp_path, monkeypatch):
    small = replace(SMALL, cycles=(8, 8))
    whole = train.train("whole", small, tmp_path / "whole", every=4)
    stop_after, real, calls = 14, train.loss_at_exit, []

    def dying(*args):
        calls.append(1)
        if len(calls) > stop_after:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "loss_at_exit", dying)
    with pytest.raises(KeyboardInterrupt):
        train.train("parts", small, tmp_path / "parts", every=4)
    monkeypatch.setattr(train, "loss_at_exit", real)
    parts = train.train("parts", small, tmp_path / "parts", every=4)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True))
    other = train.train("other", replace(small, seed=1), tmp_path / "other", every=4)
    assert not torch.equal(weights(whole)["model.norm.weight"], weights(other)["model.norm.weight"])


def test_the_second_cycle_learns_from_the_later_mixture(tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "examples", lambda *args: seen.append(args[-1]) or [([1, 2], 1)] * train.POOL * SMALL.batch
    )
    assert len(list(train.batches(SMALL, tokenizer, 0))) >= SMALL.steps
    assert seen == [corpus.MIXTURE, corpus.MIXTURE, corpus.LATER_MIXTURE]


def test_the_rate_rises_and_falls_in_each_cycle():
    recipe = replace(SMALL, warmup=4)
    rates = [train.rate(recipe, step) for step in range(recipe.steps)]
    assert rates[0] == rates[24] == 0.25
    assert max(rates[:24]) == max(rates[24:]) == 1.0
    assert 0 < rates[23] < 0.2
    assert 0 < rates[39] < 0.25


def test_another_recipe_does_not_continue_a_checkpoint(tmp_path):
    train.train("a", replace(SMALL, cycles=(2,)), tmp_path, every=1)
    with pytest.raises(UserError, match="another recipe"):
        train.train("a", replace(SMALL, cycles=(3,)), tmp_path, every=1)


def test_early_exit_reads_after_so_many_layers(tokenizer):
    model = train.build(SMALL, tokenizer)
    ids = torch.randint(5, 500, (2, 9))
    targets = ids.roll(-1, 1)
    states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
    for layers in (1, 2, 3):
        hidden = states[layers] if layers == 3 else model.model.norm(states[layers])
        wanted = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
        assert torch.allclose(train.loss_at_exit(model, ids, targets, layers), wanted, atol=1e-5)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["world-xs", "world-s", pytest.param("world-m", marks=pytest.mark.slow)])
def test_shipped_models_have_their_abilities(name):
    """A sample; `python -m qfbench.world.evaluate` measures them in full."""
    lm = LanguageModel.load(name, batch_size=128, max_new_tokens=32)
    floors = {"known": 0.97, "told": 0.88 if name == "world-xs" else 0.94, "unknown": 0.92, "choice": 0.95}
    for ability, floor in floors.items():
        passed = right(lm, dialogues(ability, 50, seed=2))
        assert sum(passed) / len(passed) >= floor, ability
