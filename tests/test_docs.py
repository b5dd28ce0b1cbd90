"""The README and the pages of docs/: what they link to exists, what they show runs, and they can be read in any window."""

import re
import shlex
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from qfbench import UserError
from qfbench.commands import edits, report, results
from qfbench.commands.run import with_own_settings
from qfbench.commands.settings import CONF, check

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = {"qfbench": "run"} | {f"qfbench-{name}": name for name in ("facts", "results", "report", "edits")}
PLUGINS = {  # what needs an extra
    "experiment=tune": "hydra_plugins.hydra_optuna_sweeper",
    "hydra/launcher=joblib": "hydra_plugins.hydra_joblib_launcher",
    "hydra/launcher=slurm_cpu": "hydra_plugins.hydra_submitit_launcher",
    "hydra/launcher=slurm_gpu": "hydra_plugins.hydra_submitit_launcher",
}


def blocks(text, language):
    return [code for named, code in BLOCK.findall(text) if named == language]


def commands(text):
    """Each command of qfbench that a page shows, as its words, and the comment beside it."""
    for line in "".join(blocks(text, "")).replace("\\\n", " ").split("\n"):
        code, _, comment = line.partition(" #")
        for part in code.split("&&"):
            words = shlex.split(part)
            if words and Path(words[0]).name in MODULES:
                yield (Path(words[0]).name, *words[1:]), comment


def jobs(words):
    """The overrides of each job that a command of `qfbench` runs. A placeholder is given a stand-in."""
    stand_ins = [
        re.sub(r"=(FOLDER|FILE\.gguf)$", "=world-xs", re.sub(r"=\.\.\.$", "=mine.jsonl", word)) for word in words
    ]
    given = with_own_settings([word for word in stand_ins if word != "..."])
    flags = {"-m", "--help", "--cfg", "job"}
    overrides = OverridesParser.create().parse_overrides([word for word in given if word not in flags])
    swept = [o for o in overrides if o.is_sweep_override()]
    fixed = [o.input_line for o in overrides if not o.is_sweep_override()]
    assert not swept or "-m" in words
    values = [[f"{o.key_or_group}={value}" for value in o.sweep_string_iterator()] for o in swept]
    # Each option once, not each combination; of numbers the first will do.
    values = [own if (CONF / o.key_or_group).is_dir() else own[:1] for o, own in zip(swept, values, strict=True)]
    for job in zip_longest(*values) if values else [()]:
        yield fixed + [value or own[-1] for value, own in zip(job, values, strict=True)]


def links(text):
    return re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text))


def broken(page, text):
    """The links of a page that lead nowhere."""
    there = [link for link in links(text) if not link.startswith("https://")]
    return [link for link in there if not (ROOT / page).parent.joinpath(link).exists()]


def too_long(text):
    """Lines of prose that a narrow window breaks; a table's and an image's cannot be broken."""
    return [line for line in BLOCK.sub("", text).split("\n") if len(line) >= 100 and not line.startswith(("|", "!["))]


COMMANDS = {
    words: comment
    for page, text in PAGES.items()
    if page != "docs/plugins.md"  # whose commands need its files: tests/test_plugins.py
    for words, comment in commands(text)
}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_can_be_read_and_its_links_lead_somewhere(page):
    assert PAGES[page].startswith("# ")
    assert broken(page, PAGES[page]) == []
    assert too_long(PAGES[page]) == []


def test_the_readme_is_short():
    assert PAGES["README.md"].count("\n") <= 150


def test_the_readme_and_the_index_lead_to_each_page():
    pages = {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"}
    assert {Path(link).name for link in links(PAGES["docs/README.md"])} - {"README.md"} == pages
    assert pages <= {Path(link).name for link in links(PAGES["README.md"])}


def test_the_checks_of_pages_can_fail():
    assert broken("README.md", "[a](docs/none.md) [b](docs/README.md)") == ["docs/none.md"]
    assert too_long("a" * 100 + "\n| " + "a" * 100) == ["a" * 100]
    assert list(commands("```\nqfbench -m a=1,2 # so\npip install x && qfbench-report F\n```\n")) == [
        (("qfbench", "-m", "a=1,2"), " so"),
        (("qfbench-report", "F"), ""),
    ]
    assert list(jobs(["-m", "editor=qf,qf2", "editor.layer=1,2", "...", "model.path=FOLDER"])) == [
        ["model=own", "model.path=world-xs", f"editor={name}", "editor.layer=1"] for name in ("qf", "qf2")
    ]


@pytest.fixture(scope="module")
def settings():
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield lambda overrides: compose("config", overrides=overrides, return_hydra_config=True)


def test_the_experiments_exist():  # tests/test_contract.py composes each
    named = {word.partition("=")[2] for words in COMMANDS for word in words if word.startswith("experiment=")}
    assert named <= {path.stem for path in CONF.glob("experiment/*.yaml")}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[0] == "qfbench" and words[2:]], ids=" ".join)
def test_a_command_has_settings_that_exist(words, settings):
    for word in words:
        if word in PLUGINS:
            pytest.importorskip(PLUGINS[word])
    for overrides in jobs(words[1:]):
        check(settings(overrides))


@pytest.mark.parametrize(("overrides", "error"), [(["editor.none=1"], HydraException), (["edits=a"], UserError)])
def test_the_check_of_settings_can_fail(overrides, error, settings):
    with pytest.raises(error):
        check(settings(overrides))


def test_suites_that_are_looked_at_exist(settings):
    shown = [words[1:] for words in COMMANDS if words[0] == "qfbench-facts"]
    assert shown
    for suite, *overrides in shown:
        assert settings([f"facts={suite}", *overrides]).facts


class ReadTheArguments(Exception):
    """Nothing was wrong with them."""


def read(module, words, monkeypatch):
    """Let a command read its arguments, and no more."""

    def stop(*_):
        raise ReadTheArguments

    for name in ("page", "retention", "compare", "folders", "ship", "leaderboard"):
        monkeypatch.setattr(module, name, stop, raising=False)
    monkeypatch.setattr(sys, "argv", list(words))
    module.main()


def test_arguments_of_the_commands_that_read_runs_are_known(monkeypatch):
    shown = [words for words in COMMANDS if words[0] in ("qfbench-results", "qfbench-report")]
    assert {words[0] for words in shown} == {"qfbench-results", "qfbench-report"}
    for words in shown:
        with pytest.raises(ReadTheArguments):
            read(results if words[0] == "qfbench-results" else report, words, monkeypatch)
    with pytest.raises(SystemExit):
        read(results, ["qfbench-results", "RUN", "--none"], monkeypatch)


def test_arguments_of_the_command_about_edits_are_known(settings):
    shown = [words[1:] for words in COMMANDS if words[0] == "qfbench-edits"]
    assert {words[1] for words in shown} >= set("teach list apply undo merge diff ask to-peft page".split())
    for words in shown:
        args = edits.parser().parse_args(words)
        for overrides in jobs(args.settings) if "settings" in args else ():
            check(settings(overrides))
    with pytest.raises(SystemExit):
        edits.parser().parse_args(["FOLDER", "list", "--none"])


@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(PAGES[page], "python")])
def test_the_code_of_a_page_works(page):  # that of the README: tests/test_run.py
    names = {}
    for code in blocks(PAGES[page], "python"):
        exec(code, names)


SHORT = [words for words, comment in COMMANDS.items() if re.search(r"(?<![\w.])\d+ s\b", comment)]


@pytest.mark.slow
@pytest.mark.parametrize("words", SHORT, ids=" ".join)
def test_a_command_that_takes_seconds_runs(words, tmp_path):
    command = [sys.executable, "-m", f"qfbench.commands.{MODULES[words[0]]}", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "wrote outputs/" in done.stdout
