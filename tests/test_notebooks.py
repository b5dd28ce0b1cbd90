"""The notebooks run top to bottom from the stored runs; they define nothing, and nothing they show is stored in them."""

import ast
import os
import re
from pathlib import Path

import pytest

from qfbench.pages import results

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STORED = sorted((ROOT / "experiments").glob("*/runs"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All notebooks, by path; executed in one kernel, whose first seconds go into imports. It forgets all names between them."""
    books = {path: nbformat.read(path, as_version=4) for path in PATHS}
    kernel = os.environ | {"IPYTHONDIR": str(tmp_path_factory.mktemp("ipython")), "JUPYTER_COLUMNS": "115"}
    one = nbformat.v4.new_notebook()
    for book in books.values():
        one.cells += [*book.cells, nbformat.v4.new_code_cell("%reset -f")]
    nbclient.NotebookClient(
        one, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT / "notebooks")}}
    ).execute(env=kernel)
    return books


def code(notebook):
    """The cells of Python, without the magics of IPython."""
    return [re.sub(r"(?m)^%.*$", "", cell.source) for cell in notebook.cells if cell.cell_type == "code"]


def shown(cell):
    """What a cell showed, by type: `image/png`, `text/html`, `text/markdown`, `text/plain`."""
    return {kind: text for output in cell.get("outputs", []) for kind, text in output.get("data", {}).items()}


def test_there_are_four():
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04"]


def test_runs_top_to_bottom(path, executed):
    """Errors would have raised. Every cell but the first (imports) shows something: tables, figures, words."""
    cells = [cell for cell in executed[path].cells if cell.cell_type == "code"]
    kinds = [set(shown(cell)) for cell in cells]
    assert kinds[0] == set()
    assert all(kinds[1:])
    assert any("image/png" in kind for kind in kinds)
    assert any("text/html" in kind for kind in kinds)
    assert "text/markdown" in kinds[-1]
    assert not [out.text for cell in cells[1:] for out in cell.outputs if out.output_type == "stream"]


def test_what_it_says_has_no_hole(path, executed):
    (words,) = [shown(cell)["text/markdown"] for cell in executed[path].cells if "text/markdown" in shown(cell)]
    assert re.search(r"\d", words)
    assert not re.search(r"\bnan\b|None", words)


def test_it_says_how_the_runs_were_made(path, executed, monkeypatch):
    (folder,) = re.findall(r'FOLDER = "(.+)"', "\n".join(code(executed[path])))
    monkeypatch.chdir(path.parent)
    tables = "".join(shown(cell).get("text/plain", "") for cell in executed[path].cells)
    for command in results.origin(folder).command:
        for word in command.split():
            assert word in tables


def test_defines_nothing(notebook):
    for source in code(notebook):
        names = {type(node).__name__ for node in ast.walk(ast.parse(source))}
        assert not names & {"FunctionDef", "AsyncFunctionDef", "ClassDef", "Lambda"}


def test_stores_no_outputs(notebook):
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_the_files_it_mentions_exist(path, notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    named = re.findall(r'FOLDER = "(.+)"', text) + re.findall(r"\]\(([^)#:]+)\)", text)
    assert named
    for one in named:
        assert (path.parent / one).exists(), one
    for experiment in re.findall(r"experiment=(\w+)", text):
        assert (ROOT / "conf" / "experiment" / f"{experiment}.yaml").exists(), experiment


def test_the_readme_links_to_each():
    readme = (ROOT / "README.md").read_text()
    assert [path.name for path in PATHS if f"(notebooks/{path.name})" not in readme] == []


def test_stored_runs_are_small_and_name_no_machine():
    files = [path for folder in STORED for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} <= {"checksums.json", "config.yaml", "provenance.json", "rows.parquet"}
    assert sum(path.stat().st_size for path in files) < 8_000_000
    for path in files:
        if path.suffix != ".parquet":
            assert not re.search(r"(?m)(^|[\s\"'=:])[/~]/?\w+/", path.read_text()), path
