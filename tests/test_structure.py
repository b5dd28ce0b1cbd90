"""The tree says what may know of what: imports run downwards, and each folder keeps to its own matter."""

import ast
from collections import defaultdict
from pathlib import Path

import qfbench

ROOT = Path(qfbench.__file__).parent
# From the bottom to the top: a folder imports from those before it.
FLOORS = (
    "errors",
    "digest",
    "models",
    "world",
    "facts",
    "editors",
    "regression",
    "analysis",
    "runs",
    "tasks",
    "pages",
    "commands",
)
UPWARDS: set[tuple[str, str]] = set()  # arrows that run upwards all the same, file by file, and why


def modules():
    """Each module of the package with the names of all modules that it imports, wherever in it."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, path, sorted(imported(ast.parse(path.read_text(encoding="utf-8"))))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own(name, known):
    """The module of the package that an import is about; None for other packages."""
    if not name.startswith("qfbench."):
        return None
    name = name.removeprefix("qfbench.")
    return name if name in known else name.rpartition(".")[0]


KNOWN = {name for name, _, _ in modules()}
ARROWS = {name: {own(i, KNOWN) for i in found} - {None, "", name} for name, _, found in modules() if name}


def floor(name):
    return FLOORS.index(name.split(".")[0])


def test_every_folder_has_its_place():
    assert {name.split(".")[0] for name in ARROWS} == set(FLOORS)


def test_imports_run_downwards():
    upwards = {(a, b) for a, found in ARROWS.items() for b in found if floor(b) > floor(a)}
    assert upwards == UPWARDS


def test_no_modules_import_each_other_in_a_circle():
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " > ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for other in sorted(ARROWS.get(name, ())):
            visit(other)
        open_.pop()
        done.add(name)

    for name in sorted(ARROWS):
        visit(name)
    assert len(done) >= len(ARROWS)


def packages():
    """What each folder imports from outside the package."""
    found = defaultdict(set)
    for name, _, imports in modules():
        found[name.split(".")[0]] |= {i.split(".")[0] for i in imports if not i.startswith("qfbench")}
    return found


def test_analysis_knows_no_model():
    assert not packages()["analysis"] & {"torch", "transformers", "lm_eval", "safetensors"}
    assert {own_.split(".")[0] for name in ARROWS if name.startswith("analysis") for own_ in ARROWS[name]} <= {
        "analysis",
        "errors",
    }


def test_only_commands_know_of_hydra_and_of_a_command_line():
    assert {folder for folder, found in packages().items() if "hydra" in found} == {"commands"}
    argv = {
        name.split(".")[0]
        for name, path, _ in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "argv"
    }
    assert argv <= {"commands"}


def test_files_have_one_job_and_folders_more_than_one_file():
    vague = {"utils", "util", "helpers", "helper", "common", "core", "misc"}
    assert not {part for name in ARROWS for part in name.split(".")} & vague
    for folder in (path for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py"))):
        assert len(list(folder.glob("*.py"))) > 2, folder


def test_the_check_of_arrows_can_fail():
    assert floor("commands.run") > floor("models.lm")
    assert own("qfbench.models.lm.LanguageModel", KNOWN) == "models.lm"
    assert own("qfbench.models.lm", KNOWN) == "models.lm"
    assert own("torch.nn", KNOWN) is None
    assert "models.lm" in ARROWS["facts.probes"]
