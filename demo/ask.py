"""Ask a bundle of the demo checkpoint about the sample images, and a few small text tasks, streaming the answers.

python -m demo.ask BUNDLE [--target T]
"""

import json
from pathlib import Path
from typing import Any

import click

import moevlm.runtime

SAMPLES = Path(__file__).parent / "samples"
TEXTS = (
    "Translate to Chinese: three hundred and five",
    "Translate to English: 四十二",
)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Which engine of the bundle.")
def main(bundle: Path, target: str | None) -> None:
    """Answer the questions of demo/samples/samples.json and mark each answer."""
    runtime = moevlm.runtime.load(bundle, target)
    right = asked = 0
    for sample in json.loads((SAMPLES / "samples.json").read_text()):
        image = SAMPLES / sample["image"]
        click.secho(f"\ndemo/samples/{sample['image']}", bold=True)
        for row in sample["digits"]:
            click.secho("    " + " ".join(map(str, row)), dim=True)
        for entry in sample["questions"]:
            content = [{"type": "image", "image": image}, {"type": "text", "text": entry["question"]}]
            right += _ask(runtime, content, entry["question"], entry["answer"])
            asked += 1
    click.secho("\ntext alone", bold=True)
    for text in TEXTS:
        _ask(runtime, text, text, None)
    click.echo(f"\n{right} of {asked} answers about the images are right")


def _ask(runtime: Any, content: Any, question: str, expected: str | None) -> bool:
    """Stream one answer after its question; returns whether it is the expected one."""
    click.echo(f"  {question}  ", nl=False)
    answer = ""
    for piece in runtime.generate([{"role": "user", "content": content}], max_new_tokens=96):
        answer += piece.text
        click.secho(piece.text, fg="cyan", nl=False)
    verdict = "" if expected is None else "  (right)" if answer == expected else f"  (it is: {expected})"
    click.secho(verdict, dim=True)
    return answer == expected


if __name__ == "__main__":
    main()
