"""DiffFit (Xie et al., ICCV 2023) for PEFT and Diffusers. Importing this package registers the method with PEFT."""

from aenum import extend_enum
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

# peft's register_peft_method takes only names of this closed enum (peft 0.21)
if "DIFFFIT" not in PeftType.__members__:
    extend_enum(PeftType, "DIFFFIT", "DIFFFIT")

from .config import DiffFitConfig  # noqa: E402
from .layer import DiffFitLayer  # noqa: E402
from .model import DiffFitModel  # noqa: E402

if PeftType.DIFFFIT not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="difffit", config_cls=DiffFitConfig, model_cls=DiffFitModel)

__all__ = ["DiffFitConfig", "DiffFitLayer", "DiffFitModel"]
__version__ = "0.1.0"
