"""Where canonical weights come from."""

import ml_dtypes
import numpy as np

from moevlm.export.families.sources import plus_one
from moevlm.export.graph.weights import Constant, read


def test_one_is_added_in_float32_and_not_in_the_dtype_that_is_stored() -> None:
    offset = np.array([2.0**-12, -0.5, 0.0], ml_dtypes.bfloat16)  # 1 + 2**-12 is no bfloat16
    gain = plus_one("layers.{i}.norm")({"layers.3.norm": Constant(offset)}, {"i": "3"}, (3,), "auto")
    assert gain.dtype == np.float32
    np.testing.assert_array_equal(read(gain), np.array([1 + 2.0**-12, 0.5, 1.0], np.float32))
