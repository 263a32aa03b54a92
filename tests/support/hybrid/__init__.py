"""A model family made for tests, through the package's own seams: layers that differ, and one without attention.

Importing it registers its op (recurrence) and its mixer (mixer). The fixture `hybrid_family` registers how its
checkpoints are read (family) for a module's tests, as others list all families.
"""

from tests.support.hybrid.checkpoint import save
from tests.support.hybrid.model import PlainModel

__all__ = ["PlainModel", "save"]
