"""Many clients of one engine: what they get together, what a long prompt costs the others, and what is known before.

    python -m bench.serve_bench build/bench/1B.group32.moevlm --target cpu:int4 [--json FILE]

A closed loop over AsyncEngine: each client sends its next request when it has read the answer to the last. In this
process alone; `make bench` leaves that bundle behind.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import numpy as np

from bench import machine
from bench.load_bench import memory
from moevlm.runtime import AsyncEngine, Prompt, Runtime, SamplingParams
from moevlm.runtime.cli.console import bytes_text, publish, table
from moevlm.runtime.core.states import page_bytes
from moevlm.runtime.engine.packing import StepPacker
from moevlm.runtime.engine.step import Step
from moevlm.runtime.load_options import LoadOptions
from moevlm.runtime.loading import load_runtime
from moevlm.runtime.perf.process_limits import cores

CLIENTS = 8
PAST, NEW = 256, 64  # tokens of a client's prompt, and of an answer
MEMORY = 2 << 30  # bytes, for the cache of all
LONG, HISTORY, TURN = 2000, 1500, 32  # tokens of the prompt that arrives, of a chat, and of what is said next


@dataclass
class Row:
    """One measurement. values: of each round. aim: what the ratio should be, in words."""

    name: str
    unit: str
    aim: str = ""
    values: list[float] = field(default_factory=list)


def prompt_of(runtime: Runtime, tokens: int, seed: int) -> Prompt:
    """Random text."""
    ids = np.random.default_rng(seed).integers(0, runtime.model.vocabulary - 64, tokens)
    ids[np.isin(ids, runtime.model.visual_token_ids)] = 0
    return Prompt.from_ids(ids, [], runtime.model)


def mixed_tokens(runtime: Runtime) -> int:
    """Tokens of a prompt that are read in one step beside running decodes."""
    return runtime.engine.limits.mixed_tokens or runtime.chunk_tokens


def params(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)


async def times(service: AsyncEngine, prompt: Prompt, new_tokens: int) -> list[float]:
    """When each piece of an answer came."""
    return [perf_counter() async for _ in service.generate(prompt, params=params(new_tokens))]


async def together(service: AsyncEngine, prompts: Sequence[Prompt], new_tokens: int) -> float:
    """Tokens per second of all clients, from the first piece that all have to the last."""
    came = await asyncio.gather(*(times(service, prompt, new_tokens) for prompt in prompts))
    begin, end = max(one[0] for one in came), min(one[-1] for one in came)
    return sum(1 for one in came for at in one if begin < at <= end) / (end - begin)


def by_hand(runtime: Runtime, prompts: Sequence[Prompt], new_tokens: int) -> float:
    """Tokens per second of the same sequences, their steps made ahead and nothing done between two but an argmax."""
    engine, size = runtime.engine, runtime.engine.limits.page_size
    each = -(-(PAST + new_tokens) // size)
    runtime.forget()
    packer = StepPacker(runtime.model.ropes)
    count = len(prompts)
    table = 1 + np.arange(count * each, dtype=np.int32).reshape(count, each)

    def step(ids: np.ndarray, starts: np.ndarray, past: int, rows: np.ndarray) -> Step:
        positions = np.concatenate([np.arange(past, past + end - start) for start, end in pairwise(starts.tolist())])
        return Step(
            input_ids=ids,
            visual_index=np.full(len(ids), -1, np.int64),
            rope=packer.text(positions),
            query_start=starts.astype(np.int32),
            context_len=np.full(count, past, np.int32),
            page_table=table,
            state_row=np.arange(1, count + 1, dtype=np.int32),
            logits_index=rows.astype(np.int32),
            cleared=() if past else tuple(range(1, count + 1)),
        )

    ends = np.arange(count + 1) * PAST
    ids = np.concatenate([prompt.ids for prompt in prompts])
    output = engine.forward(step(ids, ends, 0, ends[1:] - 1))
    single = np.arange(count + 1)
    steps = [step(np.zeros(count, np.int64), single, PAST + n, single[:-1]) for n in range(new_tokens - 1)]
    started = perf_counter()
    for one in steps:
        one.input_ids[:] = output.candidates.ids[:, 0]
        output = engine.forward(one)
    return count * len(steps) / (perf_counter() - started)


async def gaps(service: AsyncEngine, prompts: Sequence[Prompt], arriving: Prompt | int) -> np.ndarray:
    """Seconds between two pieces of running clients, while `arriving` is read, or for so many tokens of each."""
    came: list[list[float]] = [[] for _ in prompts]

    async def run(prompt: Prompt, own: list[float]) -> None:
        async for _ in service.generate(prompt, params=params(LONG)):
            own.append(perf_counter())  # noqa: PERF401 - others read it meanwhile

    running = [asyncio.create_task(run(prompt, own)) for prompt, own in zip(prompts, came, strict=True)]
    while min(map(len, came)) < 10:  # all of them decode
        await asyncio.sleep(0.001)
    begin = perf_counter()
    if isinstance(arriving, int):
        while min(map(len, came)) < 10 + arriving:
            await asyncio.sleep(0.001)
    else:
        stream = service.generate(arriving, params=params(2))
        await anext(stream)
        await stream.aclose()
    end = perf_counter()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return np.concatenate([np.diff([at for at in own if begin <= at <= end]) for own in came])


def first_token(runtime: Runtime, prompt: Prompt) -> float:
    started = perf_counter()
    answer = runtime.generate(prompt, params=params(8))
    next(answer)
    seconds = perf_counter() - started
    list(answer)
    return seconds


def turns(runtime: Runtime, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a chat's first turn, and of its second."""
    runtime.forget()
    history = prompt_of(runtime, HISTORY, seed)
    first = first_token(runtime, history)
    said = [piece.token_ids[0] for piece in runtime.generate(history, params=params(8))]
    more = np.concatenate([history.ids, said, prompt_of(runtime, TURN, seed + 1).ids])
    return first, first_token(runtime, Prompt.from_ids(more, [], runtime.model))


@contextmanager
def counted(runtime: Runtime, spent: list[float]) -> Iterator[None]:
    """Collect the seconds of each step of the engine."""
    forward = runtime.engine.forward

    def timed(*arguments: object) -> object:
        started = perf_counter()
        try:
            return forward(*arguments)
        finally:
            spent.append(perf_counter() - started)

    runtime.engine.forward = timed
    try:
        yield
    finally:
        del runtime.engine.forward


def share(runtime: Runtime) -> float:
    """What scheduling, packing and sampling take of the time between two decode steps of CLIENTS sequences."""
    bare = Runtime(runtime.model, None, None, runtime.engine, cache_memory=MEMORY)  # without a tokenizer
    tokens = NEW + CLIENTS * PAST // mixed_tokens(bare)  # the first still runs when the last has read its prompt
    requests = [bare.sequence(prompt_of(bare, PAST, n), params=params(tokens), ahead=inf) for n in range(CLIENTS)]
    for request in requests:
        bare.loop.add(request)
    while any(len(request.generated) < 2 for request in requests):
        bare.loop.step()
    spent: list[float] = []
    started = perf_counter()
    with counted(bare, spent):
        while all(request.status == "running" for request in requests):
            bare.loop.step()
    return 1 - sum(spent) / (perf_counter() - started)


def kept(runtime: Runtime) -> tuple[float, float]:
    """Bytes of no file that CLIENTS sequences of 300 tokens make resident, and those of their pages.

    Others came before them and stay known, so that all else that such steps take is there already.
    """
    size, before = runtime.engine.limits.page_size, 0
    for seed in (0, CLIENTS, 2 * CLIENTS):
        before = memory()["RssAnon"]
        runtime.generate_many([prompt_of(runtime, 300 - 8, seed + n) for n in range(CLIENTS)], params=params(8))
    pages = CLIENTS * -(-300 // size)
    return memory()["RssAnon"] - before, pages * page_bytes(runtime.engine.states, size)


async def measured(runtime: Runtime, repeats: int) -> list[Row]:
    """All rows but those of a process's own; the ways to do the same take turns."""
    many, hand, one = Row("8 clients", "tok/s"), Row("8 sequences by hand", "tok/s"), Row("1 client", "tok/s")
    idle, beside = Row("time between tokens, 7 clients, p99", "s"), Row("the same while 2,000 tokens arrive, p99", "s")
    first, second = Row("first token, 1,500 tokens", "s"), Row("first token of the second turn", "s")
    prompts = [prompt_of(runtime, PAST, seed) for seed in range(CLIENTS)]
    for n in range(repeats + 1):
        rounds: list[tuple[Row, float]] = [(hand, by_hand(runtime, prompts, NEW))]
        runtime.forget()
        async with AsyncEngine(runtime) as service:
            await together(service, prompts, 2)  # their prompts are known from now on
            rounds.append((many, await together(service, prompts, NEW)))
            rounds.append((one, await together(service, prompts[:1], NEW)))
            arriving = prompt_of(runtime, min(LONG, runtime.context - 8), 1000 + n)
            rounds.append(
                (idle, float(np.percentile(await gaps(service, prompts[:-1], LONG // mixed_tokens(runtime)), 99)))
            )
            rounds.append((beside, float(np.percentile(await gaps(service, prompts[:-1], arriving), 99))))
        rounds += zip((first, second), turns(runtime, 2000 + 2 * n), strict=True)
        if n:
            for row, value in rounds:
                row.values.append(value)
    middle = median(many.values)
    many.aim = f"{middle / median(hand.values):.2f} of by hand, {middle / median(one.values):.2f} x one client"
    beside.aim = f"{median(beside.values) / median(idle.values):.2f} x idle"
    second.aim = f"{median(second.values) / median(first.values):.1%} of the first"
    return [hand, many, one, idle, beside, first, second]


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Which engine.  [default: the one that run takes]")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="After a first round.")
@click.option("--threads", type=click.IntRange(1), default=cores(), show_default="all cores")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the results here.")
def main(bundle: Path, target: str | None, repeats: int, threads: int, output: Path | None) -> None:
    """Measure what many clients get of one engine."""
    with load_runtime(bundle, target, LoadOptions(threads, cache_memory=MEMORY)) as runtime:
        resident, pages = kept(runtime)
        rows = asyncio.run(measured(runtime, repeats))
        host = Row("scheduling and sampling, of a step of 8", "", "", [share(runtime) for _ in range(repeats)])
        used = Row("memory of 8 x 300 tokens", "B", f"{resident / pages:.2f} x their pages", [resident])
        rows += [host, used]
        name = runtime.target
    lines = [
        (row.name, f"{median(row.values):.4g} {row.unit}", f"{min(row.values):.4g} to {max(row.values):.4g}", row.aim)
        for row in rows
    ]
    title = f"{name}, {threads} threads, medians of {repeats}; pages of 8 x 300 tokens: {bytes_text(int(pages))}"
    report = {"machine": machine.facts(), "target": name, "threads": threads, "rows": [vars(row) for row in rows]}
    publish(table(title, ("", "median", "range", ""), lines), json.dumps(report, indent=2), output)


if __name__ == "__main__":
    main()
