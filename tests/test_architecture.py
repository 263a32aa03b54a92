"""Which part may know which, what importing the runtime costs, and that it works where nothing heavy is installed."""

from __future__ import annotations

import ast
import os
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moevlm.runtime

ROOT = Path(__file__).parents[1]
PARTS = ("export", "plugins", "runtime")

# Which part of the packages may import which. A row is a folder or, where a folder has two layers, one of its modules;
# a file belongs to the longest row that its name begins with. A row names only rows above it, so there are no circles.
IMPORTS: dict[str, set[str]] = {
    "runtime.core": set(),
    "runtime.bundle": {"runtime.core"},
    "runtime.request": {"runtime.core"},
    "runtime.engine": {"runtime.core", "runtime.request"},
    "runtime.backends.libraries": {"runtime.core"},
    "runtime.backends.base": {"runtime.core", "runtime.bundle", "runtime.engine"},
    "runtime.backends.ort": {
        "runtime.core",
        "runtime.bundle",
        "runtime.request",
        "runtime.engine",
        "runtime.backends.libraries",
        "runtime.backends.base",
    },
    "runtime.backends.tensorrt": {
        "runtime.core",
        "runtime.bundle",
        "runtime.request",
        "runtime.engine",
        "runtime.backends.libraries",
        "runtime.backends.base",
    },
    # The registry names the backends' modules in text: nothing imports them but by it.
    "runtime.backends": {"runtime.core", "runtime.bundle", "runtime.backends.base"},
    "runtime.perf": {
        "runtime.core",
        "runtime.request",
        "runtime.engine",
        "runtime.backends.libraries",
        "runtime.backends.tensorrt",
    },
    "runtime": {
        "runtime.core",
        "runtime.bundle",
        "runtime.request",
        "runtime.engine",
        "runtime.backends.libraries",
        "runtime.backends.base",
        "runtime.backends",
        "runtime.perf",
    },
    "runtime.cli": {
        "runtime.core",
        "runtime.bundle",
        "runtime.request",
        "runtime.engine",
        "runtime.backends.libraries",
        "runtime.backends.base",
        "runtime.backends.tensorrt",
        "runtime.backends",
        "runtime.perf",
        "runtime",
    },
    "runtime.__main__": {"runtime.cli"},
    "plugins.ops": {"runtime.core"},
    "plugins.cpu": {"runtime.core", "plugins.ops"},
    "plugins.gpu": {"runtime.core", "plugins.ops"},
    "plugins": {"runtime.core"},
    "export.config": {"runtime.core", "plugins.ops"},
    "export.checkpoint": {"runtime.core", "runtime.bundle", "runtime.request"},
    "export.graph.weights": {"runtime.core"},
    "export.graph.rearranged": {"export.graph.weights"},
    "export.graph.codes": set(),
    "export.graph.moved_codes": {"export.graph.weights", "export.graph.rearranged", "export.graph.codes"},
    "export.checkpoint.quantized": {
        "runtime.core",
        "export.checkpoint",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.graph.codes",
    },
    "export.formats": {
        "runtime.core",
        "plugins.gpu",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.graph.codes",
        "export.graph.moved_codes",
    },
    "export.families": {
        "runtime.core",
        "plugins.ops",
        "export.config",
        "export.checkpoint",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.graph.codes",
        "export.graph.moved_codes",
    },
    "export.modules": {"runtime.core", "plugins.ops", "export.config", "export.formats"},
    "export.graph": {
        "runtime.core",
        "plugins.ops",
        "export.config",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.modules",
    },
    "export.passes": {
        "runtime.core",
        "plugins.ops",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.graph.codes",
        "export.graph.moved_codes",
        "export.formats",
        "export.graph",
    },
    "export.writing": {"runtime.core", "runtime.bundle", "export.graph.weights"},
    "export.backends": {
        "runtime.core",
        "runtime.bundle",
        "runtime.backends.libraries",
        "runtime.backends.tensorrt",
        "plugins.ops",
        "plugins.cpu",
        "plugins.gpu",
        "export.config",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.graph.codes",
        "export.graph.moved_codes",
        "export.formats",
        "export.graph",
        "export.passes",
        "export.writing",
    },
    "export.model": {
        "runtime.core",
        "export.config",
        "export.checkpoint",
        "export.checkpoint.quantized",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.families",
        "export.modules",
        "export.graph",
    },
    "export.build": {
        "runtime.core",
        "runtime.bundle",
        "export.config",
        "export.checkpoint",
        "export.checkpoint.quantized",
        "export.families",
        "export.graph",
        "export.writing",
        "export.backends",
        "export.model",
    },
    "export.parity": {
        "runtime.core",
        "runtime.bundle",
        "runtime.request",
        "runtime.engine",
        "runtime.backends.ort",
        "runtime.backends",
        "runtime.perf",
        "runtime",
        "runtime.cli",
        "plugins.ops",
        "export.config",
        "export.checkpoint",
        "export.checkpoint.quantized",
        "export.graph.weights",
        "export.graph.rearranged",
        "export.formats",
        "export.families",
        "export.modules",
        "export.passes",
        "export.writing",
        "export.backends",
        "export.model",
        "export.build",
    },
    "export.dry_run": {
        "runtime.core",
        "export.checkpoint",
        "export.checkpoint.quantized",
        "export.backends",
        "export.model",
        "export.build",
    },
    "export.cli": {
        "runtime.core",
        "runtime.bundle",
        "runtime.request",
        "runtime.perf",
        "runtime.cli",
        "export.families",
        "export.passes",
        "export.backends",
        "export.build",
        "export.dry_run",
        "export.parity",
    },
    "export": set(),
}
HEAVY = ("torch", "onnx", "onnx_ir", "onnxscript", "transformers", "safetensors")
# The one place that imports ONNX Runtime: it switches the telemetry off first.
IMPORTS_ONNXRUNTIME = ROOT / "runtime/backends/ort/library.py"
MAX_LINES = 400
# Assembled, so that this file does not find itself.
MACHINE_PATHS = re.compile(
    "|".join(f"(?<![\\w.~])/{place}/" for place in ("tmp", "root", r"home/\w+", "work", "Users"))
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every absolute module name that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def row_of(module: str) -> str:
    """The row of IMPORTS that a module belongs to: runtime.core for moevlm.runtime.core.errors."""
    name = module.removeprefix("moevlm.")
    return max((row for row in IMPORTS if f"{name}.".startswith(f"{row}.")), key=len)


def module_of(path: Path) -> str:
    return ".".join(("moevlm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_the_import_table_has_no_circle_and_no_row_for_nothing() -> None:
    rows = list(IMPORTS)
    for i, row in enumerate(rows):
        assert IMPORTS[row] <= set(rows[:i]), f"{row} may import only rows above it"
    assert set(rows) == {row_of(module_of(path)) for path in sources(*PARTS)}


@pytest.mark.parametrize("part", PARTS)
def test_imports_are_those_of_the_table(part: str) -> None:
    paths = sources(part)
    assert paths
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in paths
        for name in imported(path)
        if name.startswith("moevlm.")
        and row_of(name) not in {row_of(module_of(path)), *IMPORTS[row_of(module_of(path))]}
    }
    assert not wrong


def test_no_code_but_a_backend_s_own_asks_which_backend_an_engine_has() -> None:
    """Metadata of TensorRT are read in its folders, in the manifest's own modules, and where inspect shows them all."""
    own = (
        *("runtime/backends/tensorrt/", "export/backends/tensorrt/"),
        *("runtime/core/engine_metadata", "runtime/core/manifest"),
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for path in sources(*PARTS)
        for node in ast.walk(ast.parse(path.read_text(), path))
        if isinstance(node, ast.Attribute) and node.attr == "tensorrt" and not isinstance(node.value, ast.Call)
    }
    outside = {path for path in found if not path.startswith(own)}
    assert outside == {"runtime/cli/inspect_report.py", "runtime/core/dtypes.py"}  # of a dtype: its name there


def test_heavy_packages_are_imported_by_export_only() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("runtime", "plugins")
        for name in imported(path)
        if name.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_onnxruntime_is_imported_in_one_place_only() -> None:
    found = [
        path
        for path in sources(*PARTS, "bench", "demo")
        if any(name.split(".")[0] == "onnxruntime" for name in imported(path))
    ]
    assert found == [IMPORTS_ONNXRUNTIME]


def test_parts_are_never_imported_by_their_folder_s_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(*PARTS, "tests", "bench", "demo")
        for name in imported(path)
        if name.split(".")[0] in PARTS
    ]
    assert not wrong


def run_python(code: str) -> tuple[str, float]:
    """(standard output, seconds of processor time) of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Not in the checkout, where the folders' names would be importable too.
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_importing_the_runtime_takes_less_than_300_ms() -> None:
    # Processor time, which other processes on the machine do not stretch as they do the wall's.
    importing, bare = (
        statistics.median(run_python(code)[1] for _ in range(5)) for code in ("import moevlm.runtime", "pass")
    )
    assert importing - bare < 0.3


def test_public_names_are_imported_when_asked_for() -> None:
    out, _ = run_python("""
import sys
import moevlm.runtime as runtime
print("numpy" in sys.modules, all(getattr(runtime, name).__name__ == name for name in runtime.__all__))
""")
    assert out.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'Bogus'"):
        moevlm.runtime.Bogus  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "moevlm.runtime",
        "moevlm.runtime.loading",
        "moevlm.runtime.cli.main",
        "moevlm.export.cli.build_command",
        "moevlm.export.formats.gpu_packing",
        "moevlm.export.formats.registry",
        "moevlm.plugins.gpu.ops.experts",
    ],
)
def test_importing_loads_nothing_heavy(module: str) -> None:
    out, _ = run_python(f"import sys, {module}; print(*sys.modules)")
    loaded = {name.split(".")[0] for name in out.split()}
    assert not loaded & {*HEAVY, "onnxruntime", "triton"}
    assert "moevlm" in loaded


def test_a_bundle_runs_where_only_the_runtime_s_dependencies_are_installed(tiny_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture = tmp_path / "picture.png"
    Image.new("RGB", (24, 16), "red").save(picture)
    out, _ = run_python(f"""
import sys
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import moevlm.runtime
runtime = moevlm.runtime.load({str(tiny_bundle)!r})
parts = [{{"type": "image", "image": Path({str(picture)!r})}}, {{"type": "text", "text": "Hi"}}]
pieces = list(runtime.generate([{{"role": "user", "content": parts}}], max_new_tokens=5))
print(pieces[-1].usage.new_tokens, pieces[-1].usage.image_tokens > 0)
try:
    import torch
except ModuleNotFoundError:
    print("blocked")
""")
    assert out.split() == ["5", "True", "blocked"]


def test_no_source_file_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*PARTS, "bench", "demo")}
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def tracked() -> list[Path]:
    """Files under version control, and new ones that git would not ignore."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: what is tracked is unknown")
def test_no_path_of_one_machine_is_in_the_repository() -> None:
    found = []
    paths = tracked()
    assert Path(__file__) in paths
    for path in paths:
        data = path.read_bytes()
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if MACHINE_PATHS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, os.linesep.join(found)


def test_machine_paths_are_told_from_others() -> None:
    assert MACHINE_PATHS.search("open('/" + "tmp/x')")
    assert MACHINE_PATHS.search("/" + "home/someone/x")
    assert not MACHINE_PATHS.search("https://example.org/home/page src/work/x ./tmp/x model.tmp/x")
