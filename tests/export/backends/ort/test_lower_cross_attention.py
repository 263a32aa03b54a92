"""moevlm::CrossAttention in ONNX Runtime: as it is traced, and on com.microsoft::MultiHeadAttention, image by image."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from moevlm.export.backends.ort.passes.lower_segment_attention import LowerSegmentAttention
from moevlm.export.graph.cost import patch_macs
from moevlm.export.graph.cross_attention import CROSS_ATTENTION
from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.op import is_op
from moevlm.export.parity.measures import relative_error
from moevlm.export.passes.base import run
from moevlm.runtime.core.errors import UnsupportedModelError
from tests.support.resampler import WIDTH, Resampler, expected, images, tower

# float32 on both sides, sums in another order.
TOLERANCE = 5e-6


def canonical(queries: int) -> ir.Model:
    return Resampler(queries).graph()


def lowered(queries: int) -> ir.Model:
    model = canonical(queries)
    assert run([LowerSegmentAttention()], model) == {"LowerSegmentAttention": 1}
    return model


def outputs_of(model: ir.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    data = ir.serde.serialize_model(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


@pytest.mark.parametrize("form", [canonical, lowered])
@pytest.mark.parametrize("queries", [1, 16, 130])
def test_images_of_any_sizes_agree_with_the_spec(queries, form):
    model, module = form(queries), Resampler(queries)
    for sizes in ([16], [1], [4, 1, 40], [200, 3], [1] * 9):
        inputs = images(sizes)
        assert relative_error(outputs_of(model, inputs), expected(module, inputs)) <= TOLERANCE, sizes


def test_no_image_at_all_gives_no_rows():
    """Image by image; ONNX's own Attention, as ONNX Runtime has it, takes no empty input."""
    assert outputs_of(lowered(5), images([])).shape == (0, WIDTH)


def test_an_image_gets_what_it_gets_alone():
    model, inputs = lowered(16), images([12, 200, 8])
    own = {"patches": inputs["patches"][12:212], "image_start": np.array([0, 200], np.int32)}
    np.testing.assert_allclose(outputs_of(model, inputs)[16:32], outputs_of(model, own), rtol=1e-5, atol=1e-6)


def test_a_patch_is_multiplied_with_every_query_twice():
    """For its score, and for what the query takes of its value."""
    assert patch_macs(canonical(16), tower(16)) == 2 * 16 * WIDTH


def test_missing_patches_are_refused():
    model = canonical(3)
    (node,) = (node for node in model.graph if is_op(node, CROSS_ATTENTION))
    node.replace_input_with(3, None)
    with pytest.raises(UnsupportedModelError, match="CrossAttention has q, k, v and image_start"):
        add_functions(model)
