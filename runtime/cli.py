"""The `moevlm` command: a group whose commands are found by name and imported when they are called."""

import os
import signal
import sys
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import click

from moevlm.runtime.errors import MoevlmError

# The order of a newcomer's steps; commands of other packages follow.
_ORDER = ("export", "build", "inspect", "parity", "run", "bench")


class _Commands(click.Group):
    """Commands are entry points of the group moevlm.commands, so the runtime imports nothing above it."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        found = _entry_points()
        return [name for name in _ORDER if name in found] + sorted(set(found) - set(_ORDER))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        entry = _entry_points().get(name)
        return None if entry is None else entry.load()


def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group="moevlm.commands")}


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("moevlm"), prog_name="moevlm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Deploy sparse Mixture-of-Experts vision-language models: checkpoint to verified bundle to answers."""


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. A mistake of the user's is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # A service manager's stop is an exception like Ctrl-C's, so that half-written output is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return cli.main(arguments, prog_name="moevlm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: nothing was left half-written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MoevlmError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


def require(package: str, extra: str) -> None:
    """Raise a usage error, naming what to install, unless `package` can be imported."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise click.ClickException(f"this command needs {package} (pip install 'moevlm[{extra}]')")
