"""The pip command for the way this package was installed, so that what an error suggests works as printed."""

import json
from importlib.metadata import distributions
from urllib.parse import unquote, urlsplit


def install_command(extra: str = "") -> str:
    """The pip command that installs this package with `extra`, from the folder, file or index it came from.

    Without an extra, the command that installs it anew: its C++ libraries are built again then.
    """
    named = f"[{extra}]" if extra else ""
    options = "" if extra else "--force-reinstall --no-deps "
    origin = _origin()
    url = str(origin.get("url", ""))
    if url.startswith("file:") and "dir_info" in origin:
        editable = "-e " if origin["dir_info"].get("editable") else ""
        return f"pip install {options}{editable}'{unquote(urlsplit(url).path)}{named}'"
    return f"pip install {options}'moevlm{named}{f' @ {url}' if url else ''}'"


def _origin() -> dict:
    """direct_url.json of the installation, as pip writes it unless the package came from an index."""
    # Several where the working directory is a clone, whose metadata of a build lies beside the installation's.
    texts = (found.read_text("direct_url.json") for found in distributions(name="moevlm"))
    return json.loads(next(filter(None, texts), "{}"))
