"""Backends by name: their targets, and options that count or are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from moevlm.export.backends.options import options_of
from moevlm.export.backends.registry import BACKENDS, all_options, target_names, targets
from moevlm.runtime.core import defaults
from moevlm.runtime.core.errors import BuildError

FOLDER = Path(__file__).parents[3] / "export" / "backends"


def test_every_backend_s_folder_has_a_line() -> None:
    assert {path.parent.name for path in FOLDER.glob("*/target.py")} == {line.folder for line in BACKENDS}
    assert defaults.TARGET in target_names()


@pytest.mark.parametrize("line", BACKENDS, ids=lambda line: line.folder)
def test_every_field_of_an_options_class_is_an_option(line) -> None:
    assert options_of(line.options).keys() == {field.name for field in dataclasses.fields(line.options)}
    assert all(name.partition(":")[0] in line.kinds for name in line.names)


def test_an_option_that_several_backends_have_is_stated_alike_or_told_together() -> None:
    for line in BACKENDS:
        for name, (default, told) in options_of(line.options).items():
            first, known = all_options()[name]
            if name in ("kv_cache", "group_size"):
                assert told.help in known.help and told.whose in known.whose and {*told.choices} <= {*known.choices}
                assert not first  # the help says each one's
                continue
            assert (default, told.help, told.whose, told.choices) == (first, known.help, known.whose, known.choices)


def test_targets_are_made_with_the_options_that_are_theirs() -> None:
    plain, ours = targets(["ort-cpu:int4", "cpu:int4"], {"group_size": 128, "kv_cache": "float32"})
    assert (plain.group_size, plain.kv_cache) == (128, "float32")
    assert (ours.group_size, ours.kv_cache) == (128, "float32")
    assert targets(["ort-cpu:fp32", "ort-cpu"], {})[0].name == "ort-cpu"
    assert len(targets(["ort-cpu:fp32", "ort-cpu"], {})) == 1
    assert [target.name for target in targets(["cpu", "cpu:int8"], {})] == ["cpu:int8"]


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (["cpu:int8"], {"dtype": "fp16"}, r"--dtype has no effect on cpu:int8 \(it is for rtx and trt targets\)"),
        (["ort-cpu"], {"group_size": 32}, r"--group-size has no effect on ort-cpu \(it is for targets with int8"),
        (["reference"], {"sparsity": "2:4"}, r"reference is the checkpoint itself and stays dense"),
        (["cpu:int8"], {"block_size": 32}, r"there is no option block_size \(allowed: group_size, "),
        (["cpu:int8"], {"group_size": 64}, r"unsupported value group_size = 64 \(allowed: 32, 128\)"),
        (["cpu:int8"], {"kv_cache": "fp8"}, r"unsupported value kv_cache = 'fp8' \(allowed: float32, int8\)"),
        (["cpu:int3"], {}, r'unknown target "cpu:int3" \(allowed: reference, ort-cpu, .*, cpu:int8, .*, trt:smNN\)'),
        (["cuda"], {}, r'unknown target "cuda"'),
        (["cpu:"], {}, r'unknown target "cpu:"'),
    ],
)
def test_what_does_not_do_is_refused_by_name(names: list[str], given: dict[str, object], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        targets(names, given)
