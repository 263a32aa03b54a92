"""The installed plugin library in TensorRT's lean runtime, which only runs engines and needs a GPU for that alone."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from moevlm.runtime.backends.libraries import plugin_path
from tests.plugins.tensorrt.programs import experts_program, router_program

# In a process of its own, as another TensorRT may be loaded in this one.
SCRIPT = """
import json, sys
import numpy as np
import tensorrt_lean_bindings as trt

registry = trt.get_plugin_registry()
registry.load_library(sys.argv[1])
found = []
for path in sys.argv[2:]:
    op, _, data = open(path, "rb").read().partition(b":")
    creator = registry.get_creator(op.decode(), "1", "")
    field = trt.PluginField("program", np.frombuffer(data, np.int8), trt.PluginFieldType.INT8)
    fields = trt.PluginFieldCollection([field])
    plugin = creator.create_plugin("layer", fields, trt.TensorRTPhase.RUNTIME)
    found.append([creator.name, [field.name for field in creator.field_names], plugin is not None])
print(json.dumps(found))
"""


def test_lean_runtime_makes_both_plugins_from_their_programs(tmp_path: Path) -> None:
    if find_spec("tensorrt_lean_bindings") is None:
        pytest.skip("no lean runtime of TensorRT (pip install tensorrt-lean-cu13)")
    programs = [router_program((86, 89)), experts_program()]
    broken = experts_program().to_bytes()[:-1]
    files = [tmp_path / name for name in ("router", "experts", "broken")]
    contents = [program.to_bytes() for program in programs] + [broken]
    for file, op, data in zip(files, ("MoERouter", "MoEExperts", "MoEExperts"), contents, strict=True):
        file.write_bytes(f"{op}:".encode() + data)
    done = subprocess.run([sys.executable, "-c", SCRIPT, plugin_path(), *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        ["MoERouter", ["program"], True],
        ["MoEExperts", ["program"], True],
        ["MoEExperts", ["program"], False],
    ]
