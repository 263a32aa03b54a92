"""What is left of a GPU's memory for the cache, and how fast it can decode, by hand."""

from __future__ import annotations

import msgspec
import pytest

from moevlm.runtime.cli.memory_text import memory_text
from moevlm.runtime.core.defaults import FEATURE_MEMORY
from moevlm.runtime.core.engine_metadata import EngineMetadata, TensorRTMetadata
from moevlm.runtime.core.gpu_models import GPU_MODELS, GpuModel
from moevlm.runtime.core.states import PagedKV, Recurrent
from moevlm.runtime.perf.memory import CONTEXT, LEAST_TOKENS, GpuFit, driver_bytes, memory_report
from tests.runtime.perf.test_limits import COST, MODEL

GIGA = 10**9
# 2 layers of 8 experts of 300 bytes, as MODEL and COST have them, made larger.
BIG = msgspec.structs.replace(COST, dense_bytes=2 * GIGA, expert_bytes=GIGA, head_bytes=GIGA // 2, vision_bytes=GIGA)
LEAST_PAGES = LEAST_TOKENS // 64
BUILT = TensorRTMetadata(
    product="tensorrt_rtx",
    version="1.7.1.116",
    sms=(89,),
    activations="bfloat16",
    experts="experts.safetensors",
    max_sequences=4,
    max_tokens=100,
    max_logits=64,
    max_visual=100,
    max_patches=100,
    max_pages=50_000,
    workspace=GIGA // 4,
)
# 64 * 2 layers * 2 heads * (250 + 250) * 2 bytes: 256 kB a page.
STATES = tuple(PagedKV(layer=i, kv_heads=2, key_dim=250, value_dim=250, dtype="bfloat16") for i in range(2))
ENGINE = EngineMetadata(
    vision="v",
    decoder="d",
    dtype="int4",
    group_size=32,
    states=STATES,
    page_size=64,
    cost=msgspec.structs.replace(BIG, lookup_bytes=GIGA // 2),
    tensorrt=BUILT,
)
PAGE = 256_000
FIXED = 2 * GIGA + GIGA // 2 + GIGA // 2 + 8 * GIGA + GIGA + GIGA // 4 + driver_bytes(ENGINE)


def gpu(memory: int, link: int = GIGA) -> GpuModel:
    return GpuModel("a GPU", 89, memory, 100 * GIGA, link)


def fit_of(model: GpuModel, engine: EngineMetadata = ENGINE) -> GpuFit:
    report = memory_report(MODEL, engine, [model])
    assert report is not None
    (fit,) = report.gpus
    return fit


def test_an_engine_takes_its_weights_workspace_and_the_driver_s_share() -> None:
    report = memory_report(MODEL, ENGINE)
    assert report is not None
    assert (report.dense, report.experts, report.vision, report.fixed) == (3 * GIGA, 8 * GIGA, GIGA, FIXED)
    assert (report.page, report.page_tokens, report.token) == (PAGE, 64, 4000)
    assert [fit.gpu for fit in report.gpus] == [model.name for model in GPU_MODELS if model.sm == 89]


def test_an_engine_of_text_alone_leaves_nothing_free_for_features_of_images() -> None:
    text = msgspec.structs.replace(ENGINE, vision="")
    assert driver_bytes(ENGINE) - driver_bytes(text) == FEATURE_MEMORY > 0
    report = memory_report(MODEL, text)
    assert report is not None
    assert report.driver == driver_bytes(text)


def test_what_is_left_holds_pages_and_the_first_is_no_sequence_s() -> None:
    fit = fit_of(gpu(FIXED + 1000 * PAGE + PAGE - 1))
    assert (fit.fits, fit.host_layers, fit.tokens, fit.sequences) == (True, 0, 999 * 64, 4)
    read = 2 * GIGA + GIGA // 2 + 2 * GIGA + CONTEXT * 4000  # two experts of a token, and the cache
    assert fit.decode == pytest.approx(100 * GIGA / read)
    together = 2 * GIGA + GIGA // 2 + 8 * (1 - 0.75**4) * GIGA + 4 * CONTEXT * 4000
    assert fit.decode_together == pytest.approx(4 * 100 * GIGA / together)
    assert fit_of(gpu(FIXED + 10**6 * PAGE)).tokens == (50_000 - 1) * 64  # what kernels count in 32 bits


def test_sequences_are_as_many_as_the_cache_holds() -> None:
    fit = fit_of(gpu(FIXED + (1 + 2 * CONTEXT // 64) * PAGE, link=0))
    assert (fit.tokens, fit.sequences, fit.host_layers) == (2 * CONTEXT, 2, 0)


def test_experts_go_to_the_host_layer_by_layer_where_they_leave_no_room() -> None:
    layer = 4 * GIGA
    enough = FIXED + LEAST_PAGES * PAGE
    assert fit_of(gpu(enough)).host_layers == 0
    one = fit_of(gpu(enough - 1))
    assert (one.fits, one.host_layers, one.tokens) == (True, 1, (LEAST_PAGES + (layer - 1) // PAGE - 1) * 64)
    assert fit_of(gpu(enough - layer)).host_layers == 1
    two = fit_of(gpu(enough - layer - 1))
    assert two.host_layers == 2
    over_link = 2 * GIGA  # both layers' experts of a token
    here = 2 * GIGA + GIGA // 2 + CONTEXT * 4000
    assert two.decode == pytest.approx(1 / (here / (100 * GIGA) + over_link / GIGA))


@pytest.mark.parametrize(
    ("engine", "link"),
    [
        (ENGINE, 0),  # the host's memory is the GPU's own
        (msgspec.structs.replace(ENGINE, tensorrt=msgspec.structs.replace(BUILT, experts="")), GIGA),
    ],
    ids=["unified", "experts-inside"],
)
def test_where_experts_cannot_go_to_the_host_it_does_not_fit(engine: EngineMetadata, link: int) -> None:
    assert fit_of(gpu(FIXED + PAGE, link), engine) == GpuFit("a GPU", FIXED + PAGE, fits=False)


def test_a_gpu_without_room_for_anything_does_not_fit() -> None:
    assert not fit_of(gpu(FIXED - 8 * GIGA)).fits


ROW = 10 * PAGE
RECURRENT = msgspec.structs.replace(ENGINE, states=(*STATES, Recurrent(layer=1, name="linear", shape=(ROW // 4,))))


def test_recurrent_states_share_the_memory_of_the_cache() -> None:
    report = memory_report(MODEL, RECURRENT, [])
    assert report is not None
    assert (report.fixed, report.page, report.row) == (FIXED, PAGE, ROW)
    most = 1 + 2 * 32  # a row and a snapshot for each of 32 requests
    assert fit_of(gpu(FIXED + most * ROW + 1000 * PAGE, link=0), RECURRENT).tokens == 999 * 64
    half = fit_of(gpu(FIXED + 12 * ROW, link=0), RECURRENT)
    assert (half.tokens, half.sequences) == ((60 - 1) * 64, 3)
    least = fit_of(gpu(FIXED + 2 * ROW + 17 * PAGE, link=0), RECURRENT)
    assert (least.tokens, least.sequences) == (16 * 64, 1)
    assert not fit_of(gpu(FIXED + 2 * ROW + PAGE, link=0), RECURRENT).fits
    read = fit_of(gpu(FIXED + most * ROW + 1000 * PAGE), RECURRENT).decode
    assert read < fit_of(gpu(FIXED + 1000 * PAGE)).decode


def test_people_read_what_a_request_takes_whatever_its_length() -> None:
    report = memory_report(MODEL, RECURRENT, [])
    assert report is not None
    assert memory_text("rtx", report, MODEL).splitlines()[-1] == (
        "its recurrent states take 2.6 MB a request, and as much for each snapshot of them"
    )


def test_engines_on_the_cpu_have_no_report() -> None:
    assert memory_report(MODEL, msgspec.structs.replace(ENGINE, tensorrt=None)) is None
    assert memory_report(MODEL, msgspec.structs.replace(ENGINE, cost=None)) is None


def test_people_read_sizes_and_what_fits() -> None:
    report = memory_report(MODEL, ENGINE, [gpu(FIXED + 1001 * PAGE), gpu(FIXED - 2 * GIGA), gpu(GIGA)])
    assert report is not None
    lines = memory_text("rtx:sm89:bf16-int4", report, MODEL).splitlines()
    assert lines[0].startswith(
        "rtx:sm89:bf16-int4 takes 13.6 GB of a GPU: 3.0 GB weights, 8.0 GB experts, 1.0 GB vision"
    )
    assert (
        lines[1]
        == "its cache takes 4.0 kB a token, 256.0 kB a page of 64 tokens; 1 GB holds 3,906 pages, 249,984 tokens"
    )
    first, second, third = (" ".join(line.split()) for line in lines[-4:-1])
    assert first == "a GPU 13.8 GB 64,000 tokens - 22 4 at once: 50"
    assert "1 of 2 layers" in second
    assert third == "a GPU 1.0 GB does not fit - - -"
