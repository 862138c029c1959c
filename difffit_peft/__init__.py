"""DiffFit (Xie et al., ICCV 2023) for PEFT and Diffusers. Importing this package registers the method with PEFT."""

import re
from importlib.metadata import version

from . import noise  # noqa: F401 (before PEFT)

# The package leans on parts of PEFT that change between minor versions; pyproject.toml states the same range.
if tuple(map(int, re.findall(r"\d+", version("peft"))[:2])) != (0, 21):
    raise ImportError(
        f"difffit_peft needs peft>=0.21,<0.22, but peft {version('peft')} is installed: pip install 'peft>=0.21,<0.22'"
    )

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

# peft's register_peft_method takes only names of this closed enum (peft 0.21)
if "DIFFFIT" not in PeftType.__members__:
    extend_enum(PeftType, "DIFFFIT", "DIFFFIT")

from .config import DiffFitConfig  # noqa: E402
from .hotswap import hotswap_adapter  # noqa: E402
from .layer import DiffFitLayer  # noqa: E402
from .mixed import register as _register_mixed  # noqa: E402
from .model import DiffFitModel  # noqa: E402
from .pipeline import DiffFitDiTPipeline, DiffFitLoaderMixin  # noqa: E402

if PeftType.DIFFFIT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="difffit", config_cls=DiffFitConfig, model_cls=DiffFitModel, is_mixed_compatible=True)
_register_mixed()

__all__ = [
    "DiffFitConfig",
    "DiffFitDiTPipeline",
    "DiffFitLayer",
    "DiffFitLoaderMixin",
    "DiffFitModel",
    "hotswap_adapter",
]
__version__ = "0.1.0"
