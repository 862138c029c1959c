"""The scale of each adapter in a layer, and the verbs that set it: PEFT's, which Diffusers calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Scales:
    """The scales of a layer's adapters."""

    active_adapters: Any  # of BaseTunerLayer
    merged_adapters: list[str]

    def _init_scales(self) -> None:
        self.scale: dict[str, Tensor] = {}  # 0-dim, one per adapter
        self._scaled: set[str] = set()  # the adapters whose scale is not 1
        self._scales_before: dict[str, list[float]] = {}  # what `scale_layer` multiplied, the latest last

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Sets an adapter's scale, in place: 0 is the base, 1 the adapter. Takes back every `scale_layer` of it.

        After `scale_layer(0)`, setting 1 is Diffusers' way to take it back (`unscale_lora_layers`, 0.36 to 0.42): the
        scale is then what it was before.
        """
        before = self._scales_before.pop(adapter_name, [])
        if before and scale == 1 and self.scale[adapter_name] == 0:
            scale = before[0]
        self._fill_scale(adapter_name, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters. Diffusers does so for `attention_kwargs={"scale": scale}`.

        Raises:
            ValueError: if they are merged: their effect is then part of the weights.
        """
        names = [name for name in self.active_adapters if name not in self.merged_adapters]
        if self.merged_adapters and not names and scale != 1:
            raise ValueError(f"{self.merged_adapters} are merged, and cannot be scaled by {scale}: unmerge them first.")
        for name in names:
            if name in self.scale:
                now = float(self.scale[name])
                self._scales_before.setdefault(name, []).append(now)
                self._fill_scale(name, now * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes the latest `scale_layer` back, to the last bit, or all of them for `None`."""
        for name in self.active_adapters:
            if before := self._scales_before.get(name):
                self._fill_scale(name, before[0] if scale is None else before[-1])
                del before[0 if scale is None else -1 :]

    def _fill_scale(self, adapter_name: str, scale: float) -> None:
        self.scale.setdefault(adapter_name, torch.tensor(1.0, device="cpu")).fill_(scale)
        (self._scaled.discard if scale == 1 else self._scaled.add)(adapter_name)

    def _forget_scale(self, adapter_name: str) -> None:
        self.scale.pop(adapter_name, None)
        self._scaled.discard(adapter_name)
        self._scales_before.pop(adapter_name, None)
