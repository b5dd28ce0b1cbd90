import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from torch import nn

from qfbench import Fact, LanguageModel, Probe, Unsupported, UserError
from qfbench.delta import LowRank, WeightDelta
from qfbench.editors import QF, Editor
from qfbench.facts.world import world
from qfbench.lm import Reply, Score
from qfbench.metrics import forgetting, matrices, summary
from qfbench.probes import ask
from qfbench.provenance import provenance
from qfbench.regimes import joint, protected, sequential, single
from qfbench.retention import baseline, checkpoints, in_order, retention, teach
from qfbench.run import Run, contents, execute
from qfbench.store import ParquetStore

REFUSAL = "Need more information."
FOUNDERS = ("Ada", "Bo", "Cy")


class Notebook(LanguageModel):
    """Answers for the facts that its weight names, or that it is told; `says` has its other replies, after 0, 1 ... facts."""

    name, dtype, device = "notebook", torch.float32, torch.device("cpu")

    def __init__(self, facts, says=None, deaf=()):
        self.facts, self.says, self.deaf = facts, says or {}, deaf
        self.model = nn.Linear(len(FOUNDERS) + 1, 1, bias=False).requires_grad_(False)
        self.model.weight.data = torch.tensor([[0.0, 0.0, 0.0, 2.0]])

    def render(self, query, system="", answer=""):
        return query, system, answer

    def score(self, dialogues):
        return [
            Score((1.0,), (reply.text == d[2],)) for reply, d in zip(self.replies(dialogues), dialogues, strict=True)
        ]

    def replies(self, prompts):
        return [Reply(self.think(query, system), True) for query, system, _ in prompts]

    def think(self, query, system):
        known = self.model.weight[0, :-1] > 0.5
        for fact, knows in zip(self.facts, known, strict=True):
            told = system == fact.instruction and not {fact.id, query} & set(self.deaf)
            if query in (p.query for p in (fact.edit, *fact.probes) if not p.always) and (knows or told):
                return fact.answer
        said = self.says.get(query, ("North." if query.startswith("Where") else REFUSAL,))
        return said[min(int(known.sum()), len(said) - 1)]


@dataclass(frozen=True)
class Note(Editor):
    """Writes down each fact by its number; cannot protect, and gives up at the fact `broken`."""

    layer: int = 0
    broken: str = ""

    @property
    def site(self):
        return type("Place", (), {"layer": self.layer})()

    def edit(self, lm, facts):
        if self.broken in [f.id for f in facts]:
            raise Unsupported(f"no room for fact {self.broken}")
        return WeightDelta({"weight": LowRank(sum(torch.eye(4)[[int(f.id)]] for f in facts))})


def suite():
    facts = []
    for n, who in enumerate(FOUNDERS):
        probes = (
            Probe("paraphrase", f"Who is behind Firm{n}?", f"{who} started Firm{n}.", (who,)),
            Probe("prior", f"Where is Town{n}?", "North.", always=True),
            Probe("unknown", f"Who started Nothing{n}?", REFUSAL, always=True),
        )
        said = f"{who} started Firm{n}."
        facts.append(Fact(said, f"Who started Firm{n}?", said, id=str(n), known_as=(who,), probes=probes))
    return facts


def prepared(folder, editor=None, console=None, **lm):
    facts = suite()
    console = console or Console(quiet=True)
    return Run(Notebook(facts, **lm), editor or Note(), facts, folder, ParquetStore(folder), console, "retention")


def taught(folder, *regimes, every=1, **setting):
    """The rows of a run over the three facts."""
    run = prepared(folder, **setting)
    retention(run, {regime.__name__: regime for regime in regimes or (sequential,)}, every)
    rows = run.rows()
    return run, rows, rows[rows.condition == "edited"]


OWN = ["{} edit", "{} paraphrase"]
ALWAYS = [f"{n} {kind}" for n in range(3) for kind in ("prior", "unknown")]
NEW = {step: [text.format(step - 1) for text in OWN] for step in (1, 2, 3)}
CHECK = {1: ALWAYS, 2: ["0 edit", *ALWAYS], 3: ["0 edit", "1 edit", "0 paraphrase", "1 paraphrase", *ALWAYS]}


@pytest.mark.parametrize(("every", "checkpoints"), [(1, {1, 2, 3}), (2, {2, 3}), (3, {3}), (9, {3})])
def test_every_fact_is_asked_in_full_when_new_and_the_others_at_checkpoints_and_all_at_last(
    tmp_path, every, checkpoints
):
    _, _, rows = taught(tmp_path, every=every)
    asked = (rows.fact_id + " " + rows.kind).groupby(rows.step).apply(sorted).to_dict()
    assert asked == {step: sorted(NEW[step] + (CHECK[step] if step in checkpoints else [])) for step in (1, 2, 3)}
    assert rows.groupby("step").checkpoint.agg(set).to_dict() == {step: {step in checkpoints} for step in (1, 2, 3)}


def test_fresh_are_the_newest_facts_own_probes_and_no_others(tmp_path):
    _, _, rows = taught(tmp_path, sequential, single)
    for regime, group in rows.groupby("regime"):
        fresh = group[group.fresh]
        assert sorted(zip(fresh.step, fresh.fact_id, fresh.kind, strict=True)) == [
            (step, str(step - 1), kind) for step in (1, 2, 3) for kind in ("edit", "paraphrase")
        ], regime
        assert fresh.generated.all()


def test_leaked_is_an_unknown_subject_that_gets_the_answer_of_any_fact_taught_so_far(tmp_path):
    says = {
        "Who started Nothing0?": (REFUSAL, REFUSAL, "It was Bo.", "It was Bo."),  # the second fact's
        "Who started Nothing1?": (REFUSAL, "Ada did.", "Cy did.", "Zoe did."),  # at step 2, Cy is still to come
        "Where is Town0?": ("North.", "Ada."),  # wrong, but no leak: its subject is known
    }
    _, _, rows = taught(tmp_path, says=says)
    leaked = rows[rows.leaked]
    assert sorted(zip(leaked.step, leaked["query"], strict=True)) == [
        (1, "Who started Nothing1?"),
        (2, "Who started Nothing0?"),
        (3, "Who started Nothing0?"),
    ]


def test_what_the_unedited_model_gets_wrong_is_not_asked_again(tmp_path):
    says = {"Where is Town1?": ("South.", "North."), "Who started Nothing2?": ("Zoe.", REFUSAL)}
    _, rows, edited = taught(tmp_path, says=says)
    asked = {"Where is Town0?", "Where is Town2?", "Who started Nothing0?", "Who started Nothing1?"}
    about_the_model = ["prior", "unknown"]
    assert set(edited["query"][edited.kind.isin(about_the_model)]) == asked
    before = rows[(rows.condition == "unedited") & rows.kind.isin(about_the_model)]
    assert set(before["query"][before.generated]) == asked
    assert set(before["query"][~before.generated]) == set(says)


def test_in_context_asks_each_fact_with_its_own_instruction_and_unedited_with_none(tmp_path):
    run, rows, _ = taught(tmp_path)
    told, alone = (rows[rows.condition == condition] for condition in ("in_context", "unedited"))
    instructions = {f.id: f.instruction for f in run.facts}
    assert list(told.system) == list(told.fact_id.map(instructions))
    assert told.groupby("fact_id").kind.apply(list).to_dict() == {n: ["edit", "paraphrase"] for n in "012"}
    assert told.generated.all()
    assert set(alone.system) == {""}
    assert not alone.generated[alone.kind.isin(["edit", "paraphrase"])].any()
    assert set(rows.system[rows.condition == "edited"]) == {""}


@pytest.mark.parametrize("deaf", ["1", "Who started Firm1?"], ids=["to_the_fact", "to_its_query_alone"])
def test_a_fact_that_is_not_understood_is_not_taught(tmp_path, deaf):
    _, rows, edited = taught(tmp_path, sequential, joint, deaf=(deaf,))
    own = edited[edited.kind.isin(["edit", "paraphrase"])]
    assert set(own.fact_id) == {"0", "2"}
    assert set(edited.step) == {1, 2}
    for name in ("sequential", "joint"):
        change = WeightDelta.load(tmp_path / "deltas" / f"Note-{name}-layer0.safetensors").changes["weight"]
        assert change.dense().tolist() == [[1, 0, 1, 0]]
    assert set(rows.fact_id[rows.condition == "unedited"]) == {"0", "1", "2"}


def test_a_model_that_understands_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="answers none of the facts even when told"):
        taught(tmp_path, deaf=("0", "1", "2"))


@pytest.mark.parametrize("every", [0, -1])
def test_checkpoints_need_a_positive_distance(tmp_path, every):
    with pytest.raises(UserError, match=f"every={every}"):
        taught(tmp_path, every=every)


def test_the_last_change_of_a_regime_that_accumulates_is_saved(tmp_path):
    taught(tmp_path, sequential, joint, single, editor=Note(layer=1))
    saved = sorted((tmp_path / "deltas").iterdir())
    assert [p.name for p in saved] == ["Note-joint-layer1.safetensors", "Note-sequential-layer1.safetensors"]
    for path in saved:
        assert WeightDelta.load(path).changes["weight"].dense().tolist() == [[1, 1, 1, 0]]


def test_an_editor_without_a_protected_form_becomes_a_row_and_the_other_regimes_go_on(tmp_path):
    console = Console(record=True, width=200)
    _, rows, edited = taught(tmp_path, protected, sequential, editor=Note(layer=1), console=console)
    (row,) = rows[rows.condition == "unsupported"].itertuples()
    assert (row.regime, row.layer) == ("protected", 1)
    assert row.reply == "Note cannot protect earlier keys; use regime=sequential or joint"
    assert set(edited.regime) == {"sequential"}
    assert row.reply in console.export_text().replace("\n", " ")
    assert (pd.read_parquet(tmp_path / "rows.parquet").condition == "unsupported").sum() == 1


def test_an_editor_that_gives_up_half_way_keeps_what_was_measured(tmp_path):
    _, rows, edited = taught(tmp_path, editor=Note(broken="2"))
    assert list(rows.reply[rows.condition == "unsupported"]) == ["no room for fact 2"]
    assert set(edited.step) == {1, 2}


def test_relative_norm_is_a_share_of_the_unedited_weights_norm(tmp_path):
    _, _, rows = taught(tmp_path, sequential, single)
    norms = rows.groupby(["regime", "step"]).relative_norm.unique()
    for step in (1, 2, 3):
        assert norms["sequential", step] == pytest.approx([step**0.5 / 2])
        assert norms["single", step] == pytest.approx([1 / 2])


def test_an_empty_change_has_no_norm(tmp_path):
    assert prepared(tmp_path).health(WeightDelta())["relative_norm"] == 0


def test_the_last_rows_are_what_the_saved_change_gives(tmp_path):
    """Real edits: the rows of the last step, measured again on the model with the saved change in it."""
    lm, facts = LanguageModel.load("world-xs", device="cpu"), world(3, paraphrases=1)
    run = Run(lm, QF(layer=2), facts, tmp_path, ParquetStore(tmp_path), Console(quiet=True), "retention")
    before = lm.weights_hash()
    retention(run, {"sequential": sequential})
    assert lm.weights_hash() == before
    rows = run.rows()
    last = rows[(rows.condition == "edited") & (rows.step == 3)]
    delta = WeightDelta.load(tmp_path / "deltas" / "QF-sequential-layer2.safetensors")
    weight = lm.model.get_parameter("model.layers.2.mlp.down_proj.weight")
    assert last.relative_norm.unique() == pytest.approx([delta.norm() / weight.norm().item()])
    assert not 0.5 < weight.norm() < 2  # the share is not the norm itself
    probes = {p.query: p for f in facts for p in (f.edit, *f.probes)}
    with delta.applied_to(lm):
        again = ask(lm, [probes[query] for query in last["query"]])
    assert [row["reply"] for row in again] == list(last.reply)
    assert set(last["query"][last.kind == "edit"]) == {f.query for f in facts}
    assert last.generated[last.fresh & (last.kind == "edit")].all()


def provenance_of(run):
    return provenance(0, run.lm, run.facts)


def test_suite_hash_and_model_hash_name_the_facts_and_the_weights(tmp_path):
    run = prepared(tmp_path)
    found = provenance_of(run)
    assert provenance_of(prepared(tmp_path)) == found
    run.facts[2] = replace(run.facts[2], probes=(replace(run.facts[2].probes[0], query="Who?"),))
    other_suite = provenance_of(run)
    assert other_suite["facts"] == found["facts"]
    assert other_suite["suite_hash"] != found["suite_hash"]
    assert other_suite["model_hash"] == found["model_hash"]
    run.lm.model.weight[0, 0] = 1e-30
    assert provenance_of(run)["model_hash"] != found["model_hash"]
    assert provenance_of(run)["suite_hash"] == other_suite["suite_hash"]


def test_rows_that_a_folder_holds_are_not_overwritten(tmp_path):
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"reply": ["earlier"]}).to_parquet(path)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    cfg = OmegaConf.create({"seed": 0, "threads": 2, "resume": False})
    with pytest.raises(UserError, match=rf"{tmp_path} holds a run already; give another hydra.run.dir"):
        execute(cfg, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.parquet"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["rows.parquet", "config.yaml"], "config.yaml, rows.parquet"),
        (["b.csv", "figures/one.png", "deltas/x", "deltas/y"], "b.csv, figures/one.png, deltas/ (2 files)"),
        (["a", "figures/1", "figures/2", "figures/3", "other/z"], "a, figures/ (3 files)"),
        (["deltas/only"], "deltas/only"),
    ],
)
def test_contents_are_one_line(tmp_path, names, line):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert contents(tmp_path) == line
    (tmp_path / "figures").mkdir(exist_ok=True)  # an empty folder is not worth a word
    assert contents(tmp_path) == line


def test_forgetting_takes_edited_rows_at_checkpoints_only():
    columns = ("condition", "step", "checkpoint", "generated", "fact_id")
    rows = [
        ("edited", 1, False, True, "a"),
        ("edited", 2, True, False, "a"),
        ("edited", 2, True, True, "b"),
        ("told", 2, True, True, "a"),
        ("edited", 3, False, True, "c"),
        ("edited", 4, True, False, "a"),
        ("told", 5, True, True, "a"),
    ]
    frame = pd.DataFrame(rows, columns=columns).assign(model="m", editor="E", regime="joint", kind="edit")
    curve = forgetting(frame.assign(taught=frame.step))
    assert list(zip(curve.step, curve["mean"], strict=True)) == [(2, 0.5), (4, 0.0)]


def test_forgetting_is_measured_at_the_checkpoints_of_a_run(tmp_path):
    _, rows, _ = taught(tmp_path, sequential, single, every=2)
    curve = forgetting(rows)
    assert list(zip(curve.regime, curve.step, strict=True)) == [("sequential", 2), ("sequential", 3)]


def test_single_edits_have_no_retention_and_are_measured_over_all_edits(tmp_path):
    says = {"Where is Town0?": ("North.", "South.")}  # wrong after any edit
    run, rows, _ = taught(tmp_path, single, sequential, says=says)
    last = rows.step == 3
    rows.loc[last & (rows.regime == "single") & (rows.kind == "prior"), "generated"] = False
    rows.loc[last & (rows.regime == "single") & (rows.kind == "unknown"), "leaked"] = True
    lines = summary(rows).set_index("regime")
    assert np.isnan(lines.retention["single"])
    assert lines.retention["sequential"] == 1
    assert lines.prior["single"] == pytest.approx((2 + 2 + 0) / 9)
    assert lines.prior["sequential"] == pytest.approx(2 / 3)
    assert lines.leakage["single"] == pytest.approx(1 / 3)
    assert lines.norm["single"] == pytest.approx(1 / 2)
    assert list(pd.read_csv(run.folder / "retention.csv").regime) == list(lines.index)


@dataclass(frozen=True)
class Margin(Note):
    """Another editor; at layer 1 it writes nothing, so that nothing is learnt."""

    def edit(self, lm, facts):
        return WeightDelta() if self.layer else super().edit(lm, facts)


def side_by_side(folder, monkeypatch, console=None, entrants=(("other", Margin(layer=1), sequential),), **other):
    """The rows of a run with others beside it, each a notebook of the name that its model's path gives."""

    def load(model):
        lm = Notebook(suite(), **other)
        lm.name = model["path"]
        return lm

    monkeypatch.setattr("qfbench.run.load", load)
    run = prepared(folder, console=console)
    (folder / "provenance.json").write_text("{}")
    beside = {
        f"entry{n}": {"model": {"path": path}, "editor": editor, "regimes": {"sequential": regime}}
        for n, (path, editor, regime) in enumerate(entrants)
    }
    retention(run, {"sequential": sequential, "joint": joint}, beside=beside)
    return run.rows()


def test_what_stands_beside_a_run_shares_its_rows_its_table_and_its_figure(tmp_path, monkeypatch):
    console = Console(record=True, width=200)
    rows = side_by_side(tmp_path, monkeypatch, console)
    columns = ["model", "editor", "regime"]
    own = [("notebook", "Note", regime) for regime in ("unedited", "in_context", "sequential", "joint")]
    others = [("other", "Margin", regime) for regime in ("unedited", "in_context", "sequential")]
    table = pd.read_csv(tmp_path / "retention.csv")
    table = table[table.regime != "placebo"]
    assert list(table[columns].itertuples(index=False, name=None)) == own + others
    lines = table.set_index(columns)
    assert lines.retention["notebook", "Note", "sequential"] == 1
    assert lines.retention["other", "Margin", "sequential"] == 0
    assert lines.efficacy["other", "Margin", "in_context"] == 1
    said = " ".join(console.export_text().split())
    assert "3 facts, one after another: notebook, Note at layer 0; other, Margin at layer 1" in said
    curves = forgetting(rows).set_index(columns)["mean"]
    assert set(curves.index) == {*own[2:], *others[2:]}
    assert set(curves["other"]) == {0.0}
    assert set(curves["notebook"]) == {1.0}
    assert {p.stem for p in tmp_path.glob("figures/*.png")} == {"forgetting_curves", "retention_matrix"}
    assert {p.stem for p in tmp_path.glob("deltas/*")} == {
        "Note-sequential-layer0",
        "Note-joint-layer0",
        "Margin-sequential-layer1",
    }
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "rows.parquet")[columns], rows[columns].reset_index(drop=True)
    )


def test_every_row_names_its_model_and_its_editor(tmp_path, monkeypatch):
    entrants = (("second", Note(), single), ("third", Margin(), sequential))
    rows = side_by_side(tmp_path, monkeypatch, entrants=entrants)
    assert rows.groupby(["model", "editor"], sort=False).condition.agg(lambda c: list(c.unique())).to_dict() == {
        ("notebook", "Note"): ["unedited", "in_context", "edited", "placebo"],
        ("second", "Note"): ["unedited", "in_context", "edited"],  # single edits leave nothing to compare it with
        ("third", "Margin"): ["unedited", "in_context", "edited", "placebo"],
    }
    assert rows.groupby("model").taught.max().to_dict() == {"notebook": 3, "second": 1, "third": 3}  # its own regime
    assert set(rows.run_id) == {f"{tmp_path.parent.name}-{tmp_path.name}"}
    assert set(rows.task) == {"retention"}


def test_what_stands_beside_a_run_is_asked_what_it_understands_itself(tmp_path, monkeypatch):
    says = {"Where is Town0?": ("South.",)}
    rows = side_by_side(tmp_path, monkeypatch, entrants=(("other", Note(), sequential),), deaf=("1",), says=says)
    edited = rows[rows.condition == "edited"]
    own, other = (edited[edited.model == name] for name in ("notebook", "other"))
    assert set(own.fact_id[own.kind == "edit"]) == {"0", "1", "2"}
    assert set(other.fact_id[other.kind == "edit"]) == {"0", "2"}
    assert "Where is Town0?" in set(own["query"]) - set(other["query"])


@pytest.mark.parametrize(
    ("entrants", "printed"),
    [
        ((), set()),
        ((("other", Margin(), sequential),), {"editor"}),  # each editor has one model, which the title names
        ((("other", Note(), sequential),), {"model", "editor"}),
    ],
    ids=["alone", "another_editor", "another_model"],
)
def test_what_tells_the_lines_of_a_table_apart_is_printed_and_all_is_kept(tmp_path, monkeypatch, entrants, printed):
    console = Console(record=True, width=200)
    side_by_side(tmp_path, monkeypatch, console, entrants=entrants)
    assert {"model", "editor"} <= set(pd.read_csv(tmp_path / "retention.csv").columns)
    words = set(console.export_text().replace("by ", "editor ").split())
    assert {"model", "editor"} & words == printed


def test_what_a_regime_is_taught_about_stands_in_every_row_and_in_the_name_of_the_change(tmp_path):
    run = prepared(tmp_path, editor=Note(layer=3))
    facts, always = baseline(run)
    steps = []
    for lr in (0.5, 2.0):
        teach(run, "sequential", sequential, facts, always, [2, 3], steps.append, {"scheme": "plain", "lr": lr})
    teach(run, "protected", protected, facts, always, [1, 2, 3], steps.append, {"scheme": "none"})
    rows = run.rows()
    edited, unsupported = (rows[rows.condition == condition] for condition in ("edited", "unsupported"))
    assert edited.groupby(["layer", "scheme", "lr"]).size().to_dict() == {
        (3, "plain", lr): len(edited) / 2 for lr in (0.5, 2.0)
    }
    assert list(unsupported[["layer", "scheme", "regime"]].itertuples(index=False, name=None)) == [
        (3, "none", "protected")
    ]
    assert steps == ["sequential: edit 1", "sequential: edit 2", "sequential: edit 3"] * 2
    assert sorted(p.stem for p in tmp_path.glob("deltas/*")) == [
        "Note-sequential-layer3-schemeplain-lr0.5",
        "Note-sequential-layer3-schemeplain-lr2.0",
    ]
    assert rows[["scheme", "lr"]][rows.condition == "in_context"].isna().all(axis=None)


@pytest.mark.parametrize("n", [1, 2, 49, 50, 51, 60, 61, 100, 1000])
def test_checkpoints_left_open_are_dense_and_then_ever_fewer(n):
    steps = sorted(checkpoints(n, None))
    dense, rest = steps[: min(n, 50)], steps[min(n, 50) :]
    assert dense == list(range(1, min(n, 50) + 1))
    assert steps[-1] == n
    for earlier, step in zip(steps[49:], rest[:-1], strict=False):
        assert step / earlier == pytest.approx(1.2, abs=0.02)
    assert not rest or rest[-1] / steps[-2] <= 1.22
    if n == 100:
        assert rest == [60, 72, 86, 100]


def test_checkpoints_take_other_scales_and_each_n_th_and_the_last():
    assert checkpoints(40, None, dense=4, ratio=2) == {1, 2, 3, 4, 8, 16, 32, 40}
    assert checkpoints(10, 4) == {4, 8, 10}
    assert checkpoints(8, 4) == {4, 8}
    assert checkpoints(3, 5) == {3}
    assert checkpoints(60, 1) == set(range(1, 61))


def test_orders_are_permutations_by_their_number():
    facts = [replace(suite()[0], id=str(n)) for n in range(12)]
    taught = [[f.id for f in in_order(facts, order)] for order in range(4)]
    assert taught[0] == [f.id for f in facts]
    assert all(sorted(ids) == sorted(taught[0]) for ids in taught)
    assert len({tuple(ids) for ids in taught}) == 4
    assert [[f.id for f in in_order(facts, order)] for order in range(4)] == taught
    assert [f.id for f in facts] == taught[0]


def test_every_regime_is_run_in_every_order_and_files_and_rows_say_which(tmp_path):
    run = prepared(tmp_path)
    retention(run, {"sequential": sequential, "joint": joint}, orders=3)
    rows = run.rows()
    assert rows.order[rows.condition.isin(["unedited", "in_context"])].isna().all()
    found = matrices(rows)
    assert set(found) == {("notebook", "Note", regime, o) for regime in ("sequential", "joint") for o in range(3)}
    for (*_, order), matrix in found.items():
        assert list(matrix.columns) == [f.id for f in in_order(suite(), order)]
    assert len({tuple(matrix.columns) for matrix in found.values()}) > 1
    names = {f"Note-{regime}-layer0-order{o}" for regime in ("sequential", "joint") for o in range(3)}
    assert {p.stem for p in tmp_path.glob("deltas/*")} == names
    sequences = pd.read_csv(tmp_path / "sequences.csv")
    assert list(zip(sequences.regime, sequences.order, strict=True)) == [
        (regime, o) for o in range(3) for regime in ("sequential", "joint")
    ]
    assert set(sequences.edits) == {3}
    assert set(sequences.final) == {1.0}
    assert sequences.collapse.isna().all()
    assert (tmp_path / "figures" / "retention_matrix.png").stat().st_size > 1000


def test_one_order_is_as_given_and_goes_without_a_name(tmp_path):
    run, rows, _ = taught(tmp_path)
    assert "order" not in rows
    assert list(pd.read_csv(tmp_path / "sequences.csv").order) == [0]
    ((_, matrix),) = matrices(rows).items()
    assert list(matrix.columns) == [f.id for f in run.facts]


@pytest.mark.parametrize("orders", [0, -2])
def test_there_is_at_least_one_order(tmp_path, orders):
    with pytest.raises(UserError, match=f"orders={orders}"):
        retention(prepared(tmp_path), {"sequential": sequential}, orders=orders)


def test_a_placebo_is_asked_what_the_last_edit_was_and_has_its_norm(tmp_path):
    _, rows, edited = taught(tmp_path, sequential, joint, every=2)
    asked = ["fact_id", "kind", "query", "system", "expected", "taught", "step", "fresh"]
    for regime in ("sequential", "joint"):
        last = edited[(edited.regime == regime) & (edited.step == 3)]
        placebo = rows[(rows.condition == "placebo") & (rows.regime == regime)]
        pd.testing.assert_frame_equal(*(part[asked].reset_index(drop=True) for part in (last, placebo)))
        assert placebo.relative_norm.unique() == pytest.approx(last.relative_norm.unique())
        assert list(placebo.reply) != list(last.reply)
        assert placebo.checkpoint.all()
    assert (pd.read_parquet(tmp_path / "rows.parquet").condition == "placebo").sum() == len(placebo) * 2
    lines = pd.read_csv(tmp_path / "retention.csv")
    assert list(lines["of"][lines.regime == "placebo"]) == ["sequential", "joint"]


def test_there_is_no_placebo_where_none_is_wanted_and_none_of_single_edits(tmp_path):
    run = prepared(tmp_path)
    retention(run, {"sequential": sequential}, placebo=False)
    retention(run, {"single": single})
    assert set(run.rows().condition) == {"unedited", "in_context", "edited"}


def neighbours(facts):
    """Each fact with two neighbours more: the model is right about the first and not about the second."""
    near = [
        [
            Probe("locality", f"Where is Near{f.id}?", "", ("North",), always=True, own=True),
            Probe("locality", f"Where is Wrong{f.id}?", "", ("South",), always=True, own=True),
        ]
        for f in facts
    ]
    return [replace(f, probes=(*f.probes, *more)) for f, more in zip(facts, near, strict=True)]


def test_own_probes_are_held_against_what_the_unedited_model_replies(tmp_path):
    says = {"Where is Near1?": ("North.", "North.", "In the North.")}
    run = prepared(tmp_path, says=says)
    run.facts[:] = neighbours(run.facts)
    retention(run, {"sequential": sequential})
    rows = run.rows()
    near = rows[rows.kind == "locality"]
    assert set(near.expected) == {"North."}
    before, after = (near[near.condition == condition] for condition in ("unedited", "edited"))
    assert len(before) == 6
    assert before.generated.all()
    assert list(before.gold) == [True, False] * 3
    assert set(zip(after.step, after["query"], strict=True)) == {
        (n, f"Where is {name}{k}?") for n in (1, 2, 3) for k in "012" for name in ("Near", "Wrong")
    }  # also what it gets wrong: it should stay so
    assert set(after["query"][~after.generated]) == {"Where is Near1?"}
    assert after.gold[after["query"] == "Where is Near1?"].all()
    assert set(after.step[~after.generated]) == {2, 3}
    lines = summary(rows).set_index("regime")
    assert lines.locality["sequential"] == pytest.approx(5 / 6)
    assert lines.locality_gold["sequential"] == pytest.approx(1 / 2)
    assert lines.locality["unedited"] == 1


FORGETFUL = {f"Where is Town{n}?": ("North.", "North.", "Nowhere." if n else "North.", "Nowhere.") for n in range(3)}


def warnings(console):
    return [line for line in console.export_text().splitlines() if "collapse after" in line]


def test_collapse_is_announced_once_at_the_edit_where_it_is_first_seen(tmp_path):
    console = Console(record=True, width=200)
    _, _, edited = taught(tmp_path, sequential, joint, says=FORGETFUL, console=console)
    assert edited.groupby("regime").step.max().to_dict() == {"sequential": 3, "joint": 3}  # nothing is stopped unasked
    assert warnings(console) == [
        f"{regime}: collapse after 2 edits: prior knowledge at 0.33" for regime in ("sequential", "joint")
    ]
    assert list(pd.read_csv(tmp_path / "sequences.csv").collapse) == [2, 2]


def test_collapse_is_seen_at_checkpoints_alone(tmp_path):
    console = Console(record=True, width=200)
    taught(tmp_path, says=FORGETFUL, console=console, every=3)
    assert warnings(console) == ["sequential: collapse after 3 edits: prior knowledge at 0.00"]


def test_with_half_of_prior_knowledge_left_nothing_has_collapsed(tmp_path):
    says = FORGETFUL | {"Where is Town1?": ("North.",), "Where is Town2?": ("South.",)}
    console = Console(record=True, width=200)
    _, _, edited = taught(tmp_path, says=says, console=console)
    assert edited[edited.kind == "prior"].groupby("step").generated.mean().to_dict() == {1: 1, 2: 1, 3: 0.5}
    assert warnings(console) == []


@dataclass(frozen=True)
class Late(Note):
    """What it teaches together does no harm: it writes at most one fact down."""

    def joint(self, lm, facts):
        for fact in facts:
            yield self.edit(lm, [fact])


def test_to_stop_on_collapse_ends_that_regime_alone(tmp_path):
    console = Console(record=True, width=200)
    run = prepared(tmp_path, editor=Late(), says=FORGETFUL, console=console)
    retention(run, {"sequential": sequential, "joint": joint}, stop_on_collapse=True)
    rows = run.rows()
    edited = rows[rows.condition == "edited"]
    assert edited.groupby("regime").step.max().to_dict() == {"sequential": 2, "joint": 3}
    assert warnings(console) == ["sequential: collapse after 2 edits: prior knowledge at 0.33"]
    assert rows[rows.condition == "placebo"].groupby("regime").step.unique().map(list).to_dict() == {
        "sequential": [2],
        "joint": [3],
    }
    change = WeightDelta.load(tmp_path / "deltas" / "Late-sequential-layer0.safetensors").changes["weight"]
    assert change.dense().tolist() == [[1, 1, 0, 0]]
    sequences = pd.read_csv(tmp_path / "sequences.csv").set_index("regime")
    assert sequences.edits.to_dict() == {"sequential": 2, "joint": 3}


def test_a_placebo_of_a_regime_that_stopped_is_asked_what_its_last_edit_was(tmp_path):
    run = prepared(tmp_path, says=FORGETFUL)
    retention(run, {"sequential": sequential}, stop_on_collapse=True)
    rows = run.rows()
    last, placebo = (rows[(rows.condition == c) & (rows.step == 2)] for c in ("edited", "placebo"))
    assert sorted(last["query"]) == sorted(placebo["query"])


def test_single_edits_do_not_collapse_and_are_not_stopped(tmp_path):
    says = {f"Where is Town{n}?": ("North.", "Nowhere.") for n in range(3)}
    run = prepared(tmp_path, says=says)
    retention(run, {"single": single}, stop_on_collapse=True)
    rows = run.rows()
    assert set(rows.step[rows.condition == "edited"]) == {1, 2, 3}


def test_one_editor_may_stand_beside_itself_with_another_setting(tmp_path, monkeypatch):
    rows = side_by_side(tmp_path, monkeypatch, entrants=(("notebook", Note(layer=1), sequential),))
    assert set(rows.layer.dropna()) == {0, 1}
