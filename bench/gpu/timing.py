"""Times on a GPU: replays of a captured graph between two events, so that no launch is waited for."""

from collections.abc import Callable, Sequence
from statistics import median

import torch

WARM_UP = 3
REPLAYS = 20
LEAST_SECONDS = 0.02  # of one timed stretch; a shorter graph is replayed several times in it


def median_seconds(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """The median time of one of the calls, which run one after the other in each replay.

    Calls that differ in the weights they read keep those from being read out of the cache.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()  # the calls' inputs were made on another stream
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and makes what a capture may not
            call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = 1
    for _ in range(WARM_UP):
        times = max(times, round(LEAST_SECONDS / _replay_seconds(graph, 1)))
    return median(_replay_seconds(graph, times) for _ in range(replays)) / len(calls)


def _replay_seconds(graph: torch.cuda.CUDAGraph, times: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    end.synchronize()
    return max(start.elapsed_time(end) / 1000 / times, 1e-7)
