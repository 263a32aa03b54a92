"""What runs an ONNX model as it is: ONNX Runtime, and onnx's reference evaluator."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

Array = np.ndarray
Run = Callable[[None, dict[str, Array]], list[Array]]


def in_onnxruntime(model: onnx.ModelProto) -> Run:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run


def in_reference_evaluator(model: onnx.ModelProto) -> Run:
    return ReferenceEvaluator(model).run


runtimes = pytest.mark.parametrize("runtime", [in_onnxruntime, in_reference_evaluator])
