"""Settings and code from outside the package: a folder named by `--config-dir`, or an installed package's (docs/plugins.md)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from qfbench.errors import UserError

FLAGS = ("--config-dir", "-cd")


def parted(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder of settings that `--config-dir FOLDER` stands for, and the other arguments. It is FOLDER/conf if there is one.

    Raises:
        UserError: there is no such folder.
    """
    folder, rest, words = None, [], iter(arguments)
    for word in words:
        flag, _, value = word.partition("=")
        if flag not in FLAGS:
            rest.append(word)
            continue
        folder = Path(value or next(words, ""))
        if not folder.name or not folder.is_dir():
            raise UserError(f"--config-dir {folder}: no such folder")
    if folder is None:
        return None, rest
    inner = folder / "conf"
    return (inner if inner.is_dir() else folder).resolve(), rest


def make_importable(conf: Path, here: Path) -> None:
    """Let modules beside a folder of settings (in it, unless it is called `conf`), and in the current folder, be found.

    They come last: a file of the user's hides no installed module.
    """
    for folder in (conf.parent if conf.name == "conf" else conf, here):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def installed() -> list[Path]:
    """The folders `conf` of installed packages that an entry point of the group `qfbench` names."""
    specs = [find_spec(point.module) for point in entry_points(group="qfbench")]
    places = [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
    return [path for place in places if (path := Path(place) / "conf").is_dir()]


class Installed(SearchPathPlugin):
    """Hydra's way to be told of further folders."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for conf in installed():
            search_path.append("qfbench-plugin", f"file://{conf}")


def find_installed() -> None:
    """Have Hydra search installed packages too."""
    Plugins.instance().register(Installed)
