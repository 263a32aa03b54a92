"""How setuptools builds this package: two shared libraries that know no Python, so one wheel serves every version.

Named in pyproject.toml, [tool.setuptools.cmdclass]. Nothing here is imported once the package is installed.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

LIBRARIES = "MOEVLM_LIBRARIES"  # environment variable; "none" installs without the libraries


def _without_libraries() -> bool:
    return os.environ.get(LIBRARIES) == "none"


class Build(build):
    """Builds in a folder of its own, which goes away: a later wheel finds no module that was deleted since."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="moevlm-build-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


class BuildLibraries(build_ext):
    """Libraries are loaded by path: runtime/cpu_operators.so, without a Python version in the name."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def finalize_options(self) -> None:
        super().finalize_options()
        for ext in self.extensions:
            folder = Path(*Path(ext.sources[0]).parts[:2])
            ext.sources = sorted(map(str, folder.rglob("*.cpp")))
            ext.depends = sorted(map(str, folder.rglob("*.h")))

    def run(self) -> None:
        if not _without_libraries():
            super().run()

    def build_extension(self, ext: object) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            raise CompileError(
                f"{error}\n\nmoevlm compiles two small C++ libraries and needs g++ (Debian, Ubuntu: apt install g++). "
                f"With {LIBRARIES}=none it installs without them: the targets ort-cpu and reference run then, "
                "cpu, rtx and trt do not."
            ) from error


class Wheel(bdist_wheel):
    """Tagged py3-none-PLATFORM: the libraries depend on the platform, on no version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", "any" if _without_libraries() else super().get_tag()[2])
