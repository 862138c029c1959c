"""Trainable rows of a frozen class table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DiffFitConfig
from .layer import DiffFitLayer, Entry, names_in


class DiffFitEmbedding(DiffFitLayer):
    """δ on rows of a class table: rows 0..K-1, the new domain's classes, and the last row, the null class.

    The table keeps its size, so that the null class stays where pipelines look for it. Other rows are the base's.
    `difffit_delta[name]` has shape (K + 1, channels), the null row last: what each row differs by from the base's row
    of the same index. So the rule of `DiffFitLayer` holds for rows too: scale 0 is the base's row, and adapters of
    scales 0.8 and 0.2 blend their classes of one index. There is no γ.
    """

    @staticmethod
    def shapes(layer: nn.Module, config: DiffFitConfig, **target: Any) -> dict[str, tuple[int, ...]]:
        rows = layer.num_embeddings if config.num_classes is None else config.num_classes + 1
        return {"difffit_delta": (rows, layer.embedding_dim)}

    def update_layer(self, adapter_name: str, config: DiffFitConfig, **target: Any) -> None:
        """Adds an adapter of K = `config.num_classes` classes, or of all the table's.

        Where K is given, each class starts where `config.init_class_rows` says.
        """
        super().update_layer(adapter_name, config, **target)
        table, classes, start = self._base()["weight"], config.num_classes, config.init_class_rows
        if config.init_weights and classes is not None and start != "base" and not table.is_meta:
            rows = [-1] if start == "null" else start
            self.difffit_delta[adapter_name].data[:-1] = table[rows].float() - table[:classes].float()

    def blend(self, adapter_name: str, weights: dict[str, float]) -> None:
        if adapter_name not in self.difffit_delta:
            return
        blended = self.difffit_delta[adapter_name].data.zero_()
        for name in weights.keys() & self.difffit_delta.keys():
            rows = weights[name] * self.difffit_delta[name].data
            blended[: len(rows) - 1] += rows[:-1]
            blended[-1] += rows[-1]

    def _adapted(self, x: Tensor, adapter_names: list[Entry] | None, *args: Any, **kwargs: Any) -> Tensor:
        """The rows of the labels x, (batch,), and their δ: (batch, channels)."""
        labels, y = x, self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            for rows in self._rows(self.active_adapters):
                y = y + self._delta(labels, rows).to(y.dtype)
            return y
        entries = [names_in(entry) for entry in adapter_names]
        for name in {name for names in entries for name in names} & {*self.difffit_delta}:
            samples = torch.tensor([i for i, names in enumerate(entries) if name in names], device=labels.device)
            (rows,) = self._rows([name])
            y = y.index_add(0, samples, self._delta(labels[samples], rows).to(y.dtype))
        return y

    def _delta(self, labels: Tensor, rows: Tensor) -> Tensor:
        """δ of each label: its row, the last one for the null class, 0 for a class that is not trained."""
        null = len(rows) - 1
        trained = (labels < null) | (labels == self.get_base_layer().num_embeddings - 1)
        return F.embedding(labels.clamp(max=null), rows) * trained[:, None]

    def _merged(self, base: dict[str, Tensor], adapters: list[str]) -> dict[str, Tensor]:
        table = base["weight"].to(torch.promote_types(base["weight"].dtype, torch.float32), copy=True)
        for rows in self._rows(adapters):
            table[: len(rows) - 1] += rows[:-1].detach()
            table[-1] += rows[-1].detach()
        return {"weight": table}

    def _rows(self, adapters: list[str]) -> list[Tensor]:
        """The rows of each adapter, (K + 1, channels), at its scale."""
        return [self._at_scale("difffit_delta", name) for name in adapters if name in self.difffit_delta]
