"""moevlm::CrossAttention in ONNX Runtime: as it is traced, and on com.microsoft::MultiHeadAttention, image by image."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.export import Dim

from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.graph.cost import patch_macs
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.translate import Translator
from moevlm.export.graph.weights import Constant
from moevlm.export.modules import ops
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.base import run
from moevlm.plugins.ops.attention import cross_attention
from moevlm.runtime.core.errors import UnsupportedModelError
from moevlm.runtime.core.towers import QueryTower

HEADS, WIDTH = 4, 64
# float32 on both sides, sums in another order.
TOLERANCE = 2e-6
INPUTS = {"k": ("patches", WIDTH), "v": ("patches", WIDTH), "image_start": ("starts",)}


class Resampler(torch.nn.Module):
    def __init__(self, queries: int) -> None:
        super().__init__()
        values = np.random.default_rng(queries).standard_normal((queries, WIDTH), np.float32)
        self.queries = torch.nn.Parameter(torch.from_numpy(values))

    def forward(self, k: torch.Tensor, v: torch.Tensor, image_start: torch.Tensor) -> torch.Tensor:
        return ops.cross_attention(self.queries, k, v, image_start, HEADS).view(-1, WIDTH)


def traced(queries: int) -> ir.Model:
    module, patches, starts = Resampler(queries), Dim("patches", min=1), Dim("starts", min=3)
    rows = {name: torch.zeros(9, WIDTH) for name in "kv"}
    program = torch.export.export(
        module,
        (),
        kwargs=rows | {"image_start": torch.tensor([0, 4, 9], dtype=torch.int32)},
        dynamic_shapes={"k": {0: patches}, "v": {0: patches}, "image_start": {0: starts}},
    )
    weights = {"queries": Constant(module.queries.detach().numpy())}
    model = Translator(program, weights).model("resampler", INPUTS, ("y",))
    add_functions(model)
    return model


def lowered(queries: int) -> ir.Model:
    model = traced(queries)
    assert run([LowerSegmentAttention()], model) == {"LowerSegmentAttention": 1}
    return model


def outputs_of(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def feeds(sizes: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(sum(sizes))
    arrays = {name: rng.standard_normal((sum(sizes), WIDTH), np.float32) for name in "kv"}
    return arrays | {"image_start": np.cumsum([0, *sizes]).astype(np.int32)}


@pytest.mark.parametrize("form", [traced, lowered])
@pytest.mark.parametrize("queries", [1, 16, 130])
def test_images_of_any_sizes_agree_with_the_spec(queries, form):
    model, q = form(queries), Resampler(queries).queries.detach().numpy()
    for sizes in ([16], [1], [4, 1, 40], [200, 3], [1] * 9):
        inputs = feeds(sizes)
        want = cross_attention(q, **inputs, heads=HEADS).reshape(-1, WIDTH)
        assert relative_error(outputs_of(model, inputs), want) <= TOLERANCE, sizes


def test_no_image_at_all_gives_no_rows():
    """Image by image; ONNX's own Attention, as ONNX Runtime has it, takes no empty input."""
    assert outputs_of(lowered(5), feeds([])).shape == (0, WIDTH)


def test_an_image_gets_to_the_bit_what_it_gets_alone():
    model, inputs = lowered(16), feeds([12, 200, 8])
    own = {name: array[12:212] for name, array in inputs.items()} | {"image_start": np.array([0, 200], np.int32)}
    np.testing.assert_array_equal(outputs_of(model, inputs)[16:32], outputs_of(model, own))


def test_a_patch_is_multiplied_with_every_query_twice():
    """For its score, and for what the query takes of its value."""
    sizes = {"patch_size": 4, "merge_size": 1, "channels": 3, "head_dim": WIDTH // HEADS, "rope_theta": 0.0}
    tower = QueryTower(**sizes, queries=16, position_grid=8)
    assert patch_macs(traced(16), tower) == 2 * 16 * WIDTH


def test_missing_patches_are_refused():
    model = traced(3)
    model.graph.node(0).replace_input_with(3, None)
    with pytest.raises(UnsupportedModelError, match="CrossAttention has q, k, v and image_start"):
        add_functions(model)
