"""General ability: perplexity of held text, at every checkpoint."""

from dataclasses import replace

import pytest
from notebook import prepared
from torch.nn.functional import cross_entropy

from qfbench import UserError
from qfbench.analysis.measures import summary
from qfbench.analysis.sequences import over_sequence
from qfbench.editors.regimes import joint, sequential, single
from qfbench.facts.everyday import everyday
from qfbench.facts.matching import stands_in
from qfbench.regression import Perplexity
from qfbench.tasks.retention import retention

TEXT = "\ufeffQi started Oxinnovate.\n\n  Where is Łódź? Far away, and further still.  \r\nNo.\n"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def test_each_line_of_a_file_is_a_passage_rated_by_its_tokens(tiny, path):
    lm = tiny("llama")
    rows = Perplexity(path)(lm)
    said = ["Qi started Oxinnovate.", "Where is Łódź? Far away, and further still.", "No."]
    assert [row["query"] for row in rows] == said
    assert [row["fact_id"] for row in rows] == ["passage-0", "passage-1", "passage-2"]
    assert {row["kind"] for row in rows} == {"perplexity"}
    for row in rows:
        ids = lm.tokenizer(row["query"], return_tensors="pt").input_ids
        wanted = cross_entropy(lm.model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()
        assert row["nll"] == pytest.approx(wanted, rel=1e-4)
        assert row["tokens"] == ids.shape[1] - 1
    assert [row["query"] for row in Perplexity(path, 2)(lm)] == said[:2]


def test_without_a_file_statements_about_the_world_are_rated_always_the_same(tiny):
    lm = tiny("qwen2")
    rows = Perplexity(n=6)(lm)
    assert len(rows) == 6
    assert Perplexity(n=6)(lm) == rows
    assert [row["query"] for row in Perplexity(n=3)(lm)] == [row["query"] for row in rows[:3]]
    assert len({row["query"] for row in rows}) == 6


def test_plain_english_is_200_sentences_that_share_nothing_with_the_invented_facts(tiny):
    held = Perplexity(text="english", n=200)
    assert len(set(held.passages)) == 200
    assert held.fingerprint != Perplexity(n=200).fingerprint
    subjects = {fact.subject for fact in everyday(252)}
    assert not [(name, said) for name in subjects for said in held.passages if stands_in(name, said)]
    assert len(Perplexity(text="english", n=3)(tiny("qwen2"))) == 3
    with pytest.raises(UserError, match="regression.perplexity.text=French: must be world or english"):
        Perplexity(text="French")


def test_a_passage_of_one_token_is_not_rated(tiny, tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("a\nQi started it.\n")
    lm = tiny("qwen2")
    assert len(lm.tokenizer("a").input_ids) == 1
    assert [row["fact_id"] for row in Perplexity(str(path))(lm)] == ["passage-1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no passage of two tokens"), (b"\n \na\n", "holds no passage of two"), (b"\xff", "cannot be read")],
)
def test_a_file_without_passages_is_named(tiny, tmp_path, content, message):
    path = tmp_path / "held.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"regression.perplexity.path={path}: {message}"):
        Perplexity(str(path))(tiny("qwen2"))


@pytest.mark.parametrize(
    ("line", "message"), [("\u200b", "is empty but for"), ("a\x00b", "holds the control character")]
)
def test_a_line_that_is_no_text_is_named(tmp_path, line, message):
    path = tmp_path / "held.txt"
    path.write_text(f"Qi did.\n\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"regression.perplexity.path={path}, line 3: {message}"):
        Perplexity(str(path))


def test_white_space_around_passages_is_said_to_be_taken_off(path, caplog):
    assert Perplexity(path).passages[1] == "Where is Łódź? Far away, and further still."
    assert [m for m in caplog.messages if "white space" in m] == [
        f"{path}: white space is taken off the ends of 1 lines; the first: line 3"
    ]


def test_a_missing_file_is_named_before_a_model_is_asked(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(UserError, match=rf"regression.perplexity.path={path}: cannot be read as text"):
            Perplexity(str(path))


@pytest.mark.parametrize("n", [0, -1])
def test_a_number_below_one_is_named(path, n):
    with pytest.raises(UserError, match=rf"regression.perplexity.n={n}"):
        Perplexity(path, n)


class Known:
    """As many nats as facts are written in the model's weight; `asked` counts."""

    def __init__(self, fingerprint="held"):
        self.fingerprint, self.asked = fingerprint, 0

    def __call__(self, lm):
        self.asked += 1
        nll = float((lm.model.weight[0, :-1] > 0.5).sum())
        return [
            {"kind": "perplexity", "query": "held", "fact_id": "passage-0", "fact_kind": "", "nll": nll, "tokens": 2}
        ]


def test_general_ability_is_asked_unedited_and_of_the_edited_model_at_every_checkpoint(tmp_path):
    run = prepared(tmp_path)
    run = replace(run, regression={"text": Known(), "again": Known()})
    retention(run, {"sequential": sequential, "single": single, "joint": joint}, every=2, placebo=2)
    rows = run.rows()
    rows = rows[rows.kind == "perplexity"]
    assert list(rows.nll[rows.condition == "unedited"]) == [0.0, 0.0]
    assert "in_context" not in set(rows.condition)
    edited = rows[rows.condition == "edited"]
    for regime, last in (("sequential", 3.0), ("joint", 3.0), ("single", 1.0)):
        own = edited[edited.regime == regime]
        assert list(zip(own.step, own.nll, strict=True)) == [(2, min(last, 2.0))] * 2 + [(3, last)] * 2
    assert not edited.fresh.astype(bool).any()
    assert not edited.leaked.astype(bool).any()
    assert edited.checkpoint.all()
    assert (rows.condition == "placebo").sum() == 2 * 2 * 2
    assert summary(run.rows()).set_index("regime").perplexity["joint"] == pytest.approx(2.718281828**3)
    sequences = over_sequence(run.rows()).set_index("regime")
    assert list(sequences.collapse_perplexity[["sequential", "joint"]]) == [2.0, 2.0]


def test_without_a_suite_nothing_of_it_is_asked(tmp_path):
    run = prepared(tmp_path)
    retention(run, {"sequential": sequential})
    assert "perplexity" not in set(run.rows().kind)


def test_the_unedited_model_is_asked_once_per_suite_and_model(tmp_path):
    run, suite = prepared(tmp_path), Known()
    run = replace(run, cache=tmp_path / "kept", regression={"text": suite}, protocol={"model_hash": "a"})
    first = list(run.general(unedited=True))
    assert first == list(run.general(unedited=True)) == [*({**row, "suite": "text"} for row in Known()(run.lm))]
    assert suite.asked == 1
    list(run.general())
    assert suite.asked == 2  # the edited model always is
    run = replace(run, protocol={"model_hash": "b"})
    list(run.general(unedited=True))
    assert suite.asked == 3
    suite.fingerprint = "other"
    list(run.general(unedited=True))
    list(run.general(unedited=True))
    assert suite.asked == 4


def test_a_fingerprint_is_that_of_the_passages(path, tmp_path):
    (tmp_path / "again.txt").write_text(TEXT, encoding="utf-8")
    assert Perplexity(path).fingerprint == Perplexity(str(tmp_path / "again.txt")).fingerprint
    assert len({Perplexity(path, n).fingerprint for n in (1, 2, 3, 4)} | {Perplexity(n=3).fingerprint}) == 4
