"""Writing a bundle: streamed weights, equal results, bounded memory, and nothing left behind after a failure."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import save_file

from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import Constant, PerRow, WeightTensor, cast, initializer
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.export.writing.model_file import INLINE_BYTES, PAGE
from moevlm.export.writing.streamed_file import StreamedFile
from moevlm.runtime.bundle.reader import Bundle
from moevlm.runtime.core.engine_metadata import EngineMetadata
from moevlm.runtime.core.errors import BuildError, CheckpointError, ExportError
from moevlm.runtime.core.manifest import LayerMetadata, Manifest, ModelMetadata, RopeMetadata
from moevlm.runtime.core.towers import GridTower

RNG = np.random.default_rng(11)
FLOAT = np.dtype(np.float32)
ROPE = RopeMetadata(dim=2, theta=1e4, sections=(1, 0, 0), interleaved=False)
LAYER = LayerMetadata(heads=1, kv_heads=1, key_dim=4, value_dim=4, experts=2, top_k=1)
VISION = GridTower(
    patch_size=2, temporal_patch_size=1, merge_size=1, channels=3, head_dim=2, rope_theta=1e4,
    position_grid=2, position_resampling="bilinear", deepstack=0,
)  # fmt: skip
MODEL = ModelMetadata(
    model_type="toy", hidden=4, vocabulary=8, context=16, layers=(LAYER,), eos_token_ids=(0,),
    image_token_id=1, ropes=(ROPE,), vision=VISION,
)  # fmt: skip


def manifest(*targets: str) -> Manifest:
    engines = {t: EngineMetadata(vision=f"{t}.txt", decoder=f"{t}.txt", dtype="float32", states=()) for t in targets}
    return Manifest(schema=3, model=MODEL, source={}, files={}, engines=engines, tools={})


def write_small(destination: Path, text: bytes = b"old") -> None:
    with BundleWriter(destination) as writer:
        writer.add_bytes("reference.txt", text)
        writer.commit(manifest("reference"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A bundle at the destination."""
    (tmp_path / "out").mkdir()
    write_small(tmp_path / "out" / "demo.moevlm")
    return tmp_path / "out" / "demo.moevlm"


def is_untouched(bundle: Path) -> bool:
    """Whether the old bundle is whole, and nothing lies beside it."""
    Bundle.open(bundle).verify()
    return (bundle / "reference.txt").read_bytes() == b"old" and os.listdir(bundle.parent) == [bundle.name]  # noqa: PTH208


def weights_only(**weights: WeightTensor | ir.Value) -> ir.Model:
    graph = ir.Graph([], [], nodes=[], initializers=list(weights.values()), opset_imports={"": 23}, name="weights")
    return ir.Model(graph, ir_version=11)


def matmul_chain(first: np.ndarray, second: np.ndarray, shift: np.ndarray) -> ir.Model:
    """y = local.Twice(x @ first) @ second + shift, in which Twice is a function of the model."""
    x = ir.Value(name="x", shape=ir.Shape(["n", first.shape[0]]), type=ir.TensorType(ir.DataType.FLOAT))
    weights = [initializer("first", cast(Constant(first), FLOAT)), initializer("second", Constant(second))]
    weights.append(ir.Value(name="shift", const_value=ir.tensor(shift, name="shift")))
    value = ir.Value(name="v")
    add = ir.node("Add", [value, value])
    twice = ir.Function("local", "Twice", graph=ir.Graph([value], add.outputs, nodes=[add], opset_imports={"": 23}),
                        attributes=[])  # fmt: skip
    nodes = [ir.node("MatMul", [x, weights[0]])]
    nodes.append(ir.node("Twice", nodes[-1].outputs, domain="local"))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weights[1]]))
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], weights[2]]))
    y = nodes[-1].outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n", second.shape[1]])
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 23, "local": 1}, name="chain")
    return ir.Model(graph, ir_version=11, functions=[twice], metadata_props={"family": "toy"})


def test_model_runs_in_onnxruntime_with_equal_results(tmp_path: Path) -> None:
    first = RNG.standard_normal((63, 513)).astype(ml_dtypes.bfloat16)
    second, shift = RNG.standard_normal((513, 200), dtype=np.float32), RNG.standard_normal(200, dtype=np.float32)
    model = matmul_chain(first, second, shift)
    before = [v.const_value for v in model.graph.initializers.values()]
    seen: list[tuple[int, int]] = []
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_model(model, "engines/reference/decoder.onnx", progress=lambda *at: seen.append(at))
        writer.commit(manifest())
    assert all(v.const_value is b for v, b in zip(model.graph.initializers.values(), before, strict=True))
    bundle = Bundle.open(tmp_path / "b")
    bundle.verify()
    path = bundle.path("engines/reference/decoder.onnx")
    x = RNG.standard_normal((3, 63), dtype=np.float32)
    (y,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    np.testing.assert_allclose(y, 2 * (x @ first.astype(np.float32)) @ second + shift, rtol=1e-4, atol=1e-4)

    proto = onnx.load(path, load_external_data=False)
    external = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer}
    assert external["shift"] == {}
    for name, length in (("first", 63 * 513 * 4), ("second", 513 * 200 * 4)):
        assert external[name]["location"] == "decoder.onnx.data"
        assert int(external[name]["offset"]) % PAGE == 0
        assert int(external[name]["length"]) == length
    assert [f.name for f in proto.functions] == ["Twice"]
    assert {p.key: p.value for p in proto.metadata_props} == {"family": "toy"}
    size = bundle.path("engines/reference/decoder.onnx.data").stat().st_size
    assert seen[-1] == (size, size)
    assert path.stat().st_size < 4000


def test_initializers_of_subgraphs_are_streamed_and_small_ones_stay_inline(tmp_path: Path) -> None:
    table = RNG.standard_normal((40, 50), dtype=np.float32)
    inner = initializer("table", Constant(table))
    condition = ir.Value(name="c", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    branches = []
    for name, weight in (("then", inner), ("else", initializer("zero", Constant(np.zeros((40, 50), np.float32))))):
        node = ir.node("Identity", [weight])
        branches.append(ir.Graph([], node.outputs, nodes=[node], initializers=[weight], name=name))
    chosen = ir.node("If", [condition], attributes={"then_branch": branches[0], "else_branch": branches[1]})
    y = chosen.outputs[0]
    y.name, y.type, y.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([40, 50])
    small = initializer("small", Constant(np.zeros(INLINE_BYTES // 4, np.float32)))
    graph = ir.Graph([condition], [y], nodes=[chosen], initializers=[small], opset_imports={"": 23}, name="g")
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_model(ir.Model(graph, ir_version=11), "g.onnx")
        writer.commit(manifest())
    session = onnxruntime.InferenceSession(tmp_path / "b" / "g.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {"c": np.array(True)})[0], table)
    proto = onnx.load(tmp_path / "b" / "g.onnx", load_external_data=False)
    assert len(proto.graph.initializer[0].raw_data) == INLINE_BYTES


def test_shared_weight_is_written_once(tmp_path: Path) -> None:
    weight = Constant(RNG.standard_normal((100, 100), dtype=np.float32))
    model = weights_only(a=initializer("a", weight), b=initializer("b", weight))
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_model(model, "g.onnx")
        writer.commit(manifest())
    assert (tmp_path / "b" / "g.onnx.data").stat().st_size == 40_000
    for tensor in onnx.load(tmp_path / "b" / "g.onnx").graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), weight.array)


@pytest.mark.parametrize("direct", [True, False])
def test_file_written_in_odd_pieces_has_their_bytes_and_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    monkeypatch.setattr("moevlm.export.writing.streamed_file._BLOCK_BYTES", 4 * PAGE)
    monkeypatch.setattr("moevlm.export.writing.streamed_file._SYNC_BYTES", 8 * PAGE)
    if not direct:
        monkeypatch.setattr("moevlm.export.writing.streamed_file._DIRECT", 0)
    pieces = [RNG.integers(0, 256, size, dtype=np.uint8) for size in (1, 5 * PAGE, 4 * PAGE - 1, 0, 31, 50 * PAGE + 7)]
    file = StreamedFile(tmp_path / "f")
    for piece in pieces:
        file.write(piece)
    metadata = file.close()
    expected = b"".join(piece.tobytes() for piece in pieces)
    assert (tmp_path / "f").read_bytes() == expected
    assert (metadata.sha256, metadata.size) == (hashlib.sha256(expected).hexdigest(), len(expected))


def test_new_bundle_replaces_the_old_one_whole(old: Path) -> None:
    with BundleWriter(old) as writer:
        writer.add_bytes("ort-cpu.txt", b"new")
        assert writer.commit(manifest("ort-cpu")) == old
    Bundle.open(old).verify()
    assert sorted(p.name for p in old.iterdir()) == ["manifest.json", "ort-cpu.txt"]
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_target_is_added_to_an_existing_bundle_without_rewriting_what_is_there(old: Path) -> None:
    existing = Bundle.open(old)
    inode = (old / "reference.txt").stat().st_ino
    with BundleWriter(old) as writer:
        writer.add_bytes("ort-cpu.txt", b"new")
        writer.keep(existing)
        writer.commit(manifest("reference", "ort-cpu"))
    bundle = Bundle.open(old)
    bundle.verify()
    assert set(bundle.manifest.engines) == {"reference", "ort-cpu"}
    assert (old / "reference.txt").stat().st_ino == inode
    assert (old / "reference.txt").stat().st_nlink == 1
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_damage_in_a_kept_file_is_still_found(old: Path) -> None:
    (old / "reference.txt").write_bytes(b"0ld")
    existing = Bundle.open(old)
    with BundleWriter(old) as writer:
        writer.keep(existing, ["reference.txt"])
        writer.commit(manifest("reference"))
    with pytest.raises(Exception, match=r"reference\.txt"):
        Bundle.open(old).verify()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EIO, "x")])
def test_exception_leaves_the_old_bundle_and_nothing_else(old: Path, error: BaseException) -> None:
    def fail() -> None:
        with BundleWriter(old) as writer:
            writer.add_bytes("a/b/new.txt", b"new")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert is_untouched(old)


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), CheckpointError("x")])
def test_exception_while_streaming_leaves_nothing(old: Path, error: BaseException) -> None:
    source = Constant(np.zeros((64, 1 << 18), np.float32))
    calls = []

    def function(array: np.ndarray) -> np.ndarray:
        calls.append(len(array))
        if len(calls) == 4:
            raise error
        return array

    model = weights_only(w=initializer("w", PerRow(source, source.array.shape, FLOAT, function)))
    with pytest.raises(type(error)), BundleWriter(old) as writer:
        writer.add_model(model, "g.onnx")
    assert is_untouched(old)
    assert isinstance(model.graph.initializers["w"].const_value, WeightTensor)


def test_without_commit_nothing_is_written(old: Path) -> None:
    for destination in (old, old.parent / "fresh"):
        with BundleWriter(destination) as writer:
            writer.add_bytes("new.txt", b"new")
    assert is_untouched(old)


def test_weight_that_yields_other_bytes_than_it_says_is_an_error(old: Path) -> None:
    source = Constant(np.zeros((64, 64), np.float32))
    for function in (lambda a: a.astype(np.float64), lambda a: a[:, :3]):
        model = weights_only(w=initializer("w", PerRow(source, (64, 64), FLOAT, function)))
        with pytest.raises(ExportError, match="initializer w"), BundleWriter(old) as writer:
            writer.add_model(model, "g.onnx")
    assert is_untouched(old)


@pytest.mark.parametrize("name", ["../x", "/x", "", "a//b", "manifest.json", "twice.txt"])
def test_path_outside_the_bundle_or_taken_is_refused(old: Path, name: str) -> None:
    with pytest.raises(BuildError, match="not a new path"), BundleWriter(old) as writer:
        writer.add_bytes("twice.txt", b"1")
        writer.add_bytes(name, b"2")
    assert is_untouched(old)


def test_engine_without_its_graph_is_refused(old: Path) -> None:
    with pytest.raises(BuildError, match=r"engine ort-cpu names ort-cpu\.txt"), BundleWriter(old) as writer:
        writer.commit(manifest("ort-cpu"))
    assert is_untouched(old)


@pytest.mark.parametrize("content", [None, '{"name": "a web app"}', "not json"])
def test_destination_that_is_not_a_bundle_is_refused_and_kept(tmp_path: Path, content: str | None) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("mine")
    if content is not None:
        (work / "manifest.json").write_text(content)
    with pytest.raises(BuildError, match="exists and is not a bundle"):
        write_small(work)
    assert (work / "thesis.txt").read_text() == "mine"
    with pytest.raises(BuildError, match="exists and is not a bundle"):
        write_small(work / "thesis.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_missing_parent_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="No such file or directory"):
        write_small(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_leavings_of_a_killed_writer_are_removed_but_not_those_of_a_living_one(old: Path) -> None:
    dead = old.with_name(f".{old.name}.0badcafe.partial")
    dead.mkdir()
    (dead / "weights").write_bytes(b"x")
    os.utime(dead, (1e9, 1e9))
    with BundleWriter(old) as living:
        living.add_bytes("reference.txt", b"living")
        (hidden,) = old.parent.glob(f".{old.name}.*.partial")
        os.utime(hidden, (1e9, 1e9))
        write_small(old, b"between")
        assert hidden.is_dir()
        living.commit(manifest("reference"))
    assert (old / "reference.txt").read_bytes() == b"living"
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_without_an_atomic_exchange_the_old_bundle_comes_back_on_failure(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())  # a C library without renameat2
    write_small(old, b"second")
    assert (old / "reference.txt").read_bytes() == b"second"
    write_small(old)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if target == old and self.suffix == ".partial":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match="Input/output error"):
        write_small(old, b"third")
    assert is_untouched(old)


# From here on in processes of their own: limits, signals and peak memory belong to a process.

STREAM = """
import json, resource, signal, sys, time
from pathlib import Path
import numpy as np, onnx_ir as ir
from moevlm.export.writing.bundle_writer import BundleWriter
from moevlm.export.checkpoint.directory import Checkpoint
from moevlm.export.graph.weights import cast, initializer
from moevlm.runtime.core.errors import MoevlmError

def stream(checkpoint, destination, progress=None):
    weights = Checkpoint.open(checkpoint).tensors
    values = [initializer(name, cast(weight, np.dtype(np.float32))) for name, weight in weights.items()]
    graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 23}, name="weights")
    with BundleWriter(destination) as writer:
        writer.add_model(ir.Model(graph, ir_version=11), "weights.onnx", progress)

checkpoint, destination = Path(sys.argv[1]), Path(sys.argv[2])
"""


def python(body: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", STREAM + textwrap.dedent(body), *map(str, arguments)]


def save_checkpoint(directory: Path, megabytes: int) -> Path:
    """bf16 tensors of 16 MB each, one after the other, so that making it needs little memory."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    shards = {}
    block = RNG.standard_normal((8, 1 << 20), dtype=np.float32).astype(ml_dtypes.bfloat16)
    for number in range(megabytes // 16):
        name = f"t{number}"
        save_file({name: block}, directory / f"{name}.safetensors")
        shards[name] = f"{name}.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return directory


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 304 MB: 608 MB as float32."""
    yield save_checkpoint(tmp_path_factory.mktemp("big") / "m", 304)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_half_way_leaves_the_old_bundle_and_nothing_else(old: Path, big: Path, kind: signal.Signals) -> None:
    body = """
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            stream(checkpoint, destination, lambda done, total: print(done, total, flush=True))
        except KeyboardInterrupt:
            sys.exit(130)
        print("finished")
    """
    process = subprocess.Popen(python(body, big, old), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        done, total = map(int, line.split())
        if done > total // 4:
            break
    assert len(list(old.parent.iterdir())) == 2  # the work in progress lies beside the old bundle
    process.send_signal(kind)
    rest, _ = process.communicate(timeout=50)
    assert process.returncode == 128 + kind
    assert "finished" not in rest
    assert is_untouched(old)


def test_file_size_limit_half_way_is_one_line_and_leaves_nothing(old: Path, big: Path) -> None:
    body = """
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, 50_000_000))
        try:
            stream(checkpoint, destination)
        except MoevlmError as error:
            print(type(error).__name__, error)
    """
    done = subprocess.run(python(body, big, old), capture_output=True, text=True, check=True)
    assert done.stdout == f"BuildError cannot write {old}/weights.onnx.data: File too large\n"
    assert is_untouched(old)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system, to fill it")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def test_disk_that_fills_up_half_way_says_so_and_leaves_nothing(small_disk: Path) -> None:
    destination, other = small_disk / "demo", small_disk / "other.bin"
    write_small(destination)
    source = Constant(np.zeros((16, 1 << 18), np.float32))  # 16 MiB fit when it begins

    def function(array: np.ndarray) -> np.ndarray:
        other.write_bytes(bytes(12 << 20))  # someone else's file
        return array

    model = weights_only(w=initializer("w", PerRow(source, source.array.shape, FLOAT, function)))
    message = r"weights\.onnx\.data: the disk is full \(16777216 bytes needed, \d+ free\)"
    with pytest.raises(BuildError, match=message), BundleWriter(destination) as writer:
        writer.add_model(model, "weights.onnx")
    other.unlink()
    assert is_untouched(destination)


def test_disk_too_small_is_refused_before_anything_is_read(small_disk: Path) -> None:
    write_small(small_disk / "demo")
    source = Constant(np.zeros((32, 1 << 18), np.float32))
    read: list[int] = []
    model = weights_only(w=initializer("w", PerRow(source, source.array.shape, FLOAT, lambda a: read.append(1) or a)))
    with pytest.raises(BuildError, match="33554432 bytes needed"), BundleWriter(small_disk / "demo") as writer:
        writer.add_model(model, "weights.onnx")
    assert not read
    assert is_untouched(small_disk / "demo")


def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    body = """
        stream(checkpoint, destination)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    peaks = []
    for megabytes in (64, 640):
        checkpoint = save_checkpoint(tmp_path / f"m{megabytes}", megabytes)
        done = subprocess.run(python(body, checkpoint, tmp_path / "b"), capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert abs(peaks[1] - peaks[0]) < 64, peaks


def test_streamed_checkpoint_equals_its_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "m", 32))
    model = weights_only(**{n: initializer(n, cast(w, FLOAT)) for n, w in checkpoint.tensors.items()})
    with BundleWriter(tmp_path / "b") as writer:
        writer.add_model(model, "g.onnx")
        writer.commit(msgspec.structs.replace(manifest(), source=checkpoint.fingerprint()))
    Bundle.open(tmp_path / "b").verify()
    for tensor in onnx.load(tmp_path / "b" / "g.onnx").graph.initializer:
        expected = checkpoint.weight(tensor.name)
        array = onnx.numpy_helper.to_array(tensor)
        np.testing.assert_array_equal(array, expected.rows(0, expected.shape[0]).astype(np.float32))
