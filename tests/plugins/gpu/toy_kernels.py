"""Small kernels, and a draft that launches them, for tests of the compiler."""

import numpy as np
import torch
import triton
import triton.language as tl

from bench.gpu.launch import described
from moevlm.plugins.gpu.draft import Draft, KernelSpec
from moevlm.plugins.gpu.kernels.e4m3 import encode_fp8
from moevlm.plugins.gpu.program import NO_LIMIT, TOKENS, Argument, Fill, Launch, TensorMap, Variant
from moevlm.plugins.gpu.sizes import ONE, Linear, T, Tensor, at_most, fixed, per_token

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
def encode_codes(values, codes, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(codes + i, encode_fp8(tl.load(values + i, mask=i < n, other=0.0)), mask=i < n)


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


@triton.jit
def mapped(x, w, y, n, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    weights = w.load([tl.program_id(1), 0, 0]).reshape(WIDTH, WIDTH)
    total = tl.dot(x.load([tl.program_id(0) * ROWS, 0]), weights)
    place = y + (tl.program_id(1) * n + rows[:, None]) * WIDTH + columns[None, :]
    tl.store(place, total, mask=(rows < n)[:, None])


@triton.jit
def measured(x, y):
    tl.store(y, x.shape[0])


SCALE = KernelSpec("scale", ("*fp32", "*fp32", "i32"), (("BLOCK", BLOCK), ("FACTOR", 2.0)))
TRIPLE = KernelSpec("scale", ("*fp32", "*fp32", "i32"), (("BLOCK", BLOCK), ("FACTOR", 3.0)), warps=2)
MATMUL = KernelSpec("matmul", ("*fp16", "*fp16", "*fp32", "i32"), (("BLOCK", 64), ("INNER", 64)), stages=3)
SCALED_MATMUL = KernelSpec(
    "scaled_matmul", ("*fp16", "*fp16", "*fp16", "*fp32", "i32"), (("BLOCK", 64), ("INNER", 256)), stages=3
)
BROKEN = KernelSpec("calls_never", ("*fp32", "*fp32"), (("BLOCK", BLOCK),))


WIDTH = 64
MAPPED = KernelSpec(
    *("mapped", ("tensordesc<fp16[32,64]>", "tensordesc<fp16[1,64,64]>", "*fp32", "i32")),
    (("ROWS", 32), ("WIDTH", WIDTH)),
)
MEASURED = KernelSpec("measured", ("tensordesc<fp16[32,64]>", "*i32"), ())


def mapped_draft(sm: int, kernel: KernelSpec = MAPPED) -> Draft:
    """x [T, 64], w [3, 64, 64] -> y [3, T, 64], x times each of w; both are taken as tensor maps."""
    x = TensorMap(Argument("input"), "float16", Linear(T=1), (WIDTH,), (32, WIDTH))
    w = TensorMap(Argument("input", 1), "float16", Linear(3), (WIDTH, WIDTH), (1, WIDTH, WIDTH))
    arguments = (Argument("tensor_map"), Argument("tensor_map", 1), Argument("output"), TOKENS)
    if kernel is MEASURED:
        arguments = (Argument("tensor_map"), Argument("output"))
    launch = Launch(0, (per_token(1, divisor=32), fixed(3), ONE), arguments)
    maps = (x, w) if kernel is MAPPED else (x,)
    tensors = (Tensor("x", "float16", (T, WIDTH)), Tensor("w", "float16", (3, WIDTH, WIDTH)))
    outputs = (Tensor("y", "float32", (3, T, WIDTH)),)
    return Draft("Toy", tensors, outputs, sm, (kernel,), (Variant((at_most(4096),), (), (launch,), maps),))


def interpret_mapped(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """y, in the process of the interpreter."""
    given = [described(torch.from_numpy(a), a.shape, kind) for a, kind in zip((x, w), MAPPED.types, strict=False)]
    y = torch.full((3, *x.shape), torch.nan)
    mapped[-(-len(x) // 32), 3, 1](*given, y, len(x), **dict(MAPPED.constants))
    return y.numpy()


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
