"""The command line of `moevlm`: a group whose commands are found by name and imported when they are called."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from typing import Any

import click

from moevlm.runtime.core.errors import MoevlmError, RefusedValue
from moevlm.runtime.core.installation import install_command

# The order of a newcomer's steps; commands of other packages follow.
_ORDER = ("doctor", "families", "build", "inspect", "parity", "run", "bench")

# Help of options that commands share.
THREADS = "Use N threads.  [default: one for each core, within a container's CPU quota]"
CACHE_MEMORY = (
    "Most memory for what requests keep between steps, such as keys and values: 800M, 1.5G.  "
    "[default: a quarter of what is free, on a GPU all]"
)
EXPERTS_IN = (
    "On a GPU, where the experts' weights lie: device, host, or host:N for those of N layers. The GPU reads the host's "
    "memory over its link, which is slow.  [default: device]"
)
SPINNING = "Keep waiting threads awake for half a millisecond: faster, and takes the cores from other processes."


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


_DEBUG = "Show tracebacks and warnings, check every graph rewrite; accepted after any command, too."


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("moevlm"), prog_name="moevlm")
@click.option("--debug", is_flag=True, help=_DEBUG)
def cli(debug: bool) -> None:  # `run` has taken --debug out of the arguments: here it only makes the help complete
    """Deploy sparse Mixture-of-Experts vision-language models: checkpoint to verified bundle to answers."""


def run(arguments: list[str]) -> Any:
    """Run a command; what it returns. Raises what click and the commands raise."""
    debug = "--debug" in arguments
    others = [argument for argument in arguments if argument != "--debug"]
    with _quiet(debug):
        try:
            return cli.main(others, prog_name="moevlm", standalone_mode=False, obj=debug)
        except RefusedValue as error:
            option = f"--{error.name.replace('_', '-')}"
            if any(argument.partition("=")[0] == option for argument in others):
                raise click.UsageError(error.named(option)) from error
            raise
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)


def usage_message(error: BaseException) -> str | None:
    """Click's message in our form, one line and, where it says no remedy, where to read more.

    None for another kind of error.
    """
    if isinstance(error, click.Abort):
        return "standard input ended"
    if not isinstance(error, click.ClickException):
        return None
    message = " ".join(error.format_message().split()).removesuffix(".")
    if message[1:2].islower():
        message = message[0].lower() + message[1:]
    if isinstance(error, click.UsageError) and error.ctx is not None and not message.endswith(")"):
        message += f" (see {error.ctx.command_path} --help)"
    return message


def require(package: str, extra: str) -> None:
    """Raise a usage error, naming what to install, unless `package` can be imported."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise click.ClickException(f"this command needs {package} ({install_command(extra)})")


def require_apart(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """Raise a usage error if a file that will be written is one that the command reads, or lies in such a folder.

    Or if two of those that will be written are one. None and "-" are no files.
    """
    written: list[Path] = []
    for output in outputs:
        if output is None or str(output) == "-":
            continue
        place = _real(output)
        for path in inputs:
            if path is not None and place.is_relative_to(_real(path)):
                where = f"lies in {path}, which" if path.is_dir() else "is a file that"
                raise click.UsageError(f"{output} {where} this command reads: choose another place")
        if place in written:
            raise click.UsageError(f"{output} would be written twice: choose two places")
        written.append(place)


def _real(path: Path) -> Path:
    """Path.resolve, without its exception for a link to itself: that is told when the path is opened."""
    return Path(os.path.realpath(path))


def complete_target(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The engines of the bundle that stands on the command line, for the shell's completion of --target."""
    from moevlm.runtime.bundle.reader import Bundle

    words = [ctx.params.get("bundle"), *ctx.args]  # an option without its value ends Click's parsing
    try:
        engines = Bundle.open(next(filter(None, words), "")).manifest.engines
    except MoevlmError:  # no bundle yet, or none that can be read: nothing to offer
        return []
    return sorted(name for name in engines if name.startswith(incomplete))


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep what libraries warn about off the screen: what matters to a user is an error, or part of the results."""
    if debug or sys.warnoptions:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
