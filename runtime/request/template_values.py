"""Values of a chat template that Jinja makes: namespaces, and what stands for a name that there is not."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.utils
from jinja2.exceptions import SecurityError

from moevlm.runtime.core.errors import BundleError


class Namespace(jinja2.utils.Namespace):
    """Attributes that start with an underscore are Python's, and closed to a template."""

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # what it holds may hold it


class Undefined(jinja2.Undefined):
    """May be tested, as templates do, but not printed: "" in its place would be a prompt nobody was trained on."""

    def __init__(
        self,
        hint: str | None = None,
        obj: Any = jinja2.utils.missing,
        name: str | None = None,
        exc: type[Exception] = jinja2.UndefinedError,
    ) -> None:
        # A variable is the template's own mistake; a missing element may be the messages'.
        super().__init__(hint, obj, name, BundleError if obj is jinja2.utils.missing else exc)  # type: ignore[arg-type]

    def __str__(self) -> str:
        raise BundleError(self._undefined_message)
