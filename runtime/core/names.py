"""Names that graphs and the engines that run them share."""

# Ops that are TensorRT plugins; the library of plugins has the same list.
PLUGINS = (
    *("MoERouter", "MoEExperts", "PagedAttention", "SegmentAttention", "CrossAttention"),
    *("GatedDelta", "Candidates"),
)
CANDIDATES = 256  # tokens of a row that an engine gives
CANDIDATE_OUTPUTS = ("candidate_values", "candidate_ids", "log_sum_exp")  # of a graph that finds them itself
