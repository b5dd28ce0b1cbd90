"""The command `qfbench`: compose a configuration by Hydra, then run it. Nothing heavy is imported before a run begins."""

from __future__ import annotations

import io
import os
import shutil
import signal
import sys
import textwrap
import traceback
import warnings
from pathlib import Path
from types import FrameType

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from qfbench.errors import UserError
from qfbench.settings import CONF, build

HELP = """\
qfbench: write facts into a language model's weights by an editor; measure what the model learnt, forgot, and what broke.

Commands
  qfbench                                          the quickstart, on a built-in model
  qfbench experiment=layer_ablation                a study (list below)
  qfbench experiment=retention editor=finetune     a run of your own
  qfbench -m editor.layer=2,3,4 facts.seed=0,1     a sweep of your own
  qfbench-facts table facts.path=mine.jsonl        look at facts, without a model
  qfbench-results outputs/retention                tables of stored runs
  qfbench-report outputs/retention                 the same as a page

Flags: -m (sweep), --cfg job (every setting), --info, --hydra-help (Hydra's own)
"""


class JobFailed(CompactHydraException):
    """A job of a sweep measured nothing, or not all: the others go on, and the sweep ends with exit 1."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    """One run; for a search its value, also of a run that was finished before."""
    job = HydraConfig.get()
    folder, swept = Path(job.runtime.output_dir), job.mode == RunMode.MULTIRUN
    quiet()
    try:
        from qfbench.results import retention
        from qfbench.run import execute

        execute(cfg, folder, brief=swept)
        return None if cfg.objective is None else float(build(cfg, "objective")(retention(folder)))
    except (KeyboardInterrupt, SystemExit) as stop:
        code = 130 if isinstance(stop, KeyboardInterrupt) else stop.code
        print(f"qfbench: stopped; the same command goes on from what is in {os.path.relpath(folder)}", file=sys.stderr)
        sys.exit(code)
    except FloatingPointError as error:
        if swept and cfg.objective is not None:
            print(f"qfbench: {error}; this trial counts 0", file=sys.stderr)
            return 0.0
        failure = str(error)
    except (UserError, OSError, OmegaConfBaseException) as error:
        failure = str(error)
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
    from transformers.utils import logging

    logging.disable_progress_bar()


def help_text() -> str:
    """What qfbench is, its commands, experiments and groups; read from the configuration's own files."""
    lines = [HELP, "Experiments (experiment=NAME; --cfg job shows what one sets)"]
    width = shutil.get_terminal_size((100, 24)).columns
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        about = path.read_text(encoding="utf-8").split("\n")[1]  # behind "# @package"
        lines += _item(path.stem, about.removeprefix("#").strip(), width)
    lines += ["", "Groups (GROUP=OPTION; of lists [ONE,OTHER])"]
    for group, about in GROUPS.items():
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        lines += _item(group, f"{about}: {options}", width)
    return "\n".join(lines)


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


def _terminate(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> None:
    """Entry point of the command."""
    for stream in (sys.stdout, sys.stderr):  # a terminal may know no more than ASCII
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text())
        return
    signal.signal(signal.SIGTERM, _terminate)  # Slurm sends it before a job's time is up
    traced = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here as they are
    try:
        _hydra_main()
    except KeyboardInterrupt:
        sys.exit(130)
    except JobFailed as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if traced:
            raise
        print(f"qfbench: {str(error).strip()}", file=sys.stderr)  # of Hydra: the settings cannot be composed, the folder not made
        sys.exit(2)


if __name__ == "__main__":
    main()
