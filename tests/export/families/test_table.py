"""The table of families, in the README and on the command line."""

from pathlib import Path

from moevlm.export.families.table import markdown, rows
from tests.support.command_line import call

README = Path(__file__).parents[3] / "README.md"


def test_readme_has_the_table_of_the_registry() -> None:
    _, _, rest = README.read_text().partition("<!-- made by moevlm.export.families.table -->\n")
    found, _, _ = rest.partition("\n<!-- end -->")
    assert found == markdown()  # python -c "from moevlm.export.families.table import markdown; print(markdown())"


def test_command_lists_every_family_and_what_to_do_next() -> None:
    said = call("families")
    assert said.status == 0
    for model_type, checkpoints, *_ in rows():
        assert f"\n{model_type} " in said.out
        assert checkpoints.split(",")[0] in said.out
    assert said.out.rstrip().endswith("moevlm build CHECKPOINT --dry-run")
