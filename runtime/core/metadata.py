"""What every object of the manifest is."""

import msgspec


class Metadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Typed when it is read; an unknown field is refused."""
