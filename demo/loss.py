"""The training loss: answers, expert balance, and what the vision tower sees in each cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from demo.images import CELL
from demo.model import VISION

TOKENS = CELL // (VISION["patch_size"] * VISION["spatial_merge_size"])  # merged tokens per side
CELL_WEIGHT = 0.3
CELL_CLASSES = (10, 3, 5)  # digit, row, column


class Objective(nn.Module):
    """The model with a throw-away head that names the digit, row and column of each cell.

    The head gives the vision tower a direct signal: without it the tower learns only through
    a decoder that does not yet know where to look.
    """

    def __init__(self, model: Qwen3VLMoeForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.cell_head = nn.Linear(VISION["out_hidden_size"], sum(CELL_CLASSES))

    def cells(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """Loss of the head, and the vision tower's outputs for the decoder."""
        seen = self.model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
        side = VISION["spatial_merge_size"] * TOKENS
        tokens_of_cell = [
            tokens.view(h // side, TOKENS, w // side, TOKENS, -1).mean((1, 3)).flatten(0, 1)
            for tokens, (_, h, w) in zip(seen.pooler_output, batch["image_grid_thw"].tolist(), strict=True)
        ]
        logits = self.cell_head(torch.cat(tokens_of_cell)).split(CELL_CLASSES, dim=1)
        parts = [
            F.cross_entropy(part, wanted, label_smoothing=0.05)
            for part, wanted in zip(logits, batch["cells"].T, strict=True)
        ]
        return torch.stack(parts).sum(), {"image": seen}

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the losses: answer, balance, cell, and their weighted total."""
        cell, seen = torch.zeros(()), dict[str, Any]()
        if "pixel_values" in batch:
            cell, seen = self.cells(batch)
        out = self.model.model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            mm_token_type_ids=batch["mm_token_type_ids"],
            image_grid_thw=batch.get("image_grid_thw"),
            mm_encoder_outputs=seen,
            use_cache=False,
            output_router_logits=True,
        )
        wanted = batch["answer"][:, 1:]
        logits = self.model.lm_head(out.last_hidden_state[:, :-1][wanted])
        answer = F.cross_entropy(logits, batch["input_ids"][:, 1:][wanted])
        text = self.model.config.text_config
        # Layer by layer: pooled over layers, as transformers has it, two imbalances can cancel.
        balance = torch.stack(
            [
                load_balancing_loss_func((gate,), text.num_experts, text.num_experts_per_tok, batch["attention_mask"])
                for gate in out.router_logits
            ]
        ).mean()
        total = answer + text.router_aux_loss_coef * balance + CELL_WEIGHT * cell
        return {"total": total, "answer": answer, "balance": balance, "cell": cell}
