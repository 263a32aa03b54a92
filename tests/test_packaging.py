"""The wheel: what is in it, and that it works in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from email import message_from_bytes
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path

import pytest

from moevlm.runtime.backends.libraries import OPERATORS, PLUGIN

ROOT = Path(__file__).parents[1]
PARTS = ("export", "plugins", "runtime")
EXTRAS = {"cpu", "dev", "plot", "export", "kernels", "rtx", "trt", "video"}
COMMANDS = {"bench", "build", "families", "doctor", "inspect", "parity", "run"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.so")
    for name in (*PARTS, "tests", "bench", "demo"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for part in PARTS:  # what must not come along
        (source / part / "test_stray.txt").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", source, "-w", folder]
    _run(*command, "--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    (built,) = folder.glob("*.whl")
    return built


def _run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_has_every_module_and_the_type_marker_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {f"moevlm/{path.relative_to(ROOT).as_posix()}" for part in PARTS for path in (ROOT / part).rglob("*.py")}
    libraries = {f"moevlm/runtime/{name}.so" for name in (OPERATORS, PLUGIN)}
    data = {"moevlm/runtime/py.typed", "moevlm/plugins/gpu/tiles.json", "moevlm/export/families/measured.json"}
    assert names == modules | libraries | data
    assert "moevlm/__init__.py" not in names  # a namespace: other wheels may add parts


def test_wheel_is_for_every_python_and_its_build_leaves_nothing_behind(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    assert wheel.name.endswith(f"{sysconfig.get_platform().replace('-', '_').replace('.', '_')}.whl")
    left = {path.name for path in (wheel.parent / "source").iterdir()} - {
        *PARTS, "pyproject.toml", "README.md", "LICENSE", "tests", "bench", "demo", "moevlm.egg-info",
    }  # fmt: skip
    assert not left
    assert not list((wheel.parent / "source").rglob("*.so"))


def test_without_a_compiler_the_installation_fails_and_says_what_to_install(wheel: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", wheel.parent / "source", "-w", tmp_path]
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    nowhere = os.environ | {"CC": "no-such-gcc", "CXX": "no-such-g++"}
    done = subprocess.run([*build, *offline], capture_output=True, text=True, env=nowhere)
    assert done.returncode != 0
    assert "needs g++" in done.stdout + done.stderr
    assert "MOEVLM_LIBRARIES=none" in done.stdout + done.stderr
    bare = nowhere | {"MOEVLM_LIBRARIES": "none"}
    done = subprocess.run([*build, *offline], capture_output=True, text=True, env=bare)
    assert done.returncode == 0, done.stderr
    (plain,) = tmp_path.glob("*-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(plain).namelist() if name.endswith(".so")]


def test_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 1_400_000


def test_extras_are_those_that_the_readme_installs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    readme = (ROOT / "README.md").read_text()
    named = {extra for extras in re.findall(r"(?:moevlm|\.)\[([\w, ]+)\]", readme) for extra in re.split(", *", extras)}
    assert named <= EXTRAS
    assert "cpu" in named


def test_entry_points_name_what_exists(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        points = ConfigParser()
        points.read_string(archive.read(name).decode())
    assert set(points["moevlm.commands"]) == COMMANDS
    assert set(points["console_scripts"]) == {"moevlm"}
    for target in (*points["moevlm.commands"].values(), *points["console_scripts"].values()):
        module, _, attribute = target.partition(":")
        assert callable(getattr(import_module(module), attribute)), target


def test_installed_metadata_is_that_of_the_sources(wheel: Path) -> None:
    """An editable install keeps the entry points of the day it was made: then this says to make it again."""
    installed = {point.name: point.value for point in distribution("moevlm").entry_points}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        points = ConfigParser()
        points.read_string(archive.read(name).decode())
    assert installed == dict(points["moevlm.commands"]) | dict(points["console_scripts"]), "pip install -e . again"


def test_installed_wheel_shows_a_bundle(wheel: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin/python"
    packages = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"))
    # The dependencies come from here, by a plain path: editable installs, this package's too, are not followed.
    (packages / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    install = [sys.executable, "-m", "pip", "--python", python, "install", wheel]
    _run(*install, "--no-deps", "--no-index", "--disable-pip-version-check")
    where = _run(python, "-c", "import moevlm.runtime, moevlm.export; print(moevlm.runtime.__file__)")
    assert Path(where.strip()).is_relative_to(environment)
    command = environment / "bin/moevlm"
    assert _run(command, "--version") == f"moevlm, version {distribution('moevlm').version}\n"
    assert set(re.findall(r"^  (\w+)  ", _run(command, "--help").split("Commands:")[1], flags=re.M)) == COMMANDS
    report = json.loads(_run(command, "inspect", tiny_bundle, "--json"))
    assert [engine["target"] for engine in report["engines"]] == ["ort-cpu", "reference"]
