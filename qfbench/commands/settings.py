"""The configuration: where it lies, the types that its values must have, what it builds, and the name of a run made by it."""

from __future__ import annotations

import collections.abc
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qfbench.errors import UserError
from qfbench.runs.identity import identity

PACKAGE = Path(__file__).parents[1]
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # wheel, or repository

# What a run needs one of, at least.
GROUPS = ("model", "editor", "facts", "data", "regime", "regression", "task", "tracker")
LISTED = ("regime", "regression", "task")  # groups of which several may be chosen
THREADS = 256  # more make torch fail without a word


@dataclass(frozen=True)
class Top:
    """The settings of `config.yaml` itself."""

    seed: int
    edits: int
    rerun: bool
    commit_seconds: float
    cache: str | None
    threads: int


@dataclass(frozen=True)
class Model:
    """The settings of the group `model` that a run itself reads."""

    path: str
    layer: int
    device: str
    dtype: str
    batch_size: int
    max_new_tokens: int
    plain: bool
    template: str | None
    told: str
    preamble: str


def check(cfg: DictConfig) -> None:
    """Refuse what is missing, and values of a wrong type, wherever they stand: nothing is bent into shape.

    What has a `_target_` must be given what its signature says; numbers must be finite.

    Raises:
        UserError: naming the setting, its value, and what it must be.
    """
    for group in GROUPS:
        if group not in cfg:
            raise UserError(f"{group}=[]: choose at least one; qfbench --help lists them")
    values = _resolved(cfg)
    check_fields(values, Top, "")
    check_fields(values["model"], Model, "model.")
    for name, most in (("seed", 2**63 - 1), ("edits", None), ("commit_seconds", None), ("threads", THREADS)):
        least = 1 if name == "edits" else 0
        if values[name] < least or (most is not None and values[name] > most):
            raise UserError(f"{name}={values[name]}: must be {least} " + (f"to {most}" if most else "or more"))
    _check_targets(values, "")


def _resolved(cfg: DictConfig) -> Any:
    """The values of a configuration, without Hydra's own."""
    try:
        own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        missing = sorted(OmegaConf.missing_keys(own), key=len)  # the key itself before those that refer to it
        if missing:
            raise UserError(f"{missing[0]} is needed: give {missing[0]}=...")
        return OmegaConf.to_container(own, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error).removeprefix("UserError raised while resolving interpolation: ")) from error


def _check_targets(value: Any, where: str) -> None:
    if isinstance(value, dict):
        target = value.get("_target_")
        if isinstance(target, str):
            check_fields(value, _found(target, where), f"{where}.")
        for name, inner in value.items():
            _check_targets(inner, f"{where}.{name}" if where else str(name))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            _check_targets(inner, f"{where}[{i}]")


def _found(target: str, where: str) -> Any:
    try:
        return get_object(target)
    except Exception as error:  # a module of the user's own may raise anything
        raise UserError(f"{where}._target_={target}: cannot be imported ({_first_line(error)})") from error


def check_fields(values: Mapping[str, Any], target: Any, lead: str) -> None:
    """Refuse values whose type is not what the annotations of `target` say; `lead` stands before their names in the message."""
    function = getattr(target, "__init__") if isinstance(target, type) and not is_dataclass(target) else target  # noqa: B009
    try:
        hints = typing.get_type_hints(function)
    except (TypeError, NameError):  # no annotations to be had
        return
    for name, hint in hints.items():
        value = values.get(name, "???")
        if value != "???" and not conforms(value, hint):
            raise UserError(f"{lead}{name}={_shown(value)}: must be {_named(hint)}")


def conforms(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is what an annotation says. Annotations that no YAML can hold take anything."""
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if isinstance(value, dict) and "_target_" in value:
        return True  # what it builds is seen when it is built
    if origin in (typing.Union, types.UnionType):
        return any(conforms(value, one) for one in arguments)
    if origin is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if origin in SCALARS:
        return type(value) is SCALARS[origin]
    if origin in LISTS:
        return isinstance(value, list) and all(conforms(one, arguments[0]) for one in value if arguments)
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict) and all(conforms(one, arguments[1]) for one in value.values() if arguments)
    # A class that is none of these is that of an object, which a configuration can only build.
    return not isinstance(origin, type) or origin in (Any, object, collections.abc.Callable)


SCALARS = {int: int, bool: bool, str: str, Path: str, None: type(None), type(None): type(None)}
LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Collection, collections.abc.Iterable)
NAMES = {int: "a whole number", bool: "true or false", str: "a text", Path: "a text", float: "a finite number"}


def _named(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_named(one) for one in arguments)
    if origin in LISTS:
        return "a list" + (f" ({_named(arguments[0])} each)" if arguments else "")
    if origin in (None, type(None)):
        return "null"
    return NAMES.get(origin, "a mapping of settings")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _shown(value: Any) -> str:
    """As it is written in YAML."""
    return json.dumps(value) if value is None or isinstance(value, bool) else f"{value!s:.60}"


def build(cfg: DictConfig, group: str) -> Any:
    """Instantiate one group of a configuration.

    Raises:
        UserError: a value is missing, anywhere, or does not suit its target.
    """
    _check_targets(_resolved(cfg)[group], group)
    try:
        built = instantiate(cfg[group], _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{group}: {error.__cause__ or error}") from error
    if group in LISTED:  # an experiment may have settings for what the command line leaves out
        return {name: one for name, one in built.items() if "_target_" in (cfg[group][name] or ())}
    return built


def name_of(_root_: DictConfig) -> str:
    """The name of a run's folder: its model, its editor, the layer, the number of facts, and the hash of all its settings."""
    try:
        digest = hashlib.sha256(identity(_root_).encode()).hexdigest()[:8]
    except OmegaConfBaseException:  # a setting is missing: `build` will say which
        digest = "incomplete"
    choices, path = _root_.hydra.runtime.choices, str(_root_.model.get("path"))
    model = re.sub(r"[^\w.-]+", "-", Path(path).name) if choices.model == OWN else choices.model
    about = [model, choices.editor]
    for letter, place in (("L", "editor.layer"), ("n", "facts.n")):
        with suppress(OmegaConfBaseException, UserError):  # as above, or a model's folder is missing
            value = OmegaConf.select(_root_, place)
            about += [] if value is None else [f"{letter}{value}"]
    return re.sub(r"[^\w.-]+", "-", "-".join([*about, digest]))


OWN = "own"  # the option of the group `model` that any path goes with


def check_model(path: str, chosen: str) -> None:
    """Refuse the settings of a built-in model for another one.

    Raises:
        UserError: a path is given with them.
    """
    file = CONF / "model" / f"{chosen}.yaml"  # not there: a plug-in's
    built_in = chosen != OWN and file.exists() and (PACKAGE / "world" / "models" / OmegaConf.load(file).path).is_dir()
    recipe = Path(path) / "recipe.json"  # of a conversion: what suits the base suits it
    if built_in and path != chosen and not (recipe.exists() and json.loads(recipe.read_text()).get("base") == chosen):
        raise UserError(
            f"model={chosen} with model.path={path}: layer, reply length and rates are those of {chosen}; give model={OWN} "
            "(or model.path alone), and the layer by model.layer=..."
        )


def layer_of(path: str) -> int:
    """The layer of a model that an editor changes unless told otherwise: one that fires, else at the QF paper's depth (23 of 28)."""
    return usual_layer(model_config(path))


def usual_layer(config: Any) -> int:
    fires = getattr(config, "firing_layers", None)
    return int(fires[0]) if fires else round(23 / 28 * config.num_hidden_layers)


def adapter_files(_parent_: DictConfig) -> str:
    """The hash of the adapter at the `path` beside this setting; "" where none is given."""
    from qfbench.models.lora import fingerprint

    return "" if OmegaConf.is_missing(_parent_, "path") else fingerprint(Path(_parent_.path).expanduser())


def layers_of(path: str) -> str:
    """Six layers of a model, evenly from the first to the last, as a sweep takes them."""
    return ",".join(map(str, evenly(model_config(path).num_hidden_layers, 6)))


def evenly(layers: int, n: int) -> list[int]:
    """At most `n` of so many layers, from the first to the last."""
    return list(dict.fromkeys(round(i * (layers - 1) / (n - 1)) for i in range(n)))


def model_config(path: str) -> Any:
    """The configuration of a model's folder, or of the hub's.

    Raises:
        UserError: it cannot be read.
    """
    from transformers import AutoConfig

    import qfbench.models.firing  # noqa: F401 (which makes models that fire known)
    from qfbench.models.loading import find

    try:
        return AutoConfig.from_pretrained(find(path), trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"model.path={path}: its configuration cannot be read ({_first_line(error)})") from error


def spans_below(layer: int) -> str:
    """What a search tries as `editor.more_layers`: none, or up to five layers below the highest."""
    tried = dict.fromkeys(str([*range(max(0, layer - n), layer)]).replace(" ", "") for n in (0, 1, 2, 3, 5))
    return f"choice({','.join(tried)})"


OmegaConf.register_new_resolver("spans_below", spans_below, replace=True)
OmegaConf.register_new_resolver("run_name", name_of, replace=True)
OmegaConf.register_new_resolver("layer_of", layer_of, replace=True)
OmegaConf.register_new_resolver("adapter_files", adapter_files, replace=True)
OmegaConf.register_new_resolver("layers_of", layers_of, replace=True)
