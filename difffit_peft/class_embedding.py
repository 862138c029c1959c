"""Trainable rows of a frozen class table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layer import DiffFitLayer


class DiffFitEmbedding(DiffFitLayer):
    """δ on rows of a class table: rows 0..K-1, the new domain's classes, and the last row, the null class.

    The table keeps its size, so that the null class stays where `DiTPipeline` looks for it. Other rows are the base's.
    `difffit_delta[name]` has shape (K + 1, channels), the null row last. There is no γ.
    """

    def update_layer(
        self, adapter_name: str, num_classes: int | None, init_class_rows: str, init_weights: bool
    ) -> None:
        """Adds an adapter of K = `num_classes` classes, or of all the table's.

        With `init_class_rows="null"` (and `num_classes`) every class starts from the null row, else from its own.
        """
        table = self.get_base_layer().weight
        rows = len(table) if num_classes is None else num_classes + 1
        delta = torch.zeros(rows, table.shape[1]) if init_weights else torch.randn(rows, table.shape[1])
        if init_weights and num_classes is not None and init_class_rows == "null" and not table.is_meta:
            delta[:-1] = table[-1].detach().float() - table[:num_classes].detach().float()
        self.difffit_delta[adapter_name] = nn.Parameter(delta)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, labels: Tensor) -> Tensor:
        """labels: integers of any shape. Returns that shape and (channels,)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(labels)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name in self.difffit_delta:
                delta = self.composed_delta([name])
                null = len(delta) - 1
                row = torch.where(labels < null, labels, null)
                trained = (labels < null) | (labels == self.get_base_layer().num_embeddings - 1)
                y = y + (F.embedding(row, delta) * trained.unsqueeze(-1)).to(y.dtype)
        return y

    def _merged(self, base: dict[str, Tensor], adapters: list[str]) -> dict[str, Tensor]:
        table = base["weight"].float().clone()
        for name in adapters:
            if name in self.difffit_delta:
                delta = self.composed_delta([name]).detach().float()
                table[: len(delta) - 1] += delta[:-1]
                table[-1] += delta[-1]
        return {"weight": table}
