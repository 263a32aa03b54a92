"""A small resampler: queries that all images share, which attend to each image's patches."""

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from moevlm.export.graph.functions import add_functions
from moevlm.export.graph.translate import Translator
from moevlm.export.graph.weights import Constant
from moevlm.export.modules import ops
from moevlm.runtime.core.towers import QueryTower

HEADS, WIDTH = 4, 64


class Resampler(nn.Module):
    def __init__(self, queries: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(queries)
        self.queries = nn.Parameter(torch.randn(queries, WIDTH, generator=draw))
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        for linear in (self.q, self.k, self.v, self.out):
            linear.weight.data = torch.randn(WIDTH, WIDTH, generator=draw) * WIDTH**-0.5

    def forward(self, patches: Tensor, image_start: Tensor) -> Tensor:
        """patches [P, WIDTH], image_start [images + 1] int32 -> [images * queries, WIDTH]."""
        y = ops.cross_attention(self.q(self.queries), self.k(patches), self.v(patches), image_start, HEADS)
        return self.out(y.view(-1, WIDTH))

    def graph(self) -> ir.Model:
        """The canonical graph, with the body of its operator."""
        inputs = {"patches": ("patches", WIDTH), "image_start": ("starts",)}
        examples = {"patches": torch.zeros(9, WIDTH), "image_start": torch.tensor([0, 4, 9], dtype=torch.int32)}
        sizes = {"patches": {0: Dim("patches", min=1)}, "image_start": {0: Dim("starts", min=3)}}
        program = torch.export.export(self, (), kwargs=examples, dynamic_shapes=sizes)
        weights = {name: Constant(one.detach().numpy()) for name, one in self.named_parameters()}
        model = Translator(program, weights).model("resampler", inputs, ("tokens",))
        add_functions(model)
        return model


def tower(queries: int) -> QueryTower:
    """The metadata of a tower that ends in one."""
    sizes = {"patch_size": 4, "merge_size": 1, "channels": 3, "head_dim": WIDTH // HEADS, "rope_theta": 0.0}
    return QueryTower(**sizes, queries=queries, side=8, position_grid=8)


def images(sizes: list[int]) -> dict[str, np.ndarray]:
    """Inputs: images of so many patches."""
    patches = np.random.default_rng(sum(sizes)).standard_normal((sum(sizes), WIDTH), np.float32)
    return {"patches": patches, "image_start": np.cumsum([0, *sizes]).astype(np.int32)}


def expected(module: Resampler, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Its tokens."""
    with torch.no_grad():
        return module(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()
