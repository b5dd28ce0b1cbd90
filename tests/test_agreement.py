"""In two bytes a number the batch decides some replies: how often a model agrees with itself is measured and said."""

import json
from dataclasses import replace

import pytest
import torch
from notebook import Note, taught
from rich.console import Console

from qfbench import Fact, LanguageModel, Probe
from qfbench.analysis.measures import summary
from qfbench.models.lm import Reply
from qfbench.pages.cautions import cautions
from qfbench.pages.results import rows_of
from qfbench.runs.provenance import protocol
from qfbench.runs.store import ParquetStore
from qfbench.tasks.baseline import baseline
from qfbench.tasks.run import Run

QUERIES = [f"Who started {'the ' * (n % 7)}firm number {n}?" for n in range(24)]


def run(lm, folder, queries=QUERIES, **more):
    probes = tuple(Probe("locality", query, "", always=True, own=True) for query in queries)
    facts = [Fact("Qi started X.", "Who started X?", "Qi.", id="x", probes=probes)]
    folder.mkdir(exist_ok=True)
    console = Console(record=True, width=200)
    return Run(lm, Note(), facts, folder, ParquetStore(folder), console, "retention", protocol=protocol(lm), **more)


def kept(folder):
    path = folder / "provenance.json"
    return json.loads(path.read_text()).get("self_agreement") if path.exists() else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_is_asked_again_in_other_batches_where_they_may_decide(tiny, tmp_path, dtype):
    lm = replace(tiny("llama", dtype), batch_size=16)
    there = run(lm, tmp_path / "run")
    baseline(there, all_of_them=True)
    if dtype == torch.float32:
        assert kept(there.folder) is None
        return
    prompts = [lm.render(query) for query in QUERIES]
    halves = [reply.text for reply in replace(lm, batch_size=8).replies(prompts)]
    whole = [reply.text for reply in lm.replies(prompts)]
    assert kept(there.folder)["tiny-llama"] == pytest.approx(sum(map(str.__eq__, halves, whole)) / 24, abs=0.1)


class Moody(LanguageModel):
    """Says of the firm 3 what its batch is like, and stops."""

    def answer_each(self, asked, at_once=None):
        rated = super().answer_each([((), rated) for _, rated in asked])
        return [(self.replies(prompts), scores) for (prompts, _), (_, scores) in zip(asked, rated, strict=True)]

    def replies(self, prompts):
        texts = self.tokenizer.batch_decode([list(r.ids) for r in prompts])
        return [Reply(f"Firm of {self.batch_size}." if "number 3?" in text else "No.", True) for text in texts]


def test_replies_that_hang_on_the_batch_measure_no_edit_and_are_said(tiny, tmp_path):
    lm = tiny("llama", torch.bfloat16)
    moody = Moody(lm.model, lm.tokenizer, "moody", batch_size=4, max_new_tokens=4)
    there = run(moody, tmp_path / "run", QUERIES[:5], cache=tmp_path / "cache")
    _, always = baseline(there, all_of_them=True)
    assert [probe.query for _, probe in always] == [QUERIES[n] for n in (0, 1, 2, 4)]
    assert kept(there.folder) == {"moody": 0.8}
    said = there.console.export_text()
    assert "moody in bfloat16, asked again in batches of 2: 80.0% of its replies are the same" in said
    assert "left out, since it fails them then: 1" in said
    again = run(moody, tmp_path / "again", QUERIES[:5], cache=tmp_path / "cache")
    assert baseline(again, all_of_them=True)[1] == always
    alone = run(replace(moody, batch_size=1), tmp_path / "alone", QUERIES[:5])
    assert len(baseline(alone, all_of_them=True)[1]) == 5  # nothing stands beside them
    assert kept(alone.folder) is None


def test_a_report_says_how_often_a_model_agrees_with_itself(tmp_path):
    there, _, _ = taught(tmp_path)
    there.store.commit(finished=True)
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "provenance.json").write_text("{}")
    rows = rows_of(tmp_path)
    known = [{"seed": 0}, {"seed": 1, "self_agreement": {"m": 0.94, "n": 1.0}}, {"self_agreement": {"m": 0.98}}]
    shown = [text for text in cautions(rows, summary(rows), known) if "gives" in text and "again" in text]
    assert len(shown) == 1
    assert shown[0].startswith("m itself, unedited, gives 94.0% of its replies again")
