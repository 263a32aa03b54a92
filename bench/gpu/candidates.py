"""A row's likeliest tokens against torch's topk and logsumexp, and the bandwidth of reading the logits once."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.device import Device
from bench.gpu.limits import measure_limits
from bench.gpu.shapes import Limits
from moevlm.plugins.gpu.ops.candidates import CandidatesOp

VOCABULARY = 151936  # Qwen3-VL's
ROWS = (1, 8, 64)
TURNS = 4  # inputs that take turns; those of few rows stay in the cache, where a head has just left them


def run(sm: int) -> Iterator[dict[str, Any]]:
    """An entry per number of rows and kind of logits."""
    torch.manual_seed(0)
    yield from measure(CandidatesOp(VOCABULARY), ROWS, Device(sm), measure_limits())


def measure(op: CandidatesOp, counts: tuple[int, ...], device: Device, limits: Limits) -> Iterator[dict[str, Any]]:
    """Logits of float32, and float32 of bfloat16: many of those are equal, which is harder to choose from."""
    runner = device.runner(op)
    for logits in ("float32", "bfloat16"):
        for count in counts:
            rows = [4 * torch.randn(count, op.vocabulary, device=device.name) for _ in range(TURNS)]
            rows = [each.to(getattr(torch, logits)).float() for each in rows]
            calls = [runner.prepare([each]) for each in rows]
            seconds = device.seconds(calls)
            entry: dict[str, Any] = {"kind": "candidates", "logits": logits, "rows": count, "seconds": seconds}
            entry["of_bandwidth"] = limits.of_bandwidth(4 * count * op.vocabulary, seconds)
            entry["peer_seconds"] = device.seconds([partial(peer, each, op.columns) for each in rows])
            values, log_sum_exp = peer(rows[0], op.columns)
            found = calls[0].outputs
            same = torch.equal(found[0], values) and torch.equal(rows[0].gather(1, found[1].long()), values)
            if not (same and torch.allclose(found[2], log_sum_exp, rtol=1e-5)):
                entry["error"] = "others than torch's"
            yield entry
    runner.close()


def peer(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [rows, count] and log-sum-exp [rows]."""
    return logits.topk(count, dim=-1).values, logits.logsumexp(-1)
