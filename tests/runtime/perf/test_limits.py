"""What a stage needs at least, by hand; and the machine's limits, by what cannot be otherwise."""

from pathlib import Path

import msgspec
import pytest

from moevlm.runtime.core.engine_metadata import CostMetadata, EngineMetadata
from moevlm.runtime.core.errors import EngineError
from moevlm.runtime.core.manifest import LayerMetadata, ModelMetadata, RopeMetadata
from moevlm.runtime.core.states import PagedKV, Recurrent
from moevlm.runtime.core.towers import GridTower
from moevlm.runtime.perf.latency import measure, random_prompt
from moevlm.runtime.perf.latency_report import BenchReport, LatencyReport, Limit, Seconds
from moevlm.runtime.perf.limits import Work, decode_work, limit, prefill_work, vision_work
from moevlm.runtime.perf.machine import Machine, measure_machine
from moevlm.runtime.perf.roofline import plot

MODEL = ModelMetadata(
    model_type="qwen3_vl_moe",
    hidden=64,
    vocabulary=96,
    context=512,
    layers=(LayerMetadata(heads=4, kv_heads=2, key_dim=16, value_dim=16, experts=8, top_k=2),) * 2,
    eos_token_ids=(0,),
    image_token_id=5,
    ropes=(RopeMetadata(dim=16, theta=1e4, sections=(4, 2, 2), interleaved=True),),
    vision=GridTower(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        channels=3,
        head_dim=8,
        rope_theta=1e4,
        position_grid=5,
        position_resampling="bilinear",
        deepstack=0,
    ),
)
COST = CostMetadata(
    dense_bytes=1000,
    expert_bytes=300,
    head_bytes=50,
    dense_macs=2000,
    expert_macs=600,
    head_macs=100,
    vision_bytes=700,
    patch_macs=40,
    patch_pair_macs=6,
)


def engine(kv_cache: str = "float32") -> EngineMetadata:
    states = tuple(PagedKV(layer=i, kv_heads=2, key_dim=16, value_dim=16, dtype=kv_cache) for i in range(2))
    return EngineMetadata(vision="v", decoder="d", dtype="int4", group_size=32, states=states)


def test_images_are_multiplied_by_their_patches_by_pairs_of_these_and_each_alone() -> None:
    work = vision_work(msgspec.structs.replace(COST, image_macs=5), [10, 20])
    assert (work.bytes, work.weight_macs, work.attention_macs) == (700, 30 * 40 + 2 * 5, (100 + 400) * 6)


def test_decoding_reads_the_weights_of_the_chosen_experts_and_the_cache() -> None:
    work = decode_work(MODEL, engine(), COST, context=100)
    cached = 2 * 2 * 2 * 16 * 4 * 100  # keys and values, layers, heads of the cache, values, bytes, tokens
    assert work.bytes == pytest.approx(1000 + 50 + 2 * 300 + cached)
    assert work.weight_macs == 2000 + 2 * 600 + 100
    assert work.attention_macs == 2 * 101 * 2 * 4 * 16
    assert work.flops == 2 * (work.weight_macs + work.attention_macs)


def test_an_int8_cache_is_a_byte_a_value_and_a_scale() -> None:
    work = decode_work(MODEL, engine(kv_cache="int8"), COST, context=100)
    assert work.bytes == pytest.approx(1000 + 50 + 2 * 300 + 2 * 2 * 2 * (16 + 4) * 100)


def test_a_cache_of_half_floats_is_two_bytes_a_value() -> None:
    work = decode_work(MODEL, engine(kv_cache="bfloat16"), COST, context=100)
    assert work.bytes == pytest.approx(1000 + 50 + 2 * 300 + 2 * 2 * 2 * 16 * 2 * 100)


def test_several_tokens_share_experts() -> None:
    one, eight = (decode_work(MODEL, engine(), COST, 0, batch).bytes for batch in (1, 8))
    assert one == pytest.approx(1050 + 2 * 300)
    assert eight == pytest.approx(1050 + 8 * (1 - 0.75**8) * 300)
    assert prefill_work(MODEL, COST, 10_000).bytes == pytest.approx(1050 + 8 * 300)


def test_prefill_multiplies_for_each_token_and_makes_logits_once() -> None:
    work = prefill_work(MODEL, COST, 10)
    assert work.weight_macs == 10 * (2000 + 2 * 600) + 100
    assert work.attention_macs == 2 * 55 * 2 * 4 * 16


def test_layers_differ() -> None:
    windowed = LayerMetadata(heads=2, kv_heads=1, key_dim=8, value_dim=4, window=10)
    mixed = msgspec.structs.replace(MODEL, layers=(MODEL.layers[0], windowed, LayerMetadata()))
    states = (
        PagedKV(layer=0, kv_heads=2, key_dim=16, value_dim=16),
        PagedKV(layer=1, kv_heads=1, key_dim=8, value_dim=4, window=10),
        Recurrent(layer=2, name="delta", shape=(2, 8)),
    )
    metadata = msgspec.structs.replace(engine(), states=states)
    for context, seen in ((5, 5), (100, 9)):
        work = decode_work(mixed, metadata, COST, context)
        assert work.bytes == pytest.approx(1050 + 2 * 300 + context * 2 * 32 * 4 + seen * 12 * 4 + 2 * 2 * 8 * 4)
        assert work.attention_macs == (context + 1) * 4 * 32 + min(context + 1, 10) * 2 * 12
    assert prefill_work(mixed, COST, 30).attention_macs == 465 * 4 * 32 + (55 + 20 * 10) * 2 * 12
    assert work.weight_macs == 2000 + 2 * 600 + 100  # of the layers that have experts


def test_a_chunk_ends_what_a_query_sees() -> None:
    layer = LayerMetadata(heads=1, kv_heads=1, key_dim=8, value_dim=8, chunk=10)
    chunked = msgspec.structs.replace(MODEL, layers=(layer,))
    kept = PagedKV(layer=0, kv_heads=1, key_dim=8, value_dim=8, chunk=10)
    metadata = msgspec.structs.replace(engine(), states=(kept,))
    for context, seen in ((4, 4), (9, 9), (10, 0), (25, 5)):
        work = decode_work(chunked, metadata, COST, context)
        assert (work.bytes - 1050, work.attention_macs) == (seen * 16 * 4, (seen + 1) * 16)
    for tokens, pairs in ((0, 0), (7, 28), (10, 55), (23, 55 + 55 + 6)):
        assert prefill_work(chunked, COST, tokens).attention_macs == pairs * 16


def test_recurrent_states_are_multiplied_by_each_token() -> None:
    cost = msgspec.structs.replace(COST, state_macs=70)
    plain, recurrent = (decode_work(MODEL, engine(), each, 100, 3).attention_macs for each in (COST, cost))
    assert recurrent - plain == 3 * 70
    assert prefill_work(MODEL, cost, 30).attention_macs - prefill_work(MODEL, COST, 30).attention_macs == 30 * 70


def test_images_attend_to_themselves_only() -> None:
    work = vision_work(COST, [4, 12])
    assert (work.bytes, work.weight_macs, work.attention_macs) == (700, 16 * 40, (16 + 144) * 6)


@pytest.mark.parametrize(
    ("work", "group_size", "bound", "least"),
    [
        (Work(1000, 10, 0), 32, "memory", 10.0),
        (Work(10, 40_000, 0), 32, "arithmetic", 10.0),
        (Work(10, 40_000, 0), 0, "arithmetic", 40.0),
        (Work(10, 0, 1000), 32, "arithmetic", 1.0),
    ],
)
def test_the_slower_of_memory_and_arithmetic_is_the_limit(work, group_size, bound, least) -> None:
    machine = Machine(threads=2, read=100, float32=1000, int8=4000)
    metadata = EngineMetadata(vision="v", decoder="d", dtype="x", states=(), group_size=group_size)
    found = limit(work, machine, metadata, seconds=50.0)
    assert (found.bound, found.seconds, found.fraction) == (bound, pytest.approx(least), pytest.approx(least / 50))


def test_this_machine_has_limits() -> None:
    machine = measure_machine(1)
    assert machine.threads == 1
    assert machine.read > 1e8
    assert 0 < machine.float32 <= machine.int8


def report(machine: Machine | None) -> BenchReport:
    seconds = Seconds(median=0.01, minimum=0.01, maximum=0.02)
    found = Limit(bytes=10**8, flops=10**9, seconds=0.005, bound="memory", fraction=0.5)
    result = LatencyReport(
        target="cpu:int4",
        threads=1,
        load_seconds=1.0,
        vision=None,
        prefill=seconds,
        decode_token=seconds,
        first_token=seconds,
        decode_tokens_per_second=100,
        prefill_tokens_per_second=1000,
        prefill_limit=found,
        decode_limit=found,
    )
    return BenchReport(
        bundle="demo.moevlm",
        prompt_tokens=10,
        image_tokens=0,
        image_size=0,
        new_tokens=4,
        repeats=1,
        results=[result],
        machine=machine,
    )


def test_roofline_is_a_png(tmp_path: Path) -> None:
    plot(report(Machine(threads=1, read=2e10, float32=5e10, int8=2e11)), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")


def test_roofline_without_limits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="limits were not measured"):
        plot(report(None), tmp_path / "roof.png")
    assert not list(tmp_path.iterdir())


def test_measured_stages_name_their_limits(tiny_bundle: Path) -> None:
    from moevlm.runtime.bundle.reader import Bundle
    from moevlm.runtime.load_options import LoadOptions
    from moevlm.runtime.loading import load_images, load_runtime

    bundle = Bundle.open(tiny_bundle)
    name, metadata = bundle.engine("ort-cpu")
    prompt = random_prompt(bundle.manifest.model, load_images(bundle), 12, 16)
    machine = Machine(threads=1, read=1e10, float32=1e10, int8=4e10)
    found = measure(
        name,
        metadata,
        lambda: load_runtime(tiny_bundle, name, LoadOptions(threads=1)),
        prompt,
        3,
        1,
        machine,
        1,
        lambda *_: None,
    )
    for stage in (found.vision_limit, found.prefill_limit, found.decode_limit):
        assert stage is not None
        assert 0 < stage.fraction < 1
