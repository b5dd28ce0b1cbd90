"""What became of each question."""

import shutil
import subprocess

import pytest
from test_report import Page, run_rows, stored

from qfbench.analysis.flips import differing, flips
from qfbench.analysis.rows import regular
from qfbench.pages.report import page

ROWS = regular(run_rows(n=4, regimes=("sequential", "single"), lost=1))


def verdicts(lines, **about):
    for name, value in about.items():
        lines = lines[lines[name] == value]
    return dict(zip(lines.fact_id, lines.verdict, strict=True))


def test_each_question_is_kept_lost_gained_or_never_right():
    got = flips(ROWS)
    assert verdicts(got, regime="sequential", kind="edit") == {
        "fact-0": "never", "fact-1": "gained", "fact-2": "gained", "fact-3": "gained"
    }  # fmt: skip
    assert verdicts(got, regime="single", kind="edit") == dict.fromkeys((f"fact-{k}" for k in range(4)), "gained")
    assert verdicts(got, regime="sequential", kind="prior") == {
        "fact-prior0": "kept", "fact-prior1": "lost", "fact-prior2": "lost", "fact-prior3": "lost"
    }  # fmt: skip
    assert set(got.groupby("regime").size()) == {4 + 4 + 4}


def test_the_replies_beside_a_question_are_the_ones_that_were_given():
    line = flips(ROWS).set_index(["regime", "kind", "fact_id"]).loc["sequential", "edit", "fact-1"]
    assert (line.before, line.told, line.after) == ("No.", "It is 1.", "said in order 0 after 4 of 1")
    assert (line.before_passed, line.told_passed, line.passed) == (False, True, True)
    alone = flips(ROWS).set_index(["regime", "kind", "fact_id"]).loc["single", "edit", "fact-1"]
    assert alone.after == "said in order 0 after 2 of 1"


def test_two_runs_differ_in_what_one_of_them_passes():
    better = regular(run_rows(n=4, regimes=("sequential",), lost=0))
    lines = differing(flips(better), flips(ROWS))
    assert [(line.fact_id, line.passed, line.other_passed) for line in lines.itertuples()] == [("fact-0", True, False)]
    assert lines.other.tolist() == ["said in order 0 after 4 of 0"]
    assert differing(flips(ROWS), flips(ROWS)).empty


def test_the_page_lists_them_and_filters_by_styles_alone(tmp_path):
    shown = Page(page(stored(tmp_path / "run", run_rows(n=4, regimes=("sequential", "joint")))))
    lines = shown.lines("questions")
    assert len(lines) == 24
    assert {line["verdict"] for line in lines} == {"kept", "lost", "gained", "never"}
    assert "lost (3)" in shown.words["questions"]


CHROME = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROME is None, reason="there is no Chromium")
@pytest.mark.parametrize(("checked", "n"), [("", 24), ("lost", 3), ("gained", 7)])
def test_a_browser_shows_the_chosen_ones(tmp_path, checked, n):
    text = page(stored(tmp_path / "run", run_rows(n=4, regimes=("sequential", "joint"))))
    text = text.replace("<details>", "<details open>")
    if checked:  # as a click would
        before, after = text.split(f"> {checked} (")
        text = f"{before} checked> {checked} ({after}"
    count = "[...document.querySelectorAll('#questions tbody tr')].filter(r => r.offsetParent !== null).length"
    script = f"<script>document.title = 'shown ' + {count}</script></body>"
    text = text.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';").replace(
        "</body>", script
    )
    (tmp_path / "page.html").write_text(text)
    command = [CHROME, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{tmp_path}/page.html"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert f"<title>shown {n}</title>" in said
