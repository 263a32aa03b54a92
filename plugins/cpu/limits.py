"""The largest sizes that the operators of moevlm.cpu take: plugins/cpu/sizes.h for Python."""

HEADS = 1024
KEY_DIM, VALUE_DIM = 576, 512  # of PagedAttention's heads, and even
HEAD_DIM = 1 << 14  # of HeadLinear, in and out
DELTA_DIM = 256  # of keys and values of GatedDelta, and even
CONVOLUTION = 16  # tokens that it sees
WIDTH = 1 << 24  # of a row of activations or of a weight: hidden and intermediate sizes, projections, vocabularies
EXPERTS = 4096  # of a layer; a token may choose any number of them
CANDIDATES = 4096  # of a row of logits
