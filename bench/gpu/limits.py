"""What this GPU can do at most, measured: a copy in its memory, and a large matrix product."""

import torch

from bench.gpu.shapes import Limits
from bench.gpu.timing import median_seconds

COPY_BYTES = 2 << 30
PRODUCT = 8192


def measure_limits() -> Limits:
    """Medians, on random data: zeros are faster than what models hold."""
    torch.manual_seed(0)
    return Limits(_bandwidth(), _peak())


def _bandwidth() -> float:
    source = torch.randint(-(1 << 31), (1 << 31) - 1, (COPY_BYTES // 4,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / median_seconds([lambda: target.copy_(source)])


def _peak() -> float:
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    a, b = (torch.randn(PRODUCT, PRODUCT, device="cuda", dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * PRODUCT**3 / median_seconds([lambda: torch.mm(a, b, out=out)])
