"""Embeddings of places between those of a table."""

from torch import Tensor
from torch.nn import functional as F


def between(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """index, weight [P, n]: of each patch, rows of the table [places, H], and how much each counts; their sum [P, H].

    It is over the first axis, where ONNX Runtime adds in one order. Over the second, the order depends on whether there
    are more patches than threads.
    """
    return (F.embedding(index.transpose(0, 1), table) * weight.transpose(0, 1).unsqueeze(-1)).sum(0)
