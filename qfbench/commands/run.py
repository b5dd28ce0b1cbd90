"""The command `qfbench`: compose a configuration by Hydra, then run it. Nothing heavy is imported before a run begins."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qfbench.commands import show_all
from qfbench.commands.plugins import find_installed, installed, make_importable, parted
from qfbench.commands.settings import CONF, build, check_model
from qfbench.errors import UserError

HELP = """\
qfbench: write facts into a language model's weights by an editor; measure what the model learnt, forgot, and what broke.

Commands
  qfbench                                          the quickstart, on a built-in model
  qfbench experiment=layer_ablation                a study (list below)
  qfbench experiment=retention editor=finetune     a run of your own
  qfbench -m editor.layer=2,3,4 facts.seed=0,1     a sweep of your own
  qfbench experiment=study hydra/launcher=slurm_cpu  any sweep on Slurm (hydra/launcher=slurm_gpu: with a GPU; docs/slurm.md)
  qfbench --config-dir mine editor=mine            an editor, a suite ... of your own, in the folder mine (docs/plugins.md)
  qfbench-facts table facts.path=mine.jsonl        look at facts, without a model
  qfbench-results outputs/retention                tables of stored runs
  qfbench-report outputs/retention                 the same as a page
  qfbench-edits FOLDER teach|list|undo|merge ...   edits to keep, take back and hand on (docs/edits.md)

Flags: -m (sweep), --cfg job (every setting), --info, --hydra-help (Hydra's own)
"""


class JobFailed(CompactHydraException):
    """A job of a sweep measured nothing, or not all: the others go on, and the sweep ends with exit 1."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    """One run; for a search its value, also of a run that was finished before."""
    job = HydraConfig.get()
    folder, swept = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    try:
        for source in job.runtime.config_sources:
            if source.provider == "command-line":  # of --config-dir; a job may run in a process of its own
                make_importable(Path(source.path), Path(job.runtime.cwd))
        check_model(cfg.model.path, job.runtime.choices["model"])
        quiet()
        from qfbench.commands.execution import execute
        from qfbench.pages.results import retention

        execute(cfg, folder, brief=swept)
        return None if cfg.objective is None else float(build(cfg, "objective")(retention(folder)))
    except KeyboardInterrupt as stop:
        print(f"qfbench: stopped; the same command goes on from what is in {os.path.relpath(folder)}", file=sys.stderr)
        sys.exit(_code(stop))
    except FloatingPointError as error:
        if swept and cfg.objective is not None:
            print(f"qfbench: {error}; this trial counts 0", file=sys.stderr)
            return 0.0
        failure = str(error)
    except (UserError, OSError, OmegaConfBaseException) as error:
        failure = " ".join(str(error).split())
    except Exception as error:
        traceback.print_exc()
        failure = f"{type(error).__name__}, which is a fault of qfbench or of a library: please report it, with what stands above"
    if swept:
        which = " ".join(job.overrides.task)
        print(f"qfbench: {which}: {failure}", file=sys.stderr)  # at once: a sweep may be long
        raise JobFailed(f"qfbench: a job failed, and others may have (above): {which}: {failure}")
    print(f"qfbench: {failure}", file=sys.stderr)
    sys.exit(2)


def quiet() -> None:
    """Keep other libraries' warnings and bars from the screen; `python -W` or PYTHONWARNINGS bring the warnings back."""
    for name, value in (
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="qfbench")
    logging.getLogger("submitit").setLevel(logging.ERROR)  # a Slurm without accounting is complained about at each poll
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def help_text(further: Sequence[Path] = ()) -> str:
    """What qfbench is, its commands, experiments and groups; read from the configuration's own files, and `further` ones."""
    lines = [HELP, "Experiments (experiment=NAME; --cfg job shows what one sets)"]
    width = shutil.get_terminal_size((100, 24)).columns
    for path in _options("experiment", further):
        comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").split("\n") if line.startswith("#")]
        about = next((comment for comment in comments if not comment.startswith("@package")), "")
        lines += _item(path.stem, about, width)
    lines += ["", "Groups (GROUP=OPTION; of lists [ONE,OTHER])"]
    for group, about in GROUPS.items():
        options = ", ".join(path.stem for path in _options(group, further))
        lines += _item(group, f"{about}: {options}", width)
    return "\n".join(lines)


def _options(group: str, further: Sequence[Path]) -> list[Path]:
    """The files of a group, by name."""
    return sorted(
        (path for conf in (CONF, *further) for path in (conf / group).glob("*.yaml")), key=lambda path: path.stem
    )


GROUPS = {
    "model": "what is edited",
    "editor": "what edits it",
    "facts": "what is taught and asked",
    "regime": "how facts follow one another (a list)",
    "regression": "general ability, asked before and after (a list)",
    "task": "what a run does (a list; an experiment chooses it)",
    "tracker": "where a run is mirrored",
    "data": "what a conversion trains on",
}


def _item(name: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(f"  {name:24} {text}", max(width, 60), subsequent_indent=" " * 27)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which Slurm sends before a job's time is up."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _code(stop: KeyboardInterrupt) -> int:
    """The exit status of a process that a signal ended, as shells count it."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


def with_own_settings(arguments: list[str]) -> list[str]:
    """A command line on which a path alone says which model: then none of the settings of another model is meant, but a
    conversion is asked as its base is, whose settings suit it."""
    paths = [one.partition("=")[2].strip("'\"") for one in arguments if one.startswith("model.path=")]
    if not paths or any(one.startswith("model=") for one in arguments):
        return arguments
    try:
        made = json.loads((Path(paths[-1]).expanduser() / "recipe.json").read_text(encoding="utf-8"))
        base, layer = str(made["base"]), int(made["layers"][0])
    except (OSError, ValueError, KeyError, TypeError):  # no conversion
        return ["model=own", *arguments]
    if not (CONF / "model" / f"{base}.yaml").is_file():
        return ["model=own", *arguments]
    given = any(one.startswith("model.layer=") for one in arguments)
    return [f"model={base}", *([] if given else [f"model.layer={layer}"]), *arguments]


def main() -> None:
    """Entry point of the command."""
    show_all()
    try:
        folder, arguments = parted(sys.argv[1:])
    except UserError as error:
        print(f"qfbench: {error}", file=sys.stderr)
        sys.exit(2)
    if {"-h", "--help"} & set(arguments):
        print(help_text([*installed(), *([folder] if folder else [])]))
        return
    sys.argv[1:] = ([f"--config-dir={folder}"] if folder else []) + with_own_settings(arguments)
    find_installed()
    signal.signal(signal.SIGTERM, _terminate)
    traced = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are
    try:
        _hydra_main()
    except KeyboardInterrupt as stop:
        sys.exit(_code(stop))
    except JobFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if traced:
            raise
        # Of Hydra: the settings cannot be composed, or the folder not made.
        text = " ".join(str(error).split("Config search path:")[0].split())
        print(f"qfbench: {text}" + "; give another hydra.run.dir" * isinstance(error, OSError), file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
