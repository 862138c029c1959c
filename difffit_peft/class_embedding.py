"""Trainable rows of a frozen class table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DiffFitConfig
from .layer import DiffFitLayer


class DiffFitEmbedding(DiffFitLayer):
    """δ on rows of a class table: rows 0..K-1, the new domain's classes, and the last row, the null class.

    The table keeps its size, so that the null class stays where `DiTPipeline` looks for it. Other rows are the base's.
    `difffit_delta[name]` has shape (K + 1, channels), the null row last. There is no γ.
    """

    def update_layer(self, adapter_name: str, config: DiffFitConfig, gamma: bool = False, delta: bool = True) -> None:
        """Adds an adapter of K = `config.num_classes` classes, or of all the table's.

        Where K is given and `config.init_class_rows` is "null", each class starts from the null row, else from its own.
        """
        table, classes = self.get_base_layer().weight.detach(), config.num_classes
        shape = (len(table) if classes is None else classes + 1, table.shape[1])
        rows = torch.zeros(shape) if config.init_weights else torch.randn(shape)
        if config.init_weights and classes is not None and config.init_class_rows == "null" and not table.is_meta:
            rows[:-1] = table[-1].float() - table[:classes].float()
        self.difffit_delta[adapter_name] = nn.Parameter(rows)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def forward(self, labels: Tensor) -> Tensor:
        """labels: integers of any shape. Returns that shape and (channels,)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        y = self.base_layer(labels)
        if self.disable_adapters or self.merged:
            return y
        for rows in self._rows(self.active_adapters):
            null = len(rows) - 1
            trained = (labels < null) | (labels == self.get_base_layer().num_embeddings - 1)
            delta = F.embedding(torch.where(labels < null, labels, null), rows)
            y = y + (delta * trained.unsqueeze(-1)).to(y.dtype)
        return y

    def _merged(self, base: dict[str, Tensor], adapters: list[str]) -> dict[str, Tensor]:
        table = base["weight"].float().clone()
        for rows in self._rows(adapters):
            table[: len(rows) - 1] += rows[:-1].detach().float()
            table[-1] += rows[-1].detach().float()
        return {"weight": table}

    def _rows(self, adapters: list[str]) -> list[Tensor]:
        """The rows of each adapter, (K + 1, channels), at its strength."""
        return [self._at_strength(self.difffit_delta, name, 0) for name in adapters if name in self.difffit_delta]
