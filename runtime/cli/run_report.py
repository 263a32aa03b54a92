"""What `moevlm run` writes as JSON."""

from collections.abc import Sequence

import msgspec

from moevlm.runtime.core.reports import Report
from moevlm.runtime.engine.generate import Piece


class TokenReport(msgspec.Struct, frozen=True):
    """One generated token. top: [[token id, log-probability], ...], the likeliest first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class RunReport(Report, frozen=True, tag="moevlm.run/1"):
    """`moevlm run --json`."""

    target: str
    text: str
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: int
    new_tokens: int
    vision_seconds: float
    prefill_seconds: float
    decode_seconds: float
    logprobs: list[TokenReport] | None


def run_report(target: str, pieces: Sequence[Piece], logprobs: bool) -> RunReport:
    """The whole answer. pieces: all of one request, the last with its usage."""
    usage, finish_reason = pieces[-1].usage, pieces[-1].finish_reason
    assert usage is not None
    assert finish_reason is not None  # the last piece has both
    sampled = [token for piece in pieces for token in piece.sampled]
    top = [TokenReport(id=t.token_id, logprob=t.logprob, top=list(t.top)) for t in sampled if t.logprob is not None]
    return RunReport(
        target=target,
        text="".join(piece.text for piece in pieces),
        token_ids=[token.token_id for token in sampled],
        finish_reason=finish_reason,
        logprobs=top if logprobs else None,
        **vars(usage),
    )
