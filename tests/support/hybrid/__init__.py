"""A model family made for tests, through the package's own seams: layers that differ, and one without attention.

Importing it registers `hybrid_test`: its op (recurrence), its mixer (mixer), and how its checkpoints are read (family).
"""

from tests.support.hybrid.checkpoint import save
from tests.support.hybrid.model import PlainModel

__all__ = ["PlainModel", "save"]
