"""What an engine launches, read from the file of a real one."""

from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from bench.plan_launches import launches, main
from moevlm.export.backends.tensorrt import worker
from moevlm.export.backends.tensorrt.plan_builder import Job

# Attention of TensorRT's own over a cache of its own: it copies all of the keys, and that is what a reader must see.
MODEL = """
<ir_version: 10, opset_import: ["" : 24]>
graph (float16[batch, 4, 1, 64] q, float16[batch, 2, 1, 64] k, float16[batch, 2, 1, 64] v, int64[batch] position,
       float16[batch, 2, 256, 64] key_cache, float16[batch, 2, 256, 64] value_cache, bool[batch, 1, 1, 256] mask)
   => (float16[batch, 4, 1, 64] y, float16[batch, 2, 256, 64] keys, float16[batch, 2, 256, 64] values)
{
    keys = TensorScatter <axis = -2> (key_cache, k, position)
    values = TensorScatter <axis = -2> (value_cache, v, position)
    y = Attention <scale = 1.0> (q, keys, values, mask)
}
"""


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    model = onnx.parser.parse_model(MODEL)
    onnx.save(model, folder / "attention.onnx")
    profiles = []
    for most in (4, 2):
        shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:] for value in model.graph.input
        }
        profiles.append({name: tuple((batch, *shape) for batch in (1, 1, most)) for name, shape in shapes.items()})
    made = folder / "attention.plan"
    job = Job("tensorrt_rtx", str(folder / "attention.onnx"), str(made), (89,), profiles, str(folder))
    worker.run(job, lambda *_: None)
    return made


def test_each_profile_is_read_with_the_networks_names(plan: Path) -> None:
    profiles = launches(plan.read_bytes())
    assert len(profiles) == 2
    for found in profiles:
        read = {name for launch in found for name in launch.inputs}
        assert {"q", "k", "v", "position", "key_cache", "mask"} <= read
        assert "values" in {name for launch in found for name in launch.outputs}
        assert [launch.layers for launch in found if "mha" in launch.name] == [("node_of_y",)]


def test_a_copy_of_a_cache_shows(plan: Path) -> None:
    for found in launches(plan.read_bytes()):
        (copy,) = [launch for launch in found if launch.name == "__myl_Move"]
        assert (copy.inputs[0], copy.layers) == ("key_cache", ("node_of_keys",))


def test_command_lists_them(plan: Path) -> None:
    done = CliRunner().invoke(main, [str(plan)])
    assert done.exit_code == 0
    starts = [line.partition(":")[0] for line in done.output.splitlines() if line.startswith("profile")]
    assert starts == ["profile 0", "profile 1"]
    assert "__myl_Move" in done.output


def test_another_file_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.plan"
    other.write_bytes(b"ftrt" + bytes(100))
    done = CliRunner().invoke(main, [str(other)])
    assert done.exit_code == 1
    assert done.output == f"Error: {other}: the file has no list of operations (allowed: an engine of TensorRT-RTX)\n"
