"""What a DiffFit adapter trains, and for which base and classes: `DiffFitConfig`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import PIL.ImageColor
from peft import PeftConfig
from peft.utils import PeftType

_MAX_ENTRIES = 2**12  # of a list in a config, which may come from a stranger

COMPONENTS = ("transformer", "transformer_2", "unet")
"""What pipelines of Diffusers call the models that denoise, the main one first."""

FORMAT_VERSION = 1
"""Of the config that is saved. Format 0 had no `format_version`, and other presets (see `families`)."""


@dataclass
class DiffFitConfig(PeftConfig):
    """Configuration of DiffFit (Xie et al., ICCV 2023, arXiv 2304.06648).

    `DiffFitConfig()` trains every bias, every affine norm, the class embedding and the scale factors γ. γ is where the
    family of the model has it (`difffit_peft.families`): for the paper's own model where public DiffFit code has it,
    else on the same layers by their names, in the first half of each list of blocks. `DiffFitConfig(gamma_modules=[])`
    is BitFit with the class embedding.

    `r` is ours and not the paper's, a change of low rank: `DiffFitConfig(gamma_modules=[], r=1,
    exclude_modules=["to_k"])` puts one of rank 1 where γ would be. What it costs is in `docs/results.md`, and how far
    rank 4 goes.

    Args:
        target_modules: layers whose bias is trained (δ) and, for norms, whose scale is trained too (γ). A list of
            names or name endings, a regular expression for the whole name, or "all-linear". `None`: every layer with a
            bias, every affine norm, and the class embedding. A name with a dot in front is a whole name. When the
            adapter is attached, an expression is replaced by the names that it matches, here and below.
        exclude_modules: layers left alone, named in the same two ways.
        gamma_modules: layers whose output is multiplied by γ, named in the same two ways. `None`: the preset of the
            family, within `target_modules`. `[]`: none.
        gamma_layers: indices of the blocks whose layers may get γ, in each list of blocks. `None`: those of the
            preset; all blocks where `gamma_modules` names layers.
        new_biases: also δ on linear layers and convolutions that have no bias, which newer transformers have few of.
            Not the paper's. A merge gives such layers a bias, which Diffusers' `from_pretrained` does not load.
        r: rank of a change B A of the weight, y = γ ⊙ (W x + B A x + b + δ), as LoRA's with alpha = r. 0: none.
        low_rank_modules: linear layers that get it, named in the same two ways. `None`: the preset of the family.
        num_classes: number of classes of the new domain, K. Trains rows 0..K-1 of the class table and the null row.
            `None`: every row of the table.
        id2label: names of those classes, `{0: "apple pie", ...}`. Sets `num_classes` and travels with the adapter.
        init_class_rows: where the rows of `num_classes` start. "null": from the null row, the class "anything". "base":
            from the base's own rows, for classes that the base knows by the same indices. A list: from the rows of
            these classes of the base, one for each new class, which is like it.
        sample_size: side of the latents the adapter is made for. `None`: the base's own.
        background: colour that was behind transparent training images: a name that Pillow knows, or #rrggbb. It travels
            with the adapter, so that an evaluation sees images as training did.
        trained_guidance_scale: scale of the guidance that was trained in; the pipeline then samples without guidance.
        modules_to_save: modules trained and saved whole beside the DiffFit layers.
        init_weights: `True` starts from γ = 1, δ = 0. `False` starts from random values (for tests).
        base_config: shape of the base the adapter belongs to. Filled in when the adapter is attached.
        component: what a pipeline calls the model: "transformer", "transformer_2" or "unet". Filled in where it is
            known.
        format_version: of the saved config. Leave it out. When an adapter is attached, presets are written out as what
            they select in that model: a saved config names its layers.

    Raises:
        ValueError: for a value outside what is allowed; the message says what that is.
    """

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers that get δ, and norms γ. None: every bias, norm and the class table."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Layers left alone."})
    gamma_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Layers whose output gets γ. None: the family's preset. []: none."}
    )
    gamma_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices of the blocks whose layers may get γ. None: the preset's."}
    )
    new_biases: bool = field(default=False, metadata={"help": "Also δ on layers that have no bias."})
    r: int = field(default=0, metadata={"help": "Rank of a change of the weight, as LoRA's. 0: none, as in the paper."})
    low_rank_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Linear layers that get it. None: the family's preset."}
    )
    num_classes: int | None = field(
        default=None, metadata={"help": "Classes of the new domain. None: every row of the base's class table."}
    )
    id2label: dict[int, str] | None = field(
        default=None, metadata={"help": "Names of the classes, {0: 'apple pie', ...}; implies num_classes."}
    )
    init_class_rows: Literal["null", "base"] | list[int] = field(
        default="null",
        metadata={"help": "Start the classes from the null row, from the base's rows, or from these of them."},
    )
    sample_size: int | None = field(default=None, metadata={"help": "Latent side to adapt to. None: the base's own."})
    background: str | None = field(
        default=None, metadata={"help": "Colour that was behind transparent training images."}
    )
    trained_guidance_scale: float | None = field(
        default=None, metadata={"help": "Scale of the guidance that was trained in. None: sampling needs guidance."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained and saved whole beside the DiffFit layers."}
    )
    init_weights: bool = field(default=True, metadata={"help": "Start from γ = 1 and δ = 0."})
    base_config: dict[str, Any] | None = field(
        default=None, metadata={"help": "Shape of the base; filled in when the adapter is attached."}
    )
    component: str | None = field(
        default=None, metadata={"help": "What a pipeline calls the model; filled in where it is known."}
    )
    format_version: int | None = field(default=None, metadata={"help": "Format of the saved config; leave it out."})

    def __post_init__(self) -> None:
        # Of an adapter that was read: the shapes of its weights. A model compares them before it is changed.
        self.weight_shapes: dict[str, tuple[int, ...]] | None = None
        if self.format_version is None:  # a config that names the PEFT it was saved by comes from a file
            self.format_version = 0 if self.peft_version else FORMAT_VERSION
        for name in ("r", "num_classes", "sample_size", "format_version"):
            setattr(self, name, plain(getattr(self, name)))
        if not (_is_int(self.format_version) and 0 <= self.format_version <= FORMAT_VERSION):
            raise ValueError(
                f"format_version={short(self.format_version)}: this difffit_peft reads configs of the formats 0 to "
                f"{FORMAT_VERSION}. A newer difffit_peft reads newer ones: upgrade it."
            )
        from_file = type(vars(self)["peft_type"]) is str  # what is made or copied in memory has PEFT's enum, or nothing
        super().__post_init__()
        self.peft_type = PeftType.DIFFFIT
        for name in ("target_modules", "exclude_modules", "gamma_modules", "low_rank_modules"):
            setattr(self, name, _checked_patterns(name, getattr(self, name), from_file))
        saved = self.modules_to_save
        if saved is not None and (  # peft reads them as regular expressions in places
            not _is_list(saved) or not all(isinstance(m, str) and re.fullmatch(r"[\w.]+", m) for m in saved)
        ):
            raise ValueError(f"modules_to_save={short(saved)}: must be a list of module names, or None.")
        if self.gamma_layers is not None:
            layers = plain(self.gamma_layers)
            layers = [plain(i) for i in layers] if _is_list(layers) else None
            if layers is None or not all(_is_int(i) and i >= 0 for i in layers):
                raise ValueError(
                    f"gamma_layers={short(self.gamma_layers)}: must be a list of block indices from 0 up, or None."
                )
            self.gamma_layers = sorted(set(layers))
        if not (_is_int(self.r) and self.r >= 0):
            raise ValueError(f"r={short(self.r)}: must be an integer, 0 for no change of low rank.")
        if self.low_rank_modules and not self.r:
            raise ValueError(f"low_rank_modules={short(self.low_rank_modules)}: give a rank too, such as r=1.")
        self._check_classes()
        self._check_class_rows()
        if self.sample_size is not None and not (_is_int(self.sample_size) and self.sample_size > 0):
            raise ValueError(f"sample_size={short(self.sample_size)}: the side of the latents is an integer above 0.")
        if self.background is not None:
            parse_colour(self.background)
        trained = self.trained_guidance_scale = plain(self.trained_guidance_scale)
        if trained is not None and not (type(trained) in (int, float) and 0 < trained < math.inf):
            raise ValueError(f"trained_guidance_scale={short(trained)}: must be a finite number above 0, or None.")
        if self.base_config is not None and not isinstance(self.base_config, dict):
            raise ValueError(f"base_config={short(self.base_config)}: must be a dict, or None.")
        for name in ("new_biases", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={short(getattr(self, name))}: must be True or False.")
        if self.component not in (None, *COMPONENTS):
            raise ValueError(
                f"component={short(self.component)}: must be one of {', '.join(COMPONENTS)}, or None."
                + nearest(self.component, [*COMPONENTS])
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> DiffFitConfig:
        """Loads the config of an adapter, as every `PeftConfig` does, and looks at the weights beside it.

        `PeftModel.from_pretrained` calls this before it touches the model, and reads the weights after. So that a
        broken file leaves the model as it was, the weights are checked here.

        Raises:
            ValueError: if there is no config, if it says what no config may, if the weights beside it are truncated or
                not finite, or if fields of the config are given, which the file would write over.
            HfHubHTTPError: of `huggingface_hub`, if it cannot be downloaded.
        """
        from . import reading  # it imports this module

        hub, _, _ = cls._split_kwargs(kwargs)
        if fields := kwargs.keys() & cls.__dataclass_fields__.keys() - hub.keys():
            raise ValueError(f"{sorted(fields)}: load the config first, and then set its fields.")
        folder = reading.adapter_folder(pretrained_model_name_or_path, subfolder, **hub)
        has_weights = (folder / reading.SAFETENSORS_WEIGHTS_NAME).is_file()
        return reading.read_adapter(folder)[0] if has_weights else reading.read_config(folder)

    def _check_classes(self) -> None:
        if self.num_classes is not None and not (_is_int(self.num_classes) and self.num_classes >= 1):
            raise ValueError(f"num_classes={short(self.num_classes)}: must be an integer of at least 1, or None.")
        if self.id2label is None:
            return
        if not isinstance(self.id2label, dict) or not self.id2label:
            raise ValueError(f"id2label={short(self.id2label)}: must be a dict of class indices and names, or None.")
        try:
            self.id2label = {  # JSON has string keys
                int(index) if isinstance(index, str) else operator.index(index): label
                for index, label in self.id2label.items()
            }
        except (TypeError, ValueError):
            raise ValueError(f"id2label has the keys {listed(self.id2label)}: they must be class indices.") from None
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(
                f"id2label has the keys {listed(sorted(self.id2label))}: they must be 0 to {len(self.id2label) - 1}, "
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

    def _check_class_rows(self) -> None:
        rows = plain(self.init_class_rows)
        if isinstance(rows, str):
            if rows not in ("null", "base"):
                raise ValueError(
                    f"init_class_rows={short(rows)}: must be 'null', 'base', or a list of classes of the base."
                    + nearest(rows, ["null", "base"])
                )
            return
        if not _is_list(rows) or not self.num_classes or len(rows) != self.num_classes:
            raise ValueError(
                f"init_class_rows={short(rows)}: must be 'null', 'base', or a list of classes of the base, one for "
                f"each of the {self.num_classes or 0} new ones."
            )
        self.init_class_rows = [plain(row) for row in rows]
        if not all(_is_int(row) and row >= 0 for row in self.init_class_rows):
            raise ValueError(f"init_class_rows={short(rows)}: classes of the base are integers from 0 up.")


def nearest(given: Any, allowed: list[str]) -> str:
    """' Did you mean ...?', or nothing where no allowed name is near, or the name itself is allowed."""
    close = get_close_matches(str(given), allowed, n=1)
    return f" Did you mean {close[0]!r}?" if close and close[0] != given else ""


def listed(values: Iterable[Any], most: int = 12) -> str:
    """'a', 'b' and 3 more: what a message shows of many values."""
    values = list(values)
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(short(value, 80) for value in values[:most]) + more


def plain(value: Any) -> Any:
    """Numbers of NumPy and PyTorch, and arrays of them, as Python's own; any other value as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def parse_colour(name: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour that is a name Pillow knows, or #rrggbb; another is a `ValueError`."""
    try:
        colour = PIL.ImageColor.getrgb(name)
    except (ValueError, TypeError):
        colour = (0, 0, 0, 0)
    if len(colour) != 3:
        raise ValueError(
            f"background is {short(name)}, which is not a valid colour: give a name such as white, or #rrggbb."
        )
    return colour


def finite(value: Any) -> float | None:
    """The value, if it is a finite number: of Python, NumPy or PyTorch."""
    try:
        return float(value) if math.isfinite(value) else None
    except (TypeError, ValueError, OverflowError):
        return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, set)) and len(value) <= _MAX_ENTRIES


def short(value: Any, length: int = 200) -> str:
    """What a message shows of a value that may be of any size."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "an enormous number"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _checked_patterns(name: str, value: Any, from_file: bool) -> list[str] | str | None:
    if value is None or (name, value) == ("target_modules", "all-linear"):
        return value
    if isinstance(value, str):
        if from_file:
            raise ValueError(
                f"{name}={short(value)}: a config in a file must list names. Attach the config that has the "
                "expression to its model and save the adapter again: it then has the names."
            )
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{name}={short(value)} is not a regular expression: {error}.") from None
        return value
    if _is_list(value) and all(isinstance(item, str) and item for item in value):
        return sorted(set(value))
    raise ValueError(
        f"{name}={short(value)}: must be a list of at most {_MAX_ENTRIES} module names, a regular expression, or None."
    )
