"""What a DiffFit adapter trains, and for which base and classes: `DiffFitConfig`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, PeftType

from .hub import check_adapter_file


@dataclass
class DiffFitConfig(PeftConfig):
    """Configuration of DiffFit (Xie et al., ICCV 2023, arXiv 2304.06648).

    `DiffFitConfig()` trains every bias, every affine norm, the class embedding and, on the attention and feed-forward
    layers of the first half of the blocks, the scale factors γ. `DiffFitConfig(gamma_modules=[])` is BitFit with the
    class embedding.

    Args:
        target_modules: layers whose bias is trained (δ) and, for norms, whose scale is trained too (γ). A list of
            names or name endings, a regular expression for the whole name, or "all-linear". `None`: every layer with a
            bias, every affine norm, and the class embedding.
        exclude_modules: layers left alone, named in the same two ways.
        gamma_modules: layers whose output is multiplied by γ, named in the same two ways. `None`: the preset of the
            architecture. `[]`: none.
        gamma_layers: indices of the blocks whose layers may get γ. `None`: all blocks for `gamma_modules`, and the
            first half of them for the preset.
        num_classes: number of classes of the new domain, K. Trains rows 0..K-1 of the class table and the null row.
            `None`: every row of the table.
        id2label: names of those classes, `{0: "apple pie", ...}`. Sets `num_classes` and travels with the adapter.
        init_class_rows: where the rows of `num_classes` start. "null": from the null row, the class "anything". "base":
            from the base's own rows, for classes that the base knows by the same indices.
        sample_size: side of the latents the adapter is made for. `None`: the base's own.
        modules_to_save: modules trained and saved whole beside the DiffFit layers.
        init_weights: `True` starts from γ = 1, δ = 0. `False` starts from random values (for tests).
        base_config: shape of the base the adapter belongs to. Filled in when the adapter is attached.

    Raises:
        ValueError: for a value outside what is allowed; the message says what that is.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers that get δ, and norms γ. None: every bias, norm and the class table."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers left alone."})
    gamma_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers whose output gets γ. None: the architecture's preset. []: none."}
    )
    gamma_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks whose layers may get γ. None: all; the preset: half."}
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "Classes of the new domain. None: every row of the base's class table."}
    )
    id2label: dict[int, str] | None = field(
        default=None, metadata={"help": "Names of the classes, {0: 'apple pie', ...}; implies num_classes."}
    )
    init_class_rows: Literal["null", "base"] = field(
        default="null", metadata={"help": "Start the classes from the null row, or from the base's rows."}
    )
    sample_size: int | None = field(default=None, metadata={"help": "Latent side to adapt to. None: the base's own."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the DiffFit layers."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start from γ = 1 and δ = 0."})
    base_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "Shape of the base; filled in when the adapter is attached."}
    )

    # Names and shapes of the weights in the file this config was loaded beside, checked before a model is changed.
    _shapes_in_file = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DIFFFIT
        for name in ("target_modules", "exclude_modules", "gamma_modules"):
            setattr(self, name, _checked_patterns(name, getattr(self, name)))
        if isinstance(self.modules_to_save, str):
            raise ValueError(f"modules_to_save={self.modules_to_save!r}: must be a list of module names, or None.")
        if self.gamma_layers is not None:
            layers = self.gamma_layers
            if not isinstance(layers, (list, tuple, set)) or not all(_is_int(i) and i >= 0 for i in layers):
                raise ValueError(f"gamma_layers={layers!r}: must be a list of block indices from 0 up, or None.")
            self.gamma_layers = sorted(set(layers))
        self._check_classes()
        if self.sample_size is not None and not (_is_int(self.sample_size) and self.sample_size > 0):
            raise ValueError(f"sample_size={self.sample_size!r}: the side of the latents is an integer above 0.")
        if not isinstance(self.init_weights, bool):
            raise ValueError(f"init_weights={self.init_weights!r}: must be True or False.")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> DiffFitConfig:
        """Loads the config of an adapter, as every `PeftConfig` does.

        `PeftModel.from_pretrained` calls this before it touches the model, and reads the weights after. So that a
        broken file leaves the model as it was, the weights of a local folder are checked here.

        Raises:
            ValueError: if there is no config, or the weights beside it are truncated or not finite.
        """
        weights = Path(pretrained_model_name_or_path, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
        shapes = check_adapter_file(weights) if weights.is_file() else None
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        config._shapes_in_file = shapes
        return config

    def _check_classes(self) -> None:
        if self.init_class_rows not in ("null", "base"):
            raise ValueError(
                f"init_class_rows={self.init_class_rows!r}: must be 'null' or 'base'."
                + nearest(self.init_class_rows, ["null", "base"])
            )
        if self.num_classes is not None and not (_is_int(self.num_classes) and self.num_classes >= 1):
            raise ValueError(f"num_classes={self.num_classes!r}: must be an integer of at least 1, or None.")
        if self.id2label is None:
            return
        if not isinstance(self.id2label, dict) or not self.id2label:
            raise ValueError(f"id2label={self.id2label!r}: must be a dict of class indices and names, or None.")
        try:
            self.id2label = {int(index): label for index, label in self.id2label.items()}  # JSON has string keys
        except (TypeError, ValueError):
            raise ValueError(f"id2label has the keys {list(self.id2label)[:5]}: they must be class indices.") from None
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(
                f"id2label has the keys {sorted(self.id2label)[:5]}...: they must be 0 to {len(self.id2label) - 1}, "
                f"one for each of its {len(self.id2label)} classes."
            )
        if not all(isinstance(label, str) for label in self.id2label.values()):
            raise ValueError("id2label: the names of classes must be strings.")
        if self.num_classes not in (None, len(self.id2label)):
            raise ValueError(
                f"num_classes={self.num_classes}, but id2label names {len(self.id2label)} classes: "
                "make them equal, or leave num_classes out."
            )
        self.num_classes = len(self.id2label)


def nearest(given: Any, allowed: list[str]) -> str:
    """' Did you mean ...?', or nothing where no allowed name is near."""
    close = get_close_matches(str(given), allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_patterns(name: str, value: Any) -> list[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{name}={value!r} is not a regular expression: {error}.") from None
        return value
    if isinstance(value, (list, tuple, set)) and all(isinstance(item, str) and item for item in value):
        return sorted(set(value))
    raise ValueError(f"{name}={value!r}: must be a list of module names, a regular expression, or None.")
