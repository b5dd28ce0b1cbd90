"""Settings of a wrong type, or out of range, are refused by name; nothing is bent into shape."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_contract import composed

from qfbench import UserError
from qfbench.commands.run import with_own_settings
from qfbench.commands.settings import CONF, build, check, check_model, conforms, name_of
from qfbench.editors import Editor

WRONG = {
    "seed=true": "seed=true: must be a whole number",
    "seed=1.5": "seed=1.5: must be a whole number",
    "seed=-1": "seed=-1: must be 0 to 9223372036854775807",
    "seed=9999999999999999999999": "seed=9999999999999999999999: must be 0 to",
    "edits=0": "edits=0: must be 1 or more",
    "threads=99999": "threads=99999: must be 0 to 256",
    "threads=two": "threads=two: must be a whole number",
    "cache=5": "cache=5: must be a text or null",
    "rerun=1": "rerun=1: must be true or false",
    "commit_seconds=-1": "commit_seconds=-1: must be 0 or more",
    "commit_seconds=inf": "commit_seconds=inf: must be a finite number",
    "regime=[]": "regime=[]: choose at least one",
    "regression=[]": "regression=[]: choose at least one",
    "model.dtype=null": "model.dtype=null: must be a text",
    "model.dtype=5": "model.dtype=5: must be a text",
    "model.device=null": "model.device=null: must be a text",
    "model.batch_size=2.0": "model.batch_size=2.0: must be a whole number",
    "model.plain=yes please": "model.plain=yes please: must be true or false",
    "editor.layer=true": "editor.layer=true: must be a whole number",
    "editor.layer=low": "editor.layer=low: must be a whole number",
    "editor.layer=null": "editor.layer=null: must be a whole number",
    "editor.ridge=nan": "editor.ridge=nan: must be a finite number",
    "editor.ridge=inf": "editor.ridge=inf: must be a finite number",
    "editor.ridge=false": "editor.ridge=false: must be a finite number",
    "facts.n=1.5": "facts.n=1.5: must be a whole number",
    "facts.n=true": "facts.n=true: must be a whole number",
    "facts.seed=abc": "facts.seed=abc: must be a whole number",
    "facts.relations=founder": "facts.relations=founder: must be a list (a text each)",
    "facts.relations=[1]": "facts.relations=[1]: must be a list (a text each)",
    "facts.about=null": "facts.about=null: must be a text",
    "regression.perplexity.n=1e3": "regression.perplexity.n=1000.0: must be a whole number",
    "task.retention.every=2.0": "task.retention.every=2.0: must be a whole number or a list (a whole number each) or null",
    "task.retention.stop_on_collapse=0": "task.retention.stop_on_collapse=0: must be true or false",
    "task.retention.beside=5": "task.retention.beside=5: must be a mapping of settings or null",
    "data.batch='4'": "data.batch=4: must be a whole number",
    "editor._target_=no.such.editor": "editor._target_=no.such.editor: cannot be imported",
}


@pytest.fixture(scope="module")
def whole():
    return composed("experiment=retention")


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_refused_by_name(whole, override):
    given, cfg = OverridesParser.create().parse_override(override), copy.deepcopy(whole)
    if (CONF / given.key_or_group).is_dir():
        cfg = composed("experiment=retention", override)
    else:  # as Hydra does, without composing all the rest again
        OmegaConf.update(cfg, given.key_or_group, given.value())
    with pytest.raises(UserError) as error:
        check(cfg)
    assert str(error.value).startswith(WRONG[override])
    assert "\n" not in str(error.value)


def test_values_inside_of_what_a_task_builds_are_checked_too():
    with pytest.raises(UserError, match=r"^task.convert.conversion.steps=500.5: must be a whole number"):
        check(composed("experiment=convert", "task.convert.conversion.steps=500.5"))
    with pytest.raises(UserError, match=r"^editor.lr=inf: must be a finite number"):
        build(composed("editor=qf2", "editor.lr=inf"), "editor")
    with pytest.raises(UserError, match=r"^data.path is needed: give data.path=\.\.\."):
        check(composed("experiment=convert", "data=messages"))


GOOD = [
    (1, int), (1, float), (0.5, float), (None, int | None), ("x", str), ("x", Path), (True, bool), ([], Sequence[int]),
    ([1, 2], list[int]), ([[1], [2.5]], Sequence[Sequence[float]]), ({"a": 1}, Mapping[str, int]), ({}, dict), ([1], tuple),
    ({"_target_": "a.B"}, Editor), ({"_target_": "a.B"}, Sequence[Editor]), ("any", Any), (None, Callable[[int], int] | None),
]  # fmt: skip
BAD = [
    (True, int), (1.0, int), ("1", int), (None, int), (True, float), (float("nan"), float), (float("-inf"), float),
    ("1", float), (1, str), (None, str), ([], str), (1, bool), ("true", bool), ("ab", Sequence[str]), ([1, "2"], list[int]),
    ([[1], 2], Sequence[Sequence[float]]), ([], Mapping[str, int]), ({"a": "b"}, Mapping[str, int]), ("a.B", Editor), (1, None),
]  # fmt: skip


def test_a_value_conforms_to_what_an_annotation_says_and_to_nothing_else():
    assert [pair for pair in GOOD if not conforms(*pair)] == []
    assert [pair for pair in BAD if conforms(*pair)] == []


def test_a_path_alone_takes_the_settings_of_no_other_model(tmp_path):
    check_model("world-s", "world-s")
    check_model("/a/copy", "qwen2.5-1.5b-instruct")  # a local copy
    check_model("/any", "own")
    with pytest.raises(UserError, match=r"^model=world-s with model.path=/any: .* give model=own"):
        check_model("/any", "world-s")
    path = str(CONF.parent / "qfbench" / "world" / "models" / "world-xs")
    cfg = composed("model=own", f"model.path={path}")
    assert (cfg.model.layer, cfg.model.layers) == (3, "0,1,2,3")  # 23 of 28, of 4
    assert re.fullmatch(r"world-xs-qf-L3-n20-[0-9a-f]{8}", name_of(cfg))
    assert composed("model=own", "model.path=world-s-qf2").model.layer == 4  # the one that fires
    assert composed("model=own", f"model.path={path}", "editor.layer=1").editor.layer == 1
    with pytest.raises(UserError, match=r"^model.path=/none: its configuration cannot be read|^/none: no such model"):
        check(composed("model=own", "model.path=/none"))


def test_a_conversion_is_asked_as_its_base_is(tmp_path):
    """Otherwise a model is told things otherwise than it was trained to be, and nobody sees it."""
    path = f"model.path={tmp_path}"
    recipe = tmp_path / "recipe.json"
    assert with_own_settings([path]) == ["model=own", path]
    recipe.write_text('{"base": "smollm2-135m-instruct", "layers": [22]}')
    assert with_own_settings([path]) == ["model=smollm2-135m-instruct", "model.layer=22", path]
    assert with_own_settings([path, "model.layer=3"]) == ["model=smollm2-135m-instruct", path, "model.layer=3"]
    assert with_own_settings([path, "model=own"]) == [path, "model=own"]
    cfg = composed(*with_own_settings([path]))
    assert (cfg.model.told, cfg.model.layer, cfg.editor.layer) == ("context", 22, 22)
    for other in ('{"base": "/a/folder", "layers": [2]}', '{"base": "world-s"}', "[1]", "no JSON"):
        recipe.write_text(other)
        assert with_own_settings([path]) == ["model=own", path]


def test_the_name_of_a_model_is_a_name_of_a_folder(tmp_path):
    for path, name in (("a/My Model", "My-Model"), ("m[/x]", "x-"), ("owner/Model-1.5B", "Model-1.5B")):
        cfg = composed("model=own", "model.layer=1", "model.layers='1'")
        OmegaConf.update(cfg, "model.path", path)
        assert name_of(cfg).startswith(f"{name}-qf-")
