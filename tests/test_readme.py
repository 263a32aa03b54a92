"""Commands of the README and the pages behind it, literally and in order, and what the commands suggest."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/service.md", "docs/gpu.md", "docs/sparsity.md")
TEXT = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if language == "" for line in block.splitlines() if line.strip()]
SKIPPED = {
    "pip install ": "needs a package index; test_packaging.py compares the extras",
    "hf download ": "needs the hub",
    "python -m demo.evaluate_bundle ": "550 questions take minutes",
}
DOCS = [path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md")]
FOLDERS = ("bench", "demo", "docs", "export", "plugins", "runtime", "tests")
FILES = [*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
ON_A_GPU = "on that GPU"  # in a line's comment


def runnable(line: str) -> bool:
    return not line.startswith(tuple(SKIPPED)) and ON_A_GPU not in line.partition("#")[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "CHECKPOINT").symlink_to(ROOT / "demo/checkpoint")
    (folder / "demo").symlink_to(ROOT / "demo")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.jpg")
    return folder


def shell(line: str, folder: Path) -> str:
    """Run one line as a user's shell would, in `folder`; its standard output."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_line_runs_in_order_and_so_does_what_it_suggests(folder: Path) -> None:
    lines = [line for line in COMMANDS if runnable(line)]
    assert any(line.startswith("moevlm build") for line in lines)
    suggested: list[str] = []
    for line in lines:
        suggested += re.findall(r"^next: (moevlm .+)$", shell(line, folder), flags=re.M)
    assert suggested
    for line in dict.fromkeys(suggested):
        shell(line.replace("FILE", "photo.jpg"), folder)


def test_python_examples_run(folder: Path) -> None:
    examples = [block for language, block in BLOCKS if language == "python"]
    assert examples
    for number, example in enumerate(examples):
        (folder / f"example{number}.py").write_text(example, encoding="utf-8")
        assert shell(f"python example{number}.py", folder).strip()


def test_what_is_skipped_is_there() -> None:
    assert [start for start in SKIPPED if not any(line.startswith(start) for line in COMMANDS)] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *sorted(map(str, DOCS))])
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(map(str, DOCS))])
def test_files_that_a_page_names_are_there(page: str) -> None:
    """By their whole name, or by its end; NAME and BACKEND stand for any."""
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    named = re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./*-]+|[\w./*-]+\.(?:py|h|cpp|toml))`", text)
    patterns = [re.sub("NAME|BACKEND", "*", name.rstrip("/")) for name in named]
    assert not [pattern for pattern in patterns if not any(path.match(pattern) for path in FILES)]


def test_every_page_can_be_found_from_the_readme() -> None:
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        seen.add(page)
        links = re.findall(r"\]\(([^)#:]+\.md)", page.read_text(encoding="utf-8"))
        left += {(page.parent / link).resolve() for link in links} - seen
    assert not {ROOT / page for page in DOCS} - seen
