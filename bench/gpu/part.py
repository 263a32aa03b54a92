"""One part of the check, in a process of its own: `python -m bench.gpu.part NAME OUTPUT SECONDS [option=value ...]`.

Each entry becomes a line of JSON in OUTPUT as soon as it is known, so what a crash leaves can still be read. After so
many seconds no further entry is begun.
"""

import importlib
import json
import sys
import time
import traceback
from pathlib import Path


def main(name: str, output: str, seconds: str, *options: str) -> int:
    """Run `bench.gpu.<name>`'s `run(**options)`, options being integers. Returns the exit status."""
    until = time.monotonic() + float(seconds)
    with Path(output).open("w") as file:

        def write(entry: dict[str, object]) -> None:
            print(json.dumps({**entry, "part": name}), file=file, flush=True)

        try:
            run = importlib.import_module(f"bench.gpu.{name}").run
            for entry in run(**{key: int(value) for key, value in (option.split("=") for option in options)}):
                write(entry)
                if name != "facts":
                    print(f"{name}: {summary(entry)}", file=sys.stderr, flush=True)
                if time.monotonic() > until:
                    write({"kind": name, "stopped": f"after {float(seconds):.0f} s"})
                    break
        except Exception as error:
            text = " ".join(str(error).split())[:500]
            write({"kind": name, "error": f"{type(error).__name__}: {text}", "trace": traceback.format_exc()})
            traceback.print_exc()
            return 1
    return 0


def summary(entry: dict[str, object]) -> str:
    """An entry in one short line."""
    skipped = ("kind", "trace")
    parts = (
        f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in entry.items() if key not in skipped
    )
    return " ".join(parts)[:200]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
