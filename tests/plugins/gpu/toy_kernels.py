"""Small kernels, and a draft that launches them, for tests of the compiler."""

import triton
import triton.language as tl

from moevlm.plugins.gpu.draft import Draft, KernelSpec
from moevlm.plugins.gpu.program import (
    NO_LIMIT,
    ONE,
    TOKENS,
    Argument,
    Fill,
    Launch,
    T,
    Tensor,
    Variant,
    at_most,
    per_token,
)

BLOCK = 128


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr, FACTOR: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0) * FACTOR, mask=i < n)


@triton.jit
def matmul(x, w, y, n, BLOCK: tl.constexpr, INNER: tl.constexpr):
    rows, columns, inner = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, INNER, 32):
        a = tl.load(x + rows[:, None] * INNER + k + inner[None, :], mask=(rows < n)[:, None], other=0.0)
        total = tl.dot(a, tl.load(w + (k + inner)[:, None] * BLOCK + columns[None, :]), total)
    tl.store(y + rows[:, None] * BLOCK + columns[None, :], total, mask=(rows < n)[:, None])


@triton.jit
def scaled_matmul(x, w, scale, y, n, BLOCK: tl.constexpr, INNER: tl.constexpr):
    rows, columns, inner = tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, INNER, 32):
        a = tl.load(x + rows[:, None] * INNER + k + inner[None, :], mask=(rows < n)[:, None], other=0.0)
        factor = tl.load(scale + columns * (INNER // 32) + k // 32)
        total = tl.dot(a, tl.load(w + (k + inner)[:, None] * BLOCK + columns[None, :]) * factor, total)
    tl.store(y + rows[:, None] * BLOCK + columns[None, :], total, mask=(rows < n)[:, None])


@triton.jit
def gather(x, index, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + tl.load(index + i, mask=i < n, other=0), mask=i < n), mask=i < n)


@triton.jit
def never(x, y, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 0, "this kernel never compiles")
    tl.store(y, tl.load(x))


@triton.jit
def calls_never(x, y, BLOCK: tl.constexpr):
    never(x, y, BLOCK)


SCALE = KernelSpec("scale", ("*fp32", "*fp32", "i32"), (("BLOCK", BLOCK), ("FACTOR", 2.0)))
TRIPLE = KernelSpec("scale", ("*fp32", "*fp32", "i32"), (("BLOCK", BLOCK), ("FACTOR", 3.0)), warps=2)
MATMUL = KernelSpec("matmul", ("*fp16", "*fp16", "*fp32", "i32"), (("BLOCK", 64), ("INNER", 64)), stages=3)
SCALED_MATMUL = KernelSpec(
    "scaled_matmul", ("*fp16", "*fp16", "*fp16", "*fp32", "i32"), (("BLOCK", 64), ("INNER", 256)), stages=3
)
BROKEN = KernelSpec("calls_never", ("*fp32", "*fp32"), (("BLOCK", BLOCK),))


def draft(sm: int, dtype: str = "float32", kernels: tuple[KernelSpec, ...] = (SCALE, TRIPLE)) -> Draft:
    """x [T] -> y [T], tripled, then doubled; with one buffer between the two and two tile configurations."""
    blocks = per_token(1, divisor=BLOCK)
    steps = (
        Fill(0, 0, per_token(1)),
        Launch(1, (blocks, ONE, ONE), (Argument("input"), Argument("workspace"), TOKENS)),
        Launch(0, (blocks, ONE, ONE), (Argument("workspace"), Argument("output"), TOKENS)),
    )
    variants = tuple(Variant((at_most(limit),), (per_token(4),), steps) for limit in (64, (1 << 31) - 1))
    tensors = (Tensor("x", dtype, (T,)),), (Tensor("y", dtype, (T,)),)
    assert all(variant.max_tokens < NO_LIMIT for variant in variants)
    return Draft("Toy", *tensors, sm, kernels, variants)
