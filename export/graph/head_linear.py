"""`moevlm::HeadLinear` in standard ONNX, as a function body: a matrix for each head."""

from onnx import FunctionProto

from moevlm.export.graph.op import Op, function, register
from moevlm.plugins.ops.spec import HeadLinearSpec

HEAD_LINEAR = "HeadLinear"


def head_linear_function(spec: HeadLinearSpec, _: tuple[bool, ...] = ()) -> FunctionProto:
    """HeadLinear(x [T, heads * K] f32, weight [heads, N, K] f32) -> y [T, heads * N] f32."""
    body = """
        by_head = Reshape (x, split)
        heads_first = Transpose <perm = [1, 0, 2]> (by_head)
        columns = Transpose <perm = [0, 2, 1]> (weight)
        products = MatMul (heads_first, columns)
        tokens_first = Transpose <perm = [1, 0, 2]> (products)
        y = Reshape (tokens_first, joined)
    """
    constants = {"split": [0, spec.heads, -1], "joined": [0, -1]}
    return function(HEAD_LINEAR, spec, ["x", "weight"], ["y"], constants, [body])


register(Op(HEAD_LINEAR, HeadLinearSpec, head_linear_function, "head_linear"))
