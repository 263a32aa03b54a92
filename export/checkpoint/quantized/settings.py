"""What a checkpoint says of how its weights are stored, as far as its tensors need it.

Names, dtypes and shapes of the tensors decide how each is read; this says what they cannot: how zeros are counted, the
size of blocks, and what has to be there.
"""

from dataclasses import dataclass

from moevlm.export.checkpoint.quantized.patterns import Matches, none


@dataclass(frozen=True)
class Scheme:
    """What the config says of a module's weights; None where it says nothing. group_size: 0 for a whole row.

    scattered: groups are made of inputs in another order, so that an index has to say of which each input is.
    """

    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    scattered: bool = False


@dataclass(frozen=True)
class Settings:
    """method: as in quant_method, "" for a checkpoint that is not quantized. source: where that stands.

    block: rows and columns that share an fp8 scale. schemes: of modules, the first that fits. zero_offset: what is
    added to a zero that GPTQ stores. ignored: modules that are said not to be quantized.
    """

    method: str = ""
    source: str = ""
    block: tuple[int, int] | None = None
    schemes: tuple[tuple[Matches, Scheme], ...] = ()
    zero_offset: int = 0
    ignored: Matches = none

    def scheme(self, module: str) -> Scheme:
        """What is said of a module; nothing of one that is said not to be quantized: its tensors have the last word."""
        if self.ignored(module):
            return Scheme()
        return next((scheme for fits, scheme in self.schemes if fits(module)), Scheme())
