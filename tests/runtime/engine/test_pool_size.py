"""How much of an engine's cache there is, and how much of it features of images take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moevlm.runtime.core.errors import RequestError
from moevlm.runtime.core.states import PagedKV, Recurrent
from moevlm.runtime.engine.image_features import FeatureCache
from moevlm.runtime.engine.pool_size import SEQUENCES, PoolSize
from moevlm.runtime.engine.step import EngineLimits
from moevlm.runtime.engine.visual import HostFeatures

LIMITS = EngineLimits(SEQUENCES, 1 << 20, 1 << 20, 1000, 64, packed=True)
KEYS = PagedKV(layer=0, kv_heads=2, key_dim=8, value_dim=8)  # 128 bytes a token, 8192 a page
STATE = Recurrent(layer=1, name="conv", shape=(4, 8))  # 128 bytes a row
LARGE = Recurrent(layer=1, name="delta", shape=(32, 32))  # 4096 bytes a row
ROWS = 1 + 2 * SEQUENCES


@pytest.mark.parametrize(
    ("states", "memory", "pages", "rows"),
    [
        ((KEYS,), None, 1 + SEQUENCES * 16, 0),
        ((KEYS,), 1 << 40, 1 + SEQUENCES * 16, 0),
        ((KEYS,), 10 * 8192 + 5, 10, 0),
        ((KEYS, STATE), None, 1 + SEQUENCES * 16, ROWS),
        ((KEYS, STATE), 10 * 8192 + ROWS * 128, 10, ROWS),
        ((KEYS, LARGE), 10 * 8192, 5, 10),
        ((KEYS, LARGE), 3 * 8192, 2, 2),
        ((KEYS, LARGE), 2 * 8192 + 2 * 4096, 2, 2),
        ((STATE,), 1 << 20, 1 + SEQUENCES * 16, ROWS),
        ((STATE,), 640, 1 + SEQUENCES * 16, 5),
    ],
    ids=[
        *("any", "more than of use", "some", "any beside states", "some beside states", "large states take half"),
        *("large states leave two pages", "least of all", "states alone", "some states alone"),
    ],
)
def test_pages_fill_the_memory_but_never_more_than_is_of_use(states, memory, pages, rows):
    assert PoolSize.of(LIMITS, states, 1000, memory) == PoolSize(pages, rows)


def test_memory_for_no_page_is_refused_in_one_line():
    message = r"^unsupported value cache_memory = 16383 \(allowed: 16384 bytes or more, 64 tokens\)$"
    with pytest.raises(RequestError, match=message):
        PoolSize.of(LIMITS, (KEYS,), 1000, 2 * 8192 - 1)
    with pytest.raises(RequestError, match=r"= 24575 \(allowed: 24576 bytes or more, 64 tokens\)$"):
        PoolSize.of(LIMITS, (KEYS, LARGE), 1000, 2 * (8192 + 4096) - 1)


def test_an_engine_with_memory_of_its_own_gives_all_of_it_and_no_more():
    gpu = replace(LIMITS, max_sequences=64, cache_memory=1000 * 8192)
    assert PoolSize.of(gpu, (KEYS,), 1000, None) == PoolSize(1000, 0)
    assert PoolSize.of(gpu, (KEYS,), 640, None) == PoolSize(1 + 64 * 10, 0)  # more is of no use
    assert PoolSize.of(gpu, (KEYS,), 1000, 500 * 8192) == PoolSize(500, 0)
    with pytest.raises(
        RequestError, match=r"^unsupported value cache_memory = 8192001 \(allowed: up to 8192000 bytes, "
    ):
        PoolSize.of(gpu, (KEYS,), 1000, 1000 * 8192 + 1)


def test_an_engine_of_one_page_a_sequence_always_has_room_for_one():
    whole = EngineLimits(1, 1000, 1000, 1000, 1000)
    assert PoolSize.of(whole, (KEYS,), 1000, 1) == PoolSize(2, 0)
    assert PoolSize.of(whole, (KEYS,), 1000, 1 << 40) == PoolSize(1 + SEQUENCES, 0)


def test_features_stay_within_their_bytes_the_longest_unused_going_first():
    def features(rows: int) -> HostFeatures:
        return HostFeatures(np.zeros((rows, 2), np.float32), np.zeros((1, rows, 2), np.float32))  # 16 bytes a row

    cache = FeatureCache(16 * 10)
    for name, rows in ((b"a", 4), (b"b", 4)):
        cache.put(name, features(rows))
    assert cache.get(b"a") is not None
    cache.put(b"c", features(3))  # b has to go
    assert [cache.get(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.kept_bytes == 16 * 7
    cache.put(b"d", features(11))  # larger than all
    assert cache.get(b"d") is None
    assert cache.kept_bytes == 16 * 7
    cache.forget()
    assert cache.kept_bytes == 0
    assert cache.get(b"a") is None
