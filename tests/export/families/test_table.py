"""The table of families, in the README and on the command line."""

import json
from pathlib import Path

from moevlm.export.families import table
from moevlm.export.families.base import families
from moevlm.export.families.table import markdown, rows
from tests.support.command_line import call
from tests.support.families import TINY

MEASURED = Path(table.__file__).with_name("measured.json")
README = Path(__file__).parents[3] / "README.md"


def test_readme_has_the_table_of_the_registry() -> None:
    _, _, rest = README.read_text().partition("<!-- made by moevlm.export.families.table -->\n")
    found, _, _ = rest.partition("\n<!-- end -->")
    assert found == markdown()  # python -c "from moevlm.export.families.table import markdown; print(markdown())"


def test_every_family_was_held_to_transformers_in_all_its_tiny_models() -> None:
    measured = json.loads(MEASURED.read_text())  # python -m tests.measure_families
    assert measured.keys() == TINY.keys() == families().keys()
    for model_type, found in measured.items():
        assert found["configurations"] == len(TINY[model_type].configurations) >= 4, model_type
        assert found["difference"] < 1e-4, model_type
        assert {"reference", "ort-cpu", "cpu:int8", "cpu:int4", "rtx:sm89:bf16"} == set(found["targets"]), model_type


def test_command_lists_every_family_and_what_to_do_next() -> None:
    said = call("families")
    assert said.status == 0
    for model_type, checkpoints, *others in rows():
        first, *told = said.out.partition(f"{model_type}  ")[2].splitlines()[:5]
        assert first == checkpoints
        assert [line.partition(": ")[2] for line in told] == others
    assert said.out.rstrip().endswith("moevlm build CHECKPOINT --dry-run")
