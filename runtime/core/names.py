"""Names that graphs and the engines that run them share."""

CANDIDATES = 256  # tokens of a row that an engine gives
CANDIDATE_OUTPUTS = ("candidate_values", "candidate_ids", "log_sum_exp")  # of a graph that finds them itself
