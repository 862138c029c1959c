"""The seam to PEFT: which versions fit, the name of the method in PEFT's closed lists, and its registration."""

import re
from importlib.metadata import version
from typing import Union

# The package leans on parts of PEFT that change between minor versions; pyproject.toml states the same range.
if tuple(map(int, re.findall(r"\d+", version("peft"))[:2])) != (0, 21):
    raise ImportError(
        f"difffit_peft needs peft>=0.21,<0.22, but peft {version('peft')} is installed: pip install 'peft>=0.21,<0.22'"
    )

import peft.mixed_model
from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import mixed
from peft.utils import PeftType, register_peft_method

# peft's register_peft_method takes only names of this closed enum (peft 0.21)
if "DIFFFIT" not in PeftType.__members__:
    extend_enum(PeftType, "DIFFFIT", "DIFFFIT")

from .config import DiffFitConfig  # noqa: E402
from .layer import DiffFitLayer  # noqa: E402
from .mixed import DiffFitMixedModel  # noqa: E402
from .model import DiffFitModel  # noqa: E402


def register() -> None:
    """Makes DiffFit one of PEFT's methods, and one that `PeftMixedModel` takes. To do it again is harmless."""
    if PeftType.DIFFFIT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name="difffit", config_cls=DiffFitConfig, model_cls=DiffFitModel, is_mixed_compatible=True)
    if PeftType.DIFFFIT in mixed.COMPATIBLE_TUNER_TYPES:
        return
    mixed.COMPATIBLE_TUNER_TYPES += (PeftType.DIFFFIT,)  # closed lists (peft 0.21)
    mixed.model.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES
    mixed.model.PREFIXES.append(DiffFitModel.prefix)
    mixed.model.Configs = Union[mixed.model.Configs, DiffFitConfig]  # noqa: UP007
    mixed.model.Layers += (DiffFitLayer,)
    peft.mixed_model.MixedModel = DiffFitMixedModel
