"""DiffFit (Xie et al., ICCV 2023) for PEFT and Diffusers. Importing this package registers the method with PEFT."""

from . import log_filters  # noqa: F401 (before PEFT)

from .plugin import register as _register  # isort: skip (checks PEFT's version first)
from .config import DiffFitConfig
from .explanation import Explanation, explain
from .families.dit.pipeline import DiffFitDiTPipeline
from .hotswap import hotswap_adapter
from .layer import DiffFitLayer
from .loader import DiffFitLoaderMixin
from .model import DiffFitModel
from .pool import AdapterPool

_register()

__all__ = [
    "AdapterPool",
    "DiffFitConfig",
    "DiffFitDiTPipeline",
    "DiffFitLayer",
    "DiffFitLoaderMixin",
    "DiffFitModel",
    "Explanation",
    "explain",
    "hotswap_adapter",
]
__version__ = "0.1.0"
