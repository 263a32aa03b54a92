"""A 16-bit file of llama.cpp to Q4_0 or Q8_0, all matrices alike.

python -m bench.peers.llama_cpp_quantize SOURCE DESTINATION BITS
"""

import ctypes
import sys
from pathlib import Path

import llama_cpp as lib

TYPES = {4: lib.LLAMA_FTYPE_MOSTLY_Q4_0, 8: lib.LLAMA_FTYPE_MOSTLY_Q8_0}


def quantize(source: Path, destination: Path, bits: int) -> None:
    """pure: without it the output matrix of a Q4_0 file is Q6_K, which is slower."""
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.pure = TYPES[bits], True
    partial = destination.with_suffix(".partial")
    if lib.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp did not quantize {source}")
    partial.rename(destination)


if __name__ == "__main__":
    quantize(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
